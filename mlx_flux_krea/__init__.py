"""FLUX.1 Krea [dev] on Apple silicon, with MLX.

    from mlx_flux_krea import FluxPipeline
    pipe = FluxPipeline.from_pretrained("path or name")
    pipe("a frog", seed=1).images[0].save("frog.png")

Importing this package is cheap: MLX and the networks are imported when a name below is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers see these names here; at run time `__getattr__` imports them
    from .inputs.canny import CannyDetector
    from .inputs.depth import DepthPreprocessor
    from .inputs.image import open_image as load_image
    from .pipeline import FluxPipeline
    from .pipeline import FluxPipeline as FluxControlImg2ImgPipeline
    from .pipeline import FluxPipeline as FluxControlInpaintPipeline
    from .pipeline import FluxPipeline as FluxControlPipeline
    from .pipeline import FluxPipeline as FluxFillPipeline
    from .pipeline import FluxPipeline as FluxImg2ImgPipeline
    from .pipeline import FluxPipeline as FluxInpaintPipeline
    from .pipeline import FluxPipeline as FluxKontextPipeline
    from .prior import FluxPriorReduxPipeline
    from .request import Request, ResolvedRequest, Result

__version__ = "0.1.0"
__all__ = [
    "CannyDetector", "DepthPreprocessor", "FluxControlImg2ImgPipeline", "FluxControlInpaintPipeline",
    "FluxControlPipeline", "FluxFillPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxKontextPipeline",
    "FluxPipeline", "FluxPriorReduxPipeline", "Request", "ResolvedRequest", "Result", "__version__", "load_image",
]  # fmt: skip

_ELSEWHERE = {  # modules other than `pipeline`, and names there
    "load_image": ("inputs.image", "open_image"),
    "CannyDetector": ("inputs.canny", "CannyDetector"),
    "DepthPreprocessor": ("inputs.depth", "DepthPreprocessor"),
    "FluxPriorReduxPipeline": ("prior", "FluxPriorReduxPipeline"),
}


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        from importlib import import_module

        module, own = _ELSEWHERE[name]
        return getattr(import_module(f"{__name__}.{module}"), own)
    if name in __all__:
        from . import pipeline

        return getattr(pipeline, "FluxPipeline" if name.endswith("Pipeline") else name)  # one class has all their names
    if name[:1].isupper():  # of a class; modules are asked for here too
        from .compat import absent_class

        if sentence := absent_class(name, __all__):  # Python would replace the text of an AttributeError
            raise ImportError(f"cannot import name {name!r} from {__name__!r}: {sentence}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
