"""Every layout of file that people hold, by names and shapes at full size; its variants, and what is wrong with some.

What comes out of each layout and type is in test_any_file.
"""

import json
import math
import random
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import foreign
import gguf
import mlx.core as mx
import numpy as np
import pytest
import sentencepiece
from click.testing import CliRunner
from helpers import TOKENIZERS, edit_tensors
from mlx_flux_krea.convert import convert, decode, fit
from mlx_flux_krea.convert.formats import join_parts
from mlx_flux_krea.convert.gguf_header import read_gguf
from mlx_flux_krea.convert.identify import identify
from mlx_flux_krea.convert.sources import Source, open_sources
from mlx_flux_krea.convert.tensors import Tensor
from mlx_flux_krea.convert.tokenizers import unpack

from mlx_flux_krea import cli
from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.models import config as configs
from mlx_flux_krea.models.filter_config import NSFW_VIT, PIXTRAL_12B
from mlx_flux_krea.tokenizers import T5Tokenizer
from mlx_flux_krea.weights import COMPONENTS, open_model

PARAMETERS = {
    "transformer": 11_901_408_320,
    "text_encoder": 123_060_480,
    "text_encoder_2": 4_762_310_656,
    "vae": 83_819_683,
    "nsfw": 85_800_194,
    "pixtral": 12_682_739_712 - (131_072 - 2) * 5120,  # of the head only two rows are kept
    "image_encoder": 428_225_600 - 15_238_352,  # without the head
    "image_embedder": 64_503_808,
}
GUIDANCE = (256 + 1) * 3072 + (3072 + 1) * 3072  # of those; schnell has none
SPECIAL = {  # transformers of other sizes, and by how many parameters they differ
    "schnell": (configs.FLUX_SCHNELL, -GUIDANCE),
    "fill": (configs.FLUX_FILL, 3072 * (384 - 64)),
    "control": (configs.FLUX_CONTROL, 3072 * (128 - 64)),
}
PUBLISHED = {
    "transformer": configs.FLUX_DEV,
    "text_encoder": configs.CLIP_L,
    "text_encoder_2": configs.T5_XXL,
    "vae": configs.FLUX_VAE,
    "nsfw": NSFW_VIT,
    "pixtral": PIXTRAL_12B,
    "image_encoder": configs.SIGLIP_SO400M,
    "image_embedder": configs.REDUX_DEV,
}


def published(layout: str, prefix: str = "") -> Source:
    """A source with the tensors of a published file, and no file."""
    path = Path("nowhere") / f"{layout}.safetensors"
    tensors = {prefix + n: (dtype, shape) for n, (dtype, shape) in foreign.published(layout).items()}
    stored = {n: Tensor(n, path, dtype, shape, 0, 0) for n, (dtype, shape) in tensors.items()}
    return Source(path, (path,), join_parts(stored), {})


def names_in(plan) -> set[str]:
    tensors = (tensor for target in plan.targets for tensor in target.sources)
    return {t.name for tensor in tensors for t in (tensor, *tensor.parts)}


# --- full size, without weights ---
LAYOUTS = {
    name: row
    for name in foreign.layouts()
    for start, row in {
        "bfl-transformer": ("transformer", "transformer, Black Forest Labs"),
        "comfy-transformer": ("transformer", "transformer, Black Forest Labs"),
        "gguf-flux": ("transformer", "transformer, Black Forest Labs"),
        "diffusers-transformer": ("transformer", "transformer, diffusers"),
        "bfl-ae": ("vae", "VAE, Black Forest Labs"),
        "diffusers-vae": ("vae", "VAE, diffusers"),
        "comfy-clip_l": ("text_encoder", "CLIP text model"),
        "hf-text_encoder-clip_l": ("text_encoder", "CLIP text model"),
        "comfy-t5xxl": ("text_encoder_2", "T5 v1.1 encoder"),
        "hf-text_encoder_2-t5xxl": ("text_encoder_2", "T5 v1.1 encoder"),
        "gguf-t5xxl": ("text_encoder_2", "T5 v1.1 encoder, llama.cpp"),
        "hf-nsfw_image_detection-vit": ("nsfw", "classifier ViT"),
        "hf-pixtral-12b-llava": ("pixtral", "Pixtral"),
        "comfy-sigclip_vision_patch14_384": ("image_encoder", "SigLIP"),
        "bfl-redux": ("image_embedder", "Redux"),
    }.items()
    if name.startswith(start)
}
for kind in ("unquantized", "q4", "q8"):
    LAYOUTS |= {
        f"mflux-{kind}-transformer": ("transformer", "transformer, mflux"),
        f"mflux-{kind}-transformer-v016": ("transformer", "transformer, mflux"),
        f"mflux-{kind}-text_encoder": ("text_encoder", "CLIP text model"),
        f"mflux-{kind}-text_encoder_2": ("text_encoder_2", "T5 v1.1 encoder, mflux"),
        f"mflux-{kind}-vae": ("vae", "VAE, mflux"),
    }
LAYOUTS["hf-text_encoder-clip_l-transformers5"] = ("text_encoder", "CLIP text model, transformers 5")
REFUSED = {
    **{name: "a LoRA" for name in foreign.layouts() if name.startswith("lora-")},
}


def test_no_published_layout_is_forgotten():
    assert {*LAYOUTS, *REFUSED, "comfy-allinone-dev-fp8"} == set(foreign.layouts())


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tensor_of_a_published_layout_is_mapped_or_left_out_for_a_reason(name):
    """And every tensor of ours is filled, with its shape."""
    component, layout = LAYOUTS[name]
    (found,) = identify(published(name))
    assert (found.layout.component, found.layout.name) == (component, layout)
    config, plan = fit.make_plan(found)
    dropped = {t.name for n, _ in plan.dropped for t in (found.tensors[n], *found.tensors[n].parts)}
    assert names_in(plan).isdisjoint(dropped)
    assert set(foreign.published(name)) == names_in(plan) | dropped
    assert all(len(reason) > 5 for _, reason in plan.dropped)
    assert {t.name: t.shape for t in plan.targets} == fit.target_shapes(component, config)
    special = next((kind for kind in SPECIAL if component == "transformer" and kind in name), None)
    expected, more = SPECIAL[special] if special else (PUBLISHED[component], 0)
    assert plan.parameters == PARAMETERS[component] + more
    assert config == expected
    lost = [name for name, _ in plan.lost]
    assert lost == (["final_layer.adaLN_modulation.1.bias"] if "v016" in name else [])


def renamed(name: str, *changes: tuple[str, str]) -> Source:
    """A published layout under the names of another program."""
    source, tensors = published(name), {}
    for old, tensor in source.tensors.items():
        new = old
        for theirs, other in changes:
            new = re.sub(theirs, other, new)
        tensors[new] = replace(tensor, name=new)
    return replace(source, tensors=tensors)


FILTERS = {
    "classifier ViT, transformers 5": (
        "hf-nsfw_image_detection-vit", (r"encoder\.layer\.", "layers."),
        (r"attention\.attention\.(.)\w+", r"attention.\1_proj"),
        (r"attention\.output\.dense", "attention.o_proj"),
        (r"intermediate\.dense", "mlp.fc1"),
        (r"output\.dense", "mlp.fc2"),
    ),
    "Pixtral, transformers 5": (
        "hf-pixtral-12b-llava", (r"^(vision_tower|multi_modal)", r"model.\1"), (r"^language_model\.lm_head", "lm_head"),
        (r"^language_model\.model", "model.language_model"),
    ),
    "Pixtral, mlx-vlm": ("hf-pixtral-12b-llava", (r"^vision_tower\.", "vision_tower.vision_model.")),
}  # fmt: skip


@pytest.mark.parametrize("layout", FILTERS)
def test_other_names_of_the_filters_are_mapped_to_the_same(layout):
    """As transformers 5 holds them in memory, and as mlx-vlm writes them."""
    name, *changes = FILTERS[layout]
    (found,) = identify(source := renamed(name, *changes))
    assert found.layout.name == layout
    config, plan = fit.make_plan(found)
    assert names_in(plan) == source.tensors.keys()
    assert (config, plan.parameters) == (PUBLISHED[found.layout.component], PARAMETERS[found.layout.component])


def test_of_pixtrals_head_only_the_rows_of_yes_and_no_are_read():
    (found,) = identify(published("hf-pixtral-12b-llava"))
    _, plan = fit.make_plan(replace(found, tensors={n: sized(t) for n, t in found.tensors.items()}))
    (head,) = (target for target in plan.targets if target.name == "lm_head.weight")
    assert [(row.start, row.end) for row in head.sources] == [(n * 10_240, (n + 1) * 10_240) for n in (13_059, 2649)]


def sized(tensor: Tensor) -> Tensor:
    return replace(tensor, end=2 * math.prod(tensor.shape))


def test_the_all_in_one_file_holds_all_components():
    found = identify(published("comfy-allinone-dev-fp8"))
    plans = {f.layout.component: (f, fit.make_plan(f)[1]) for f in found}
    assert {component: plan.parameters for component, (_, plan) in plans.items()} == {
        c: PARAMETERS[c] for c in COMPONENTS
    }
    dropped = {name: reason for _, plan in plans.values() for name, reason in plan.dropped}
    scales = {f"text_encoders.{name}.logit_scale" for name in ("clip_l", "t5xxl")}
    assert set(dropped) == {*scales, "text_projection.weight"}
    assert sum(len(names_in(plan)) + len(plan.dropped) for _, plan in plans.values()) == 1442


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("name", ["bfl-transformer-dev", "comfy-transformer-krea-fp8_scaled", "gguf-flux-dev-Q4_K_S"])
def test_prefixes_of_published_layouts_are_taken_off(name, prefix):
    (found,) = identify(published(name, prefix))
    assert fit.make_plan(found)[1].parameters == PARAMETERS["transformer"]


@pytest.mark.parametrize("name", ["mflux-q4-transformer", "mflux-q8-text_encoder_2", "gguf-t5xxl-Q5_K_M"])
def test_the_rules_made_beside_the_published_files_say_the_same_as_our_tables(name):
    layout = "mflux" if "mflux" in name else "llama.cpp"
    check_rules(*identify(published(name)), layout)


@pytest.mark.parametrize("name", ["diffusers-transformer-dev", "diffusers-vae", "mflux-unquantized-vae"])
def test_the_rules_of_diffusers_say_the_same_as_our_tables(name):
    check_rules(*identify(published(name)), name.split("-")[0])


def check_rules(found, layout):
    rules = foreign.rules(found.layout.component, layout)
    targets = fit.make_plan(found)[1].targets
    assert {t.name for t in targets} == set(rules)
    for target in targets:
        how, names = rules[target.name]
        assert ([t.name for t in target.sources], target.swap) == (names, how == "swap_row_halves"), target.name


def test_the_types_of_quantized_layouts_are_read_for_each_tensor():
    (found,) = identify(published("gguf-t5xxl-Q5_K_M"))
    types = {t.name: t.sources[0].dtype for t in fit.make_plan(found)[1].targets}
    values = {types[f"encoder.block.{n}.layer.0.SelfAttention.v.weight"] for n in range(24)}
    assert values == {"Q5_K", "Q6_K"}
    (found,) = identify(published("mflux-q4-transformer"))
    types = {tensor.dtype for tensor in found.tensors.values()}
    assert types == {"4-bit MLX", "BF16"}


# --- look-alikes ---

OTHERS = {  # tensors that give others away, of which no list is kept
    "Chroma": ["distilled_guidance_layer.in_proj.weight", "double_blocks.0.img_attn.norm.query_norm.scale"],
    "FLUX.2": ["double_stream_modulation_img.lin.weight", "double_blocks.0.img_attn.norm.query_norm.scale"],
    "Krea 2": ["blocks.0.attn.qknorm.qnorm.scale", "txtfusion.projector.weight"],
    "Krea 2 ": ["transformer_blocks.0.attn.to_gate.weight", "text_fusion.projector.weight"],
    "Stable Diffusion 3": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
    "Stable Diffusion 3 ": ["transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight"],
    "Stable Diffusion XL": ["conditioner.embedders.1.model.ln_final.weight", "first_stage_model.x"],
    "Stable Diffusion XL ": ["add_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight"],
    "Stable Diffusion 1, 2 or XL": ["model.diffusion_model.input_blocks.0.0.weight"],
    "Qwen-Image": ["transformer_blocks.0.img_mod.1.weight", "transformer_blocks.0.attn.norm_added_q.weight"],
    "HiDream": ["double_stream_blocks.0.block.adaLN_modulation.1.weight"],
    "HunyuanVideo": ["txt_in.individual_token_refiner.blocks.0.norm1.weight", "double_blocks.0.img_mlp.fc1.weight"],
    "Lumina 2 or Z-Image": ["noise_refiner.0.attention.qkv.weight"],
    "a FLUX.1 in DiffusionKit": ["multimodal_transformer_blocks.0.image_transformer_block.attn.q_proj.weight"],
    "an IP-Adapter": ["double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"],
    "an IP-Adapter ": ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"],
    "the autoencoder of FLUX.2": ["encoder.conv_in.weight", "bn.running_mean", "quant_conv.weight"],
    "the autoencoder of Stable Diffusion": ["first_stage_model.quant_conv.weight", "first_stage_model.decoder.conv_in"],
    "a tiny autoencoder": ["taesd_decoder.1.weight"],
    "a tiny autoencoder ": ["encoder.layers.0.weight", "decoder.layers.1.weight", "decoder.layers.3.conv.0.weight"],
    "a tiny autoencoder  ": ["1.weight", "3.conv.0.weight"],
    "UMT5": [f"encoder.block.{n}.layer.0.SelfAttention.relative_attention_bias.weight" for n in range(3)],
    "UMT5 ": [f"enc.blk.{n}.attn_rel_b.weight" for n in range(3)],
    "T5 of version 1.0": ["shared.weight", "encoder.block.0.layer.1.DenseReluDense.wi.weight"],
    "T5's decoder": ["decoder.block.0.layer.1.EncDecAttention.q.weight"],
    "LongCLIP": ["positional_embedding_res", "token_embedding.weight"],
    "CLIP in OpenAI's or OpenCLIP's names": ["transformer.resblocks.0.attn.in_proj_weight"],
    "CLIP's encoder of pictures": ["vision_model.pre_layrnorm.weight"],
    "a bitsandbytes int8": ["double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.qkv.SCB"],
    "a DFloat11": ["double_blocks.0.img_attn.encoded_exponent", "double_blocks.0.img_attn.sign_mantissa"],
    "an Optimum Quanto": ["img_in.weight._data", "img_in.weight._scale"],
    "a GPTQ or AWQ": ["layers.0.qkv.qweight", "layers.0.qkv.qzeros"],
    "an HQQ": ["img_in.W_q", "img_in.meta"],
    "a compressed-tensors": ["img_in.weight_packed", "img_in.weight_shape"],
    "a ControlNet": ["controlnet_blocks.0.weight", "x_embedder.weight"],
    "a LoRA": ["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"],
    "a bitsandbytes NF4": ["double_blocks.0.img_mlp.0.weight", "double_blocks.0.img_mlp.0.weight.absmax"],
    "a bitsandbytes NF4 ": ["img_in.weight", "img_in.weight.quant_state.bitsandbytes__nf4"],
    "a Nunchaku SVDQuant file without its weights": ["single_transformer_blocks.0.mlp_fc1.wscales"],
}


@pytest.mark.parametrize(("name", "model"), REFUSED.items())
def test_published_look_alikes_are_refused_by_name(name, model):
    with pytest.raises(ModelError, match=rf"{name}.* is {model}.*expected FLUX.1 Krea"):
        identify(published(name))


@pytest.mark.parametrize("model", OTHERS)
def test_other_look_alikes_are_refused_by_name_and_inspected_as_what_they_are(tmp_path, model):
    file = tmp_path / "model.safetensors"
    foreign.save(file, {name: ("U8", (4,), bytes(4)) for name in OTHERS[model]})
    with pytest.raises(ModelError, match=f"model.safetensors is {model.strip()}.*expected FLUX.1 Krea"):
        convert([file], tmp_path / "out")
    shown = CliRunner().invoke(cli.cli, ["inspect", str(file)], catch_exceptions=False)
    assert (shown.exit_code, f"is {model.strip()}" in shown.output) == (0, True)


def test_an_unknown_gguf_is_called_what_it_says_it_is(tmp_path):
    foreign.save_gguf(tmp_path / "m.gguf", {"blk.0.attn_q.weight": mx.zeros((32, 32))}, "F16", arch="llama")
    with pytest.raises(ModelError, match=r"has no known layout \(it says that it is 'llama', and holds blk"):
        convert([tmp_path / "m.gguf"], tmp_path / "out")


# --- what else the same content may look like; test_any_file has the layouts themselves ---


def converted(source: Path, tmp_path: Path, **options) -> Path:
    options = {"dtype": "float32", "tokenizers": TOKENIZERS} | options
    return convert([source], tmp_path / "out", **options).path


def test_every_value_of_e4m3_and_every_ggml_type_decode_as_elsewhere():
    codes = np.arange(256, dtype=np.uint8)
    values = np.array(decode.TYPES["F8_E4M3"].decode(codes, (256,)).astype(mx.float32))
    assert np.array_equal(values, foreign.e4m3(), equal_nan=True)
    known = {name for number, name in decode.GGML.items() if gguf.GGMLQuantizationType(number).name == name}
    assert known == set(decode.GGML.values())
    for name in known:
        block = decode.TYPES[name].numbers, decode.TYPES[name].bytes
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == block


def test_newer_names_of_transformers_and_comfyui_hold_the_same(model, tmp_path):
    source = foreign.write(model, tmp_path / "source", "BFL")

    def rename(file, old, new):
        def edit(arrays):
            for name in [n for n in arrays if old in n]:
                arrays[name.replace(old, new, 1)] = arrays.pop(name)

        edit_tensors(source / file, edit)

    rename("clip_l.safetensors", "text_model.", "")
    rename("flux1-krea-dev.safetensors", "_norm.scale", "_norm.weight")
    foreign.assert_same(converted(source, tmp_path), foreign.arrays_of(model))


def test_the_bias_that_mflux_drops_is_zero_and_reported_as_lost(model, tmp_path):
    source = foreign.write(model, tmp_path / "source", "mflux")
    for shard in (source / "transformer").glob("*.safetensors"):
        edit_tensors(shard, lambda a: a.pop("norm_out.linear.bias", None))
    report = convert([source], tmp_path / "out", dtype="float32", tokenizers=TOKENIZERS)
    lost = next(c.lost for c in report.components if c.name == "transformer")
    assert lost == (
        ("final_layer.adaLN_modulation.1.bias", "mflux 0.16 and later drop it when they save; it cannot be recovered"),
    )
    wanted = foreign.arrays_of(model)
    name = lost[0][0]
    wanted["transformer"][name] = mx.zeros_like(wanted["transformer"][name])
    foreign.assert_same(report.path, wanted)


def test_a_bias_is_not_lost_without_a_word_in_other_layouts(model, tmp_path):
    source = foreign.write(model, tmp_path / "source", "BFL")
    edit_tensors(source / "flux1-krea-dev.safetensors", lambda a: a.pop("final_layer.adaLN_modulation.1.bias"))
    with pytest.raises(ModelError, match=r"lacks final_layer.adaLN_modulation.1.bias"):
        converted(source, tmp_path)


def test_scales_of_activations_and_markers_are_left_out_for_a_reason(model, tmp_path):
    source = foreign.write(model, tmp_path / "source", "BFL", transformer="scaled")
    report = convert([source], tmp_path / "out", dtype="float32", tokenizers=TOKENIZERS)
    dropped = next(c.dropped for c in report.components if c.name == "transformer")
    assert ("scaled_fp8", "says that the file is of this kind") in dropped
    assert ("img_in.scale_input", "a scale of activations, not of weights") in dropped


@pytest.mark.parametrize(
    ("parts", "scales"),
    [
        ({"scales": ("F32", (64, 8))}, "MXFP4 has no scales of 32 bits"),
        ({"scales": ("U8", (64, 7))}, "no mode has so many"),
        ({"scales": ("I64", (64, 1)), "biases": ("I64", (64, 1))}, "affine scales are floats"),
        ({"scales": ("BF16", (64, 3)), "biases": ("BF16", (64, 3))}, "no number of bits"),
        ({"scales": ("BF16", (64, 1)), "biases": ("BF16", (64, 2))}, "a bias to a scale"),
        ({"scales": ("BF16", (0,)), "biases": ("BF16", (0,))}, "nothing"),
        ({"scales": ("BF16", ()), "biases": ("BF16", ())}, "a number"),
    ],
)
def test_parts_that_make_no_weight_are_left_as_they_are_and_so_refused(parts, scales):
    path = Path("nowhere")
    tensors = {"a.weight": Tensor("a.weight", path, "U32", (64, 8), 0, 0)}
    tensors |= {f"a.{n}": Tensor(f"a.{n}", path, dtype, shape, 0, 0) for n, (dtype, shape) in parts.items()}
    assert join_parts(tensors) == tensors, scales
    assert join_parts(tensors, lambda layer: 48) == tensors, scales


@pytest.mark.parametrize("dtype", ["U32", "F8_E4M3"])
def test_vectors_are_never_taken_for_packed_weights(dtype):
    stored = {"a.weight": (dtype, (8,)), "a.scales": ("BF16", (1,)), "a.biases": ("BF16", (1,))}
    tensors = {n: Tensor(n, Path("nowhere"), kind, shape, 0, 0) for n, (kind, shape) in stored.items()}
    assert join_parts(tensors) == tensors


@pytest.mark.parametrize("scale", [(2,), (64, 2), (1, 64), (0,)])
def test_scales_of_another_shape_are_not_guessed_at(model, tmp_path, scale):
    """Per row or per block: other kinds of fp8."""
    source = foreign.write(model, tmp_path / "source", "BFL", transformer="metadata")
    file = source / "flux1-krea-dev.safetensors"
    ours = foreign.arrays_of(model)["transformer"]
    tensors = foreign.stored(foreign.take_apart(ours, "transformer", "BFL"), "metadata")
    tensors["img_in.weight_scale"] = ("F32", scale, bytes(4 * math.prod(scale)))
    foreign.save(file, tensors)
    with pytest.raises(ModelError, match=r"has the unknown tensor img_in\.weight_scale"):
        converted(source, tmp_path)


def test_packed_weights_whose_scales_do_not_fit_are_refused(model, tmp_path):
    source = foreign.write(model, tmp_path / "source", "mflux", transformer="q4")
    for shard in (source / "transformer").glob("*.safetensors"):
        edit_tensors(shard, lambda a: a.update({n: a[n][:, :0] for n in a if n == "x_embedder.scales"}))
    with pytest.raises(ModelError, match=r"x_embedder\.(scales|weight)"):
        converted(source, tmp_path)


# --- what a source may be ---


def test_comfyuis_files_may_be_given_one_by_one(model, tmp_path):
    source = foreign.write(model, tmp_path / "source", "ComfyUI")
    files = sorted(source.rglob("*.safetensors"))
    path = convert(files, tmp_path / "out", dtype="float32", tokenizers=TOKENIZERS).path
    foreign.assert_same(path, foreign.arrays_of(model))


def test_the_record_of_an_all_in_one_file_names_it_once(model, tmp_path):
    path = converted(foreign.write(model, tmp_path / "source", "all-in-one"), tmp_path)
    (record,) = open_model(path).index.source
    assert record.file == "flux1-krea-dev-all.safetensors"
    assert [part.split(",")[0] for part in record.layout.split("; ")] == [
        "transformer", "CLIP text model", "T5 v1.1 encoder", "VAE",
    ]  # fmt: skip


def test_a_model_folder_of_ours_is_a_source_like_others(model, tmp_path):
    """Its own metadata is kept."""
    path = converted(model, tmp_path)
    foreign.assert_same(path, foreign.arrays_of(model))
    before, after = open_model(model).index, open_model(path).index
    same = ("name", "base", "license", "filters", "schedule", "defaults", "max_sequence_length")
    assert [getattr(after, field) for field in same] == [getattr(before, field) for field in same]


def test_a_model_folder_that_requires_filters_still_does_when_converted(model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"filters": "required", "base": "FLUX.1 Krea [dev]"}))
    made = open_model(converted(folder, tmp_path)).index
    assert (made.filters, made.base) == ("required", "FLUX.1 Krea [dev]")


def test_the_tokenizers_of_a_model_folder_go_with_it(model, tmp_path):
    path = convert([model], tmp_path / "out", dtype="bfloat16").path
    assert (path / "tokenizer" / "merges.txt").read_bytes() == (model / "tokenizer" / "merges.txt").read_bytes()


@pytest.mark.parametrize(
    ("layout", "types", "shown"),
    [
        ("ComfyUI", {"transformer": "scaled"}, ["transformer, Black Forest Labs", "scaled F8_E4M3"]),
        ("all-in-one", {"transformer": "F8_E4M3"}, ["T5 v1.1 encoder", "CLIP text model", "VAE, Black", "F8_E4M3"]),
        ("mflux", {"transformer": "q4"}, ["transformer, mflux", "T5 v1.1 encoder, mflux", "VAE, mflux", "4-bit MLX"]),
        ("GGUF", {"transformer": "Q4_K", "text_encoder_2": "Q8_0"}, ["T5 v1.1 encoder, llama.cpp", "Q4_K", "Q8_0"]),
    ],
)
def test_inspect_names_every_layout_and_reads_no_tensor(model, tmp_path, monkeypatch, layout, types, shown):
    source = foreign.write(model, tmp_path / "source", layout, **types)
    monkeypatch.setattr(Tensor, "read", lambda tensor: pytest.fail("read"))
    seen = CliRunner().invoke(cli.cli, ["inspect", str(source)], catch_exceptions=False)
    assert seen.exit_code == 0
    assert [text for text in shown if text not in seen.output] == []
    assert "not known" not in seen.output
    facts = json.loads(CliRunner().invoke(cli.cli, ["inspect", str(source), "--json"], catch_exceptions=False).output)[
        "sources"
    ]
    assert {fact["component"] for fact in facts} == set(COMPONENTS)


def test_without_the_package_gguf_its_types_are_named_before_anything_is_written(model, tmp_path, monkeypatch):
    source = foreign.write(model, tmp_path / "source", "GGUF", transformer="Q8_0")
    monkeypatch.setattr(decode, "find_spec", lambda name: None)
    with pytest.raises(
        ModelError, match=r"stored as Q8_0; expected the package gguf.*pip install 'mlx-flux-krea\[gguf\]'"
    ):
        converted(source, tmp_path)
    assert not (tmp_path / "out").exists()


# --- GGUF headers and what they carry ---


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    """A small sentencepiece model of T5's kind, and its text."""
    folder = tmp_path_factory.mktemp("spiece")
    words = (
        "a", "cat", "holds", "the", "sign", "that", "says", "hello", "world", "while", "rain", "falls", "on", "an",
        "old", "stone", "bridge", "over", "water",
    )  # fmt: skip
    choose = random.Random(0)
    (folder / "text").write_text("\n".join(" ".join(choose.choices(words, k=8)) for _ in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "spiece"), vocab_size=40, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return folder / "spiece.model"


def add_tokenizer(writer: gguf.GGUFWriter, spiece: Path, vocabulary: int) -> None:
    """As llama.cpp's converter does: filled up to the size of the embedding."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(spiece))
    kinds = [2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 1 for i in range(pieces.get_piece_size())]
    fill = vocabulary - len(kinds)
    writer.add_tokenizer_model("t5")
    writer.add_token_list([pieces.id_to_piece(i) for i in range(len(kinds))] + [f"[PAD{i}]" for i in range(fill)])
    writer.add_token_scores([pieces.get_score(i) for i in range(len(kinds))] + [-1000.0] * fill)
    writer.add_token_types(kinds + [5] * fill)
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(True)
    writer.add_precompiled_charsmap(charsmap(spiece))


def charsmap(spiece: Path) -> bytes:
    """Field 2 of field 3 of a sentencepiece model."""

    def fields(data):
        at = 0

        def varint():
            nonlocal at
            value = shift = 0
            while True:
                byte = data[at]
                at += 1
                value |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    return value

        while at < len(data):
            number, wire = divmod(varint(), 8)
            size = {0: 0, 1: 8, 5: 4}.get(wire)
            if wire == 0:
                yield number, varint()
                continue
            size = varint() if size is None else size
            yield number, data[at : at + size]
            at += size

    return next(v for n, v in fields(next(v for n, v in fields(spiece.read_bytes()) if n == 3)) if n == 2)


def t5_gguf(model: Path, target: Path, add) -> Path:
    """Single files with a T5 in GGUF, which carries a tokenizer."""
    source = foreign.write(model, target, "GGUF", transformer="F16", text_encoder_2="F16")
    arrays = foreign.take_apart(foreign.arrays_of(model)["text_encoder_2"], "text_encoder_2", "llama.cpp")
    foreign.save_gguf(source / "t5xxl.gguf", arrays, "F16", "t5encoder", add=add)
    shutil.copytree(TOKENIZERS / "tokenizer", source / "tokenizer")
    return source


TEXTS = (
    "a cat holds the sign", "  hello   world  ", "ﬁne Ⅷ ①", "stone\nbridge", "", "</s> rain <extra_id_3>", "ünknown 猫",
)  # fmt: skip


def test_the_tokenizer_of_a_t5_gguf_is_used_and_gives_the_same_ids(model, tmp_path, spiece):
    source = t5_gguf(model, tmp_path / "source", lambda writer: add_tokenizer(writer, spiece, 32128))
    path = converted(source, tmp_path, tokenizers=None)
    (tmp_path / "own").mkdir()
    shutil.copy(spiece, tmp_path / "own" / "spiece.model")
    ours, own = T5Tokenizer(path / "tokenizer_2"), T5Tokenizer(tmp_path / "own")
    assert [text for text in TEXTS if ours(text, 64) != own(text, 64)] == []
    assert ours.vocab_size == own.vocab_size
    assert [p.name for p in (path / "tokenizer_2").iterdir()] == ["spiece.model"]


def test_the_published_tokenizer_comes_out_of_a_gguf_as_it_went_in(published, tmp_path):
    def add(writer):
        add_tokenizer(writer, published / "t5" / "spiece.model", 32128)

    foreign.save_gguf(tmp_path / "t5.gguf", {"token_embd.weight": mx.zeros((2, 32))}, "F16", "t5encoder", add=add)
    tokenizer = T5Tokenizer(unpack(tmp_path / "t5.gguf", tmp_path) / "tokenizer_2")
    prompts = json.loads((published / "golden.json").read_text())["prompts"]
    assert [p["name"] for p in prompts if tokenizer(p["text"], 512).ids != p["t5"]] == []


def test_a_tokenizer_named_or_beside_the_source_comes_before_that_of_a_gguf(model, tmp_path, spiece):
    source = t5_gguf(model, tmp_path / "source", lambda writer: add_tokenizer(writer, spiece, 32128))
    path = converted(source, tmp_path)
    assert [p.name for p in (path / "tokenizer_2").iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize(
    ("tokens", "scores", "says"),
    [(["a"], [0.0, 1.0], "is incomplete"), (["a", "b"], [0.0, 1.0], "is damaged"), (None, [0.0], "is incomplete")],
)
def test_a_tokenizer_in_a_gguf_that_is_none_is_refused(model, tmp_path, tokens, scores, says):
    def add(writer):
        writer.add_tokenizer_model("t5")
        if tokens:
            writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types([1] * len(scores))

    source = t5_gguf(model, tmp_path / "source", add)
    with pytest.raises(ModelError, match=rf"the tokenizer inside .*t5xxl.gguf {says}"):
        converted(source, tmp_path, tokenizers=None)


def header(tensors=(), entries=(), version=3, counts=None, data=bytes(256)) -> bytes:
    """A GGUF file put together by hand: entries are (key, type, bytes), tensors (name, axes, type, offset)."""

    def string(text):
        text = text.encode() if isinstance(text, str) else text
        return struct.pack("<Q", len(text)) + text

    made = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(entries))))
    made += b"".join(string(key) + struct.pack("<I", kind) + value for key, kind, value in entries)
    for name, axes, kind, offset in tensors:
        made += string(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, offset)
    return made + bytes(-len(made) % 32) + data


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"GGUF", "its header asks for 4 bytes where 0 are left"),
        (header(version=1), "is of version 1"),
        (header(version=3 << 24), "another order of bytes"),
        (header(counts=(2**63, 0)), "counts 9223372036854775808 tensors"),
        (header(counts=(0, 2**63)), "counts 9223372036854775808 entries"),
        (header(counts=(3, 0), data=b""), "its header asks for"),
        (header([("a", (64,), 0, 32)]), "ends before a does"),
        (header([("a", (64,), 0, 2**63)]), "ends before a does"),
        (header([("a", (2**62, 2**62), 0, 0)]), "ends before a does"),
        (header([("a", (32,), 0, 0), ("b", (32,), 0, 64)]), "b lies on top of another tensor"),
        (header([("a", (8,), 0, 0), ("a", (8,), 0, 32)]), "a is in it twice"),
        (header([("a", (8,), 99, 0)]), "a is of the ggml type 99, and only these are known: F32, F16"),
        (header([("a", (8,), 4, 0)]), "a is of the ggml type 4"),
        (header([("a", (33,), 8, 0)]), r"a of shape \[33\] cannot be stored as Q8_0"),
        (header([("a", (0,), 0, 0)]), r"a of shape \[0\] cannot be"),
        (header([("a", (1,) * 9, 0, 0)]), "a has 9 axes"),
        (header([(b"\xff", (8,), 0, 0)]), "can't decode byte 0xff"),
        (header(entries=[("k", 9, struct.pack("<IQ", 8, 2**40))]), "counts 1099511627776 strings"),
        (header(entries=[("k", 9, struct.pack("<IQ", 6, 2**62))]), "its header asks for"),
        (header(entries=[("k", 9, struct.pack("<IQ", 9, 1))]), "an array is of type 9"),
        (header(entries=[("k", 8, struct.pack("<Q", 2**62))]), "its header asks for"),
        (header(entries=[("k", 77, b"")]), "a value is of type 77"),
        (header(entries=[("general.alignment", 4, struct.pack("<I", 0))]), "is no power of two"),
        (header(entries=[("general.alignment", 8, struct.pack("<Q", 1) + b"x")]), "is no power of two"),
    ],
)  # fmt: skip
def test_a_hostile_gguf_header_is_refused_in_one_line(tmp_path, data, says):
    file = tmp_path / "a.gguf"
    file.write_bytes(data)
    with pytest.raises(ModelError, match=rf"a.gguf cannot be read: .*{says}.*; expected a complete GGUF") as caught:
        open_sources([file])
    assert str(caught.value).isprintable()


def test_names_in_a_gguf_are_held_to_what_prints(tmp_path):
    (tmp_path / "a.gguf").write_bytes(header([("a\x1b[2J", (8,), 0, 0)]))
    with pytest.raises(ModelError, match=r"holds the name a\\x1b"):
        open_sources([tmp_path / "a.gguf"])


def refused_in_one_line(file: Path) -> bool:
    try:
        for found in identify(open_sources([file])[0]):
            fit.make_plan(found)
        return False
    except ModelError as error:
        text = str(error)
    assert text.isprintable()
    assert len(text) < 1000
    return True


@pytest.mark.slow
def test_fuzzed_gguf_headers_are_read_or_refused_in_one_line(model, tmp_path):
    """Bytes changed at random in the header, files cut short, fields replaced by extreme numbers."""

    def add(writer):
        writer.add_token_list(["a", "b"])
        writer.add_token_scores([0.0, 1.0])
        writer.add_custom_alignment(64)

    file = t5_gguf(model, tmp_path / "source", add) / "t5xxl.gguf"
    good, choose, refused = file.read_bytes(), random.Random(0), 0
    end = min(info.start for info in read_gguf(file)[0].values())
    for turn in range(1000):
        file.write_bytes(damaged(good, end, choose, turn))
        refused += refused_in_one_line(file)
    assert refused > 800


def damaged(good: bytes, end: int, choose: random.Random, turn: int) -> bytes:
    bad = bytearray(good)
    for _ in range(choose.randint(1, 3)):
        at = choose.randrange(end)
        bad[at : at + 1] = bytes([choose.randrange(256)])
    if turn % 3 == 0:
        at = choose.randrange(end - 8)
        bad[at : at + 8] = struct.pack("<Q", choose.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)))
    if turn % 5 == 0:
        del bad[choose.randrange(len(bad)) :]
    return bytes(bad)


@pytest.mark.slow
def test_fuzzed_safetensors_headers_are_read_or_refused_in_one_line(model, tmp_path):
    """As bytes, and as JSON with other values in it: negative, huge, of another type, a name twice, paths."""
    source = next((model / "text_encoder_2").glob("*.safetensors"))
    file, choose, refused = tmp_path / "t5xxl.safetensors", random.Random(0), 0
    shutil.copy(model / "text_encoder_2" / "config.json", tmp_path)
    good = source.read_bytes()
    size = struct.unpack("<Q", good[:8])[0]
    text, data = good[8 : 8 + size].decode(), good[8 + size :]
    odd = ("-1", "1e400", str(2**64), "null", '"F32"', "[]", "{}", "NaN", '"../../x"', "true", "0")
    for turn in range(1000):
        if turn % 2:
            file.write_bytes(damaged(good, 8 + size, choose, turn))
        else:
            numbers = list(re.finditer(r"(?<=[:,\[])(\d+|\"[A-Z0-9_]+\")(?=[,\]}])", text))
            one = choose.choice(numbers)
            bad = (text[: one.start()] + choose.choice(odd) + text[one.end() :]).encode()
            file.write_bytes(struct.pack("<Q", len(bad)) + bad + data)
        refused += refused_in_one_line(file)
    assert refused > 900


def test_fuzzed_indexes_are_read_or_refused_in_one_line(model, tmp_path):
    """Shards that are complete by their own names are read whatever the index says; the contradiction is noted."""
    folder = Path(shutil.copytree(model / "transformer", tmp_path / "transformer"))
    index = folder / "model.safetensors.index.json"
    good, choose, noted = index.read_bytes(), random.Random(0), 0
    names = [
        f'"{name}"'.encode() for name in ("../a.safetensors", "/etc/passwd", "a\\u0000.safetensors", "x" * 300, "..")
    ]
    for turn in range(60):
        bad = damaged(good, len(good), choose, turn)
        if turn % 2:
            shards = list(re.finditer(rb'"model-[^"]+"', good))
            one = choose.choice(shards)
            bad = good[: one.start()] + choose.choice(names) + good[one.end() :]
        index.write_bytes(bad)
        if not refused_in_one_line(folder):
            noted += len(open_sources([folder])[0].notes)
    assert noted > 20


def test_gguf_is_read_without_holding_more_than_a_tensor(tmp_path):
    """Headers say where everything is: a file of 40 GB that is all holes opens at once."""
    file = tmp_path / "large.gguf"
    file.write_bytes(header([("a", (2**30, 10), 0, 0)]))
    with open(file, "r+b") as opened:
        opened.truncate(2**30 * 10 * 4 + 4096)
    (source,) = open_sources([file])
    assert source.tensors["a"].shape == (10, 2**30)
