"""The known layouts: what identifies them, which table names their tensors, and where their sizes come from.

Look-alikes are rows too, refused by name. A new layout is a row here and a table in `maps.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache

from mlx.utils import tree_flatten

from mlx_flux_krea import config as configs
from mlx_flux_krea.config import CLIPConfig, T5Config, VAEConfig
from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.weights import COMPONENTS, build

from . import maps
from .remap import Misfit, Plan, plan
from .sources import STORED, Source, Tensor

# Every prefix that published single files put in front of their names.
PREFIXES = (
    "", "model.diffusion_model.", "diffusion_model.", "vae.",
    "text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer.",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """One way to name the tensors of one component."""

    name: str
    component: str
    probe: tuple[str, ...]  # tensors that only this layout has together
    table: tuple
    dropped: tuple = ()
    convert_config: Callable[[dict, str], dict] | None = None  # our sizes from this layout's config.json and its name
    config_kinds: tuple[str, ...] = ()  # what such a config.json says that it is of, in `_class_name` or `model_type`


@dataclass(frozen=True)
class Found:
    """A layout found in a source."""

    source: Source
    layout: Layout
    tensors: dict[str, Tensor]  # prefix taken off


def require(obj: dict, where: str, todo: str = "this is another network", **expected) -> None:
    """Fields that would change the computation must have the value, or one of the values, that ours is written for.

    Raises:
        ModelError: another value; a field that is not there is no problem.
    """
    for name, value in expected.items():
        values = value if isinstance(value, tuple) else (value,)
        if name in obj and obj[name] not in values:
            raise ModelError(f"{where}: {name} is {_short(obj[name])}", " or ".join(map(repr, values)), todo)


# Kinds of fields that are computed with here: a test, and what it asks for. `configs.from_json` checks all others.
_KINDS = {
    int: (lambda v: type(v) is int and 0 < v <= 65536, "a number from 1 to 65536"),
    float: (lambda v: type(v) in (int, float) and -1e9 <= v <= 1e9, "a number"),
    bool: (lambda v: type(v) is bool, "true or false"),
    list: (lambda v: type(v) is list and 0 < len(v) <= 16 and all(map(_KINDS[int][0], v)), "a list of sizes"),
}


def _read(obj: dict, where: str, **kinds: type) -> dict:
    """The fields named, each of its kind.

    Raises:
        ModelError: a field missing or of another kind.
    """
    for name, kind in kinds.items():
        fits, expected = _KINDS[kind]
        if name not in obj:
            raise ModelError(f"{where} lacks {name!r}", f"the fields {', '.join(kinds)}")
        if not fits(obj[name]):
            raise ModelError(f"{where}: {name} is {_short(obj[name])}", expected)
    return {name: obj[name] for name in kinds}


def _short(value) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _diffusers_flux(obj: dict, where: str) -> dict:
    require(obj, where, patch_size=1)
    if obj.get("out_channels") is None:
        obj = obj | {"out_channels": obj.get("in_channels")}
    obj = {"axes_dims_rope": [16, 56, 56]} | obj  # the published config leaves it out
    obj = _read(
        obj, where, num_attention_heads=int, attention_head_dim=int, in_channels=int, out_channels=int,
        pooled_projection_dim=int, joint_attention_dim=int, num_layers=int, num_single_layers=int,
        axes_dims_rope=list, guidance_embeds=bool,
    )  # fmt: skip
    heads, width = obj["num_attention_heads"], obj["attention_head_dim"]
    return {
        "in_channels": obj["in_channels"],
        "out_channels": obj["out_channels"],
        "vec_in_dim": obj["pooled_projection_dim"],
        "context_in_dim": obj["joint_attention_dim"],
        "hidden_size": heads * width,
        "mlp_ratio": 4.0,
        "num_heads": heads,
        "depth": obj["num_layers"],
        "depth_single_blocks": obj["num_single_layers"],
        "axes_dim": obj["axes_dims_rope"],
        "theta": 10_000,
        "guidance_embed": obj["guidance_embeds"],
    }


def _diffusers_vae(obj: dict, where: str) -> dict:
    require(
        obj, where, act_fn="silu", use_quant_conv=False, use_post_quant_conv=False,
        mid_block_add_attention=True, latents_mean=None, latents_std=None,
    )  # fmt: skip
    obj = _read(
        obj, where, in_channels=int, out_channels=int, block_out_channels=list, layers_per_block=int,
        latent_channels=int, norm_num_groups=int, scaling_factor=float, shift_factor=float,
    )  # fmt: skip
    widths = obj["block_out_channels"]
    if any(width % widths[0] for width in widths):
        raise ModelError(f"{where}: block_out_channels is {_short(widths)}", "multiples of the first")
    return {
        "in_channels": obj["in_channels"],
        "out_ch": obj["out_channels"],
        "ch": widths[0],
        "ch_mult": [w // widths[0] for w in widths],
        "num_res_blocks": obj["layers_per_block"],
        "z_channels": obj["latent_channels"],
        "norm_num_groups": obj["norm_num_groups"],
        "scale_factor": obj["scaling_factor"],
        "shift_factor": obj["shift_factor"],
    }


def _transformers_clip(obj: dict, where: str) -> dict:
    require(obj, where, hidden_act="quick_gelu")
    return {f.name: obj[f.name] for f in fields(CLIPConfig) if f.name in obj}


# the tanh form of GELU, as transformers calls it; "gated-gelu" alone means it too
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")


def _transformers_t5(obj: dict, where: str) -> dict:
    gated = ("gated-gelu", *(f"gated-{name}" for name in _TANH_GELU))
    require(obj, where, feed_forward_proj=gated, dense_act_fn=_TANH_GELU)
    obj = {"relative_attention_max_distance": 128} | obj  # younger than some configs
    return {f.name: obj[f.name] for f in fields(T5Config) if f.name in obj}


LAYOUTS = (
    Layout(
        "transformer, Black Forest Labs", "transformer",
        ("double_blocks.0.img_attn.norm.query_norm.scale", "single_blocks.0.linear1.weight"),
        maps.FLUX_BFL,
    ),
    Layout(
        "transformer, Black Forest Labs names with norm weights", "transformer",
        ("double_blocks.0.img_attn.norm.query_norm.weight", "single_blocks.0.linear1.weight"),
        maps.FLUX_BFL_NORM_WEIGHT,
    ),
    Layout(
        "transformer, diffusers", "transformer",
        ("transformer_blocks.0.attn.norm_added_q.weight", "transformer_blocks.0.ff.net.0.proj.weight",
         "single_transformer_blocks.0.proj_mlp.weight"),
        maps.FLUX_DIFFUSERS, (), _diffusers_flux, ("FluxTransformer2DModel",),
    ),
    Layout(
        "VAE, Black Forest Labs", "vae",
        ("encoder.down.0.block.0.conv1.weight", "decoder.mid.attn_1.q.weight"),
        maps.VAE_BFL,
    ),
    Layout(
        "VAE, diffusers", "vae",
        ("encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.mid_block.attentions.0.to_q.weight"),
        maps.VAE_DIFFUSERS, (), _diffusers_vae, ("AutoencoderKL",),
    ),
    Layout(
        "CLIP text model", "text_encoder",
        ("text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.weight"),
        maps.CLIP, maps.CLIP_DROPPED, _transformers_clip, ("clip_text_model", "clip"),
    ),
    Layout(
        "CLIP text model, transformers 5", "text_encoder",
        ("embeddings.token_embedding.weight", "final_layer_norm.weight"),
        maps.CLIP_TRANSFORMERS_5, maps.CLIP_DROPPED, _transformers_clip, ("clip_text_model", "clip"),
    ),
    Layout(
        "T5 v1.1 encoder", "text_encoder_2",
        ("shared.weight", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"),
        maps.T5, maps.T5_DROPPED, _transformers_t5, ("t5",),
    ),
)  # fmt: skip

# (a part of a tensor name that gives it away, what it is): other models that people have in the same folders
LOOK_ALIKES = (
    ("distilled_guidance_layer.", "Chroma"),
    ("double_stream_modulation_img.", "FLUX.2"),
    ("redux_up.", "FLUX.1 Redux"),
    ("joint_blocks.0.", "Stable Diffusion 3"),
    ("input_blocks.0.", "Stable Diffusion 1, 2 or XL"),
    (".lora_A.", "a LoRA"),
    (".lora_down.", "a LoRA"),
    ("lora_unet_", "a LoRA"),
    (".absmax", "a bitsandbytes NF4 file"),
    (".qweight", "a Nunchaku SVDQuant file"),
    ("scaled_fp8", "a scaled fp8 file"),
    (".scale_weight", "a scaled fp8 file"),
    (".weight_scale", "a scaled fp8 file"),
    (".comfy_quant", "a scaled fp8 file"),
)
# the same by the shape of what reads the latents: they take a picture or a mask beside them, which is not known here
_WIDER = {(3072, 384): "FLUX.1 Fill", (3072, 128): "FLUX.1 Canny or Depth"}


_WANTED = "FLUX.1 Krea [dev] or one of its kin, in 16 or 32 bits"


def identify(source: Source) -> Found:
    """The layout of a source, from its names alone.

    Raises:
        ModelError: another model (named, where it is known), or a network of another kind than its folder says.
    """
    for fragment, model in LOOK_ALIKES:
        if any(fragment in name for name in source.tensors):
            raise ModelError(f"{source.path} is {model}", _WANTED)
    for prefix in PREFIXES:
        tensors = {n[len(prefix) :]: t for n, t in source.tensors.items() if n.startswith(prefix)}
        for layout in LAYOUTS:
            if all(name in tensors for name in layout.probe):
                if len(tensors) < len(source.tensors):
                    other = next(n for n in source.tensors if not n.startswith(prefix))
                    raise ModelError(f"{source.path} holds more than a {layout.name} ({other})", "one component")
                if source.component not in (None, layout.component):
                    raise ModelError(f"{source.path} holds a {layout.name}", f"a {source.component}")
                for name in ("img_in.weight", "x_embedder.weight"):
                    if name in tensors and tensors[name].shape in _WIDER:
                        raise ModelError(f"{source.path} is {_WIDER[tensors[name].shape]}", _WANTED)
                return Found(source, layout, tensors)
    first = ", ".join(sorted(source.tensors)[:3])
    raise ModelError(
        f"{source.path} is no layout that is known here (it holds {first})", todo="see flux-krea convert --help"
    )


@cache
def target_shapes(component: str, config) -> dict[str, tuple[int, ...]]:
    """Our tensors of a component in the order of its modules, with MLX's axes."""
    return {name: tuple(array.shape) for name, array in tree_flatten(build(component, config).parameters())}


def make_plan(found: Found) -> tuple[object, Plan]:
    """Sizes and the complete mapping of a component.

    Sizes come from the layout's own config.json; where it has none (single files, beside whatever else), from the
    published config with these shapes; else from a config.json beside the file, ours, in BFL's form or the layout's.

    Raises:
        ModelError: sizes unknown, or tensors missing, left over, of another shape or of a type that cannot be decoded.
    """
    config, made = _fit(found)
    for tensor in (t for target in made.targets for t in target.sources):
        if tensor.dtype not in STORED:
            known = ", ".join(STORED)
            raise ModelError(f"{tensor.path}: {tensor.name} is stored as {tensor.dtype}", f"one of {known}")
    return config, made


def _fit(found: Found) -> tuple[object, Plan]:
    component, layout = found.layout.component, found.layout
    where = str(found.source.path)
    beside, file = found.source.config(), f"{found.source.folder / 'config.json'}"
    named = found.source.component
    own = beside is not None and layout.convert_config and (named or not _is_ours(beside, component))
    if not (own and (named or _kind(beside) in layout.config_kinds)):
        refused: list[Misfit] = []
        for config in _PUBLISHED[component]:
            try:
                return config, _plan(found, config)
            except Misfit as error:
                refused.append(error)
        nearest = min(refused, key=lambda error: len(error.problems))
        if beside is None and nearest.same_sizes:
            raise nearest
        if beside is None:
            raise ModelError(
                f"{where} has other sizes than the published {layout.name} ({nearest.found})",
                "a config.json beside it with heads and other sizes that shapes do not tell",
            )
    sizes = layout.convert_config(beside, file) if own else _beside(beside, component, file)
    config = configs.from_json(COMPONENTS[component][0], sizes, file)
    return config, _plan(found, config)


_PUBLISHED = {
    "transformer": (configs.FLUX_DEV, configs.FLUX_SCHNELL),
    "text_encoder": (configs.CLIP_L,),
    "text_encoder_2": (configs.T5_XXL,),
    "vae": (configs.FLUX_VAE,),
}
# sections of a config.json in BFL's form, and fields of it that must have these values or do not matter
_BFL_SECTIONS = {"transformer": "flux", "text_encoder": "clip", "text_encoder_2": "t5", "vae": "ae"}
_BFL_FIXED = {
    "transformer": {"qkv_bias": True},
    "text_encoder": {"hidden_act": "quick_gelu"},
    "text_encoder_2": {"feed_forward": "gated gelu (tanh form)"},
    "vae": {},
}


def _plan(found: Found, config) -> Plan:
    last = len(config.ch_mult) - 1 if isinstance(config, VAEConfig) else 0
    shapes = target_shapes(found.layout.component, config)
    return plan(found.tensors, found.layout.table, found.layout.dropped, shapes, last, str(found.source.path))


def _kind(obj: dict):
    return obj.get("_class_name", obj.get("model_type"))


def _is_ours(obj: dict, component: str) -> bool:
    return _BFL_SECTIONS[component] in obj or obj.keys() <= {
        "dtype",
        *(f.name for f in fields(COMPONENTS[component][0])),
    }


def _beside(obj: dict, component: str, where: str) -> dict:
    """Our sizes from a config.json beside a single file: ours, or in the form of BFL's parameter classes."""
    section = _BFL_SECTIONS[component]
    if section in obj and isinstance(obj[section], dict):
        sizes = dict(obj[section])
        require(sizes, where, **_BFL_FIXED[component])
        for name in (*_BFL_FIXED[component], "resolution"):
            sizes.pop(name, None)
        if component == "vae" and "ae_norm_num_groups" in obj:
            sizes["norm_num_groups"] = obj["ae_norm_num_groups"]
        return sizes
    return {k: v for k, v in obj.items() if k != "dtype"}
