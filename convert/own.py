"""A model folder of ours as a source: stored again in another precision, from what is in it."""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_flux_krea.config import ModelIndex, Quantization
from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.weights import COMPONENTS, PACKED, ModelFolder, open_model, read_json

from .layouts import Found, Layout, target_shapes
from .quantize import Layers, dequantize
from .remap import Plan, Target
from .sources import Source, Tensor


@dataclass(frozen=True)
class OwnTarget(Target):
    """A tensor that is stored under our names and in our axes, in one piece or packed."""

    q: Quantization | None

    def read(self) -> list[mx.array]:
        """The tensor, or `weight`, `scales` and `biases`, as they are stored."""
        return [_read(tensor) for tensor in self.sources]

    def make(self) -> mx.array:
        """The tensor; where it is packed its values, in float32."""
        return dequantize(self.read(), self.q) if self.q else self.read()[0]


@dataclass(frozen=True)
class Own:
    """What is converted, and what it says of itself."""

    folder: ModelFolder
    found: dict[str, Found]
    plans: dict[str, tuple[object, Plan]]
    layers: dict[str, Layers]

    @property
    def index(self) -> ModelIndex:
        """Its facts; the record of what it was made from goes on in what is made from it."""
        return self.folder.index

    def check(self, hashes: dict[Path, str]) -> None:
        """Compares hashes of its shards with its manifest: nobody should make a new folder of a damaged one.

        Raises:
            ModelError: naming the first that differs.
        """
        manifest = read_json(self.folder.path / "manifest.json")
        for file, digest in hashes.items():
            entry = manifest.get(file.relative_to(self.folder.path).as_posix())
            if not isinstance(entry, dict) or entry.get("sha256") != digest:
                raise ModelError(f"{file} is not what its manifest.json says", "an unchanged file", "convert it again")


def open_own(path: Path) -> Own:
    """A model folder with the plan to copy it.

    Raises:
        ModelError: a damaged folder.
    """
    folder = open_model(path)
    folder.check()
    found, plans, layers = {}, {}, {}
    for component in COMPONENTS:
        config, layers[component] = folder.sizes[component], folder.layers(component)
        tensors = {n: Tensor(n, file, info) for n, (file, info) in folder.tensors(component).items()}
        files = tuple(sorted({tensor.path for tensor in tensors.values()}))
        source = Source(path / component, files, tensors, {}, component)
        found[component] = Found(source, Layout("flux-krea model folder", component, (), ()), tensors)
        targets = []
        for name, shape in target_shapes(component, config).items():
            q = layers[component].get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            parts = [name, *(name.removesuffix("weight") + part for part in ("scales", "biases") if q)]
            targets.append(OwnTarget(name, shape, tuple(tensors[part] for part in parts if part in tensors), False, q))
        plans[component] = (config, Plan(tuple(targets), ()))
    return Own(folder, found, plans, layers)


def _read(tensor: Tensor) -> mx.array:
    kinds = {name: getattr(np, str(kind).removeprefix("mlx.core.")) for kind, name in PACKED.items()}
    if tensor.dtype not in kinds:
        return tensor.read()
    count = (tensor.info.end - tensor.info.start) // kinds[tensor.dtype]().itemsize
    try:
        data = np.fromfile(tensor.path, kinds[tensor.dtype], count, offset=tensor.info.start)
        return mx.array(data.reshape(tensor.shape))
    except (OSError, ValueError):
        raise ModelError(f"{tensor.path} cannot be read, or ended inside {tensor.name}", "a complete file") from None
