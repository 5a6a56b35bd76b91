"""The memory of a run is known before it: exact for weights, near for the rest; refused if it cannot fit."""

import gc
import json
import re

import mlx.core as mx
import pytest
from mlx_flux_krea.convert import convert
from mlx_flux_krea.convert.quantize import QuantizationRecipe, choose
from PIL import Image

from mlx_flux_krea import FluxPipeline, nano
from mlx_flux_krea.commands import plan as plan_verb
from mlx_flux_krea.errors import ResourceError, UsageError
from mlx_flux_krea.memory import (
    GB,
    PROCESS,
    VOCABULARY,
    input_needs,
    machine_memory,
    make_plan,
    parse_memory,
    step_flops,
    weigh,
    weigh_folder,
)
from mlx_flux_krea.models import config
from mlx_flux_krea.presets import CHIPS
from mlx_flux_krea.weights import layer_widths, open_model

CAT = "A cat holding a sign that says hello world"
SIZES = config.FLUX_DEV_MODEL


def weights_of(quantize="none", dtype=mx.bfloat16):
    networks = SIZES.by_component()
    layers = {
        name: choose(name, layer_widths(name, one), QuantizationRecipe(quantize))[0] for name, one in networks.items()
    }
    return weigh(SIZES, layers, dict.fromkeys(networks, "bfloat16"), dtype)


def plan_of(weights, side=1024, budget=2**60, **more):
    width, height = (side, side) if isinstance(side, int) else side
    shape = {"width": width, "height": height, "text_length": 512}
    return make_plan(weights, SIZES, mx.bfloat16, **shape, budget=budget, device="gpu", **more)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("8GB", 8 * GB),
        ("512 MiB", 2**29),
        ("1.5gb", 3 * GB // 2),
        ("8 G", 8 * GB),
        ("8g", 8 * GB),
        ("8", 8 * GB),
        ("0.5 t", GB * 500),
        ("512m", 512 * 10**6),
        ("8 Gi", 2**33),
        ("900 bytes", 900),
        (10**9, GB),
        ("auto", None),
        (" Auto ", None),
    ],
)
def test_amounts_of_memory(text, count):
    assert parse_memory(text) == count


@pytest.mark.parametrize("text", ["", "plenty", "-1GB", "0", 0, True, None, "1e3GB", "9" * 30 + "GB", "nan"])
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(UsageError, match=r'`memory` is .*; expected "auto", or an amount such as 8GB'):
        parse_memory(text)


def test_the_published_model_weighs_what_its_parameters_do():
    weights = weights_of()
    assert sum(weights.blocks.stored) == 2 * (19 * 226_492_416 + 38 * 113_246_208)  # without biases and norms
    assert 33.6e9 < weights.disk < 33.9e9
    assert max(weights.blocks.stored) == 452_984_832
    assert sum(weights_of("8").blocks.stored) == pytest.approx(sum(weights.blocks.stored) * 8.5 / 16)
    assert sum(weights_of("4").blocks.stored) == pytest.approx(sum(weights.blocks.stored) * 4.5 / 16)


def test_a_folder_weighs_what_its_files_do(model):
    folder = open_model(model)
    weights = weigh_folder(folder, mx.float32)
    found = [info for network in folder.networks.values() for _, info in network.tensors().values()]
    assert weights.disk == sum(info.end - info.start for info in found)


def test_an_8_gb_mac_draws_the_unquantized_model_at_a_megapixel():
    """Two thirds of its memory are the GPU's; a fifth of that is left to others."""
    made = plan_of(weights_of(), budget=int(8 * 2**30 * 2 / 3 * 0.8), filtered=True)
    assert made.peak <= made.budget
    assert made.least < 2 * GB
    assert made.resident_blocks < made.total_blocks == 57
    resident = sum(weights_of().blocks.stored) * made.resident_blocks / made.total_blocks
    assert made.read_per_step + resident == pytest.approx(17.2 * GB, rel=0.1)


def test_blocks_are_in_flight_where_memory_has_room_for_two_and_one_at_a_time_where_it_has_not(monkeypatch):
    weights = weights_of("8")
    most, least = plan_of(weights, budget=100 * GB), plan_of(weights, budget=plan_of(weights).least)
    assert (most.in_flight, least.in_flight, least.peak) == (True, False, most.least)
    monkeypatch.setenv("FLUX_KREA_IN_FLIGHT", "0")
    alone = plan_of(weights, budget=100 * GB)
    more = 8 * (512 + 64 * 64) * 3072 * 2  # arrays of T x C in 16 bits
    assert (alone.in_flight, most.stages["denoise"] - alone.stages["denoise"]) == (False, more)


def test_more_memory_keeps_more_and_reads_less():
    weights, last = weights_of("8"), None
    for budget in (2 * GB, 4 * GB, 8 * GB, 12 * GB):
        made = plan_of(weights, budget=budget)
        assert made.peak <= budget
        assert last is None or (made.resident_blocks > last.resident_blocks and made.read_per_step < last.read_per_step)
        last = made
    assert (last.resident_blocks, last.read_per_step) == (57, 0)
    assert last.peak == last.most


def test_what_needs_more_says_so():
    weights = weights_of()
    one = plan_of(weights)
    assert plan_of(weights, side=1536).least > one.least
    assert plan_of(weights, steps=50, conditions=2).stages["modulation"] > one.stages["modulation"]
    assert "image" not in one.stages
    assert plan_of(weights, images=input_needs([4])).stages["image"] > 0
    assert weights_of(dtype=mx.float32).blocks.computed[0] == 2 * weights.blocks.computed[0]


def test_an_input_image_is_counted_for_as_long_as_it_is_held(model):
    """Pillow holds 96 MB of 6000 x 4000 pixels, through every stage, and a copy while it is resized."""
    weights = weights_of()
    large, small = input_needs([96_000_000]), input_needs([4])
    without, held = plan_of(weights, budget=100 * GB), plan_of(weights, images=large, budget=100 * GB)
    more = {stage: held.stages[stage] - need for stage, need in without.stages.items()}
    assert set(more.values()) == {96_000_000}
    assert plan_of(weights, images=large).stages["image"] > plan_of(weights, images=small).stages["image"]
    pipe = FluxPipeline.from_pretrained(model, memory="240MB")
    sizes = {"prompt": "a", "width": 32, "height": 32}
    assert pipe.plan(**sizes, image=Image.new("RGB", (64, 64))).peak < 240e6
    with pytest.raises(ResourceError, match="a smaller input image or picture needs less"):
        pipe.plan(**sizes, image=Image.new("RGB", (6000, 4000)))


def test_arrays_that_a_kernel_cannot_count_are_made_in_tiles_whatever_the_memory():
    """2^31 elements and more: above 8.4 megapixels."""
    weights, plenty = weights_of(), 1000 * GB
    made = {width: make_plan(weights, SIZES, mx.bfloat16, width=width, height=2896, text_length=512, budget=plenty,
                             device="gpu") for width in (2896, 2912, 4096)}  # fmt: skip
    assert {width: plan.tiled for width, plan in made.items()} == {2896: False, 2912: True, 4096: True}
    assert made[2912].stages["decode"] < made[2896].stages["decode"]


def test_a_budget_too_small_for_one_block_is_refused_with_the_numbers():
    with pytest.raises(
        ResourceError, match=r"1024 x 1024 needs 1\.\d\d GB of memory to .*, and 1\.00 GB may be used"
    ) as no:
        plan_of(weights_of(), budget=GB)
    assert no.value.exit_code == 8


def test_the_process_itself_is_counted_in_the_peak_and_in_the_budget():
    """Beside the arrays of each stage; with filters, Pixtral's vocabulary too."""
    weights = weights_of()
    free, filtered = (plan_of(weights, budget=6 * GB, filtered=one) for one in (False, True))
    assert (free.process, filtered.process) == (PROCESS, PROCESS + VOCABULARY)
    for made in (free, filtered):
        assert made.peak == made.process + max(made.stages.values()) <= made.budget
    assert free.resident_bytes - filtered.resident_bytes == VOCABULARY
    exact = plan_of(weights, budget=filtered.least, filtered=True)
    assert (exact.resident_blocks, exact.peak) == (0, filtered.least)
    with pytest.raises(ResourceError):
        plan_of(weights, budget=filtered.least - 1, filtered=True)


@pytest.mark.slow
def test_times_assume_half_of_a_chips_peak_and_count_the_filters(command):
    """28 steps of 60 TFLOP, and 36 TFLOP of two questions to Pixtral, on an M1 of 2.6 TFLOP/s."""
    facts = json.loads(command("plan", "--json")[1])["seconds"]["M1"]
    assert facts["picture"] == pytest.approx(28 * 75e12 / 1.3e12, rel=0.05)
    assert facts["filters"] == pytest.approx(37e12 / 1.3e12, rel=0.05)
    assert facts["filters_at_start"] == pytest.approx(51e12 / 1.3e12, rel=0.05)
    out = command("plan")[1]
    assert re.search(r"^M1 +27 min +29 s +39 s$", out, re.M)
    assert "half of the chip's peak" in out
    small = command("plan", "nano")
    assert re.search(r"^M1 +under 1 s +none +none$", small[1], re.M)
    assert json.loads(command("plan", "nano", "--json")[1])["seconds"]["M1"].keys() == {"picture"}


def test_nothing_is_loaded_where_memory_is_too_little(model, monkeypatch):
    monkeypatch.setattr("mlx_flux_krea.weights.NetworkFolder.load", lambda *_: pytest.fail("a network was loaded"))
    pipe = FluxPipeline.from_pretrained(model, memory="1MB")
    with pytest.raises(ResourceError, match="`memory` sets the limit"):
        pipe(CAT, height=64, width=64)


def second_picture(path, memory):
    """The plan of a picture that another was drawn before, from an image, and the measured peak of each stage."""
    pipe, image, peaks = FluxPipeline.from_pretrained(path, memory=memory), Image.new("RGB", (96, 96)), {}
    gc.collect()
    mx.clear_cache()
    base = mx.get_active_memory()

    def measure(stage, *_):
        peaks[stage] = max(peaks.get(stage, 0), mx.get_peak_memory() - base)
        mx.reset_peak_memory()

    for guidance in (4.5, 3.0):
        peaks.clear()
        prompt = f"a red circle, {guidance}"
        made = pipe(prompt, image=image, guidance_scale=guidance, num_inference_steps=3, seed=1, progress=measure)
    return made.plan, peaks


@pytest.mark.skipif(mx.default_device().type == mx.gpu, reason="what a GPU takes is computed, and was not measured")
@pytest.mark.parametrize("quantize", ["none", "8", "4"])
@pytest.mark.slow
def test_every_stage_takes_what_was_predicted(quantize, tmp_path, monkeypatch):
    """On the small model, whose layers are dequantized in as many chunks as those of the real one."""
    for module in ("memory", "models.layers"):
        monkeypatch.setattr(f"mlx_flux_krea.{module}.CHUNK", 3 * 2**12)
    monkeypatch.setattr("mlx_flux_krea.models.layers._faster_dense", {})
    monkeypatch.setattr("mlx_flux_krea.models.layers._is_dense_faster", lambda *_: True)
    path = convert([nano.FOLDER], tmp_path / "model", quantize=quantize).path
    resident, peaks = second_picture(path, "auto")
    streamed, least = second_picture(path, resident.least)
    assert (resident.resident_blocks, streamed.resident_blocks) == (resident.total_blocks, 0)
    assert resident.stages.keys() == {"text", "image", "modulation", "denoise", "decode"}
    assert resident.stages == pytest.approx(peaks, rel=0.15)
    assert streamed.stages == pytest.approx(least, rel=0.15)


def test_the_command_draws_within_a_budget_and_shows_what_was_predicted_and_measured(command, model):
    out = command("generate", CAT, "-m", model, "--width", 64, "--height", 64, "--steps", 2, "-v", "--memory", "300MB")
    assert out[0] == 0
    rows = [line.split() for line in out[2].splitlines()]
    measured = {row[0]: row for row in rows if row and row[0] in ("text", "denoise", "decode")}
    assert len(measured) == 3
    assert ["stage", "seconds", "memory", "predicted", "measured"] in rows
    assert "of 5 transformer blocks resident in memory" in out[2]
    code, _, err = command("generate", CAT, "-m", model, "--memory", "2MB")
    assert code == 8
    assert "needs" in err


@pytest.mark.slow
def test_the_command_plans_a_model_and_the_published_one(command, model):
    code, text, _ = command("plan", model, "--width", 64, "--height", 64, "--memory", "1GB")
    assert code == 0
    assert "5 of 5 transformer blocks are resident in memory; none is streamed" in text
    code, out, _ = command("plan", model, "--json", "--memory", "1GB", "--width", 64, "--height", 64)
    facts = json.loads(out)
    assert facts["stages"].keys() == {"text", "modulation", "denoise", "decode"}
    assert facts["most"] < GB
    code, text, _ = command("plan", "--memory", "6GB")
    assert code == 0
    rows = text.partition("precision")[2].splitlines()[1:9]
    assert [row.split()[0] for row in rows] == ["none", "8", "6", "5", "4", "3", "mxfp4", "nvfp4"]
    assert "M1 " in text
    assert command("plan", "--memory", "some")[0] == 2


def test_the_operations_of_a_step_are_those_of_the_research():
    assert step_flops(config.FLUX_DEV, 1024, 1024, 512) == pytest.approx(74.38e12, rel=1e-3)
    assert step_flops(config.FLUX_DEV, 512, 512, 512) == pytest.approx(21.50e12, rel=1e-3)


def test_the_machine_offers_some_memory():
    assert 2**28 < machine_memory() < 2**43


def test_the_plan_says_whose_memory_it_is_and_shows_every_chip(command, monkeypatch):
    monkeypatch.setattr(plan_verb, "this_chip", lambda: None)
    code, text, err = command("plan", "--memory", "9999GB")
    assert code == 0
    assert "is more than this machine has" in err
    assert "that is the share of this program" in text
    assert all(f"\n{chip} " in text for chip in CHIPS)
    assert re.search("streaming precision none costs no time .*: M1 0[.]", command("plan", "--memory", "6GB")[1])


@pytest.mark.slow
def test_the_verb_plan_knows_the_evaluations_of_fast_of_a_cache_and_of_a_solver(command, model):
    def seconds(*more):
        code, out, err = command("plan", *more, "--json")
        assert code == 0, err
        return next(iter(json.loads(out)["seconds"].values()))["picture"]

    plain = seconds(model)
    assert seconds(model, "--fast") == pytest.approx(plain * 16 / 28)
    assert seconds(model, "--solver", "heun") == pytest.approx(plain * 55 / 28)
    assert seconds("--fast") == pytest.approx(seconds() * 16 / 28)
    assert seconds(model, "--cache", "skip") == seconds(model, "--fast")
    assert seconds(model, "--cache", "none") == seconds(model, "--cache", "first-block:0.1") == plain
    assert "times are the most" in command("plan", model, "--cache", "first-block:0.1")[1]
    for wrong in (
        ["--fast", "--solver", "heun"],
        ["--cache", "skip", "--solver", "heun"],
        ["--fast", "--cache", "skip"],
    ):
        assert command("plan", *wrong)[0] == 2
