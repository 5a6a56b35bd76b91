"""The name tables: the place of every tensor of ours in each layout. Data only; `remap.py` applies it.

A row is (our name, its source). The first row that matches a name counts. Slots in names:

    {n} {m}   a number            {-n}    the same number counted from the other end
    {x}       one part of a name  {rest}  any number of parts        *   "weight" or "bias"

A source is a name (the same values; the order of a convolution's axes follows from the shapes), or

    Rows(a, b, ...)   the parts of a fused matrix, one after another
    Swap(a)           the two halves of its rows exchanged
    Columns(a, b)     the same along the second axis
    Sum(a, b)         the sum of those that are there
    Pick(a, b)        the few rows of a that are needed; b has the same shape
    Either(a, b)      the first of these names that is there

A table of dropped tensors lists tensors that some files hold and we leave out on purpose: (their name, the reason). A
table of lost tensors lists tensors that some files lack, which are then zero: (our name, the reason).

Facts: black-forest-labs/flux (src/flux/model.py, modules/autoencoder.py), diffusers (transformer_flux.py,
autoencoder_kl.py), mflux (names in files of 0.6 to 0.18), llama.cpp (gguf-py's names of T5), ComfyUI (its guide to
quantization), transformers 4 and 5 (modeling_vit.py, modeling_llava.py), mlx-vlm (models/pixtral).
"""


class _Op:
    def __init__(self, *names: str):
        self.names = names


class Rows(_Op):
    """Sources one after another along the first axis."""


class Swap(_Op):
    """The halves of the first axis exchanged."""


class Columns(_Op):
    """Sources one after another along the second axis."""


class Sum(_Op):
    """The sum of those sources that the file has."""


class Either(_Op):
    """The first of these names that the file has."""


class Pick(_Op):
    """Some rows of the first, which has the shape of the second; their numbers are in the config."""


SAME = (("{rest}", "{rest}"),)


def _renamed(table: tuple, *changes: tuple[str, str]) -> tuple:
    """Returns the table of a layout whose names differ from another's in a few parts."""

    def rename(name: str) -> str:
        for old, new in changes:
            name = name.replace(old, new)
        return name

    def renamed(source: str | _Op) -> str | _Op:
        return type(source)(*map(rename, source.names)) if isinstance(source, _Op) else rename(source)

    return tuple((ours, renamed(theirs)) for ours, theirs in table)


# tensors that any layout may hold beside its weights
_TRAINING = "bookkeeping of training"
ANY_DROPPED = (
    ("scaled_fp8", "says that the file is of this kind"),
    ("{rest}.comfy_quant", "says how the weight is stored"),
    ("{rest}.scale_input", "a scale of activations, not of weights"),
    ("{rest}.input_scale", "a scale of activations, not of weights"),
    ("__index_timestep_zero__", "a mark of ComfyUI's"),
    ("{rest}.comfy_attention.config", "a setting of ComfyUI's"),
    ("comfy_attention.config", "a setting of ComfyUI's"),
    *((name, _TRAINING) for name in ("global_step", "epoch", "iteration", "step", "num_updates", "alphas_cumprod")),
    ("{rest}.num_batches_tracked", _TRAINING),
    *(
        (f"{{rest}}.{name}", _TRAINING)
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "grad", "_extra_state")
    ),
    ("lr_schedulers.{rest}", _TRAINING),
    ("loss.{rest}", _TRAINING),
    ("{rest}.inv_freq", "computed, not stored"),
    ("{rest}.position_ids", "positions are counted, not stored"),
    ("{rest}.logit_scale", "belongs to an encoder's training"),
)
# prefixes of copies of a network that training leaves in files, as regular expressions of whole prefixes
AVERAGED = r"(?:.*[._-])?(?:ema|swa|averaged|moving_average|shadow)(?:[._-].*)?"
OF_TRAINING = (
    r"(?:.*\.)?(?:optim(?:izer\w*)?|opt(?:_state)?|adam\w*|exp_avg\w*|momentum\w*|grad\w*|master_weights)(?:\..*)?"
)
ASIDE = ((AVERAGED, "an averaged copy of training (EMA)"), (OF_TRAINING, _TRAINING))
NOT_NEEDED = "not needed"
# tensors that are second copies of others: their shapes must be the same
COPIES = {"encoder.embed_tokens.weight": "shared.weight"}

# --- the transformer ---

FLUX_BFL = SAME
FLUX_BFL_NORM_WEIGHT = (("{rest}_norm.scale", "{rest}_norm.weight"), *SAME)

_D, _S = "transformer_blocks.{n}", "single_transformer_blocks.{n}"
FLUX_DIFFUSERS = (
    ("img_in.*", "x_embedder.*"),
    ("txt_in.*", "context_embedder.*"),
    ("time_in.in_layer.*", "time_text_embed.timestep_embedder.linear_1.*"),
    ("time_in.out_layer.*", "time_text_embed.timestep_embedder.linear_2.*"),
    ("vector_in.in_layer.*", "time_text_embed.text_embedder.linear_1.*"),
    ("vector_in.out_layer.*", "time_text_embed.text_embedder.linear_2.*"),
    ("guidance_in.in_layer.*", "time_text_embed.guidance_embedder.linear_1.*"),
    ("guidance_in.out_layer.*", "time_text_embed.guidance_embedder.linear_2.*"),
    ("double_blocks.{n}.img_mod.lin.*", f"{_D}.norm1.linear.*"),
    ("double_blocks.{n}.img_attn.qkv.*", Rows(f"{_D}.attn.to_q.*", f"{_D}.attn.to_k.*", f"{_D}.attn.to_v.*")),
    ("double_blocks.{n}.img_attn.norm.query_norm.scale", f"{_D}.attn.norm_q.weight"),
    ("double_blocks.{n}.img_attn.norm.key_norm.scale", f"{_D}.attn.norm_k.weight"),
    ("double_blocks.{n}.img_attn.proj.*", f"{_D}.attn.to_out.0.*"),
    ("double_blocks.{n}.img_mlp.0.*", f"{_D}.ff.net.0.proj.*"),
    ("double_blocks.{n}.img_mlp.2.*", f"{_D}.ff.net.2.*"),
    ("double_blocks.{n}.txt_mod.lin.*", f"{_D}.norm1_context.linear.*"),
    (
        "double_blocks.{n}.txt_attn.qkv.*",
        Rows(f"{_D}.attn.add_q_proj.*", f"{_D}.attn.add_k_proj.*", f"{_D}.attn.add_v_proj.*"),
    ),
    ("double_blocks.{n}.txt_attn.norm.query_norm.scale", f"{_D}.attn.norm_added_q.weight"),
    ("double_blocks.{n}.txt_attn.norm.key_norm.scale", f"{_D}.attn.norm_added_k.weight"),
    ("double_blocks.{n}.txt_attn.proj.*", f"{_D}.attn.to_add_out.*"),
    ("double_blocks.{n}.txt_mlp.0.*", f"{_D}.ff_context.net.0.proj.*"),
    ("double_blocks.{n}.txt_mlp.2.*", f"{_D}.ff_context.net.2.*"),
    (
        "single_blocks.{n}.linear1.*",
        Rows(f"{_S}.attn.to_q.*", f"{_S}.attn.to_k.*", f"{_S}.attn.to_v.*", f"{_S}.proj_mlp.*"),
    ),
    ("single_blocks.{n}.linear2.*", f"{_S}.proj_out.*"),
    ("single_blocks.{n}.norm.query_norm.scale", f"{_S}.attn.norm_q.weight"),
    ("single_blocks.{n}.norm.key_norm.scale", f"{_S}.attn.norm_k.weight"),
    ("single_blocks.{n}.modulation.lin.*", f"{_S}.norm.linear.*"),
    ("final_layer.linear.*", "proj_out.*"),
    # the one place where the order differs: shift, scale in BFL's file; scale, shift in diffusers'
    ("final_layer.adaLN_modulation.1.*", Swap("norm_out.linear.*")),
)
FLUX_MFLUX = _renamed(FLUX_DIFFUSERS, (".net.0.proj.", ".linear1."), (".net.2.", ".linear2."))
FLUX_MFLUX_LOST = (
    ("final_layer.adaLN_modulation.1.bias", "mflux 0.16 and later drop it when they save; it cannot be recovered"),
)

FLUX_NUNCHAKU = (
    ("double_blocks.{n}.img_attn.qkv.*", f"{_D}.qkv_proj.*"),
    ("double_blocks.{n}.txt_attn.qkv.*", f"{_D}.qkv_proj_context.*"),
    ("double_blocks.{n}.img_attn.proj.*", f"{_D}.out_proj.*"),
    ("double_blocks.{n}.txt_attn.proj.*", f"{_D}.out_proj_context.*"),
    ("double_blocks.{n}.img_mlp.0.*", f"{_D}.mlp_fc1.*"),
    ("double_blocks.{n}.img_mlp.2.*", f"{_D}.mlp_fc2.*"),
    ("double_blocks.{n}.txt_mlp.0.*", f"{_D}.mlp_context_fc1.*"),
    ("double_blocks.{n}.txt_mlp.2.*", f"{_D}.mlp_context_fc2.*"),
    ("double_blocks.{n}.img_attn.norm.query_norm.scale", f"{_D}.norm_q.weight"),
    ("double_blocks.{n}.img_attn.norm.key_norm.scale", f"{_D}.norm_k.weight"),
    ("double_blocks.{n}.txt_attn.norm.query_norm.scale", f"{_D}.norm_added_q.weight"),
    ("double_blocks.{n}.txt_attn.norm.key_norm.scale", f"{_D}.norm_added_k.weight"),
    ("single_blocks.{n}.linear1.*", Rows(f"{_S}.qkv_proj.*", f"{_S}.mlp_fc1.*")),
    ("single_blocks.{n}.linear2.weight", Columns(f"{_S}.out_proj.weight", f"{_S}.mlp_fc2.weight")),
    ("single_blocks.{n}.linear2.bias", Sum(f"{_S}.out_proj.bias", f"{_S}.mlp_fc2.bias")),
    ("single_blocks.{n}.norm.query_norm.scale", f"{_S}.norm_q.weight"),
    ("single_blocks.{n}.norm.key_norm.scale", f"{_S}.norm_k.weight"),
    *FLUX_DIFFUSERS,
)

# --- the autoencoder ---

VAE_BFL = SAME
VAE_DIFFUSERS = (
    ("{x}.conv_in.*", "{x}.conv_in.*"),
    ("encoder.down.{n}.block.{m}.nin_shortcut.*", "encoder.down_blocks.{n}.resnets.{m}.conv_shortcut.*"),
    ("encoder.down.{n}.block.{m}.{x}.*", "encoder.down_blocks.{n}.resnets.{m}.{x}.*"),
    ("encoder.down.{n}.downsample.conv.*", "encoder.down_blocks.{n}.downsamplers.0.conv.*"),
    ("{x}.mid.block_1.{rest}", "{x}.mid_block.resnets.0.{rest}"),
    ("{x}.mid.block_2.{rest}", "{x}.mid_block.resnets.1.{rest}"),
    ("{x}.mid.attn_1.norm.*", "{x}.mid_block.attentions.0.group_norm.*"),
    ("{x}.mid.attn_1.q.*", "{x}.mid_block.attentions.0.to_q.*"),
    ("{x}.mid.attn_1.k.*", "{x}.mid_block.attentions.0.to_k.*"),
    ("{x}.mid.attn_1.v.*", "{x}.mid_block.attentions.0.to_v.*"),
    ("{x}.mid.attn_1.proj_out.*", "{x}.mid_block.attentions.0.to_out.0.*"),
    # our decoder counts its levels from the largest, diffusers from the smallest
    ("decoder.up.{n}.block.{m}.nin_shortcut.*", "decoder.up_blocks.{-n}.resnets.{m}.conv_shortcut.*"),
    ("decoder.up.{n}.block.{m}.{x}.*", "decoder.up_blocks.{-n}.resnets.{m}.{x}.*"),
    ("decoder.up.{n}.upsample.conv.*", "decoder.up_blocks.{-n}.upsamplers.0.conv.*"),
    ("{x}.norm_out.*", "{x}.conv_norm_out.*"),
    ("{x}.conv_out.*", "{x}.conv_out.*"),
)
VAE_MFLUX = (
    ("{x}.conv_in.*", "{x}.conv_in.conv2d.*"),
    ("{x}.norm_out.*", "{x}.conv_norm_out.norm.*"),
    ("{x}.conv_out.*", "{x}.conv_out.conv2d.*"),
    *VAE_DIFFUSERS,
)

# --- the text encoders ---

CLIP = SAME
CLIP_TRANSFORMERS_5 = (("text_model.{rest}", "{rest}"),)
CLIP_DROPPED = (
    ("{rest}.position_ids", "positions are counted, not stored"),
    ("text_projection.weight", "FLUX.1 reads the vector before this projection"),
    ("logit_scale", "belongs to CLIP's training"),
    ("vision_model.{rest}", "belongs to CLIP's encoder of pictures"),
    ("visual.{rest}", "belongs to CLIP's encoder of pictures"),
    ("visual_projection.weight", "belongs to CLIP's encoder of pictures"),
)

T5 = (("shared.weight", Either("shared.weight", "encoder.embed_tokens.weight")), *SAME)
_DECODER = "belongs to T5's decoder"
T5_DROPPED = (
    ("encoder.embed_tokens.weight", "a second copy of shared.weight"),
    ("decoder.{rest}", _DECODER),
    ("lm_head.weight", _DECODER),
    ("logit_scale", "not a part of T5"),
)
T5_GGUF_DROPPED = (("dec.{rest}", _DECODER), ("output.weight", _DECODER))

T5_MFLUX = (
    ("encoder.block.{n}.layer.0.{rest}", "t5_blocks.{n}.attention.{rest}"),
    ("encoder.block.{n}.layer.1.{rest}", "t5_blocks.{n}.ff.{rest}"),
    ("encoder.final_layer_norm.weight", "final_layer_norm.weight"),
    *SAME,
)
T5_MFLUX_DROPPED = (
    ("t5_blocks.{n}.attention.SelfAttention.relative_attention_bias.weight", "a copy of that of block 0"),
)

T5_GGUF = (
    ("shared.weight", "token_embd.weight"),
    ("encoder.block.{n}.layer.0.SelfAttention.relative_attention_bias.weight", "enc.blk.{n}.attn_rel_b.weight"),
    ("encoder.block.{n}.layer.0.SelfAttention.{x}.weight", "enc.blk.{n}.attn_{x}.weight"),
    ("encoder.block.{n}.layer.0.layer_norm.weight", "enc.blk.{n}.attn_norm.weight"),
    ("encoder.block.{n}.layer.1.DenseReluDense.wi_0.weight", "enc.blk.{n}.ffn_gate.weight"),  # the one through GELU
    ("encoder.block.{n}.layer.1.DenseReluDense.wi_1.weight", "enc.blk.{n}.ffn_up.weight"),
    ("encoder.block.{n}.layer.1.DenseReluDense.wo.weight", "enc.blk.{n}.ffn_down.weight"),
    ("encoder.block.{n}.layer.1.layer_norm.weight", "enc.blk.{n}.ffn_norm.weight"),
    ("encoder.final_layer_norm.weight", "enc.output_norm.weight"),
)

# --- the filters ---

_V = "vit.encoder.layer.{n}"
VIT = (
    ("patch_embeddings.*", "vit.embeddings.patch_embeddings.projection.*"),
    ("layers.{n}.query.*", f"{_V}.attention.attention.query.*"),
    ("layers.{n}.key.*", f"{_V}.attention.attention.key.*"),
    ("layers.{n}.value.*", f"{_V}.attention.attention.value.*"),
    ("layers.{n}.projection.*", f"{_V}.attention.output.dense.*"),
    ("layers.{n}.intermediate.*", f"{_V}.intermediate.dense.*"),
    ("layers.{n}.output.*", f"{_V}.output.dense.*"),
    ("layers.{n}.{rest}", f"{_V}.{{rest}}"),
    ("layernorm.*", "vit.layernorm.*"),
    ("classifier.*", "classifier.*"),
    ("{x}", "vit.embeddings.{x}"),  # cls_token, position_embeddings
)
VIT_TRANSFORMERS_5 = _renamed(
    VIT, ("encoder.layer.", "layers."), (".attention.attention.query.", ".attention.q_proj."),
    (".attention.attention.key.", ".attention.k_proj."), (".attention.attention.value.", ".attention.v_proj."),
    (".attention.output.dense.", ".attention.o_proj."), (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
)  # fmt: skip

_L = "language_model.model.layers.{n}"
PIXTRAL = (
    ("layers.{n}.attention_norm.weight", f"{_L}.input_layernorm.weight"),
    ("layers.{n}.attention.{rest}", f"{_L}.self_attn.{{rest}}"),
    ("layers.{n}.ffn_norm.weight", f"{_L}.post_attention_layernorm.weight"),
    ("layers.{n}.feed_forward.{rest}", f"{_L}.mlp.{{rest}}"),
    ("lm_head.weight", Pick("language_model.lm_head.weight", "language_model.model.embed_tokens.weight")),
    ("vision_tower.layers.{rest}", "vision_tower.transformer.layers.{rest}"),
    ("vision_tower.{rest}", "vision_tower.{rest}"),
    ("multi_modal_projector.{rest}", "multi_modal_projector.{rest}"),
    ("{rest}", "language_model.model.{rest}"),  # embed_tokens, norm
)
PIXTRAL_TRANSFORMERS_5 = _renamed(
    PIXTRAL, ("language_model.lm_head.", "lm_head."), ("language_model.model.", "model.language_model."),
    ("vision_tower.", "model.vision_tower."), ("multi_modal_projector.", "model.multi_modal_projector."),
)  # fmt: skip
PIXTRAL_MLX = _renamed(PIXTRAL, ("vision_tower.", "vision_tower.vision_model."))

# --- Redux ---

_E = "vision_model.encoder.layers.{n}"
SIGLIP = (
    ("patch_embedding.*", "vision_model.embeddings.patch_embedding.*"),
    ("position_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("layers.{n}.{x}_proj.*", f"{_E}.self_attn.{{x}}_proj.*"),
    ("layers.{n}.fc{m}.*", f"{_E}.mlp.fc{{m}}.*"),
    ("layers.{n}.{x}.*", f"{_E}.{{x}}.*"),
    ("post_layernorm.*", "vision_model.post_layernorm.*"),
)
SIGLIP_DROPPED = (
    ("vision_model.head.{rest}", "Redux reads the vectors of all patches, before this pooling"),
    ("{rest}.position_ids", "positions are counted, not stored"),
    ("text_model.{rest}", "belongs to SigLIP's encoder of texts"),
    ("logit_scale", "belongs to SigLIP's training"),
    ("logit_bias", "belongs to SigLIP's training"),
)
SIGLIP_TRANSFORMERS_5 = _renamed(SIGLIP, ("vision_model.", ""))
SIGLIP_TRANSFORMERS_5_DROPPED = (("head.{rest}", SIGLIP_DROPPED[0][1]), *SIGLIP_DROPPED[1:2])
REDUX = SAME
# --- networks beside models ---

_B = "backbone.encoder.layer.{n}"
DEPTH = (
    ("cls_token", "backbone.embeddings.cls_token"),
    ("position_embeddings", "backbone.embeddings.position_embeddings"),
    ("patch_embeddings.*", "backbone.embeddings.patch_embeddings.projection.*"),
    ("layers.{n}.query.*", f"{_B}.attention.attention.query.*"),
    ("layers.{n}.key.*", f"{_B}.attention.attention.key.*"),
    ("layers.{n}.value.*", f"{_B}.attention.attention.value.*"),
    ("layers.{n}.projection.*", f"{_B}.attention.output.dense.*"),
    ("layers.{n}.layer_scale1", f"{_B}.layer_scale1.lambda1"),
    ("layers.{n}.layer_scale2", f"{_B}.layer_scale2.lambda1"),
    ("layers.{n}.fc1.*", f"{_B}.mlp.fc1.*"),
    ("layers.{n}.fc2.*", f"{_B}.mlp.fc2.*"),
    ("layers.{n}.{rest}", f"{_B}.{{rest}}"),  # norm1, norm2
    ("layernorm.*", "backbone.layernorm.*"),
    ("reassemble.{rest}", "neck.reassemble_stage.layers.{rest}"),
    ("fusion.{rest}", "neck.fusion_stage.layers.{rest}"),
    ("convs.{rest}", "neck.convs.{rest}"),
    ("{x}.*", "head.{x}.*"),
)
DEPTH_TRANSFORMERS_5 = _renamed(
    DEPTH, (".attention.attention.query.", ".attention.q_proj."), (".attention.attention.key.", ".attention.k_proj."),
    (".attention.attention.value.", ".attention.v_proj."), (".attention.output.dense.", ".attention.o_proj."),
)  # fmt: skip
DEPTH_DROPPED = (
    ("backbone.embeddings.mask_token", "belongs to the backbone's training"),
    ("neck.fusion_stage.layers.0.residual_layer1.{rest}", "the first fusion has nothing to add to"),
)
