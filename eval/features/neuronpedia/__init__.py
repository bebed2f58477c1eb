"""Descriptions of latents in the files that Neuronpedia imports."""
