"""Noise, schedule and sampler as functions, and previews of what a step already knows."""
