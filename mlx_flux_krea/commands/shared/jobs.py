"""Options become jobs, one for each picture, and jobs become requests, all before a weight is read.

Options come in layers: a row of a prompt file overrides the command line, which overrides the config file. Within one
layer, options that exclude each other are errors.
"""

import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_flux_krea import presets
from mlx_flux_krea.adapters.installed import installed
from mlx_flux_krea.adapters.loaded import take_tags
from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.fast import FastMode
from mlx_flux_krea.files import sha256_if_exists
from mlx_flux_krea.home import NANO, installed_models
from mlx_flux_krea.prompts import tokenize
from mlx_flux_krea.provenance import read_record
from mlx_flux_krea.request import Request, ResolvedRequest, check_text, random_seed
from mlx_flux_krea.sampling.sampler import fixed_shift, schedule_levels
from mlx_flux_krea.weights import ModelFolder

from .images import OPENED, Opened, check_images, check_unchanged, image_arguments, recorded_images, require_images
from .options import ARGUMENTS, BY_NAME, DEFAULTS, NO_CACHE, PER_PICTURE, REPLACES, cast
from .rows import alternatives, prompt_notes, read_rows
from .styles import RECORDED, recorded_style, style_arguments

# Options that are arguments of the pipeline, by the arguments' names.
_SAME = ("prompt", "negative_prompt", "true_cfg_scale", "width", "height", "noise", "strength", "expand", "fit")
_SAME += ("control", "solver", "schedule", "cache", "upscale")
_REQUEST = {"steps": ARGUMENTS["steps"], "guidance": ARGUMENTS["guidance"], **{name: name for name in _SAME}}
_FLAGS = {  # options that set an argument to a value
    "crop_to_mask": ("padding_mask_crop", presets.CROP_PADDING),
    "soft_mask": ("soft_mask", True),
    "no_paste": ("paste", False),
    "no_auto_resize": ("auto_resize", False),
    "fast": ("fast", True),
    "watermark": ("watermark", True),
}
_FROM_RECORD = ("prompt_2", "negative_prompt_2", "sigmas", "max_sequence_length")  # arguments that only a record sets
_FROM_RECORD += ("padding_mask_crop", "upscale_tiles")
_CIRCUMSTANCES = ("batch", "image_seed", "images_sha256", "manifest_sha256", "tiled", RECORDED)  # how it was made
_CIRCUMSTANCES += ("depth_sha256",)
_MODE = "fast_mode"  # of --fast, as it was when the run began
_PRIVATE = (OPENED, "candidate", _MODE)  # options that no record sets
# Options that `options.py` does not declare, checked where they are used.
UNTYPED = (*_FROM_RECORD, *_CIRCUMSTANCES, *_PRIVATE)
_FILE_OPTIONS = ("output", "quality", "metadata", "credentials", "keep_map")  # per picture, but not in its record
_PICTURE = (*PER_PICTURE, *UNTYPED, "dtype")


@dataclass(frozen=True)
class PictureJob:
    """One picture to generate."""

    where: str  # the row that asks for it; "" for the command line
    options: dict[str, Any]  # merged, by their names in `options.py`
    seed: int
    label: str  # distinguishes its prompt from the others
    row: int  # of a contact sheet
    output: Path
    notes: tuple[str, ...] = ()  # about its prompt, for the user


@dataclass(frozen=True)
class PreparedJob:
    """A job with its pipeline call."""

    job: PictureJob
    given: Request | None  # for the pipeline; None: `prepare` it again, images are large
    request: ResolvedRequest  # with every default filled in
    pick: int  # index of the picture among those that the call returns
    notes: tuple[str, ...]

    def without_images(self) -> "PreparedJob":
        """Returns the job without its images, for a run of many pictures."""
        request = replace(self.request, inputs=self.request.inputs.without_images())
        return replace(self, given=None, request=request) if self.request.inputs.given else self


def merge(lower: dict, layer: dict) -> dict:
    """Puts a layer of options over another, and drops the options that it replaces.

    Raises:
        UsageError: the picture of `from_` has no usable record.
    """
    gone = {name for option in layer for name in REPLACES.get(option, ())}
    if "from_" in layer:
        kept = {name: value for name, value in lower.items() if name not in _PICTURE or name in _FILE_OPTIONS}
        lower = kept | record_options(layer["from_"])
        if model := recorded_model(lower.get("manifest_sha256")):
            lower["model"] = str(model)
    if len(layer.get("seed", ())) > 1:
        gone.add("num_images")
    if {"num_images", "candidates"} & layer.keys() and len(lower.get("seed", ())) > 1:
        gone.add("seed")
    return {name: value for name, value in lower.items() if name not in gone} | layer


def recorded_model(manifest_sha256: str | None) -> Path | None:
    """Returns the installed model, or the small one, whose manifest a picture's record names; None: none is here."""
    folders = [*installed_models().values(), NANO] if manifest_sha256 else []
    return next((path for path in folders if sha256_if_exists(path / "manifest.json") == manifest_sha256), None)


def record_options(path: Path) -> dict:
    """Reads the record of a picture as options.

    Raises:
        UsageError: it has no record, or an incomplete one.
    """
    record = read_record(path)
    if record is None:
        raise UsageError(f"{path} has no record of ours", "a picture made by flux-krea with its metadata")
    if record.get("truncated"):
        raise UsageError(f"the record of {path} was cut to fit into a JPEG", "a PNG or a WebP")
    if "sheet" in record:
        raise UsageError(f"{path} is a contact sheet", "one of its pictures")
    if record.get("given"):
        raise UsageError(f"{path} was made in Python from arrays that its record does not hold: {record['given']}")
    names = {name: option for option, name in _REQUEST.items()} | {"seed": "seed", "dtype": "dtype"}
    values = {**record, "schedule": record.get("levels")}  # a record's schedule is the model's
    follows = "upscale" in record and "image" in record
    if follows or ("pasted_size" in record and "padding_mask_crop" not in record):  # the sizes follow from the image
        values = {name: value for name, value in values.items() if name not in ("width", "height")}
    if isinstance(borders := record.get("expand"), list):
        values["expand"] = ",".join(map(str, borders))
    options = dict(
        cast(option, values[name], tuple(BY_NAME)) for name, option in names.items() if values.get(name) is not None
    )
    options |= {name: record[name] for name in UNTYPED if name in record and name not in _PRIVATE}
    options |= {flag: True for flag, (name, value) in _FLAGS.items() if record.get(name) is value}
    options.pop("fast", None)  # the recorded cache and steps repeat the picture, whatever --fast is now
    options |= dict(
        (name, value) if name == RECORDED else cast(name, value, tuple(BY_NAME))
        for name, value in recorded_style(record, path).items()
    )
    if adapters := record.get("adapters"):
        options["lora"] = _recorded_adapters(adapters, path)
    if images := recorded_images(record):
        options["images_sha256"] = images
    return options


def _recorded_adapters(adapters: Any, path: Path) -> tuple[str, ...]:
    """Returns the adapters of a record, which anybody may have written, as texts that find them by their hash.

    Raises:
        UsageError: they are no such list.
    """
    texts = []
    for one in adapters if isinstance(adapters, list) else [None]:
        facts = one if isinstance(one, dict) else {}
        source, digest, weight = (facts.get(name) for name in ("source", "sha256", "weight"))
        good = isinstance(source, str) and re.fullmatch("[0-9a-f]{64}", str(digest))
        if not good or isinstance(weight, bool) or not isinstance(weight, int | float):
            raise UsageError(f"the record of {path} names adapters that cannot be read", "source, sha256 and weight")
        texts.append(f"{source}@sha256:{digest}={weight!r}")
    return cast("lora", texts, ("lora",))[1]  # type: ignore[return-value]  # texts, as that option has them


def make_jobs(base: dict, given: dict) -> tuple[list[PictureJob], list[tuple[str, UsageError]]]:
    """Makes a job of each picture. Returns them, and the unusable rows of a prompt file with their errors.

    Args:
        base: options of all pictures.
        given: those that were given on the command line; `prompts` names a file of rows.

    Raises:
        UsageError: options of the command line that cannot be used, or too many pictures.
    """
    rows = read_rows(given["prompts"]) if "prompts" in given else [("", {})]
    random = random_seed()
    jobs, skipped = [], []
    for where, row in rows:
        try:
            jobs += _jobs_of_row(row, where=where, base=base, given=given, random=random, before=jobs)
        except UsageError as error:
            if not where:
                raise
            skipped.append((where, error))
        if len(jobs) > presets.MAX_PICTURES:
            raise UsageError(f"this run has {len(jobs)} pictures or more", f"{presets.MAX_PICTURES} at most")
    return jobs, skipped


def _jobs_of_row(
    row: dict | UsageError, *, where: str, base: dict, given: dict, random: int, before: list[PictureJob]
) -> list[PictureJob]:
    if isinstance(row, UsageError):
        raise row
    options = merge(base, row)
    if "prompt" not in options:
        raise UsageError("there is no prompt", "a text, - for standard input, --prompts FILE, or --from IMAGE")
    for name in ("prompt", "negative_prompt"):
        if isinstance(text := options.get(name), str):
            check_text(name, text)
    typed = "prompt" in given or "prompt" in row  # not taken from a record
    notes = prompt_notes(options, typed=typed)
    prompts = alternatives(options["prompt"], presets.MAX_PICTURES) if typed else [(options["prompt"], "")]
    jobs = []
    first_row, number = (before[-1].row + 1 if before else 0), len(before)
    for i, (text, chosen) in enumerate(prompts):
        text, loras = _with_loras(text, options) if typed else (text, options.get("lora", ()))
        for seed in _seeds(options, random):
            number += 1
            output = output_name(options.get("output", default_output()), prompt=text, seed=seed, number=number)
            if "output" in row:
                output = _below(Path(base.get("output", default_output())), output)
            jobs.append(
                PictureJob(
                    where=where,
                    options=options | {"prompt": text} | ({"lora": loras} if loras else {}),
                    seed=seed,
                    label=chosen or text,
                    row=first_row + i,
                    output=output,
                    notes=notes,
                )
            )
    return jobs


def _with_loras(text: str, options: dict) -> tuple[str, tuple[str, ...]]:
    """Takes <lora:NAME:WEIGHT> out of a prompt. Returns it, and all adapters of the picture.

    Raises:
        UsageError: an adapter that is not installed.
    """
    text, tags = take_tags(text)
    for name, _ in tags:
        if name not in installed():
            known = ", ".join(installed()) or "none is installed"
            found = f"the prompt names the adapter {name!r}, which is not installed"
            raise UsageError(found, known, "install it: flux-krea models add FILE")
    return text, (*options.get("lora", ()), *(f"{name}={weight!r}" for name, weight in tags))


def _below(template: Path, output: Path) -> Path:
    """Returns the output of a row of a prompt file, which anybody may have written.

    Raises:
        UsageError: it lies neither below the current folder nor below the folder of --output, links followed.
    """
    place, folders = os.path.realpath(output), (os.path.realpath("."), os.path.realpath(template.parent))
    if not any(Path(place).is_relative_to(folder) for folder in folders):
        found = f"the row's output {output} lies outside the folder of --output"
        raise UsageError(found, "a path below it", f"to allow it: -o {shlex.quote(str(output))}")
    return output


def _seeds(options: dict, random: int) -> list[int]:
    """Returns the seeds given, or consecutive ones from the only one or from a random one."""
    given = options.get("seed", (random,))
    count = options.get("candidates") or options.get("num_images", 1)
    if len(given) > 1:
        return list(given)
    if given[0] + count > 2**64:
        raise UsageError(f"--seed {given[0]} with {count - 1} more after it", f"seeds of at most {2**64 - 1}")
    return list(range(given[0], given[0] + count))


def prepare(
    job: PictureJob,
    folder: ModelFolder,
    images: Opened,
    *,
    adapters: Sequence[tuple[str, float]] = (),
    preset: Mapping[str, Any] | None = None,
) -> PreparedJob:
    """Checks a job against its model.

    Args:
        job: the picture to generate.
        folder: the model.
        images: input images; those that this opens are added.
        adapters: names under which its adapters are loaded, with their weights.
        preset: arguments of the pipeline that these were published with.

    Raises:
        UsageError: an option that cannot be used, or an input image that is missing or cannot be opened.
        ModelError: --like comfy needs tokenizers, which are missing.
    """
    options, notes = job.options, []
    tool = presets.TOOLS.get(options.get("like", ""))
    require_images(options)
    if options.get("reference") and folder.index.task != "kontext":
        raise UsageError("--reference is for FLUX.1 Kontext", "that model", "a picture to start from is --image")
    opened = image_arguments(options, images)
    image = opened.get("image") or opened.get("control_image")
    shape = image[0].size if isinstance(image, tuple) else image.size if image else None
    arguments = _pipeline_arguments(options, folder, shape=shape, tool=tool) | dict(preset or {})
    style, said = style_arguments(options, images)
    arguments |= style
    notes += said
    batch, pick = options.get("batch"), 0
    seed: int | list[int] = job.seed
    if batch is not None:
        pick, arguments["num_images_per_prompt"] = _batch(batch)
        notes.append(f"this picture is one of {batch[1]} from one random stream: all are generated, one is saved")
    elif options.get("image_seed") is not None:
        pick, seed, arguments["num_images_per_prompt"] = 1, [options["image_seed"], job.seed], 2
    arguments |= {"seed": seed, "adapters": tuple(adapters)} | opened
    given = Request(**arguments)
    request = given.resolve(folder)
    now = recorded_images(request.inputs.record())
    notes += check_images(options, now)
    check_unchanged(options, now)
    kept = ({OPENED: now} if now else {}) | ({_MODE: str(request.fast)} if request.fast else {})
    job = replace(job, options=options | kept) if kept else job
    if options.get("keep_map") and not request.inputs.kind:
        raise UsageError("--keep-map, and no map is made", "--control canny or depth", "leave it out")
    if tool and tool.mu:
        tokens = request.width * request.height // _multiple(folder) ** 2
        picked = schedule_levels(request.schedule or "simple", request.num_inference_steps)
        levels = fixed_shift(folder.index.schedule, tokens, picked, tool.mu)
        given = replace(given, sigmas=tuple(levels.tolist()), schedule=None, num_inference_steps=len(levels))
    notes += [*job.notes, *_size_notes(request, folder)]
    return PreparedJob(job=job, given=given, request=request, pick=pick, notes=tuple(notes))


def _size_notes(request: ResolvedRequest, folder: ModelFolder) -> list[str]:
    """Returns a note where a picture is far larger or smaller than those that the model was made for."""
    own, (least, most) = folder.index.defaults, presets.GOOD_AREAS
    share = request.width * request.height / (own.width * own.height)
    if least <= share <= most or request.large:
        return []
    times = f"{share:.2g}" if share < 99 else f"{share:.0f}"
    found = f"{request.width} x {request.height} has {times} times the area that this model was made for"
    effect = "it repeats objects and adds stripes; --upscale keeps it whole" if share > most else "shapes get lost"
    return [f"{found}, {own.width} x {own.height}: {effect}"]


def _pipeline_arguments(
    options: dict, folder: ModelFolder, *, shape: tuple[int, int] | None, tool: presets.Tool | None
) -> dict[str, Any]:
    """Returns the arguments of a pipeline call, without seed and images, of which the first has this shape."""
    own, default = folder.index.defaults, tool.defaults if tool else folder.index.defaults
    usual, area = (default.width, default.height), own.width * own.height / presets.MEGAPIXEL
    arguments = {name: options[option] for option, name in _REQUEST.items() if option in options}
    arguments |= {name: options[name] for name in _FROM_RECORD if name in options}
    arguments |= {name: value for flag, (name, value) in _FLAGS.items() if options.get(flag) and name not in arguments}
    if arguments.get("fast") and _MODE in options:
        arguments["fast"] = FastMode.parse(options[_MODE])
    if arguments.get("cache") == NO_CACHE:
        del arguments["cache"]
    for name in ("prompt_2", "negative_prompt_2"):  # an empty text that was recorded is one; "" would mean the prompt
        if arguments.get(name) == "":
            arguments[name] = [""]
    if "aspect" in options or "megapixels" in options:
        megapixels = options.get("megapixels", area)
        if not shape and folder.index.task == presets.TASKS[0] and megapixels > area * presets.GOOD_AREAS[1]:
            arguments["upscale"] = _factor(megapixels, area)
            megapixels = area
        arguments["width"], arguments["height"] = size_of(options.get("aspect"), megapixels, shape or usual)
    if not tool:
        return arguments
    of_tool: dict[str, Any] = {"num_inference_steps": default.num_inference_steps, "noise": tool.noise}
    if not (shape or {"width", "height"} & arguments.keys()):
        megapixels = default.width * default.height / presets.MEGAPIXEL * area  # at the model's own scale
        of_tool["width"], of_tool["height"] = size_of(None, megapixels, usual)
    if folder.flux.sizes.guidance_embed:
        of_tool["guidance_scale"] = default.guidance_scale
    arguments = of_tool | arguments
    if tool.t5_length and "prompt" in arguments:
        longest = folder.index.max_sequence_length
        tokens = tokenize(folder, arguments["prompt"], arguments["prompt"], longest)[1]
        arguments["max_sequence_length"] = min(longest, max(tool.t5_length, tokens.count))
    return arguments


def _factor(megapixels: float, own: float) -> float:
    """Returns how many times a picture of the model's own area is enlarged to another area.

    Raises:
        UsageError: more times than a second pass can.
    """
    factor, most = math.sqrt(megapixels / own), presets.MOST_ENLARGED
    if factor > most * (1 + 1e-6):
        found = f"--megapixels {megapixels:g} is {megapixels / own:.0f} times the area that this model draws"
        raise UsageError(found, f"{own * most**2:.3g} at most", f"a second pass enlarges up to {most:g} times each way")
    return min(factor, most)


def _multiple(folder: ModelFolder) -> int:
    """Returns the pixels that width and height must be multiples of."""
    return 2 * folder.vae.sizes.downsampling


def size_of(aspect: str | None, megapixels: float, shape: tuple[int, int]) -> tuple[int, int]:
    """Scales a row of presets.ASPECTS, or another (width, height), to an area. Returns multiples of 16."""
    scale = math.sqrt(megapixels * presets.MEGAPIXEL / (shape[0] * shape[1])) if aspect is None else megapixels**0.5
    width, height = presets.ASPECTS[aspect] if aspect else shape
    return max(16, round(width * scale / 16) * 16), max(16, round(height * scale / 16) * 16)


def default_output() -> Path:
    """Returns the file that pictures are written to where --output is not given."""
    return Path(str(DEFAULTS["output"]))


def output_name(template: Path, *, prompt: str, seed: int, number: int) -> Path:
    """Fills in the name of a picture.

    Args:
        template: may hold {seed}, {n} and {prompt}, the prompt's first words.
        prompt: of the picture.
        seed: of the picture.
        number: 1, 2, ... in this run.

    Raises:
        UsageError: an unknown field, or braces that are not closed.
    """
    words = re.sub(r"\W+", "-", prompt)[:40].strip("-").lower() or "empty"
    try:
        return Path(str(template).format_map({"seed": seed, "n": number, "prompt": words}))
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        found = f"{template} holds {{{error.args[0]}}}" if isinstance(error, KeyError) else f"{template}: {error}"
        raise UsageError(found, "{seed}, {n} or {prompt}", "write {{ for a brace") from None


def sheet_name(template: Path) -> Path:
    """Returns the name of the contact sheet for pictures named after a template."""
    stem = re.sub(r"\{[^{}]*\}", "", template.stem).strip("_- .")
    return template.with_name(f"{stem}-sheet{template.suffix}" if stem else f"sheet{template.suffix}")


def tool_notes(name: str) -> list[str]:
    """Returns notes about the settings of --like and their limits."""
    tool = presets.TOOLS[name]
    notes = [f"like {name}, by {tool.source}"]
    if name in presets.NOT_REPRODUCIBLE:
        notes.append(f"{name} {presets.NOT_REPRODUCIBLE[name]}: the settings match, the picture does not")
    if tool.differs:
        notes.append(f"{name} differs from this: {tool.differs}")
    return notes


def _batch(batch) -> tuple[int, int]:
    """Checks the index and size of a batch in a record, which anybody may have written."""
    good = isinstance(batch, list) and len(batch) == 2 and all(type(n) is int for n in batch)
    if not good or not 0 <= batch[0] < batch[1] <= presets.MAX_BATCH:
        raise UsageError(f"the record says that the batch is {batch!r}", "an index and a size")
    return batch[0], batch[1]
