"""Contrast steering (``sparsary steer``): latents that tell two texts apart, and what raising them does to a model."""
