"""A small model of our own in FLUX.1's architecture, and how it was trained. `model/` is an ordinary model folder."""

from mlx_flux_krea.home import NANO as FOLDER

__all__ = ["FOLDER"]
