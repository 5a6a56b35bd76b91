"""FLUX.1 Krea [dev] on Apple silicon, with MLX.

    from mlx_flux_krea import FluxPipeline
    pipe = FluxPipeline.from_pretrained("path or name")
    pipe("a frog", seed=1).images[0].save("frog.png")

Importing this package is cheap: MLX and the networks are imported when a name below is first used.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pipeline import FluxPipeline, Request, Result

__version__ = "0.1.0"
__all__ = ["FluxPipeline", "Request", "Result", "__version__"]


def __getattr__(name: str):
    if name in ("FluxPipeline", "Request", "Result"):
        from . import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
