"""Collects inputs of a model's transformer, by which `convert` with GPTQ rounds its layers (`samples` has the format).

Prompts are denoised in one step more than there are inputs of each, from the second step on: the steps of seven were
as good as those of 28 on the small model, at a quarter of the time. No latent is decoded, so that there is no picture.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from .files import replacing
from .generator import Generator, Observers
from .memory import make_plan, weigh_folder
from .presets import CALIBRATION_PROMPTS, CALIBRATION_TIMES
from .request import Request
from .samples import Samples
from .sampling import sampler
from .sampling.noise import find_recipe
from .weights import ModelFolder
from .worker import Worker

LABEL = "collecting inputs"


def collect(
    folder: ModelFolder,
    file: Path,
    *,
    prompts: Sequence[str] = CALIBRATION_PROMPTS,
    memory: int | None = None,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> None:
    """Collects the inputs of the transformer at six steps of each prompt, at the model's own size.

    Args:
        folder: a model that reads nothing besides a prompt.
        file: is written when all are there. After a kill the next call continues, with files beside it.
        prompts: one or more.
        memory: bytes that the run may take; None: as many as the machine offers.
        progress: called with a label, the evaluations that are done, and all.

    Raises:
        ModelError: weights are missing or damaged, or gave NaN.
        ResourceError: not enough memory for the model's own size.
        UsageError: the file cannot be written.
        Interrupted: the run was stopped.
    """
    worker = Worker()
    worker.run(_collect, folder, worker, file, prompts, memory, progress).save(file)
    for part in file.parent.glob(f"{file.name}.*.npy"):
        part.unlink()


def _collect(
    folder: ModelFolder,
    worker: Worker,
    file: Path,
    prompts: Sequence[str],
    memory: int | None,
    progress: Callable[[str, int, int], None],
) -> Samples:
    """Runs in the worker's thread."""
    folder.check()
    dtype = mx.float32 if folder.flux.dtype == "float32" else mx.bfloat16
    generator, total = Generator(folder, dtype, worker), len(prompts) * CALIBRATION_TIMES
    requests = [
        Request(
            prompt=prompt,
            seed=number,
            num_inference_steps=CALIBRATION_TIMES + 1,
            stop_after=CALIBRATION_TIMES,
            output_type="latent",
        ).resolve(folder)
        for number, prompt in enumerate(prompts)
    ]
    width, height = requests[0].width, requests[0].height
    plan = make_plan(
        weigh_folder(folder, dtype),
        folder.sizes,
        dtype,
        width=width,
        height=height,
        text_length=requests[0].max_sequence_length,
        steps=CALIBRATION_TIMES + 1,
        conditions=2 if requests[0].true_cfg else 1,
        budget=memory,
    )
    latents: list[np.ndarray] = []

    pairs = [pair for request in requests for pair in request.pairs()]
    encoded = generator.encode(pairs, requests[0].max_sequence_length)
    for number, request in enumerate(requests):
        part, some = _part(file, folder, prompts[number]), []
        if part.exists():
            latents.append(np.load(part))
            continue

        def keep(step: int, sigma: float, after: mx.array, some: list[np.ndarray] = some) -> None:
            some.append(np.array(after[0].astype(mx.float32)))

        def tell(stage: str, done: float, parts: int, before: int = number * CALIBRATION_TIMES) -> None:
            if stage == "denoise":
                progress(LABEL, before + int(done + 1e-6), total)

        with generator.reporting(tell):
            generator.generate(request, plan, Observers(callback=keep))
        latents.append(np.stack(some))
        with replacing(part) as opened:
            np.save(opened, latents[-1])
    down = folder.vae.sizes.downsampling
    tokens = width * height // (2 * down) ** 2
    sigmas = sampler.make_sigmas(folder.index.schedule, tokens, CALIBRATION_TIMES + 1)[1:-1]
    return Samples(
        latents=np.concatenate(latents),
        sigmas=np.tile(sigmas, len(prompts)),
        prompts=np.repeat(np.arange(len(prompts), dtype=np.int32), CALIBRATION_TIMES),
        embeds=np.concatenate([np.array(one.embeds.astype(mx.float32)) for one in encoded]),
        pooled=np.concatenate([np.array(one.pooled.astype(mx.float32)) for one in encoded]),
        width=width // down,
        height=height // down,
        guidance=requests[0].guidance_scale,
        rounding=find_recipe(requests[0].noise).timestep_rounding,
    )


def _part(file: Path, folder: ModelFolder, prompt: str) -> Path:
    """Returns the file of the latents of one prompt."""
    key = hashlib.sha256((folder.path / "manifest.json").read_bytes() + prompt.encode()).hexdigest()[:16]
    return file.with_name(f"{file.name}.{key}.npy")
