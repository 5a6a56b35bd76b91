"""FluxPipeline: what a caller asks for, through the gate to the painter, and through the gate back.

All computing happens in the engine's thread; callers may be any thread.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version

import mlx.core as mx
import numpy as np
from PIL import Image

from .checkpoint import Checkpoint
from .errors import UsageError
from .files import sha256_if_exists
from .filters.acknowledgement import check_acknowledged
from .filters.gate import Policy, open_gate
from .generator import Painter, Progress, Watched
from .home import find_model
from .memory import Plan, Weights, parse_memory, weigh_folder
from .memory import plan as make_plan
from .models.config import to_json
from .models.transformer import Flux
from .models.vae import VAE, pixels_from_image, pixels_to_bytes
from .provenance import SOFTWARE
from .request import Request, Result, check_values, open_image
from .weights import DTYPES, ModelFolder, open_model
from .worker import Engine

__all__ = ["FluxPipeline", "Request", "Result"]

logger = logging.getLogger("mlx_flux_krea")

_LOGGED = ("mlx", "model", "base", "manifest_sha256", "dtype", "quantization")  # of a picture's record, in the log


class FluxPipeline:
    """Text to image and image to image with one model folder.

    Attributes:
        folder: what was read of the model folder.
        dtype: the compute type, MLX's name of it.
        memory: bytes that a run may use; None: what the machine offers when it begins.
        before_release: called in the engine's thread before and after pictures are handed over, for callers who handle
            signals; what it raises stops that.
    """

    def __init__(self, folder: ModelFolder, dtype: str, memory: int | None = None, policy: Policy | None = None):
        self.folder = folder
        self.dtype = dtype
        self.memory = memory
        self.before_release: Callable[[], None] = lambda: None
        self._policy = policy
        self._dtype: mx.Dtype = getattr(mx, dtype)
        self._engine = Engine()
        self._painter = Painter(folder, self._dtype, self._engine)
        self._weights: Weights | None = None
        self._margins: dict[tuple, float] = {}  # what the filter said of texts

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike | None = None,
        *,
        dtype: str | None = None,
        memory: str | int = "auto",
        check: str | None = None,
        nsfw_threshold: float | None = None,
        integrity_margin: float | None = None,
    ) -> "FluxPipeline":
        """Opens a model folder. Only its JSON is read; weights follow when they are needed.

        Args:
            model: a folder made by `flux-krea convert`, or the name of an installed one; None: the only one.
            dtype: the compute type: "bfloat16", "float32", or "float16" (experimental); None: the folder's.
            memory: what a run may use, such as "8GB"; what does not fit is read from disk in every step. "auto": what
                the machine offers.
            check: "filters", "review" (pictures wait for `flux-krea review`) or "both"; None: "filters", and
                nothing for a model whose licence asks for nothing.
            nsfw_threshold: a picture passes below this probability; 0.85, or less.
            integrity_margin: how clear the filter's no must be; 0, or more.

        Raises:
            ModelError: not a model folder, or a damaged one.
            UsageError: a type, an amount of memory or a check that does not exist; a threshold that lets more pass.
        """
        folder = open_model(find_model(model))
        dtype = dtype or folder.flux.dtype
        if dtype not in DTYPES:
            raise UsageError(f'no type is called "{dtype}"', f"one of {', '.join(DTYPES)}")
        thresholds = {"nsfw": nsfw_threshold, "integrity": integrity_margin}
        strict = {name: value for name, value in ({"check": check} | thresholds).items() if value is not None}
        if strict and check is None and not folder.requires_filters:
            raise UsageError("a threshold does nothing: this model requires no filters", "", 'ask for them: "filters"')
        return cls(folder, dtype, parse_memory(memory), Policy(**strict) if strict else None)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        true_cfg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        noise: str = "diffusers",
        latents: mx.array | None = None,
        prompt_embeds: mx.array | None = None,
        pooled_prompt_embeds: mx.array | None = None,
        negative_prompt_embeds: mx.array | None = None,
        negative_pooled_prompt_embeds: mx.array | None = None,
        image: Image.Image | str | os.PathLike | None = None,
        strength: float | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable | None = None,
        max_sequence_length: int | None = None,
        progress: Progress | None = None,
        preview: Callable | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Result:
        """Makes pictures. Arguments are diffusers' where it has them; defaults come from the folder.

        Args:
            prompt: a text, or a list of them.
            prompt_2: what T5 reads, where it differs from what CLIP reads.
            negative_prompt: what the picture should move away from; needs `true_cfg_scale` above 1.
            negative_prompt_2: the same for T5.
            true_cfg_scale: negative + scale * (positive - negative) in every step, at double cost.
            height: pixels, floored to a multiple of 16.
            width: pixels, floored to a multiple of 16. With `image` and no size: its shape at the default's area.
            num_inference_steps: n.
            sigmas: n falling noise levels of one's own in (0, 1], before the shift.
            guidance_scale: of the guidance that was distilled into the model.
            num_images_per_prompt: pictures of each prompt, in the order of the prompts.
            seed: an int: one stream draws the whole batch, as a diffusers generator does; a list: one stream for each
                image; None: chosen, and reported in the result.
            noise: whose stream a seed means, a row of `presets.RECIPES`.
            latents: (B, L, 64) packed, to start from instead of a seed.
            prompt_embeds: (P, S, context_in_dim) from `encode_prompt`, instead of texts.
            pooled_prompt_embeds: (P, vec_in_dim), with it.
            negative_prompt_embeds: as `prompt_embeds`.
            negative_pooled_prompt_embeds: as `pooled_prompt_embeds`.
            image: an image to start from, or its path.
            strength: 0 to 1, how much of the schedule the image goes through; 0.6 where an image is given.
            output_type: "pil", "np" ((B, H, W, 3) float32 in [0, 1]) or "latent" ((B, L, 64) packed).
            callback_on_step_end: called as (pipe, step, timestep, {"latents": ...}) in the engine's thread; where it
                returns {"latents": ...}, they are replaced.
            max_sequence_length: tokens of T5; None: the folder's.
            progress: called as (stage, done, total) after every piece, in the engine's thread.
            preview: called as (step, steps, pixels) after every step, in the engine's thread: (B, H/8, W/8, 3) uint8 of
                the picture that it heads for, in the colours of `latent_rgb`.
            checkpoint: where the run is kept, and from where it goes on: `flux-krea resume`.

        Returns:
            Pictures with their seeds, records and notes.

        Raises:
            UsageError: arguments that cannot be used, or do not go together.
            ModelError: weights missing or damaged.
            FiltersError: filters that the model's licence requires, or their log, are missing or unhealthy; or nobody
                has acknowledged that licence.
            ResourceError: not enough memory for a picture of this size.
            Withheld: a filter flagged a prompt or the input image. Of pictures, `Result.outcomes` says it.
            Interrupted: `interrupt` was called.
        """
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise UsageError(f"callback_on_step_end is {type(callback_on_step_end).__name__}", "a function")
        if checkpoint is not None and type(checkpoint) is not Checkpoint:  # whatever else sees latents
            raise UsageError(f"checkpoint is {type(checkpoint).__name__}", "a Checkpoint")
        request = Request(
            prompt=prompt,
            prompt_2=prompt_2,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            true_cfg_scale=true_cfg_scale,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            seed=seed,
            noise=noise,
            latents=latents,
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            image=open_image(image),
            strength=strength,
            output_type=output_type,
            max_sequence_length=max_sequence_length,
        )
        if self.policy:
            _check_reviewable(self.policy, request, callback_on_step_end, preview)
        if preview is not None and self.folder.latent_rgb is None:
            raise UsageError("a preview needs latent_rgb, of which this model says nothing", "", "leave it out")
        callback = callback_on_step_end and partial(self._call_back, callback_on_step_end)
        watched = Watched(callback, preview, checkpoint)
        return self._engine.run(self._generate, request, watched, progress)

    @property
    def policy(self) -> Policy | None:
        """What pictures must pass; None only where the model's licence asks for nothing."""
        return self._policy or (Policy() if self.folder.requires_filters else None)

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        prompt_2: str | Sequence[str] | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[mx.array, mx.array]:
        """What the transformer reads of P prompts.

        Returns:
            T5's states (P, S, context_in_dim) and CLIP's pooled vectors (P, vec_in_dim), in the types the encoders
            compute in.

        Raises:
            UsageError: not texts, or a length that the model does not take.
            ModelError: encoders or tokenizers missing or damaged.
        """
        request = Request(prompt=prompt, prompt_2=prompt_2, max_sequence_length=max_sequence_length)

        def encode() -> tuple[mx.array, mx.array]:
            resolved, _ = self._resolve(request)
            self._painter.check_folder()
            encoded = self._painter.encode(resolved.pairs(), resolved.max_sequence_length)
            embeds, pooled = (
                mx.concatenate(arrays) for arrays in zip(*((e.embeds, e.pooled) for e in encoded), strict=True)
            )
            mx.eval(embeds, pooled)
            return embeds, pooled

        return self._engine.run(encode)

    @property
    def transformer(self) -> Flux:
        """The transformer with all weights in memory, for any thread. What is drawn with it is the caller's duty."""
        return self._engine.run(self._painter.resident, "transformer")

    @property
    def vae(self) -> VAE:
        """The autoencoder with all weights in memory, for any thread. What is drawn with it is the caller's duty."""
        return self._engine.run(self._painter.resident, "vae")

    def read_ahead(self, requests: Sequence[Request], progress: Progress | None = None) -> None:
        """Judges and encodes the prompts of several pictures, so that filters and encoders are read once for them.

        What it found is kept for the calls that draw them, which say what was flagged; that is not encoded here.

        Args:
            requests: resolved ones; of more prompts than `prompts.KEPT` the last are kept.
            progress: as in a call.

        Raises:
            ModelError: weights missing or damaged.
            FiltersError: filters that the model's licence requires, or their log, are missing or unhealthy; or nobody
                has acknowledged that licence.
        """

        def run() -> None:
            with self._painter.reporting(progress):
                check_acknowledged(self.folder)
                passed = list(requests)
                if self.policy:
                    with self._gate(self._record()) as gate:
                        passed = gate.passing(passed)
                self._painter.check_folder()
                lengths: dict[int, list] = {}
                for request in passed:
                    pairs = request.pairs() + request.pairs(negative=True)
                    lengths.setdefault(request.max_sequence_length, []).extend(pairs)
                for length, pairs in lengths.items():
                    self._painter.encode(pairs, length)

        self._engine.run(run)

    def rehearse(self, prompt: str, *, progress: Progress | None = None, **request) -> Result:
        """Draws and throws away: what a run takes of time and memory, with nothing to be judged or released.

        Args:
            prompt: a text.
            progress: as in a call.
            request: other arguments of a call.

        Returns:
            A result without pictures.
        """

        def run() -> Result:
            resolved, notes = self._resolve(Request(prompt=prompt, **request))
            plan = self.plan(resolved)
            with self._painter.reporting(progress):
                self._painter.check_folder()
                _, _, seconds, peaks = self._painter.draw(resolved, plan, Watched())
            return Result([], (), (), tuple(notes), (), seconds, plan, peaks)

        return self._engine.run(run)

    def plan(self, request: Request) -> Plan:
        """What a resolved request takes, and how much of the transformer may stay in memory.

        Raises:
            ResourceError: not even the smallest plan fits.
        """
        self._weights = self._weights or weigh_folder(self.folder, self._dtype)
        conditions = request.prompts * (2 if request.true_cfg else 1)
        return make_plan(
            self._weights, self.folder.sizes, self._dtype, request.width, request.height, request.max_sequence_length,
            request.num_inference_steps, conditions, request.image is not None, self.memory,
        )  # fmt: skip

    def interrupt(self) -> None:
        """Stops what runs after the piece at hand; the call that waits for it raises `Interrupted`. For any thread."""
        self._engine.interrupt()

    # --- from here on in the engine's thread ---

    def _generate(self, request: Request, watched: Watched, progress: Progress | None) -> Result:
        request, notes = self._resolve(request)
        check_acknowledged(self.folder)
        plan, record = self.plan(request), self._record()
        if plan.tiled:
            record |= {"tiled": True}
            what = f"{request.width} x {request.height} is developed in tiles, since memory is too little for the whole"
            notes.append(f"{what}: with more of it the picture is a little different")
        with self._painter.reporting(progress), self._gate(record) as gate:
            return self._checked_by(gate, record, request, plan, notes, watched)

    def _gate(self, record: dict) -> contextlib.AbstractContextManager:
        """A gate whose log knows this model, by what a picture's record says of it."""
        about = {name: record[name] for name in _LOGGED} | {
            "license": self.folder.index.license,
            "license_sha256": sha256_if_exists(self.folder.path / "LICENSE.md"),
        }
        return open_gate(self.policy, partial(self._painter.runner, "check"), self._margins, self._ready, **about)

    def _ready(self) -> None:
        """The last place to stop before pictures are handed over, and the first after it."""
        self.before_release()
        self._engine.check()

    def _checked_by(
        self, gate, record: dict, request: Request, plan: Plan, notes: list[str], watched: Watched
    ) -> Result:
        """The run itself: what is asked for, and what comes out, passes the gate."""
        self._painter.check_folder()
        gate.check_prompts(request.texts())
        if request.image is not None:
            gate.check_input(lambda: _seen(request))
        notes += gate.notes
        for note in notes:
            logger.warning(note)
        as_floats = request.output_type == "np" and not self.policy  # else of the bytes that are judged
        conditions, images, seconds, peaks = self._painter.draw(request, plan, watched, as_floats)
        records = tuple(record | request.record(i) for i in range(request.batch))
        outcomes = ("released",) * request.batch
        if request.output_type == "pil" or self.policy:
            outcomes, images = gate.release(images, records)
        if request.output_type == "np":
            pixels = [np.asarray(one, np.float32) / 255 if self.policy else one for one in images]
            images = np.stack(pixels) if pixels else np.empty((0, request.height, request.width, 3), np.float32)
        seeds = request.seed if isinstance(request.seed, tuple) else () if request.seed is None else (request.seed,)
        notes += dict.fromkeys(note for side in conditions for one in side for note in one.cut)
        return Result(images, outcomes, seeds, tuple(notes), records, seconds, plan, peaks)

    def _resolve(self, request: Request) -> tuple[Request, list[str]]:
        """The request with defaults, once it is known to be sound."""
        multiple = 2 * self.folder.vae.sizes.downsampling  # a token is a patch of 2 x 2 latents
        return request.resolved(self.folder.index, self.folder.flux.sizes, multiple)

    def _call_back(self, callback: Callable, step: int, sigma: float, latents: mx.array) -> mx.array | None:
        answer = callback(self, step, 1000 * sigma, {"latents": latents})
        self._engine.check()
        if answer is None:
            return None
        if not isinstance(answer, dict) or answer.keys() - {"latents"}:
            what = ", ".join(map(repr, answer)) if isinstance(answer, dict) else type(answer).__name__
            raise UsageError(f"the callback returned {what}", 'None, or a dict with "latents"')
        replaced = answer.get("latents", latents)
        if not isinstance(replaced, mx.array) or replaced.shape != latents.shape:
            found = getattr(replaced, "shape", type(replaced).__name__)
            raise UsageError(f"the callback's latents are {found}", f"an mlx array of shape {latents.shape}")
        check_values("the callback's latents", replaced)
        return replaced.astype(latents.dtype)

    def _record(self) -> dict:
        """What of this pipeline decides a picture, as JSON. Once a run: it hashes the folder's manifest."""
        return {
            "software": SOFTWARE,
            "mlx": version("mlx"),
            "model": self.folder.index.name,
            "base": self.folder.index.base,
            "manifest_sha256": sha256_if_exists(self.folder.path / "manifest.json"),
            "dtype": self.dtype,
            "quantization": {name: str(n.quantization) for name, n in self.folder.networks.items() if n.quantization},
            "schedule": to_json(self.folder.index.schedule),
        }


def _check_reviewable(policy: Policy, request: Request, callback: Callable | None, preview: Callable | None) -> None:
    """Refuses what would hand out, or let in, what cannot be judged."""
    unjudged = "this model's licence asks for filters or review, and latents are pictures that nobody has judged"
    if request.output_type == "latent":
        raise UsageError('output_type is "latent"', '"pil" or "np"', unjudged)
    if callback is not None:
        raise UsageError("callback_on_step_end is given, which sees latents", "progress, which sees none", unjudged)
    if preview is not None:
        raise UsageError("preview is given, which sees what is being drawn", "progress, which does not", unjudged)
    if policy.check != "review" and (request.prompt_embeds is not None or request.negative_prompt_embeds is not None):
        raise UsageError("a prompt is given as embeds, which no filter can read", "a text")


def _seen(request: Request) -> np.ndarray:
    """The input image as the autoencoder sees it: (H, W, 3) uint8."""
    pixels = pixels_from_image(request.image, request.width, request.height)
    return np.array(pixels_to_bytes(pixels, "round")[0])
