"""Makes `model_index.json`: family, licence, schedule and defaults, from sizes and names."""

from dataclasses import replace
from pathlib import Path

from mlx_flux_krea import __version__, presets
from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.files import read_json
from mlx_flux_krea.licence import DEV, FLUX_1_SCHNELL, Evidence, decide, is_dev, is_schnell
from mlx_flux_krea.models import config as configs
from mlx_flux_krea.models.depth_config import DEPTH_ANYTHING_V2_SMALL
from mlx_flux_krea.models.filter_config import NSFW_VIT, PIXTRAL_12B, FilterIndex

from .layouts import SourceComponent
from .sizes import require
from .tasks import Task

# Fields of diffusers' scheduler_config.json that would change the picture, with the values that our sampler implements.
_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": (True, False),
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "time_shift_type": "exponential",
    "stochastic_sampling": False,
}


def make_index(
    components: dict[str, SourceComponent], config: configs.FluxConfig, evidence: Evidence, task: Task
) -> configs.ModelIndex:
    """Returns the index of a model folder, without the records of its sources.

    Args:
        components: the layout of every component.
        config: sizes of the transformer.
        evidence: everything known of the model's licence.
        task: of the transformer.

    Raises:
        ModelError: the scheduler is not one that our sampler implements.
    """
    source = components["transformer"].source
    inside = source.component or source.folder.name == "transformer"
    root = source.folder.resolve().parent if inside else source.path
    name, names, repository = _names(root)
    family = _family(config, names, evidence, task)
    is_fast = family.hint == presets.SCHNELL.hint or not (config.guidance_embed or family == presets.DE_DISTILLED)
    scheduler = root / "scheduler" / "scheduler_config.json"
    if scheduler.exists():
        schedule = _schedule(read_json(scheduler), str(scheduler))
    else:
        schedule = presets.NO_SHIFT if is_fast else presets.DYNAMIC_SHIFT
    return configs.ModelIndex(
        name=name,
        base=family.base,
        license=DEV if family.license == "unknown" and is_dev(evidence) else family.license,
        filters="required" if decide(evidence).required else "none",
        max_sequence_length=(presets.MAX_SEQUENCE_LENGTH_SCHNELL if is_fast else presets.MAX_SEQUENCE_LENGTH),
        schedule=schedule,
        defaults=family.defaults,
        converter=__version__,
        repository=repository,
        task=family.task,
        kind=family.kind,
    )


def make_filter_index(component: SourceComponent, config) -> FilterIndex:
    """Returns the index of a filter's folder, without the records of its sources.

    Args:
        component: its layout.
        config: its sizes.
    """
    name = _names(component.source.folder.resolve())[0]
    for published, base in ((NSFW_VIT, "Falconsai/nsfw_image_detection"), (PIXTRAL_12B, "Pixtral 12B")):
        if config == published:
            return FilterIndex(name, base, "apache-2.0", converter=__version__)
    return FilterIndex(name, "a network of other sizes", "unknown", converter=__version__)


def make_component_index(components: dict[str, SourceComponent], kind: str, config) -> configs.ComponentIndex:
    """Returns the index of a component's folder, without the records of its sources.

    Redux is Black Forest Labs', under the licence of FLUX.1 [dev], whatever lies beside a copy of it. Of the depth
    networks only the small one is free; others have other sizes.

    Args:
        components: the layout of each of its networks.
        kind: a key of `BESIDE`.
        config: sizes of the last of its networks.
    """
    source = list(components.values())[-1].source
    root = source.folder.resolve()
    if kind == "redux":
        root = root.parent if source.component else source.path
    base, licence = ("FLUX.1 Redux [dev]", DEV) if kind == "redux" else ("a depth network of other sizes", "unknown")
    if config == DEPTH_ANYTHING_V2_SMALL:
        base, licence = "Depth Anything V2 Small", "apache-2.0"
    return configs.ComponentIndex(_names(root)[0], base, licence, converter=__version__)


def _names(root: Path) -> tuple[str, list[str], str]:
    """Returns the name of a source, every name of it that may tell the family, and its repository on the hub.

    In the hub's cache (models--ORG--NAME/snapshots/HASH, files there being links to blobs/HASH) the name is NAME, the
    repository ORG/NAME; elsewhere the repository is not known and empty.
    """
    real = root.resolve()
    hub = [part.removeprefix("models--").replace("--", "/", 1) for part in real.parts if part.startswith("models--")]
    repository = hub[-1] if hub and (root.is_file() or real.parent.name == "snapshots") else ""
    name = root.stem if root.is_file() else repository.rpartition("/")[2] or real.name
    names = [n.lower() for n in (root.name, real.name, *(part.rpartition("/")[2] for part in hub))]
    return name.lstrip(".") or "model", names, repository


def editing_family(task: str, kind: str | None) -> presets.Family | None:
    """Returns the published model of a task and kind; None: it is text-to-image, which has several."""
    return next((family for family in presets.EDITING if (family.task, family.kind) == (task, kind)), None)


def _family(config: configs.FluxConfig, names: list[str], evidence: Evidence, task: Task) -> presets.Family:
    """Returns the family. A name chooses defaults and never a licence: only its hash shows a file to be [schnell]."""
    if is_schnell(evidence):
        return presets.SCHNELL
    if config.architecture == FLUX_1_SCHNELL and task.name == presets.TASKS[0]:
        by_name = any(presets.SCHNELL.hint in name for name in names)
        return presets.UNPROVEN_SCHNELL if by_name else presets.DE_DISTILLED
    if editing := editing_family(task.name, task.kind):
        is_published = replace(config, in_channels=configs.FLUX_DEV.in_channels) == configs.FLUX_DEV
        return editing if is_published else replace(editing, base=presets.OTHER.base, license=presets.OTHER.license)
    if config != configs.FLUX_DEV:
        return presets.OTHER
    return presets.KREA if any(presets.KREA.hint in name for name in names) else presets.DEV


def _schedule(obj: dict, where: str) -> configs.Schedule:
    """Reads diffusers' scheduler_config.json."""
    require({"_class_name": None} | obj, where, "this model needs another sampler", **_SCHEDULER)
    if not obj.get("use_dynamic_shifting"):
        if obj.get("shift", 1.0) != 1.0:
            raise ModelError(f"{where} has a fixed shift of {obj['shift']!a}", "a dynamic shift, or none")
        return presets.NO_SHIFT
    fields = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    return configs.from_json(configs.Schedule, {f: obj[f] for f in fields if f in obj}, where)
