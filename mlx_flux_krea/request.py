"""What a caller asks for and what comes back, as frozen objects; every check that needs no weights is here."""

import hashlib
import math
import numbers
import os
import reprlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import mlx.core as mx
import numpy as np
from PIL import Image, ImageOps

from . import presets
from .errors import UsageError, amount
from .memory import Plan
from .models.config import FluxConfig, ModelIndex
from .presets import MAX_BATCH, MAX_SCALE, MAX_SIDE, MAX_STEPS
from .provenance import opened
from .sampling.noise import find_recipe
from .sampling.sampler import first_step

OUTPUT_TYPES = ("pil", "np", "latent")
_TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
_EMBEDS = {"prompt_embeds": "pooled_prompt_embeds", "negative_prompt_embeds": "negative_pooled_prompt_embeds"}
_ARRAYS = ("latents", *_EMBEDS, *_EMBEDS.values())


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of the pipeline (DESIGN, section 8). None means: the folder's default, or not used.

    Numbers of any library become Python's, sequences tuples, arrays MLX's; `resolved` then judges all of it.

    Raises:
        UsageError: what should be an array is none.
    """

    prompt: str | tuple[str, ...] | None = None  # for CLIP, and for T5 where prompt_2 does not say otherwise
    prompt_2: str | tuple[str, ...] | None = None
    negative_prompt: str | tuple[str, ...] | None = None
    negative_prompt_2: str | tuple[str, ...] | None = None
    true_cfg_scale: float = 1.0  # above 1: negative + scale * (positive - negative), at double cost
    height: int | None = None  # pixels, floored to a multiple of 16
    width: int | None = None
    num_inference_steps: int | None = None
    sigmas: tuple[float, ...] | None = None  # noise levels of one's own, before the shift
    guidance_scale: float | None = None  # of the embedding that guidance was distilled into
    num_images_per_prompt: int = 1
    seed: int | tuple[int, ...] | None = None  # one stream for the batch, or one for each image
    noise: str = "diffusers"  # a row of presets.RECIPES
    latents: mx.array | None = None  # (B, L, 64), packed
    prompt_embeds: mx.array | None = None  # (P, S, context_in_dim)
    pooled_prompt_embeds: mx.array | None = None  # (P, vec_in_dim)
    negative_prompt_embeds: mx.array | None = None
    negative_pooled_prompt_embeds: mx.array | None = None
    image: Image.Image | None = None  # from `open_image`
    strength: float | None = None  # presets.STRENGTH; how much of the schedule an input image goes through
    output_type: str = "pil"
    max_sequence_length: int | None = None  # of T5

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is not None and name != "image":
                object.__setattr__(self, name, _array(name, value) if name in _ARRAYS else _plain(value))

    @property
    def prompts(self) -> int:
        """P, the number of prompts."""
        if self.prompt_embeds is not None:
            return self.prompt_embeds.shape[0]
        return 1 if isinstance(self.prompt, str) else len(self.prompt)

    @property
    def batch(self) -> int:
        """B, the number of images."""
        return self.prompts * self.num_images_per_prompt

    @property
    def true_cfg(self) -> bool:
        """Whether a negative prompt takes part."""
        return self.true_cfg_scale > 1

    def resolved(self, index: ModelIndex, flux: FluxConfig, multiple: int) -> tuple["Request", list[str]]:
        """The request with every default filled in, and what the user should be told about it.

        Args:
            index: of the model folder.
            flux: sizes of its transformer.
            multiple: what sides must be divisible by.

        Raises:
            UsageError: an option that cannot be used, or options that do not go together.
        """
        self._check_numbers(index)
        self._check_prompts()
        self._check_options(flux)
        notes = []
        width, height = self._size(index)
        floored = (width // multiple * multiple, height // multiple * multiple)
        if min(floored) < multiple or max(floored) > MAX_SIDE:
            raise UsageError(f"the size is {width} x {height}", f"sides from {multiple} to {MAX_SIDE} pixels")
        if floored != (width, height):
            notes.append(f"{width} x {height} is no multiple of {multiple}: the picture is {floored[0]} x {floored[1]}")
        self._check_arrays(flux, floored[0] * floored[1] // multiple**2)
        steps = self.num_inference_steps or (len(self.sigmas) if self.sigmas else index.defaults.num_inference_steps)
        strength = None if self.image is None else presets.STRENGTH if self.strength is None else self.strength
        if strength is not None and first_step(steps, strength) >= steps:
            raise UsageError(f"strength {strength:g} of {amount(steps, 'step')} runs no step", "more of either")
        seed = random_seed() if self.seed is None and self.latents is None else self.seed
        guidance = index.defaults.guidance_scale if self.guidance_scale is None else self.guidance_scale
        request = replace(
            self,
            width=floored[0],
            height=floored[1],
            num_inference_steps=steps,
            guidance_scale=guidance if flux.guidance_embed else None,
            seed=seed,
            strength=strength,
            max_sequence_length=self.max_sequence_length or index.max_sequence_length,
        )
        return request, notes

    def pairs(self, negative: bool = False) -> list[tuple[str, str]]:
        """What CLIP and what T5 reads of each prompt; none where embeds are given, or nothing negative is."""
        texts, texts_2 = (self.negative_prompt, self.negative_prompt_2) if negative else (self.prompt, self.prompt_2)
        if texts is None:
            return []
        both = texts, texts if texts_2 is None else texts_2
        first, second = ((text,) * self.prompts if isinstance(text, str) else text for text in both)
        return list(zip(first, second, strict=True))

    def texts(self) -> list[str]:
        """Every text that is read, each once."""
        given = (getattr(self, name) for name in _TEXTS)
        return list(dict.fromkeys(t for value in given for t in ((value,) if isinstance(value, str) else value or ())))

    def record(self, i: int) -> dict:
        """What of this request decides picture i, as JSON."""
        one_stream = isinstance(self.seed, int)
        record = {
            name: value[i // self.num_images_per_prompt] if isinstance(value, tuple) else value
            for name in _TEXTS
            if (value := getattr(self, name)) is not None
        }
        record |= {
            "true_cfg_scale": self.true_cfg_scale if self.true_cfg else None,
            "width": self.width,
            "height": self.height,
            "num_inference_steps": self.num_inference_steps,
            "sigmas": None if self.sigmas is None else list(self.sigmas),
            "guidance_scale": self.guidance_scale,
            "seed": self.seed if one_stream or self.seed is None else self.seed[i],
            "noise": self.noise,
            "batch": [i, self.batch] if one_stream and self.batch > 1 else None,  # place in the stream's one draw
            "strength": self.strength,
            "max_sequence_length": self.max_sequence_length,
            "given": [name for name in ("latents", *_EMBEDS) if getattr(self, name) is not None] or None,
        }
        if self.image is not None:
            size, pixels = self.image.size, hashlib.sha256(self.image.tobytes()).hexdigest()
            record["image"] = {"width": size[0], "height": size[1], "rgb_sha256": pixels}  # upright, before resizing
            if i and not one_stream and find_recipe(self.noise).posterior == "sample":
                record["image_seed"] = self.seed[0]  # whose stream the image was sampled from, before its own noise
        return {name: value for name, value in record.items() if value is not None}

    def _check_numbers(self, index: ModelIndex) -> None:
        _check_int("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        _check_int("num_images_per_prompt", self.num_images_per_prompt, 1, MAX_BATCH)
        _check_int("max_sequence_length", self.max_sequence_length, 1, index.max_sequence_length)
        _check_int("width", self.width, 1, 2**20)
        _check_int("height", self.height, 1, 2**20)
        for seed in self.seed if isinstance(self.seed, tuple) else (self.seed,):
            _check_int("seed", seed, 0, 2**64 - 1)
        _check_float("guidance_scale", self.guidance_scale, 0.0, MAX_SCALE)
        _check_float("true_cfg_scale", self.true_cfg_scale, 0.0, MAX_SCALE)
        _check_float("strength", self.strength, 0.0, 1.0)
        if self.sigmas is not None:
            levels = self.sigmas if isinstance(self.sigmas, tuple) else ()
            for level in levels:
                _check_float("a level of sigmas", level, 0.0, 1.0)
            if not levels or not all(a > b for a, b in pairwise((*levels, 0.0))):
                raise UsageError("sigmas are not falling numbers in (0, 1]", "noise levels before the shift")
            _check_int("the number of sigmas", len(levels), 1, MAX_STEPS)
            if self.num_inference_steps not in (None, len(levels)):
                raise UsageError(
                    f"{amount(len(levels), 'sigma')} and {amount(self.num_inference_steps, 'step')}", "one of them"
                )

    def _check_prompts(self) -> None:
        for name in _TEXTS:
            _check_texts(name, getattr(self, name))
        for embeds, pooled in _EMBEDS.items():
            text = embeds.removesuffix("_embeds")
            has_text, has_embeds, has_pooled = (getattr(self, name) is not None for name in (text, embeds, pooled))
            if has_embeds != has_pooled:
                raise UsageError(f"one of {embeds} and its pooled form is missing", "both, from encode_prompt")
            if has_text and has_embeds:
                raise UsageError(f"{text} and {embeds} are both given", "one of them")
            if not has_text and getattr(self, f"{text}_2") is not None:
                raise UsageError(f"{text}_2 is given without {text}", "both")
        if self.prompt is None and self.prompt_embeds is None:
            raise UsageError("there is no prompt", "a text; an empty one is allowed")
        negative = self.negative_prompt is not None or self.negative_prompt_embeds is not None
        scale = f"true_cfg_scale {self.true_cfg_scale:g}"
        if negative and not self.true_cfg:
            todo = "set true_cfg_scale (it doubles the time of a step)"
            raise UsageError(f"a negative prompt does nothing at {scale}", "above 1", todo)
        if self.true_cfg and not negative:
            raise UsageError(f"{scale} needs a negative prompt", "one, even an empty one")
        for name in _TEXTS:
            texts = getattr(self, name)
            if isinstance(texts, tuple) and len(texts) != self.prompts:
                raise UsageError(f"{amount(len(texts), 'text')} in {name}", f"as many as prompts, {self.prompts}")

    def _check_options(self, flux: FluxConfig) -> None:
        if self.guidance_scale is not None and not flux.guidance_embed:
            raise UsageError("guidance_scale does nothing: this model has no guidance embedding", "", "leave it out")
        if self.strength is not None and self.image is None:
            raise UsageError("strength does nothing without an image", "", "add an image, or leave it out")
        if self.output_type not in OUTPUT_TYPES:
            raise UsageError(f"output_type is {self.output_type!r}", f"one of {', '.join(OUTPUT_TYPES)}")
        if not isinstance(self.noise, str):
            raise UsageError(f"noise is {self.noise!r}", "the name of a recipe")
        find_recipe(self.noise)
        if self.latents is not None and (self.seed is not None or self.image is not None):
            raise UsageError("latents are given beside a seed or an image", "one of them: latents are the start")
        if self.batch > MAX_BATCH:
            raise UsageError(f"{self.batch} images in one call", f"{MAX_BATCH} at most", "make several calls")
        if isinstance(self.seed, tuple) and len(self.seed) != self.batch:
            raise UsageError(
                f"{amount(len(self.seed), 'seed')} for {amount(self.batch, 'image')}", "one seed, or one for each image"
            )

    def _check_arrays(self, flux: FluxConfig, tokens: int) -> None:
        """Shapes, types and values of arrays; NaN here would later look like damaged weights."""
        shapes = {"latents": (self.batch, tokens, flux.in_channels)}
        for embeds, pooled in _EMBEDS.items():
            if getattr(self, embeds) is None:
                continue
            shape = getattr(self, embeds).shape
            if len(shape) != 3 or shape[2] != flux.context_in_dim or 0 in shape:
                raise UsageError(f"{embeds} has shape {shape}", f"(prompts, tokens, {flux.context_in_dim})")
            if embeds.startswith("negative") and shape[0] not in (1, self.prompts):
                raise UsageError(f"{embeds} holds {shape[0]} prompts", f"one, or {self.prompts}")
            shapes[pooled] = (shape[0], flux.vec_in_dim)
        for name in _ARRAYS:
            if (array := getattr(self, name)) is None:
                continue
            if array.shape != shapes.get(name, array.shape):
                raise UsageError(f"{name} has shape {array.shape}", f"{shapes[name]}")
            check_values(name, array)

    def _size(self, index: ModelIndex) -> tuple[int, int]:
        """Width and height asked for: given, the default's, or an input image's shape at the default's area."""
        default = index.defaults
        if self.image is None or (self.width and self.height):
            return self.width or default.width, self.height or default.height
        aspect = self.image.width / self.image.height
        if self.width or self.height:
            return self.width or round(self.height * aspect), self.height or round(self.width / aspect)
        area = default.width * default.height
        return round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))


@dataclass(frozen=True)
class Result:
    """What a call gave."""

    images: (
        list  # what was released: PIL pictures; one (B, H, W, 3) float array in [0, 1]; or packed latents (B, L, 64)
    )
    outcomes: tuple[str, ...]  # of each image that was drawn: "released", "waiting", or "withheld: " and why
    seeds: tuple[int, ...]  # one for the batch or one for each image; none where latents were given
    notes: tuple[str, ...] = ()  # what the user should know: sizes changed, text cut off
    records: tuple[dict, ...] = ()  # of each image: everything that decides it
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage
    plan: Plan | None = None  # the memory that was expected, in bytes
    peaks: dict[str, int] = field(default_factory=dict)  # and what each stage took


def random_seed() -> int:
    """A seed for somebody who named none; 32 bits, all that torch's generator takes."""
    return secrets.randbelow(2**32)


def open_image(image: Image.Image | str | os.PathLike | None) -> Image.Image | None:
    """An image as the autoencoder's encoder can take it, whole in memory: upright by its EXIF orientation, RGB.

    Transparency is flattened on white, 16-bit grey becomes 8-bit.

    Args:
        image: a PIL image, which stays as it is, or a path.

    Raises:
        UsageError: not an image, broken, too large to be honest, or of a kind whose white is not known.
    """
    if image is None:
        return None
    if not isinstance(image, str | os.PathLike | Image.Image):
        raise UsageError(f"image is {type(image).__name__}", "a PIL image or a path")
    image = os.path.expanduser(image) if isinstance(image, str | os.PathLike) else image
    name = image if isinstance(image, str) else "the image"
    with opened(image) as file:
        mode = file.mode
        if mode in ("I", "F"):
            raise UsageError(f"{name} has mode {mode}, whose white is not known", "8 or 16 bits, grey or RGB")
        upright = ImageOps.exif_transpose(file)  # a copy, whole in memory
        if mode.startswith("I;16"):
            upright = Image.fromarray(np.round(np.asarray(upright) / 257).astype(np.uint8))
        if mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in upright.info:
            upright = upright.convert("LA" if mode == "La" else "RGBA").convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        upright = upright.convert("RGB")
    if 0 in upright.size:
        raise UsageError(f"{name} is {upright.width} x {upright.height}", "at least one pixel")
    return upright


def check_values(name: str, array: mx.array) -> None:
    """Checks an array that the user gave.

    Raises:
        UsageError: not of floating point, or NaN or infinities among the values.
    """
    if not mx.issubdtype(array.dtype, mx.floating):
        raise UsageError(f"{name} holds {array.dtype}", "numbers of a floating-point type")
    if not mx.isfinite(array).all().item():
        raise UsageError(f"{name} holds NaN or infinities", "finite numbers")


def _plain(value):
    """Numbers of any library as Python's, sequences as tuples; anything else as it is."""
    if isinstance(value, np.ndarray | mx.array):
        value = value.tolist()
    if isinstance(value, str | bytes | bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return tuple(map(_plain, value)) if isinstance(value, Sequence) else value


def _array(name: str, value) -> mx.array:
    """As an MLX array, evaluated: a lazy one belongs to the caller's thread."""
    try:
        array = value if isinstance(value, mx.array) else mx.array(value)
        mx.eval(array)
    except Exception:  # of whatever library made it
        raise UsageError(f"{name} is {type(value).__name__}, and cannot be read as an array", "an mlx array") from None
    return array


def _check_texts(name: str, texts) -> None:
    if texts is None:
        return
    if not isinstance(texts, str | tuple):
        raise UsageError(f"{name} is {type(texts).__name__}", "a text or a list of texts")
    if texts == ():
        raise UsageError(f"{name} is an empty list", "at least one text")
    for text in (texts,) if isinstance(texts, str) else texts:
        if not isinstance(text, str):
            raise UsageError(f"{name} holds {type(text).__name__}", "texts")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            todo = "check the terminal's or the file's encoding"
            raise UsageError(f"{name} is not valid UTF-8", "text", todo) from None


def _check_int(name: str, value, low: int, high: int) -> None:
    if value is not None and (type(value) is not int or not low <= value <= high):
        raise UsageError(f"{name} is {reprlib.repr(value)}", f"a whole number from {low} to {high}")


def _check_float(name: str, value, low: float, high: float) -> None:
    if value is not None and (type(value) not in (int, float) or not low <= value <= high):
        raise UsageError(f"{name} is {reprlib.repr(value)}", f"a number from {low:g} to {high:g}")
