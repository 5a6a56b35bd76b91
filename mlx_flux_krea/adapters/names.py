"""The names of adapter files, as tables: which of our layers a tensor changes, and which part of the formula it is.

The name of a tensor is PREFIX, MODULE, FIELD. A prefix is any row of `PREFIXES`, with dots or underscores. A module has
its name in the transformer of Black Forest Labs (which is ours) or of diffusers, or in the text encoders; dots may be
underscores. A field is a row of `FIELDS`. So every trainer is read, in any mixture: kohya, PEFT, ComfyUI, ai-toolkit,
fal, XLabs, OneTrainer, SimpleTuner, LyCORIS, BFL's control adapters.

Facts: diffusers (loaders/lora_conversion_utils.py), ComfyUI (comfy/lora.py, comfy/utils.py), LyCORIS, PEFT.
"""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..models.config import ModelSizes
from ..weights import build, layer_shapes, parameters

PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "text_encoders.clip_l.transformer.",
    "text_encoders.t5xxl.transformer.",
    "text_encoder_2.",
    "text_encoder.",
    "transformer.",
    "lora_unet_",
    "lora_transformer_",
    "lora_te1_",
    "lora_te2_",
    "lora_te3_",
    "lora_te_",
    "lycoris_",
    "unet.",
)

# Endings of names, and the field of the formula. The adapter's own name may stand in them: lora_A.default.weight
FIELDS = (
    (r"\.(?:lora_down|lora_A|lora\.down|down)(?:\.\w+)?\.weight", "down"),
    (r"\.(?:lora_up|lora_B|lora\.up|up)(?:\.\w+)?\.weight", "up"),
    (r"\.(?:lora_up|lora_B)(?:\.\w+)?\.bias", "bias"),
    (r"\.alpha", "alpha"),
    (r"\.lora_magnitude_vector(?:\.\w+)??(?:\.weight)?", "magnitude"),
    (r"\.dora_scale", "dora_scale"),
    *((rf"\.hada_({name})(?:\.default)?", f"hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b")),
    *((rf"\.lokr_({name})(?:\.default)?", f"lokr_{name}") for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")),
    (r"\.diff", "diff"),
    (r"\.diff_b", "diff_b"),
    (r"\.(?:w_norm)", "diff"),
    (r"\.(?:b_norm)", "diff_b"),
    (r"\.set_weight", "set"),
    (r"\.reshape_weight", "reshape"),
)
_FIELDS = tuple((re.compile(rf"(.+?)(?:{pattern})"), field) for pattern, field in FIELDS)

# Styles that are known and not read: the names of their tensors, the name of the style, and the next step.
_ASK = "ask its maker for a LoRA of it, or merge it into a model with the tool that made it and convert that"
_WORDS = "use its words with a tool that reads them, or train a LoRA of the text encoders instead"
NOT_READ = (
    (r".+\.oft_(?:diag|r)(?:\..+)?", "OFT", _ASK),
    (r".+\.oft_(?:blocks|R)(?:\..+)?", "OFT or BOFT", _ASK),  # LyCORIS has one name for both
    (r".+\.boft_.+", "BOFT", _ASK),
    (r".+\.(?:hada_t[12]|lokr_t2|lora_mid|cp_mid|t[12])(?:\.(?:default|weight))*", "Tucker decomposition", _ASK),
    (r".+\.(?:[abc][12]|bm)\.weight", "GLoRA", _ASK),
    (r".+\.(?:ia3_l|on_input)(?:\..+)?", "(IA)3", _ASK),
    (r"(?:.+\.)?vera_(?:lambda_[bd]|[AB])(?:\..+)?", "VeRA", _ASK),
    (r".+\.lora_embedding_[AB](?:\..+)?", "embeddings of tokens", _WORDS),
    (r"emb_params|clip_[lg]|t5(?:xxl)?|text_encoders_\d|bundle_emb\..+|string_to_param\..+|<[^<>]+>",
     "textual inversion", _WORDS),
)  # fmt: skip

# Modules of diffusers' transformer that have other names here. Several names are row ranges of one fused layer.
_D, _S = "transformer_blocks.{n}", "single_transformer_blocks.{n}"
_DOUBLE, _SINGLE = "double_blocks.{n}", "single_blocks.{n}"
DIFFUSERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("img_in", ("x_embedder",)),
    ("txt_in", ("context_embedder",)),
    ("time_in.in_layer", ("time_text_embed.timestep_embedder.linear_1",)),
    ("time_in.out_layer", ("time_text_embed.timestep_embedder.linear_2",)),
    ("vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",)),
    ("vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",)),
    ("guidance_in.in_layer", ("time_text_embed.guidance_embedder.linear_1",)),
    ("guidance_in.out_layer", ("time_text_embed.guidance_embedder.linear_2",)),
    (f"{_DOUBLE}.img_mod.lin", (f"{_D}.norm1.linear",)),
    (f"{_DOUBLE}.img_attn.qkv", (f"{_D}.attn.to_q", f"{_D}.attn.to_k", f"{_D}.attn.to_v")),
    (f"{_DOUBLE}.img_attn.proj", (f"{_D}.attn.to_out.0",)),
    (f"{_DOUBLE}.img_mlp.0", (f"{_D}.ff.net.0.proj",)),
    (f"{_DOUBLE}.img_mlp.2", (f"{_D}.ff.net.2",)),
    (f"{_DOUBLE}.txt_mod.lin", (f"{_D}.norm1_context.linear",)),
    (f"{_DOUBLE}.txt_attn.qkv", (f"{_D}.attn.add_q_proj", f"{_D}.attn.add_k_proj", f"{_D}.attn.add_v_proj")),
    (f"{_DOUBLE}.txt_attn.proj", (f"{_D}.attn.to_add_out",)),
    (f"{_DOUBLE}.txt_mlp.0", (f"{_D}.ff_context.net.0.proj",)),
    (f"{_DOUBLE}.txt_mlp.2", (f"{_D}.ff_context.net.2",)),
    (f"{_SINGLE}.modulation.lin", (f"{_S}.norm.linear",)),
    (f"{_SINGLE}.linear1", (f"{_S}.attn.to_q", f"{_S}.attn.to_k", f"{_S}.attn.to_v", f"{_S}.proj_mlp")),
    (f"{_SINGLE}.linear2", (f"{_S}.proj_out",)),
    ("final_layer.linear", ("proj_out",)),
    # mflux writes two modules of diffusers' by names of its own
    (f"{_DOUBLE}.img_mlp.0", (f"{_D}.ff.linear1",)),
    (f"{_DOUBLE}.img_mlp.2", (f"{_D}.ff.linear2",)),
    (f"{_DOUBLE}.txt_mlp.0", (f"{_D}.ff_context.linear1",)),
    (f"{_DOUBLE}.txt_mlp.2", (f"{_D}.ff_context.linear2",)),
    # XLabs: 1 is the image, 2 the text
    (f"{_DOUBLE}.img_attn.qkv", (f"{_DOUBLE}.processor.qkv_lora1",)),
    (f"{_DOUBLE}.img_attn.proj", (f"{_DOUBLE}.processor.proj_lora1",)),
    (f"{_DOUBLE}.txt_attn.qkv", (f"{_DOUBLE}.processor.qkv_lora2",)),
    (f"{_DOUBLE}.txt_attn.proj", (f"{_DOUBLE}.processor.proj_lora2",)),
    (f"{_SINGLE}.linear2", (f"{_SINGLE}.processor.proj_lora",)),
)
# Names of the rows of q, k and v of a layer that holds more: XLabs, and ComfyUI's form of its files.
QKV_OF_LINEAR1 = (f"{_SINGLE}.processor.qkv_lora", f"{_SINGLE}.linear1_qkv")
# shift, scale in our file and in BFL's; scale, shift in diffusers'
SWAPPED = ("final_layer.adaLN_modulation.1", "norm_out.linear")
NORMS = (
    (f"{_DOUBLE}.img_attn.norm.query_norm.scale", f"{_D}.attn.norm_q"),
    (f"{_DOUBLE}.img_attn.norm.key_norm.scale", f"{_D}.attn.norm_k"),
    (f"{_DOUBLE}.txt_attn.norm.query_norm.scale", f"{_D}.attn.norm_added_q"),
    (f"{_DOUBLE}.txt_attn.norm.key_norm.scale", f"{_D}.attn.norm_added_k"),
    (f"{_SINGLE}.norm.query_norm.scale", f"{_S}.attn.norm_q"),
    (f"{_SINGLE}.norm.key_norm.scale", f"{_S}.attn.norm_k"),
)

# Other models, by parts of names that FLUX.1 does not have; the first row that is found counts.
OTHER_MODELS = (
    (r"txtfusion|text_fusion|(?:^|\.)tmlp\.|txtmlp", "Krea 2"),
    (r"double_stream_modulation|to_qkv_mlp_proj|\.attn\.to_added_qkv|ff\.linear_in", "FLUX.2"),
    (r"transformer_blocks[._]\d+[._](?:img|txt)_(?:mlp|mod)[._]", "Qwen-Image"),
    (r"joint_blocks|context_block|pos_embed_input|transformer_blocks[._]\d+[._]attn2?[._]to_q.*norm1_context_2", "SD3"),
    (r"te2[._]text_model|add_embedding|label_emb|text_encoder_2[._]text_model", "SDXL"),
    (r"down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block", "Stable Diffusion 1, 2 or XL"),
    (r"noise_refiner|context_refiner|cap_embedder", "Z-Image or Lumina"),
    (r"individual_token_refiner|(?:img|txt)_mlp[._]fc[12]|blocks\.\d+\.(?:img|txt)_attn_", "HunyuanVideo"),
    (r"blocks[._]\d+[._](?:self_attn|cross_attn)[._]", "Wan"),
)


_TOKENS = ("transformer", "img_in")


@dataclass(frozen=True)
class AdapterTarget:
    """A layer, a range of its output rows, or a vector (of a norm).

    Attributes:
        component: the network's folder.
        path: of the layer or the vector.
        start: first output row.
        stop: row after the last.
        width: inputs of the layer; 0 of a vector.
        swapped: the halves of the rows stand in the other order in the file.
        latents: of the layer that reads tokens, the inputs that are latents, which come first; 0 of all others.
    """

    component: str
    path: str
    start: int
    stop: int
    width: int
    swapped: bool = False
    latents: int = 0

    @property
    def widths(self) -> tuple[int, ...]:
        """Inputs that a low-rank change may have.

        Of the layer that reads tokens, a model without a condition also takes BFL's control adapters, which read a
        map beside the latents, and a model with one takes adapters for models without: they read the latents alone.
        """
        if not self.latents:
            return (self.width,)
        return (self.width, 2 * self.latents if self.width == self.latents else self.latents)

    @property
    def rows(self) -> int:
        """Number of output rows."""
        return self.stop - self.start


@functools.cache
def targets(sizes: ModelSizes) -> dict[str, AdapterTarget]:
    """Returns everything in a model's networks that an adapter can change, by its names, with dots and without."""
    found: dict[str, AdapterTarget] = {}
    for component in ("transformer", "text_encoder", "text_encoder_2"):
        config = sizes.by_component()[component]
        shapes = layer_shapes(component, config)
        for path, (rows, width) in shapes.items():
            target = AdapterTarget(component, path, 0, rows, width)
            names = {path, path.removeprefix("text_model.")} if component == "text_encoder" else {path}
            found |= dict.fromkeys(names, target)
        for path, array in parameters(build(component, config)).items():
            owner, _, leaf = path.rpartition(".")
            if array.ndim == 1 and owner not in shapes and leaf in ("weight", "scale"):
                found |= dict.fromkeys((owner, path), AdapterTarget(component, path, 0, array.size, 0))
    found |= _of_transformer(sizes, layer_shapes("transformer", sizes.flux))
    tokens = replace(found["img_in"], latents=sizes.flux.out_channels)
    found |= {name: tokens for name, target in found.items() if (target.component, target.path) == _TOKENS}
    return found | {name.replace(".", "_"): target for name, target in found.items()}


def _of_transformer(sizes: ModelSizes, shapes: dict[str, tuple[int, int]]) -> dict[str, AdapterTarget]:
    """Returns the names of the transformer's layers that are not ours."""
    found, dim = {}, sizes.flux.hidden_size
    for path, (rows, width) in shapes.items():
        template, number = _template(path)
        for ours, theirs in DIFFUSERS:
            if ours != template:
                continue
            starts = [0, *(dim * i for i in range(1, len(theirs)))]
            for name, start, stop in zip(theirs, starts, [*starts[1:], rows], strict=True):
                found[name.format(n=number)] = AdapterTarget("transformer", path, start, stop, width)
        if template == f"{_SINGLE}.linear1":
            target = AdapterTarget("transformer", path, 0, 3 * dim, width)
            found |= {name.format(n=number): target for name in QKV_OF_LINEAR1}
        if path == SWAPPED[0]:
            found[SWAPPED[1]] = AdapterTarget("transformer", path, 0, rows, width, swapped=True)
    blocks = (("double_blocks", sizes.flux.depth), ("single_blocks", sizes.flux.depth_single_blocks))
    for ours, theirs in NORMS:
        count = dict(blocks)[ours.partition(".")[0]]
        for n in range(count):
            target = AdapterTarget("transformer", ours.format(n=n), 0, sizes.flux.head_dim, 0)
            found[theirs.format(n=n)] = target
    return found


def _template(path: str) -> tuple[str, str]:
    """Returns a path with {n} for the number of its block, and that number."""
    match = re.match(r"((?:double|single)_blocks)\.(\d+)\.(.*)", path)
    return (f"{match[1]}.{{n}}.{match[3]}", match[2]) if match else (path, "")


def split(name: str) -> tuple[str, str] | None:
    """Splits a tensor's name into the module, its prefixes taken off, and the field; None: it is of no known form."""
    for pattern, field in _FIELDS:
        if match := pattern.fullmatch(name):
            return bare(match[1]), field
    if match := re.fullmatch(r"(.+)\.(?:scale|weight)", name):  # of a norm, as BFL's control adapters have it
        return (bare(match[1]), "set") if re.search(r"norm(?:_added)?(?:_[qk])?$", match[1]) else None
    return None


def bare(module: str) -> str:
    """Returns a module's name without what trainers put before it."""
    while prefix := next((prefix for prefix in PREFIXES if module.startswith(prefix)), None):
        module = module.removeprefix(prefix)
    return module


def unread_style(name: str) -> tuple[str, str] | None:
    """Returns the style of a tensor that is known and not read, and the next step; None: it is of no such style."""
    return next(((style, todo) for pattern, style, todo in NOT_READ if re.fullmatch(pattern, name)), None)


def other_model(names: Iterable[str]) -> str | None:
    """Returns the model that names belong to, if it is another one than FLUX.1 and its names show it."""
    text = "\n".join(names)
    return next((model for pattern, model in OTHER_MODELS if re.search(pattern, text)), None)


def deeper(modules: Iterable[str], sizes: ModelSizes) -> str | None:
    """Returns a sentence about names that go on with the block after this transformer's last one, or None."""
    single, double = sizes.flux.depth_single_blocks, sizes.flux.depth
    depths = {"double": double, "transformer": double, "single": single, "single_transformer": single}
    for module in modules:
        match = re.match(r"((?:single_)?transformer|double|single)_blocks[._](\d{1,6})[._]", module)
        if match and int(match[2]) == depths[match[1]]:
            return f"it goes on to block {match[2]} of {match[1]}_blocks, and this model has {depths[match[1]]}"
    return None
