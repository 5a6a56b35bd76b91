"""From what was said to what is drawn: layers of options become jobs, one for each picture, and jobs become requests.

Nearer to the picture wins: a row of a prompt file over the command line, that over the config file. Within one layer,
options that exclude each other are errors. Everything here is done before a weight is read.
"""

import hashlib
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_flux_krea import presets
from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.prompts import read_prompt
from mlx_flux_krea.provenance import read_record
from mlx_flux_krea.request import Request, ResolvedRequest, open_image, random_seed
from mlx_flux_krea.sampling.sampler import fixed_shift
from mlx_flux_krea.weights import ModelFolder

from .options import BY_NAME, PER_PICTURE, REPLACES, USUAL, cast
from .rows import alternatives, read_rows

# options of `generate` and what the pipeline calls them; and what only a record holds
_REQUEST = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    **{name: name for name in ("prompt", "negative_prompt", "true_cfg_scale", "width", "height", "noise", "strength")},
}
_FROM_RECORD = ("prompt_2", "negative_prompt_2", "sigmas", "max_sequence_length")
_BESIDE = ("batch", "image_seed", "image_sha256", "manifest_sha256", "tiled")  # how a record's picture came about
UNTYPED = (*_FROM_RECORD, *_BESIDE)  # options without an entry in `options.py`, judged where they are used
_FILE_OPTIONS = ("output", "quality", "metadata")  # not of the picture that a record tells of
_PICTURE = (*PER_PICTURE, *UNTYPED, "dtype")


@dataclass(frozen=True)
class Job:
    """One picture to be drawn."""

    where: str  # the row that asked for it; "" for the command line
    options: dict  # merged, by their names in `options.py`
    seed: int
    label: str  # what tells its prompt from the others
    row: int  # of a contact sheet
    output: Path


@dataclass(frozen=True)
class Drawing:
    """A job as the pipeline takes it."""

    job: Job
    given: Request  # as the pipeline is called with
    request: ResolvedRequest  # with every default
    pick: int  # which of the images that come back
    notes: tuple[str, ...]


def merge(lower: dict, layer: dict) -> dict:
    """A layer of options over another, with what it takes the place of.

    Raises:
        UsageError: the picture of `from_` cannot be repeated.
    """
    gone = {name for option in layer for name in REPLACES.get(option, ())}
    if "from_" in layer:
        kept = {name: value for name, value in lower.items() if name not in _PICTURE or name in _FILE_OPTIONS}
        lower = kept | record_options(layer["from_"])
    if len(layer.get("seed", ())) > 1:
        gone.add("num_images")
    if "num_images" in layer and len(lower.get("seed", ())) > 1:
        gone.add("seed")
    return {name: value for name, value in lower.items() if name not in gone} | layer


def record_options(path: Path) -> dict:
    """The record of one of our pictures as options.

    Raises:
        UsageError: there is none, or it does not hold everything.
    """
    record = read_record(path)
    if record is None:
        raise UsageError(f"{path} carries no record of ours", "a picture made by flux-krea with its metadata")
    if record.get("truncated"):
        raise UsageError(f"the record of {path} was cut to fit into a JPEG", "a PNG or a WebP")
    if "sheet" in record:
        raise UsageError(f"{path} is a contact sheet", "one of its pictures")
    if record.get("given"):
        raise UsageError(f"{path} was made in Python from arrays that its record does not hold: {record['given']}")
    names = {name: option for option, name in _REQUEST.items()} | {"seed": "seed", "dtype": "dtype"}
    options = dict(cast(option, record[name], tuple(BY_NAME)) for name, option in names.items() if name in record)
    options |= {name: record[name] for name in (*_FROM_RECORD, *_BESIDE) if name in record}
    if isinstance(image := record.get("image"), dict):
        options["image_sha256"] = image.get("rgb_sha256")
    return options


def make_jobs(base: dict, given: dict) -> tuple[list[Job], list[tuple[str, UsageError]]]:
    """Every picture that was asked for, and the rows of a prompt file that cannot be used.

    Args:
        base: options that hold for all pictures.
        given: those of them that stood in the command; `prompts` names a file of rows.

    Raises:
        UsageError: options of the command line that cannot be used, or too many pictures.
    """
    rows = read_rows(given["prompts"]) if "prompts" in given else [("", {})]
    random = random_seed()
    jobs, skipped = [], []
    for where, row in rows:
        try:
            jobs += _jobs_of_row(where, base, given, row, random, jobs)
        except UsageError as error:
            if not where:
                raise
            skipped.append((where, error))
        if len(jobs) > presets.MAX_PICTURES:
            raise UsageError(f"these are {len(jobs)} pictures or more", f"{presets.MAX_PICTURES} at most in one run")
    return jobs, skipped


def _jobs_of_row(where: str, base: dict, given: dict, row: dict | UsageError, random: int, before: list) -> list[Job]:
    if isinstance(row, UsageError):
        raise row
    options = merge(base, row)
    if "prompt" not in options:
        raise UsageError("there is no prompt", "a text, - for standard input, --prompts FILE, or --from IMAGE")
    typed = "prompt" in given or "prompt" in row  # and not taken from a record
    prompts = alternatives(options["prompt"], presets.MAX_PICTURES) if typed else [(options["prompt"], "")]
    jobs = []
    first_row, number = (before[-1].row + 1 if before else 0), len(before)
    for i, (text, chosen) in enumerate(prompts):
        for seed in _seeds(options, random):
            number += 1
            output = output_name(options.get("output", Path(USUAL["output"])), text, seed, number)
            jobs.append(Job(where, options | {"prompt": text}, seed, chosen or text, first_row + i, output))
    return jobs


def _seeds(options: dict, random: int) -> list[int]:
    """The seeds given; or as many as images, counting up from the one given, or from a random one."""
    given, count = options.get("seed", (random,)), options.get("num_images", 1)
    if len(given) > 1:
        return list(given)
    if given[0] + count > 2**64:
        raise UsageError(f"seed {given[0]} and {count - 1} after it", f"at most {2**64 - 1}")
    return list(range(given[0], given[0] + count))


def prepare(job: Job, folder: ModelFolder, images: dict) -> Drawing:
    """Checks a job against its model.

    Args:
        job: what to draw.
        folder: the model.
        images: kept between calls: input images by their paths, opened once.

    Raises:
        UsageError: an option that cannot be used, or an input image that cannot be opened or is missing.
        ModelError: ComfyUI's length of T5 was asked for, and the tokenizers are missing.
    """
    options, notes = job.options, []
    tool = presets.TOOLS.get(options.get("like"))
    if (path := options.get("image")) is not None and path not in images:
        images[path] = open_image(path)
    image = images.get(path)
    if "image_sha256" in options:
        _check_image(options, image, notes)
    default = tool.defaults if tool else folder.index.defaults
    flux, multiple = folder.flux.sizes, 2 * folder.vae.sizes.downsampling
    arguments = {name: options[option] for option, name in _REQUEST.items() if option in options}
    arguments |= {name: options[name] for name in _FROM_RECORD if name in options}
    if "aspect" in options or "megapixels" in options:
        shape = image.size if image else (default.width, default.height)
        arguments["width"], arguments["height"] = size_of(
            options.get("aspect"), options.get("megapixels", USUAL["megapixels"]), shape
        )
    if tool:
        usual = {"num_inference_steps": default.num_inference_steps, "noise": tool.noise}
        if not (image or {"width", "height"} & arguments.keys()):
            usual |= {"width": default.width, "height": default.height}
        if flux.guidance_embed:
            usual["guidance_scale"] = default.guidance_scale
        arguments = usual | arguments
    if tool and tool.t5_length and "prompt" in arguments:
        longest = folder.index.max_sequence_length
        tokens = read_prompt(folder, arguments["prompt"], arguments["prompt"], longest)[1]
        arguments["max_sequence_length"] = min(longest, max(tool.t5_length, tokens.count))
    batch, pick = options.get("batch"), 0
    seed: int | list[int] = job.seed
    if batch is not None:
        pick, arguments["num_images_per_prompt"] = _batch(batch)
        notes.append(f"this picture is one of {batch[1]} from one stream of numbers: all are drawn, one is kept")
    elif options.get("image_seed") is not None:
        pick, seed, arguments["num_images_per_prompt"] = 1, [options["image_seed"], job.seed], 2
    arguments |= {"seed": seed, "image": image}
    given = Request(**arguments)
    request = given.resolve(folder)
    if tool and tool.mu:
        tokens = request.width * request.height // multiple**2
        levels = fixed_shift(folder.index.schedule, tokens, request.num_inference_steps, tool.mu)
        given = replace(given, sigmas=tuple(levels.tolist()))
    if request.width * request.height > presets.REPEATS_ABOVE * presets.MEGAPIXEL:
        area = request.width * request.height / presets.MEGAPIXEL
        limit = f"above {presets.REPEATS_ABOVE:g} megapixels this model draws things twice, and stripes"
        notes.append(f"{request.width} x {request.height} is {area:.1f} megapixels: {limit}")
    return Drawing(job, given, request, pick, tuple(notes))


def size_of(aspect: str | None, megapixels: float, shape: tuple[int, int]) -> tuple[int, int]:
    """Width and height, multiples of 16: a row of presets.ASPECTS, or another shape, scaled to an area."""
    scale = math.sqrt(megapixels * presets.MEGAPIXEL / (shape[0] * shape[1])) if aspect is None else megapixels**0.5
    return tuple(round(side * scale / 16) * 16 for side in (presets.ASPECTS[aspect] if aspect else shape))


def output_name(template: Path, prompt: str, seed: int, number: int) -> Path:
    """The name of a picture.

    Args:
        template: may hold {seed}, {n} and {prompt}, the prompt's first words.
        prompt: of the picture.
        seed: of the picture.
        number: 1, 2, ... in this run.

    Raises:
        UsageError: another field, or braces that are not closed.
    """
    words = re.sub(r"\W+", "-", prompt)[:40].strip("-").lower() or "empty"
    try:
        return Path(str(template).format_map({"seed": seed, "n": number, "prompt": words}))
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        found = f"{template} holds {{{error.args[0]}}}" if isinstance(error, KeyError) else f"{template}: {error}"
        raise UsageError(found, "{seed}, {n} or {prompt}", "write {{ for a brace") from None


def sheet_name(template: Path) -> Path:
    """Of the contact sheet beside pictures of such names."""
    stem = re.sub(r"\{[^{}]*\}", "", template.stem).strip("_- .")
    return template.with_name(f"{stem}-sheet{template.suffix}" if stem else f"sheet{template.suffix}")


def tool_notes(name: str) -> list[str]:
    """What `--like` sets, and what it does not reach."""
    tool = presets.TOOLS[name]
    notes = [f"like {name}, by {tool.source}"]
    if name in presets.NOT_REPRODUCIBLE:
        notes.append(f"{name} {presets.NOT_REPRODUCIBLE[name]}: the settings are its own, the picture is not")
    if tool.differs:
        notes.append(f"of {name} itself: {tool.differs}")
    return notes


def _check_image(options: dict, image, notes: list[str]) -> None:
    """The picture of `from_` was made from an image, of which its record holds only the hash."""
    if image is None:
        raise UsageError(f"{options['from_']} was made from an image", "that image", "name it with --image")
    if hashlib.sha256(image.tobytes()).hexdigest() != options["image_sha256"]:
        notes.append(f"{options['image']} is not the image that {options['from_']} was made from")


def _batch(batch) -> tuple[int, int]:
    """Place and size of a batch, from a record that anybody may have written."""
    good = isinstance(batch, list) and len(batch) == 2 and all(type(n) is int for n in batch)
    if not good or not 0 <= batch[0] < batch[1] <= presets.MAX_BATCH:
        raise UsageError(f"the record says that the batch is {batch!r}", "a place and a size")
    return batch[0], batch[1]
