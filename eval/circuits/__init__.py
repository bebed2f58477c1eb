"""Circuit discovery on prompt pairs, and evaluation of circuits of latents, neurons, components and edges."""
