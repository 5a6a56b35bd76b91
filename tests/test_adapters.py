"""Adapters: names of every trainer, the reference's numbers, streaming, weights, files that must be refused."""

import dataclasses
import json
import math
import re

import adapters as files
import mlx.core as mx
import mlx.nn as nn
import pytest
from foreign import layouts, published
from helpers import PIPELINE, TOKENIZERS, assert_close, rel
from helpers import goldens as base_goldens
from mlx_flux_krea.convert import convert

from mlx_flux_krea import FluxPipeline
from mlx_flux_krea.adapters import formulas, names
from mlx_flux_krea.adapters.formulas import Attached, Base, branch_bytes
from mlx_flux_krea.adapters.installed import Origin, added_duty, obtain, with_licence
from mlx_flux_krea.adapters.loaded import take_tags
from mlx_flux_krea.adapters.parts import Adapter, Facts, open_parts, tensors_of
from mlx_flux_krea.adapters.reading import described, looks_like_adapter, outline, shapes_of
from mlx_flux_krea.errors import ModelError, UsageError
from mlx_flux_krea.models import config as configs
from mlx_flux_krea.models.layers import constant, dequantized
from mlx_flux_krea.models.transformer import guarded
from mlx_flux_krea.residency import matrices
from mlx_flux_krea.weights import open_model, parameters

INPUTS = ("hidden_states", "timestep", "guidance", "pooled", "encoder_hidden_states", "img_ids", "txt_ids")
SMALL = {"height": 32, "width": 48, "num_inference_steps": 2, "seed": 5, "max_sequence_length": 16, "progress": False}
RUN = {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 4.5, "seed": 72, "progress": False}
PROMPT = "turn the sky green and keep the faces"


@pytest.fixture(scope="module")
def folder(full_model):
    return open_model(full_model)


@pytest.fixture
def flux(folder):
    return folder.flux.load(mx.float32)


@pytest.fixture
def pipe(full_model):
    """One of its own for each test: adapters stay loaded."""
    return FluxPipeline.from_pretrained(full_model)


def called(flux, kind: str = "forward.0") -> mx.array:
    known = base_goldens() if kind == "forward.0" else files.goldens()
    return flux(*(known[f"{kind}.{name}"] for name in INPUTS))


def used(folder, flux, *uses) -> Attached:
    """The transformer with adapters of the reference, by their names and weights."""
    opened = [(files.opened(files.reference(name), folder.sizes), weight) for name, weight in uses]
    attached = Attached(flux, "transformer", mx.float32)
    attached.use(opened, Base(folder, mx.float32).lengths)
    return attached


# --- the reference's numbers ---

GOLDENS = [
    *(((name, 0.8), "lora.full.output") for name in ("peft", "peft_alpha", "kohya", "comfy", "bfl")),
    (("xlabs", 0.8), "lora.xlabs.output"),
    (("lokr_kohya", 0.8), "lora.lokr.output"),
    (("lokr_lycoris", 0.8), "lora.lokr_lycoris.output"),
    (("loha_kohya", 0.8), "lora.loha.output"),
    (("dora_peft", 1.0), "lora.dora_peft.output.1.0"),
    (("dora_peft", 0.8), "lora.dora_peft.output.0.8"),
    (("dora_kohya", 1.0), "lora.dora_kohya.output.1.0"),
    (("onetrainer", 0.8), "lora.onetrainer.output"),
    (("ranks_kohya", 0.8), "lora.ranks.output"),
    (("ranks_peft", 0.8), "lora.ranks.output"),
    (("two_b_kohya", 0.8), "lora.two_b.output"),
    (("unmatched_kohya", 0.8), "lora.two_b.output"),
]


@pytest.mark.parametrize(("use", "golden"), GOLDENS, ids=[f"{use[0]} {use[1]}" for use, _ in GOLDENS])
def test_a_call_with_an_adapter_equals_the_reference(folder, flux, use, golden):
    used(folder, flux, use)
    assert_close(called(flux), files.goldens()[golden], 3e-5, golden)


def test_two_adapters_at_once_equal_the_reference(folder, flux):
    used(folder, flux, ("two_a_peft", 0.7), ("two_b_kohya", -0.4))
    assert_close(called(flux), files.goldens()["lora.two.output"], 3e-5)


@pytest.mark.parametrize("weight", [1.0, 0.85])
def test_a_control_adapter_widens_the_input_and_replaces_norms(folder, flux, weight):
    """BFL's result; diffusers' own has rows of the last layer exchanged (the reference's README)."""
    used(folder, flux, ("control_bfl", weight))
    assert_close(called(flux, "clora.forward"), files.goldens()[f"clora.forward.output.{weight}"], 3e-5)


@pytest.mark.parametrize("name", ["fill", "control"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_for_models_without_a_condition_reads_the_latents_alone(request, tmp_path, name, kind):
    """As diffusers pads it (`_maybe_expand_lora_state_dict`): the condition's columns of W stay as they are."""
    folder = open_model(request.getfixturevalue(name))
    flux, sizes = folder.flux.load(mx.float32), folder.flux.sizes
    keys = iter(mx.random.split(mx.random.key(3), 4))
    rows, rank = sizes.hidden_size, 3
    down, up = mx.random.normal((rank, 64), key=next(keys)), mx.random.normal((rows, rank), key=next(keys))
    arrays = {"transformer.x_embedder.lora_A.weight": down, "transformer.x_embedder.lora_B.weight": up}
    weight = flux.img_in.weight
    changed = weight + mx.pad(0.5 * up @ down, [(0, 0), (0, sizes.in_channels - 64)])
    if kind == "dora":
        lengths = mx.random.uniform(0.5, 2.0, (rows,), key=next(keys))
        arrays["transformer.x_embedder.lora_magnitude_vector"] = lengths
        changed = lengths[:, None] * changed / mx.linalg.norm(changed, axis=1, keepdims=True)
    adapter = files.opened(files.save(tmp_path / "a.safetensors", arrays), folder.sizes)
    kept = files.save(tmp_path / "kept.safetensors", tensors_of(adapter))
    assert len(open_parts(kept, folder.sizes)) == 1
    Attached(flux, "transformer", mx.float32).use([(adapter, 0.5)], Base(folder, mx.float32).lengths)
    x = mx.random.normal((1, 7, sizes.in_channels), key=next(keys))
    assert_close(flux.img_in(x), x @ changed.T + flux.img_in.bias, 1e-5)


@pytest.mark.parametrize(("name", "fits"), [("turbo", True), ("control", False), ("wide", False)])
def test_of_adapters_for_other_inputs_fill_takes_those_that_read_latents(tmp_path, name, fits):
    sizes = dataclasses.replace(configs.FLUX_DEV_MODEL, flux=configs.FLUX_FILL)
    keys = {"turbo": files.turbo_keys(), "control": published("lora-bfl-control")}.get(name) or {
        f"img_in.lora_{end}.weight": ("F32", shape) for end, shape in (("A", (4, 320)), ("B", (3072, 4)))
    }
    path = files.header(tmp_path / "a.safetensors", keys)
    if fits:
        assert outline(path, sizes).modules == 504
    else:
        with pytest.raises(ModelError, match=r"img_in.lora_A.weight has shape .*; expected \(rank, 384\)"):
            outline(path, sizes)


def is_packed(path: str, layer: nn.Module) -> bool:
    inside = path.startswith(("double_blocks", "single_blocks", "final_layer.adaLN"))
    return isinstance(layer, nn.Linear) and inside


def test_an_adapter_beside_8_bits_equals_the_reference(folder, flux):
    """Neither merged into the packed weights nor without them: the README's distances tell these apart."""
    nn.quantize(flux, 64, 8, class_predicate=is_packed)
    golden = files.goldens()
    assert_close(called(flux), golden["lora.q8.float32.base_output"], 1e-4)
    used(folder, flux, ("q8_kohya", 0.8))
    assert_close(called(flux), golden["lora.q8.float32.output"], 1e-4)
    assert rel(called(flux), golden["lora.q8.float32.merged_then_packed_output"]) > 5e-3


def merged(folder, name: str, weight: float, base: nn.Module) -> nn.Module:
    """The transformer whose matrices are those of `base`, dequantized, with a LoRA added to them."""
    flux, layers = folder.flux.load(mx.float32), dict(base.named_modules())
    for path, layer in flux.named_modules():
        if isinstance(layer, nn.Linear):
            layer.weight = mx.array(dequantized(layers[path]))
    for part in files.opened(files.reference(name), folder.sizes).parts:
        layer, target = dict(flux.named_modules())[part.target.path], part.target
        down, up = (part.arrays[name].astype(mx.float32) for name in ("down", "up"))
        layer.weight[target.start : target.stop] += weight * up @ down
    return flux


def test_an_adapter_beside_4_bits_equals_the_sum_and_merging_it_does_not(folder, flux):
    plain = merged(folder, "q8_kohya", 0.8, flux)
    nn.quantize(flux, 64, 4, class_predicate=is_packed)
    expected = called(merged(folder, "q8_kohya", 0.8, flux))
    used(folder, flux, ("q8_kohya", 0.8))
    assert_close(called(flux), expected, 1e-5)
    nn.quantize(plain, 64, 4, class_predicate=is_packed)  # as mflux does
    assert rel(called(plain), expected) > 0.03


@pytest.mark.slow
@pytest.mark.parametrize(
    ("uses", "run"),
    [
        ({"lokr_kohya": 0.8}, "lora_lokr"),
        ({"two_a_peft": 0.7, "two_b_kohya": -0.4}, "lora_two"),
        *(({f"te_{name}": 0.8}, "lora_te") for name in ("kohya", "diffusers", "onetrainer")),
    ],
)
def test_a_whole_run_equals_the_reference(pipe, uses, run):
    for name in uses:
        pipe.load_lora_weights(files.reference(name))
    pipe.set_adapters(list(uses), list(uses.values()))
    latents = pipe(PROMPT, output_type="latent", **RUN).images
    assert_close(latents, files.goldens()[f"{run}.latents"], 1e-4)


def test_text_encoders_with_an_adapter_equal_the_reference(pipe):
    without = pipe.encode_prompt(PROMPT)
    for golden, value in zip(("t5_hidden", "clip_pooled"), without, strict=True):
        assert_close(value, files.goldens()[f"lora.te.without.{golden}"], 3e-5)
    pipe.load_lora_weights(files.reference("te_kohya"))
    for golden, value in zip(("t5_hidden", "clip_pooled"), pipe.encode_prompt(PROMPT, lora_scale=0.8), strict=True):
        assert_close(value, files.goldens()[f"lora.te.{golden}"], 3e-5)
    pipe.unload_lora_weights()
    assert all(mx.array_equal(a, b) for a, b in zip(without, pipe.encode_prompt(PROMPT), strict=True))


# --- names ---

LAYOUTS = {  # modules of each published file
    "lora-ai-toolkit": 494, "lora-bfl-control": 466, "lora-comfy-diffusion_model": 4, "lora-diffusers-peft": 495,
    "lora-fal-kontext": 3, "lora-kohya-all": 15, "lora-kohya": 376, "lora-lokr-loha": 2, "lora-onetrainer": 7,
    "lora-xlabs": 6,
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_name_of_a_published_file_is_mapped(tmp_path, layout):
    path = files.header(tmp_path / "a.safetensors", published(layout))
    found = outline(path, configs.FLUX_DEV_MODEL)
    assert (len(found.groups), found.unmatched) == (LAYOUTS[layout], ())


@pytest.mark.parametrize(
    "prefix", ["text_encoder.", "lora_te1_", "text_encoders.clip_l.", "lora_te3_", "text_encoders.t5"]
)
def test_every_style_of_names_of_text_encoders_is_mapped(tmp_path, prefix):
    tensors = {name: shape for name, shape in published("lora-text-encoders").items() if name.startswith(prefix)}
    found = outline(files.header(tmp_path / "a.safetensors", tensors), configs.FLUX_DEV_MODEL)
    assert found.groups
    assert not found.unmatched


def test_the_adapters_for_few_steps_are_mapped_to_every_layer(tmp_path):
    path = files.header(tmp_path / "a.safetensors", files.turbo_keys())
    found = outline(path, configs.FLUX_DEV_MODEL)
    assert (found.modules, found.unmatched) == (504, ())
    changed = {target.path for target, _ in found.groups.values()}
    flux = configs.FLUX_DEV
    assert changed == {
        t.path for t in names.targets(configs.FLUX_DEV_MODEL).values() if t.component == "transformer" and t.width
    }
    assert len(changed) == 19 * 10 + 38 * 3 + 10 == flux.depth * 10 + flux.depth_single_blocks * 3 + 10


@pytest.mark.parametrize("prefix", ["", *names.PREFIXES])
@pytest.mark.parametrize("fields", [("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up")])
def test_any_prefix_goes_with_any_module_and_any_field(tmp_path, prefix, fields):
    ours = {"double_blocks.1.img_attn.proj": "transformer_blocks.1.attn.to_out.0"}
    for module in (*ours, *ours.values()):
        name = prefix + (module.replace(".", "_") if prefix.endswith("_") else module)
        tensors = {f"{name}.{fields[0]}.weight": ("F32", [2, 3072]), f"{name}.{fields[1]}.weight": ("F32", [3072, 2])}
        found = outline(files.header(tmp_path / "a.safetensors", tensors), configs.FLUX_DEV_MODEL)
        assert [target.path for target, _ in found.groups.values()] == list(ours)


def test_halves_of_the_last_modulation_are_exchanged_for_diffusers_names_alone(folder, tmp_path):
    up = mx.random.normal((128, 2))
    arrays = {"lora_down.weight": mx.random.normal((2, 64)), "lora_up.weight": up}
    made = {}
    for module in ("norm_out.linear", "final_layer.adaLN_modulation.1"):
        path = files.save(tmp_path / "a.safetensors", {f"{module}.{name}": array for name, array in arrays.items()})
        made[module] = files.opened(path, folder.sizes).parts[0].arrays["up"]
    assert mx.array_equal(made["final_layer.adaLN_modulation.1"], up)
    assert mx.array_equal(made["norm_out.linear"], mx.concatenate([up[64:], up[:64]]))


# --- formulas, against matrices that are built ---

PATH = "double_blocks.0.img_attn.qkv"
ROWS, WIDTH = 192, 64


def numbers(*shape: int) -> mx.array:
    return mx.random.normal(shape) / 4


def changed(folder, tmp_path, arrays, weight=1.0, module=PATH) -> mx.array:
    """The matrix of a layer with the adapter of these tensors: its result for the unit matrix, without the bias."""
    flux = folder.flux.load(mx.float32)
    path = files.save(tmp_path / "a.safetensors", {f"{module}.{name}": array for name, array in arrays.items()})
    adapter = files.opened(path, folder.sizes)
    Attached(flux, "transformer", mx.float32).use([(adapter, weight)], Base(folder, mx.float32).lengths)
    layer = dict(flux.named_modules())[PATH]
    return (layer(mx.eye(WIDTH)) - layer.bias).T


@pytest.fixture
def weight(folder):
    return folder.flux.load(mx.float32).double_blocks[0].img_attn.qkv.weight


def test_a_full_difference_and_its_bias_are_added(folder, tmp_path, weight):
    diff, bias = numbers(ROWS, WIDTH), numbers(ROWS)
    got = changed(folder, tmp_path, {"diff": diff, "diff_b": bias}, 0.5)
    assert_close(got, weight + 0.5 * diff + 0.5 * bias[:, None], 1e-5)


def test_loha_is_the_product_of_products(folder, tmp_path, weight):
    a1, b1, a2, b2 = numbers(ROWS, 5), numbers(5, WIDTH), numbers(ROWS, 5), numbers(5, WIDTH)
    arrays = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": mx.array(2.0)}
    assert_close(changed(folder, tmp_path, arrays), weight + 2 / 5 * (a1 @ b1) * (a2 @ b2), 1e-5)


@pytest.mark.parametrize(("outer", "inner"), [((3, 4), (64, 16)), ((64, 16), (3, 4)), ((1, 1), (192, 64))])
def test_lokr_is_the_kronecker_product(folder, tmp_path, weight, outer, inner):
    w1, w2 = numbers(*outer), numbers(*inner)
    got = changed(folder, tmp_path, {"lokr_w1": w1, "lokr_w2": w2, "alpha": mx.array(7.0)}, -0.5)
    assert_close(got, weight - 0.5 * mx.kron(w1, w2), 1e-5, "alpha has no meaning where both factors are whole")


def _length(matrix: mx.array, axis: int) -> mx.array:
    return mx.sqrt((matrix * matrix).sum(axis, keepdims=True))


@pytest.mark.parametrize("scale", [1.0, 0.5, -1.0])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_dora_over_rows_scales_the_whole_change(folder, tmp_path, weight, kind, scale):
    m = mx.abs(numbers(ROWS, 1)) + 1
    a, b = numbers(ROWS, 2), numbers(2, WIDTH)
    kinds = {
        "lora": ({"lora_up.weight": a, "lora_down.weight": b}, a @ b),
        "loha": ({"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}, (a @ b) * (a @ b)),
        "lokr": (
            {"lokr_w1": a[:3], "lokr_w2": mx.tile(b, (32, 1))[:, :32]},
            mx.kron(a[:3], mx.tile(b, (32, 1))[:, :32]),
        ),
    }
    arrays, delta = kinds[kind]
    merged = weight + delta
    expected = weight + scale * (m * merged / _length(merged, 1) - weight)
    assert_close(changed(folder, tmp_path, arrays | {"dora_scale": m}, scale), expected, 1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_dora_over_columns_scales_the_whole_change(folder, tmp_path, weight, scale):
    m, a, b = mx.abs(numbers(1, WIDTH)) + 1, numbers(ROWS, 2), numbers(2, WIDTH)
    merged = weight + a @ b
    expected = weight + scale * (m * merged / _length(merged, 0) - weight)
    arrays = {"lora_up.weight": a, "lora_down.weight": b, "dora_scale": m}
    assert_close(changed(folder, tmp_path, arrays, scale), expected, 1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_peft_scales_the_product_inside_the_length(folder, tmp_path, weight, scale):
    m, a, b = mx.abs(numbers(ROWS)) + 1, numbers(ROWS, 2), numbers(2, WIDTH)
    merged = weight + scale * a @ b
    arrays = {"lora_B.weight": a, "lora_A.weight": b, "lora_magnitude_vector": m}
    assert_close(changed(folder, tmp_path, arrays, scale), m[:, None] * merged / _length(merged, 1), 1e-5)


def test_the_bias_of_a_layer_stays_as_it_is_with_dora(folder, flux, tmp_path):
    arrays = {
        "lora_up.weight": numbers(ROWS, 2),
        "lora_down.weight": numbers(2, WIDTH),
        "dora_scale": mx.ones((ROWS, 1)),
    }
    path = files.save(tmp_path / "a.safetensors", {f"{PATH}.{name}": array for name, array in arrays.items()})
    uses = [(files.opened(path, folder.sizes), 0.7)]
    Attached(flux, "transformer", mx.float32).use(uses, Base(folder, mx.float32).lengths)
    layer = flux.double_blocks[0].img_attn.qkv
    assert_close(layer(mx.zeros((1, WIDTH)))[0], layer.bias, 1e-5)
    assert_close(constant(layer), layer.bias, 1e-5)


def test_a_guarded_layer_with_a_branch_is_the_layer(folder, flux, tmp_path):
    module, mlp = "double_blocks.0.img_mlp.2", flux.double_blocks[0].img_mlp[2]
    arrays = {"lora_B.weight": numbers(64, 3), "lora_A.weight": numbers(3, 256), "lora_B.bias": numbers(64)}
    path = files.save(tmp_path / "a.safetensors", {f"{module}.{name}": array for name, array in arrays.items()})
    Attached(flux, "transformer", mx.float32).use([(files.opened(path, folder.sizes), 2.0)], lambda *_: None)
    x = numbers(5, 256)
    assert_close(guarded(mlp, x), mlp(x), 1e-5)


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        ({}, 1.0),
        ({"transformer.r": 4, "transformer.lora_alpha": 8}, 2.0),
        ({"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.use_rslora": True}, 4.0),
        ({"transformer.r": 2, "transformer.lora_alpha": 8, "transformer.rank_pattern": {"attn.to_q": 4}}, 2.0),
        ({"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"to_q": 1}}, 0.25),
        ({"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"o_q": 1}}, 2.0),
        ({"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"^to_q": 1}}, 2.0),
        ({"text_encoder.r": 4, "text_encoder.lora_alpha": 8}, 1.0),
    ],
)
def test_the_scale_follows_pefts_header(folder, tmp_path, metadata, scale):
    module = "transformer.transformer_blocks.0.attn.to_q"
    arrays = {f"{module}.lora_A.weight": numbers(4, 64), f"{module}.lora_B.weight": numbers(64, 4)}
    path = files.save(tmp_path / "a.safetensors", arrays, lora_adapter_metadata=json.dumps(metadata))
    part = files.opened(path, folder.sizes).parts[0]
    assert_close(part.arrays["up"], scale * arrays[f"{module}.lora_B.weight"], 1e-6)


def test_the_config_beside_a_file_of_pefts_is_read(folder, tmp_path):
    module = "base_model.model.transformer_blocks.0.attn.to_q"
    arrays = {f"{module}.lora_A.weight": numbers(4, 64), f"{module}.lora_B.weight": numbers(64, 4)}
    path = files.save(tmp_path / "adapter_model.safetensors", arrays)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 2}))
    assert_close(files.opened(path, folder.sizes).parts[0].arrays["up"], arrays[f"{module}.lora_B.weight"] / 2, 1e-6)


def test_rows_that_share_a_factor_share_its_place(folder, flux, tmp_path):
    """q, k and v that were split off a fused layer: the branch has the rank that the fused layer had."""
    a = numbers(4, 64)
    arrays = {}
    for letter in "qkv":
        module = f"transformer_blocks.0.attn.to_{letter}"
        arrays |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": numbers(64, 4)}
    adapter = files.opened(files.save(tmp_path / "a.safetensors", arrays), folder.sizes)
    Attached(flux, "transformer", mx.float32).use([(adapter, 1.0)], lambda *_: None)
    assert flux.double_blocks[0].img_attn.qkv._branch.down.shape == (64, 4)


def test_twenty_adapters_are_one_branch_and_their_sum(folder, flux):
    before = called(flux)
    adapter = files.opened(files.reference("kohya"), folder.sizes)
    twenty = [(dataclasses.replace(adapter), 0.04) for _ in range(20)]
    Attached(flux, "transformer", mx.float32).use(twenty, lambda *_: None)
    assert_close(called(flux), files.goldens()["lora.full.output"], 3e-5)
    assert rel(called(flux), before) > 0.1
    assert flux.double_blocks[0].img_attn.qkv._branch.down.shape == (64, 4), "equal factors share their place"


def test_twenty_different_adapters_are_one_branch_and_their_sum(folder, flux, tmp_path, weight):
    expected, uses = weight, []
    for n in range(20):
        rank, scale = 1 + n % 3, 0.1 * (n - 9.5)
        if n % 5 == 4:
            a, b = numbers(3, 2), numbers(64, 32)
            arrays, change = {"lokr_w1": a, "lokr_w2": b}, mx.kron(a, b)
        else:
            a, b = numbers(ROWS, rank), numbers(rank, WIDTH)
            arrays, change = {"lora_up.weight": a, "lora_down.weight": b}, a @ b
        path = files.save(tmp_path / f"{n}.safetensors", {f"{PATH}.{name}": array for name, array in arrays.items()})
        uses.append((files.opened(path, folder.sizes), scale))
        expected = expected + scale * change
    Attached(flux, "transformer", mx.float32).use(uses, lambda *_: None)
    layer = flux.double_blocks[0].img_attn.qkv
    assert_close((layer(mx.eye(WIDTH)) - layer.bias).T, expected, 1e-5)
    ranks = sum(1 + n % 3 for n in range(20) if n % 5 != 4)
    assert (layer._branch.down.shape, layer._branch.up.shape) == ((WIDTH, ranks), (ranks, ROWS))
    assert len(layer._branch.products) == 4


# --- beside weights that are streamed, and taken away again ---


def test_branches_are_neither_parameters_nor_matrices_of_a_block(folder, flux):
    known, streamed = set(parameters(flux)), [matrices(block)[1] for block in flux.blocks]
    used(folder, flux, ("kohya", 1.0), ("loha_kohya", 1.0), ("lokr_kohya", 1.0))
    assert set(parameters(flux)) == known
    assert [matrices(block)[1] for block in flux.blocks] == streamed


def test_weight_zero_and_unloading_give_the_bits_of_no_adapter(folder, flux):
    before = called(flux)
    attached = used(folder, flux, ("control_bfl", 0.0), ("dora_peft", 0.0), ("lokr_kohya", 0.0))
    assert mx.array_equal(called(flux), before)
    everything = [
        (files.opened(files.reference(name), folder.sizes), 1.0) for name in ("bfl", "dora_peft", "loha_kohya")
    ]
    attached.use(everything, Base(folder, mx.float32).lengths)
    assert not mx.array_equal(called(flux), before)
    assert attached.use([], lambda *_: None)
    assert mx.array_equal(called(flux), before)
    assert attached.use([], lambda *_: None) == set()


def latents(pipe) -> mx.array:
    return pipe("A cat holding a sign that says hello world", output_type="latent", **SMALL).images


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["none", "8"])
def test_streamed_resident_and_half_of_each_give_the_same_bits(tmp_path, bits):
    path = convert([PIPELINE], tmp_path / "m", dtype="float32", quantize=bits, tokenizers=TOKENIZERS).path
    pictures = []
    for memory in ("auto", "least", "half"):
        pipe = FluxPipeline.from_pretrained(path)
        for name in ("kohya", "dora_peft", "lokr_kohya", "te_kohya"):
            pipe.load_lora_weights(files.reference(name))
        pipe.set_adapters(["kohya", "dora_peft", "lokr_kohya", "te_kohya"], [0.5, 0.5, 0.2, 0.7])
        plan = pipe.plan(prompt="A cat", **{k: v for k, v in SMALL.items() if k != "progress"})
        pipe.memory = {"auto": None, "least": plan.least, "half": (plan.least + plan.most) // 2}[memory]
        pictures.append(latents(pipe))
        resident = len(pipe._generator.blocks.resident)
        assert {"auto": resident == 5, "least": resident == 0, "half": 0 < resident < 5}[memory], (memory, resident)
    assert mx.array_equal(pictures[0], pictures[1])
    assert mx.array_equal(pictures[0], pictures[2])


@pytest.mark.slow
def test_other_weights_between_pictures_give_what_a_new_pipeline_gives(pipe, model):
    plain = latents(pipe)
    for name in ("kohya", "two_a_peft"):
        pipe.load_lora_weights(files.reference(name))
    seen = {}
    for weights in ([0.5, 0.0], [0.5, 1.0], [0.0, -1.0]):
        pipe.set_adapters(["kohya", "two_a_peft"], weights)
        seen[tuple(weights)] = latents(pipe)
    pipe.unload_lora_weights()
    assert mx.array_equal(latents(pipe), plain)
    for weights, got in seen.items():
        fresh = FluxPipeline.from_pretrained(model)
        for name in ("kohya", "two_a_peft"):
            fresh.load_lora_weights(files.reference(name))
        fresh.set_adapters(["kohya", "two_a_peft"], list(weights))
        assert mx.array_equal(latents(fresh), got), weights


def test_only_modulations_that_an_adapter_touches_are_computed_again(pipe):
    counts = []

    def progress(stage, done, total):
        if stage == "modulation":
            counts.append(total)

    call = {**SMALL, "progress": progress, "output_type": "latent"}
    pipe("A cat", **call)
    pipe.load_lora_weights(files.reference("two_b_kohya"))  # one double and one single block, as its file says
    pipe("A cat", **call)
    pipe("A cat", **call)
    modules = outline(files.reference("two_b_kohya"), pipe.folder.sizes).groups.values()
    touched = {re.match(r"\w+\.\d+", t.path)[0] for t, _ in modules if "mod" in t.path}
    assert set(counts) == {5 + 1 + 1, len(touched) + 1}
    assert 0 < len(touched) < 6


def test_the_plan_counts_the_branches(pipe):
    without = pipe.plan(prompt="A cat")
    pipe.load_lora_weights(files.reference("kohya"))
    with_one = pipe.plan(prompt="A cat")
    branches = sum(
        array.nbytes
        for path, layer in _branched(pipe)
        for array in layer._branch.arrays
    )  # fmt: skip
    counted = with_one.stages["denoise"] - without.stages["denoise"]
    assert branches <= counted <= 2 * branches
    assert counted == branch_bytes([(pipe._loaded.all["kohya"], 1.0)], pipe.folder.sizes, mx.float32)


EVERY = sorted(path.stem for path in files.folder().iterdir())


@pytest.mark.parametrize("name", EVERY)
def test_a_plan_from_the_header_alone_counts_the_same_bytes(folder, tmp_path, name):
    path = files.reference(name)
    read = files.opened(path, folder.sizes)
    unread = Adapter(read.facts, shapes_of(outline(path, folder.sizes)))
    wanted, got = (branch_bytes([(one, 0.5)], folder.sizes, mx.bfloat16) for one in (read, unread))
    assert got == wanted > 0
    assert branch_bytes([(unread, 0.0)], folder.sizes, mx.bfloat16) == 0


def _branched(pipe):
    flux = pipe.folder.flux.load(mx.float32)
    Attached(flux, "transformer", mx.float32).use([(pipe._loaded.all["kohya"], 1.0)], lambda *_: None)
    return [(path, layer) for path, layer in flux.named_modules() if "_branch" in layer.__dict__]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_adapter_runs_in_the_compute_type(pipe, model, dtype):
    pipe.load_lora_weights(files.reference("kohya"))
    short = FluxPipeline.from_pretrained(model, dtype=dtype)
    short.load_lora_weights(files.reference("kohya"))
    assert rel(latents(short), latents(pipe)) < 0.03
    assert rel(latents(pipe), latents(FluxPipeline.from_pretrained(model))) > 0.05


# --- Python, as in diffusers ---


def test_names_weights_and_scale_are_those_of_diffusers(pipe):
    plain = latents(pipe)
    pipe.load_lora_weights(str(files.folder()), weight_name="kohya.safetensors", adapter_name="one")
    assert pipe.get_active_adapters() == ["one"]
    assert pipe.get_list_adapters() == {"transformer": ["one"]}
    full = latents(pipe)
    pipe.set_adapters("one", 0.5)
    half = latents(pipe)
    pipe.set_adapters(["one"], adapter_weights=[1.0])
    call = {**SMALL, "output_type": "latent", "joint_attention_kwargs": {"scale": 0.5}}
    cat = "A cat holding a sign that says hello world"
    assert mx.array_equal(pipe(cat, **call).images, half)
    pipe.disable_lora()
    assert mx.array_equal(latents(pipe), plain)
    pipe.enable_lora()
    pipe.fuse_lora()
    assert mx.array_equal(latents(pipe), full)
    pipe.delete_adapters("one")
    assert pipe.get_list_adapters() == {}
    assert mx.array_equal(latents(pipe), plain)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda pipe: pipe.set_adapters("two"), "no adapter is loaded as 'two'"),
        (lambda pipe: pipe.set_adapters(["one"], [0.1, 0.2]), "2 weights for 1 adapters"),
        (lambda pipe: pipe.set_adapters("one", float("nan")), "holds nan"),
        (lambda pipe: pipe.set_adapters(["one", "one"]), "twice"),
        (lambda pipe: pipe.set_adapters("one", [{"blocks": 1}]), "by block"),
        (lambda pipe: pipe.delete_adapters("two"), "no adapter is loaded as 'two'"),
        (lambda pipe: pipe.fuse_lora(lora_scale=0.5), "set_adapters"),
        (lambda pipe: pipe.load_lora_weights({"a": 1}), "dict"),
        (lambda pipe: pipe.load_lora_weights(files.reference("bfl"), "one"), "loaded as one"),
        (lambda pipe: pipe.load_lora_weights(files.folder(), weight_name="../a.safetensors"), "weight_name"),
        (lambda pipe: [pipe.load_lora_weights(files.reference("control_bfl")), pipe("A cat")], "control"),
        (lambda pipe: pipe("A cat", joint_attention_kwargs={"ip_adapter_masks": 1}), "joint_attention_kwargs"),
        (lambda pipe: pipe("A cat", joint_attention_kwargs={"scale": "much"}), "scale"),
        (lambda pipe: pipe("A cat <lora:nowhere:0.5>"), "'nowhere', which is not installed"),
        (lambda pipe: pipe("A cat <lora:one:much>"), "<lora:one:much>"),
        (lambda pipe: pipe(["A cat <lora:one:1>", "A dog"]), "different adapters"),
    ],
)
def test_what_cannot_be_used_is_said(pipe, call, word):
    pipe.load_lora_weights(files.reference("kohya"), adapter_name="one")
    with pytest.raises(UsageError, match=re.escape(word)):
        call(pipe)


def test_a_missing_adapter_says_where_it_was_looked_for(pipe, tmp_path):
    for source, word in (("nowhere", "no adapter 'nowhere'"), ("owner/name:a.safetensors", "models add owner/name:a")):
        with pytest.raises(ModelError, match=word):
            pipe.load_lora_weights(source)
    with pytest.raises(ModelError, match="no safetensors file"):
        pipe.load_lora_weights(_written(tmp_path / "a.bin", b"x"))


def _written(path, data: bytes):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("text", "plain", "tags"),
    [
        ("a cat", "a cat", ()),
        ("a cat <lora:paper:0.8>", "a cat", (("paper", 0.8),)),
        ("<lora:paper>a cat", "a cat", (("paper", 1.0),)),
        ("a <lora:a b:-1> cat, <LORA:c:.5>, red", "a cat, red", (("a b", -1.0), ("c", 0.5))),
        ("a < lora:x > cat", "a < lora:x > cat", ()),
    ],
)
def test_tags_are_taken_out_of_a_prompt(text, plain, tags):
    assert take_tags(text) == (plain, tags)


def test_an_adapter_that_a_prompt_names_is_applied_and_not_sent_to_t5(pipe):
    pipe.load_lora_weights(files.reference("kohya"), adapter_name="paper")
    wanted = latents(pipe)
    pipe.set_adapters([])
    result = pipe("A cat holding a sign that says hello world <lora:paper:1>", output_type="latent", **SMALL)
    assert mx.array_equal(result.images, wanted)
    assert result.records[0]["prompt"] == "A cat holding a sign that says hello world"
    assert [(one["name"], one["weight"]) for one in result.records[0]["adapters"]] == [("paper", 1.0)]


def test_the_record_names_hash_weight_and_count(pipe, tmp_path):
    pipe.load_lora_weights(files.reference("unmatched_kohya"))
    pipe.set_adapters("unmatched_kohya", 0.3)
    (record,) = pipe("A cat", **SMALL).records
    (one,) = record["adapters"]
    assert (one["weight"], one["applied"]) == (0.3, "28 of 32")
    assert re.fullmatch("[0-9a-f]{64}", one["sha256"])


# --- installed ones ---


@pytest.mark.slow
def test_a_file_is_installed_when_it_is_first_used_and_found_by_its_hash(pipe, home, tmp_path):
    copy = tmp_path / "my adapter!.safetensors"
    copy.write_bytes(files.reference("dora_peft").read_bytes())
    pipe.load_lora_weights(copy)
    assert [path.name for path in (home / "adapters").iterdir()] == ["my-adapter"]
    first = latents(pipe)
    for source in (files.reference("dora_peft"), "my-adapter"):
        again = FluxPipeline.from_pretrained(pipe.folder.path)
        again.load_lora_weights(source)
        assert mx.array_equal(latents(again), first)
    assert len(list((home / "adapters").iterdir())) == 1


def test_every_file_survives_being_installed(folder, tmp_path):
    for path in sorted(files.folder().iterdir()):
        adapter = files.opened(path, folder.sizes)
        mx.save_safetensors(str(tmp_path / "a.safetensors"), tensors_of(adapter))
        kept = open_parts(tmp_path / "a.safetensors", folder.sizes)
        before = {(p.target.path, p.target.start, name): a for p in adapter.parts for name, a in p.arrays.items()}
        after = {(p.target.path, p.target.start, name): a for p in kept for name, a in p.arrays.items()}
        assert before.keys() == after.keys()
        assert all(a.dtype == after[k].dtype and mx.array_equal(a, after[k]) for k, a in before.items()), path.name


def test_a_damaged_installed_adapter_is_made_again_from_its_file(pipe, home):
    pipe.load_lora_weights(files.reference("kohya"))
    (kept,) = (home / "adapters").iterdir()
    (kept / "adapter.safetensors").write_bytes(b"x" * 100)
    again = FluxPipeline.from_pretrained(pipe.folder.path)
    with pytest.raises(ModelError, match="damaged"):
        again.load_lora_weights("kohya")
    again.load_lora_weights(files.reference("kohya"))
    assert mx.array_equal(latents(again), latents(pipe))


def test_files_of_one_name_stand_beside_each_other(pipe, home, tmp_path):
    for name in ("kohya", "bfl"):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "style.safetensors"
        path.write_bytes(files.reference(name).read_bytes())
        pipe.load_lora_weights(path)
    assert sorted(path.name for path in (home / "adapters").iterdir()) == ["style", "style-2"]
    assert pipe.get_active_adapters() == ["style", "style-2"]


def test_lengths_of_dora_are_measured_once_and_kept_with_the_hash_of_the_base(pipe, home, monkeypatch):
    pipe.load_lora_weights(files.reference("dora_peft"))
    first = latents(pipe)
    (kept,) = (home / "adapters" / "dora_peft").glob("lengths-*-float32.safetensors")

    def again() -> mx.array:
        other = FluxPipeline.from_pretrained(pipe.folder.path)
        other.load_lora_weights("dora_peft")
        return latents(other)

    with monkeypatch.context() as patch:
        patch.setattr(formulas, "measure", lambda *_: pytest.fail("measured again"))
        assert mx.array_equal(again(), first)
    for damage in (b"x", kept.read_bytes()[:-4]):
        kept.write_bytes(damage)
        assert mx.array_equal(again(), first)


# --- files that must be refused ---


def layer(down=(2, 64), up=(192, 2), **more) -> dict:
    return {f"{PATH}.lora_down.weight": numbers(*down), f"{PATH}.lora_up.weight": numbers(*up)} | more


def kron(outer, inner) -> dict:
    return {f"{PATH}.lokr_w1": numbers(*outer), f"{PATH}.lokr_w2": numbers(*inner)}


HOSTILE = {
    "rank 0": (lambda: layer((0, 64), (192, 0)), "a rank from 1"),
    "rank above width": (lambda: layer((193, 64), (192, 193)), "a rank from 1 to 192"),
    "NaN": (lambda: layer() | {f"{PATH}.lora_up.weight": numbers(192, 2) * math.nan}, "NaN or infinities"),
    "infinity": (lambda: layer() | {f"{PATH}.lora_down.weight": numbers(2, 64) * math.inf}, "NaN or infinities"),
    "alpha 0": (lambda: layer() | {f"{PATH}.alpha": mx.array(0.0)}, "is 0"),
    "alpha NaN": (lambda: layer() | {f"{PATH}.alpha": mx.array(math.nan)}, "NaN"),
    "two alphas": (lambda: layer() | {f"{PATH}.alpha": mx.array([1.0, 2.0])}, "one number"),
    "no up": (lambda: {f"{PATH}.lora_down.weight": numbers(2, 64)}, "has no up"),
    "alpha alone": (lambda: {f"{PATH}.alpha": mx.array(1.0)}, "no change of a layer"),
    "ranks that differ": (lambda: layer((2, 64), (192, 3)), "expected [192, 2]"),
    "another width": (lambda: layer((2, 63)), "expected (rank, 64)"),
    "another height": (lambda: layer(up=(191, 2)), "expected [192, 2]"),
    "a vector": (lambda: layer((64,), (192,)), "has shape [64]"),
    "width of SDXL": (lambda: layer((2, 1280)), "it may be for SDXL"),
    "width of FLUX.2": (lambda: layer((2, 6144)), "FLUX.2"),
    "twice": (lambda: layer() | {f"diffusion_model.{PATH}.lora_A.weight": numbers(2, 64)}, "the same tensor"),
    "twice in two namings": (
        lambda: layer() | {"transformer_blocks.0.attn.to_q.lora_A.weight": numbers(2, 64),
                           "transformer_blocks.0.attn.to_q.lora_B.weight": numbers(64, 2)},
        "change the same rows",
    ),
    "two formulas": (lambda: layer() | {f"{PATH}.lokr_w1": numbers(3, 4)}, "lora and lokr"),
    "LoKr whole and in two": (
        lambda: kron((3, 4), (64, 16)) | {f"{PATH}.lokr_w1_a": numbers(3, 1)},
        "lokr_w1",
    ),
    "LoKr of another size": (lambda: kron((3, 4), (64, 15)), "[192, 60]"),
    "LoHa without a factor": (lambda: {f"{PATH}.hada_w1_a": numbers(192, 2)}, "hada_w1_b"),
    "integers": (lambda: layer() | {f"{PATH}.alpha": mx.array(4)}, "I32"),
    "no adapter": (lambda: {f"{PATH}.weight": numbers(192, 64)}, "none of its 1 tensor fits"),
    "empty": (dict, "none of its 0 tensors fits"),
    "DoRA of another length": (lambda: layer() | {f"{PATH}.dora_scale": numbers(191, 1)}, "[192, 1] or [1, 64]"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_cannot_be_meant_is_refused_with_its_tensor(folder, tmp_path, case):
    make, word = HOSTILE[case]
    path = files.save(tmp_path / "a.safetensors", make())
    with pytest.raises(ModelError, match=re.escape(word)):
        files.opened(path, folder.sizes)


def test_no_published_tensor_is_taken_for_a_style_that_is_not_read():
    tensors = [name for layout in layouts() for name in published(layout)]
    assert len(tensors) > 10_000
    assert [name for name in tensors if names.unread_style(name)] == []


LYCORIS, PEFT = "lycoris_transformer_blocks_0_attn_to_q", "base_model.model.transformer_blocks.0.attn.to_q"
UNREAD = {  # names as LyCORIS (modules/), PEFT (tuners/), kohya and diffusers (textual inversion) write them
    "OFT": (f"{LYCORIS}.oft_diag", f"{PEFT}.oft_r.default"),
    "OFT or BOFT": (f"{LYCORIS}.oft_blocks", f"{PEFT}.oft_R.weight"),
    "BOFT": (f"{PEFT}.boft_R", f"{PEFT}.boft_s"),
    "GLoRA": (f"{LYCORIS}.a1.weight", f"{LYCORIS}.b2.weight", f"{LYCORIS}.bm.weight"),
    "(IA)3": (f"{PEFT}.ia3_l", f"{LYCORIS}.on_input"),
    "VeRA": (f"{PEFT}.vera_lambda_b", f"{PEFT}.vera_lambda_d.default", "base_model.vera_A"),
    "Tucker decomposition": (f"{LYCORIS}.hada_t1", f"{LYCORIS}.lokr_t2", f"{PATH}.lora_mid.weight"),
    "embeddings of tokens": ("text_encoder.text_model.embeddings.token_embedding.lora_embedding_A",),
    "textual inversion": ("emb_params", "clip_l", "t5", "bundle_emb.cat.clip_l", "string_to_param.*", "<cat-toy>"),
}  # fmt: skip


@pytest.mark.parametrize("style", UNREAD)
@pytest.mark.parametrize("beside", [layer, dict], ids=["beside a LoRA", "alone"])
def test_styles_that_are_not_read_are_refused_by_name_with_a_next_step(folder, tmp_path, style, beside):
    for name in UNREAD[style]:
        path = files.save(tmp_path / "a.safetensors", beside() | {name: numbers(2, 2)})
        with pytest.raises(ModelError) as refused:
            outline(path, folder.sizes)
        error = refused.value
        assert f"{name} is of the style {style}, which is not read yet" in error.found
        assert "LoRA, LoKr, LoHa, DoRA" in error.expected
        assert re.search("ask its maker|use its words", error.todo)
        assert looks_like_adapter(path), "inspect names the style, too"


@pytest.mark.parametrize(
    ("metadata", "word"),
    [
        ("{", "no JSON"),
        (json.dumps({"transformer.alpha_pattern": {"(a+)+$": 1}}), "a pattern that is no name"),
        (json.dumps({"transformer.r": 8, "transformer.lora_alpha": 8}), "the header says 8"),
        ("[" * 1000 + "]" * 1000, "nested"),
    ],
)
def test_a_header_that_cannot_be_meant_is_refused(folder, tmp_path, metadata, word):
    path = files.save(tmp_path / "a.safetensors", layer(), lora_adapter_metadata=metadata)
    with pytest.raises(ModelError, match=word):
        files.opened(path, folder.sizes)


D = 3072
OTHERS = {
    "SDXL": ({"lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight": [4, 640],
              "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": [4, 1280]}, "SDXL"),
    "SD1": ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": [4, 1280]}, "Stable Diffusion"),
    "SD3": ({"transformer.joint_blocks.0.x_block.attn.qkv.lora_A.weight": [4, 1536]}, "SD3"),
    "FLUX.2": ({"transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight": [4, 6144],
                "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": [4, 6144]}, "FLUX.2"),
    "Krea 2": ({"diffusion_model.txtfusion.projector.lora_A.weight": [4, 12],
                "diffusion_model.blocks.0.attn.wq.lora_A.weight": [4, 6144]}, "Krea 2"),
    "Qwen": ({"transformer_blocks.0.img_mlp.net.0.proj.lora_A.weight": [4, D],
              "transformer_blocks.0.attn.to_q.lora_A.weight": [4, D],
              "transformer_blocks.0.attn.to_q.lora_B.weight": [D, 4]}, "Qwen-Image"),
    "Qwen, attention alone": ({f"transformer_blocks.{n}.attn.to_q.lora_{ab}.weight": shape
                               for n in range(60) for ab, shape in (("A", [4, D]), ("B", [D, 4]))}, "block 19"),
    "Hunyuan": ({"transformer.double_blocks.0.img_attn_qkv.lora_A.weight": [4, D],
                 "transformer.double_blocks.0.img_mlp.0.lora_A.weight": [4, D],
                 "transformer.double_blocks.0.img_mlp.0.lora_B.weight": [4 * D, 4]}, "HunyuanVideo"),
    "Z-Image": ({"diffusion_model.noise_refiner.0.attention.qkv.lora_A.weight": [4, 3840]}, "Z-Image"),
    "Wan": ({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": [4, 5120]}, "Wan"),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_files_for_another_model_are_refused_by_its_name(tmp_path, other):
    shapes, word = OTHERS[other]
    path = files.header(tmp_path / "a.safetensors", {name: ("F16", shape) for name, shape in shapes.items()})
    with pytest.raises(ModelError, match=re.escape(word)):
        outline(path, configs.FLUX_DEV_MODEL)


def test_a_file_of_which_a_part_fits_is_used_and_the_rest_named(pipe, caplog):
    pipe.load_lora_weights(files.reference("unmatched_kohya"))
    assert "applied 28 of 32; this model does not have" in caplog.text
    assert "double_blocks_0_img_attn_foo" in caplog.text


# --- licence ---


@pytest.mark.parametrize(
    ("facts", "hidden", "word"),
    [
        ({"dev": "it is called flux-dev-lora"}, 3072, "flux-dev-lora"),
        ({"dev": "it is called flux-dev-lora"}, 64, ""),
        ({}, 3072, ""),
    ],
)
def test_an_adapter_adds_a_duty_to_models_of_flux_size_alone(facts, hidden, word):
    architecture = dataclasses.replace(configs.FLUX_SCHNELL, hidden_size=hidden).architecture
    why = added_duty([Facts("a", "a", "0", **facts)], architecture)
    assert word in why
    assert bool(why) is bool(word)


def test_a_file_that_is_no_adapter_is_refused_before_it_is_hashed(folder, tmp_path):
    with open(tmp_path / "large.safetensors", "wb") as file:
        file.truncate(2**40)  # with nothing on the disk; hashing it would take an hour
    with pytest.raises(ModelError, match="is all zeros at its start"):
        obtain(tmp_path / "large.safetensors", folder.sizes)


@pytest.mark.parametrize(
    ("beside", "metadata", "dev"),
    [
        ({}, {}, False),
        ({"LICENSE.md": "FLUX.1 [dev] Non-Commercial License v1.1.1"}, {}, True),
        ({"README.md": "---\nlicense: other\nlicense_name: flux-1-dev-non-commercial-license\n---\n"}, {}, True),
        ({"README.md": "---\nlicense: apache-2.0\n---\n"}, {}, False),
        ({"README.md": "---\nbase_model: black-forest-labs/FLUX.1-dev\n---\n"}, {}, True),
        ({"README.md": "---\nbase_model:\n- black-forest-labs/FLUX.1-dev\ntags:\n- lora\n---\n"}, {}, True),
        ({"README.md": "---\nbase_model:\n- black-forest-labs/FLUX.1-schnell\n---\n"}, {}, False),
        ({"LICENSE-FLUX1-dev": "FLUX.1 [dev] Non-\nCommercial License"}, {}, True),
        ({}, {"modelspec.architecture": "flux-1-dev/lora"}, True),
        ({}, {"ss_sd_model_name": "flux1-schnell.safetensors"}, False),
        ({}, {"modelspec.license": "flux-1-dev-non-commercial-license"}, True),
    ],
)
def test_the_licence_of_an_adapter_is_read_from_all_that_states_it(folder, tmp_path, beside, metadata, dev):
    for name, text in beside.items():
        (tmp_path / name).write_text(text)
    facts = obtain(files.save(tmp_path / "style.safetensors", layer(), **metadata), folder.sizes).facts
    assert bool(facts.dev) is dev


def test_a_control_adapter_is_always_bfls(folder):
    assert "control" in obtain(files.reference("control_bfl"), folder.sizes).facts.dev


@pytest.mark.parametrize("flux", [configs.FLUX_DEV, configs.FLUX_CONTROL])
def test_a_published_control_adapter_is_mapped_in_full_and_is_devs(tmp_path, flux):
    """Its file has no licence, no metadata and, here, no telling name; on Canny's and Depth's own models, too."""
    path = files.header(tmp_path / "a.safetensors", published("lora-bfl-control"))
    sizes = dataclasses.replace(configs.FLUX_DEV_MODEL, flux=flux)
    found = outline(path, sizes)
    assert (found.modules, found.unmatched) == (466, ())
    facts = described(found, Facts(name="a", source=str(path), sha256="0"), sizes)
    facts = with_licence(facts, path, Origin(str(path)), flux.architecture)
    assert (facts.control, facts.applied) == (True, 466)
    assert facts.dev == "BFL's control adapters are under FLUX.1 [dev]'s licence"


TURBO, HYPER = (8, 3.5, 1.0), (8, 3.5, 0.125)
WHOLE, BLOCKS, STYLE = {}, {"outside": False}, {"rank": 16}
TURBO_PLACE = "alimama-creative/FLUX.1-Turbo-Alpha:diffusion_pytorch_model.safetensors"
FEW_STEPS = {  # name, place and title of a file, and its layers: the preset, and whether a note says that it may be one
    "Turbo's file": (("flux.1-turbo-alpha-lora", "", "", WHOLE), TURBO, False),
    "Turbo's place": (("diffusion_pytorch_model", TURBO_PLACE, "", WHOLE), TURBO, False),
    "Turbo's title": (("a", "", "FLUX.1-Turbo-Alpha", WHOLE), TURBO, False),
    "Hyper, 8": (("Hyper-FLUX.1-dev-8steps-lora", "", "", WHOLE), HYPER, False),
    "Hyper, 16": (("Hyper-FLUX.1-dev-16steps-lora", "", "", WHOLE), (16, 3.5, 0.125), False),
    "Hyper's place": (("a", "ByteDance/Hyper-SD:Hyper-FLUX.1-dev-8steps-lora.safetensors", "", WHOLE), HYPER, False),
    "no name": (("a", "", "", WHOLE), (), True),
    "all layers of a style": (("a", "", "", STYLE), (), False),
    "a style trained beside Turbo": (("anime-for-turbo-alpha", "", "", BLOCKS), (), False),
    "a style trained beside Hyper": (("Hyper-FLUX.1-dev-8steps-anime", "", "Hyper-FLUX.1", BLOCKS), (), False),
    "a word": (("hyper-realism", "", "", STYLE), (), False),
}  # fmt: skip


@pytest.mark.parametrize("case", FEW_STEPS)
def test_adapters_for_few_steps_are_recognised_by_name_and_layers(tmp_path, case):
    (name, source, title, layers), preset, perhaps = FEW_STEPS[case]
    metadata = {"modelspec.title": title, "ss_sd_model_name": "Hyper-FLUX.1-dev-8steps.safetensors"}
    path = files.header(tmp_path / "a.safetensors", files.turbo_keys(**layers), metadata)
    sizes = configs.FLUX_DEV_MODEL
    facts = described(outline(path, sizes), Facts(name, source or name, "0"), sizes)
    assert (facts.preset, facts.few_steps) == (preset, perhaps)


def test_words_that_the_prompt_needs_are_read(folder, tmp_path):
    metadata = {"modelspec.trigger_phrase": "ppr style", "ss_tag_frequency": "{}"}
    path = files.save(tmp_path / "a.safetensors", layer(), **metadata)
    assert files.opened(path, folder.sizes).facts.triggers == ("ppr style",)
