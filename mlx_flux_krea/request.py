"""What a caller asks for and what comes back, as frozen objects; every check that needs no weights is here."""

import math
import secrets
from dataclasses import dataclass, field, replace

import mlx.core as mx

from .config import FluxConfig, ModelIndex
from .errors import UsageError
from .noise import find_recipe

_ARRAYS = ("latents", "prompt_embeds", "negative_prompt_embeds")  # that a caller may give, and no record can repeat
OUTPUT_TYPES = ("pil", "np", "latent")
MAX_SIDE = 8192  # pixels; far above what the model draws well, and below what breaks arithmetic


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of the pipeline (DESIGN, section 8). None means: the folder's default, or not used."""

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
    image: object | None = None  # a PIL image or the path of one
    strength: float | None = None  # 0.6; how much of the schedule an input image goes through
    output_type: str = "pil"
    max_sequence_length: int | None = None  # of T5

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
        self._check_prompts()
        self._check_options(index, flux)
        notes = []
        width, height = self._size(index)
        floored = (width // multiple * multiple, height // multiple * multiple)
        if min(floored) < multiple or max(floored) > MAX_SIDE:
            raise UsageError(f"the size is {width} x {height}", f"sides from {multiple} to {MAX_SIDE} pixels")
        if floored != (width, height):
            notes.append(f"{width} x {height} is no multiple of {multiple}: the picture is {floored[0]} x {floored[1]}")
        steps = self.num_inference_steps or (len(self.sigmas) if self.sigmas else index.defaults.num_inference_steps)
        seed = self.seed
        if seed is None and self.latents is None:
            seed = random_seed()
        guidance = index.defaults.guidance_scale if self.guidance_scale is None else self.guidance_scale
        request = replace(
            self,
            width=floored[0],
            height=floored[1],
            num_inference_steps=steps,
            guidance_scale=guidance if flux.guidance_embed else None,
            seed=seed,
            strength=None if self.image is None else 0.6 if self.strength is None else self.strength,
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

    def record(self, i: int) -> dict:
        """What of this request decides picture i, as JSON."""
        one_stream = isinstance(self.seed, int)
        record = {
            name: value[i // self.num_images_per_prompt] if isinstance(value, tuple) else value
            for name in ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
            if (value := getattr(self, name)) is not None
        }
        record |= {
            "true_cfg_scale": self.true_cfg_scale if self.true_cfg else None,
            "width": self.width,
            "height": self.height,
            "num_inference_steps": self.num_inference_steps,
            "sigmas": self.sigmas,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed if one_stream or self.seed is None else self.seed[i],
            "noise": self.noise,
            "batch": [i, self.batch] if one_stream and self.batch > 1 else None,  # place in the stream's one draw
            "strength": self.strength,
            "max_sequence_length": self.max_sequence_length,
            "given": [name for name in _ARRAYS if getattr(self, name) is not None] or None,
        }
        return {name: value for name, value in record.items() if value is not None}

    def _check_prompts(self) -> None:
        pairs = (
            ("prompt", self.prompt, self.prompt_embeds, self.pooled_prompt_embeds),
            ("negative_prompt", self.negative_prompt, self.negative_prompt_embeds, self.negative_pooled_prompt_embeds),
        )
        for name, text, embeds, pooled in pairs:
            if (embeds is None) != (pooled is None):
                raise UsageError(f"one of {name}_embeds and its pooled form is missing", "both, from encode_prompt")
            if text is not None and embeds is not None:
                raise UsageError(f"{name} and {name}_embeds are both given", "one of them")
        if self.prompt is None and self.prompt_embeds is None:
            raise UsageError("there is no prompt", "a text; an empty one is allowed")
        negative = self.negative_prompt is not None or self.negative_prompt_embeds is not None
        if self.negative_prompt_2 is not None and self.negative_prompt is None:
            raise UsageError("negative_prompt_2 is given without negative_prompt", "both")
        if self.prompt_2 is not None and self.prompt is None:
            raise UsageError("prompt_2 is given without prompt", "both")
        if negative and not self.true_cfg:
            todo = "set true_cfg_scale (it doubles the time of a step)"
            raise UsageError(
                f"a negative prompt does nothing at true_cfg_scale {self.true_cfg_scale:g}", "above 1", todo
            )
        if self.true_cfg and not negative:
            raise UsageError(
                f"true_cfg_scale {self.true_cfg_scale:g} needs a negative prompt", "one, even an empty one"
            )
        for name in ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2"):
            self._check_texts(name, getattr(self, name))
        if self.negative_prompt_embeds is not None and len(self.negative_prompt_embeds) not in (1, self.prompts):
            raise UsageError(f"{len(self.negative_prompt_embeds)} negative prompts", f"one, or {self.prompts}")

    def _check_texts(self, name: str, texts) -> None:
        if texts is None:
            return
        if not isinstance(texts, str | tuple) or (not texts and texts != ""):
            raise UsageError(f"{name} is {type(texts).__name__}", "a text or a list of texts")
        for text in (texts,) if isinstance(texts, str) else texts:
            if not isinstance(text, str):
                raise UsageError(f"{name} holds {type(text).__name__}", "texts")
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise UsageError(
                    f"{name} is not valid UTF-8", "text", "check the terminal's or the file's encoding"
                ) from None
        if isinstance(texts, tuple) and len(texts) != self.prompts:
            raise UsageError(f"{len(texts)} texts in {name}", f"as many as prompts, {self.prompts}")

    def _check_options(self, index: ModelIndex, flux: FluxConfig) -> None:
        _check_int("num_inference_steps", self.num_inference_steps, 1, 1000)
        _check_int("num_images_per_prompt", self.num_images_per_prompt, 1, 1000)
        _check_int("max_sequence_length", self.max_sequence_length, 1, index.max_sequence_length)
        _check_int("width", self.width, 1, 2**20)
        _check_int("height", self.height, 1, 2**20)
        _check_float("guidance_scale", self.guidance_scale, 0.0, 1000.0)
        _check_float("true_cfg_scale", self.true_cfg_scale, 0.0, 1000.0)
        _check_float("strength", self.strength, 0.0, 1.0)
        if self.guidance_scale is not None and not flux.guidance_embed:
            raise UsageError("guidance_scale does nothing: this model has no guidance embedding", "", "leave it out")
        if self.strength is not None and self.image is None:
            raise UsageError("strength does nothing without an image", "", "add an image, or leave it out")
        if self.output_type not in OUTPUT_TYPES:
            raise UsageError(f'output_type is "{self.output_type}"', f"one of {', '.join(OUTPUT_TYPES)}")
        find_recipe(self.noise)
        if self.latents is not None and (self.seed is not None or self.image is not None):
            raise UsageError("latents are given beside a seed or an image", "one of them: latents are the start")
        if self.sigmas is not None:
            falling = all(a > b for a, b in zip(self.sigmas, self.sigmas[1:], strict=False))
            if not self.sigmas or not falling or not 0 < self.sigmas[-1] <= self.sigmas[0] <= 1:
                raise UsageError("sigmas are not falling numbers in (0, 1]", "noise levels before the shift")
            if self.num_inference_steps not in (None, len(self.sigmas)):
                raise UsageError(f"{len(self.sigmas)} sigmas and {self.num_inference_steps} steps", "one of them")
        for seed in self.seed if isinstance(self.seed, tuple) else (self.seed,):
            _check_int("seed", seed, 0, 2**64 - 1)
        if isinstance(self.seed, tuple) and len(self.seed) != self.batch:
            raise UsageError(f"{len(self.seed)} seeds for {self.batch} images", "one seed, or one for each image")

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

    images: list  # PIL pictures; one (B, H, W, 3) float array in [0, 1]; or the packed latents (B, L, 64)
    outcomes: tuple[str, ...]  # of each image: "released"
    seeds: tuple[int, ...]  # one for the batch or one for each image; none where latents were given
    notes: tuple[str, ...] = ()  # what the user should know: sizes changed, text cut off
    records: tuple[dict, ...] = ()  # of each image: everything that decides it
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage


def random_seed() -> int:
    """A seed for somebody who named none; 32 bits, all that torch's generator takes."""
    return secrets.randbelow(2**32)


def _check_int(name: str, value, low: int, high: int) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high):
        raise UsageError(f"{name} is {value!r}", f"a whole number from {low} to {high}")


def _check_float(name: str, value, low: float, high: float) -> None:
    if value is not None and (not isinstance(value, int | float) or not low <= value <= high):
        raise UsageError(f"{name} is {value!r}", f"a number from {low:g} to {high:g}")
