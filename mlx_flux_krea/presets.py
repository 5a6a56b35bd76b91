"""Data: noise recipes and defaults of the reference tools, sizes, limits, and the models of the FLUX.1 family."""

from dataclasses import dataclass
from typing import Annotated

Shift = Annotated[float, -20.0, 20.0]  # with the limits of a file


@dataclass(frozen=True)
class Schedule:
    """How sigmas are shifted: exp(mu), with mu linear in the number of image tokens, or not at all (schnell)."""

    shift: str = "dynamic"  # or "none"
    base_shift: Shift = 0.5
    max_shift: Shift = 1.15
    base_image_seq_len: Annotated[int, 1, 2**20] = 256
    max_image_seq_len: Annotated[int, 1, 2**20] = 4096

    def problem(self) -> str | None:
        """Returns a contradiction between these numbers, or None."""
        if self.shift not in ("dynamic", "none"):
            return f'shift is "{self.shift}" and not "dynamic" or "none"'
        tokens = self.max_image_seq_len - self.base_image_seq_len
        if tokens <= 0:
            return f"max_image_seq_len {self.max_image_seq_len} is not above base_image_seq_len"
        if abs(self.max_shift - self.base_shift) / tokens > 2.5e-4:  # exp(mu) of the largest picture is a float32
            return f"a shift from {self.base_shift} to {self.max_shift} within {tokens} tokens is too steep"
        return None


@dataclass(frozen=True)
class Defaults:
    """Default options of a model."""

    width: Annotated[int, 16, 4096]
    height: Annotated[int, 16, 4096]
    num_inference_steps: Annotated[int, 1, 1000]
    guidance_scale: Annotated[float, 0.0, 1000.0]
    true_cfg_scale: Annotated[float, 0.0, 1000.0] = 1.0


@dataclass(frozen=True)
class NoiseRecipe:
    """A tool's way from a seed to noise. Algorithms are in `noise.py`; every field decides the picture."""

    stream: str  # "torch" (CPU generator) | "mlx-key" | "mlx-seed"
    dtype: str | None  # the type drawn in; None: the compute type
    era: str | None  # how torch draws 16-bit numbers: "rounded" (2.13) | "stepwise" (2.7 and before)
    layout: str  # order of the numbers in the noise: "nchw" | "nhwc" | "packed"
    posterior: str  # encoding of an input image: "sample" (drawn before the noise) | "mean"
    pixels: str  # floats to bytes: "round" | "truncate"
    timestep_rounding: str  # a key of TIMESTEP_ROUNDING
    source: str


# How sigma becomes the number whose sinusoids the transformer reads, in a compute type of 16 bits. Guidance is rounded
# to the type and multiplied by 1000 in it; only "once" multiplies first.
TIMESTEP_ROUNDING = {
    "there and back": "1000 sigma is rounded, divided by 1000 and rounded, multiplied by 1000 and rounded",
    "twice": "sigma is rounded, then 1000 times that",
    "none": "1000 sigma in float32",
    "once": "1000 sigma is rounded; the layers that read its sinusoids compute in float32",
}


RECIPES = {
    "diffusers": NoiseRecipe(
        "torch", None, "rounded", "nchw", "sample", "round", "there and back",
        "diffusers 0.42 with torch 2.13: randn_tensor, FluxPipeline, FluxImg2ImgPipeline, VaeImageProcessor, "
        "FluxTransformer2DModel.forward",
    ),
    "bfl": NoiseRecipe(
        "torch", "bfloat16", "stepwise", "nchw", "mean", "truncate", "twice",
        "black-forest-labs/flux 802fb47 with the torch 2.6 that it pins: sampling.get_noise, util.save_image, "
        "sampling.denoise and layers.timestep_embedding",
    ),
    "comfy": NoiseRecipe(
        "torch", "float32", "rounded", "nchw", "mean", "truncate", "none",
        "ComfyUI: comfy.sample.prepare_noise, nodes.SaveImage, model_base.BaseModel._apply_model",
    ),
    "mflux": NoiseRecipe(
        "mlx-key", "float32", None, "packed", "mean", "round", "once",
        "mflux 0.18 and 0.24: flux_latent_creator.create_noise, image_util, Transformer.compute_text_embeddings",
    ),
    "mlx-examples": NoiseRecipe(
        "mlx-seed", "bfloat16", None, "nhwc", "mean", "truncate", "twice",
        "ml-explore/mlx-examples 7ddca42: flux/flux/sampler.sample_prior after mx.random.seed, "
        "flux.FluxPipeline._denoising_loop",
    ),
}  # fmt: skip

# Tools whose pictures no other machine can repeat from the seed alone, and why.
NOT_REPRODUCIBLE = dict.fromkeys(
    ("krea", "replicate", "fal"),
    "draws its noise on a CUDA device, where the numbers depend on the model of the GPU",
)


@dataclass(frozen=True)
class Tool:
    """The defaults of another tool for the same weights."""

    defaults: Defaults
    noise: str  # a row of RECIPES, which also says how floats become bytes
    source: str
    mu: float | None = None  # a shift that is equal for every size, from a table of 10000 levels
    t5_length: int | None = None  # T5 is padded to so many tokens, and longer prompts are read whole; None: the model's
    differs: str = ""  # differences to expect with an equal seed


_CUDA = "bfl"  # no recipe repeats noise of CUDA (NOT_REPRODUCIBLE); this one has the tools' rule from floats to bytes
TOOLS = {
    "bfl": Tool(
        Defaults(1360, 768, 50, 2.5), "bfl", "black-forest-labs/flux 802fb47, src/flux/cli.py",
        differs="in bfloat16 it rounds after every step; it saves JPEG with a watermark",
    ),
    "krea": Tool(Defaults(1024, 1024, 28, 4.5), _CUDA, source="krea-ai/flux-krea 88238a0, inference.py"),
    "diffusers": Tool(
        Defaults(1024, 1024, 28, 3.5), "diffusers", "huggingface/diffusers 58eb52c, FluxPipeline.__call__",
        differs="in bfloat16 it rounds after every step",
    ),
    "comfy": Tool(
        Defaults(1024, 1024, 20, 3.5), "comfy",
        "Comfy-Org/workflow_templates, flux1_krea_dev.json; ModelSamplingFlux and the simple scheduler of ComfyUI",
        mu=1.15, t5_length=256,
        differs="its template runs fp8 weights, and it reads parentheses in a prompt as weights of words",
    ),
    "mflux": Tool(
        Defaults(1024, 1024, 25, 3.5), "mflux", "filipstrand/mflux 97ac5e6, cli/defaults/defaults.py",
        differs="its image stream has the exact GELU, where the reference has the tanh form",
    ),
    "replicate": Tool(
        Defaults(1024, 1024, 28, 3.0), _CUDA, source="replicate/cog-flux 51e81e0, FluxKreaDevPredictor",
        differs="it runs fp8 weights unless go_fast is off",
    ),
    "fal": Tool(Defaults(1024, 768, 28, 4.5), _CUDA, source="fal.ai, fal-ai/flux/krea: landscape_4_3"),
}  # fmt: skip

MEGAPIXEL = 1024 * 1024
# Sizes at one megapixel, those of replicate/cog-flux (predict.py); Krea's own service has 2.35:1 besides.
ASPECTS = {
    "1:1": (1024, 1024), "5:4": (1088, 896), "4:3": (1152, 896), "3:2": (1216, 832), "16:9": (1344, 768),
    "2.35:1": (1568, 672), "21:9": (1536, 640), "4:5": (896, 1088), "3:4": (896, 1152), "2:3": (832, 1216),
    "9:16": (768, 1344), "9:21": (640, 1536),
}  # fmt: skip
MEGAPIXELS = (0.001, 16.0)
MOST_ENLARGED = 4.0  # times as wide and as high, in a second pass
# Shares of a model's own area between which it draws well: below, shapes get lost (BFL names 0.1 megapixels for
# FLUX.1); above, things repeat and stripes appear (lllyasviel/stable-diffusion-webui-forge#1712).
GOOD_AREAS = (0.1, 1.8)

MAX_PROMPT = 100_000  # bytes of a prompt in UTF-8; the encoders read some 2 kB, and the filters every part
MAX_PIXELS = 2**26  # of an input picture, that is 8192 x 8192: decoding takes 0.6 GB; larger JPEGs are decoded reduced
MAX_SIDE = 4096  # pixels; far above the sizes at which the model is good
MAX_BATCH = 1000  # images of one call
MAX_STEPS = 1000
MAX_SCALE = 1000.0  # largest guidance scale and true CFG scale
MAX_STYLES = 16  # style images of a picture; at FLUX.1's size each adds up to 729 tokens
MAX_WEIGHT = 100.0  # of an adapter, either way; published ones are between 0.1 and 1.5
MAX_PICTURES = 10000  # pictures of one run of the command


@dataclass(frozen=True)
class Family:
    """A published member of the FLUX.1 family: facts that its files do not hold."""

    base: str
    hint: str  # found in the name of a file, folder or repository, lower case
    license: str
    defaults: Defaults
    task: str = "text-to-image"  # one of TASKS
    kind: str | None = None  # one of KINDS, of a control model where it is known


TASKS = ("text-to-image", "kontext", "fill", "control")  # of a transformer, by what it reads besides a prompt
KINDS = ("canny", "depth")  # of the maps of a control model: edges, or distances
_DEV = "flux-1-dev-non-commercial"

KREA = Family("FLUX.1 Krea [dev]", "krea", _DEV, Defaults(1024, 1024, 28, 4.5))
DEV = Family("FLUX.1 [dev]", "dev", _DEV, Defaults(1024, 1024, 28, 3.5))
# Steps and guidance of these: FluxKontextPipeline's card; black-forest-labs/flux, cli_fill.py and cli_control.py.
KONTEXT = Family("FLUX.1 Kontext [dev]", "", _DEV, Defaults(1024, 1024, 28, 2.5), "kontext")
FILL = Family("FLUX.1 Fill [dev]", "", _DEV, Defaults(1024, 1024, 50, 30.0), "fill")
CANNY = Family("FLUX.1 Canny [dev]", "", _DEV, Defaults(1024, 1024, 50, 30.0), "control", "canny")
DEPTH = Family("FLUX.1 Depth [dev]", "", _DEV, Defaults(1024, 1024, 50, 10.0), "control", "depth")
CONTROL = Family("FLUX.1 Canny or Depth [dev]", "", _DEV, Defaults(1024, 1024, 50, 10.0), "control")  # the milder one
EDITING = (KONTEXT, FILL, CANNY, DEPTH, CONTROL)
SCHNELL = Family("FLUX.1 [schnell]", "schnell", "apache-2.0", Defaults(1024, 1024, 4, 0.0))
# Without a guidance embedding, and no published [schnell] file: made from [dev] by undoing its guidance distillation
# (nyanko7/flux-dev-de-distill), or from [schnell] by somebody.
DE_DISTILLED = Family(
    "FLUX.1 without guidance embedding", "", "unknown", Defaults(1024, 1024, 28, 0.0, true_cfg_scale=3.5)
)
UNPROVEN_SCHNELL = Family("FLUX.1 [schnell], by its name", "schnell", "unknown", Defaults(1024, 1024, 4, 0.0))
OTHER = Family("FLUX architecture, other sizes", "", "unknown", Defaults(1024, 1024, 28, 4.5))

# sha256 of published FLUX.1 [schnell] transformers, and where each is stated: these files need no filters.
SCHNELL_FILES = {
    "9403429e0052277ac2a87ad800adece5481eecefd9ed334e1f348723621d2a0a": (
        "flux1-schnell.safetensors of black-forest-labs/FLUX.1-schnell: docs/text-to-image.md of black-forest-labs/flux"
    ),
}
# Repositories whose transformers are FLUX.1 [schnell] under Apache-2.0; the hub states their files' sha256.
SCHNELL_REPOSITORIES = (
    "black-forest-labs/FLUX.1-schnell",
    "Comfy-Org/flux1-schnell",
    "city96/FLUX.1-schnell-gguf",
)

# Peak TFLOP/s of Apple's GPUs with all cores: M1 and M2 from metal-benchmarks, M3 and M4 from the hardware table of
# huggingface.js, M5 measured products from MLX's history.
CHIPS = {
    "M1": 2.6, "M1 Pro": 5.3, "M1 Max": 10.6, "M1 Ultra": 21.2,
    "M2": 3.6, "M2 Pro": 6.8, "M2 Max": 13.6, "M2 Ultra": 27.2,
    "M3": 4.1, "M3 Pro": 7.4, "M3 Max": 16.4, "M3 Ultra": 32.8,
    "M4": 4.6, "M4 Pro": 9.2, "M4 Max": 18.4,
    "M5": 15.4, "M5 Pro": 30.0, "M5 Max": 60.0,
}  # fmt: skip
SHARE_OF_PEAK = 0.5  # that products reach: nobody has shown more in 16 bits on M1 and M2

# Latents of the FLUX.1 autoencoder as colours, for previews (`preview.py`): a row for each of the 16 channels, and one
# that is added. Fitted by ComfyUI: comfy/latent_formats.py, class Flux.
FLUX_LATENT_RGB = (
    (-0.0346, 0.0244, 0.0681), (0.0034, 0.0210, 0.0687), (0.0275, -0.0668, -0.0433), (-0.0174, 0.0160, 0.0617),
    (0.0859, 0.0721, 0.0329), (0.0004, 0.0383, 0.0115), (0.0405, 0.0861, 0.0915), (-0.0236, -0.0185, -0.0259),
    (-0.0245, 0.0250, 0.1180), (0.1008, 0.0755, -0.0421), (-0.0515, 0.0201, 0.0011), (0.0428, -0.0012, -0.0036),
    (0.0817, 0.0765, 0.0749), (-0.1264, -0.0522, -0.1103), (-0.0280, -0.0881, -0.0499), (-0.1262, -0.0982, -0.0778),
    (-0.0329, -0.0718, -0.0851),
)  # fmt: skip

STRENGTH = 0.6  # default distance of image-to-image from its image (FluxImg2ImgPipeline)
MASK_STRENGTH = 0.85  # of what is repainted through a mask (the example of FluxInpaintPipeline)
FULL_STRENGTH = 1.0  # of what is filled or added around an image, where nothing is to start from (FluxFillPipeline)
FITS = ("stretch", "crop", "pad")  # how an image of another shape is brought to a size
CROP_PADDING = 64  # pixels around a mask that are repainted with it (`--crop-to-mask`)
# Width and height at which FLUX.1 Kontext was trained (PREFERED_KONTEXT_RESOLUTIONS in BFL's util.py).
_HALF = ((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104))
KONTEXT_SIZES = (*_HALF, (1024, 1024), *((height, width) for width, height in reversed(_HALF)))

# Choices of options, the usual one first.
COMPUTE_TYPES = ("bfloat16", "float16", "float32")
METADATA = ("full", "minimal")  # everything that decides the picture, or only that an AI made it
CREDENTIALS = ("off", "on", "require")  # pictures are signed or not; or none is released unsigned
STYLE_RULES = ("grid", "concat", "sum")  # how the tokens of style images stand beside the text's: inputs/style.py
SOLVERS = ("euler", "dpmpp_2m", "heun")  # sampling/solvers.py
SCHEDULES = ("beta", "simple")  # of noise levels, besides the model's: sampler.schedule_levels
CACHES = ("skip", "first-block:T", "first-block:T:1")  # steps that are not computed in full: sampling/caches.py
FAST = "skip"  # the cache of `fast`,
FAST_FROM = 12  # which begins at so many steps
CHECKS = ("filters", "review", "both")  # who checks pictures before release
PRECISIONS = ("none", "8", "6", "5", "4", "3", "mxfp4", "nvfp4")  # of the large layers; rows of convert's RECIPES
PROPOSED_PRECISIONS = PRECISIONS[:5]  # those that `setup` offers, the best first
GROUP_SIZES = (64, 32, 128)  # weights that share a scale

# Prompts, and steps of each, whose inputs decide how `convert --gptq` rounds: subjects, styles, light and lettering of
# many kinds. Shapes in plain colours are for the small model, which knows nothing else.
GPTQ = "GPTQ"  # ends the record of the converter in folders that it has rounded
CALIBRATION_TIMES = 6
CALIBRATION_PROMPTS = (
    "a portrait of an old fisherman in soft window light, film photograph, visible grain",
    "a city street in the rain at night, neon signs reflected in puddles, people with umbrellas",
    "a bowl of ramen on a dark wooden table, seen from above, steam rising",
    "a mountain lake at dawn with mist over the water, wide landscape photograph",
    "a red fox in fresh snow looking at the camera, shallow depth of field",
    "a watercolour of a small harbour with white boats and yellow houses",
    'a poster with the words "OPEN LATE" in bold white letters on a red background',
    "the interior of an old library with tall windows, a spiral staircase and green lamps",
    "three children playing football on a beach in the evening, long shadows",
    "a flat illustration of a yellow star above a small blue circle on a white background",
    "a large green triangle to the left of a small pink ring on a black background",
    "a macro photograph of a bee on a purple flower, every hair in focus",
)

QUALITY = 95  # of JPEG and WebP
NSFW_THRESHOLD = 0.85  # probability below which a picture passes; a user may only lower it
INTEGRITY_MARGIN = 0.0  # by which the filter must clear a picture; a user may only raise it

# The first picture of `setup`, and the prompt of `bench`.
FIRST_PROMPT = "a lighthouse on a cliff at dusk, long exposure, the sea below it white with foam"


@dataclass(frozen=True)
class Stage:
    """A stage of a run, as progress lines and messages name it."""

    label: str  # of a progress line
    unit: str  # of its progress
    verb: str  # completes "memory to ..."


STAGES = {
    "check": Stage("checking", "layer", "check"),
    "text": Stage("reading the prompt", "layer", "read the prompt"),
    "style": Stage("reading the style images", "layer", "read the style images"),
    "map": Stage("making the map", "layer", "make the map"),
    "image": Stage("reading the image", "stage", "read the image"),
    "modulation": Stage("preparing", "layer", "prepare"),
    "denoise": Stage("denoising", "step", "denoise"),
    "enlarge": Stage("denoising, second pass", "step", "denoise the second pass"),
    "decode": Stage("decoding", "stage", "decode"),
}

DYNAMIC_SHIFT = Schedule()
NO_SHIFT = Schedule(shift="none")

# Tokens of T5: FLUX.1 [dev] and its relatives, and schnell (the pipelines' own limits).
MAX_SEQUENCE_LENGTH = 512
MAX_SEQUENCE_LENGTH_SCHNELL = 256
