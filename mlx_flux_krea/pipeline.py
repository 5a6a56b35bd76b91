"""FluxPipeline: from a request to pictures, in the order text, input image, modulation, denoising, decoding.

Networks, sampler and noise are functions; this file decides what is evaluated when, what is kept, which seed draws
what, and where a run can be stopped. All of it happens in the engine's thread; callers may be any thread.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from PIL import Image

from . import noise as noises
from . import sampler
from .config import to_json
from .engine import Engine, evaluated
from .errors import ModelError, UsageError
from .filters.gate import Policy, open_gate
from .filters.licence import check_acknowledged
from .plan import GB, Plan, Weights, parse_memory, weigh_folder
from .plan import plan as make_plan
from .prompts import Encoded, PromptEncoder
from .provenance import SOFTWARE
from .request import Request, Result, check_values, open_image
from .residency import Blocks
from .transformer import Flux, rope
from .vae import VAE, pixels_from_image, pixels_to_bytes
from .weights import DTYPES, ModelFolder, find_model, open_model, sha256

__all__ = ["FluxPipeline", "Request", "Result"]

logger = logging.getLogger("mlx_flux_krea")

Progress = Callable[[str, float, int], None]


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
        self._encoder = PromptEncoder(folder, self._dtype, self._engine.check)
        self._networks: dict[str, nn.Module] = {}
        self._weights: Weights | None = None
        self._blocks: Blocks | None = None
        self._modulation: Blocks | None = None  # its layers, apart from the blocks they belong to
        self._modulations: tuple[tuple, list] | None = None  # of the last call, and what they depend on
        self._progress: Progress | None = None
        self._checked = False

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
        dtype = dtype or folder.dtypes["transformer"]
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
            _check_reviewable(self.policy, request, callback_on_step_end)
        return self._engine.run(self._generate, request, callback_on_step_end, progress)

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
            self._check_folder()
            encoded = self._encode(resolved.pairs(), resolved.max_sequence_length)
            embeds, pooled = (
                mx.concatenate(arrays) for arrays in zip(*((e.embeds, e.pooled) for e in encoded), strict=True)
            )
            mx.eval(embeds, pooled)
            return embeds, pooled

        return self._engine.run(encode)

    @property
    def transformer(self) -> Flux:
        """The transformer with all weights in memory, for any thread. What is drawn with it is the caller's duty."""
        return self._engine.run(self._resident, "transformer")

    @property
    def vae(self) -> VAE:
        """The autoencoder with all weights in memory, for any thread. What is drawn with it is the caller's duty."""
        return self._engine.run(self._resident, "vae")

    def interrupt(self) -> None:
        """Stops what runs after the piece at hand; the call that waits for it raises `Interrupted`. For any thread."""
        self._engine.interrupt()

    # --- from here on in the engine's thread ---

    def _generate(self, request: Request, callback: Callable | None, progress: Progress | None) -> Result:
        request, notes = self._resolve(request)
        check_acknowledged(self.folder)
        plan = self.plan(request)
        check = open_gate(self.policy, partial(self._runner, "check"), self._ready, **self._about())
        with self._reporting(progress), check as gate:
            return self._checked_by(gate, request, plan, notes, callback)

    def _ready(self) -> None:
        """The last place to stop before pictures are handed over, and the first after it."""
        self.before_release()
        self._engine.check()

    @contextlib.contextmanager
    def _reporting(self, progress: Progress | None) -> Iterator[None]:
        """One run, and where it reports to; a callback may make pictures of its own within it."""
        outer, self._progress = self._progress, progress
        try:
            yield
        finally:
            self._progress = outer
            mx.clear_cache()

    def _checked_by(self, gate, request: Request, plan: Plan, notes: list[str], callback: Callable | None) -> Result:
        """The run itself: what is asked for, and what comes out, passes the gate."""
        self._check_folder()
        gate.check_prompts(request.texts())
        if request.image is not None:
            gate.check_input(lambda: _seen(request))
        notes += gate.notes
        for note in notes:
            logger.warning(note)
        conditions, images, seconds, peaks = self._draw(request, plan, callback)
        records = tuple(self._record() | request.record(i) for i in range(request.batch))
        outcomes = ("released",) * request.batch
        if request.output_type == "pil" or self.policy:
            outcomes, images = gate.release(images, records)
        if request.output_type == "np":
            pixels = [np.asarray(one, np.float32) / 255 if self.policy else one for one in images]
            images = np.stack(pixels) if pixels else np.empty((0, request.height, request.width, 3), np.float32)
        seeds = request.seed if isinstance(request.seed, tuple) else () if request.seed is None else (request.seed,)
        notes += dict.fromkeys(note for side in conditions for one in side for note in one.cut)
        return Result(images, outcomes, seeds, tuple(notes), records, seconds, plan, peaks)

    def _draw(self, request: Request, plan: Plan, callback: Callable | None) -> tuple[tuple, list, dict, dict]:
        """What was read of the prompts; pixels, or latents; and of each stage the seconds and the peak in bytes."""
        if mx.default_device().type == mx.gpu:
            mx.set_cache_limit(min(max(plan.budget - plan.peak, 2**26), GB))
        seconds: dict[str, float] = {}
        peaks: dict[str, int] = {}
        with _measured("text", seconds, peaks):
            conditions = self._conditions(request)
        with _measured("denoise", seconds, peaks):
            latents = self._denoise(request, conditions, callback, plan)
        with _measured("decode", seconds, peaks):
            images = latents if request.output_type == "latent" else self._decode(request, latents)
        return conditions, images, seconds, peaks

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
            with self._reporting(progress):
                self._check_folder()
                _, _, seconds, peaks = self._draw(resolved, plan, None)
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

    def _resolve(self, request: Request) -> tuple[Request, list[str]]:
        """The request with defaults, once it is known to be sound."""
        multiple = 2 * self.folder.sizes["vae"].downsampling  # a token is a patch of 2 x 2 latents
        return request.resolved(self.folder.index, self.folder.sizes["transformer"], multiple)

    def _check_folder(self) -> None:
        """Before a weight is read, and once."""
        if not self._checked:
            self.folder.check()
            self._checked = True

    def _encode(self, pairs: list[tuple[str, str]], length: int) -> list[Encoded]:
        encoded = self._encoder.encode(pairs, length, partial(self._runner, "text"))
        for one in encoded:
            _check_finite("a text encoder", one.embeds, one.pooled)
        return encoded

    def _conditions(self, request: Request) -> tuple[list[Encoded], list[Encoded]]:
        """What the transformer reads: of each prompt, and of each prompt's negative (or nothing)."""
        pairs, negative_pairs = request.pairs(), request.pairs(negative=True)
        encoded = self._encode(pairs + negative_pairs, request.max_sequence_length)
        positive, negative = encoded[: len(pairs)], encoded[len(pairs) :]
        if request.prompt_embeds is not None:
            positive = _given(request.prompt_embeds, request.pooled_prompt_embeds)
        if request.negative_prompt_embeds is not None:
            negative = _given(request.negative_prompt_embeds, request.negative_pooled_prompt_embeds)
        return positive, negative * request.prompts if len(negative) == 1 else negative

    def _denoise(self, request: Request, conditions: tuple, callback: Callable | None, plan: Plan) -> mx.array:
        """Latents (B, L, 64) at the end of the schedule."""
        down, steps = self.folder.sizes["vae"].downsampling, request.num_inference_steps
        size = request.height // down, request.width // down
        sigmas = sampler.make_sigmas(self.folder.index.schedule, size[0] * size[1] // 4, steps, request.sigmas or ())
        start = 0 if request.image is None else sampler.first_step(steps, request.strength)
        latents = self._start(request, size, float(sigmas[start]))
        with self._velocity(request, conditions, sigmas, start, size, plan) as velocity:
            run = sampler.euler(velocity, latents, sigmas, start)
            replaced = None
            for step in range(steps - start):
                latents = run.send(replaced)
                _check_finite(f"step {step + 1} of the transformer", latents)
                replaced = self._call_back(callback, step, float(sigmas[start + step]), latents)
                latents = latents if replaced is None else replaced
        return latents

    def _start(self, request: Request, size: tuple[int, int], sigma: float) -> mx.array:
        """Packed latents (B, L, 64) that the loop starts from: given, noise, or noise over an input image.

        They stay in float32 through the loop, where diffusers rounds after every step: it costs nothing, and keeps a
        bfloat16 run nearer to the float32 picture.
        """
        if request.latents is not None:
            return request.latents.astype(mx.float32)
        one_stream = isinstance(request.seed, int)
        shape = (request.batch if one_stream else 1, self.folder.sizes["vae"].z_channels, *size)
        recipe = noises.find_recipe(request.noise)
        dtype = mx.float32 if recipe.dtype else self._dtype  # what a tool draws in a type of its own is not rounded
        streams = [noises.Stream(recipe, s, dtype) for s in ((request.seed,) if one_stream else request.seed)]
        # one image is one sample of the first stream, as in diffusers, whatever the number of streams
        clean = None if request.image is None else self._image_latents(request, streams[0])
        drawn = mx.concatenate([stream.noise(shape) for stream in streams]).astype(mx.float32)
        return sampler.pack(drawn if clean is None else sampler.add_noise(clean, drawn, sigma))

    def _image_latents(self, request: Request, stream: noises.Stream) -> mx.array:
        """(1, 16, h, w) float32, scaled and shifted: the posterior's mean, or a sample, drawn before the noise."""
        vae = self._vae()
        pixels = pixels_from_image(request.image, request.width, request.height)
        posterior = vae.encode(pixels, self._runner("image", _count(vae.encode, pixels)))
        _check_finite("the image encoder", *posterior)
        mean, logvar = (moment.transpose(0, 3, 1, 2).astype(mx.float32) for moment in posterior)
        if noises.find_recipe(request.noise).posterior == "sample":
            mean = mean + mx.exp(0.5 * logvar) * stream.normal(mean.shape)
        return (mean - vae.config.shift_factor) * vae.config.scale_factor

    @contextlib.contextmanager
    def _velocity(self, request: Request, conditions: tuple, sigmas: np.ndarray, start: int, size, plan) -> Iterator:
        """The model that the sampler integrates. What does not depend on the latents is computed here, once."""
        flux = self._flux(plan.keep)
        read = [*conditions[0], *conditions[1]]
        steps = len(sigmas) - 1 - start
        modulations = self._modulate(flux, sigmas[start:-1], request.guidance_scale, [one.pooled for one in read])
        texts = [evaluated(flux.txt_in, one.embeds.astype(flux.dtype)) for one in read]
        tables = [rope(sampler.position_ids(t.shape[1], *size), flux.config.axes_dim, flux.config.theta) for t in texts]
        mx.eval(tables)
        rounds = steps * request.batch * (2 if conditions[1] else 1)

        def one(latents: mx.array, condition: int, step: int) -> mx.array:
            row = condition * steps + step - start
            mods = tree_map(lambda m: m[row : row + 1], modulations)
            return flux.forward(latents, texts[condition], mods, tables[condition], run).astype(mx.float32)

        def velocity(latents: mx.array, step: int) -> mx.array:
            velocities = []
            for i in range(request.batch):  # one by one: neither a picture nor its memory depends on its batch
                prompt = i // request.num_images_per_prompt
                v = one(latents[i : i + 1], prompt, step)
                if conditions[1]:
                    negative = one(latents[i : i + 1], request.prompts + prompt, step)
                    v = negative + request.true_cfg_scale * (v - negative)
                velocities.append(v)
            return mx.concatenate(velocities)

        with self._blocks.reading(rounds) if self._blocks else contextlib.nullcontext(evaluated) as run:
            run = self._runner("denoise", rounds * (len(flux.blocks) + 2), run, steps)
            yield velocity

    def _flux(self, keep: int) -> Flux:
        """The transformer. Its blocks are read when they run, and so many bytes of them are kept."""
        if "transformer" in self._networks:  # somebody asked for the whole of it, and has it in memory
            self._blocks = self._modulation = None
            return self._networks["transformer"]
        if self._blocks is None:
            flux: Flux = self.folder.load("transformer", self._dtype)
            found, check = self.folder.tensors("transformer"), self._engine.check
            self._blocks = Blocks(flux, found, flux.blocks, self._dtype, keep, check)
            self._modulation = Blocks(flux, found, flux.modulated, self._dtype, 0, check)
        else:
            self._blocks.allow(keep)
        return self._blocks.network

    def _modulate(self, flux: Flux, sigmas: np.ndarray, guidance: float | None, pooled: list[mx.array]) -> list:
        """Modulations of all steps of each condition, in one pass over weights that are not kept.

        A second picture of the same prompt, guidance and schedule has them again.
        """
        pooled = mx.concatenate(pooled)
        key = sigmas.tobytes(), guidance, pooled.shape, np.array(pooled.astype(mx.float32)).tobytes()
        if self._modulations and self._modulations[0] == key:
            return self._modulations[1]
        self._modulations = None
        # rounded as on diffusers' way to the embedding: times 1000, divided by 1000, each in the compute type
        times = mx.array(sigmas * np.float32(1000)).astype(self._dtype) / 1000
        rows = len(times) * len(pooled)
        guidance = None if guidance is None else mx.full((rows,), guidance, mx.float32)
        with self._modulation.reading(1) if self._blocks else contextlib.nullcontext(evaluated) as run:
            run = self._runner("modulation", len(flux.modulated) + 1, run=run)
            vec = run(flux.vec, mx.tile(times, len(pooled)), guidance, mx.repeat(pooled, len(times), axis=0))
            self._modulations = key, flux.modulations(vec, run)
        return self._modulations[1]

    def _call_back(self, callback: Callable | None, step: int, sigma: float, latents: mx.array) -> mx.array | None:
        if callback is None:
            return None
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

    def _decode(self, request: Request, latents: mx.array) -> list[np.ndarray]:
        """Pixels (H, W, 3) of each picture: uint8, or float32 in [0, 1] for "np"."""
        vae = self._vae()
        config = vae.config
        size = request.height // config.downsampling, request.width // config.downsampling
        pieces = _count(vae.decode, mx.zeros((1, *size, config.z_channels)))
        run = self._runner("decode", request.batch * pieces)
        rule = noises.find_recipe(request.noise).pixels
        pictures = []
        for i in range(request.batch):
            z = sampler.unpack(latents[i : i + 1], *size).transpose(0, 2, 3, 1)
            x = vae.decode(z / config.scale_factor + config.shift_factor, run)
            _check_finite("the image decoder", x)
            as_floats = request.output_type == "np" and not self.policy  # else of the bytes that were judged
            pixels = mx.clip(x.astype(mx.float32) / 2 + 0.5, 0, 1) if as_floats else pixels_to_bytes(x, rule)
            pictures.append(np.array(pixels[0]))
        return pictures

    def _about(self) -> dict:
        """What the log should know of this model, as JSON."""
        facts = ("mlx", "model", "base", "manifest_sha256", "dtype", "quantization")
        known = {name: value for name, value in self._record().items() if name in facts}
        return known | {"license": self.folder.index.license, "license_sha256": sha256(self.folder.path / "LICENSE.md")}

    def _record(self) -> dict:
        """What of this pipeline decides a picture, as JSON."""
        return {
            "software": SOFTWARE,
            "mlx": version("mlx"),
            "model": self.folder.index.name,
            "base": self.folder.index.base,
            "manifest_sha256": sha256(self.folder.path / "manifest.json"),
            "dtype": self.dtype,
            "quantization": {name: str(most) for name, (most, _) in self.folder.quantization.items()},
            "schedule": to_json(self.folder.index.schedule),
        }

    def _resident(self, component: str) -> nn.Module:
        if component not in self._networks:
            self._networks[component] = self.folder.load(component, self._dtype)
            mx.eval(self._networks[component].parameters())
        return self._networks[component]

    def _vae(self) -> VAE:
        """For one stage, unless somebody asked for it and has it in memory."""
        return self._networks.get("vae") or self.folder.load("vae", self._dtype)

    def _runner(self, stage: str, pieces: int, run: Callable = evaluated, total: int | None = None) -> Callable:
        """Evaluates piece by piece: short command buffers, bounded memory, and a place to stop after each.

        Args:
            stage: for the progress.
            pieces: how many will come.
            run: what evaluates a piece.
            total: what the progress counts up to; None: the pieces.
        """
        total = total or pieces

        def report(done: int) -> None:
            if self._progress:
                self._progress(stage, done * total / pieces, total)

        return self._engine.watched(run, report)


def _count(function: Callable, x: mx.array) -> int:
    """How many pieces a function runs, of which none is evaluated."""
    count = 0

    def run(piece, *args):
        nonlocal count
        count += 1
        return piece(*args)

    function(x, run)
    return count


def _check_reviewable(policy: Policy, request: Request, callback: Callable | None) -> None:
    """Refuses what would hand out, or let in, what cannot be judged."""
    unjudged = "this model's licence asks for filters or review, and latents are pictures that nobody has judged"
    if request.output_type == "latent":
        raise UsageError('output_type is "latent"', '"pil" or "np"', unjudged)
    if callback is not None:
        raise UsageError("callback_on_step_end is given, which sees latents", "progress, which sees none", unjudged)
    if policy.check != "review" and (request.prompt_embeds is not None or request.negative_prompt_embeds is not None):
        raise UsageError("a prompt is given as embeds, which no filter can read", "a text")


def _seen(request: Request) -> np.ndarray:
    """The input image as the autoencoder sees it: (H, W, 3) uint8."""
    pixels = pixels_from_image(request.image, request.width, request.height)
    return np.array(pixels_to_bytes(pixels, "round")[0])


def _given(embeds: mx.array, pooled: mx.array) -> list[Encoded]:
    return [Encoded(embeds[i : i + 1], pooled[i : i + 1]) for i in range(len(embeds))]


def _check_finite(what: str, *arrays: mx.array) -> None:
    finite = [mx.isfinite(array).all() for array in arrays]
    mx.eval(finite, arrays)
    if not all(f.item() for f in finite):
        todo = "compute in --dtype bfloat16 or float32; if that fails too, convert the model again"
        raise ModelError(f"{what} gave NaN or infinities", "finite numbers", todo)


@contextlib.contextmanager
def _measured(stage: str, seconds: dict[str, float], peaks: dict[str, int]) -> Iterator[None]:
    mx.reset_peak_memory()
    begin = time.perf_counter()
    yield
    seconds[stage], peaks[stage] = time.perf_counter() - begin, mx.get_peak_memory()
    mx.clear_cache()
