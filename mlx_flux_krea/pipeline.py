"""FluxPipeline: a request, through the gate to the generator, and its pictures through the gate back.

All computing happens in the worker's thread; callers may be any thread.
"""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import compat
from .adapters.loaded import AdapterMethods, LoadedAdapters, Weights, has_tags, take_tags
from .checkpoint import Checkpoint
from .credentials import watermark as watermarks
from .errors import ResourceError, UsageError, short_repr
from .files import sha256_if_exists
from .filters.acknowledgement import check_acknowledged
from .filters.duty import check_free, check_reviewable, show_checked
from .filters.gate import Gate, OpenGate, Policy, open_gate
from .filters.judges import needed_bytes
from .generator import Generator, Observers, Progress
from .home import find_model
from .inputs import style as styles
from .inputs.maps import depth_sha256, open_depth
from .memory import (
    MemoryPlan,
    WeightSizes,
    parse_memory,
    physical_memory,
    weigh_folder,
)
from .models.config import to_json
from .models.transformer import Flux
from .models.vae import VAE
from .planning import Planner
from .presets import SOLVERS
from .progress import ProgressBars, check_options
from .provenance import SOFTWARE
from .request import Request, ResolvedRequest, Result, as_array, check_values
from .second import as_begun
from .weights import DTYPES, ComponentFolder, ModelFolder, open_model
from .worker import Worker

__all__ = ["FluxPipeline", "Request", "ResolvedRequest", "Result"]

logger = logging.getLogger("mlx_flux_krea")

_LOGGED = ("mlx", "model", "base", "manifest_sha256", "dtype", "quantization")  # of a picture's record, in the log


N = TypeVar("N", bound=nn.Module)


class FluxPipeline(AdapterMethods, compat.DiffusersMethods):
    """Text to image and image to image with one model folder. Names are those of diffusers.

    Example:
        The small model that comes with the package draws coloured shapes, in a second or two:

            from mlx_flux_krea import FluxPipeline

            pipe = FluxPipeline.from_pretrained("nano")
            result = pipe("a red circle on a blue background", seed=7)
            result.images[0].save("circle.png")

        An installed model is opened by its name, its folder, or the hub id that it was converted from:

            pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-Krea-dev", memory="8GB")

    Attributes:
        folder: the model folder that was opened: its JSON, read and checked.
        dtype: the compute type, MLX's name of it.
        memory: bytes that a run may use; None: as many as the machine offers when it begins.
    """

    def __init__(
        self,
        folder: ModelFolder | None = None,
        dtype: str | None = None,
        memory: int | None = None,
        policy: Policy | None = None,
        **others: Any,
    ):
        if others or not isinstance(folder, ModelFolder):
            given = next(iter(others.values()), None) if folder is None else folder
            shown = repr(str(given)) if isinstance(given, str | os.PathLike) else '"path or name"'
            found = f"{type(self).__name__}() opens no model"
            raise UsageError(found, "an open model folder", f"write {type(self).__name__}.from_pretrained({shown})")
        dtype = dtype or folder.flux.dtype
        self.dtype = dtype
        self.memory = memory
        self._policy = policy
        self._dtype: mx.Dtype = getattr(mx, dtype)
        self._worker = Worker()
        self._generator = Generator(folder, self._dtype, self._worker)
        self._loaded = LoadedAdapters(folder.sizes)
        self._requires_filters = folder.requires_filters  # decided once, from the folder that was opened
        self._redux: ComponentFolder | None = None
        self._depth: ComponentFolder | None = None
        self._weights: WeightSizes | None = None
        self._margins: dict[tuple, float] = {}  # the filter's answers about texts
        self._bar_options: dict[str, Any] = {}  # of `set_progress_bar_config`

    def __repr__(self) -> str:
        checks = self.policy.check if self.policy else "none"
        facts = {"dtype": self.dtype, "memory": self.memory or "auto", "check": checks}
        return short_repr(type(self).__name__, str(self.folder.path), **facts)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike | None = None,
        *,
        dtype: str | mx.Dtype | None = None,
        memory: str | int = "auto",
        check: str | None = None,
        nsfw_threshold: float | None = None,
        integrity_margin: float | None = None,
        torch_dtype: Any = None,
        **others: Any,
    ) -> "FluxPipeline":
        """Opens a model folder. Only its JSON is read; weights follow when they are needed.

        Args:
            model: a folder made by `flux-krea convert`, the name of an installed one, or the hub id that one was
                converted from; None: the only one.
            dtype: the compute type: "bfloat16", "float32", or "float16" (experimental), or a type of that name; None:
                the folder's.
            memory: memory that a run may use, such as "8GB"; weights beyond it are read from disk in every step.
                "auto": as much as the machine offers, and no more than saves time where the disk's speed is known.
            check: "filters", "review" (pictures wait for `flux-krea review`) or "both"; None: "filters", and
                nothing for a model whose licence asks for nothing.
            nsfw_threshold: a picture passes below this probability; at most 0.85.
            integrity_margin: minimum margin by which the filter must clear a prompt or a picture; at least 0.
            torch_dtype: diffusers' name of `dtype`.
            others: further arguments of diffusers (`compat.LOADING`), accepted with a log line or refused.

        Raises:
            ModelError: not a model folder, or a damaged one.
            UsageError: a type, an amount of memory or a check that does not exist; a threshold that lets more pass.
        """
        if "pretrained_model_name_or_path" in others and model is None:
            model = others.pop("pretrained_model_name_or_path")
        compat.take_known(cls.from_pretrained, others, compat.LOADING)
        chosen = chosen_dtype(dtype, torch_dtype)
        folder = open_model(find_model(model))
        dtype = chosen or folder.flux.dtype
        has_threshold = nsfw_threshold is not None or integrity_margin is not None
        if has_threshold and check is None and not folder.requires_filters:
            raise UsageError(
                "a threshold does nothing: this model requires no filters", "", 'ask for them with `check` "filters"'
            )
        policy = None
        if has_threshold or check is not None:
            policy = Policy()
            policy = Policy(
                check=policy.check if check is None else check,
                nsfw=policy.nsfw if nsfw_threshold is None else nsfw_threshold,
                integrity=policy.integrity if integrity_margin is None else integrity_margin,
            )
        budget = parse_memory(memory)
        if budget and budget > (built_in := physical_memory()):
            logger.warning("`memory` %s is more than this machine has, %.1f GB", memory, built_in / 1e9)
        return cls(folder, dtype, budget, policy)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        true_cfg_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        schedule: str | None = None,
        solver: str = SOLVERS[0],
        cache: str | None = None,
        fast: bool = False,
        stop_after: int | None = None,
        upscale: float | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        noise: str = "diffusers",
        latents: mx.array | None = None,
        prompt_embeds: mx.array | None = None,
        pooled_prompt_embeds: mx.array | None = None,
        negative_prompt_embeds: mx.array | None = None,
        negative_pooled_prompt_embeds: mx.array | None = None,
        image: Any = None,
        strength: float | None = None,
        style_images: Any = None,
        style_weights: float | Sequence[float] | None = None,
        style_rule: str | None = None,
        mask_image: Any = None,
        expand: Any = None,
        padding_mask_crop: int | None = None,
        soft_mask: bool = False,
        paste: bool = True,
        control_image: Any = None,
        control: str | None = None,
        fit: str | None = None,
        auto_resize: bool = True,
        watermark: bool = False,
        output_type: str = "pil",
        callback_on_step_end: Callable | None = None,
        max_sequence_length: int | None = None,
        progress: Progress | bool | None = None,
        preview: Callable | None = None,
        checkpoint: Checkpoint | None = None,
        generator: Any = None,
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        **others: Any,
    ) -> Result:
        """Makes pictures. Arguments are named as in diffusers; defaults come from the model folder.

        Args:
            prompt: a text, or a list of them.
            prompt_2: text for T5, where it differs from the one for CLIP; an empty one is `prompt`, as in diffusers.
            negative_prompt: text that the picture should move away from; needs `true_cfg_scale` above 1.
            negative_prompt_2: the same for T5.
            true_cfg_scale: negative + scale * (positive - negative) in every step, at double cost; None: the model's,
                which is 1 (off) with a guidance embedding.
            height: pixels, floored to a multiple of 16.
            width: pixels, floored to a multiple of 16. With `image` and no size: its shape at the default's area.
            num_inference_steps: n.
            sigmas: n falling noise levels in (0, 1], before the shift, instead of evenly spaced ones.
            schedule: "beta" or "simple": ComfyUI's noise levels of that name, at the model's shift.
            solver: "euler", "dpmpp_2m" (second order, no further evaluations), or "heun" (two evaluations a step).
            cache: "skip" computes the first 4 steps, then every second and the last; "first-block:0.08" all those in
                which the first block's change differs by more than 0.08 from the last computed step, and
                "first-block:0.08:1" extrapolates the others (`sampling/caches.py`).
            fast: "skip", or the mode that `flux-krea bench --fast` has chosen for the model, unless the model was made
                for few steps, or fewer than 12 run.
            stop_after: ends the run after so many steps, with the picture that the last one predicts, to choose among
                seeds early. With a `checkpoint`, the same call without it computes the remaining steps.
            upscale: 1 to 4, such as 1.5, 2 or 4: enlarges the picture, or `image`, so many times in a second pass,
                whose share of the schedule is `strength` (docs/large.md).
            guidance_scale: of the guidance that was distilled into the model; 0 for one without, such as [schnell].
            num_images_per_prompt: pictures of each prompt, in the order of the prompts.
            seed: an int: one stream draws the whole batch, as a diffusers generator does; a list: one stream for each
                image; None: chosen, and reported in the result.
            noise: the tool whose seeds to reproduce, a row of `presets.RECIPES`.
            latents: (B, L, 64) packed, to start from instead of a seed.
            prompt_embeds: (P, S, context_in_dim) from `encode_prompt`, instead of texts.
            pooled_prompt_embeds: (P, vec_in_dim), with it.
            negative_prompt_embeds: as `prompt_embeds`.
            negative_pooled_prompt_embeds: as `pooled_prompt_embeds`.
            image: an image to start from, to repaint (`mask_image`), to fill (Fill), or to read as a reference
                (Kontext, which takes a list too): a PIL image, a path, or an array (H, W, 3), uint8 or floats in
                [0, 1].
            strength: 0 to 1, the share of the schedule that the image goes through; 0.6 where an image is given, 0.85
                with a mask, 1 where it is filled or expanded; with `upscale`, that of the second pass.
            mask_image: white where the image is repainted; without it, what is transparent in the image is.
            expand: borders to add around the image and to paint: top, right, bottom and left in pixels or percent, such
                as "0,25%,0,25%".
            padding_mask_crop: generates the surroundings of the mask alone, so many pixels around it, at full size.
            soft_mask: values between black and white are repainted for that share of the last steps; else they are
                rounded.
            paste: brings the picture back into the image, whose pixels outside the mask stay as they are, to the bit.
            control_image: a map, such as edges or depth, for a control model or a control adapter.
            control: "canny" or "depth": `control_image` is a photo, and this map of it is made at the size of the
                picture. Depth needs a network: `flux-krea convert depth-anything/Depth-Anything-V2-Small-hf`.
            fit: how an image of another shape is brought to a size: "stretch" (as diffusers does), "crop" or "pad";
                None: "crop" for Kontext's references, "stretch" for others.
            auto_resize: False: Kontext reads references at their own size and not at one of those it was trained with.
            style_images: images whose style, and content, the picture takes up: one or a list. Needs Redux, which
                `flux-krea convert black-forest-labs/FLUX.1-Redux-dev` installs. A `prompt` may be left out.
            style_weights: a number for all of them, or one for each; None: 1.
            style_rule: "grid" (the default: weights from 0 to 1 let the prompt count the more, the lower they are),
                "concat" or "sum" (`inputs/style.py`).
            watermark: adds the invisible watermark of black-forest-labs/flux to the finished picture, which the filters
                then judge; 65,536 pixels or more.
            output_type: "pil", "np" ((B, H, W, 3) float32 in [0, 1]) or "latent" ((B, L, 64) packed).
            callback_on_step_end: called as (pipe, step, timestep, {"latents": ...}) in the worker's thread. If it
                returns {"latents": ...}, arrays of any library, they replace those of the run.
            max_sequence_length: tokens of T5; None: the folder's.
            progress: called as (stage, done, total) after every block or stage, in the worker's thread. None: bars in a
                terminal or a notebook (`set_progress_bar_config`); False: no bars; True: bars anywhere.
            preview: called as (step, steps, pixels) after every step, in the worker's thread: (B, H/8, W/8, 3) uint8,
                an estimate of the finished picture in the colours of `latent_rgb`.
            checkpoint: the file that the run is saved in, and resumed from: `flux-krea resume`.
            generator: diffusers' way to give seeds: a torch.Generator, an int, or a list with one for each image.
            return_dict: False: the result is the tuple (images,).
            joint_attention_kwargs: {"scale": s} multiplies the weights of adapters in this call, as in diffusers.
            others: further arguments of diffusers (`compat.CALL`), accepted with a log line or refused.

        Returns:
            Pictures with their seeds, records and notes.

        Raises:
            UsageError: arguments that cannot be used, or do not go together.
            ModelError: weights missing or damaged.
            FiltersError: filters that the model's licence requires, or their log, are missing or unhealthy; or nobody
                has acknowledged that licence.
            ResourceError: not enough memory for a picture of this size.
            Withheld: a filter flagged a prompt or the input image. For pictures, see `Result.outcomes`.
            Interrupted: `interrupt` was called.
        """
        auto_resize = others.pop("_auto_resize", auto_resize)  # diffusers' name
        compat.take_known(FluxPipeline.__call__, others, compat.CALL)
        request = Request(
            prompt=prompt,
            prompt_2=prompt_2,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            true_cfg_scale=true_cfg_scale,
            width=width,
            height=height,
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            schedule=schedule,
            solver=solver,
            cache=cache,
            fast=fast,
            stop_after=stop_after,
            upscale=upscale,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            seed=compat.given_seed(seed, generator),
            noise=noise,
            latents=latents,
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            image=image,
            strength=strength,
            style_images=style_images,
            style_weights=style_weights,
            style_rule=style_rule,
            mask_image=mask_image,
            expand=expand,
            padding_mask_crop=padding_mask_crop,
            soft_mask=soft_mask,
            paste=paste,
            control_image=control_image,
            control=control,
            fit=fit,
            auto_resize=auto_resize,
            watermark=watermark,
            output_type=output_type,
            max_sequence_length=max_sequence_length,
            adapters=self._with_scale(compat.given_scale(joint_attention_kwargs)),
        )
        result = self.generate(
            request,
            callback_on_step_end=callback_on_step_end,
            progress=progress,
            preview=preview,
            checkpoint=checkpoint,
        )
        images: Any = (result.images,)
        return result if return_dict else images

    def generate(
        self,
        request: Request,
        *,
        callback_on_step_end: Callable | None = None,
        progress: Progress | bool | None = None,
        preview: Callable | None = None,
        checked_preview: Callable | None = None,
        checkpoint: Checkpoint | None = None,
        before_release: Callable[[], None] | None = None,
        meant_for: dict | None = None,
    ) -> Result:
        """Makes the pictures of a request: a call, for those who have its arguments as an object.

        Args:
            request: the arguments of the call.
            callback_on_step_end: as in a call.
            progress: as in a call.
            preview: as in a call.
            checked_preview: called like `preview`, with (1, H, W, 3), at a third and at two thirds of the steps, for a
                model whose pictures both filters check: each such picture passes them first, which takes their time
                twice more and some memory. Without effect for other models, and where a person reviews.
            checkpoint: as in a call.
            before_release: called in the worker's thread right before and right after the gate hands pictures over, for
                callers who handle signals. If it raises, nothing is released.
            meant_for: the file that the pictures are meant for, as JSON, kept with those that wait for review.

        Returns:
            Pictures with their seeds, records and notes.

        Raises:
            FluxKreaError: as a call does.
        """
        if not isinstance(request, Request | ResolvedRequest):
            found = f"`request` is {type(request).__name__}"
            raise UsageError(found, "a Request", "or call the pipeline: pipe(prompt, ...)")
        request = self._without_tags(request)
        self._load_components(request)
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise UsageError(f"`callback_on_step_end` is {type(callback_on_step_end).__name__}", "a function")
        if self.policy:
            check_reviewable(self.policy, request, callback_on_step_end, preview)
        if checkpoint is not None:
            self._take(checkpoint)
        if preview is not None and self.folder.latent_rgb is None:
            raise UsageError("`preview` needs latent_rgb, which this model does not have", "", "leave it out")
        callback = callback_on_step_end and partial(self._call_back, callback_on_step_end)
        observers = Observers(callback, preview, checkpoint)
        checks = self.policy is not None and self.policy.check == "filters" and self.folder.latent_rgb is not None
        bars = None if callable(progress) else self._bars(progress)
        try:
            return self._worker.run(
                self._generate,
                request,
                observers,
                progress=progress if callable(progress) else bars,
                checked_preview=checked_preview if checks else None,
                before_release=before_release,
                meant_for=meant_for or {},
            )
        finally:
            if bars:
                bars.close()

    def set_progress_bar_config(self, **options: Any) -> None:
        """Sets arguments of tqdm for the progress bars of later calls; `disable=True` turns them off.

        Raises:
            TypeError: an argument that tqdm does not have.
        """
        check_options(options)
        self._bar_options = options

    def _bars(self, progress: bool | None) -> ProgressBars | None:
        if not isinstance(progress, bool | None):
            raise UsageError(f"`progress` is {type(progress).__name__}", "a function, True or False")
        options = self._bar_options | ({"disable": False} if progress else {})
        return None if progress is False or options.get("disable") else ProgressBars(options)

    @property
    def folder(self) -> ModelFolder:
        """The model folder that was opened. Another one needs another pipeline."""
        return self._generator.folder

    @property
    def policy(self) -> Policy | None:
        """Checks that pictures must pass; None only where the model's licence asks for nothing."""
        required = self._requires_filters or self.folder.requires_filters or self._loaded.duty(self.folder)
        required = required or (self._redux and styles.adds_duty(self.folder.flux.sizes))
        return self._policy or (Policy() if required else None)

    def load_redux(self) -> ComponentFolder:
        """Opens Redux for this pipeline, as a call with style images does. Its licence adds the duty of filters.

        Raises:
            ModelError: it is not installed, damaged, or does not fit the model.
        """
        self._redux = styles.open_redux(self.folder.flux.sizes)  # each time: it may have been converted again
        return self._redux

    def _load_components(self, *requests: Request | ResolvedRequest) -> None:
        """Opens what these requests need beside the model, before anything is checked or loaded."""
        if any((r.style if isinstance(r, ResolvedRequest) else r.style_images) is not None for r in requests):
            self.load_redux()
        reads_depth = self.folder.index.kind in (None, "depth")  # else `resolve` says what is wrong
        if reads_depth and any(_kind_of_map(r) == "depth" for r in requests):
            self._depth = open_depth()

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        prompt_2: str | Sequence[str] | None = None,
        max_sequence_length: int | None = None,
        lora_scale: float | None = None,
        **others: Any,
    ) -> tuple[mx.array, mx.array]:
        """Encodes P prompts as the transformer reads them.

        Args:
            prompt: a text, or a list of them.
            prompt_2: text for T5, where it differs from the one for CLIP.
            max_sequence_length: tokens of T5; None: the folder's.
            lora_scale: multiplies the weights of adapters.
            others: further arguments of diffusers (`compat.ENCODING`), accepted with a log line or refused.

        Returns:
            T5's states (P, S, context_in_dim) and CLIP's pooled vectors (P, vec_in_dim), in the types the encoders
            compute in.

        Raises:
            UsageError: not texts, or a length that the model does not take.
            ModelError: encoders or tokenizers missing or damaged.
        """
        compat.take_known(FluxPipeline.encode_prompt, others, compat.ENCODING)
        adapters = self._with_scale(lora_scale)
        request = Request(prompt=prompt, prompt_2=prompt_2, max_sequence_length=max_sequence_length, adapters=adapters)
        request = self._without_tags(request)

        def encode() -> tuple[mx.array, mx.array]:
            resolved = self._resolve(request, with_images=False)
            self._generator.check_folder()
            uses = self._loaded.uses(resolved.adapters or ())
            encoded = self._generator.encode(resolved.pairs(), resolved.max_sequence_length, uses)
            embeds = mx.concatenate([prompt.embeds for prompt in encoded])
            pooled = mx.concatenate([prompt.pooled for prompt in encoded])
            mx.eval(embeds, pooled)
            return embeds, pooled

        return self._worker.run(encode)

    @property
    def transformer(self) -> Flux:
        """The transformer with all weights in memory, for any thread. The licence is then the caller's duty."""
        uses = self._loaded.uses(self._loaded.current())
        return _with_methods(self._worker.run(self._generator.whole_flux, uses), compat.NetworkMethods)

    @property
    def vae(self) -> VAE:
        """The autoencoder with all weights in memory, for any thread. The licence is then the caller's duty."""
        return _with_methods(self._worker.run(self._generator.whole_vae), compat.VAEMethods)

    @property
    def scheduler(self) -> SimpleNamespace:
        """The schedule, as scripts for diffusers read it: `config`. A call takes other `sigmas`."""
        return compat.as_scheduler(self.folder.index.schedule)

    def read_ahead(self, requests: Sequence[Request | ResolvedRequest], progress: Progress | None = None) -> None:
        """Judges and encodes the prompts of several requests, so that filters and encoders are loaded once for all.

        The modulations of as many as have room in memory are computed together, too.

        The results are used by the calls that follow. Flagged prompts are not encoded; their calls raise `Withheld`.

        Args:
            requests: requests, of which the last `prompts.CACHED` prompts are remembered.
            progress: as in a call.

        Raises:
            UsageError: a request that cannot be used.
            ModelError: weights missing or damaged.
            FiltersError: filters that the model's licence requires, or their log, are missing or unhealthy; or nobody
                has acknowledged that licence.
        """

        self._load_components(*requests)

        def run() -> None:
            passed = [self._resolve(request) for request in requests]
            with self._generator.reporting(progress):
                check_acknowledged(self.folder)
                if self.policy:
                    texts = [text for request in passed for text in request.texts()]
                    with self._gate(self._record(), texts) as gate:
                        passed = gate.passing(passed) if isinstance(gate, Gate) else passed
                self._generator.check_folder()
                together: dict[tuple[int, Weights], list[tuple[str, str]]] = {}
                for request in passed:
                    key = request.max_sequence_length, request.adapters or ()
                    together.setdefault(key, []).extend(request.pairs() + request.pairs(negative=True))
                for (length, adapters), pairs in together.items():
                    self._generator.encode(pairs, length, self._loaded.uses(adapters))
                alike = [request for request in passed if request.adapters == passed[0].adapters]
                if len(alike) > 1:
                    uses = self._loaded.uses(alike[0].adapters or ())
                    self._generator.read_ahead(alike, self.plan(alike[0]), uses)

        self._worker.run(run)

    def rehearse(
        self, prompt: str, *, progress: Progress | None = None, checkpoint: Checkpoint | None = None, **arguments: Any
    ) -> Result:
        """Generates pictures and throws them away, to measure time and memory: nothing is judged or released.

        Args:
            prompt: a text.
            progress: as in a call.
            checkpoint: as in a call; once the last step is done it holds the latents, which are unreviewed.
            arguments: the fields of a `Request`; `output_type` "latent" decodes nothing.

        Returns:
            A result without pictures.
        """
        if checkpoint is not None:
            self._take(checkpoint)

        def run() -> Result:
            request = self._resolve(Request(prompt=prompt, **arguments))
            self._load_components(request)
            plan = self.plan(request)
            with self._generator.reporting(progress):
                self._generator.check_folder()
                uses = self._loaded.uses(request.adapters or ())
                made = self._generator.generate(
                    request,
                    plan,
                    Observers(checkpoint=checkpoint),
                    uses=uses,
                    redux=self._redux,
                    depth=self._depth,
                )
            facts = {"seconds": made.seconds, "peaks": made.peaks, "steps_computed": made.steps}
            return Result([], (), (), notes=request.notes, plan=plan, **facts)

        return self._worker.run(run)

    def _take(self, checkpoint: Checkpoint) -> None:
        """Checks that this model may continue the run of a checkpoint, and notes its duty there.

        Raises:
            UsageError: an object of another class, which would see latents.
            ModelError: as `check_free`.
        """
        if type(checkpoint) is not Checkpoint:
            raise UsageError(f"`checkpoint` is {type(checkpoint).__name__}", "a Checkpoint")
        if not self.policy:
            check_free(checkpoint, self.folder)
        checkpoint.filters = "required" if self.policy else "none"

    def plan(
        self, request: Request | ResolvedRequest | None = None, *, beside: int = 0, **arguments: Any
    ) -> MemoryPlan:
        """Returns the memory that each stage of a request takes, and how much of the transformer may be resident.

        Args:
            request: the arguments of a call.
            beside: bytes of the memory that something else takes meanwhile.
            arguments: the same, one by one, instead of `request`.

        Raises:
            UsageError: arguments that cannot be used, or do not go together.
            ResourceError: not even the smallest plan fits.
        """
        if (request is None) == (not arguments):
            raise UsageError("a plan needs a request", "a Request, or the arguments of one")
        resolved = self._resolve(Request(**arguments) if request is None else request)
        self._weights = self._weights or weigh_folder(self.folder, self._dtype)
        planner = Planner(
            folder=self.folder,
            weights=self._weights,
            dtype=self._dtype,
            memory=self.memory,
            beside=beside,
            uses=self._loaded.uses(resolved.adapters or ()),
            filtered=self.policy is not None and self.policy.check != "review",
            redux=self._redux,
            depth=self._depth,
        )
        return planner.plan(resolved)

    def interrupt(self) -> None:
        """Stops one call after the block at hand; it raises `Interrupted`. For any thread.

        In a callback it is the call that made the callback; elsewhere the call that runs, and calls inside it. Calls
        that wait are not stopped, unless none runs: then the one that has waited longest is.
        """
        self._worker.interrupt()

    # --- from here on in the worker's thread ---

    def _resolve(self, request: Request | ResolvedRequest, *, with_images: bool = True) -> ResolvedRequest:
        """Returns the request with every default filled in, and the adapters that are set where it names none."""
        adapters = self._loaded.current() if request.adapters is None else tuple(request.adapters)
        has_control = any(adapter.facts.control and weight for adapter, weight in self._loaded.uses(adapters))
        is_given = isinstance(request, Request)
        resolved = (
            request.resolve(self.folder, has_control=has_control, with_images=with_images) if is_given else request
        )
        if has_control and with_images and resolved.inputs.control is None:
            found = "a control adapter is in use, and there is no `control_image`"
            raise UsageError(found, "a map such as edges or depth")
        return replace(resolved, adapters=adapters)

    def _without_tags(self, request: Request) -> Request:
        """Returns the request with the adapters that its prompts name as <lora:NAME:W>, and without these names."""
        texts = {name: text for name in ("prompt", "prompt_2") if (text := getattr(request, name)) is not None}
        listed = {name: (text,) if isinstance(text, str) else text for name, text in texts.items()}
        if not all(isinstance(text, tuple) and all(isinstance(one, str) for one in text) for text in listed.values()):
            return request  # `resolve` says what is wrong
        tags = self._load_tags([*listed.get("prompt", ()), *filter(has_tags, listed.get("prompt_2", ()))])
        if not tags:
            return request
        plain: dict[str, Any] = {name: tuple(take_tags(one)[0] for one in text) for name, text in listed.items()}
        plain = {name: text[0] if isinstance(texts[name], str) else text for name, text in plain.items()}
        adapters = self._loaded.current() if request.adapters is None else tuple(request.adapters)
        return replace(request, adapters=tuple((dict(adapters) | dict(tags)).items()), **plain)

    def _generate(
        self,
        request: Request,
        observers: Observers,
        *,
        progress: Progress | None,
        checked_preview: Callable | None,
        before_release: Callable[[], None] | None,
        meant_for: dict,
    ) -> Result:
        resolved = as_begun(self._resolve(request), observers.checkpoint)
        check_acknowledged(self.folder)
        record, notes = self._record(), list(resolved.notes)
        plan, checked_preview = self._plan_with_checks(resolved, checked_preview, notes)
        if adapters := self._loaded.records(resolved.adapters or ()):
            record |= {"adapters": adapters}
        if resolved.style and self._redux:
            record |= {"redux_sha256": sha256_if_exists(self._redux.path / "manifest.json")}
        if resolved.inputs.kind == "depth":
            record |= {"depth_sha256": depth_sha256()}
        if resolved.enlarges:
            record |= {"upscale_tiles": plan.tiles > 1}
        last = plan.second or plan
        if last.tiled:
            record |= {"tiled": True}
            reason = f"memory is too little to decode {_named(resolved.picture_size)} as a whole"
            notes.append(f"{reason}: it is decoded in tiles, which changes the picture a little")

        def ready() -> None:
            """The last place to stop before pictures are handed over, and the first after it."""
            if before_release:
                before_release()
            self._worker.check()

        with self._generator.reporting(progress), self._gate(record, resolved.texts(), ready) as gate:
            if isinstance(gate, Gate):
                gate.run.meant_for = meant_for
                if checked_preview:
                    observers = replace(observers, preview=partial(show_checked, gate, checked_preview))
            return self._generate_checked(gate, record, resolved, plan=plan, notes=notes, observers=observers)

    def _plan_with_checks(
        self, request: ResolvedRequest, checked_preview: Callable | None, notes: list[str]
    ) -> tuple[MemoryPlan, Callable | None]:
        """Returns the plan of a request, and the preview where memory has room for filters beside the transformer."""
        if checked_preview is None:
            return self.plan(request), None
        try:
            return self.plan(request, beside=needed_bytes()), checked_preview
        except ResourceError:
            notes.append("there is no preview: memory is too small for the filters beside the transformer")
        return self.plan(request), None

    def _gate(
        self, record: dict, texts: Sequence[str], ready: Callable[[], None] = lambda: None
    ) -> AbstractContextManager[Gate | OpenGate]:
        """Returns a gate, for these texts first, whose log names this model by the fields of a picture's record."""
        about = {name: record[name] for name in _LOGGED} | {
            "license": self.folder.index.license,
            "license_sha256": sha256_if_exists(self.folder.path / "LICENSE.md"),
        }
        run = partial(self._generator.runner, "check")
        return open_gate(self.policy, run, self._margins, ready, texts, **about)

    def _generate_checked(
        self,
        gate: Gate | OpenGate,
        record: dict,
        request: ResolvedRequest,
        *,
        plan: MemoryPlan,
        notes: list[str],
        observers: Observers,
    ) -> Result:
        """Runs the generator: prompts and input image pass the gate before it, pictures after it."""
        self._generator.check_folder()
        gate.check_prompts(request.texts())
        inputs = request.inputs.seen(request.width, request.height) if isinstance(gate, Gate) else ()
        style = request.style.images if request.style else ()
        gate.check_inputs(
            [partial(np.asarray, image) for _, image in inputs]
            + [partial(styles.seen, image, self._redux) for image in style]
        )
        notes += gate.notes
        for note in notes:
            logger.warning(note)
        as_floats = request.output_type == "np" and not (
            self.policy or request.watermark
        )  # else from the bytes that are judged
        uses = self._loaded.uses(request.adapters or ())
        made = self._generator.generate(
            request, plan, observers, uses=uses, redux=self._redux, depth=self._depth, as_floats=as_floats
        )
        images: Any = made.images
        if request.watermark:
            images = list(map(watermarks.embed, images))
        records = tuple(
            record | request.record(i) | {"evaluations": request.evaluations_in(steps)}
            for i, steps in enumerate(made.steps)
        )
        outcomes = ("released",) * request.batch
        if request.output_type == "pil" or self.policy:
            outcomes, images = gate.release(images, records)
            for picture in images:
                picture.inputs = request.input_files()
        if request.output_type == "np":
            pixels = [image if as_floats else np.asarray(image, np.float32) / 255 for image in images]
            width, height = request.picture_size
            images = pixels[0][None] if len(pixels) == 1 else np.array(pixels, np.float32).reshape(-1, height, width, 3)
        return Result(
            images,
            outcomes,
            request.seeds,
            notes=(*notes, *made.notes),
            records=records,
            seconds=made.seconds,
            plan=plan,
            peaks=made.peaks,
            control_image=made.control,
            steps_computed=made.steps,
        )

    def _call_back(self, callback: Callable, step: int, sigma: float, latents: mx.array) -> mx.array | None:
        answer = callback(self, step, 1000 * sigma, {"latents": latents})
        self._worker.check()
        if answer is None:
            return None
        if not isinstance(answer, dict) or answer.keys() - {"latents"}:
            found = ", ".join(map(repr, answer)) if isinstance(answer, dict) else type(answer).__name__
            raise UsageError(f"the callback returned {found}", 'None, or a dict with "latents"')
        replaced = as_array("the callback's latents are", answer.get("latents", latents))
        if replaced.shape != latents.shape:
            raise UsageError(f"the callback's latents are {replaced.shape}", f"an array of shape {latents.shape}")
        check_values("the callback's latents", replaced)
        return replaced.astype(latents.dtype)

    def _record(self) -> dict:
        """Returns everything in this pipeline that decides a picture, as JSON. Once a run: it hashes a manifest."""
        return {
            "software": SOFTWARE,
            "mlx": version("mlx"),
            "model": self.folder.index.name,
            "base": self.folder.index.base,
            "license": self.folder.index.license,
            "manifest_sha256": sha256_if_exists(self.folder.path / "manifest.json"),
            "dtype": self.dtype,
            "quantization": {name: str(n.quantization) for name, n in self.folder.networks.items() if n.quantization},
            "schedule": to_json(self.folder.index.schedule),
        }


def _named(size: tuple[int, int]) -> str:
    return "{} x {}".format(*size)


def _kind_of_map(request: Request | ResolvedRequest) -> str | None:
    """Returns the kind of the map that a request has made of a photo, or None."""
    return request.inputs.kind if isinstance(request, ResolvedRequest) else request.control


def chosen_dtype(dtype: Any, torch_dtype: Any) -> str | None:
    """Returns the compute type that a caller named, under either name.

    Raises:
        UsageError: two that differ, or no compute type.
    """
    if torch_dtype is not None:
        compat.tell("torch_dtype", "its name here is `dtype`")
    names = compat.dtype_name("dtype", dtype), compat.dtype_name("torch_dtype", torch_dtype)
    if None not in names and names[0] != names[1]:
        raise UsageError(f"`dtype` is {names[0]} and `torch_dtype` {names[1]}", "one of them")
    for argument, name in zip(("dtype", "torch_dtype"), names, strict=True):
        if name is not None and name not in DTYPES:
            raise UsageError(f"`{argument}` is {name!r}", f"one of {', '.join(DTYPES)}")
    return names[0] or names[1]


def _with_methods(network: N, methods: type) -> N:
    """Gives a network the methods that scripts for diffusers call on it."""
    if not isinstance(network, methods):
        own: type = type(network)
        both: Any = type(own.__name__, (own, methods), {})
        network.__class__ = both
    return network
