"""The known layouts: the tensors that identify each, the table of its names, and the source of its sizes.

A new layout is a row here and a table in `maps.py`. `identify.py` finds them in files, `fit.py` maps their tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass

from . import maps, sizes
from .sources import Source
from .tensors import Tensor


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
    outside: tuple[Tensor, ...] = ()  # tensors of the source that belong to no network


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
        "transformer, nunchaku", "transformer",
        ("transformer_blocks.0.qkv_proj.weight", "transformer_blocks.0.mlp_context_fc1.weight",
         "single_transformer_blocks.0.mlp_fc1.weight"),
        maps.FLUX_NUNCHAKU, (), (), sizes.diffusers_flux, ("FluxTransformer2DModel",),
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
        ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", "encoder.final_layer_norm.weight"),
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
        maps.T5_GGUF, maps.T5_GGUF_DROPPED,
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
