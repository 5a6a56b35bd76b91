"""Depth maps of photos, by Depth Anything V2 Small (`flux-krea convert depth-anything/Depth-Anything-V2-Small-hf`).

    image = DepthPreprocessor.from_pretrained("LiheYoung/depth-anything-large-hf")(photo)[0]    image_gen_aux's class

Black Forest Labs made the maps of FLUX.1 Depth [dev] with another network, Depth Anything Large, whose raw results
were taken for levels from 0 to 255. Those of V2 Small have another range, so a map here is scaled from its own least
to its own largest value, as `image_gen_aux` does: white is nearest. It is resized to the photo by cubic interpolation
with a wider filter where it shrinks, as Black Forest Labs' code does (black-forest-labs/flux, image_embedders.py).
"""

import logging
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..errors import ModelError, UsageError
from ..models import Runner
from ..models.depth import DepthAnything, preprocess
from ..weights import ComponentFolder, open_component, open_folder
from .image import open_image

logger = logging.getLogger("mlx_flux_krea")


class DepthPreprocessor:
    """Makes depth maps of photos, as `image_gen_aux.DepthPreprocessor` does.

    Args:
        folder: of the depth network; None: the installed one.
    """

    def __init__(self, folder: ComponentFolder | None = None):
        self.folder = folder or open_component("depth")

    @classmethod
    def from_pretrained(cls, pretrained_model_or_path: str | os.PathLike = "") -> "DepthPreprocessor":
        """Opens a depth network.

        Args:
            pretrained_model_or_path: a converted folder. Any repository stands for the installed network, which a log
                line names if it is another one.

        Raises:
            ModelError: no depth network is installed, or another kind of folder is named.
        """
        path = Path(os.path.expanduser(pretrained_model_or_path))
        if str(pretrained_model_or_path) and path.exists():
            folder = open_folder(path)
            if not isinstance(folder, ComponentFolder) or folder.kind != "depth":
                raise ModelError(f"{path} is no depth network", "a folder made by flux-krea convert")
            return cls(folder)
        self = cls()
        asked, used = str(pretrained_model_or_path), self.folder.index
        if asked and asked.rpartition("/")[2] != used.name:
            logger.info("%s: the installed depth network is used, %s (%s)", asked, used.name, used.base)
        return self

    def to(self, *_: Any, **__: Any) -> "DepthPreprocessor":
        """Returns itself: MLX chooses the device."""
        return self

    def __call__(self, image: Any, *, invert: bool = False, return_type: str = "pil") -> list[Any]:
        """Returns the depth map of a photo, in its size.

        Args:
            image: any image that `open_image` takes.
            invert: make what is nearest black.
            return_type: "pil" or "np".

        Returns:
            A list with one PIL image in mode L, or one array (H, W) uint8.

        Raises:
            UsageError: no image, or an unknown `return_type`.
            ModelError: damaged weights.
        """
        if return_type not in ("pil", "np"):
            raise UsageError(f"`return_type` is {return_type!r}", '"pil" or "np"')
        photo = open_image(image)
        if photo is None:
            raise UsageError("no `image` was given", "the photo to estimate the depth of")
        # loaded for each call: arrays belong to the thread that made them, and a call may come from any
        levels = depth_map(self.folder.networks["depth"].load(mx.float32), photo)
        levels = 255 - levels if invert else levels
        return [levels if return_type == "np" else Image.fromarray(levels)]


def depth_map(network: DepthAnything, photo: Image.Image, run: Runner | None = None) -> np.ndarray:
    """Returns the depth of a photo from 0 (farthest) to 255 (nearest), (H, W) uint8; all 0 where nothing differs.

    Args:
        network: the depth network.
        photo: in mode RGB.
        run: evaluates the stages of the network; None: one by one.

    Raises:
        ModelError: the network gave NaN.
    """
    depth = np.array(network(preprocess(photo, network.config), run or _evaluated)[0].astype(mx.float32))
    if not np.isfinite(depth).all():
        raise ModelError("the depth network gave NaN or infinities", "finite numbers", "convert it again")
    resized = Image.fromarray(depth).resize(photo.size, Image.Resampling.BICUBIC)
    return _levels(np.asarray(resized))


def _levels(depth: np.ndarray) -> np.ndarray:
    """Scales (H, W) float32 from its least to its largest value to 0 to 255."""
    low, high = float(depth.min()), float(depth.max())
    if not high > low:
        logger.warning("the depth network found the same depth everywhere: the map is black")
        return np.zeros(depth.shape, np.uint8)
    return np.round((depth - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)


def _evaluated(stage, *args):
    """Calls a stage and evaluates its result."""
    result = stage(*args)
    mx.eval(result)
    return result
