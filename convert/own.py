"""A folder of ours as a source: converts it to another precision."""

from dataclasses import dataclass, replace
from pathlib import Path

from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.files import read_json
from mlx_flux_krea.models.config import ComponentIndex, ModelIndex
from mlx_flux_krea.models.filter_config import OWN_LAYOUT
from mlx_flux_krea.weights import ComponentFolder, FilterFolder, ModelFolder, Sizes, open_folder

from .fit import target_shapes
from .layouts import Layout, SourceComponent
from .quantize import Layers
from .remap import ComponentPlan, Target
from .sources import open_sources


@dataclass(frozen=True)
class OwnFolder:
    """A folder of ours, with the plan to copy its tensors."""

    folder: ModelFolder | FilterFolder | ComponentFolder
    components: dict[str, SourceComponent]
    plans: dict[str, tuple[Sizes, ComponentPlan]]
    layers: dict[str, Layers]

    @property
    def index(self) -> ModelIndex | ComponentIndex:
        """The folder's index; its records of sources are continued in the new folder."""
        return self.folder.index

    @property
    def decided_index(self) -> ModelIndex | ComponentIndex:
        """The folder's index with the requirement of filters as it is decided today; the new folder inherits it."""
        if isinstance(self.folder, ModelFolder):
            return replace(self.folder.index, filters="required" if self.folder.requires_filters else "none")
        return self.folder.index

    @property
    def is_by_gptq(self) -> bool:
        """True where the folder was rounded by GPTQ."""
        return isinstance(self.folder, ModelFolder) and self.folder.index.is_by_gptq

    def check(self, hashes: dict[Path, str]) -> None:
        """Compares hashes of its shards with its manifest, so that no new folder is made from a damaged one.

        Raises:
            ModelError: naming the first shard that differs.
        """
        manifest = read_json(self.folder.path / "manifest.json")
        for file, digest in hashes.items():
            entry = manifest.get(file.relative_to(self.folder.path).as_posix())
            if not isinstance(entry, dict) or entry.get("sha256") != digest:
                raise ModelError(f"{file} differs from its manifest.json", "an unchanged file", "convert it again")


def open_own(path: Path) -> OwnFolder:
    """Opens a folder of ours and plans to copy it.

    Raises:
        ModelError: a damaged folder.
    """
    folder = open_folder(path)
    folder.check()
    components, plans, layers = {}, {}, {}
    for source in open_sources([path]):
        component = source.component
        assert component is not None  # the source is a folder of components
        config, layers[component] = folder.networks[component].sizes, folder.networks[component].layers()
        components[component] = SourceComponent(source, Layout(OWN_LAYOUT, component, (), ()), source.tensors)
        targets = []
        for name, shape in target_shapes(component, config).items():
            targets.append(Target(name, shape, (source.tensors[name],), swap=False, torch_axes=False))
        plans[component] = (config, ComponentPlan(tuple(targets), ()))
    return OwnFolder(folder, components, plans, layers)
