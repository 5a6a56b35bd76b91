"""FLUX.1 Krea [dev] on Apple silicon, with MLX.

    from mlx_flux_krea import FluxPipeline
    pipe = FluxPipeline.from_pretrained("path or name")
    pipe("a frog", seed=1).images[0].save("frog.png")

Importing this package is cheap: MLX and the networks are imported when a name below is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers see these names here; at run time `__getattr__` imports them
    from .pipeline import FluxPipeline
    from .request import Request, ResolvedRequest, Result

__version__ = "0.1.0"
__all__ = ["FluxPipeline", "Request", "ResolvedRequest", "Result", "__version__"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
