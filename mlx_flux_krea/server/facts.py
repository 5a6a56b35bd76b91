"""Facts that the page shows beside its pictures: models, adapters, options, the plan of a request, tokens of a prompt.

Nothing here reads a weight or computes.
"""

import functools
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_flux_krea import FluxPipeline, home, memory, presets
from mlx_flux_krea.adapters.formulas import branch_bytes
from mlx_flux_krea.adapters.installed import FACTS, added_duty
from mlx_flux_krea.adapters.parts import read_facts
from mlx_flux_krea.commands.plan import model_times
from mlx_flux_krea.commands.shared import settings, trials
from mlx_flux_krea.commands.shared.estimates import this_chip
from mlx_flux_krea.commands.shared.generation import open_pipeline
from mlx_flux_krea.commands.shared.installation import FILTERS
from mlx_flux_krea.commands.shared.installed import Installed, built_in, find_installed
from mlx_flux_krea.commands.shared.jobs import PreparedJob, prepare, size_of
from mlx_flux_krea.commands.shared.loras import planned
from mlx_flux_krea.commands.shared.rows import alternatives
from mlx_flux_krea.errors import FluxKreaError
from mlx_flux_krea.filters.judges import needed_bytes
from mlx_flux_krea.home import find_model
from mlx_flux_krea.prompts import tokenize
from mlx_flux_krea.weights import ModelFolder, open_model

from . import fields, uploads
from .errors import plain
from .jobs import MOST_PICTURES, picture_jobs

_AREAS = (1.0, 1.5, 2.0)  # megapixels
_MOST_PROMPTS = 16  # alternatives whose tokens are counted
# Fields of a request that each task's models take, beside those that all take.
_TAKES: dict[str, tuple[str, ...]] = {
    "text-to-image": ("image", "mask", "expand", "styles", "upscale"),
    "kontext": ("image", "references", "styles"),
    "fill": ("image", "mask", "expand", "styles"),
    "control": ("control_image", "image", "styles"),
}
_ALL_TAKEN = ("guidance", "image", "mask", "expand", "references", "control_image", "styles", "upscale")


def models(loaded: str | None) -> dict[str, Any]:
    """Returns the installed models, components and filters.

    Args:
        loaded: name of the model in memory.
    """
    found = find_installed()
    shown = [one for one in (*found, *built_in(always=True)) if one.kind in ("model", "built in")]
    usual = next((one.name for one in shown if one.default), home.NANO_NAME if len(shown) == 1 else None)
    components = home.installed_components()
    return {
        "models": [_model(one, loaded=loaded, usual=usual) for one in shown],
        "components": {name: name in components for name in ("redux", "depth")},
        "filters": {name: _plain(trials.problem(name)) for name in FILTERS},
        "check": settings.read_options().get("check", presets.CHECKS[0]),
    }


def adapters(model: str | None) -> dict[str, Any]:
    """Returns the installed adapters.

    Args:
        model: name of the model that they are for; None: the usual one.
    """
    folder = _open(model)
    found = []
    for one in find_installed():
        if one.kind != "adapter":
            continue
        about = {"name": one.name, "bytes": one.bytes, "precision": one.precision, "triggers": one.triggers}
        about |= {"problem": _plain(one.problem), "weight": 1.0, "steps": None, "guidance": None}
        about["requires_filters"] = one.filters == "required"
        if one.problem is None:
            facts = read_facts(one.path / FACTS)
            if facts.preset:
                about |= dict(zip(("steps", "guidance", "weight"), facts.preset, strict=True))
            about["requires_filters"] = bool(added_duty([facts], folder.sizes.flux.architecture))
            about["problem"] = _misfit(one, folder)
        found.append(about)
    return {"adapters": found}


def options() -> dict[str, Any]:
    """Returns the fields that a request may hold, with their choices and limits."""
    return {
        "properties": fields.properties(),
        "aspects": list(presets.ASPECTS),
        "solvers": presets.SOLVERS,
        "schedules": presets.SCHEDULES,
        "fits": presets.FITS,
        "controls": presets.KINDS,
        "style_rules": presets.STYLE_RULES,
        "noise": list(presets.RECIPES),
        "likes": list(presets.TOOLS),
        "limits": {
            "pixels": presets.MAX_PIXELS,
            "bytes": uploads.MOST_BYTES,
            "num_images": fields.MOST_IMAGES,
            "pictures": MOST_PICTURES,
            "prompt": presets.MAX_PROMPT,
            "side": presets.MAX_SIDE,
            "steps": presets.MAX_STEPS,
            "megapixels": presets.MEGAPIXELS,
        },
    }


def plan(request: dict[str, Any], find_image: fields.FindImage, *, checked_previews: bool) -> dict[str, Any]:
    """Returns the memory and the time that a request takes.

    Args:
        request: its fields.
        find_image: returns the file of an upload or a picture.
        checked_previews: the setting.

    Raises:
        HTTPProblem: a field that cannot be used.
        FluxKreaError: options that do not go together, or not enough memory.
    """
    fields.check(request)
    base, made = picture_jobs("0" * 16, request, find_image)
    pipe = open_pipeline(base)
    folder = pipe.folder
    first = prepare(made[0], folder, {})
    wanted = first.request
    found, beside = _memory(first, pipe, checked_previews=checked_previews)
    halves = 2 if wanted.true_cfg else 1
    times = model_times(
        folder.flux.sizes,
        evaluations=(wanted.evaluations - wanted.second_evaluations) * halves,
        second=(found.view, wanted.second_evaluations * halves),
        is_filtered=folder.requires_filters,
        width=wanted.width,
        height=wanted.height,
        length=wanted.max_sequence_length,
    )
    chip = this_chip()
    seconds = dict.fromkeys(("picture", "filters", "filters_at_start", "previews")) | times.get(chip or "", {})
    if not folder.requires_filters or not checked_previews:
        seconds["previews"] = 0.0
    elif seconds["filters"] is not None:
        seconds["previews"] = 2 * seconds["filters"]
    width, height = wanted.picture_size
    stages = {name: peak + beside * (name in ("denoise", "enlarge")) for name, peak in found.stages.items()}
    return {
        "width": width,
        "height": height,
        "steps": wanted.num_inference_steps,
        "evaluations": wanted.evaluations,
        "pictures": len(made),
        "peak": found.process + max(stages.values()),
        "process": found.process,
        "stages": stages,
        "resident_blocks": found.resident_blocks,
        "total_blocks": found.total_blocks,
        "tiled": found.tiled,
        "tiles": found.tiles,
        "seconds": seconds,
        "chip": chip,
        "notes": [plain(note) for note in (*first.notes, *wanted.notes)],
    }


def tokens(prompt: str, model: str | None) -> dict[str, Any]:
    """Returns the tokens of each alternative of a prompt, and the text that is not read.

    Raises:
        UsageError: alternatives that cannot be read.
        ModelError: tokenizers missing or damaged.
    """
    folder = _open(model)
    texts = [text for text, _ in alternatives(prompt, MOST_PICTURES)]
    counted = []
    for text in texts[:_MOST_PROMPTS]:
        pair = tokenize(folder, text, text, folder.index.max_sequence_length)
        named = zip(("clip", "t5"), pair, strict=True)
        parts = {name: {"count": one.count, "length": len(one.ids), "cut": one.cut} for name, one in named}
        counted.append({"prompt": text, **parts})
    return {"pictures": len(texts), "prompts": counted}


def _open(model: str | None) -> ModelFolder:
    """Opens a model by its name; None: the usual one, or the small one where there is none."""
    if model is not None:
        return _opened(fields.model_folder(model))
    try:
        return _opened(find_model(None))
    except FluxKreaError:
        return _opened(home.NANO)


def _opened(path: Path) -> ModelFolder:
    return _kept(path, (path / "manifest.json").stat().st_mtime_ns if (path / "manifest.json").exists() else 0)


@functools.lru_cache(maxsize=4)
def _kept(path: Path, changed: int) -> ModelFolder:
    """Opens a model folder and its tokenizers once, as long as it does not change."""
    return open_model(path)


def _memory(first: PreparedJob, pipe: FluxPipeline, *, checked_previews: bool) -> tuple[memory.MemoryPlan, int]:
    """Returns the plan of a picture in the memory that adapters, and filters at work meanwhile, leave; and theirs."""
    folder = pipe.folder
    uses = planned(first.job.options.get("lora", ()), folder.sizes)
    beside = branch_bytes(uses, folder.sizes, getattr(mx, pipe.dtype))
    if checked_previews and pipe.policy and pipe.policy.check == "filters":
        beside += needed_bytes()
    return pipe.plan(first.request, beside=beside), beside


def _model(one: Installed, *, loaded: str | None, usual: str | None) -> dict[str, Any]:
    about = {
        "name": one.name,
        "base": one.base,
        "default": one.name == usual,
        "task": one.task.partition(" ")[0],
        "kind": None,
        "precision": one.precision,
        "bytes": one.bytes,
        "requires_filters": one.filters != "none",
        "problem": _plain(one.problem),
        "loaded": one.name == loaded,
        "defaults": None,
        "sizes": [],
        "takes": dict.fromkeys(_ALL_TAKEN, False),
        "previews": "none",
    }
    if one.problem:
        return about
    folder = open_model(one.path)
    own, index = folder.index.defaults, folder.index
    about |= {"task": index.task, "kind": index.kind}
    about["defaults"] = {
        "width": own.width,
        "height": own.height,
        "steps": own.num_inference_steps,
        "guidance": own.guidance_scale if folder.flux.sizes.guidance_embed else None,
        "true_cfg_scale": own.true_cfg_scale,
        "num_images": 1,
    }
    about["sizes"] = list(_sizes(own.width * own.height / presets.MEGAPIXEL))
    taken = {name: name in _TAKES[index.task] for name in _ALL_TAKEN}
    about["takes"] = taken | {"guidance": folder.flux.sizes.guidance_embed}
    if folder.latent_rgb is not None:
        about["previews"] = "checked" if folder.requires_filters else "live"
    return about


def _sizes(own: float):
    """Yields each shape at each area, and the sides that it gets; the first area is the model's own, in megapixels."""
    for area in dict.fromkeys((own, *_AREAS)):
        for aspect in presets.ASPECTS:
            width, height = size_of(aspect, area, (1, 1))
            yield {"aspect": aspect, "megapixels": area, "width": width, "height": height}


def _misfit(one: Installed, folder: ModelFolder) -> str | None:
    """Returns why an adapter does not fit a model; None: it fits."""
    try:
        planned([one.name], folder.sizes)
    except FluxKreaError as error:
        return plain(str(error))
    return None


def _plain(text: str | None) -> str | None:
    return None if text is None else plain(text)
