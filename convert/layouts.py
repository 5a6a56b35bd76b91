"""The known layouts: the tensors that identify each, the table of its names, and the source of its sizes.

Similar models that cannot be converted are rows as well, and refused by name. A new layout is a row here and a table in
`maps.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache

from mlx.utils import tree_flatten

from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.files import read_json
from mlx_flux_krea.models import config as configs
from mlx_flux_krea.models.config import VAEConfig
from mlx_flux_krea.models.depth_config import DEPTH_ANYTHING_V2_SMALL
from mlx_flux_krea.models.filter_config import NSFW_VIT, PIXTRAL_12B, PixtralConfig
from mlx_flux_krea.weights import COMPONENTS, NETWORKS, Sizes, build, parameters

from . import decode, maps, sizes
from .remap import ComponentPlan, Misfit, plan
from .sizes import require, short
from .sources import Source, Tensor

# Prefixes of names in published files; in an all-in-one file each component has its own. Some tensors of the text
# encoders lie beside the network, such as `text_encoders.clip_l.logit_scale`, hence the second prefix.
PREFIXES = (
    ("model.diffusion_model.", ""), ("diffusion_model.", ""), ("vae.", ""),
    ("text_encoders.clip_l.", "transformer."), ("text_encoders.t5xxl.", "transformer."),
    ("", ""),
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """A way to name the tensors of a component."""

    name: str
    component: str
    probe: tuple[str, ...]  # tensors that occur together only in this layout
    table: tuple
    dropped: tuple = ()
    lost: tuple = ()
    convert_config: Callable[[dict, str], dict] | None = None  # (config.json, its path) to our sizes
    config_kinds: tuple[str, ...] = ()  # `_class_name` or `model_type` of such a config.json
    preprocessing: Callable[..., dict] | None = None  # our sizes to the expected preprocessor_config.json
    told: Callable[[dict[str, tuple[int, ...]]], dict] | None = None  # shapes to our sizes, where they tell all


@dataclass(frozen=True)
class SourceComponent:
    """A component of a source, with its layout."""

    source: Source
    layout: Layout
    tensors: dict[str, Tensor]  # names without prefix


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
        "SigLIP", "image_encoder",
        ("vision_model.embeddings.patch_embedding.bias", "vision_model.post_layernorm.weight"),
        maps.SIGLIP, maps.SIGLIP_DROPPED, (), sizes.transformers_siglip, ("siglip_vision_model", "siglip"),
        sizes.siglip_preprocessing,
    ),
    Layout(
        "SigLIP, transformers 5", "image_encoder",
        ("embeddings.patch_embedding.bias", "post_layernorm.weight", "encoder.layers.0.self_attn.q_proj.weight"),
        maps.SIGLIP_TRANSFORMERS_5, maps.SIGLIP_TRANSFORMERS_5_DROPPED, (), sizes.transformers_siglip,
        ("siglip_vision_model", "siglip"), sizes.siglip_preprocessing,
    ),
    Layout(
        "Redux", "image_embedder", ("redux_up.weight", "redux_down.weight"), maps.REDUX,
        convert_config=sizes.diffusers_redux, config_kinds=("ReduxImageEncoder",), told=sizes.told_redux,
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
    Layout(
        "Depth Anything", "depth",
        ("backbone.encoder.layer.0.attention.attention.query.weight", "neck.fusion_stage.layers.0.projection.weight"),
        maps.DEPTH, maps.DEPTH_DROPPED, (), sizes.transformers_depth, ("depth_anything",), sizes.depth_preprocessing,
    ),
    Layout(
        "Depth Anything, transformers 5", "depth",
        ("backbone.encoder.layer.0.attention.q_proj.weight", "neck.fusion_stage.layers.0.projection.weight"),
        maps.DEPTH_TRANSFORMERS_5, maps.DEPTH_DROPPED, (), sizes.transformers_depth, ("depth_anything",),
        sizes.depth_preprocessing,
    ),
)  # fmt: skip

# Other models that people have in the same folders: (part of a tensor name, name of the model)
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
    ("joint_blocks.0.", "Stable Diffusion 3"),
    ("pos_embed.proj.", "Stable Diffusion 3"),
    ("input_blocks.0.", "Stable Diffusion 1, 2 or XL"),
    ("add_embedding.linear_1.", "Stable Diffusion XL"),
    ("conditioner.embedders.", "Stable Diffusion XL"),
    ("controlnet_blocks.", "a ControlNet"),
    ("vision_model.pre_layrnorm.", "CLIP's encoder of pictures"),
    ("vision_language_adapter.", "Pixtral in Mistral's own names, whose rows are in another order"),
    ("bitsandbytes__", "a bitsandbytes NF4 or FP4 file"),
    (".absmax", "a bitsandbytes NF4 or FP4 file"),
    (".qweight", "a Nunchaku SVDQuant file"),
    (".wscales", "a Nunchaku SVDQuant file"),
)
# the same, by the type of a tensor
_REFUSED_TYPES = {"F8_E5M2": "an fp8 file of the kind e5m2, whose weights have two bits of precision"}

_WANTED = "FLUX.1 Krea [dev] or one of its kin, in e4m3, GGUF, MLX's quantization, or 16 or 32 bits"


def identify(source: Source) -> tuple[SourceComponent, ...]:
    """Identifies the components in a source by names, types and shapes alone: one, or those of an all-in-one file.

    Raises:
        ModelError: another model (named, if it is known), or a network of another kind than its folder's name.
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
    known = [(prefix, layout, tensors) for prefix, tensors in parts.items() if (layout := _layout(tensors))]
    if not known:
        first = ", ".join(sorted(source.tensors)[:3])
        architecture = source.metadata.get("general.architecture")
        kind = f"says that it is {short(architecture)}, and " if architecture else ""
        raise ModelError(
            f"{source.path} has no known layout (it {kind}holds {first})",
            todo="see flux-krea convert --help",
        )
    for prefix, tensors in parts.items():
        if prefix not in [p for p, *_ in known]:
            identified = f"a {known[0][1].name}" if len(known) == 1 else "the components of FLUX.1"
            other = next(iter(tensors.values())).name
            raise ModelError(f"{source.path} holds more than {identified} ({other})", "one model, and nothing else")
    for _, layout, _ in known:
        if source.component not in (None, layout.component):
            raise ModelError(f"{source.path} holds a {layout.name}", f"a {source.component}")
    return tuple(SourceComponent(source, layout, tensors) for _, layout, tensors in known)


def _layout(tensors: dict[str, Tensor]) -> Layout | None:
    return next((layout for layout in LAYOUTS if all(name in tensors for name in layout.probe)), None)


@cache
def target_shapes(component: str, config: Sizes) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of our tensors of a component in the order of its modules, with MLX's axes."""
    return {name: tuple(array.shape) for name, array in parameters(build(component, config)).items()}


def make_plan(component: SourceComponent) -> tuple[Sizes, ComponentPlan]:
    """Returns the sizes of a component and the complete mapping of its tensors.

    Sizes come from the layout's own config.json; for single files, from the published config with these shapes, else
    from a config.json beside the file in our form, BFL's or the layout's.

    Raises:
        ModelError: sizes unknown, or tensors missing, unknown, of another shape or of a type that cannot be decoded.
    """
    config, mapping = _fit(component)
    for tensor in (t for target in mapping.targets for t in target.sources):
        decode.check(tensor.dtype, f"{tensor.path}: {tensor.name}")
    return config, mapping


def _fit(component: SourceComponent) -> tuple[Sizes, ComponentPlan]:
    name, layout, source = component.layout.component, component.layout, component.source
    if layout.told and not source.component:
        told = layout.told({name: tensor.shape for name, tensor in component.tensors.items()})
        config = configs.from_json(NETWORKS[name][0], told, str(source.path))
        return config, _plan(component, config)
    beside, file = source.config(), f"{source.folder / 'config.json'}"
    if beside is None:
        return _fit_published(component)
    theirs = None if _is_ours(beside, name) else layout.convert_config
    if source.component:
        is_its_own = theirs is not None or _is_ours(beside, name)
    else:
        is_its_own = theirs is not None and _kind(beside) in layout.config_kinds
    if not is_its_own and (fitted := _first_fit(component, [])):
        return fitted
    obj = theirs(beside, file) if theirs else _beside(beside, name, file)
    config = configs.from_json(NETWORKS[name][0], obj, file)
    if name not in COMPONENTS:
        _check_published(component, config, file)
    return config, _plan(component, config)


def _fit_published(component: SourceComponent) -> tuple[Sizes, ComponentPlan]:
    """Fits a single file to the published sizes.

    Raises:
        ModelError: none fits.
    """
    refused: list[Misfit] = []
    if fitted := _first_fit(component, refused):
        return fitted
    nearest = min(refused, key=lambda error: len(error.problems))
    if nearest.same_sizes:
        raise nearest
    raise ModelError(
        f"{component.source.path} has other sizes than the published {component.layout.name} ({nearest.found})",
        "a config.json beside it with heads and other sizes that shapes do not tell",
    )


def _first_fit(component: SourceComponent, refused: list[Misfit]) -> tuple[Sizes, ComponentPlan] | None:
    for config in _PUBLISHED[component.layout.component]:
        try:
            return config, _plan(component, config)
        except Misfit as error:
            refused.append(error)
    return None


def _check_published(component: SourceComponent, config: Sizes, where: str) -> None:
    """Checks the config of a filter or of a component: with the published shapes it must have the published numbers.

    Raises:
        ModelError: naming the first number that differs, or a preprocessing for another network.
    """
    name = component.layout.component
    for published in _PUBLISHED[name]:
        told, expected = (dict(tree_flatten(configs.to_json(c))) for c in (config, published))
        differ = sorted(field for field in told.keys() | expected if told.get(field) != expected.get(field))
        shapes, others = (target_shapes(name, c) | {"lm_head.weight": ()} for c in (config, published))
        if differ and shapes == others:
            field = differ[0]
            found = f"{where}: {field} is {short(told.get(field))}"
            raise ModelError(found, f"{expected.get(field)}", "take the original")
    _check_preprocessing(component, config)


def _check_preprocessing(component: SourceComponent, config: Sizes) -> None:
    """Checks the preprocessor_config.json of an encoder of pictures, where there is one.

    Raises:
        ModelError: it describes another preprocessing than ours.
    """
    folder, layout = component.source.folder, component.layout
    for file in (folder / "preprocessor_config.json", folder.parent / "feature_extractor" / "preprocessor_config.json"):
        if layout.preprocessing and file.exists() and (file.parent == folder or component.source.component):
            require(read_json(file), str(file), **layout.preprocessing(config))


_PUBLISHED: dict[str, tuple[Sizes, ...]] = {
    "transformer": (configs.FLUX_DEV, configs.FLUX_SCHNELL, configs.FLUX_FILL, configs.FLUX_CONTROL),
    "text_encoder": (configs.CLIP_L,),
    "text_encoder_2": (configs.T5_XXL,),
    "vae": (configs.FLUX_VAE,),
    "nsfw": (NSFW_VIT,),
    "pixtral": (PIXTRAL_12B,),
    "image_encoder": (configs.SIGLIP_SO400M,),
    "image_embedder": (configs.REDUX_DEV,),
    "depth": (DEPTH_ANYTHING_V2_SMALL,),
}
# sections of a config.json in BFL's form, and their fields that must have these values
_BFL_SECTIONS = {"transformer": "flux", "text_encoder": "clip", "text_encoder_2": "t5", "vae": "ae"}
_BFL_FIXED = {
    "transformer": {"qkv_bias": True},
    "text_encoder": {"hidden_act": "quick_gelu"},
    "text_encoder_2": {"feed_forward": "gated gelu (tanh form)"},
    "vae": {},
}


def _plan(component: SourceComponent, config: Sizes) -> ComponentPlan:
    last = len(config.ch_mult) - 1 if isinstance(config, VAEConfig) else 0
    layout, shapes = component.layout, target_shapes(component.layout.component, config)
    dropped = (*layout.dropped, *maps.ANY_DROPPED)
    picked = config.head_ids if isinstance(config, PixtralConfig) else ()
    return plan(
        component.tensors,
        table=layout.table,
        dropped=dropped,
        lost=layout.lost,
        shapes=shapes,
        last=last,
        source=str(component.source.path),
        picked=picked,
    )


_NOT_SIZES = ("dtype", "quantization")  # fields of a config.json of ours about the arrays


def _kind(obj: dict):
    return obj.get("_class_name", obj.get("model_type"))


def _is_ours(obj: dict, component: str) -> bool:
    known = {*_NOT_SIZES, *(f.name for f in fields(NETWORKS[component][0]))}
    return _BFL_SECTIONS.get(component) in obj or (bool(obj) and obj.keys() <= known)


def _beside(obj: dict, component: str, where: str) -> dict:
    """Returns our sizes from a config.json beside a single file: ours, or in the form of BFL's parameter classes."""
    section = _BFL_SECTIONS.get(component)
    if section and isinstance(obj.get(section), dict):
        own = dict(obj[section])
        require(own, where, **_BFL_FIXED[component])
        for name in (*_BFL_FIXED[component], "resolution"):
            own.pop(name, None)
        if component == "vae" and "ae_norm_num_groups" in obj:
            own["norm_num_groups"] = obj["ae_norm_num_groups"]
        return own
    return {k: v for k, v in obj.items() if k not in _NOT_SIZES}
