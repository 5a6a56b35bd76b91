"""Other models, and other ways to store weights, that people keep in the same folders: each is refused by its name.

A row is (a part of a tensor's name, the name of the model or format). Parts are searched with a dot put before each
name, so that ".x" is a whole word. `ALONE` counts only where a component is missing.

Facts: the public code and files of each model (diffusers' and transformers' module names; ComfyUI's model detection).
"""

import re

from .tensors import Tensor

MODELS = (
    ("lora_", "a LoRA"),  # lora_A, lora_down, lora_unet_
    (".lora.", "a LoRA"),
    ("_lora.", "a LoRA"),  # XLabs
    ("_lora1.", "a LoRA"),
    (".lokr_w", "a LoRA (LoKr)"),
    (".hada_w", "a LoRA (LoHa)"),
    (".oft_", "a LoRA (OFT)"),
    (".dora_scale", "a LoRA (DoRA)"),
    (".diff_b", "a LoRA (of differences)"),
    (".emb_params", "an embedding (textual inversion)"),
    (".string_to_param.", "an embedding (textual inversion)"),
    (".RDB1.conv1.", "a net that enlarges pictures (ESRGAN)"),
    (".rdb1.conv1.", "a net that enlarges pictures (ESRGAN)"),
    (".residual_group.blocks.", "a net that enlarges pictures (SwinIR)"),
    ("in_sum2", "an importance matrix of llama.cpp"),
    ("ip_adapter", "an IP-Adapter"),
    (".image_proj.", "an IP-Adapter"),
    ("_stream_k_proj", "an IP-Adapter"),
    ("pulid_", "PuLID"),
    (".distilled_guidance_layer.", "Chroma"),
    (".double_stream_modulation_img.", "FLUX.2"),
    (".bn.running_mean", "the autoencoder of FLUX.2"),
    (".multimodal_transformer_blocks.", "a FLUX.1 in DiffusionKit's names, which are not read"),
    (".txtfusion.", "Krea 2"),  # as Krea names it
    (".text_fusion.", "Krea 2"),  # as diffusers does
    (".img_mod.1.", "Qwen-Image"),
    (".double_stream_blocks.", "HiDream"),
    (".individual_token_refiner.", "HunyuanVideo"),
    (".noise_refiner.", "Lumina 2 or Z-Image"),
    (".double_layers.", "AuraFlow"),
    (".patchify_proj.", "LTX-Video"),
    (".adaln_single.", "PixArt"),
    (".y_embedder.y_embedding", "PixArt"),
    (".joint_transformer_blocks.", "AuraFlow"),
    (".t5_yproj.", "Mochi"),
    (".cross_attn.norm_k.", "Wan"),
    (".adaln_modulation_self_attn.", "Cosmos"),
    (".unified_transformer_blocks.", "a FLUX.1 in DiffusionKit's names, which are not read"),
    (".caption_projection.0.", "FIBO, Bria or HiDream"),
    (".effnet_mapper.", "Stable Cascade"),
    (".zero_convs.", "a ControlNet"),
    (".input_hint_block.", "a ControlNet"),
    (".joint_blocks.0.", "Stable Diffusion 3"),
    (".pos_embed.proj.", "Stable Diffusion 3"),
    (".input_blocks.0.", "Stable Diffusion 1, 2 or XL"),
    (".add_embedding.linear_1.", "Stable Diffusion XL"),
    (".conditioner.embedders.", "Stable Diffusion XL"),
    (".down_blocks.0.downsamplers.0.conv.", "Stable Diffusion 1, 2 or XL", "encoder."),
    ("controlnet_blocks.", "a ControlNet"),
    (".controlnet_x_embedder.", "a ControlNet"),
    ("controlnet_cond_embedding.", "a ControlNet"),
    (".attentions.0.to_qkv.", "the autoencoder of Wan or Qwen-Image"),
    (".residual.0.gamma", "the autoencoder of Wan or Qwen-Image"),
    (".encoder.conv_in.conv.weight", "an autoencoder of videos"),
    (".quant_conv.", "the autoencoder of Stable Diffusion"),
    (".taesd_", "a tiny autoencoder (TAE)"),
    (".positional_embedding_res", "LongCLIP"),
    (".transformer.resblocks.", "CLIP in OpenAI's or OpenCLIP's names"),
    (".encoder.block.1.layer.0.SelfAttention.relative_attention_bias.", "UMT5"),
    (".enc.blk.1.attn_rel_b.", "UMT5"),
    (".DenseReluDense.wi.", "T5 of version 1.0"),
    (".vision_language_adapter.", "Pixtral in Mistral's own names, whose rows are in another order"),
    ("bitsandbytes__", "a bitsandbytes NF4 or FP4 file"),
    (".absmax", "a bitsandbytes NF4 or FP4 file"),
    (".SCB", "a bitsandbytes int8 file"),
    (".encoded_exponent", "a DFloat11 file"),
    (".sign_mantissa", "a DFloat11 file"),
    (".weight._data", "an Optimum Quanto file"),
    (".weight._scale", "an Optimum Quanto file"),
    (".qzeros", "a GPTQ or AWQ file"),
    (".g_idx", "a GPTQ file"),
    (".quant_map", "a bitsandbytes NF4 or FP4 file"),
    (".weight_quantizer.", "a file of NVIDIA's ModelOpt with its quantizers"),
    (".int_data", "a torchao file"),
    (".layout_tensor.", "a torchao file"),
    ("_qdata", "a torchao file"),
    (".Qidxs", "a QuIP# file"),
    (".trellis", "an EXL3 file"),
    (".svd_down", "an SDNQ file"),
    (".W_q", "an HQQ file"),
    (".weight_packed", "a compressed-tensors file"),
    (".tensor_impl.", "a torchao file"),
    (".qweight", "a quantized file whose layers have no scales that are known"),
    (".wscales", "a Nunchaku SVDQuant file without its weights"),
)
# parts of larger models, refused where the part that we need is not there: its component comes last
ALONE = (
    (".vision_model.pre_layrnorm.", "CLIP's encoder of pictures", "text_encoder"),
    (".visual.transformer.", "CLIP's encoder of pictures", "text_encoder"),
    (".decoder.block.0.layer.1.EncDecAttention.", "T5's decoder", "text_encoder_2"),
)
# the same, by the whole name
_PATTERNS = (
    (re.compile(r".*(?:en|de)coder\.layers\.\d+\.(?:conv\.\d+\.)?(?:weight|bias)"), "a tiny autoencoder (TAE)"),
    (re.compile(r"\d+\.(?:conv\.\d+\.)?(?:weight|bias)"), "a tiny autoencoder (TAE)"),
)
# known sizes that are not FLUX.1's: component, the end of a tensor's name, axis, its length, the model
_SIZES = (
    ("vae", "encoder.conv_out.weight", 0, 8, "the autoencoder of Stable Diffusion"),
    ("vae", "encoder.conv_out.weight", 0, 64, "the autoencoder of FLUX.2"),
    ("text_encoder", "token_embedding.weight", 1, 1280, "CLIP bigG"),
    ("text_encoder", "token_embedding.weight", 1, 1024, "CLIP H"),
    ("text_encoder", "position_embedding.weight", 0, 248, "LongCLIP"),
    ("text_encoder_2", "shared.weight", 0, 256384, "UMT5"),
    ("text_encoder_2", "token_embd.weight", 0, 256384, "UMT5"),
    ("text_encoder_2", "shared.weight", 1, 2048, "T5 XL"),
    ("text_encoder_2", "shared.weight", 1, 1024, "T5 Large"),
    ("text_encoder_2", "shared.weight", 1, 768, "T5 Base"),
)


def by_names(tensors: dict[str, Tensor]) -> str | None:
    """Returns the name of another model or format, where a name in the file tells it."""
    names = [f".{name}" for name in tensors]
    for fragment, model, *unless in MODELS:
        if any(fragment in name and not any(word in name for word in unless) for name in names):
            return model
    return next((model for pattern, model in _PATTERNS if any(map(pattern.fullmatch, tensors))), None)


def alone(tensors: dict[str, Tensor], found: set[str]) -> str | None:
    """Returns the name of a part whose other part, which we need, is not among the components found."""
    rows = ((part, model) for part, model, component in ALONE if component not in found)
    return next((model for part, model in rows if any(part in f".{name}" for name in tensors)), None)


def by_sizes(component: str, tensors: dict[str, Tensor]) -> str | None:
    """Returns the name of a known model of these sizes, which are not FLUX.1's."""
    for kind, end, axis, length, model in _SIZES:
        shapes = (t.shape for name, t in tensors.items() if name.endswith(end)) if kind == component else ()
        if any(len(shape) > axis and shape[axis] == length for shape in shapes):
            return model
    if component == "transformer":
        doubles = {name.split(".")[1] for name in tensors if re.match(r"(?:double|transformer)_blocks\.\d+\.", name)}
        if len(doubles) == 8:
            return "Flux.1 Lite or Flex.1, with 8 double blocks"
    return None
