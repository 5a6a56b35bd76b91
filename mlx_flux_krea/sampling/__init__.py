"""Noise, schedule and sampler as functions, and previews of unfinished pictures."""
