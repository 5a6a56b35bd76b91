"""Everything installed in the home folder, read from JSON and file sizes; no file of weights is opened."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_flux_krea import home
from mlx_flux_krea.adapters.installed import FACTS, installed
from mlx_flux_krea.adapters.parts import read_facts
from mlx_flux_krea.errors import ModelError, amount
from mlx_flux_krea.files import may_exist, read_json
from mlx_flux_krea.filters.judges import FILTERS
from mlx_flux_krea.weights import ModelFolder, open_folder

BUILT_IN = "built in"  # kind of the small model, which cannot be removed


@dataclass(frozen=True, kw_only=True)
class Installed:
    """An installed model, adapter, component or filter. Of a damaged one, texts read from its files are empty.

    Attributes:
        name: of its folder.
        kind: "model", "adapter", "component", "filter", or `BUILT_IN`.
        path: its folder.
        bytes: on disk.
        precision: of most layers of its largest network; of an adapter, its formulas and ranks.
        license: from its model_index.json.
        base: the model that it was converted from.
        task: of a model, with the kind of a control model's maps; empty for everything else.
        filters: "required" or "none"; empty for a filter and a component.
        triggers: words that the file of an adapter says the prompt needs.
        default: the model that is used where none is named.
        problem: why it cannot be used, or None.
    """

    name: str
    kind: str
    path: Path
    bytes: int
    precision: str = ""
    license: str = ""
    base: str = ""
    task: str = ""
    filters: str = ""
    triggers: tuple[str, ...] = ()
    default: bool = False
    problem: str | None = None


def find_installed() -> list[Installed]:
    """Lists the models by name, then the adapters, the components and the filters.

    Raises:
        ModelError: config.json is damaged.
    """
    models, chosen = home.installed_models(), home.default_model()
    default = chosen or (next(iter(models)) if len(models) == 1 else None)
    filters = {name: path for name in FILTERS if may_exist(path := home.path(home.FILTERS, name))}
    return [
        *(_examine("model", path, name=name, is_default=name == default) for name, path in models.items()),
        *(_examine_adapter(path) for path in installed().values()),
        *(_examine("component", path) for path in home.installed_components().values()),
        *(_examine("filter", path) for path in filters.values()),
    ]


def built_in(always: bool = False) -> list[Installed]:
    """Lists the small model that comes with the program: until another is installed, or while it is the default.

    Args:
        always: list it unless an installed model has its name.
    """
    installed, is_default = home.installed_models(), home.default_model() == home.NANO_NAME
    if home.NANO_NAME in installed or (installed and not (is_default or always)):
        return []
    return [_examine(BUILT_IN, home.NANO, name=home.NANO_NAME, is_default=is_default)]


def disk_bytes(path: Path) -> int:
    """Returns the bytes of a file, or of all files in a folder that may be seen. Links are not followed."""
    try:
        if path.is_symlink() or not path.is_dir():
            return path.lstat().st_size
        children = list(path.iterdir())
    except PermissionError:
        return 0
    return sum(map(disk_bytes, children))


def missing_parts(path: Path) -> str | None:
    """Compares the sizes of a folder's files with its manifest.json. Returns the first difference, or None.

    Raises:
        ModelError: manifest.json cannot be read.
    """
    for name, entry in read_json(path / "manifest.json").items():
        file, size = path / name, entry.get("bytes") if isinstance(entry, dict) else None
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {amount(file.stat().st_size, 'byte')}, not {size}"
    return None


def formulas(kinds: Sequence[str], ranks: Sequence[int]) -> str:
    """Returns a phrase about an adapter: its formulas with their counts, and its ranks."""
    several = f", rank {ranks[0]}" if len(ranks) == 1 else f", ranks {ranks[0]} to {ranks[-1]}" if ranks else ""
    return " and ".join(kinds) + several


def _examine_adapter(path: Path) -> Installed:
    count = disk_bytes(path.resolve())
    try:
        facts, problem = read_facts(path / FACTS), missing_parts(path)
    except (ModelError, PermissionError) as error:
        return Installed(name=path.name, kind="adapter", path=path, bytes=count, problem=_reason(error, path))
    return Installed(
        name=path.name,
        kind="adapter",
        path=path,
        bytes=count,
        precision=formulas(facts.kinds, facts.ranks),
        license=", ".join(facts.license),
        base=facts.source,
        filters="required" if facts.dev else "none",
        triggers=facts.triggers,
        problem=problem,
    )


def _reason(error: ModelError | PermissionError, path: Path) -> str:
    """Returns why something installed cannot be used, with the file that the system refuses."""
    if isinstance(error, ModelError):
        return str(error)
    return f"{error.filename or path} cannot be read: {error.strerror}"


def _examine(kind: str, path: Path, *, name: str | None = None, is_default: bool = False) -> Installed:
    count, name = disk_bytes(path.resolve()), name or path.name
    try:
        folder, problem = open_folder(path), missing_parts(path)
    except (ModelError, PermissionError) as error:
        problem = _reason(error, path)
        return Installed(name=name, kind=kind, path=path, bytes=count, default=is_default, problem=problem)
    network, filters, task = next(iter(folder.networks.values())), "", ""
    if isinstance(folder, ModelFolder):
        filters = "required" if folder.requires_filters else "none"
        task = folder.index.task_and_kind
    return Installed(
        name=name,
        kind=kind,
        path=path,
        bytes=count,
        precision=f"{network.quantization}, {network.dtype}" if network.quantization else network.dtype,
        license=folder.index.license,
        base=folder.index.base,
        task=task,
        filters=filters,
        default=is_default,
        problem=problem,
    )
