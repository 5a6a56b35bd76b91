"""The known layouts: what identifies them, which table names their tensors, and where their sizes come from.

Look-alikes are rows too, refused by name. A new layout is a row here and a table in `maps.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache

from mlx.utils import tree_flatten

from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.files import read_json
from mlx_flux_krea.models import config as configs
from mlx_flux_krea.models.config import VAEConfig
from mlx_flux_krea.models.filter_config import NSFW_VIT, PIXTRAL_12B, PixtralConfig
from mlx_flux_krea.weights import FILTERS, NETWORKS, Sizes, build, parameters

from . import decode, maps, sizes
from .remap import Misfit, Plan, plan
from .sizes import require, short
from .sources import Source, Tensor

# What published files put in front of the names of a component; in an all-in-one file each component has its own. Of
# the text encoders some tensors lie beside the network, as `text_encoders.clip_l.logit_scale`.
PREFIXES = (
    ("model.diffusion_model.", ""), ("diffusion_model.", ""), ("vae.", ""),
    ("text_encoders.clip_l.", "transformer."), ("text_encoders.t5xxl.", "transformer."),
    ("", ""),
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """One way to name the tensors of one component."""

    name: str
    component: str
    probe: tuple[str, ...]  # tensors that only this layout has together
    table: tuple
    dropped: tuple = ()
    lost: tuple = ()
    convert_config: Callable[[dict, str], dict] | None = None  # our sizes from this layout's config.json and its name
    config_kinds: tuple[str, ...] = ()  # what such a config.json says that it is of, in `_class_name` or `model_type`
    preprocessing: Callable[[object], dict] | None = None  # what preprocessor_config.json must say, if it is there


@dataclass(frozen=True)
class Found:
    """A layout found in a source."""

    source: Source
    layout: Layout
    tensors: dict[str, Tensor]  # prefix taken off


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
        maps.FLUX_DIFFUSERS, (), (), sizes.diffusers_flux, ("FluxTransformer2DModel",),
    ),
    Layout(
        "transformer, mflux", "transformer",
        ("transformer_blocks.0.attn.norm_added_q.weight", "transformer_blocks.0.ff.linear1.weight",
         "single_transformer_blocks.0.proj_mlp.weight"),
        maps.FLUX_MFLUX, (), maps.FLUX_MFLUX_LOST,
    ),
    Layout(
        "VAE, Black Forest Labs", "vae",
        ("encoder.down.0.block.0.conv1.weight", "decoder.mid.attn_1.q.weight"),
        maps.VAE_BFL,
    ),
    Layout(
        "VAE, diffusers", "vae",
        ("encoder.conv_in.weight", "decoder.mid_block.attentions.0.to_q.weight"),
        maps.VAE_DIFFUSERS, (), (), sizes.diffusers_vae, ("AutoencoderKL",),
    ),
    Layout(
        "VAE, mflux", "vae",
        ("encoder.conv_in.conv2d.weight", "decoder.mid_block.attentions.0.to_q.weight"),
        maps.VAE_MFLUX,
    ),
    Layout(
        "CLIP text model", "text_encoder",
        ("text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.weight"),
        maps.CLIP, maps.CLIP_DROPPED, (), sizes.transformers_clip, ("clip_text_model", "clip"),
    ),
    Layout(
        "CLIP text model, transformers 5", "text_encoder",
        ("embeddings.token_embedding.weight", "final_layer_norm.weight"),
        maps.CLIP_TRANSFORMERS_5, maps.CLIP_DROPPED, (), sizes.transformers_clip, ("clip_text_model", "clip"),
    ),
    Layout(
        "T5 v1.1 encoder", "text_encoder_2",
        ("shared.weight", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"),
        maps.T5, maps.T5_DROPPED, (), sizes.transformers_t5, ("t5",),
    ),
    Layout(
        "T5 v1.1 encoder, mflux", "text_encoder_2",
        ("shared.weight", "t5_blocks.0.ff.DenseReluDense.wi_0.weight"),
        maps.T5_MFLUX, maps.T5_MFLUX_DROPPED,
    ),
    Layout(
        "T5 v1.1 encoder, llama.cpp", "text_encoder_2",
        ("token_embd.weight", "enc.blk.0.ffn_gate.weight"),
        maps.T5_GGUF,
    ),
    Layout(
        "classifier ViT", "nsfw",
        ("vit.embeddings.cls_token", "vit.encoder.layer.0.attention.attention.query.weight", "classifier.weight"),
        maps.VIT, (), (), sizes.transformers_vit, ("vit",), sizes.vit_preprocessing,
    ),
    Layout(
        "classifier ViT, transformers 5", "nsfw",
        ("vit.embeddings.cls_token", "vit.layers.0.attention.q_proj.weight", "classifier.weight"),
        maps.VIT_TRANSFORMERS_5, (), (), sizes.transformers_vit, ("vit",), sizes.vit_preprocessing,
    ),
    Layout(
        "Pixtral", "pixtral",
        ("language_model.model.embed_tokens.weight", "vision_tower.patch_conv.weight"),
        maps.PIXTRAL, (), (), sizes.transformers_pixtral, ("llava",), sizes.pixtral_preprocessing,
    ),
    Layout(
        "Pixtral, transformers 5", "pixtral",
        ("model.language_model.embed_tokens.weight", "model.vision_tower.patch_conv.weight"),
        maps.PIXTRAL_TRANSFORMERS_5, (), (), sizes.transformers_pixtral, ("llava",), sizes.pixtral_preprocessing,
    ),
    Layout(
        "Pixtral, mlx-vlm", "pixtral",
        ("language_model.model.embed_tokens.weight", "vision_tower.vision_model.patch_conv.weight"),
        maps.PIXTRAL_MLX, (), (), sizes.transformers_pixtral, ("llava", "pixtral"), sizes.pixtral_preprocessing,
    ),
)  # fmt: skip

# (a part of a tensor name that gives it away, what it is): other things that people have in the same folders
LOOK_ALIKES = (
    ("lora_", "a LoRA"),  # lora_A, lora_down, lora_unet_
    (".lora.", "a LoRA"),
    ("_lora.", "a LoRA"),  # XLabs
    ("_lora1.", "a LoRA"),
    (".lokr_w", "a LoRA (LoKr)"),
    (".hada_w", "a LoRA (LoHa)"),
    ("distilled_guidance_layer.", "Chroma"),
    ("double_stream_modulation_img.", "FLUX.2"),
    ("txtfusion.", "Krea 2"),  # as Krea names it
    ("text_fusion.", "Krea 2"),  # as diffusers does
    ("redux_up.", "FLUX.1 Redux"),
    ("joint_blocks.0.", "Stable Diffusion 3"),
    ("pos_embed.proj.", "Stable Diffusion 3"),
    ("input_blocks.0.", "Stable Diffusion 1, 2 or XL"),
    ("add_embedding.linear_1.", "Stable Diffusion XL"),
    ("conditioner.embedders.", "Stable Diffusion XL"),
    ("controlnet_blocks.", "a ControlNet"),
    ("vision_model.encoder.", "an encoder of pictures (SigLIP or CLIP)"),
    ("vision_language_adapter.", "Pixtral in Mistral's own names, whose rows are in another order"),
    ("bitsandbytes__", "a bitsandbytes NF4 or FP4 file"),
    (".absmax", "a bitsandbytes NF4 or FP4 file"),
    (".qweight", "a Nunchaku SVDQuant file"),
    (".wscales", "a Nunchaku SVDQuant file"),
)
# the same by the type of a tensor
_REFUSED_TYPES = {"F8_E5M2": "an fp8 file of the kind e5m2, whose weights have two bits of precision"}
# the same by the shape of what reads the latents: they take a picture or a mask beside them, which is not known here
_WIDER = {(3072, 384): "FLUX.1 Fill", (3072, 128): "FLUX.1 Canny or Depth"}


_WANTED = "FLUX.1 Krea [dev] or one of its kin, in e4m3, GGUF, MLX's quantization, or 16 or 32 bits"


def identify(source: Source) -> tuple[Found, ...]:
    """What is in a source, from names, types and shapes alone: one component, or those of an all-in-one file.

    Raises:
        ModelError: another model (named, where it is known), or a network of another kind than its folder says.
    """
    for fragment, model in LOOK_ALIKES:
        if any(fragment in name for name in source.tensors):
            raise ModelError(f"{source.path} is {model}", _WANTED)
    for tensor in source.tensors.values():
        if tensor.dtype in _REFUSED_TYPES:
            raise ModelError(f"{source.path} is {_REFUSED_TYPES[tensor.dtype]} ({tensor.name})", _WANTED)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in source.tensors.items():
        prefix, inner = next(p for p in PREFIXES if name.startswith(p[0]))
        bare = name.removeprefix(prefix).removeprefix(inner)
        if bare in parts.setdefault(prefix, {}):
            raise ModelError(f"{source.path} holds {bare} twice, as {name} too", "every tensor once")
        parts[prefix][bare] = tensor
    found = [(prefix, layout, tensors) for prefix, tensors in parts.items() if (layout := _layout(tensors))]
    if not found:
        first = ", ".join(sorted(source.tensors)[:3])
        says = source.metadata.get("general.architecture")
        kind = f"says that it is {short(says)}, and " if says else ""
        raise ModelError(
            f"{source.path} is no layout that is known here (it {kind}holds {first})",
            todo="see flux-krea convert --help",
        )
    for prefix, tensors in parts.items():
        if prefix not in [p for p, *_ in found]:
            what = f"a {found[0][1].name}" if len(found) == 1 else "the components of FLUX.1"
            other = next(iter(tensors.values())).name
            raise ModelError(f"{source.path} holds more than {what} ({other})", "one model, and nothing else")
    for _, layout, tensors in found:
        if source.component not in (None, layout.component):
            raise ModelError(f"{source.path} holds a {layout.name}", f"a {source.component}")
        for name in ("img_in.weight", "x_embedder.weight"):
            if name in tensors and tensors[name].shape in _WIDER:
                raise ModelError(f"{source.path} is {_WIDER[tensors[name].shape]}", _WANTED)
    return tuple(Found(source, layout, tensors) for _, layout, tensors in found)


def _layout(tensors: dict[str, Tensor]) -> Layout | None:
    return next((layout for layout in LAYOUTS if all(name in tensors for name in layout.probe)), None)


@cache
def target_shapes(component: str, config: Sizes) -> dict[str, tuple[int, ...]]:
    """Our tensors of a component in the order of its modules, with MLX's axes."""
    return {name: tuple(array.shape) for name, array in parameters(build(component, config)).items()}


def make_plan(found: Found) -> tuple[Sizes, Plan]:
    """Sizes and the complete mapping of a component.

    Sizes come from the layout's own config.json; where it has none (single files, beside whatever else), from the
    published config with these shapes; else from a config.json beside the file, ours, in BFL's form or the layout's.

    Raises:
        ModelError: sizes unknown, or tensors missing, left over, of another shape or of a type that cannot be decoded.
    """
    config, made = _fit(found)
    for tensor in (t for target in made.targets for t in target.sources):
        decode.check(tensor.dtype, f"{tensor.path}: {tensor.name}")
    return config, made


def _fit(found: Found) -> tuple[Sizes, Plan]:
    component, layout = found.layout.component, found.layout
    where = str(found.source.path)
    beside, file = found.source.config(), f"{found.source.folder / 'config.json'}"
    named = found.source.component
    ours = beside is not None and _is_ours(beside, component)
    own = beside is not None and not ours and layout.convert_config
    if not (own or ours if named else own and _kind(beside) in layout.config_kinds):
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
    obj = layout.convert_config(beside, file) if own else _beside(beside, component, file)
    config = configs.from_json(NETWORKS[component][0], obj, file)
    if component in FILTERS:
        _check_filter(found, config, file)
    return config, _plan(found, config)


def _check_filter(found: Found, config, where: str) -> None:
    """A filter may be of other sizes than the published one; with the same shapes it must be the same in all numbers.

    Raises:
        ModelError: naming the first that is not, or what is prepared for another network.
    """
    component = found.layout.component
    for published in _PUBLISHED[component]:
        told, expected = (dict(tree_flatten(configs.to_json(c))) for c in (config, published))
        differ = sorted(name for name in told.keys() | expected if told.get(name) != expected.get(name))
        shapes, others = (target_shapes(component, c) | {"lm_head.weight": ()} for c in (config, published))
        if differ and shapes == others:
            name = differ[0]
            raise ModelError(
                f"{where}: {name} is {short(told.get(name))}", f"{expected.get(name)}", "take the original"
            )
    file = found.source.folder / "preprocessor_config.json"
    if file.exists():
        require(read_json(file), str(file), **found.layout.preprocessing(config))


_PUBLISHED = {
    "transformer": (configs.FLUX_DEV, configs.FLUX_SCHNELL),
    "text_encoder": (configs.CLIP_L,),
    "text_encoder_2": (configs.T5_XXL,),
    "vae": (configs.FLUX_VAE,),
    "nsfw": (NSFW_VIT,),
    "pixtral": (PIXTRAL_12B,),
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
    layout, shapes = found.layout, target_shapes(found.layout.component, config)
    dropped = (*layout.dropped, *maps.ANY_DROPPED)
    picked = config.head_ids if isinstance(config, PixtralConfig) else ()
    return plan(found.tensors, layout.table, dropped, layout.lost, shapes, last, str(found.source.path), picked)


_NOT_SIZES = ("dtype", "quantization")  # what a config.json of ours says of the arrays


def _kind(obj: dict):
    return obj.get("_class_name", obj.get("model_type"))


def _is_ours(obj: dict, component: str) -> bool:
    known = {*_NOT_SIZES, *(f.name for f in fields(NETWORKS[component][0]))}
    return _BFL_SECTIONS.get(component) in obj or (bool(obj) and obj.keys() <= known)


def _beside(obj: dict, component: str, where: str) -> dict:
    """Our sizes from a config.json beside a single file: ours, or in the form of BFL's parameter classes."""
    section = _BFL_SECTIONS.get(component)
    if section in obj and isinstance(obj[section], dict):
        own = dict(obj[section])
        require(own, where, **_BFL_FIXED[component])
        for name in (*_BFL_FIXED[component], "resolution"):
            own.pop(name, None)
        if component == "vae" and "ae_norm_num_groups" in obj:
            own["norm_num_groups"] = obj["ae_norm_num_groups"]
        return own
    return {k: v for k, v in obj.items() if k not in _NOT_SIZES}
