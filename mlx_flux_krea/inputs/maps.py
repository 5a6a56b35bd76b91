"""Maps that a run makes from the photo of its `control_image`: edges, or depth.

A map is made at the size of the picture, after the filters have seen the photo, and stays for the pictures that follow.
"""

import hashlib
from collections.abc import Callable

import mlx.core as mx
from PIL import Image

from .. import home
from ..files import sha256_if_exists
from ..weights import ComponentFolder, open_component
from .canny import edge_map
from .depth import depth_map


def open_depth() -> ComponentFolder:
    """Opens the installed depth network, and checks the headers of its shards.

    Raises:
        ModelError: it is not installed (with the command that installs it), or damaged.
    """
    folder = open_component("depth")
    folder.check()
    return folder


def depth_sha256() -> str | None:
    """Returns the hash of the installed depth network's manifest, for a picture's record; None: none is installed."""
    return sha256_if_exists(home.path(home.COMPONENTS, "depth", "manifest.json"))


class MapMaker:
    """Makes maps. The last one stays in memory, the depth network does not."""

    def __init__(self):
        self._last: tuple[tuple, Image.Image] | None = None

    def make(
        self, kind: str, photo: Image.Image, depth: ComponentFolder | None, make_run: Callable[[int], Callable]
    ) -> Image.Image:
        """Returns the map of a photo, in its size and mode RGB.

        Args:
            kind: one of `presets.MAPS`.
            photo: in mode RGB and at the size of the picture.
            depth: from `open_depth`, where the kind is "depth".
            make_run: called with the number of the network's stages; returns a `run` that evaluates them one by one,
                reports progress and can be stopped.

        Raises:
            ModelError: weights of the depth network are missing or damaged.
        """
        made_by = depth and (str(depth.path), sha256_if_exists(depth.path / "manifest.json"))
        key = kind, made_by, photo.size, hashlib.sha256(photo.tobytes()).hexdigest()
        if self._last is None or self._last[0] != key:
            if kind == "depth":
                assert depth is not None  # the pipeline has opened it
                network = depth.networks["depth"].load(mx.float32)
                made = Image.fromarray(depth_map(network, photo, make_run(network.stages))).convert("RGB")
            else:
                made = edge_map(photo)
            self._last = key, made
        return self._last[1]

    def forget(self) -> None:
        """Drops the last map: its values are not to be trusted."""
        self._last = None
