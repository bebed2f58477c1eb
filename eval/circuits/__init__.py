"""Circuits: what a latent's pre-activation is made of, and what the latent does in turn."""
