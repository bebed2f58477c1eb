"""Analysis of weights alone: connections between latents, attention heads and linear readers."""
