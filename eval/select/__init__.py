"""Selection of training data by latents (``sparsary select``)."""
