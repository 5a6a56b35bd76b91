"""A model folder of ours as a source: stored again in another precision, from what is in it."""

from dataclasses import dataclass
from pathlib import Path

from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.files import read_json
from mlx_flux_krea.models.config import ModelIndex
from mlx_flux_krea.models.filter_config import FilterIndex
from mlx_flux_krea.weights import FilterFolder, ModelFolder, Sizes, open_folder

from .layouts import Found, Layout, target_shapes
from .quantize import Layers
from .remap import Plan, Target
from .sources import open_sources


@dataclass(frozen=True)
class Own:
    """What is converted, and what it says of itself."""

    folder: ModelFolder | FilterFolder
    found: dict[str, Found]
    plans: dict[str, tuple[Sizes, Plan]]
    layers: dict[str, Layers]

    @property
    def index(self) -> ModelIndex | FilterIndex:
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
    folder = open_folder(path)
    folder.check()
    found, plans, layers = {}, {}, {}
    for source in open_sources([path]):
        component = source.component
        config, layers[component] = folder.networks[component].sizes, folder.networks[component].layers()
        found[component] = Found(source, Layout("flux-krea model folder", component, (), ()), source.tensors)
        targets = []
        for name, shape in target_shapes(component, config).items():
            targets.append(Target(name, shape, (source.tensors[name],), swap=False, torch_axes=False))
        plans[component] = (config, Plan(tuple(targets), ()))
    return Own(folder, found, plans, layers)
