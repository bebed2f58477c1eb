"""Descriptions of every latent: top contexts, related latents, promoted tokens, scores, and explanations."""
