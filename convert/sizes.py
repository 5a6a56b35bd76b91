"""Reads our sizes from the config.json of other layouts.

Fields that would change the computation must have the values that our networks implement; others are ignored.
"""

from dataclasses import fields

from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.models.config import CLIPConfig, SiglipConfig, T5Config
from mlx_flux_krea.models.depth_config import DepthConfig
from mlx_flux_krea.models.filter_config import PIXTRAL_12B, MistralConfig, PixtralVisionConfig, ViTConfig


def require(obj: dict, where: str, todo: str = "this is another network", **expected) -> None:
    """Checks fields that would change the computation.

    Args:
        obj: the JSON object.
        where: the file, for errors.
        todo: the next step, for errors.
        expected: the value of each field, or a tuple of allowed values.

    Raises:
        ModelError: another value; a field may be absent.
    """
    for name, value in expected.items():
        values = value if isinstance(value, tuple) else (value,)
        if name in obj and obj[name] not in values:
            raise ModelError(f"{where}: {name} is {short(obj[name])}", " or ".join(map(repr, values)), todo)


# Types of fields that this file computes with: a test, and its description. `configs.from_json` checks all others.
_KINDS = {
    int: (lambda v: type(v) is int and 0 < v <= 65536, "a number from 1 to 65536"),
    float: (lambda v: type(v) in (int, float) and -1e9 <= v <= 1e9, "a number"),
    bool: (lambda v: type(v) is bool, "true or false"),
    list: (lambda v: type(v) is list and 0 < len(v) <= 16 and all(map(_KINDS[int][0], v)), "a list of sizes"),
}


def read(obj: dict, where: str, **kinds: type) -> dict:
    """Returns the named fields, each of its type.

    Raises:
        ModelError: a field missing or of another type.
    """
    for name, kind in kinds.items():
        fits, expected = _KINDS[kind]
        if name not in obj:
            raise ModelError(f"{where} lacks {name!r}", f"the fields {', '.join(kinds)}")
        if not fits(obj[name]):
            raise ModelError(f"{where}: {name} is {short(obj[name])}", expected)
    return {name: obj[name] for name in kinds}


def short(value) -> str:
    """Returns a value from a file, short enough for a message."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def diffusers_flux(obj: dict, where: str) -> dict:
    """Returns the transformer's sizes from diffusers' config."""
    require(obj, where, patch_size=1)
    if obj.get("out_channels") is None:
        obj = obj | {"out_channels": obj.get("in_channels")}
    obj = {"axes_dims_rope": [16, 56, 56]} | obj  # the published config leaves it out
    obj = read(
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


def diffusers_vae(obj: dict, where: str) -> dict:
    """Returns the autoencoder's sizes from diffusers' config."""
    require(
        obj, where, act_fn="silu", use_quant_conv=False, use_post_quant_conv=False,
        mid_block_add_attention=True, latents_mean=None, latents_std=None,
    )  # fmt: skip
    obj = read(
        obj, where, in_channels=int, out_channels=int, block_out_channels=list, layers_per_block=int,
        latent_channels=int, norm_num_groups=int, scaling_factor=float, shift_factor=float,
    )  # fmt: skip
    widths = obj["block_out_channels"]
    if any(width % widths[0] for width in widths):
        raise ModelError(f"{where}: block_out_channels is {short(widths)}", "multiples of the first")
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


def transformers_clip(obj: dict, where: str) -> dict:
    """Returns CLIP's sizes from transformers' config."""
    require(obj, where, hidden_act="quick_gelu")
    return {f.name: obj[f.name] for f in fields(CLIPConfig) if f.name in obj}


# the tanh form of GELU, as transformers calls it; "gated-gelu" alone means it too
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")


def transformers_t5(obj: dict, where: str) -> dict:
    """Returns T5's sizes from transformers' config."""
    gated = ("gated-gelu", *(f"gated-{name}" for name in _TANH_GELU))
    require(obj, where, feed_forward_proj=gated, dense_act_fn=_TANH_GELU)
    obj = {"relative_attention_max_distance": 128} | obj  # newer than some configs
    return {f.name: obj[f.name] for f in fields(T5Config) if f.name in obj}


def transformers_vit(obj: dict, where: str) -> dict:
    """Returns the classifier's sizes from transformers' config, which must have the expected labels."""
    if "id2label" not in obj:
        raise ModelError(f"{where} lacks 'id2label'", "the labels of the classifier")
    require(obj, where, hidden_act="gelu", qkv_bias=True, num_channels=3, id2label={"0": "normal", "1": "nsfw"})
    own = {f.name: obj[f.name] for f in fields(ViTConfig) if f.name in obj}
    return own | {"labels": [obj["id2label"][key] for key in ("0", "1")]}


def vit_preprocessing(config) -> dict:
    """Returns the fields of a preprocessor_config.json that describes `models.vit.preprocess`."""
    size = ({"height": config.image_size, "width": config.image_size}, config.image_size)
    return _PREPROCESSING | {"resample": 2, "size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def transformers_pixtral(obj: dict, where: str) -> dict:
    """Returns Pixtral's sizes from transformers' config; absent fields get transformers' defaults.

    `head_ids` is a field of ours: another vocabulary than the published one has other ids.
    """
    require(
        obj, where, projector_hidden_act="gelu", vision_feature_layer=-1, vision_feature_select_strategy="full",
        multimodal_projector_bias=True, tie_word_embeddings=False,
    )  # fmt: skip
    parts = {}
    for name in ("text_config", "vision_config"):
        if not isinstance(obj.get(name), dict):
            raise ModelError(f"{where} lacks {name}", "the sizes of Pixtral")
        parts[name] = obj[name] | {"rope_theta": _rope_theta(obj[name], f"{where}: {name}")}
    text, vision = parts.values()
    require(
        text, where, model_type="mistral", hidden_act="silu", sliding_window=None, tie_word_embeddings=False,
        rope_scaling=None,
    )  # fmt: skip
    # early files say gelu of the tower, which was trained with SiLU
    require(vision, where, model_type="pixtral", hidden_act=("silu", "gelu"), num_channels=3)
    text = {"num_attention_heads": 32} | text
    defaults = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = defaults | vision
    return {
        "text_config": {f.name: text[f.name] for f in fields(MistralConfig) if f.name in text},
        "vision_config": {f.name: vision[f.name] for f in fields(PixtralVisionConfig) if f.name in vision},
        "image_token_index": obj.get("image_token_index", obj.get("image_token_id")),
        "head_ids": obj.get("head_ids", PIXTRAL_12B.head_ids),
    }


def pixtral_preprocessing(config) -> dict:
    """Returns the fields of a preprocessor_config.json that describes `models.pixtral.preprocess`."""
    patch = config.vision_config.patch_size
    return _PREPROCESSING | {
        "resample": 3,
        "size": {"longest_edge": config.vision_config.image_size},
        "patch_size": ({"height": patch, "width": patch}, patch),
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def transformers_siglip(obj: dict, where: str) -> dict:
    """Returns the sizes of SigLIP's encoder of pictures from transformers' config; absent fields get its defaults."""
    if isinstance(vision := obj.get("vision_config"), dict):  # of the whole model, with its encoder of texts
        obj, where = vision, f"{where}: vision_config"
    require(obj, where, hidden_act=_TANH_GELU, num_channels=3)
    obj = {"layer_norm_eps": 1e-6} | obj
    return {f.name: obj[f.name] for f in fields(SiglipConfig) if f.name in obj}


def siglip_preprocessing(config) -> dict:
    """Returns the fields of a preprocessor_config.json that describes `models.siglip.preprocess`."""
    return vit_preprocessing(config) | {"resample": 3}


def diffusers_redux(obj: dict, where: str) -> dict:
    """Returns Redux' sizes from diffusers' config; absent fields get its defaults."""
    return {"redux_dim": obj.get("redux_dim", 1152), "txt_in_features": obj.get("txt_in_features", 4096)}


def told_redux(shapes: dict[str, tuple[int, ...]]) -> dict:
    """Returns Redux' sizes from the shapes of its two matrices."""
    up, down = shapes["redux_up.weight"], shapes["redux_down.weight"]
    return {"redux_dim": up[-1] if up else 0, "txt_in_features": down[0] if down else 0}


_DINOV2 = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "mlp_ratio": 4, "layer_norm_eps": 1e-6,
    "image_size": 224, "patch_size": 14, "reshape_hidden_states": True,
}  # fmt: skip
_DPT = {
    "patch_size": 14, "reassemble_hidden_size": 384, "reassemble_factors": [4, 2, 1, 0.5],
    "neck_hidden_sizes": [48, 96, 192, 384], "fusion_hidden_size": 64, "head_hidden_size": 32,
}  # fmt: skip


def transformers_depth(obj: dict, where: str) -> dict:
    """Returns the sizes of a Depth Anything from transformers' config; absent fields get transformers' defaults."""
    require(
        obj, where, head_in_index=-1, depth_estimation_type="relative", max_depth=(1, None), backbone=None,
        use_timm_backbone=False,
    )  # fmt: skip
    backbone = obj.get("backbone_config")
    if not isinstance(backbone, dict):
        raise ModelError(f"{where} lacks backbone_config", "the sizes of DINOv2")
    obj, backbone = _DPT | obj, _DINOV2 | backbone
    require(
        backbone, f"{where}: backbone_config", model_type="dinov2", hidden_act="gelu", qkv_bias=True, num_channels=3,
        use_swiglu_ffn=False, apply_layernorm=True, reshape_hidden_states=False, patch_size=obj["patch_size"],
        hidden_size=obj["reassemble_hidden_size"],
    )  # fmt: skip
    own = {f.name: (backbone | obj)[f.name] for f in fields(DepthConfig) if f.name in backbone | obj}
    if isinstance(own["reassemble_factors"], list):
        own["reassemble_factors"] = [float(f) if type(f) is int else f for f in own["reassemble_factors"]]
    return own


def depth_preprocessing(config) -> dict:
    """Returns the fields of a preprocessor_config.json that describes `models.depth.preprocess`."""
    return _PREPROCESSING | {
        "resample": 3,
        "size": {"height": config.image_size, "width": config.image_size},
        "keep_aspect_ratio": True,
        "ensure_multiple_of": config.patch_size,
        "do_pad": (False, None),
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }


_PREPROCESSING = {
    "do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": (1 / 255, 0.00392156862745098),
}  # fmt: skip


def _rope_theta(obj: dict, where: str):
    """Returns the value of transformers 4's field, 5's, or both."""
    parameters = obj.get("rope_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    require(parameters, where, rope_type=("default", "axial"))
    values = [part["rope_theta"] for part in (obj, parameters) if "rope_theta" in part]
    if not values or values[0] != values[-1]:
        raise ModelError(f"{where}: rope_theta is {short(values)}", "one number")
    return values[0]
