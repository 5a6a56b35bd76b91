"""float16: every guard is needed by some weights, and a step that exceeds the range is computed in bfloat16."""

import json
import logging
import re
import shutil

import mlx.core as mx
import pytest
from helpers import PIPELINE, TOKENIZERS, edit_tensors, rel
from mlx_flux_krea.convert import convert

from mlx_flux_krea import FluxPipeline
from mlx_flux_krea.commands.shared import estimates
from mlx_flux_krea.models import transformer

CALL = {"prompt": "a cat", "seed": 3, "width": 48, "height": 32, "num_inference_steps": 3, "output_type": "latent"}
CALL["max_sequence_length"] = 32
GUARDED = {  # names in diffusers' layout: sums that the guards divide
    "the image's MLP": "transformer_blocks.0.ff.net.2",
    "the text's MLP": "transformer_blocks.0.ff_context.net.2",
    "a single block": "single_transformer_blocks.0.proj_out",
}
BEYOND = {  # sums that no guard divides
    "queries of a double block": "transformer_blocks.0.attn.to_q",
    "values of a double block": "transformer_blocks.0.attn.to_v",
    "the MLP's first layer": "transformer_blocks.0.ff.net.0.proj",
    "the first layer of a single block": "single_transformer_blocks.0.proj_mlp",
    "modulation": "transformer_blocks.0.norm1.linear",
}


def scaled(folder, layer: str, times: float):
    """A model folder, in float32, of the reference's tiny pipeline with one layer's weights so many times as large."""
    source = shutil.copytree(PIPELINE, folder / "source")
    index = json.loads((source / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    path = source / "transformer" / index["weight_map"][f"{layer}.weight"]
    edit_tensors(path, lambda arrays: arrays.update({f"{layer}.weight": arrays[f"{layer}.weight"] * times}))
    return convert([source], folder / "model", tokenizers=TOKENIZERS, dtype="float32").path


def latents(folder, dtype: str, caplog, **how: str) -> tuple[mx.array, list[str]]:
    """Latents of a run, and the notes about the range of float16."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "mlx_flux_krea"):
        made = FluxPipeline.from_pretrained(folder, dtype=dtype)(**CALL, **how).images
    return made, [text for text in caplog.messages if "float16" in text]


@pytest.mark.slow
@pytest.mark.parametrize("layer", GUARDED.values(), ids=GUARDED)
def test_a_guard_keeps_sums_within_the_range_and_without_it_they_leave_it(tmp_path, caplog, monkeypatch, layer):
    folder = scaled(tmp_path, layer, 1e5)
    exact, _ = latents(folder, "float32", caplog)
    made, notes = latents(folder, "float16", caplog)
    assert (notes, rel(made, exact) < 0.01) == ([], True)
    monkeypatch.setattr(transformer, "guarded", lambda down, y: down(y))
    assert latents(folder, "float16", caplog)[1]


@pytest.mark.core("queries of a double block")
@pytest.mark.parametrize("layer", BEYOND.values(), ids=BEYOND)
def test_a_step_beyond_the_range_is_computed_in_bfloat16_and_said_once(tmp_path, caplog, layer):
    folder = scaled(tmp_path, layer, 2e5)
    exact, _ = latents(folder, "float32", caplog)
    other, _ = latents(folder, "bfloat16", caplog)
    made, notes = latents(folder, "float16", caplog)
    assert notes == ["step 1 exceeds the range of float16: it is computed in bfloat16, and so is any other that does"]
    assert rel(made, exact) < max(0.02, 1.5 * rel(other, exact))
    cached, again = latents(folder, "float16", caplog, cache="first-block:0.99")  # takes nothing from such a step
    assert (again, mx.array_equal(cached, made)) == (notes, True)


@pytest.mark.slow
def test_within_the_range_nothing_is_computed_twice(tmp_path, caplog, monkeypatch):
    folder = scaled(tmp_path, "transformer_blocks.0.attn.to_q", 1)
    exact, _ = latents(folder, "float32", caplog)
    made, notes = latents(folder, "float16", caplog)
    other, _ = latents(folder, "bfloat16", caplog)
    assert notes == []
    assert rel(made, exact) < rel(other, exact) / 2, "float16 is nearer than bfloat16"


@pytest.mark.parametrize(("seconds", "says"), [((1.0, 0.8), "20% less time"), ((1.0, 0.99), "bfloat16 is the type")])
def test_bench_recommends_the_type_that_is_worth_it(seconds, says):
    assert says in estimates.recommendation(*seconds)


def test_doctor_compares_the_types_where_either_may_be_the_faster(command, monkeypatch):
    assert "16 bits" not in command("doctor")[1]
    monkeypatch.setattr(estimates, "has_fast_halves", lambda: True)
    assert re.search(r"16 bits +.*float16 takes", command("doctor")[1])
