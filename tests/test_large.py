"""Large pictures: the second pass against its formulas, and whatever asks for it, stops it and repeats it."""

import contextlib
import json
import math
import signal

import mlx.core as mx
import numpy as np
import pytest
from helpers import rel
from PIL import Image
from test_metal import ALLOWED, graph
from test_plan import weights_of
from test_resume import CAT, failing, files, struck

from mlx_flux_krea import FluxPipeline, Request, presets
from mlx_flux_krea import memory as planning
from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.generator import Generator
from mlx_flux_krea.home import NANO
from mlx_flux_krea.models.config import FLUX_DEV, FLUX_DEV_MODEL
from mlx_flux_krea.provenance import read_picture, read_record
from mlx_flux_krea.sampling import enlarge
from mlx_flux_krea.sampling.enlarge import Recipe, Tiling, View, guided, low_frequencies, low_pass, second_seed
from mlx_flux_krea.sampling.sampler import pack, unpack
from mlx_flux_krea.weights import open_model

CIRCLE = "a red circle on a blue background"
SMALL = {"width": 32, "height": 32, "num_inference_steps": 4, "seed": 7}
TINY = ["--width", "32", "--height", "32", "--steps", "4", "--seed", "7", "--upscale", "2", "--strength", "0.5"]


def latents(width: int, height: int, seed: int = 0) -> mx.array:
    """Packed latents (1, L, 64)."""
    return pack(mx.random.normal((1, 16, height, width), key=mx.random.key(seed)))


# --- the ingredients ---


@pytest.mark.parametrize(("length", "cutoff"), [(12, 0.5), (25, 0.25), (128, 0.5)])
def test_the_low_pass_weighs_each_cosine_as_butterworth_does(length, cutoff):
    matrix = low_pass(length, cutoff).astype(float)
    places = np.arange(length) + 0.5
    for order in (0, 1, length // 3, length - 1):
        wave = np.cos(np.pi * order * places / length)
        assert np.abs(matrix @ wave - wave / (1 + (order / length / cutoff) ** 8)).max() < 1e-5
    assert np.abs(matrix @ np.ones(length) - 1).max() < 1e-5  # brightness stays
    assert np.abs(matrix - matrix.T).max() < 1e-6


def test_the_low_frequencies_of_latents_are_those_of_both_axes():
    x = latents(10, 6)
    plain = np.array(unpack(x, 10, 6))
    expected = np.einsum("ij,bcjk,lk->bcil", low_pass(6, 0.4), plain, low_pass(10, 0.4))
    assert rel(unpack(low_frequencies(10, 6, 0.4)(x), 10, 6), mx.array(expected)) < 1e-5


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_guided_velocity_heads_for_the_enlarged_pictures_low_frequencies(weight):
    """x0 + a (low(reference) - low(x0)), where x0 = x - sigma v."""
    x, v, reference, low = latents(8, 8), latents(8, 8, 1), latents(8, 8, 2), low_frequencies(8, 8, 0.5)
    sigmas = np.array([0.6, 0.3, 0], np.float32)
    model = guided(lambda _, __: v, sigmas, reference, low, Recipe(guidance=weight))
    for step, sigma in enumerate((0.6, 0.3)):
        plain = np.array(x) - sigma * np.array(v)
        expected = plain + weight * (np.array(low(reference)) - np.array(low(mx.array(plain))))
        assert rel(x - sigma * model(x, step), mx.array(expected)) < 1e-5


@pytest.mark.parametrize(("length", "side"), [(12, 6), (13, 6), (128, 64), (129, 64), (5, 6), (20, 1), (7, 2)])
def test_tiles_cover_every_token_with_weights_that_add_up_to_one(length, side):
    tiling = Tiling.along(length, side)
    total = np.zeros(length)
    for start, weights in zip(tiling.starts, tiling.weights, strict=True):
        assert weights.min() > 0
        total[start : start + tiling.side] += weights
    assert np.abs(total - 1).max() < 1e-6
    assert len(tiling.starts) == enlarge.tile_count(length, side)
    shared = [a + tiling.side - b for a, b in zip(tiling.starts, tiling.starts[1:], strict=False)]
    assert all(count >= enlarge.shared_tokens(tiling.side) for count in shared)
    assert enlarge.shared_tokens(side) >= side // 5


@pytest.mark.parametrize("view", [View(20, 12), View(20, 12, shifts=True), View(20, 12, (8, 4), shifts=True)])
@pytest.mark.parametrize("step", [0, 1])
def test_what_is_seen_in_parts_and_joined_is_what_it_was(view, step):
    x = latents(20, 12)
    parts = view.parts(x, step)
    assert len(parts) <= view.count
    assert {size for _, size in parts} <= {*view.sizes}
    for part, (wide, high) in parts:
        assert part.shape == (1, wide * high // 4, 64)
    assert rel(view.joined([part for part, _ in parts], step), x) < 1e-6


def test_the_grid_of_every_second_step_lies_one_latent_aside():
    """A patch then holds the corners of four patches of the step before."""
    view, x = View(8, 8, shifts=True), latents(8, 8)
    (part, size) = view.parts(x, 1)[0]
    assert size == (10, 10)
    plain = np.array(unpack(x, 8, 8))
    aside = np.array(part).reshape(5, 5, 16, 2, 2)
    assert (aside[2, 3] == plain[0, :, 3:5, 5:7]).all()
    assert (aside[0, 0] == np.broadcast_to(plain[0, :, :1, :1], (16, 2, 2))).all()  # borders are repeated


def test_each_pass_has_a_stream_of_its_own_that_follows_from_the_seed():
    assert second_seed(7) == second_seed(7) != 7
    assert len({second_seed(seed) for seed in range(1000)}) == 1000
    assert all(0 <= second_seed(seed) < 2**32 for seed in (0, 2**64 - 1))


# --- a request ---


@pytest.fixture(scope="module")
def pipe(model):
    return FluxPipeline.from_pretrained(model, dtype="float32")


def pixels(result) -> np.ndarray:
    return np.array(result.images[0])


def test_a_factor_of_one_is_the_base_path_to_the_bit(pipe):
    one, plain = (pipe(CAT, **SMALL, upscale=upscale, progress=False) for upscale in (1, None))
    assert (pixels(one) == pixels(plain)).all()
    assert one.records == plain.records


@pytest.mark.slow
def test_the_first_pass_is_the_picture_without_enlarging_and_each_of_a_batch_is_its_own(pipe):
    plain = pipe(CAT, **SMALL, output_type="latent", progress=False).images
    seen = []
    large = pipe(
        CAT,
        **SMALL | {"seed": [7, 8]},
        upscale=1.5,
        num_images_per_prompt=2,
        progress=False,
        callback_on_step_end=lambda _, step, __, kept: seen.append((step, kept["latents"])),
    )
    assert [step for step, _ in seen] == [0, 1, 2, 3, 4, 5]
    assert (seen[3][1][:1] == plain).all()
    assert seen[4][1].shape == (2, 9, 64)
    for i, seed in enumerate((7, 8)):
        assert (np.array(large.images[i]) == pixels(pipe(CAT, **SMALL | {"seed": seed}, upscale=1.5))).all()
    record = large.records[0]
    expected = {"width": 32, "upscale": 1.5, "upscaled_size": [48, 48], "upscale_steps": 2, "upscale_tiles": False}
    assert record.items() >= (expected | {"evaluations": 6, "strength": 0.3}).items()
    assert large.steps_computed[0] == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [((37, 53), 1.5, (48, 80)), ((16, 160), 2, (32, 320)), ((33, 17), 1.3, (48, 16)), ((160, 16), 4, (640, 64))],
)
def test_sizes_that_nothing_divides_and_long_shapes(pipe, size, factor, expected):
    image = Image.new("RGB", size, (90, 120, 30))
    request = Request(prompt=CAT, image=image, upscale=factor, num_inference_steps=4, seed=1)
    resolved = request.resolve(pipe.folder)
    assert resolved.large
    assert resolved.picture_size == expected
    assert (resolved.first_steps, resolved.evaluations, resolved.large.has_first) == (0, 2, False)
    assert all(side % 16 == 0 for side in resolved.large.own)
    assert (expected == (size[0] * factor, size[1] * factor)) == (resolved.notes == ())


@pytest.mark.slow
@pytest.mark.parametrize(("size", "factor", "tiles"), [((37, 53), 1.5, False), ((16, 160), 1.3, True)])
def test_such_sizes_are_made_whole_and_in_tiles(pipe, size, factor, tiles):
    image = Image.new("RGB", size, (90, 120, 30))
    request = Request(prompt=CAT, image=image, upscale=factor, upscale_tiles=tiles, num_inference_steps=4, seed=1)
    made = pipe.generate(request, progress=False)
    assert made.images[0].size == request.resolve(pipe.folder).picture_size


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"upscale": 5}, "`upscale` is 5; expected a number from 1 to 4"),
        ({"upscale": "2"}, "`upscale` is '2'"),
        ({"upscale": 2, "latents": np.zeros((1, 4, 64), np.float32), "seed": None}, "`upscale` and `latents`"),
        ({"upscale": 2, "image": Image.new("RGB", (32, 32))}, "`width` and `height` do nothing"),
        ({"upscale": 4, "width": 2048, "height": 2048}, "16.8 million pixels at most"),
        ({"upscale": 2, "strength": 0.0}, "runs no step"),
    ],
)
def test_what_does_not_go_together_is_said(pipe, given, found):
    with pytest.raises(UsageError, match=found.replace("(", r"\(")):
        Request(prompt=CAT, **SMALL | given).resolve(pipe.folder)


@pytest.mark.parametrize("more", [{"mask_image": Image.new("L", (32, 32), 255)}, {"expand": "16"}, {"stop_after": 1}])
def test_an_image_that_is_enlarged_is_enlarged_whole(pipe, more):
    request = Request(prompt=CAT, image=Image.new("RGB", (32, 32)), upscale=2, num_inference_steps=4, **more)
    with pytest.raises(UsageError, match=r"`upscale` and `|nothing to choose from early"):
        request.resolve(pipe.folder)


@pytest.mark.parametrize("name", ["kontext", "fill", "control"])
def test_editing_models_enlarge_nothing(request, name):
    folder = FluxPipeline.from_pretrained(request.getfixturevalue(name)).folder
    with pytest.raises(UsageError, match=f"`upscale` with a model for {name}.*make the picture first"):
        Request(prompt=CAT, upscale=2).resolve(folder)


# --- the command ---


@contextlib.contextmanager
def tiles_are_faster():
    """Within it the plan finds tiles faster, as at 4096 x 4096."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "pass_flops", lambda flux, view, length: -view.count)
        yield


@pytest.mark.slow
def test_megapixels_beyond_what_the_model_draws_are_made_in_two_passes_in_the_planned_memory(command, tmp_path):
    call = ["generate", CIRCLE, "-m", "nano", "--steps", "1", "--megapixels", "0.02", "--seed", "1", "--json"]
    code, out, err = command(*call)
    assert code == 0, err
    record = json.loads(out)["images"][0]
    assert (record["width"], record["height"], record["upscaled_size"]) == (96, 96, [144, 144])
    for stage in ("enlarge", "decode"):  # measured memory is that of the plan
        assert record["peaks"][stage] == pytest.approx(record["predicted"][stage], rel=0.15), stage
    events = [json.loads(line) for line in err.splitlines()]
    stages = list(dict.fromkeys(event["stage"] for event in events if event["event"] == "progress"))
    assert stages.index("denoise") < stages.index("enlarge")
    facts = read_picture(tmp_path / "out.png")["parameters"]
    assert "Hires upscale: 1.5" in facts


@pytest.mark.parametrize("is_image", [False, True])
@pytest.mark.slow
def test_from_repeats_tiles_and_images(command, model, tmp_path, is_image):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 32, 3), np.uint8)).save(tmp_path / "in.png")
    given = ["--image", "in.png"] if is_image else []
    call = [argument for argument in TINY if not is_image or argument not in ("--width", "--height", "32")]
    with tiles_are_faster():
        code, _, err = command("generate", CAT, "-m", model, *call, *given)
    assert code == 0, err
    record = read_record(tmp_path / "out.png")
    assert record
    assert record["upscale_tiles"]
    assert command("generate", "--from", "out.png", *given, "-m", model, "-o", "again.png")[0] == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "out.png").read_bytes()


@pytest.mark.parametrize(("stage", "done"), [("denoise", 2.1), ("enlarge", 1.1)])
@pytest.mark.slow
def test_a_run_that_is_killed_in_either_pass_goes_on_to_the_same_bytes(command, model, tmp_path, stage, done):
    call = ["generate", CAT, "-m", model, *TINY, "--cache", "skip"]
    assert command(*call, "-o", "whole.png")[0] == 0
    ran = struck(stage, done, signal.SIGKILL, *call, cwd=tmp_path)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    assert "of 6" in command("resume", "--list")[1]
    denoised, denoise = [], Generator._denoise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "_denoise", lambda self, *args: denoised.append(args[0].width) or denoise(self, *args))
        code, _, err = command("resume")
    assert code == 0, err
    assert denoised == ([64] if done == 1.1 else [32, 64])  # a step of the second pass is not computed twice
    assert (tmp_path / "out.png").read_bytes() == (tmp_path / "whole.png").read_bytes()
    assert files() == []


@pytest.mark.slow
def test_a_failed_second_pass_keeps_its_tiles_whatever_the_plan_says_later(command, model, tmp_path):
    with tiles_are_faster():
        assert command("generate", CAT, "-m", model, *TINY, "-o", "whole.png")[0] == 0
        with failing("enlarge", 1.1):
            assert command("generate", CAT, "-m", model, *TINY)[0] != 0
    code, _, err = command("resume")
    assert code == 0, err
    assert (tmp_path / "out.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


@pytest.mark.slow
def test_an_image_that_is_being_enlarged_goes_on_too(command, model, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 32, 3), np.uint8)).save(tmp_path / "in.png")
    call = ["generate", CAT, "-m", model, "--image", "in.png", *TINY[4:]]
    assert command(*call, "-o", "whole.png")[0] == 0
    ran = struck("enlarge", 1.1, signal.SIGKILL, *call, cwd=tmp_path)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    code, _, err = command("resume")
    assert code == 0, err
    assert (tmp_path / "out.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


@pytest.mark.slow
def test_candidates_are_chosen_before_the_second_pass(command, model, tmp_path):
    assert command("generate", CAT, "-m", model, *TINY, "-o", "whole.png")[0] == 0
    code, _, err = command("generate", CAT, "-m", model, *TINY, "--candidates", "2")
    assert code == 0, err
    run = files()[0].stem.partition("-")[0]
    assert command("resume", run, "--pick", "1")[0] == 0
    assert (tmp_path / "out.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


def test_language_models_may_ask_for_it(command):
    schema = json.loads(command("tool-schema")[1])["parameters"]["properties"]
    assert (schema["upscale"]["minimum"], schema["upscale"]["maximum"]) == (1, 4)
    assert schema["megapixels"]["maximum"] == 16


# --- the plan ---


def enlarging_plan(factor: int, budget: float, precision: str = "4") -> planning.MemoryPlan:
    """The plan of both passes of FLUX.1 from 1024 x 1024, on a GPU."""
    side = 1024 * factor
    weights = weights_of(precision)

    def plan(view: View | None, side: int, images=()) -> planning.MemoryPlan:
        return planning.make_plan(
            weights, FLUX_DEV_MODEL, mx.bfloat16, width=side, height=side, text_length=512,
            images=planning.input_needs(images), view=view, budget=int(budget), device="gpu",
        )  # fmt: skip

    views = [
        enlarge.second_view(View(side // 8, side // 8), (128, 128), factor, tiled=tiled) for tiled in (False, True)
    ]
    read = [planning.HELD * side * side]
    second, why = planning.choose_view(FLUX_DEV, views[0], views[1], 512, lambda view: plan(view, side, read))
    assert bool(why) == (second.tiles > 1)
    return second.after(plan(None, 1024))


@pytest.mark.parametrize(("factor", "gigabytes", "tiles", "decoded_in_tiles"), [(2, 8, 1, False), (4, 16, 25, True)])
def test_2k_fits_8_gb_and_4k_fits_16(factor, gigabytes, tiles, decoded_in_tiles):
    made = enlarging_plan(factor, gigabytes * 1e9)
    assert made.peak <= gigabytes * 1e9
    assert made.tiles >= tiles
    assert (made.tiles > 1) == (tiles > 1)
    assert made.second
    assert made.second.tiled == decoded_in_tiles
    assert {"denoise", "enlarge", "decode"} <= made.stages.keys()


def test_tiles_are_seen_where_they_are_faster_or_the_only_way():
    """At 4096 x 4096 attention costs more than the overlap; at 2048 x 2048 it does not, unless memory is short."""
    flops = {
        (factor, tiled): planning.pass_flops(
            FLUX_DEV, enlarge.second_view(View(128 * factor, 128 * factor), (128, 128), factor, tiled=tiled), 512
        )
        for factor in (2, 4)
        for tiled in (False, True)
    }
    assert flops[2, False] < flops[2, True]
    assert flops[4, True] < flops[4, False]
    assert enlarging_plan(2, 2.2e9).tiles > 1


def test_seconds_are_those_of_both_passes(command):
    seconds = json.loads(command("plan", "nano", "--upscale", "2", "--json")[1])["seconds"]
    flux = open_model(NANO).sizes.flux
    view = enlarge.second_view(View(24, 24), (12, 12), 2, tiled=False)
    steps = 28 - int(28 - 28 * enlarge.RECIPE.strength)
    flops = 28 * planning.step_flops(flux, 96, 96, 40) + steps * planning.pass_flops(flux, view, 40)
    for chip, times in seconds.items():
        assert times["picture"] == pytest.approx(flops / (presets.SHARE_OF_PEAK * presets.CHIPS[chip] * 1e12))
    assert planning.pass_flops(FLUX_DEV, View(256, 256), 512) == planning.step_flops(FLUX_DEV, 2048, 2048, 512)


# --- seams ---


@pytest.mark.slow
def test_no_step_in_brightness_at_the_borders_of_tiles():
    """Beside each border the rows of a plain background differ by one level at most, as they do elsewhere."""
    nano = FluxPipeline.from_pretrained("nano", dtype="float32")
    plain = Image.new("RGB", (96, 96), (40, 72, 208))
    request = Request(
        prompt="a blue background", image=plain, seed=3, num_inference_steps=2, upscale=2, upscale_tiles=True,
        strength=0.5,
    )  # fmt: skip
    made = pixels(nano.generate(request, progress=False)).astype(float)
    tiling = Tiling.along(12, 6)
    assert len(tiling.starts) == 3
    borders = {side * 16 for start in tiling.starts for side in (start, start + tiling.side)} - {0, 192}
    for axis in (0, 1):
        lines = made.mean(axis=(1 - axis, 2))
        for border in borders:
            assert abs(lines[border] - lines[border - 1]) <= 1
    assert math.isfinite(made.mean())


# --- on Metal ---


def test_what_a_second_pass_adds_to_a_step_is_what_the_gpu_has():
    """The guidance at 2048 x 2048, with the grid aside and in tiles: primitives and types."""
    view = enlarge.second_view(View(256, 256), (128, 128), 2, tiled=True)
    low = low_frequencies(256, 256, view.cutoff)
    sigmas = np.array([0.6, 0.3, 0], np.float32)

    def step(x: mx.array, reference: mx.array) -> mx.array:
        def model(latents: mx.array, number: int) -> mx.array:
            return view.joined([part for part, _ in view.parts(latents, number)], number)

        return guided(model, sigmas, reference, low, Recipe())(x, 1)

    count = graph.count(step, *(graph.zeros((1, 128 * 128, 64), mx.float32) for _ in range(2)))
    assert set(count.names) <= ALLOWED
    assert set(count.dtypes) <= {"float32", "int32", "uint32"}
