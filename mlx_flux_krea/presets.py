"""Data: noise recipes of the reference tools, and the models of the FLUX.1 family with their defaults."""

from dataclasses import dataclass

from .config import Defaults, Schedule


@dataclass(frozen=True)
class Recipe:
    """What one tool makes of a seed. Algorithms are in `noise.py`; every field decides the picture."""

    stream: str  # "torch" (CPU generator) | "mlx-key" | "mlx-seed"
    dtype: str | None  # the type drawn in; None: the compute type
    era: str | None  # how torch draws 16-bit numbers: "rounded" (2.13) | "stepwise" (2.7 and before)
    layout: str  # order in which the numbers fall: "nchw" | "nhwc" | "packed"
    posterior: str  # of an input image: "sample" (drawn before the noise) | "mean"
    pixels: str  # floats to bytes: "round" | "truncate"
    source: str


RECIPES = {
    "diffusers": Recipe(
        "torch", None, "rounded", "nchw", "sample", "round",
        "diffusers 0.42 with torch 2.13: randn_tensor, FluxPipeline, FluxImg2ImgPipeline, VaeImageProcessor",
    ),
    "bfl": Recipe(
        "torch", "bfloat16", "stepwise", "nchw", "mean", "truncate",
        "black-forest-labs/flux 802fb47 with the torch 2.6 that it pins: sampling.get_noise, util.save_image",
    ),
    "comfy": Recipe(
        "torch", "float32", "rounded", "nchw", "mean", "truncate",
        "ComfyUI: comfy.sample.prepare_noise, nodes.SaveImage",
    ),
    "mflux": Recipe(
        "mlx-key", "float32", None, "packed", "mean", "round",
        "mflux 0.18: flux_latent_creator.create_noise, image_util",
    ),
    "mlx-examples": Recipe(
        "mlx-seed", "bfloat16", None, "nhwc", "mean", "truncate",
        "ml-explore/mlx-examples 7ddca42: flux/flux/sampler.sample_prior after mx.random.seed",
    ),
}  # fmt: skip

# Tools whose pictures no other machine can repeat from the seed alone, and why.
NOT_REPRODUCIBLE = dict.fromkeys(
    ("krea", "replicate", "fal"),
    "draws its noise on a CUDA device, where the numbers depend on the model of the GPU",
)


@dataclass(frozen=True)
class Family:
    """A published member of the FLUX.1 family, as far as its files do not say it themselves."""

    base: str
    hint: str  # found in the name of a file, folder or repository, lower case
    license: str
    defaults: Defaults


KREA = Family("FLUX.1 Krea [dev]", "krea", "flux-1-dev-non-commercial", Defaults(1024, 1024, 28, 4.5))
KONTEXT = Family("FLUX.1 Kontext [dev]", "kontext", "flux-1-dev-non-commercial", Defaults(1024, 1024, 28, 2.5))
DEV = Family("FLUX.1 [dev]", "dev", "flux-1-dev-non-commercial", Defaults(1024, 1024, 28, 3.5))
SCHNELL = Family("FLUX.1 [schnell]", "schnell", "apache-2.0", Defaults(1024, 1024, 4, 0.0))
OTHER = Family("FLUX architecture, other sizes", "", "unknown", Defaults(1024, 1024, 28, 4.5))

# Peak TFLOP/s of Apple's GPUs with all cores: M1 and M2 from metal-benchmarks, M3 and M4 from the hardware table of
# huggingface.js, M5 measured products from MLX's history.
CHIPS = {
    "M1": 2.6, "M1 Pro": 5.3, "M1 Max": 10.6, "M1 Ultra": 21.2,
    "M2": 3.6, "M2 Pro": 6.8, "M2 Max": 13.6, "M2 Ultra": 27.2,
    "M3": 4.1, "M3 Pro": 7.4, "M3 Max": 16.4, "M3 Ultra": 32.8,
    "M4": 4.6, "M4 Pro": 9.2, "M4 Max": 18.4,
    "M5": 15.4, "M5 Pro": 30.0, "M5 Max": 60.0,
}  # fmt: skip

STRENGTH = 0.6  # how far image-to-image goes from its image (FluxImg2ImgPipeline)

DYNAMIC_SHIFT = Schedule()
NO_SHIFT = Schedule(shift="none")

# How much T5 reads: FLUX.1 [dev] and its kin, and schnell (the pipelines' own limits).
MAX_SEQUENCE_LENGTH = 512
MAX_SEQUENCE_LENGTH_SCHNELL = 256
