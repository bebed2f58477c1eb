"""Names of latents from vectors of words (``sparsary name``)."""
