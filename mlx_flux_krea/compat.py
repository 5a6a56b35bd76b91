"""Names of diffusers that mean nothing here: accepted with one log line, or refused with the next step.

Tables of arguments, attributes and classes, and classes of methods, each name with its sentence. A name that is in none
of them stays an error of Python's, TypeError or AttributeError, with the name that may have been meant.
"""

import inspect
import logging
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

from .errors import UsageError
from .presets import COMPUTE_TYPES, Schedule

logger = logging.getLogger("mlx_flux_krea")

_told: set[str] = set()  # names whose line was logged: once in a process


def tell(name: str, sentence: str) -> None:
    """Logs that a name was accepted, the first time that it is used."""
    if name not in _told:
        _told.add(name)
        logger.warning(f"`{name}` is accepted: {sentence}")


def refuse(name: str, sentence: str) -> UsageError:
    """Returns the error for a name that would have an effect in diffusers and has none here."""
    return UsageError(f"`{name}` is diffusers', and this program does not have it", "", sentence)


@dataclass(frozen=True)
class Argument:
    """An argument of diffusers.

    Attributes:
        sentence: what happens instead, or the next step.
        accepted: tells values that are accepted from those that are refused; None: all are accepted. The value None,
            diffusers' default, is always accepted, in silence.
    """

    sentence: str
    accepted: Callable[[Any], bool] | None = None


def _never(value: Any) -> bool:
    return False


_MEMORY = "memory is unified and planned before each run; the limit is `memory`"
_OPENS = "an installed model is opened as it was converted, and nothing is fetched"
_NO_ADAPTERS = "IP-Adapter and textual inversion do not work; `style_images` and load_lora_weights() do"
_ADAPTERS_STAY = "adapters run beside the weights, and are never merged into them"
_NO_CONTROLNET = "ControlNets do not work here; FLUX.1 Canny and Depth [dev] and their adapters do: `control_image`"
_ENCODED = "images are given as images: `image` and `mask_image`"
_COMPONENT = "every component comes from the model folder: flux-krea convert takes files one by one"
_QUANTIZE = "quantize at conversion: flux-krea convert MODEL -q 4"

_SCHEDULER = "a call takes `solver`, `schedule` and `sigmas`; the usual solver is Euler with the folder's schedule"
_CACHE = 'a call takes `cache`, such as "first-block:0.08" (FirstBlockCacheConfig) or "skip"'

LOADING = {
    "variant": Argument(_OPENS),
    "revision": Argument(_OPENS),
    "token": Argument(_OPENS),
    "use_auth_token": Argument(_OPENS),
    "cache_dir": Argument(_OPENS),
    "local_files_only": Argument(_OPENS),
    "force_download": Argument(_OPENS),
    "resume_download": Argument(_OPENS),
    "proxies": Argument(_OPENS),
    "mirror": Argument(_OPENS),
    "use_safetensors": Argument(_OPENS),
    "use_onnx": Argument(_OPENS, accepted=lambda value: not value),
    "device_map": Argument(_MEMORY),
    "max_memory": Argument(_MEMORY),
    "low_cpu_mem_usage": Argument(_MEMORY),
    "offload_folder": Argument(_MEMORY),
    "offload_state_dict": Argument(_MEMORY),
    "disable_mmap": Argument(_MEMORY),
    "safety_checker": Argument("checks follow from the model's licence, see `check`", _never),
    "feature_extractor": Argument(_NO_ADAPTERS, _never),
    "image_encoder": Argument(_NO_ADAPTERS, _never),
    **dict.fromkeys(
        ("transformer", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"),
        Argument(_COMPONENT, _never),
    ),
    "scheduler": Argument(_SCHEDULER, _never),
    "quantization_config": Argument(_QUANTIZE, _never),
    "custom_pipeline": Argument("there is one pipeline, with the text and image arguments of diffusers'", _never),
    "output_loading_info": Argument("loading is strict: a missing or unknown tensor is an error", lambda v: not v),
    "subfolder": Argument("name the model folder itself", lambda value: not value),
}

_READER = "a prompt is read by a pipeline: FluxPriorReduxPipeline.from_pretrained(NAME, pipeline=pipe)"
_INSTALLED = "the installed Redux is opened as it was converted"
PRIOR = LOADING | {  # arguments of FluxPriorReduxPipeline.from_pretrained
    **dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"), Argument(_READER, _never)),
    **dict.fromkeys(("image_encoder", "image_embedder", "feature_extractor"), Argument(_INSTALLED, _never)),
}

_ADAPTER_IMAGES = ("ip_adapter_image", "ip_adapter_image_embeds")
_CONTROLNET = ("control_mode", "controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")

CALL = {
    "callback_on_step_end_tensor_inputs": Argument(
        "a callback is given the latents", lambda v: isinstance(v, list | tuple) and {*map(str, v)} <= {"latents"}
    ),
    **dict.fromkeys(
        (*_ADAPTER_IMAGES, *(f"negative_{name}" for name in _ADAPTER_IMAGES)), Argument(_NO_ADAPTERS, _never)
    ),
    **dict.fromkeys(_CONTROLNET, Argument(_NO_CONTROLNET, _never)),
    "masked_image_latents": Argument(_ENCODED, _never),
    "max_area": Argument("a size that is given is kept, and the default is one of Kontext's own"),
}

ENCODING = {
    "device": Argument(_MEMORY),
    "num_images_per_prompt": Argument("a call repeats the embeds for its `num_images_per_prompt`", lambda n: n == 1),
    **dict.fromkeys(("prompt_embeds", "pooled_prompt_embeds"), Argument("give them to the call", _never)),
}

_LORA = "an adapter is read as it lies on disk, and nothing is fetched"
ADAPTERS = {
    **dict.fromkeys(
        ("cache_dir", "force_download", "resume_download", "proxies", "token", "revision", "local_files_only"),
        Argument(_LORA),
    ),
    "use_safetensors": Argument(_LORA, accepted=lambda value: value is not False),
    "low_cpu_mem_usage": Argument(_MEMORY),
    "return_lora_metadata": Argument(_LORA, accepted=lambda value: not value),
    "hotswap": Argument("delete_adapters() frees the name first", accepted=lambda value: not value),
    "prefix": Argument("names of every trainer are read", _never),
}

# Attributes that scripts set. Reading them, where there is something to read, is the pipeline's own matter.
ASSIGNED = {
    "scheduler": LOADING["scheduler"].sentence,
    **dict.fromkeys(("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"), _COMPONENT),
    "safety_checker": LOADING["safety_checker"].sentence,
    "_interrupt": "call interrupt(), from a callback or another thread",
    "interrupt": "call interrupt(), from a callback or another thread",
}

# Attributes that scripts read and that do not exist.
ABSENT = {
    "text_encoder": "encode_prompt() encodes texts",
    "text_encoder_2": "encode_prompt() encodes texts",
    "tokenizer": "`folder.tokenizers` are those of CLIP and of T5",
    "tokenizer_2": "`folder.tokenizers` are those of CLIP and of T5",
    "components": "there is one pipeline, for texts and images",
    "config": "`folder.index` holds the facts of the model",
    "image_processor": "`image` takes PIL images, numpy arrays and paths; `output_type` chooses the result",
    "safety_checker": "`policy` says which checks pictures must pass",
    "_unpack_latents": "`mlx_flux_krea.sampling.sampler.unpack` does it",
    "_pack_latents": "`mlx_flux_krea.sampling.sampler.pack` does it",
}

_CLASSES = {
    "DiffusionPipeline AutoPipelineForText2Image AutoPipelineForImage2Image AutoPipelineForInpainting": (
        "FluxPipeline is for texts and images"
    ),
    "FluxKontextInpaintPipeline": "FluxKontextPipeline changes the whole picture, and FluxFillPipeline fills a mask",
    "FluxControlNetPipeline FluxControlNetImg2ImgPipeline FluxControlNetInpaintPipeline FluxControlNetModel "
    "FluxMultiControlNetModel": _NO_CONTROLNET,
    "FluxTransformer2DModel AutoencoderKL T5EncoderModel T5TokenizerFast CLIPTextModel CLIPTokenizer": _COMPONENT,
    "ReduxImageEncoder SiglipVisionModel SiglipImageProcessor": "FluxPriorReduxPipeline opens the installed Redux",
    "FlowMatchEulerDiscreteScheduler": _SCHEDULER,
    "FlowMatchHeunDiscreteScheduler": 'a call takes `solver` "heun"',
    "DPMSolverMultistepScheduler": 'a call takes `solver` "dpmpp_2m", which is this one with flow sigmas',
    "FirstBlockCacheConfig MagCacheConfig TaylorSeerCacheConfig FasterCacheConfig": _CACHE,
    "apply_first_block_cache apply_mag_cache apply_taylorseer_cache": _CACHE,
    "BitsAndBytesConfig TorchAoConfig QuantoConfig GGUFQuantizationConfig PipelineQuantizationConfig": _QUANTIZE,
}
CLASSES = {name: sentence for names, sentence in _CLASSES.items() for name in names.split()}


def absent_class(name: str, own: list[str]) -> str | None:
    """Returns a sentence about a class of diffusers that is not here, or a misspelt one of ours; None: it is neither.

    Args:
        name: of the class.
        own: ours.
    """
    if near := [] if name in CLASSES else get_close_matches(name, own, 1, 0.85):
        return f"did you mean {near[0]}?"
    family = "FluxPipeline is the pipeline, for models of the FLUX.1 family" if name.endswith("Pipeline") else None
    return CLASSES.get(name, family)


# Arguments of other tools, and what they are here: an argument, or a sentence.
_OPENING, _CALLING = "it is an argument of from_pretrained()", "it is an argument of the call: pipe(prompt, ...)"
_OTHERS = {
    "guidance cfg cfg_scale cfg_weight distilled_guidance": "guidance_scale",
    "steps step n_steps sample_steps sampling_steps inference_steps num_steps": "num_inference_steps",
    "n n_images num_images num_outputs batch_size batch_count": "num_images_per_prompt",
    "seeds random_seed manual_seed": "seed",
    "neg negative neg_prompt uncond": "negative_prompt",
    "init_image input_image image_path init_img img image_url reference reference_image": "image",
    "mask mask_path masked_image": "mask_image",
    "crop_to_mask": "padding_mask_crop",
    "no_paste": "paste",
    "references": "`image` takes a list of references, for FLUX.1 Kontext",
    "controlnet_image control_path": "control_image",
    "control_type control_kind preprocessor": "control",
    "_auto_resize": "auto_resize",
    "denoise denoising_strength": "strength",
    "image_strength": "`strength` is 1 minus it",
    "size resolution aspect_ratio": "give `width` and `height`",
    "w": "width",
    "h": "height",
    "max_tokens t5_length": "max_sequence_length",
    "callback callback_steps on_step": "callback_on_step_end",
    "quantize quantization bits nbits load_in_4bit load_in_8bit precision": _QUANTIZE,
    "lora loras lora_path lora_paths lora_weights": "pipe.load_lora_weights(FILE) loads one",
    "weight weights lora_scale lora_scales adapter_weights": "pipe.set_adapters(names, weights) sets an adapter's",
    "device device_id": "there is one device, the GPU that shares the memory: leave it out",
    "output output_path filename out format": "save the picture: result.images[0].save(FILE)",
    "sampler sampler_name": "solver",
    "scheduler_name noise_schedule": "schedule",
    "teacache step_cache cache_config": "cache",
    "go_fast": "fast",
    "low_ram": "memory",
    "path name folder repo_id": "model",
}
OTHERS = {name: meant for names, meant in _OTHERS.items() for name in names.split()}
ELSEWHERE = {
    **dict.fromkeys(("model", "dtype", "memory", "check", "torch_dtype"), _OPENING),
    **dict.fromkeys(
        (
            "prompt",
            "negative_prompt",
            "width",
            "height",
            "seed",
            "num_inference_steps",
            "guidance_scale",
            "image",
            "strength",
        ),
        _CALLING,
    ),
}


def meant_argument(name: str, own: list[str]) -> str:
    """Returns a sentence about an argument that does not exist, or "".

    Args:
        name: the argument.
        own: those of the function that was called.
    """
    lower = name.lower()
    words, other = set(lower.split("_")), OTHERS.get(lower, "")
    if other and not other.isidentifier():
        return other
    near = [other] if other in own else get_close_matches(lower, own, 1, 0.8)
    if not near and (elsewhere := ELSEWHERE.get(other or lower)):
        return elsewhere
    for several in ([one for one in own if words <= set(one.split("_"))], [one for one in own if one in words]):
        near = near or (several if len(several) == 1 else [])
    return f"did you mean `{near[0]}`?" if near else ""


def unknown_argument(function: str, name: str, own: list[str]) -> TypeError:
    """Returns Python's error for an argument that a function does not have, with the one that was meant.

    Args:
        function: its name, with parentheses.
        name: the argument.
        own: the arguments that it has.
    """
    meant = meant_argument(name, own)
    return TypeError(f"{function} got an unexpected keyword argument {name!r}{f': {meant}' if meant else ''}")


def take_known(
    where: Callable, given: Mapping[str, Any], table: Mapping[str, Argument], owner: str = "FluxPipeline"
) -> None:
    """Accepts arguments of diffusers, each with one log line, or refuses them.

    Args:
        where: the function.
        given: arguments that it does not have, by name.
        table: those that diffusers has.
        owner: class of the function, for errors.

    Raises:
        TypeError: a name that diffusers does not have either.
        UsageError: a value that would have an effect there.
    """
    for name, value in given.items():
        if name not in table:
            own = [one for one in inspect.signature(where).parameters if one not in ("self", "others")]
            raise unknown_argument(f"{owner}.{where.__name__}()", name, own)
        known = table[name]
        if value is None:
            continue
        if known.accepted and not known.accepted(value):
            raise refuse(name, known.sentence)
        tell(name, known.sentence)


_DTYPES = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}


def dtype_name(name: str, dtype: Any) -> str | None:
    """Returns MLX's name of a type: from a name, or a type of MLX, torch or numpy. None and "auto" are None.

    Args:
        name: of the argument, for errors.
        dtype: the value; diffusers' dict of types by component, if they are all one.
    """
    if isinstance(dtype, dict):
        names = {dtype_name(name, value) for value in dtype.values()}
        if len(names) != 1:
            raise UsageError(f"`{name}` holds {len(names)} types", "one for all components")
        return names.pop()
    if dtype is None or dtype == "auto":
        return None
    text = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", None) or str(dtype)
    text = text.rpartition(".")[2].lower()
    return _DTYPES.get(text, text)


def seed_of(generator: Any) -> int | list[int]:
    """Returns the seed of a torch generator, or seeds of a list of them; an int is a seed.

    Raises:
        UsageError: anything else.
    """
    if isinstance(generator, list | tuple):
        seeds = [seed_of(one) for one in generator]
        if any(isinstance(seed, list) for seed in seeds):
            raise UsageError("`generator` is a list of lists", "one generator for each image")
        return seeds  # type: ignore[return-value]  # none of them is a list
    if isinstance(generator, numbers.Integral) and not isinstance(generator, bool):
        return int(generator)
    if callable(getattr(generator, "initial_seed", None)):
        return int(generator.initial_seed())
    raise UsageError(f"`generator` is {type(generator).__name__}", "a torch.Generator, an int or a list", "pass `seed`")


GENERATOR = "its seed is used, and each call starts that stream anew, with the numbers of torch's CPU generator"


def given_seed(seed: int | Sequence[int] | None, generator: Any) -> int | Sequence[int] | None:
    """Returns the seed that a caller gave, as a number or as a generator of torch's."""
    if generator is None:
        return seed
    if seed is not None:
        raise UsageError("`seed` and `generator` are both given", "one of them")
    tell("generator", GENERATOR)
    return seed_of(generator)


def given_scale(kwargs: Any) -> float | None:
    """Returns the scale of adapters in diffusers' `joint_attention_kwargs`.

    Raises:
        UsageError: another argument, which would have an effect there.
    """
    if kwargs is None:
        return None
    if not isinstance(kwargs, dict) or {*kwargs} - {"scale"}:
        raise refuse("joint_attention_kwargs", "its `scale` is that of adapters, and the rest means nothing here")
    return kwargs.get("scale")


class Accepted:
    """A method of diffusers that has nothing to do here: logged once, with any arguments.

    Args:
        sentence: the reason.
    """

    def __init__(self, sentence: str):
        self.sentence, self.name = sentence, ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}() of diffusers, accepted: {self.sentence}>"

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Logs the sentence."""
        tell(f"{self.name}()", self.sentence)


class Refused(Accepted):
    """A method of diffusers that would do something which this program cannot do: an error with the next step."""

    def __repr__(self) -> str:
        return f"<{self.name}() of diffusers, refused: {self.sentence}>"

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Raises the error."""
        raise refuse(f"{self.name}()", self.sentence)


_ATTENTION = "attention is computed in one fused kernel"
_DECODING = "the image decoder works in strips or tiles where memory is short"


class DiffusersMethods:
    """Methods and attributes that scripts for diffusers use on a pipeline."""

    dtype: str

    enable_model_cpu_offload = Accepted(_MEMORY)
    enable_sequential_cpu_offload = Accepted(_MEMORY)
    enable_group_offload = Accepted(_MEMORY)
    maybe_free_model_hooks = Accepted(_MEMORY)
    remove_all_hooks = Accepted(_MEMORY)
    reset_device_map = Accepted(_MEMORY)
    enable_attention_slicing = Accepted(_ATTENTION)
    disable_attention_slicing = Accepted(_ATTENTION)
    set_attention_slice = Accepted(_ATTENTION)
    enable_xformers_memory_efficient_attention = Accepted(_ATTENTION)
    disable_xformers_memory_efficient_attention = Accepted(_ATTENTION)
    set_use_memory_efficient_attention_xformers = Accepted(_ATTENTION)
    fuse_qkv_projections = Accepted(_ATTENTION)
    unfuse_qkv_projections = Accepted(_ATTENTION)
    enable_vae_slicing = Accepted(_DECODING)
    disable_vae_slicing = Accepted(_DECODING)
    enable_vae_tiling = Accepted(_DECODING)
    disable_vae_tiling = Accepted(_DECODING)

    save_lora_weights = Refused("nothing is trained here; the file that was loaded is the adapter")
    enable_lora_hotswap = Accepted(_ADAPTERS_STAY)
    set_lora_device = Accepted(_MEMORY)
    load_ip_adapter = Refused(_NO_ADAPTERS)
    unload_ip_adapter = Refused(_NO_ADAPTERS)
    set_ip_adapter_scale = Refused(_NO_ADAPTERS)
    load_textual_inversion = Refused(_NO_ADAPTERS)
    unload_textual_inversion = Refused(_NO_ADAPTERS)

    from_single_file = Refused("convert the file once: flux-krea convert FILE; then name it in from_pretrained()")
    from_pipe = Refused("one pipeline takes texts and images: give it an `image`")
    from_config = Refused("name a model in from_pretrained()")
    download = Refused("fetch and convert it: flux-krea convert OWNER/NAME")
    save_pretrained = Refused("a model is a folder, `folder.path`; flux-krea convert makes others of it")
    push_to_hub = Refused("upload the folder, `folder.path`, with the hub's own tools, as its licence allows")
    register_modules = Refused(_COMPONENT)
    enable_freeu = Refused("FreeU is for networks with skip connections, and this is none")
    enable_cache = Refused(_CACHE)
    disable_cache = Accepted("no cache lasts from one call to the next")

    @property
    def device(self) -> str:
        """Torch's name for the place of generators and arrays that a call is given: memory is unified."""
        return "cpu"

    @property
    def _execution_device(self) -> str:
        return self.device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Returns the pipeline: there is one device.

        Raises:
            UsageError: a type other than the pipeline's, which is chosen when the model is opened.
        """
        for value in (*args, *kwargs.values()):
            name = None if value is None else dtype_name("dtype", value)
            if name in (*COMPUTE_TYPES, "float64") and name != self.dtype:
                raise UsageError(f"`to` is given the type {name}", self.dtype, f'open the model with `dtype` "{name}"')
        tell("to()", _MEMORY)
        return self

    if not TYPE_CHECKING:  # a misspelt name is an error for type checkers too

        def __getattr__(self, name: str) -> Any:
            """Raises AttributeError, with the next step for names of diffusers."""
            sentence = ABSENT.get(name)
            found = f"{type(self).__name__!r} object has no attribute {name!r}"
            raise AttributeError(f"{found}: {sentence}" if sentence else found)

        def __setattr__(self, name: str, value: Any) -> None:
            """Refuses to set what has an effect in diffusers and would have none here."""
            if name in ASSIGNED:
                raise refuse(name, ASSIGNED[name])
            object.__setattr__(self, name, value)


class NetworkMethods:
    """Methods that scripts for diffusers call on `pipe.transformer`."""

    to = Accepted(_MEMORY)
    enable_group_offload = Accepted(_MEMORY)
    requires_grad_ = Accepted("nothing is trained here")
    fuse_qkv_projections = Accepted(_ATTENTION)
    set_attn_processor = Refused("attention is computed in one way")
    set_attention_backend = Accepted(_ATTENTION)
    enable_cache = Refused(_CACHE)
    load_lora_adapter = Refused("load it into the pipeline: load_lora_weights()")


class VAEMethods(NetworkMethods):
    """Methods that scripts for diffusers call on `pipe.vae`."""

    enable_tiling = Accepted(_DECODING)
    disable_tiling = Accepted(_DECODING)
    enable_slicing = Accepted(_DECODING)
    disable_slicing = Accepted(_DECODING)


def as_scheduler(schedule: Schedule) -> SimpleNamespace:
    """Returns a schedule as scripts read it from `pipe.scheduler`: `config` has diffusers' names."""
    dynamic = schedule.shift == "dynamic"
    config = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": dynamic,
        "shift": 3.0 if dynamic else 1.0,
        "base_shift": schedule.base_shift,
        "max_shift": schedule.max_shift,
        "base_image_seq_len": schedule.base_image_seq_len,
        "max_image_seq_len": schedule.max_image_seq_len,
    }
    return SimpleNamespace(config=config)
