"""Commands that fail on the GPU, and commands that would take it too long: what MLX raises there is raised here."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map

from mlx_flux_krea import FluxPipeline, worker
from mlx_flux_krea import checkpoint as checkpoints
from mlx_flux_krea.errors import ResourceError, gpu_error
from mlx_flux_krea.filters import judges as filter_judges
from mlx_flux_krea.models import layers, transformer

SAID = (
    "[METAL] Command buffer execution failed: Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpact"
    "ingInteractivity).",
    "[METAL] Command buffer execution failed: Insufficient Memory (00000008)",
    "[metal::malloc] Attempting to allocate 21474836480 bytes which is greater than the maximum allowed buffer size of "
    "9534832640 bytes.",
    "[metal::malloc] Resource limit (499000) exceeded.",
    "[malloc] Unable to allocate 21474836480 bytes.",
)
CAT = "a cat"
CALL = {"width": 32, "height": 48, "num_inference_steps": 3, "seed": 5}
TINY = ("--width", "32", "--height", "48", "--steps", "3", "--seed", "5")


@pytest.mark.parametrize("said", SAID)
def test_what_mlx_raises_is_a_lack_of_resources_that_says_how_to_go_on(said):
    error = gpu_error(RuntimeError(said))
    assert isinstance(error, ResourceError)
    assert all(word in str(error) for word in (said[:40], "smaller picture", "display", "`memory`"))


@pytest.mark.parametrize("error", [RuntimeError("dictionary changed size"), ValueError(SAID[0]), OSError("metal")])
def test_other_errors_are_not_taken_for_it(error):
    assert gpu_error(error) is None


class Failing:
    """Makes evaluations fail as on a GPU, from number `first` on, so many times.

    A part that is started and fails gives zeros, which the next part reads. MLX says so when it writes the next
    commands (`late` is "written") or when the result is waited for ("waited"), once.

    Attributes:
        count: of evaluations so far.
        blocks: numbers of those that were single blocks.
        started: numbers of those after which another part may start before they have ended.
    """

    def __init__(self, monkeypatch, first: int = 0, times: int = 0, said: str = SAID[0], late: str = "waited"):
        self.count, self.blocks, self.started, self._failed = 0, [], [], None
        evaluate, start, wait = worker._evaluate, worker._start, worker._wait

        def counted(part):
            self.blocks += [self.count] * isinstance(part, transformer.SingleStreamBlock)
            self.count += 1
            return first <= self.count - 1 < first + times

        def failing_evaluate(part, *args):
            if counted(part):
                raise RuntimeError(said)
            return evaluate(part, *args)

        def failing_start(part, *args):
            if self._failed is not None and late == "written":
                self._failed = None
                raise RuntimeError(said)
            self.started.append(self.count)
            is_failing, result = counted(part), start(part, *args)
            if is_failing:
                result = tree_map(mx.zeros_like, result)
                self._failed = result[0] if isinstance(result, tuple) else result
            return result

        def failing_wait(results):
            if self._failed is not None and results[0] is self._failed:
                self._failed = None
                raise RuntimeError(said)
            wait(results)

        monkeypatch.setattr(worker, "_evaluate", failing_evaluate)
        monkeypatch.setattr(worker, "_start", failing_start)
        monkeypatch.setattr(worker, "_wait", failing_wait)


@pytest.fixture(scope="module")
def whole(model):
    """A picture, the number of evaluations that it takes, and that of a single block."""
    with pytest.MonkeyPatch.context() as patch:
        counted = Failing(patch)
        pixels = np.asarray(FluxPipeline.from_pretrained(model, dtype="float32")(CAT, **CALL).images[0])
    return pixels, counted.count, counted.blocks[0]


def places(count: int) -> list[int]:
    """Evaluations of every stage, from the text to the last part of decoding."""
    return sorted({0, count // 4, count // 2, 3 * count // 4, count - 1})


@pytest.mark.slow
@pytest.mark.parametrize("late", ["waited", "written"])
def test_a_part_that_fails_once_is_repeated_and_the_picture_is_the_same(model, whole, monkeypatch, late):
    """With the part that was started after it, which has read what it left."""
    pixels, count, block = whole
    repeated = set()
    for place in sorted({*places(count), *range(block - 3, block + 3)}):
        with monkeypatch.context() as patch:
            failing = Failing(patch, place, 1, late=late)
            made = np.asarray(FluxPipeline.from_pretrained(model, dtype="float32")(CAT, **CALL).images[0])
        assert np.array_equal(made, pixels), place
        repeated.add(failing.count - count)
    assert repeated == ({1, 2} if late == "waited" else {1})


def test_it_is_repeated_in_smaller_parts(model, whole, monkeypatch):
    """Rows are independent: the same bits, although every product and every attention is made in parts."""
    pixels, _, block = whole
    monkeypatch.setattr(layers, "_ROWS", 8)
    seen, original = [], layers.in_rows

    def in_rows(function, x, operations, axis=1):
        seen.append(layers._pieces.get())
        return original(function, x, operations, axis)

    monkeypatch.setattr(transformer, "in_rows", in_rows)
    Failing(monkeypatch, block, 1)
    made = np.asarray(FluxPipeline.from_pretrained(model, dtype="float32")(CAT, **CALL).images[0])
    assert set(seen) == {1, 4}
    assert np.array_equal(made, pixels)


def test_what_fails_again_ends_with_8_keeps_the_run_and_resume_makes_the_same_picture(
    command, model, tmp_path, monkeypatch, whole
):
    monkeypatch.setattr(checkpoints, "EVERY", 0)
    for place in (0, whole[1] // 2, whole[1] - 1):
        with monkeypatch.context() as patch:
            Failing(patch, place, 3)
            code, out, err = command("generate", CAT, "-m", model, "--dtype", "float32", *TINY, "--force")
        assert (code, out, "Traceback" in err, "convert" in err) == (8, "", False, False), err
        assert "the GPU failed: [METAL] Command buffer execution failed" in err
        assert "--memory" in err
        if place:
            assert "continue with: flux-krea resume" in err
            code, out, err = command("resume")
            assert (code, out) == (0, f"{tmp_path / 'out.png'}\n"), err


def test_outside_of_the_worker_it_ends_with_8_too(command, monkeypatch):
    from mlx_flux_krea.commands import models

    def fail(*args, **more):
        raise RuntimeError(SAID[2])

    monkeypatch.setattr(models.models, "callback", fail)
    code, _, err = command("models")
    assert (code, "the GPU failed" in err, "bug" in err) == (8, True, False)


def test_in_a_filter_it_is_no_reason_to_convert_the_filter_again():
    def ask():
        raise RuntimeError(SAID[0])

    with pytest.raises(ResourceError, match="the GPU failed") as failed:
        filter_judges._asked("pixtral", ask)
    assert "convert" not in str(failed.value)


# --- commands that would take too long ---


@pytest.fixture
def m1(monkeypatch):
    """An M1 with all its cores, as far as `rate` looks."""
    monkeypatch.setattr(layers.mx, "device_info", lambda: {"device_name": "Apple M1"})
    monkeypatch.setattr(layers.mx, "default_device", lambda: mx.Device(mx.gpu))


def parts(rows: int, operations: float) -> list[int]:
    """The rows of each part that `in_rows` makes."""
    seen = []

    def function(x):
        seen.append(x.shape[1])
        return x

    layers.in_rows(function, mx.zeros((1, rows, 1)), operations)
    return seen


def test_without_a_limit_nothing_is_cut():
    assert layers.rate() == float("inf")
    assert parts(66048, 1e18) == [66048]


@pytest.mark.parametrize(
    ("side", "product", "seconds"),
    [(512, "linear1", 0), (1024, "linear1", 2), (2048, "linear1", 7), (1024, "attention", 1), (2048, "attention", 11)],
)
def test_on_an_m1_no_product_takes_a_quarter_of_a_second(m1, side, product, seconds):
    """A single block's first layer and attention, by the rate at which half of the chip's peak computes."""
    tokens = 512 + (side // 16) ** 2
    operations = 2 * tokens * 3072 * 21504 if product == "linear1" else 4 * tokens**2 * 3072
    made = parts(tokens, operations)
    assert sum(made) == tokens
    assert len(made) == max(seconds, 1)
    assert max(made) / tokens * operations / (2.6e12 * 0.5) <= 0.25 * 1.05
    assert all(rows % 64 == 0 for rows in made[:-1])


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_parts_have_the_bits_of_the_whole(monkeypatch, bits):
    layer, x = nn.Linear(64, 96), mx.random.normal((2, 300, 64), key=mx.random.key(1))
    layer = layer if bits is None else nn.QuantizedLinear.from_linear(layer, 64, bits)
    q, k, v = (mx.random.normal((2, 3, 300, 32), key=mx.random.key(i)) for i in range(3))
    pe = transformer.rope(mx.zeros((300, 3)), (8, 12, 12), 10_000)
    whole = layer(x), transformer.attention(q, k, v, pe)
    with layers.smaller(5):
        cut = transformer.multiply(layer, x), transformer.attention(q, k, v, pe)
    assert all(mx.array_equal(a, b) for a, b in zip(whole, cut, strict=True))
