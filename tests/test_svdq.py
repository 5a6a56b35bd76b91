"""Nunchaku's files: every layer's numbers, whole models, names at full size; what is wrong with some."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import foreign
import mlx.core as mx
import numpy as np
import nunchaku
import pytest
from mlx_flux_krea.convert import convert, examine, fit
from mlx_flux_krea.convert.identify import identify
from mlx_flux_krea.convert.reading import Reading
from mlx_flux_krea.convert.sources import Source, open_sources
from mlx_flux_krea.convert.svdq import join
from mlx_flux_krea.convert.tensors import Tensor
from test_formats import assert_kept
from test_layouts import PARAMETERS, names_in

from mlx_flux_krea import nano
from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.models import config as configs
from mlx_flux_krea.weights import open_model

LAYER = "transformer_blocks.0.mlp_fc2"


def read(file: Path, name: str) -> np.ndarray:
    """A tensor as it is read: whole, and cut wherever it may be."""
    (source,) = open_sources([file])
    tensor = source.tensors[name]
    with Reading([]) as reading:
        whole = np.array(tensor.read(reading.data).astype(mx.float32))
        if len(tensor.shape) == 2:
            cut = [tensor.rows(k, tensor.step).read(reading.data) for k in range(0, tensor.shape[0], tensor.step)]
            assert np.allclose(np.concatenate([np.array(part) for part in cut]), whole, atol=1e-6)
    return whole


def save(file: Path, parts: dict, layer: str = LAYER, metadata=None) -> Path:
    foreign.save(file, {f"{layer}.{name}": stored for name, stored in parts.items()}, metadata)
    return file


@pytest.mark.parametrize("size", [(128, 128), (256, 384), (384, 256)])
@pytest.mark.parametrize("kind", ["int4", "fp4"])
@pytest.mark.parametrize("layer", [LAYER, "single_transformer_blocks.3.qkv_proj"])
def test_a_layer_with_a_low_rank_branch_is_read_number_by_number(tmp_path, kind, size, layer):
    """The bias of an int4 layer after GELU gets back what the shift of its inputs took."""
    parts, weight, bias = nunchaku.quantized(kind, *size, is_shifted=kind == "int4" and layer == LAYER)
    file = save(tmp_path / "x.safetensors", parts, layer)
    assert np.abs(read(file, f"{layer}.weight") - weight).max() < 2e-7 * np.abs(weight).max()
    assert np.abs(read(file, f"{layer}.bias") - bias).max() < 2e-6 * np.abs(bias).max()


@pytest.mark.parametrize(("layer", "count"), [("norm1.linear", 6), ("norm1_context.linear", 6), ("norm.linear", 3)])
def test_a_layer_of_modulation_is_read_number_by_number(tmp_path, layer, count):
    parts, weight, bias = nunchaku.modulation(count, 128 * count, 192)
    file = save(tmp_path / "x.safetensors", parts, f"blocks.0.{layer}")
    assert np.abs(read(file, f"blocks.0.{layer}.weight") - weight).max() < 1e-6
    assert np.array_equal(read(file, f"blocks.0.{layer}.bias"), bias.astype(np.float32))


WRONG = {
    "a part missing": (lambda p: p.pop("smooth"), "lacks smooth"),
    "no branch": (lambda p: p.pop("lora_down"), "lacks lora_down"),
    "a part of another shape": (lambda p: p.update(smooth=("BF16", (64,), bytes(128))), r"smooth has shape \[64\]"),
    "codes in one row": (lambda p: p.update(qweight=("I8", (8192,), bytes(8192))), r"qweight has shape \[8192\]"),
    "an unknown part": (lambda p: p.update(zeros=("BF16", (64,), bytes(128))), "has the unknown part zeros"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_layer_that_is_not_whole_is_refused(tmp_path, kind):
    parts, _, _ = nunchaku.quantized("int4", 128, 128)
    change, says = WRONG[kind]
    change(parts)
    with pytest.raises(ModelError, match=f"{LAYER}.{{0,2}}{says}"):
        open_sources([save(tmp_path / "x.safetensors", parts)])


@pytest.mark.parametrize("said", ['{"method": "gptq"}', "{", "[1]"])
def test_another_method_is_refused_by_its_word(tmp_path, said):
    parts, _, _ = nunchaku.quantized("int4", 128, 128)
    with pytest.raises(ModelError, match=r"says that its method is gptq|quantization_config cannot be read"):
        open_sources([save(tmp_path / "x.safetensors", parts, metadata={"quantization_config": said})])


# --- names at full size ---


def full_size(kind: str) -> Source:
    """A source with the tensors of a published file, by the rules of nunchaku's naming (data/make_keys.py)."""
    path = Path("nowhere") / f"svdq-{kind}_r32-flux.1-krea-dev.safetensors"
    keys = foreign.keys(f"svdq-{kind}_r32")
    tensors = {n: Tensor(n, path, dtype, shape, 0, 0) for n, (dtype, shape) in keys.items()}
    return Source(path, (path,), join(tensors, {}), {})


@pytest.mark.parametrize("kind", ["int4", "fp4"])
def test_every_tensor_of_a_published_file_is_mapped(kind):
    source = full_size(kind)
    (found,) = identify(source)
    config, plan = fit.make_plan(found)
    assert (found.layout.name, config) == ("transformer, nunchaku", configs.FLUX_DEV)
    assert plan.parameters == PARAMETERS["transformer"]
    assert plan.dropped == ()
    assert source.tensors.keys() <= names_in(plan)


@pytest.mark.parametrize("lost", ["qkv_proj.weight", "mlp_fc2.weight", "norm.linear.bias", "norm_q.weight"])
def test_a_missing_layer_is_named(lost):
    source = full_size("int4")
    name = f"single_transformer_blocks.7.{lost}"
    with pytest.raises(ModelError, match=f"lacks {name}"):
        fit.make_plan(*identify(replace(source, tensors={n: t for n, t in source.tensors.items() if n != name})))


# --- whole models ---


def model_in(kind: str, target: Path, shares: bool = True) -> tuple[Path, dict[str, np.ndarray]]:
    """A random transformer of the small model's inputs and 128 channels; the folder, and the arrays expected of it.

    As in published files, layers of the same inputs share their factors; else all layers have their own.
    """
    sizes = open_model(nano.FOLDER).sizes.flux
    config = replace(
        sizes, hidden_size=128, num_heads=2, axes_dim=(16, 24, 24), depth=1, depth_single_blocks=2, mlp_ratio=4
    )
    source = foreign.write(nano.FOLDER, target, "BFL")
    (source / "config.json").write_text(json.dumps(foreign.config(nano.FOLDER) | {"flux": configs.to_json(config)}))
    rng = np.random.default_rng(0)
    wanted = {n: rng.standard_normal(s).astype(np.float32) for n, s in fit.target_shapes("transformer", config).items()}
    theirs = foreign.take_apart({n: mx.array(a) for n, a in wanted.items()}, "transformer", "diffusers")
    tensors = {}
    for name, array in theirs.items():
        new = name.replace(".attn.norm_", ".norm_")
        if "_blocks." not in name or ".norm_" in new:
            tensors[new] = foreign.plain(array, "F32")
    made: dict[str, np.ndarray] = {}
    smooth = rng.random((config.hidden_size, 1)) + 0.5
    for layer, rows, width, how in nunchaku.layers(config):
        shifted = kind == "int4" and layer.endswith(("mlp_fc2", "mlp_context_fc2"))
        if how == "awq":
            parts, weight, bias = nunchaku.modulation(6 if "norm1" in layer else 3, rows, width)
        else:
            is_shared = shares and layer.endswith(("qkv_proj", "mlp_fc1"))
            gains = nunchaku.gains_of(layer) if shares else "wcscales wtscale"
            parts, weight, bias = nunchaku.quantized(kind, rows, width, shifted, smooth if is_shared else None, gains)
        tensors |= {f"{layer}.{name}": stored for name, stored in parts.items()}
        made |= {f"{layer}.weight": weight, f"{layer}.bias": bias}
    foreign.save(source / "flux1-krea-dev.safetensors", tensors)
    return source, wanted | dict(_ours(made, config))


def _ours(made: dict[str, np.ndarray], config):
    """The arrays of our layers from nunchaku's."""
    both = {"img_attn.qkv": "qkv_proj", "txt_attn.qkv": "qkv_proj_context", "img_attn.proj": "out_proj",
            "txt_attn.proj": "out_proj_context", "img_mlp.0": "mlp_fc1", "img_mlp.2": "mlp_fc2",
            "txt_mlp.0": "mlp_context_fc1", "txt_mlp.2": "mlp_context_fc2", "img_mod.lin": "norm1.linear",
            "txt_mod.lin": "norm1_context.linear"}  # fmt: skip
    for n in range(config.depth):
        for ours, theirs in both.items():
            for end in ("weight", "bias"):
                yield f"double_blocks.{n}.{ours}.{end}", made[f"transformer_blocks.{n}.{theirs}.{end}"]
    for n in range(config.depth_single_blocks):
        at = f"single_transformer_blocks.{n}"
        for end in ("weight", "bias"):
            one, two = made[f"{at}.qkv_proj.{end}"], made[f"{at}.mlp_fc1.{end}"]
            yield f"single_blocks.{n}.linear1.{end}", np.concatenate([one, two])
            yield f"single_blocks.{n}.modulation.lin.{end}", made[f"{at}.norm.linear.{end}"]
        columns = made[f"{at}.out_proj.weight"], made[f"{at}.mlp_fc2.weight"]
        yield f"single_blocks.{n}.linear2.weight", np.concatenate(columns, axis=1)
        yield f"single_blocks.{n}.linear2.bias", made[f"{at}.out_proj.bias"] + made[f"{at}.mlp_fc2.bias"]


@pytest.mark.parametrize("kind", ["int4", "fp4"])
@pytest.mark.core("int4")
def test_a_model_of_nunchakus_becomes_the_model_of_its_values(tmp_path, kind):
    source, wanted = model_in(kind, tmp_path / "source")
    report = convert([source], tmp_path / "out", dtype="float32", quantize="none", tokenizers=nano.FOLDER)
    made = foreign.arrays_of(report.path)["transformer"]
    assert made.keys() == wanted.keys()
    for name, array in made.items():
        assert np.abs(np.array(array) - wanted[name]).max() < 2e-6 * np.abs(wanted[name]).max(), name
    shutil.rmtree(source)


def test_inspect_says_how_layers_are_stored(command, tmp_path):
    source, _ = model_in("fp4", tmp_path / "source")
    code, out, _ = command("inspect", source / "flux1-krea-dev.safetensors")
    assert (code, "20 BF16, 28 F32, 4 awq, 16 svdq fp4" in " ".join(out.split())) == (0, True), out


PLAIN = "4 bits, groups of 64"


@pytest.mark.parametrize("kind", ["int4", "fp4"])
@pytest.mark.core("fp4")
def test_codes_scales_and_branches_are_kept(tmp_path, kind):
    """Also of the two layers that are one of ours, and when the folder is converted once more."""
    source, wanted = model_in(kind, tmp_path / "source")
    labels = examine([source], tokenizers=nano.FOLDER).labels
    named = f"4bit-rank{nunchaku.RANK}" if kind == "int4" else f"nvfp4-rank{nunchaku.RANK}"
    assert (labels["none"], labels["8"], labels["4"], labels["3"]) == ("bf16", named, named, "3bit")
    path = convert([source], tmp_path / "out", dtype="float32", quantize="4", tokenizers=nano.FOLDER).path
    own = PLAIN if kind == "int4" else "nvfp4"
    names = [n.removesuffix(".weight") for n in wanted if "_blocks." in n and n.endswith(("0.weight", "2.weight"))]
    names += [n.removesuffix(".weight") for n in wanted if n.endswith((".qkv.weight", ".proj.weight"))]
    kept = dict.fromkeys(names, f"{own}, rank {nunchaku.RANK}")
    for n in range(2):
        kept |= {f"single_blocks.{n}.linear{one}": f"{own}, rank {2 * nunchaku.RANK}" for one in (1, 2)}
        kept |= {f"single_blocks.{n}.modulation.lin": PLAIN}
    assert len(kept) == 14
    assert_kept(path, wanted, kept | {f"double_blocks.0.{stream}_mod.lin": PLAIN for stream in ("img", "txt")})
    again = convert([path], tmp_path / "again", dtype="float32", quantize="4").path
    assert_kept(again, wanted, {name: q for name, q in kept.items() if q != PLAIN})
    fewer = open_model(convert([path], tmp_path / "fewer", quantize="3").path).flux.layers()
    assert {str(fewer[name]) for name in names} == {"3 bits, groups of 64"}


@pytest.mark.parametrize("kind", ["int4", "fp4"])
@pytest.mark.slow
def test_fused_layers_with_factors_of_their_own_are_rounded_anew(tmp_path, kind):
    """One product cannot have two factors for an input, nor two gains for an output of a sum."""
    source, wanted = model_in(kind, tmp_path / "source", shares=False)
    report = convert([source], tmp_path / "out", dtype="float32", quantize="8", tokenizers=nano.FOLDER)
    layers = open_model(report.path).flux.layers()
    eight = "8 bits, groups of 64"
    assert str(layers["single_blocks.0.linear1"]) == eight
    assert str(layers["single_blocks.0.linear2"]) == (f"{PLAIN}, rank {2 * nunchaku.RANK}" if kind == "int4" else eight)
    plain = convert([report.path], tmp_path / "plain", dtype="float32", quantize="none").path
    for name, array in foreign.arrays_of(plain)["transformer"].items():
        assert np.abs(np.array(array) - wanted[name]).max() < 0.01 * np.abs(wanted[name]).max(), name
