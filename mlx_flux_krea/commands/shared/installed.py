"""What is installed in the home folder, from its JSON and the sizes of its files; no file of weights is opened."""

from dataclasses import dataclass
from pathlib import Path

from mlx_flux_krea.errors import ModelError, amount


@dataclass(frozen=True)
class Installed:
    """A model or a filter.

    Attributes:
        name: of its folder.
        kind: "model" or "filter".
        path: its folder.
        bytes: on disk.
        precision: of the most of its largest network; of a damaged one, empty.
        license: as its model_index.json says.
        base: what it was made from.
        filters: "required" or "none"; of a filter, empty.
        default: whether it is meant where none is named.
        problem: why it cannot be used, or None.
    """

    name: str
    kind: str
    path: Path
    bytes: int
    precision: str
    license: str
    base: str
    filters: str
    default: bool
    problem: str | None


def find_installed() -> list[Installed]:
    """Models by their names, then the filters that are there.

    Raises:
        ModelError: config.json is damaged.
    """
    from mlx_flux_krea import home
    from mlx_flux_krea.filters.judges import FILTERS
    from mlx_flux_krea.home import default_model, installed_models

    models, said = installed_models(), default_model()
    default = said or (next(iter(models)) if len(models) == 1 else None)
    filters = {name: path for name in FILTERS if (path := home.path(home.FILTERS, name)).is_dir()}
    return [_look("model", name, path, name == default) for name, path in models.items()] + [
        _look("filter", name, path, False) for name, path in filters.items()
    ]


def disk_bytes(path: Path) -> int:
    """Of a file, or of all files in a folder; links are not followed."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(disk_bytes(one) for one in path.iterdir())


def missing_parts(path: Path) -> str | None:
    """What of a folder of ours is not there as its manifest.json has it, judged by sizes; None: all is.

    Raises:
        ModelError: no manifest.json that can be read.
    """
    from mlx_flux_krea.files import read_json

    for name, entry in read_json(path / "manifest.json").items():
        file, size = path / name, entry.get("bytes") if isinstance(entry, dict) else None
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {amount(file.stat().st_size, 'byte')}, not {size}"
    return None


def _look(kind: str, name: str, path: Path, default: bool) -> Installed:
    from mlx_flux_krea.weights import ModelFolder, open_folder

    count = disk_bytes(path.resolve())
    try:
        folder, problem = open_folder(path), missing_parts(path)
    except ModelError as error:
        return Installed(name, kind, path, count, "", "", "", "", default, str(error))
    network = next(iter(folder.networks.values()))
    precision = f"{network.quantization}, {network.dtype}" if network.quantization else network.dtype
    filters = ""
    if isinstance(folder, ModelFolder):
        filters = "required" if folder.requires_filters else "none"
    return Installed(
        name, kind, path, count, precision, folder.index.license, folder.index.base, filters, default, problem
    )
