"""A small trained model in FLUX.1's architecture, and its training. `model/` is an ordinary model folder."""

from mlx_flux_krea.home import NANO as FOLDER

__all__ = ["FOLDER"]
