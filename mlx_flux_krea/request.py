"""A request as a caller writes it, the same with every default filled in, and the result of a call.

Every check that needs no weights is here.
"""

import itertools
import math
import numbers
import reprlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from . import compat, presets
from .credentials import watermark
from .errors import UsageError, amount, short_repr
from .fast import FastMode, chosen_mode
from .inputs import style as styles
from .inputs.arguments import ARGUMENTS as IMAGES
from .inputs.arguments import ImageArguments, opened_inputs
from .inputs.gather import Inputs, at_size, gather_inputs, natural_size
from .inputs.large import Large, enlarged, make_large, takes_second_pass
from .memory import MemoryPlan
from .models.config import FluxConfig, ModelIndex
from .presets import MAX_BATCH, MAX_PROMPT, MAX_SCALE, MAX_SIDE, MAX_STEPS, MAX_WEIGHT
from .sampling.enlarge import RECIPE
from .sampling.noise import find_recipe
from .sampling.rules import CacheRule, count_evaluations, fast_skips, parse_cache, skip_steps
from .sampling.sampler import first_step, schedule_levels
from .weights import ModelFolder

OUTPUT_TYPES = ("pil", "np", "latent")
_SECOND = ("prompt_2", "negative_prompt_2")
_TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
_EMBEDS = {"prompt_embeds": "pooled_prompt_embeds", "negative_prompt_embeds": "negative_pooled_prompt_embeds"}
_ARRAYS = ("latents", *_EMBEDS, *_EMBEDS.values())


@dataclass(frozen=True, kw_only=True, repr=False)
class Request(ImageArguments):
    """The arguments of one call of the pipeline. None means: the model's default, or not used.

    Values are converted on the way in: numbers of any library to Python's, sequences to tuples, arrays to MLX's, an
    image by `open_image`. `resolve` checks them.

    Raises:
        UsageError: a value that cannot be read as an array or as an image.
    """

    prompt: str | Sequence[str] | None = None  # for CLIP, and for T5 where prompt_2 is None
    prompt_2: str | Sequence[str] | None = None  # "" is the prompt, as in diffusers; [""] an empty text
    negative_prompt: str | Sequence[str] | None = None
    negative_prompt_2: str | Sequence[str] | None = None
    true_cfg_scale: float | None = None  # above 1: negative + scale * (positive - negative), at double cost
    width: int | None = None  # pixels, floored to a multiple of 16
    height: int | None = None
    num_inference_steps: int | None = None
    sigmas: Sequence[float] | None = None  # noise levels before the shift, instead of evenly spaced ones
    schedule: str | None = None  # one of presets.SCHEDULES, instead of the model's noise levels
    solver: str = presets.SOLVERS[0]  # one of presets.SOLVERS
    cache: str | None = None  # "skip", or "first-block:T": steps that are not computed in full (sampling/caches.py)
    fast: bool | FastMode = False  # the mode that is worth it for the model, or none; or a mode that it was before
    stop_after: int | None = None  # steps after which the run ends, with the picture that the last one predicts
    guidance_scale: float | None = None  # of the embedding that guidance was distilled into
    num_images_per_prompt: int = 1
    seed: int | Sequence[int] | None = None  # one stream for the batch, or one for each image
    noise: str = "diffusers"  # a row of presets.RECIPES
    latents: mx.array | None = None  # (B, L, 64), packed
    prompt_embeds: mx.array | None = None  # (P, S, context_in_dim)
    pooled_prompt_embeds: mx.array | None = None  # (P, vec_in_dim)
    negative_prompt_embeds: mx.array | None = None
    negative_pooled_prompt_embeds: mx.array | None = None
    style_images: Any = None  # one or several, as `image`; tokens of Redux stand beside the prompt's
    style_weights: float | Sequence[float] | None = None  # a number for all, or one for each
    style_rule: str | None = None  # one of presets.STYLE_RULES
    style_pooled_weights: float | Sequence[float] | None = None  # of the pooled vector, by the rule sum
    watermark: bool = False  # adds the one of credentials/watermark.py
    upscale: float | None = None  # 1 to 4: enlarges the picture, or `image`, in a second pass (inputs/large.py)
    upscale_tiles: bool | None = None  # the second pass sees tiles, or the whole; None: as the plan finds
    output_type: str = "pil"  # one of OUTPUT_TYPES
    max_sequence_length: int | None = None  # of T5
    adapters: Sequence[tuple[str, float]] | None = None  # names and weights; None: those that the pipeline has set

    def __new__(cls, *values: Any, **given: Any):
        """Names the argument that was meant where one does not exist."""
        own = [field.name for field in fields(cls)]
        if unknown := next((name for name in given if name not in own), None):
            raise compat.unknown_argument(f"{cls.__name__}()", unknown, own)
        return super().__new__(cls)

    def __post_init__(self):
        for name, value in styles.remembered(self.prompt_embeds, self.pooled_prompt_embeds, vars(self)).items():
            object.__setattr__(self, name, value)
        for name, value in opened_inputs(vars(self)).items():
            object.__setattr__(self, name, value)
        for name, value in vars(self).items():
            if name in IMAGES:
                continue
            if name == "style_images":
                object.__setattr__(self, name, styles.open_images(value))
            elif name in _SECOND and isinstance(value, str | list | tuple) and not value:
                object.__setattr__(self, name, None)
            elif name == "num_images_per_prompt" and value is None:
                object.__setattr__(self, name, 1)
            elif name == "solver" and value is None:
                object.__setattr__(self, name, presets.SOLVERS[0])
            elif value is not None:
                object.__setattr__(
                    self, name, as_array(f"`{name}` is", value) if name in _ARRAYS else _as_python(value)
                )

    def __repr__(self) -> str:
        return _given_only(self)

    def resolve(self, folder: ModelFolder, *, has_control: bool = True, with_images: bool = True) -> "ResolvedRequest":
        """Returns the request with every default filled in from a model folder, and notes for the user.

        Args:
            folder: the model.
            has_control: False where it is known that no adapter reads a control image.
            with_images: False: the prompt alone is of interest, for a model that cannot do without images too.

        Raises:
            UsageError: an option that cannot be used, or options that do not go together.
        """
        index, flux = folder.index, folder.flux.sizes
        if self.true_cfg_scale is None:
            known = self._with_true_cfg(index.defaults.true_cfg_scale)
            return known.resolve(folder, has_control=has_control, with_images=with_images)
        multiple = 2 * folder.vae.sizes.downsampling  # a token is a patch of 2 x 2 latents
        self._check_numbers(index)
        self._check_prompts()
        self._check_options(flux, index.task)
        check_adapters(self.adapters)
        task = index.task if with_images else presets.TASKS[0]
        takes_second_pass(self, index.task)  # says what does not go together with it before any image is read
        inputs = gather_inputs(self, task, has_control=has_control, kind=index.kind)
        width, height, notes, large = self._sizes(index, multiple, inputs)
        inputs = at_size(inputs, self, width, height, multiple, is_asked=bool(self.width or self.height))
        self._check_arrays(flux, width * height // multiple**2)
        if self.watermark:
            is_enlarged = large and self.stop_after is None
            watermark.check_size(*(large.size if large and is_enlarged else inputs.picture_size(width, height)))
        sigmas = tuple(self.sigmas or ())
        steps = self.num_inference_steps or len(sigmas) or index.defaults.num_inference_steps
        usual = RECIPE.strength if large else inputs.usual_strength
        strength = usual if self.strength is None else self.strength
        fast, said = self._fast(folder, steps - (first_step(steps, strength) if inputs.canvas else 0))
        steps = fast.taken(steps) if fast and not sigmas else steps
        if (inputs.canvas or large) and first_step(steps, strength) >= steps:
            raise UsageError(f"`strength` {strength:g} of {amount(steps, 'step')} runs no step", "more of either")
        levels = schedule_levels(self.schedule, steps)
        if levels is not None and len({*levels}) < steps:
            raise UsageError(f"the `schedule` {self.schedule} has fewer than {steps} noise levels", "fewer steps")
        first = first_step(steps, strength) if inputs.canvas else 0
        _check_int("stop_after", self.stop_after, low=1, high=steps - first - 1)
        style = styles.make_style(self.style_images, self.style_weights, self.style_rule, self.style_pooled_weights)
        has_text = self.prompt is not None or self.prompt_embeds is not None
        guidance = index.defaults.guidance_scale if self.guidance_scale is None else self.guidance_scale
        return ResolvedRequest(
            prompt=self._texts(self.prompt),
            prompt_2=self._texts(self.prompt_2),
            negative_prompt=self._texts(self.negative_prompt),
            negative_prompt_2=self._texts(self.negative_prompt_2),
            true_cfg_scale=self._scale,
            width=width,
            height=height,
            num_inference_steps=steps,
            sigmas=sigmas,
            schedule=self.schedule,
            solver=self.solver,
            cache=fast.cache if fast else None if self.cache is None else parse_cache(self.cache),
            fast=fast,
            stop_after=self.stop_after,
            guidance_scale=guidance if flux.guidance_embed else None,
            num_images_per_prompt=self.num_images_per_prompt,
            seed=self._seed(),
            noise=self.noise,
            latents=self.latents,
            prompt_embeds=self.prompt_embeds,
            pooled_prompt_embeds=self.pooled_prompt_embeds,
            negative_prompt_embeds=self.negative_prompt_embeds,
            negative_pooled_prompt_embeds=self.negative_pooled_prompt_embeds,
            inputs=inputs,
            strength=strength,
            watermark=self.watermark,
            large=large,
            output_type=self.output_type,
            max_sequence_length=self.max_sequence_length
            or (index.max_sequence_length if has_text else presets.MAX_SEQUENCE_LENGTH),
            style=style,
            adapters=self.adapters if self.adapters is None else tuple(self.adapters),
            notes=(*notes, *inputs.notes, *said),
        )

    def _with_true_cfg(self, scale: float) -> "Request":
        """Returns the request with a model's own scale of true CFG, above 1 against an empty text if none is given."""
        has_negative = self.negative_prompt is not None or self.negative_prompt_embeds is not None
        if scale > 1 and not has_negative:
            return replace(self, true_cfg_scale=scale, negative_prompt="")
        return replace(self, true_cfg_scale=scale)

    def _fast(self, folder: ModelFolder, steps: int) -> tuple[FastMode | None, tuple[str, ...]]:
        """Returns the mode of `fast` for so many steps, and a note where none is worth it, or a choice is damaged."""
        if not self.fast:
            return None, ()
        if isinstance(self.fast, FastMode):
            return self.fast, ()
        shift = folder.index.schedule.shift
        if fast_skips(shift, steps):
            mode, note = chosen_mode(folder.path)
            mode = FastMode.parse(presets.FAST) if mode.steps and self.sigmas else mode  # these say how many steps
            return mode, (note,) if note else ()
        if shift == "none":
            return None, ("`fast` changes nothing: this model was made for few steps, and all are computed",)
        found = f"`fast` changes nothing below {presets.FAST_FROM} steps"
        return None, (f"{found}: {amount(steps, 'step is', 'steps are')} computed",)

    @property
    def _scale(self) -> float:
        return 1.0 if self.true_cfg_scale is None else self.true_cfg_scale

    @property
    def _prompts(self) -> int:
        if self.prompt_embeds is not None:
            return self.prompt_embeds.shape[0]
        return len(self.prompt) if isinstance(self.prompt, tuple) else 1

    @property
    def _batch(self) -> int:
        return self._prompts * self.num_images_per_prompt

    def _texts(self, given: str | Sequence[str] | None) -> tuple[str, ...]:
        """Returns a text for each prompt, or none."""
        return (given,) * self._prompts if isinstance(given, str) else tuple(given or ())

    def _seed(self) -> int | tuple[int, ...] | None:
        if self.seed is None:
            return random_seed() if self.latents is None else None
        return self.seed if isinstance(self.seed, int) else tuple(self.seed)

    def _check_numbers(self, index: ModelIndex) -> None:
        _check_int("num_inference_steps", self.num_inference_steps, low=1, high=MAX_STEPS)
        _check_int("num_images_per_prompt", self.num_images_per_prompt, low=1, high=MAX_BATCH)
        _check_int("max_sequence_length", self.max_sequence_length, low=1, high=index.max_sequence_length)
        _check_int("width", self.width, low=1, high=2**20)
        _check_int("height", self.height, low=1, high=2**20)
        for seed in self.seed if isinstance(self.seed, tuple) else (self.seed,):
            _check_int("seed", seed, low=0, high=2**64 - 1)
        _check_float("guidance_scale", self.guidance_scale, low=0.0, high=MAX_SCALE)
        _check_float("true_cfg_scale", self.true_cfg_scale, low=0.0, high=MAX_SCALE)
        _check_float("strength", self.strength, low=0.0, high=1.0)
        _check_int("padding_mask_crop", self.padding_mask_crop, low=0, high=2**20)
        for name in ("soft_mask", "paste", "auto_resize", "watermark"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"`{name}` is {reprlib.repr(getattr(self, name))}", "True or False")
        if self.sigmas is not None:
            levels = self.sigmas if isinstance(self.sigmas, tuple) else ()
            for level in levels:
                _check_float("sigmas", level, low=0.0, high=1.0, part="a level of ")
            if not levels or not all(a > b for a, b in itertools.pairwise((*levels, 0.0))):
                raise UsageError("`sigmas` are not falling numbers in (0, 1]", "noise levels before the shift")
            _check_int("sigmas", len(levels), low=1, high=MAX_STEPS, part="the number of ")
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
                raise UsageError(f"one of `{embeds}` and its pooled form is missing", "both, from encode_prompt")
            if has_text and has_embeds:
                raise UsageError(f"`{text}` and `{embeds}` are both given", "one of them")
            if not has_text and getattr(self, f"{text}_2") is not None:
                raise UsageError(f"`{text}_2` is given without `{text}`", "both")
        if self.prompt is None and self.prompt_embeds is None and self.style_images is None:
            raise UsageError("there is no prompt", "a text; an empty one is allowed")
        negative = self.negative_prompt is not None or self.negative_prompt_embeds is not None
        scale = f"`true_cfg_scale` {self._scale:g}"
        if negative and not self._scale > 1:
            todo = "set `true_cfg_scale` (it doubles the time of a step)"
            raise UsageError(f"a negative prompt does nothing at {scale}", "above 1", todo)
        if self._scale > 1 and not negative:
            todo = '`negative_prompt` "" is enough'
            raise UsageError(f"{scale} needs a negative prompt", "one, even an empty one", todo)
        for name in _TEXTS:
            texts = getattr(self, name)
            if isinstance(texts, tuple) and len(texts) != self._prompts:
                raise UsageError(f"{amount(len(texts), 'text')} in `{name}`", f"as many as prompts, {self._prompts}")

    def _check_options(self, flux: FluxConfig, task: str) -> None:
        if self.guidance_scale and not flux.guidance_embed:  # 0 is the published call of FLUX.1 [schnell]
            raise UsageError("`guidance_scale` does nothing: this model has no guidance embedding", "", "leave it out")
        if self.strength is not None and self.image is None and (self.upscale or 1) == 1:
            todo = "add an image or `upscale`, or leave it out"
            raise UsageError("`strength` does nothing without an image", "", todo)
        if self.output_type not in OUTPUT_TYPES:
            raise UsageError(f"`output_type` is {self.output_type!r}", f"one of {', '.join(OUTPUT_TYPES)}")
        if self.watermark and self.output_type == "latent":
            raise UsageError("`watermark` does nothing to latents", '`output_type` "pil" or "np"', "leave it out")
        self._check_steps()
        if not isinstance(self.noise, str):
            raise UsageError(f"`noise` is {self.noise!r}", "the name of a recipe")
        find_recipe(self.noise)
        starts = self.image is not None and task != "kontext"
        if self.latents is not None and (self.seed is not None or starts):
            raise UsageError("`latents` are given with `seed` or `image`", "one of them: latents are the start")
        if self._batch > MAX_BATCH:
            raise UsageError(f"{self._batch} images in one call", f"{MAX_BATCH} at most", "make several calls")
        if isinstance(self.seed, tuple) and len(self.seed) != self._batch:
            raise UsageError(
                f"{amount(len(self.seed), 'seed')} for {amount(self._batch, 'image')}",
                "one seed, or one for each image",
            )

    def _check_steps(self) -> None:
        """Checks how the steps are taken: solver, schedule and cache."""
        for name, known in (("solver", presets.SOLVERS), ("schedule", (None, *presets.SCHEDULES))):
            if getattr(self, name) not in known:
                found = f"`{name}` is {reprlib.repr(getattr(self, name))}"
                raise UsageError(found, f"one of {', '.join(filter(None, known))}")
        if not isinstance(self.fast, bool | FastMode):
            raise UsageError(f"`fast` is {reprlib.repr(self.fast)}", "True or False")
        if self.schedule is not None and self.sigmas is not None:
            raise UsageError("`schedule` and `sigmas` are both given", "one of them")
        if self.cache is not None:
            parse_cache(self.cache)
        if self.fast and self.cache is not None:
            raise UsageError("`fast` and `cache` are both given", "one of them")
        if self.solver == "heun" and (self.fast or self.cache is not None):
            found = f"`{'fast' if self.fast else 'cache'}` does not work with `solver` heun"
            raise UsageError(found, "euler or dpmpp_2m", "heun evaluates each noise level twice")

    def _check_arrays(self, flux: FluxConfig, tokens: int) -> None:
        """Checks shapes, types and values of arrays; NaN here would later look like damaged weights."""
        shapes: dict[str, tuple[int, ...]] = {"latents": (self._batch, tokens, flux.out_channels)}
        for embeds, pooled in _EMBEDS.items():
            if getattr(self, embeds) is None:
                continue
            shape = getattr(self, embeds).shape
            if len(shape) != 3 or shape[2] != flux.context_in_dim or 0 in shape:
                raise UsageError(f"`{embeds}` has shape {shape}", f"(prompts, tokens, {flux.context_in_dim})")
            if embeds.startswith("negative") and shape[0] not in (1, self._prompts):
                raise UsageError(f"`{embeds}` holds {shape[0]} prompts", f"one, or {self._prompts}")
            shapes[pooled] = (shape[0], flux.vec_in_dim)
        for name in _ARRAYS:
            if (array := getattr(self, name)) is None:
                continue
            if array.shape != shapes.get(name, array.shape):
                raise UsageError(f"`{name}` has shape {array.shape}", f"{shapes[name]}")
            check_values(f"`{name}`", array)

    def _sizes(
        self, index: ModelIndex, multiple: int, inputs: Inputs
    ) -> tuple[int, int, tuple[str, ...], Large | None]:
        """Returns width and height of the first pass, a note about them, and the second pass if there is one.

        Of an image that is enlarged, which has one pass, they are those of the finished picture.
        """
        own = index.defaults.width, index.defaults.height
        if not takes_second_pass(self, index.task):
            return *self._size(index, multiple, inputs), None
        factor = self.upscale or 1.0
        if not inputs.canvas:
            width, height, notes = self._size(index, multiple, inputs)
            target = enlarged((width, height), factor, multiple)
            return width, height, notes, make_large(self, (width, height), target, own, multiple)
        if inputs.is_masked:
            todo = "flatten the image, or leave out `upscale`"
            raise UsageError("`upscale` with an image whose transparent part is its mask", "an image without", todo)
        size = inputs.canvas.size
        target, notes = enlarged(size, factor, multiple), ()
        if target != (size[0] * factor, size[1] * factor):
            found = f"the image is {size[0]} x {size[1]}, the picture {target[0]} x {target[1]}"
            notes = (f"{found}: sides are multiples of {multiple}",)
        return *target, notes, make_large(self, None, target, own, multiple)

    def _size(self, index: ModelIndex, multiple: int, inputs: Inputs) -> tuple[int, int, tuple[str, ...]]:
        """Returns width and height as the model can make them, and a note where they are not the size asked for."""
        default, width, height = index.defaults, self.width, self.height
        shape, is_size = (None, False) if width and height else natural_size(inputs, self)
        if shape:
            if not (width or height):
                if is_size:
                    return *(_floored(side, multiple) for side in shape), ()  # type: ignore[return-value]  # two
                return _size_of_image(shape, index, multiple, says=not inputs.paste)
            width = width or _rounded((height or 0) * shape[0] / shape[1], multiple)
            height = height or _rounded(width * shape[1] / shape[0], multiple)
        width, height = width or default.width, height or default.height
        floored = (width // multiple * multiple, height // multiple * multiple)
        if min(floored) < multiple or max(floored) > MAX_SIDE:
            raise UsageError(f"the size is {width} x {height}", f"sides from {multiple} to {MAX_SIDE} pixels")
        if floored == (width, height):
            return *floored, ()
        picture = f"the picture is {floored[0]} x {floored[1]}"
        return *floored, (f"{width} x {height} is no multiple of {multiple}: {picture}",)


@dataclass(frozen=True, kw_only=True, repr=False)
class ResolvedRequest:
    """A request that one model can run: checked, with every default filled in. From `Request.resolve`.

    P prompts, n images of each, B = P n images in all, L image tokens, S text tokens.
    """

    prompt: tuple[str, ...]  # P texts; none where embeds, or style images alone, are given
    prompt_2: tuple[str, ...]  # P texts for T5; none: those of `prompt`
    negative_prompt: tuple[str, ...]
    negative_prompt_2: tuple[str, ...]
    true_cfg_scale: float
    width: int  # pixels
    height: int
    num_inference_steps: int
    sigmas: tuple[float, ...]  # noise levels before the shift; none: the schedule's
    schedule: str | None  # None: the model's
    solver: str
    cache: CacheRule | None
    fast: FastMode | None  # that chose the cache, or the number of steps
    stop_after: int | None  # steps that run; None: all
    guidance_scale: float | None  # None: the model has no guidance embedding
    num_images_per_prompt: int  # n
    seed: int | tuple[int, ...] | None  # None: latents are given
    noise: str
    latents: mx.array | None  # (B, L, 64)
    prompt_embeds: mx.array | None  # (P, S, context_in_dim)
    pooled_prompt_embeds: mx.array | None  # (P, vec_in_dim)
    negative_prompt_embeds: mx.array | None
    negative_pooled_prompt_embeds: mx.array | None
    inputs: Inputs  # images
    strength: float  # without effect where there is no image to start from, and no second pass
    large: Large | None  # the second pass
    style: styles.Style | None
    watermark: bool
    output_type: str
    max_sequence_length: int  # S
    adapters: tuple[tuple[str, float], ...] | None  # names and weights; None: those that the pipeline has set
    notes: tuple[str, ...]  # for the user, such as a size that was changed

    def __repr__(self) -> str:
        return _given_only(self)

    @property
    def prompts(self) -> int:
        """P, the number of prompts."""
        return len(self.prompt) or 1 if self.prompt_embeds is None else self.prompt_embeds.shape[0]

    @property
    def batch(self) -> int:
        """B, the number of images."""
        return self.prompts * self.num_images_per_prompt

    @property
    def first_step(self) -> int:
        """The first step that runs; an image to start from skips those before it."""
        return first_step(self.num_inference_steps, self.strength) if self.inputs.canvas else 0

    @property
    def second_steps(self) -> int:
        """Number of steps of the second pass, whether it runs or the run stops before it; 0: there is none."""
        return self.num_inference_steps - first_step(self.num_inference_steps, self.strength) if self.large else 0

    @property
    def first_steps(self) -> int:
        """Number of steps of the first pass; 0: an image is enlarged."""
        return 0 if self.large and not self.large.has_first else self.num_inference_steps - self.first_step

    @property
    def total_steps(self) -> int:
        """Number of steps of both passes."""
        return self.first_steps + self.second_steps

    @property
    def enlarges(self) -> bool:
        """True where the second pass runs."""
        return self.large is not None and self.stop_after is None

    @property
    def second_evaluations(self) -> int:
        """Number of those of the second pass."""
        return count_evaluations(self.solver, self.second_steps) if self.enlarges else 0

    @property
    def evaluations(self) -> int:
        """Expected number of full evaluations of the transformer for a picture; with first-block, the most."""
        steps = range(self.first_steps)
        computed = skip_steps(len(steps)) if self.cache and self.cache.name == "skip" else steps
        second = range(len(steps), len(steps) + self.second_steps)
        return self.evaluations_in([step for step in (*computed, *second) if step < (self.stop_after or second.stop)])

    def evaluations_in(self, computed: Sequence[int]) -> int:
        """Returns the number of full evaluations for a picture whose computed steps, of both passes, are known."""
        first = sum(step < self.first_steps for step in computed)
        ends = self.stop_after is None
        counts = (count_evaluations(self.solver, count, to_end=ends) for count in (first, len(computed) - first))
        return sum(counts)

    @property
    def true_cfg(self) -> bool:
        """True where a negative prompt takes part."""
        return self.true_cfg_scale > 1

    @property
    def seeds(self) -> tuple[int, ...]:
        """One seed for the batch, or one for each image; none where latents are given."""
        return () if self.seed is None else (self.seed,) if isinstance(self.seed, int) else self.seed

    @property
    def image(self) -> Image.Image | None:
        """The image that is started from, repainted or read, upright RGB."""
        return self.inputs.given.get("image")

    def input_files(self) -> dict[str, Any]:
        """Returns path and state of the file of each input image, by its name in the record; None: it has none."""
        images = dict(self.inputs.given)
        images |= {f"style_{i}": image for i, image in enumerate(self.style.images if self.style else (), 1)}
        return {name: image.info.get("file") for name, image in images.items()}

    @property
    def picture_size(self) -> tuple[int, int]:
        """Width and height of a finished picture: of the image that a generated part comes back into, or its own."""
        size = self.large.size if self.large and self.enlarges else (self.width, self.height)
        return self.inputs.picture_size(*size)

    @property
    def _is_pasted(self) -> bool:
        return self.inputs.picture_size(self.width, self.height) != (self.width, self.height)

    def pairs(self, negative: bool = False) -> list[tuple[str, str]]:
        """Returns (text for CLIP, text for T5) of each prompt, or of each negative one; none where embeds are given."""
        texts, texts_2 = (self.negative_prompt, self.negative_prompt_2) if negative else (self.prompt, self.prompt_2)
        return list(zip(texts, texts_2 or texts, strict=True))

    def texts(self) -> list[str]:
        """Returns every text that the encoders read, each once."""
        return list(dict.fromkeys(text for name in _TEXTS for text in getattr(self, name)))

    def record(self, i: int) -> dict:
        """Returns everything in this request that decides picture i, as JSON."""
        one_stream = isinstance(self.seed, int)
        prompt = i // self.num_images_per_prompt
        record = {name: texts[prompt] for name in _TEXTS if (texts := getattr(self, name))}
        record |= {
            "true_cfg_scale": self.true_cfg_scale if self.true_cfg else None,
            "width": self.width,
            "height": self.height,
            "pasted_size": list(self.picture_size) if self._is_pasted else None,
            "num_inference_steps": self.num_inference_steps,
            "sigmas": list(self.sigmas) or None,
            "levels": self.schedule,  # its name here: "schedule" is the model's
            "solver": None if self.solver == presets.SOLVERS[0] else self.solver,
            "cache": self.cache and str(self.cache),
            "fast": True if self.fast else None,
            "stop_after": self.stop_after,
            "guidance_scale": self.guidance_scale,
            "seed": self.seeds[0 if one_stream else i] if self.seeds else None,
            "noise": self.noise,
            "batch": [i, self.batch] if one_stream and self.batch > 1 else None,  # place among the images of one stream
            "strength": self.strength if self.inputs.canvas or self.enlarges else None,
            "max_sequence_length": self.max_sequence_length,
            "watermark": True if self.watermark else None,
            "given": [name for name in ("latents", *_EMBEDS) if getattr(self, name) is not None] or None,
        }
        if self.large and self.enlarges:
            record |= {"upscale": self.large.factor, "upscaled_size": list(self.large.size)}
            record["upscale_steps"] = self.second_steps
        if self.style is not None:
            record["style"] = self.style.record()
        record |= self.inputs.record()
        if self.inputs.canvas and i and not one_stream and find_recipe(self.noise).posterior == "sample":
            record["image_seed"] = self.seeds[0]  # of the stream that sampled the image, before its noise
        return {name: value for name, value in record.items() if value is not None}


@dataclass(frozen=True, repr=False)
class Result:
    """Released pictures, and a report of the call that made them."""

    # list[Picture]; for "np" one (B, H, W, 3) float array in [0, 1]; for "latent" packed latents (B, L, 64). Any, since
    # the caller who chose the output type knows which.
    images: Any
    outcomes: tuple[str, ...]  # of each generated image: "released", "waiting", or "withheld: " and why
    seeds: tuple[int, ...]  # one for the batch or one for each image; none where latents were given
    notes: tuple[str, ...] = ()  # for the user: sizes changed, text cut off
    records: tuple[dict, ...] = ()  # of each image: everything that decides it
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage
    plan: MemoryPlan | None = None  # expected memory, in bytes
    peaks: dict[str, int] = field(default_factory=dict)  # measured memory of each stage, in bytes
    control_image: Image.Image | None = None  # the map that was made of a photo, where `control` asks for one
    # Of each image, the steps (from 0) that the transformer computed in full; with true CFG, for either prompt.
    steps_computed: tuple[tuple[int, ...], ...] = ()

    def __repr__(self) -> str:
        count = len(self.images)
        size = (
            f" of {self.images[0].width} x {self.images[0].height}" if count and isinstance(self.images, list) else ""
        )
        shown = list(dict.fromkeys(self.outcomes))
        facts = {"outcomes": shown, "seeds": list(self.seeds), "seconds": round(sum(self.seconds.values()), 1)}
        return short_repr("Result", **{"images": _Words(f"{count}{size}"), **facts})

    def __getitem__(self, key: str | int) -> Any:
        """Returns a field by its name, or the images for 0, as a result of diffusers does."""
        return (self.images,)[key] if isinstance(key, int) else vars(self)[key]


class _Words(str):
    """Text that a repr shows without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _given_only(request: "Request | ResolvedRequest") -> str:
    """Returns one line about a request with the fields that say something."""
    facts = {f.name: value for f in fields(request) if (value := getattr(request, f.name)) is not f.default}
    return short_repr(type(request).__name__, **{name: v for name, v in facts.items() if v is not None and v != ()})


def _rounded(side: float, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)


def _nearest_size(width: float, height: float, multiple: int) -> tuple[int, int]:
    """Returns the multiples near a size that change its shape least, and then its area."""
    sides = [sorted({_floored(side, multiple), _floored(side + multiple, multiple)}) for side in (width, height)]

    def change(size: tuple[int, int]) -> float:
        wider, higher = math.log(size[0] / width), math.log(size[1] / height)
        return 2 * abs(wider - higher) + abs(wider + higher)

    return min(itertools.product(sides[0], sides[1]), key=change)


def _floored(side: float, multiple: int) -> int:
    return max(multiple, int(side) // multiple * multiple)


def _size_of_image(
    size: tuple[int, int], index: ModelIndex, multiple: int, *, says: bool
) -> tuple[int, int, tuple[str, ...]]:
    """Returns the size of a picture that starts from an image, and a note where it is another than the image's.

    It is the image's own where the model draws well at that area, else its shape at the model's own area.

    Args:
        size: width and height of the image, or of the part of it that is generated.
        index: the model.
        multiple: of both sides.
        says: makes the note.

    Raises:
        UsageError: so long or so high that no size fits.
    """
    own, pixels = index.defaults.width * index.defaults.height, size[0] * size[1]
    fits = presets.GOOD_AREAS[0] <= pixels / own <= presets.GOOD_AREAS[1]
    scale = 1.0 if fits else math.sqrt(own / pixels)
    width, height = _nearest_size(size[0] * scale, size[1] * scale, multiple)
    found = f"the image is {size[0]} x {size[1]}"
    if max(width, height) > MAX_SIDE or min(size) * scale < multiple / 2:
        expected = f"sides from {multiple} to {MAX_SIDE} pixels at the model's area"
        raise UsageError(found, expected, "set `width` and `height`")
    if (width, height) == size or not says:
        return width, height, ()
    made_for = f"this model was made for {index.defaults.width} x {index.defaults.height}"
    reason = f"sides are multiples of {multiple}" if fits else made_for
    return width, height, (f"{found}, the picture {width} x {height}: {reason}",)


def random_seed() -> int:
    """Chooses a seed: 32 bits, all that torch's generator takes."""
    return secrets.randbelow(2**32)


def check_values(name: str, array: mx.array) -> None:
    """Checks an array that the user gave.

    Raises:
        UsageError: not of floating point, or NaN or infinities among the values.
    """
    if not mx.issubdtype(array.dtype, mx.floating):
        raise UsageError(f"{name} holds {array.dtype}", "numbers of a floating-point type")
    if not mx.isfinite(array).all().item():
        raise UsageError(f"{name} holds NaN or infinities", "finite numbers")


def _as_python(value):
    """Converts numbers of any library to Python's and sequences to tuples; leaves other values as they are."""
    if isinstance(value, np.ndarray | mx.array):
        value = value.tolist()
    if isinstance(value, str | bytes | bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return tuple(map(_as_python, value)) if isinstance(value, Sequence) else value


def as_array(found: str, value: Any) -> mx.array:
    """Converts arrays of any library to MLX's, evaluated: a lazy one belongs to the caller's thread.

    Args:
        found: start of the error's sentence, "`latents` is".
        value: the array.

    Raises:
        UsageError: not an array.
    """
    try:
        if isinstance(value, str | bytes | numbers.Number):
            raise TypeError
        array = value if isinstance(value, mx.array) else mx.array(value)
        mx.eval(array)
    except Exception:  # of any class, from the library that made the value
        raise UsageError(f"{found} {type(value).__name__}, which is no array", "an array of mlx or numpy") from None
    return array


def check_text(name: str, text: str) -> None:
    """Checks a prompt before anything reads it.

    Raises:
        UsageError: it is longer than `MAX_PROMPT`, or not valid UTF-8.
    """
    try:
        count = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        todo = "check the terminal's or the file's encoding"
        raise UsageError(f"`{name}` is not valid UTF-8", "text", todo) from None
    if count > MAX_PROMPT:
        raise UsageError(f"`{name}` has {count} bytes", f"{MAX_PROMPT} at most", "make it shorter")


def check_adapters(adapters: Any) -> None:
    """Checks names and weights of adapters.

    Raises:
        UsageError: not pairs of a name and a finite number, or a name twice.
    """
    for pair in adapters or ():
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            raise UsageError(f"`adapters` holds {reprlib.repr(pair)}", "pairs of a name and a weight")
        _check_float("adapters", pair[1], low=-MAX_WEIGHT, high=MAX_WEIGHT, part="a weight of ")
    names = [name for name, _ in adapters or ()]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"the adapter {twice} is given twice", "each once, with one weight")


def _check_texts(name: str, texts) -> None:
    if texts is None:
        return
    if not isinstance(texts, str | tuple):
        raise UsageError(f"`{name}` is {type(texts).__name__}", "a text or a list of texts")
    if texts == ():
        raise UsageError(f"`{name}` is an empty list", "at least one text")
    for text in (texts,) if isinstance(texts, str) else texts:
        if not isinstance(text, str):
            raise UsageError(f"`{name}` holds {type(text).__name__}", "texts")
        check_text(name, text)


def _check_int(name: str, value, *, low: int, high: int, part: str = "") -> None:
    if value is not None and (type(value) is not int or not low <= value <= high):
        raise UsageError(f"{part}`{name}` is {reprlib.repr(value)}", f"a whole number from {low} to {high}")


def _check_float(name: str, value, *, low: float, high: float, part: str = "") -> None:
    if value is not None and (type(value) not in (int, float) or not low <= value <= high):
        raise UsageError(f"{part}`{name}` is {reprlib.repr(value)}", f"a number from {low:g} to {high:g}")
