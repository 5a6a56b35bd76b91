"""A small model of our own in FLUX.1's architecture: what it draws, and its training. Its weights are not here yet."""
