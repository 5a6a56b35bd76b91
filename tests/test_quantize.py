"""Quantized model folders: what is written, what is read, what is lost, and what is refused."""

import contextlib
import filecmp
import functools
import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import graph
import mlx.core as mx
import mlx.nn as nn
import pytest
from click.testing import CliRunner
from helpers import PIPELINE, TOKENIZERS, edit_json, edit_tensors, full_size_folder, levels, rel, run_command
from mlx.utils import tree_flatten
from mlx_flux_krea.convert import convert, quantize, write
from mlx_flux_krea.convert.folder import check_manifest
from mlx_flux_krea.convert.licence import ATTRIBUTION_NOTICE, licence_files
from mlx_flux_krea.convert.quantize import RECIPES, QuantizationRecipe, choose, find_recipe
from mlx_flux_krea.convert.reading import Reading
from mlx_flux_krea.convert.remap import ComponentPlan, Target
from mlx_flux_krea.convert.tensors import Tensor

from mlx_flux_krea import FluxPipeline, cli, presets
from mlx_flux_krea.commands.convert import convert as convert_command
from mlx_flux_krea.errors import ModelError, UsageError
from mlx_flux_krea.models import config as configs
from mlx_flux_krea.models import layers as quantized
from mlx_flux_krea.models.config import Quantization
from mlx_flux_krea.models.transformer import DoubleStreamBlock, SingleStreamBlock
from mlx_flux_krea.weights import COMPONENTS, build, layer_widths, open_model

PUBLISHED = {"transformer": configs.FLUX_DEV, "text_encoder_2": configs.T5_XXL}
SMALL = {
    "transformer": configs.FluxConfig(
        in_channels=64, out_channels=64, vec_in_dim=128, context_in_dim=128, hidden_size=128, mlp_ratio=2.0,
        num_heads=2, depth=1, depth_single_blocks=1, axes_dim=(16, 24, 24), theta=10_000, guidance_embed=True,
    ),
    "text_encoder": configs.CLIPConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=49408,
        max_position_embeddings=77, layer_norm_eps=1e-5, eos_token_id=2,
    ),
    "text_encoder_2": configs.T5Config(
        d_model=128, d_kv=64, d_ff=256, num_heads=2, num_layers=1, vocab_size=32128,
        relative_attention_num_buckets=32, relative_attention_max_distance=128, layer_norm_epsilon=1e-6,
    ),
}  # fmt: skip
MODES = [
    *((bits, group) for bits in ("8", "6", "5", "4", "3") for group in (32, 64, 128)), ("mxfp4", None), ("nvfp4", None),
]  # fmt: skip
CALL = {"prompt": "a cat", "seed": 1, "height": 32, "width": 48, "num_inference_steps": 2, "max_sequence_length": 16}


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Files of a model with random weights whose rows are multiples of 128, as float32."""
    folder = tmp_path_factory.mktemp("random")
    mx.random.seed(0)
    for component, sizes in SMALL.items():
        (folder / component).mkdir()
        arrays = dict(tree_flatten(COMPONENTS[component][1](sizes).parameters()))
        mx.save_safetensors(str(folder / component / "random.safetensors"), arrays)
        (folder / component / "config.json").write_text(json.dumps(configs.to_json(sizes)))
    return [
        *(folder / component / "random.safetensors" for component in SMALL),
        PIPELINE / "vae" / "diffusion_pytorch_model.safetensors",
    ]


@pytest.fixture(scope="session")
def make(small, tmp_path_factory):
    """Folders of these files, each made once."""
    made = {}

    def run(quantize="8", group_size=None, dtype="float32", sources=None):
        key = (quantize, group_size, dtype, sources)
        if key not in made:
            out = tmp_path_factory.mktemp("quantized") / "model"
            options = {"quantize": quantize, "group_size": group_size, "dtype": dtype, "tokenizers": TOKENIZERS}
            made[key] = convert([sources] if sources else small, out, **options)
        return made[key]

    return run


@pytest.fixture
def folder(make, tmp_path):
    """A copy of an 8-bit folder, to be damaged."""
    return Path(shutil.copytree(make().path, tmp_path / "copy"))


@pytest.fixture(scope="module")
def folder_json(make, tmp_path_factory):
    """A copy whose JSON is changed and put back."""
    return Path(shutil.copytree(make().path, tmp_path_factory.mktemp("json") / "copy"))


def arrays_of(path: Path, component: str) -> dict[str, mx.array]:
    return {n: a for shard in sorted((path / component).glob("*.safetensors")) for n, a in mx.load(str(shard)).items()}


def values_of(path: Path, component: str) -> dict[str, mx.array]:
    """The values of a folder, by mlx's own dequantize in float32."""
    arrays, layers = arrays_of(path, component), open_model(path).networks[component].layers()
    for layer, q in layers.items():
        if q:
            parts = [arrays.pop(f"{layer}.{part}", None) for part in ("weight", "scales", "biases")]
            parts = [p if p is None or p.dtype in (mx.uint32, mx.uint8) else p.astype(mx.float32) for p in parts]
            arrays[f"{layer}.weight"] = mx.dequantize(*parts, q.group_size, q.bits, q.mode, dtype=mx.float32)
    return arrays


@functools.cache
def drawn(path: Path, dtype: str | None = None) -> tuple:
    """The picture that a folder draws, and its latents."""
    latents = []
    pipe = FluxPipeline.from_pretrained(path, dtype=dtype)
    result = pipe(**CALL, callback_on_step_end=lambda *step: latents.append(step[-1]["latents"]))
    return result.images[0], latents[-1]


# --- reading ---


@pytest.mark.parametrize(("bits", "group"), MODES)
@pytest.mark.core("4-64", "nvfp4-None")
def test_a_quantized_folder_draws_what_its_dequantized_weights_draw(make, tmp_path, bits, group):
    """The other folder holds what mlx's own dequantize makes of these weights."""
    path = make(bits, group).path
    plain = Path(shutil.copytree(make("none").path, tmp_path / "plain"))
    for component in ("transformer", "text_encoder_2"):
        values = values_of(path, component)
        for shard in (plain / component).glob("*.safetensors"):
            edit_tensors(shard, lambda a: a.update({name: values[name] for name in a}))  # noqa: B023
    (picture, latents), (expected, expected_latents) = drawn(path), drawn(plain)
    assert rel(latents, expected_latents) < 1e-5
    assert levels(picture, expected) <= 1
    assert 1e-4 < rel(latents, drawn(make("none").path)[1]) < 0.7


@pytest.mark.parametrize(("dtype", "bar"), [("bfloat16", 0.05), ("float16", 0.01)])
@pytest.mark.parametrize("bits", ["4", "mxfp4"])
def test_a_quantized_folder_draws_in_any_type(make, bits, dtype, bar):
    path = make(bits, dtype="bfloat16").path
    assert rel(drawn(path, dtype)[1], drawn(path, "float32")[1]) < bar


@pytest.mark.parametrize("quantize", ["8", "nvfp4"])
def test_a_bfloat16_folder_computes_in_bfloat16_throughout(make, quantize):
    path = make(quantize, dtype="bfloat16").path
    for component in ("transformer", "text_encoder_2"):
        for dtype in (mx.bfloat16, mx.float32):
            network = open_model(path).networks[component].load(dtype)
            types = {array.dtype for _, array in tree_flatten(network.parameters())}
            assert types == {dtype, mx.uint32} | ({mx.uint8} if quantize == "nvfp4" else set())
    flux, t5 = (network.load(mx.bfloat16) for network in (open_model(path).flux, open_model(path).t5))
    assert t5(mx.array([[3, 1]])).dtype == mx.bfloat16
    one = mx.ones((1,))
    out = flux(
        mx.zeros((1, 4, 64)), one, one, mx.zeros((1, 128)), mx.zeros((1, 2, 128)), mx.zeros((4, 3)), mx.zeros((2, 3))
    )
    assert out.dtype == mx.bfloat16


@pytest.mark.parametrize("q", [Quantization(8, 64), Quantization(4, 32, "mxfp4")])
@pytest.mark.parametrize("block", [DoubleStreamBlock, SingleStreamBlock])
def test_a_gpu_is_asked_for_quantized_products_and_for_nothing_in_float32(q, block):
    """Blocks of the published size: the graph that is exported, as in test_metal."""
    net, dtype = block(configs.FLUX_DEV), mx.bfloat16
    nn.quantize(net, q.group_size, q.bits, mode=q.mode, class_predicate=lambda _, m: isinstance(m, nn.Linear))
    packed = (mx.uint32, mx.uint8)
    net.load_weights(
        [(n, graph.zeros(a.shape, a.dtype if a.dtype in packed else dtype)) for n, a in tree_flatten(net.parameters())]
    )
    pe = (graph.zeros((4608, 64, 2), mx.float32),) * 2
    rows = graph.zeros((1, 3 * 3072), dtype)
    if block is DoubleStreamBlock:
        rows = (graph.zeros((1, 6 * 3072), dtype),) * 2
        inputs = [graph.zeros((1, n, 3072), dtype) for n in (4096, 512)]
    else:
        inputs = [graph.zeros((1, 4608, 3072), dtype)]
    count = graph.count(lambda *x: net(*x, rows, pe), *inputs)
    assert count.names["QuantizedMatmul"] == count.products == (8 if block is DoubleStreamBlock else 2)
    assert set(count.dtypes) == {"bfloat16"}
    assert set(count.results) == {dtype}


def damage(folder: Path, how: str) -> None:
    layer, config = "single_blocks.0.linear1", folder / "transformer" / "config.json"
    shard = folder / "transformer" / "model-00002-of-00002.safetensors"
    quantization = json.loads(config.read_text())["quantization"]
    edits = {
        "scales of another type": lambda a: a.update({f"{layer}.scales": a[f"{layer}.scales"].astype(mx.float16)}),
        "scales of another shape": lambda a: a.update({f"{layer}.scales": a[f"{layer}.scales"][:, :1]}),
        "weight not packed": lambda a: a.update({f"{layer}.weight": a[f"{layer}.weight"].astype(mx.float32)}),
        "weight of another shape": lambda a: a.update({f"{layer}.weight": a[f"{layer}.weight"][:, :-1]}),
    }
    changes = {
        "layer that does not exist": {"single_blocks.9.linear1": False},
        "layer that is none": {"single_blocks.0": {"bits": 4, "group_size": 64}},
        "layer of other bits": {layer: {"bits": 4, "group_size": 64, "mode": "affine"}},
        "layer of another mode": {layer: {"bits": 4, "group_size": 32, "mode": "mxfp4"}},
        "layer that is not quantized": {layer: False},
        "layer that is": {"img_in": True},
        "groups that divide no row": {"img_in": {"bits": 8, "group_size": 128}},
        "bits that do not exist": {"bits": 7},
        "groups that do not exist": {"group_size": 48},
        "mode that does not exist": {"mode": "int4"},
        "a group size of another mode": {"mode": "nvfp4", "bits": 4},
        "text": {layer: "8"},
        "a field more": {layer: {"bits": 8, "group_size": 64, "sym": True}},
    }
    if how in edits:
        edit_tensors(shard, edits[how])
    elif how == "no biases":
        edit_tensors(shard, lambda a: a.pop(f"{layer}.biases"))
        index = shard.parent / "model.safetensors.index.json"
        names = json.loads(index.read_text())["weight_map"]
        edit_json(index, weight_map={name: file for name, file in names.items() if name != f"{layer}.biases"})
    elif how == "an embedding":
        path = folder / "text_encoder_2" / "config.json"
        edit_json(path, quantization=json.loads(path.read_text())["quantization"] | {"shared": True})
    elif how == "no quantization":
        config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "quantization"}))
    elif how == "a list":
        edit_json(config, quantization=[8, 64])
    else:
        edit_json(config, quantization=quantization | changes[how])


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("scales of another type", r"linear1\.scales is F16, expected F32"),
        ("scales of another shape", r"linear1\.scales has shape \[640, 1\], expected \[640, 2\]"),
        ("weight not packed", r"linear1\.weight is F32, expected U32"),
        ("weight of another shape", r"linear1\.weight has shape \[640, 31\], expected \[640, 32\]"),
        ("no biases", r"1 missing \(single_blocks\.0\.linear1\.biases\)"),
        ("layer that does not exist", r"quantization names single_blocks\.9\.linear1; expected layers of this network"),
        ("layer that is none", r"quantization names single_blocks\.0;"),
        ("layer of other bits", r"linear1\.weight has shape \[640, 32\], expected \[640, 16\]"),
        ("layer of another mode", r"1 not expected \(single_blocks\.0\.linear1\.biases\)"),
        ("layer that is not quantized", r"2 not expected \(single_blocks\.0\.linear1\.biases, "),
        ("layer that is", r"2 missing \(img_in\.biases, img_in\.scales\)"),
        ("groups that divide no row", "img_in has rows of 64; expected a multiple of 128"),
        ("bits that do not exist", "bits is 7 and not one of 3, 4, 5, 6, 8"),
        ("groups that do not exist", "group_size is 48 and not one of 32, 64, 128"),
        ("mode that does not exist", 'mode is "int4" and not one of affine, mxfp4, nvfp4'),
        ("a group size of another mode", "group_size is 64 and not one of 16"),
        ("text", r"linear1 is str '8'; expected false, or bits"),
        ("a field more", "linear1 has unknown fields: sym"),
        ("an embedding", "quantization names shared; expected layers"),
        ("no quantization", "not expected"),
        ("a list", "quantization is list"),
    ],
)
def test_what_config_and_shards_do_not_agree_about_is_named(folder, how, says):
    damage(folder, how)
    with pytest.raises(ModelError, match=says) as caught:
        open_model(folder).check()
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, -1, 0, 2**70, 4.0, True, "8", [], {}, [[8]], float("nan"), {"bits": 8}])
@pytest.mark.parametrize("field", ["bits", "group_size", "mode", "single_blocks.0.linear1", "no.such.layer", ""])
def test_any_value_in_a_quantization_is_refused_or_is_what_it_was(folder_json, field, value):
    path = folder_json / "transformer" / "config.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | {"quantization": good["quantization"] | {field: value}}))
    fine = (field, value) == ("single_blocks.0.linear1", True)
    try:
        with contextlib.nullcontext() if fine else pytest.raises(ModelError, match="quantization"):
            open_model(folder_json).check()
    finally:
        path.write_text(json.dumps(good))


def test_building_a_quantized_network_leaves_the_random_stream_as_it_was(make):
    mx.random.seed(5)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(5)
    open_model(make().path).flux.load(mx.float32)
    assert mx.random.uniform(shape=(4,)).tolist() == expected


def test_a_full_size_folder_of_few_bits_is_checked_without_reading_weights(tmp_path):
    """Sizes, exceptions and divisibility of the published model; shards there are none."""
    folder = full_size_folder(tmp_path / "big", filters="none")
    for component, sizes in PUBLISHED.items():
        layers, left = choose(component, layer_widths(component, sizes), find_recipe("4", 128))
        assert not left
        edit_json(folder / component / "config.json", quantization=configs.quantization_to_json(layers))
        assert open_model(folder).networks[component].layers() == layers
    with pytest.raises(ModelError, match=r"index\.json is missing"):
        open_model(folder).check()


# --- writing ---


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_name_groups_that_exist_and_quantize_what_is_large(recipe):
    assert RECIPES[recipe].keys() <= {group for _, group, _ in quantize.GROUPS}
    for component, sizes in PUBLISHED.items():
        layers, left = choose(component, layer_widths(component, sizes), find_recipe(recipe, None))
        widths = build(component, sizes)
        parameters = {n.removesuffix(".weight"): a.size for n, a in tree_flatten(widths.parameters())}
        share = sum(parameters[path] for path, q in layers.items() if q) / sum(parameters.values())
        assert not left
        assert recipe == "none" or share > {"transformer": 0.99, "text_encoder_2": 0.97}[component]
    for component, sizes in (("text_encoder", configs.CLIP_L), ("vae", configs.FLUX_VAE)):
        assert not any(choose(component, layer_widths(component, sizes), find_recipe(recipe, None))[0].values())


def test_what_is_small_and_sensitive_keeps_its_bits(make):
    layers = open_model(make("4").path).flux.layers()
    assert {q for path, q in layers.items() if "mod" in path.lower()} == {Quantization(8, 64)}
    for path in ("img_in", "txt_in", "time_in.in_layer", "vector_in.out_layer", "final_layer.linear"):
        assert layers[path] is None
    assert layers["single_blocks.0.linear2"] == Quantization(4, 64)
    assert {n for n, one in open_model(make("4").path).networks.items() if one.quantization} == {
        "transformer",
        "text_encoder_2",
    }


@pytest.mark.parametrize(("bits", "group"), [("8", 32), ("5", 128), ("3", 64), ("mxfp4", None), ("nvfp4", None)])
def test_a_folder_is_as_large_as_its_bits(make, bits, group):
    """Bits of the numbers, and of a scale (in mode affine also a bias) for each group."""
    report = make(bits, group, "bfloat16")
    affine = bits.isdigit()
    scale = 2 * 16 / group if affine else {"mxfp4": 8 / 32, "nvfp4": 8 / 16}[bits]
    groups = {g.name: g for g in report.groups}
    linear1 = groups["single blocks, linear1"]
    rows, width = 640, 128
    assert linear1.parameters == rows * width + rows
    assert linear1.bytes == rows * width * ((int(bits) if affine else 4) + scale) / 8 + rows * 2
    for component in report.components:
        tensors = open_model(report.path).networks[component.name].tensors()
        stored = sum(info.end - info.start for _, info in tensors.values())
        assert component.bytes == stored == sum(g.bytes for g in report.groups if g.component == component.name)
        assert component.parameters == sum(g.parameters for g in report.groups if g.component == component.name)


@pytest.mark.slow
def test_the_bytes_depend_on_source_and_recipe_alone(small, make, tmp_path):
    again = convert(small, tmp_path / "again", quantize="4", dtype="bfloat16", tokenizers=TOKENIZERS).path
    path = make("4", dtype="bfloat16").path
    names = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
    assert filecmp.cmpfiles(path, again, names, shallow=False)[1:] == ([], [])
    through = convert([make("none", dtype="bfloat16").path], tmp_path / "through", quantize="4").path
    weights = [name for name in names if "/" in name]
    assert filecmp.cmpfiles(path, through, weights, shallow=False)[1:] == ([], [])


@pytest.mark.slow
def test_a_layer_that_no_group_divides_is_left_and_listed(tmp_path):
    """T5 of the reference's pipeline is 14 wide."""
    report = convert([PIPELINE], tmp_path / "tiny", quantize="mxfp4", tokenizers=TOKENIZERS)
    left = {c.name: dict(c.left) for c in report.components}
    assert left["text_encoder_2"]["encoder.block.1.layer.0.SelfAttention.q"] == "its rows of 14 are no multiple of 32"
    assert "encoder.block.1.layer.0.SelfAttention.o" not in left["text_encoder_2"]
    assert not left["transformer"]
    assert FluxPipeline.from_pretrained(report.path)(**CALL).images
    said = run_command("convert", PIPELINE, "--tokenizers", TOKENIZERS, "-o", "other", cwd=tmp_path)
    assert "not quantized in text_encoder_2: encoder.block.0.layer.0.SelfAttention.q, " in said.stderr
    assert "and 8 more (its rows of 14 are no multiple of 64)" in said.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_quantizing_would_hide_is_found_before(small, tmp_path, value):
    copied = [shutil.copytree(path.parent, tmp_path / path.parent.name) / path.name for path in small]

    def spoil(arrays):
        weight = arrays["single_blocks.0.linear1.weight"]
        arrays["single_blocks.0.linear1.weight"] = mx.where(
            mx.arange(weight.size).reshape(weight.shape) == 9, value, weight
        )

    edit_tensors(copied[0], spoil)
    with pytest.raises(ModelError, match=r"single_blocks\.0\.linear1\.weight holds NaN or infinities"):
        convert(copied, tmp_path / "out", quantize="4", tokenizers=TOKENIZERS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("place", [0, 2**18, 300_000])
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf"), None])
def test_values_that_are_not_finite_are_seen_wherever_they_are(dtype, place, value):
    array = mx.ones((300_001,)) * -65504
    if value is not None:
        array = mx.where(mx.arange(300_001) == place, value, array)
    array = array.astype(dtype)
    assert quantize._is_finite(array) is (value is None)
    assert mx.isfinite(array).all().item() is (value is None)


def test_of_a_tensor_only_pieces_are_in_memory_however_large_it_is(tmp_path):
    shape, file = (16_384, 4096), tmp_path / "holes"
    file.touch()
    os.truncate(file, 2 * math.prod(shape))
    tensor = Tensor("w", file, "BF16", shape, 0, 2 * math.prod(shape))
    target = Target("single_blocks.0.linear1.weight", shape, (tensor,), False, True)
    mx.clear_cache()
    mx.reset_peak_memory()
    before, rows = mx.get_active_memory(), 0
    layers = {"single_blocks.0.linear1": Quantization(8, 64)}
    with Reading([file]) as reading:
        for row, made in write._chunks(ComponentPlan((target,), ()), "bfloat16", layers, reading):
            assert row == rows
            rows += made.parts[0].shape[0]
            mx.eval(made.parts)
    assert rows == shape[0]
    assert mx.get_peak_memory() - before < tensor.bytes / 2


# --- the report ---


def test_the_report_measures_what_each_group_lost_the_worst_first(make, small):
    report = make("4", 64, "bfloat16")
    errors = [group.error for group in report.groups if group.error is not None]
    assert errors == sorted(errors, reverse=True)
    assert all(group.error is None for group in report.groups[len(errors) :])
    groups = {group.name: group for group in report.groups}
    source, values = mx.load(str(small[0])), values_of(report.path, "transformer")
    names = [n for n in source if "img_attn" in n and n.endswith((".qkv.weight", ".proj.weight"))]
    difference = sum(float(mx.square(values[n].astype(mx.float32) - source[n]).sum()) for n in names)
    norm = sum(float(mx.square(source[n]).sum()) for n in names)
    # qkv has 384 rows, which is below twice the number sampled, so that every row counts
    assert groups["double blocks, img_attn"].error == pytest.approx(math.sqrt(difference / norm), rel=1e-3)
    assert groups["modulation"].error < groups["single blocks, linear1"].error / 5
    assert groups["VAE"].error is None
    assert groups["T5 feed-forward"].stored == "4 bits, groups of 64, bfloat16"


def test_some_rows_tell_the_error_of_all(monkeypatch):
    class Target:
        name, shape, q = "a.weight", (6144, 256), None

        def make(self, data):
            return mx.random.normal(self.shape, key=mx.random.key(0)) * mx.linspace(1, 3, 6144)[:, None]

    target, errors = Target(), []
    for rows in (quantize._ROWS, 10**9):
        monkeypatch.setattr(quantize, "_ROWS", rows)
        error, norm = quantize.make(
            target, target, "bfloat16", Quantization(4, 64), None, mx.default_device()
        ).loss.tolist()
        errors.append(math.sqrt(error / norm))
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


def test_a_loss_that_no_picture_stands_is_said(small, tmp_path):
    """Scales of nvfp4 have a smallest value, and so small weights become nothing."""
    copied = [shutil.copytree(path.parent, tmp_path / path.parent.name) / path.name for path in small]
    edit_tensors(copied[0], lambda a: a.update({n: a[n] * 0.01 for n in a if "linear1.weight" in n}))
    report = convert(copied, tmp_path / "out", quantize="nvfp4", tokenizers=TOKENIZERS)
    assert report.groups[0].name == "single blocks, linear1"
    assert len(report.notes) == 1
    assert re.fullmatch(r"single blocks, linear1: nvfp4, bfloat16 lost \d+% of it; take more bits", report.notes[0])


@pytest.mark.slow
def test_the_report_is_for_people_and_for_machines(tmp_path, small):
    call = ["convert", *small, "--tokenizers", TOKENIZERS, "-q", "4", "-o", "model", "--json"]
    ran = run_command(*call, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["quantize"] == "4"
    assert report["groups"][0]["error"] > 0.05
    assert {"component", "name", "stored", "parameters", "bytes", "error"} == report["groups"][0].keys()
    worst = report["groups"][0]["name"]
    assert f"\n{worst}" in ran.stderr[ran.stderr.index("worst first") :]
    ran = run_command("inspect", "model", cwd=tmp_path)
    assert "4 bits, groups of 64, bfloat16" in ran.stdout
    facts = json.loads(run_command("inspect", "model", "--json", cwd=tmp_path).stdout)
    parameters = {c["name"]: c["parameters"] for c in report["components"]}
    assert {name: c["parameters"] for name, c in facts["components"].items()} == parameters
    assert facts["components"]["transformer"]["quantization"]["bits"] == 4


# --- options ---


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quantize": "7"}, 'no precision is called "7"; expected one of none, 8'),
        ({"quantize": "none", "group_size": 64}, "a group size of 64, and none quantizes nothing"),
        ({"quantize": "mxfp4", "group_size": 32}, "a group size of 32, and mxfp4 has groups of 32"),
        ({"quantize": "nvfp4", "group_size": 32}, "and nvfp4 has groups of 16"),
        ({"quantize": "4", "group_size": 16}, "a group size of 16; expected one of 32, 64, 128"),
        ({"quantize": "8", "allow_nonfinite": True}, "allowed, and quantizing erases them; .*set `quantize` to none"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, says, tmp_path):
    with pytest.raises(UsageError, match=says):
        convert([PIPELINE], tmp_path / "out", tokenizers=TOKENIZERS, **options)
    assert list(tmp_path.iterdir()) == []


def test_the_command_quantizes_to_8_bits_unless_told_otherwise(tmp_path):
    choices = next(p for p in convert_command.params if p.name == "quantize")
    assert tuple(choices.type.choices) == tuple(RECIPES)
    refused = CliRunner().invoke(cli.cli, ["convert", str(PIPELINE), "--allow-nonfinite"])
    assert isinstance(refused.exception, UsageError)
    made = json.loads(run_command("convert", PIPELINE, "--tokenizers", TOKENIZERS, "--json", cwd=tmp_path).stdout)
    assert (made["quantize"], made["dtype"]) == ("8", "bfloat16")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "pipeline-bf16"),
        ({"dtype": "float16"}, "pipeline-fp16"),
        ({"quantize": "8"}, "pipeline-8bit"),
        ({"quantize": "4", "group_size": 32}, "pipeline-4bit-g32"),
        ({"quantize": "mxfp4", "dtype": "float32"}, "pipeline-mxfp4-fp32"),
    ],
)
def test_without_a_target_a_model_is_called_after_its_recipe(home, options, name):
    assert convert([PIPELINE], tokenizers=TOKENIZERS, **options).path == home / "models" / name
    assert FluxPipeline.from_pretrained(name).dtype == options.get("dtype", "bfloat16")


# --- folders of ours as sources ---


def test_fewer_bits_are_made_of_what_is_there(make, tmp_path):
    eight = make("8", dtype="bfloat16").path
    report = convert([eight], tmp_path / "four", quantize="4")
    before, after = (arrays_of(path, "transformer") for path in (eight, report.path))
    modulation = [name for name in before if "_mod." in name or "modulation" in name]
    assert len(modulation) == 4 * 4
    assert all(mx.array_equal(before[name], after[name]) for name in modulation)  # 8 bits in both: not rounded twice
    values = values_of(eight, "transformer")["single_blocks.0.linear1.weight"].astype(mx.bfloat16)
    packed, scales, biases = mx.quantize(values, 64, 4)
    for part, array in (("weight", packed), ("scales", scales), ("biases", biases)):
        assert mx.array_equal(after[f"single_blocks.0.linear1.{part}"], array)
    for component in ("text_encoder", "vae"):
        assert filecmp.dircmp(eight / component, report.path / component).diff_files == []
    assert report.notes == ()
    assert [g.error for g in report.groups if g.name == "modulation"] == [0]
    index = open_model(report.path).index
    assert {s.layout for s in index.source} > {"flux-krea model folder", "VAE, diffusers"}
    assert FluxPipeline.from_pretrained(report.path)(**CALL).images


@pytest.mark.parametrize("quantize", ["8", "none"])
@pytest.mark.parametrize(("mode", "group"), [("4", None), ("3", 32), ("mxfp4", None), ("nvfp4", None)])
def test_more_bits_give_nothing_back_and_the_report_says_so(make, tmp_path, quantize, mode, group):
    path = make(mode, group).path
    report = convert([path], tmp_path / "more", quantize=quantize, dtype="float32")
    named = {note.split(":")[0] for note in report.notes}
    assert named == {"transformer", "text_encoder_2"}
    assert all(note.endswith("precision that was lost does not come back") for note in report.notes)
    if quantize == "none":
        for component in COMPONENTS:
            arrays, values = arrays_of(report.path, component), values_of(path, component)
            assert arrays.keys() == values.keys()
            assert all(mx.array_equal(arrays[name], values[name]) for name in arrays)


def test_the_facts_of_a_folder_go_on_in_what_is_made_of_it(make, tmp_path):
    folder = Path(shutil.copytree(make("none").path, tmp_path / "krea"))
    edit_json(folder / "model_index.json", license="flux-1-dev-non-commercial", base="FLUX.1 Krea [dev]", name="krea")
    (folder / "LICENSE.md").write_text("the FLUX.1 [dev] Non-Commercial License, in full")
    report = convert([folder], tmp_path / "out", quantize="4")
    assert report.base == "FLUX.1 Krea [dev]"
    assert (report.path / "LICENSE.md").read_text() == "the FLUX.1 [dev] Non-Commercial License, in full"
    assert (report.path / "NOTICE").read_text().startswith(ATTRIBUTION_NOTICE + "\n")
    assert convert([folder], quantize="4").path.name == "krea-4bit"


def test_a_damaged_folder_is_no_source(folder, tmp_path):
    shard = folder / "transformer" / "model-00002-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors differs from its manifest\.json"):
        convert([folder], tmp_path / "out", quantize="4")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="overlaps the source"):
        convert([folder], folder, quantize="4", force=True)


# --- licence files ---


def index_of(family: presets.Family) -> configs.ModelIndex:
    source = configs.SourceFile("flux1.safetensors", "ab" * 32, 1, "a layout")
    return configs.ModelIndex(
        "name", family.base, family.license, "none", 512, configs.Schedule(), family.defaults, (source,), "1.2"
    )


def test_the_notice_is_word_for_word_what_the_licence_prescribes():
    digest = hashlib.sha256(ATTRIBUTION_NOTICE.encode()).hexdigest()
    assert digest == "2261cffc8ca5d8d7fd6edc08e2f98eeca2a301b8bf8b3af5f5dc28f6c3a57ac0"


@pytest.mark.parametrize("family", [presets.KREA, presets.DEV, presets.KONTEXT])
def test_weights_of_flux_dev_carry_licence_notice_and_the_word_that_they_were_modified(family, tmp_path):
    files = licence_files(index_of(family), [tmp_path], ["transformer: 8 bits"])
    assert files.keys() == {"README.md", "LICENSE.md", "NOTICE"}
    notice = files["NOTICE"].decode()
    assert notice.startswith(ATTRIBUTION_NOTICE + "\nThe weights in this folder were modified: ")
    assert "- transformer: 8 bits\n" in notice
    assert f"- flux1.safetensors ({'ab' * 32})" in notice
    assert "Read it at https://github.com/black-forest-labs/flux/" in files["LICENSE.md"].decode()
    assert family.base in files["README.md"].decode()
    assert "were modified" in files["README.md"].decode()
    assert "content filters or a review" in files["README.md"].decode()


def test_a_licence_beside_the_source_is_copied_and_that_of_something_else_is_not(tmp_path):
    (tmp_path / "LICENSE").write_bytes(b"GNU General Public License")
    assert b"Read it at" in licence_files(index_of(presets.KREA), [tmp_path], [])["LICENSE.md"]
    text = "FLUX.1 [dev] Non-Commercial License v1.1.1 \xff".encode("latin-1")
    (tmp_path / "LICENSE.md").write_bytes(text)
    assert licence_files(index_of(presets.KREA), [tmp_path / "nowhere", tmp_path], [])["LICENSE.md"] == text
    (tmp_path / "LICENSE.md").write_bytes(text * 2**16)
    assert b"Read it at" in licence_files(index_of(presets.KREA), [tmp_path], [])["LICENSE.md"]


def test_a_licence_is_copied_whatever_its_file_is_called(tmp_path):
    text = b"FLUX.1 [dev] Non-Commercial License"
    (tmp_path / "LICENSE-FLUX1-dev").write_bytes(text)
    (tmp_path / "LICENSE").write_bytes(b"Apache License")
    assert licence_files(index_of(presets.DEV), [tmp_path], [])["LICENSE.md"] == text


def test_defaults_that_double_the_time_are_said_in_the_readme(tmp_path):
    said = "this model follows a prompt by true CFG, with a scale of 3.5"
    for family, is_said in ((presets.DE_DISTILLED, True), (presets.DEV, False)):
        assert (said in licence_files(index_of(family), [tmp_path], [])["README.md"].decode()) is is_said


def test_other_models_carry_no_notice_of_flux_dev(tmp_path):
    files = licence_files(index_of(presets.SCHNELL), [tmp_path], [])
    assert files.keys() == {"README.md", "LICENSE.md"}
    assert b"https://www.apache.org/licenses/LICENSE-2.0" in files["LICENSE.md"]
    files = licence_files(index_of(presets.OTHER), [tmp_path], [])
    assert files.keys() == {"README.md"}
    assert b"Ask whoever made them" in files["README.md"]
    assert not any(b"Black Forest" in text for text in files.values())
    (tmp_path / "LICENSE.txt").write_text("any")
    assert licence_files(index_of(presets.OTHER), [tmp_path], [])["LICENSE.md"] == b"any"


def test_a_licence_is_found_in_the_source(tmp_path):
    source = Path(shutil.copytree(PIPELINE, tmp_path / "source"))
    (source / "LICENSE.md").write_text("of this model")
    path = convert([source], tmp_path / "out", tokenizers=TOKENIZERS).path
    assert (path / "LICENSE.md").read_text() == "of this model"
    assert {"LICENSE.md", "README.md"} < json.loads((path / "manifest.json").read_text()).keys()


# --- verify ---


def test_verify_accepts_what_was_written(make, tmp_path):
    ran = run_command("verify", make().path, "--json", cwd=tmp_path)
    report = json.loads(ran.stdout)
    assert (ran.returncode, report["differs"], report["missing"], report["not listed"]) == (0, [], [], [])
    assert report["files"] == len(json.loads((make().path / "manifest.json").read_text()))
    (tmp_path / "home" / "models").mkdir(parents=True)
    shutil.copytree(make().path, tmp_path / "home" / "models" / "mine")
    ran = run_command("verify", "mine", cwd=tmp_path, FLUX_KREA_HOME=str(tmp_path / "home"))
    assert (ran.returncode, ran.stdout) == (0, f"{tmp_path / 'home' / 'models' / 'mine'}\n"), ran.stderr


@pytest.mark.slow
def test_verify_names_what_differs_is_missing_or_is_not_listed(folder, tmp_path):
    shard = folder / "vae" / "model-00001-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (folder / "tokenizer" / "vocab.json").unlink()
    (folder / "extra").mkdir()
    (folder / "extra" / "lora.safetensors").write_bytes(b"x")
    (folder / ".DS_Store").write_bytes(b"x")
    ran = run_command("verify", folder, cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (3, "")
    assert ran.stderr == (
        f"flux-krea: {folder} differs from its manifest.json (differs: vae/{shard.name}; "
        "missing: tokenizer/vocab.json; not listed: extra/lora.safetensors); convert the model again\n"
    )
    report = json.loads(run_command("verify", folder, "--json", cwd=tmp_path).stdout)
    assert report["differs"] == [f"vae/{shard.name}"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "manifest.json is missing"),
        ("{", "cannot be read"),
        ('{"../outside": 1, "vae": {}}', r"missing: \.\./outside, vae; not listed: "),
        ('{"vae/config.json": 3}', r"differs: vae/config\.json; not listed"),
    ],
)
def test_verify_reads_a_manifest_that_somebody_changed_without_trust(folder, tmp_path, text, says):
    (folder / "manifest.json").unlink()
    if text is not None:
        (folder / "manifest.json").write_text(text)
    (tmp_path / "outside").write_text("secret")
    ran = run_command("verify", folder, cwd=tmp_path)
    assert ran.returncode == 3
    assert re.search(says, ran.stderr), ran.stderr
    assert "Traceback" not in ran.stderr


def test_progress_of_verify_reaches_the_end(make):
    seen = []
    check_manifest(make().path, lambda *step: seen.append(step))
    assert seen[-1][0] == "verifying"
    assert max(done for _, done, _ in seen) == seen[0][2]


# --- products ---


@pytest.mark.parametrize("kind", [(64, 8, "affine"), (32, 4, "affine"), (32, 4, "mxfp4"), (16, 4, "nvfp4")])
@pytest.mark.parametrize("bias", [True, False])
def test_both_ways_to_multiply_give_the_same(kind, bias, monkeypatch):
    mx.random.seed(1)
    layer = nn.QuantizedLinear.from_linear(nn.Linear(128, 96, bias=bias), *kind)
    quantized.adopt(nn.Sequential(layer))
    for rows in (3, 100):
        x, results = mx.random.normal((2, rows, 128)), []
        for dense in (False, True):
            chosen = {(*kind, mx.float32, many): dense for many in (False, True)}
            monkeypatch.setattr(quantized, "_faster_dense", chosen)
            results.append(layer(x))
        monkeypatch.setattr(quantized, "CHUNK", 40 * 128)
        results.append(layer(x))
        monkeypatch.undo()
        assert rel(*results[:2]) < 1e-6
        assert rel(*results[1:]) < 1e-6
        assert results[2].shape == (2, rows, 96)


def test_on_the_cpu_only_chunks_of_a_layer_are_dense_at_one_time(monkeypatch):
    """A lazy graph of layers that read the same: 2 M weights, of which dequantizing leaves 8 bytes each on the way."""
    layers = [nn.QuantizedLinear(512, 1024, False, 64, 4) for _ in range(4)]
    quantized.adopt(nn.Sequential(*layers))
    monkeypatch.setattr(quantized, "_faster_dense", {(*quantized.kind(layers[0]), mx.float32, False): True})
    x, peaks = mx.ones((1, 512)), []
    mx.eval(x, [layer.parameters() for layer in layers])
    for chunk in (2**19, 2**14):
        monkeypatch.setattr(quantized, "CHUNK", chunk)
        mx.clear_cache()
        base = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval([layer(x) for layer in layers])
        peaks.append(mx.get_peak_memory() - base)
    weights = sum(layer.weight.size * 8 for layer in layers)
    assert peaks[0] > 4 * weights
    assert peaks[1] < 4 * 12 * 2**14  # a chunk of each layer, and its intermediate arrays


def test_products_are_timed_once_for_each_kind_and_type(make, monkeypatch):
    timed = []
    monkeypatch.setattr(quantized, "_faster_dense", {})
    monkeypatch.setattr(quantized, "_is_dense_faster", lambda *what: timed.append(what) or True)
    folder = open_model(make("4").path)
    for _ in range(2):
        folder.flux.load(mx.float32)
    kinds = {(64, 4, "affine"), (64, 8, "affine")}
    assert sorted(timed) == sorted((kind, mx.float32, many) for kind in kinds for many in (False, True))


def test_what_was_timed_is_remembered_so_that_a_seed_gives_the_same_picture_tomorrow(make, monkeypatch, home):
    folder, timed = open_model(make("4").path), []
    answers = iter([True, False] * 16)
    monkeypatch.setattr(quantized, "_is_dense_faster", lambda *what: timed.append(what) or next(answers))

    def in_a_new_process() -> dict:
        monkeypatch.setattr(quantized, "_faster_dense", {})
        folder.flux.load(mx.float32)
        return quantized._faster_dense

    first = in_a_new_process()
    assert len(timed) == 4
    assert in_a_new_process() == first
    assert len(timed) == 4
    for damage in (
        "",
        "[1]",
        '{"x": 1}',
        (home / "products.json").read_text().replace("true", "1").replace("false", "0"),
    ):
        (home / "products.json").write_text(damage)
        before = len(timed)
        in_a_new_process()
        assert len(timed) == before + 4
        assert json.loads((home / "products.json").read_text())
    monkeypatch.setenv("FLUX_KREA_HOME", str(home / "products.json" / "below a file"))
    assert len(in_a_new_process()) == 4


def test_on_the_cpu_many_rows_in_16_bits_are_multiplied_densely():
    """50 times slower is no matter of chance (research: 0.25 against 5 GFLOP/s)."""
    assert quantized._is_dense_faster((64, 4, "affine"), mx.bfloat16, True)


def test_on_a_gpu_products_are_timed_at_the_shapes_of_the_networks_own_layers():
    """FLUX.1's at 8 bits; and the time that they take of an M1 of 1.3 TFLOP/s, where one way is four times slower."""
    layers = choose("transformer", layer_widths("transformer", configs.FLUX_DEV), QuantizationRecipe("8"))[0]
    by_kind = quantized._by_kind(build("transformer", configs.FLUX_DEV, layers))
    timed = {kind: list(map(quantized._shape, quantized.timed_layers(of_kind))) for kind, of_kind in by_kind.items()}
    assert timed == {(64, 8, "affine"): [(21504, 3072), (18432, 3072), (3072, 15360), (3072, 12288)]}
    weights = sum(outputs * inputs for shapes in timed.values() for outputs, inputs in shapes)
    products = sum((1 + 4) * 2 * rows * weights / 1.3e12 for rows in quantized._TIMED)
    dequantized = len(quantized._TIMED) * weights * 3 / 60e9  # bytes read and written
    assert 2 * (products + dequantized) < 0.5


def test_a_choice_on_a_gpu_is_of_the_shapes_of_its_network_and_renewed_with_them(monkeypatch):
    def network(*shapes):
        layers = [nn.QuantizedLinear(inputs, outputs, True, 64, 4) for outputs, inputs in shapes]
        quantized.adopt(made := nn.Sequential(*layers))
        return made

    timed, answers = [], iter([True, False, False, True])
    monkeypatch.setattr(quantized, "_faster_dense", {})
    monkeypatch.setattr(quantized, "_on_gpu", lambda: True)
    monkeypatch.setattr(quantized, "_is_dense_faster_in", lambda *what: timed.append(what) or next(answers))
    first, second = network((64, 128), (128, 64), (64, 128)), network((192, 64))
    chosen = quantized.choose_products(first, mx.float32, rows=4608)
    assert chosen == {f"64 4 affine mlx.core.float32 {many} 64x128 128x64": not many for many in (False, True)}
    assert quantized.choose_products(network((128, 64), (64, 128)), mx.float32, rows=4608) == {}
    assert [many for *_, many, rows in timed if rows == 4608] == [False, True]
    remembered = chosen | quantized.choose_products(second, mx.float32)
    assert len(timed) == len(remembered) == 4
    kinds = []
    monkeypatch.setattr(quantized, "_dequantized", lambda *what: kinds.append(what) or mx.zeros((192, 64)))
    second.layers[0](mx.ones((2, 64)))
    assert not kinds
    second.layers[0](mx.ones((100, 64)))  # many rows: dense, by its own choice
    assert len(kinds) == 1
    monkeypatch.setattr(quantized, "_faster_dense", {})
    quantized.choose_products(first, mx.float32, remembered)
    assert len(timed) == 4


@pytest.mark.parametrize("kind", [(64, 4, "affine"), (32, 4, "mxfp4")])
def test_both_products_of_a_layer_are_timed_on_arrays_like_its_own(kind):
    """With the CPU's products, of which the direct one in 16 bits is 50 times slower."""
    layer = nn.QuantizedLinear(512, 64, False, *kind)
    assert quantized._is_dense_faster_in([layer], mx.bfloat16, True, 4608)
