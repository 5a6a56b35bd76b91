"""From a resolved request to pixels: text, input image, modulation, denoising, decoding, in this order.

Networks, sampler and noise are functions; this file decides what is evaluated when, what is kept, which seed draws
what, and where a run can be stopped. It asks nobody whether it may: `pipeline.py` does. All of it happens in the
worker's thread.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from .checkpoint import Checkpoint
from .errors import ModelError
from .memory import GB, Plan
from .models import tiles
from .models.transformer import Flux, rope
from .models.vae import VAE, pixels_from_image, pixels_to_bytes
from .prompts import Encoded, PromptEncoder
from .request import ResolvedRequest
from .residency import Blocks
from .sampling import noise as noises
from .sampling import preview as previews
from .sampling import sampler
from .weights import ModelFolder
from .worker import Worker, evaluated

Progress = Callable[[str, float, int], None]


@dataclass(frozen=True)
class Observers:
    """Functions that see a run after each step, and the file that it can be resumed from."""

    callback: Callable | None = None  # of (step, sigma, latents); returns latents to continue with, or None
    preview: Callable | None = None  # of (step, steps, pixels)
    checkpoint: Checkpoint | None = None


class Generator:
    """The networks of one model folder, as far as they are in memory, and what of them is kept between pictures.

    Args:
        folder: what was read of it.
        dtype: the compute type.
        worker: in whose thread this is called.
    """

    def __init__(self, folder: ModelFolder, dtype: mx.Dtype, worker: Worker):
        self.folder = folder
        self._dtype = dtype
        self._worker = worker
        self._encoder = PromptEncoder(folder, dtype, worker.check)
        self._networks: dict[str, nn.Module] = {}
        self.blocks: Blocks | None = None
        self._modulation: Blocks | None = None  # its layers, apart from the blocks they belong to
        self._modulations: tuple[tuple, list] | None = None  # of the last call, and what they depend on
        self._progress: Progress | None = None
        self._checked = False

    @contextlib.contextmanager
    def reporting(self, progress: Progress | None) -> Iterator[None]:
        """One run, and where it reports to; a callback may make pictures of its own within it."""
        outer, self._progress = self._progress, progress
        try:
            yield
        finally:
            self._progress = outer
            mx.clear_cache()

    def generate(
        self, request: ResolvedRequest, plan: Plan, observers: Observers, as_floats: bool = False
    ) -> tuple[tuple[list[Encoded], list[Encoded]], list[np.ndarray] | mx.array, dict[str, float], dict[str, int]]:
        """All pictures of a request, which nobody has judged.

        Args:
            request: size, prompts, seeds and steps.
            plan: how much of the transformer may stay in memory.
            observers: called after each step.
            as_floats: pixels in [0, 1] instead of bytes.

        Returns:
            What was read of the prompts and of the negative ones; pixels (H, W, 3) of each picture, or latents
            (B, L, 64) where it asks for these; seconds and peak in bytes of each stage.

        Raises:
            ModelError: weights are missing or damaged, or NaN came of them.
            UsageError: what an unfinished run has kept is of another picture.
            Interrupted: somebody asked to stop.
        """
        if mx.default_device().type == mx.gpu:
            mx.set_cache_limit(min(max(plan.budget - plan.peak, 2**26), GB))
        seconds: dict[str, float] = {}
        peaks: dict[str, int] = {}
        conditions: tuple = (), ()
        if observers.checkpoint is None or not observers.checkpoint.is_denoised:
            with _measured("text", seconds, peaks):
                conditions = self._conditions(request)
        with _measured("denoise", seconds, peaks):
            latents = self._denoise(request, conditions, plan, observers)
        with _measured("decode", seconds, peaks):
            images = (
                latents if request.output_type == "latent" else self._decode(request, latents, as_floats, plan.tiled)
            )
        return conditions, images, seconds, peaks

    def check_folder(self) -> None:
        """Before a weight is read, and once."""
        if not self._checked:
            self.folder.check()
            self._checked = True

    def encode(self, pairs: list[tuple[str, str]], length: int) -> list[Encoded]:
        encoded = self._encoder.encode(pairs, length, partial(self.runner, "text"))
        for one in encoded:
            _check_finite("a text encoder", one.embeds, one.pooled)
        return encoded

    def _conditions(self, request: ResolvedRequest) -> tuple[list[Encoded], list[Encoded]]:
        """What the transformer reads: of each prompt, and of each prompt's negative (or nothing)."""
        pairs, negative_pairs = request.pairs(), request.pairs(negative=True)
        encoded = self.encode(pairs + negative_pairs, request.max_sequence_length)
        positive, negative = encoded[: len(pairs)], encoded[len(pairs) :]
        if request.prompt_embeds is not None:
            positive = _given(request.prompt_embeds, request.pooled_prompt_embeds)
        if request.negative_prompt_embeds is not None:
            negative = _given(request.negative_prompt_embeds, request.negative_pooled_prompt_embeds)
        return positive, negative * request.prompts if len(negative) == 1 else negative

    def _denoise(self, request: ResolvedRequest, conditions: tuple, plan: Plan, observers: Observers) -> mx.array:
        """Latents (B, L, 64) at the end of the schedule, from its beginning or from where an interrupted run was."""
        down, steps = self.folder.vae.sizes.downsampling, request.num_inference_steps
        size = request.height // down, request.width // down
        sigmas = sampler.make_sigmas(self.folder.index.schedule, size[0] * size[1] // 4, steps, request.sigmas)
        start = 0 if request.image is None else sampler.first_step(steps, request.strength)
        shape = request.batch, size[0] * size[1] // 4, self.folder.flux.sizes.in_channels
        checkpoint = observers.checkpoint
        kept = None if checkpoint is None else checkpoint.latents(shape, steps - start)
        done = 0 if kept is None else checkpoint.done
        first = float(sigmas[start])
        latents = self._start(request, size, first, plan.tiled) if kept is None else mx.array(kept)
        if done == steps - start:
            return latents
        with self._velocity(request, conditions, sigmas, start, done, size, plan) as velocity:
            run = sampler.euler(velocity, latents, sigmas, start + done)
            replaced = None
            for step in range(done, steps - start):
                before, latents = latents, run.send(replaced)
                _check_finite(f"step {step + 1} of the transformer", latents)
                if observers.preview:
                    clean = previews.predicted(before, latents, *map(float, sigmas[start + step :][:2]))
                    pixels = previews.colours(
                        sampler.unpack(clean, width=size[1], height=size[0]), self.folder.latent_rgb
                    )
                    observers.preview(step + 1, steps - start, pixels)
                sigma = float(sigmas[start + step])
                replaced = observers.callback(step, sigma, latents) if observers.callback else None
                latents = latents if replaced is None else replaced
                if checkpoint is not None:
                    checkpoint.reached(step + 1, steps - start, np.array(latents.astype(mx.float32)))
        return latents

    def _start(self, request: ResolvedRequest, size: tuple[int, int], sigma: float, tiled: bool) -> mx.array:
        """Packed latents (B, L, 64) that the loop starts from: given, noise, or noise over an input image.

        They stay in float32 through the loop, where diffusers rounds after every step: it costs nothing, and keeps a
        bfloat16 run nearer to the float32 picture.
        """
        if request.latents is not None:
            return request.latents.astype(mx.float32)
        one_stream = isinstance(request.seed, int)
        shape = (request.batch if one_stream else 1, self.folder.vae.sizes.z_channels, *size)
        recipe = noises.find_recipe(request.noise)
        dtype = mx.float32 if recipe.dtype else self._dtype  # what a tool draws in a type of its own is not rounded
        streams = [noises.Stream(recipe, s, dtype) for s in ((request.seed,) if one_stream else request.seed)]
        # one image is one sample of the first stream, as in diffusers, whatever the number of streams
        clean = None if request.image is None else self._image_latents(request, streams[0], tiled)
        drawn = mx.concatenate([stream.noise(shape) for stream in streams]).astype(mx.float32)
        return sampler.pack(drawn if clean is None else sampler.add_noise(clean, drawn, sigma))

    def _image_latents(self, request: ResolvedRequest, stream: noises.Stream, tiled: bool) -> mx.array:
        """(1, 16, h, w) float32, scaled and shifted: the posterior's mean, or a sample, drawn before the noise."""
        vae = self._vae()
        pixels = pixels_from_image(request.image, request.width, request.height)
        encode = partial(tiles.encode, vae) if tiled else vae.encode
        posterior = encode(pixels, self.runner("image", _count(encode, pixels)))
        _check_finite("the image encoder", *posterior)
        mean, logvar = (moment.transpose(0, 3, 1, 2).astype(mx.float32) for moment in posterior)
        if noises.find_recipe(request.noise).posterior == "sample":
            mean = mean + mx.exp(0.5 * logvar) * stream.normal(mean.shape)
        return (mean - vae.config.shift_factor) * vae.config.scale_factor

    @contextlib.contextmanager
    def _velocity(
        self, request: ResolvedRequest, conditions: tuple, sigmas: np.ndarray, start: int, done: int, size, plan: Plan
    ) -> Iterator:
        """The model that the sampler integrates. What does not depend on the latents is computed here, once.

        Of an interrupted run too, all modulations are computed together: a product of fewer rows may round otherwise.
        """
        flux = self._flux(plan.keep)
        read = [*conditions[0], *conditions[1]]
        steps = len(sigmas) - 1 - start
        modulations = self._modulate(flux, sigmas[start:-1], request.guidance_scale, [one.pooled for one in read])
        texts = [evaluated(flux.txt_in, one.embeds.astype(flux.dtype)) for one in read]
        tables = [
            rope(sampler.position_ids(t.shape[1], size[1], size[0]), flux.config.axes_dim, flux.config.theta)
            for t in texts
        ]
        mx.eval(tables)
        rounds = (steps - done) * request.batch * (2 if conditions[1] else 1)

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

        with self.blocks.reading(rounds) if self.blocks else contextlib.nullcontext(evaluated) as run:
            run = self.runner("denoise", rounds * (len(flux.blocks) + 2), run, steps - done)
            yield velocity

    def _flux(self, keep: int) -> Flux:
        """The transformer. Its blocks are read when they run, and so many bytes of them are kept."""
        if "transformer" in self._networks:  # somebody asked for the whole of it, and has it in memory
            self.blocks = self._modulation = None
            return self._networks["transformer"]
        if self.blocks is None:
            flux = self.folder.flux.load(self._dtype)
            found, check = self.folder.flux.tensors(), self._worker.check
            self.blocks = Blocks(flux, found, flux.blocks, self._dtype, keep, check)
            self._modulation = Blocks(flux, found, flux.modulated, self._dtype, 0, check)
        else:
            self.blocks.allow(keep)
        return self.blocks.network

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
        with self._modulation.reading(1) if self.blocks else contextlib.nullcontext(evaluated) as run:
            run = self.runner("modulation", len(flux.modulated) + 1, run=run)
            vec = run(flux.vec, mx.tile(times, len(pooled)), guidance, mx.repeat(pooled, len(times), axis=0))
            self._modulations = key, flux.modulations(vec, run)
        return self._modulations[1]

    def _decode(self, request: ResolvedRequest, latents: mx.array, as_floats: bool, tiled: bool) -> list[np.ndarray]:
        """Pixels (H, W, 3) of each picture: uint8, or float32 in [0, 1]."""
        vae = self._vae()
        config = vae.config
        size = request.height // config.downsampling, request.width // config.downsampling
        decode = partial(tiles.decode, vae) if tiled else vae.decode
        pieces = _count(decode, mx.zeros((1, *size, config.z_channels)))
        run = self.runner("decode", request.batch * pieces)
        rule = noises.find_recipe(request.noise).pixels
        pictures = []
        for i in range(request.batch):
            z = sampler.unpack(latents[i : i + 1], width=size[1], height=size[0]).transpose(0, 2, 3, 1)
            x = decode(z / config.scale_factor + config.shift_factor, run)
            _check_finite("the image decoder", x)
            pixels = mx.clip(x.astype(mx.float32) / 2 + 0.5, 0, 1) if as_floats else pixels_to_bytes(x, rule)
            pictures.append(np.array(pixels[0]))
        return pictures

    def resident(self, component: str) -> nn.Module:
        if component not in self._networks:
            self._networks[component] = self.folder.networks[component].load(self._dtype)
            mx.eval(self._networks[component].parameters())
        return self._networks[component]

    def _vae(self) -> VAE:
        """For one stage, unless somebody asked for it and has it in memory."""
        return self._networks.get("vae") or self.folder.vae.load(self._dtype)

    def runner(self, stage: str, pieces: int, run: Callable = evaluated, total: int | None = None) -> Callable:
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

        return self._worker.stoppable(run, report)


def _count(function: Callable, x: mx.array) -> int:
    """How many pieces a function runs, of which none is evaluated."""
    count = 0

    def run(piece, *args):
        nonlocal count
        count += 1
        return piece(*args)

    function(x, run)
    return count


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
