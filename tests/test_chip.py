"""`flux-krea doctor --chip`: every check is right here, and says so where its part is broken on purpose.

Shapes are those that a CPU checks. Parts that only a Mac has are stand-ins (`mac.py`).
"""

import fcntl
import functools
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import chip as recording
import mlx.core as mx
import numpy as np
import pytest
import winograd
from helpers import ROOT, at_terminal

from mlx_flux_krea import macos, worker
from mlx_flux_krea.chip import machine, outputs, products, streaming, table, wheel
from mlx_flux_krea.chip.check import CPU_DIVISOR, Check, CheckResult, Setting, as_numpy, distance
from mlx_flux_krea.models import layers, transformer, vae

CHECKS = {check.name: check.run for check in table.CHECKS}
RUN = functools.cache(outputs.run)
SLOW = [name for name in CHECKS if name.startswith("small model") and name != "small model, float32"]


@pytest.fixture
def setting(tmp_path):
    return Setting(CPU_DIVISOR, tmp_path)


def quick(name: str):
    return pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])


@pytest.mark.parametrize("name", [quick(name) for name in CHECKS])
def test_every_check_is_right_here(name, setting, monkeypatch):
    monkeypatch.setattr(outputs, "run", RUN)
    result = CHECKS[name](setting)
    assert result.is_right, str(result)
    assert list(setting.folder.iterdir()) == []


# --- broken on purpose ---


def swapped_gelu(patch):
    """A sigmoid in place of the tanh form."""
    patch.setattr(transformer, "gelu", lambda x: x * mx.sigmoid(1.702 * x))


def unscaled_queries(patch):
    whole = mx.fast.scaled_dot_product_attention
    patch.setattr(
        mx.fast,
        "scaled_dot_product_attention",
        lambda q, k, v, scale, **more: whole(q, k, v, scale=1.1 * scale, **more),
    )


def without_mask(patch):
    whole = mx.fast.scaled_dot_product_attention
    patch.setattr(
        mx.fast, "scaled_dot_product_attention", lambda q, k, v, scale, mask=None: whole(q, k, v, scale=scale)
    )


def other_groups(patch):
    """Keys and values of the wrong queries: tiled, and not repeated."""
    whole = mx.fast.scaled_dot_product_attention

    def tiled(q, k, v, **more):
        return whole(q, k[:, ::-1] if k.shape[1] > 1 else 1.1 * k, v, **more)

    patch.setattr(mx.fast, "scaled_dot_product_attention", tiled)


def chunks_of_another_kind(patch):
    whole = mx.fast.scaled_dot_product_attention

    def for_few(q, k, v, **more):
        return whole(q, k, v, **more) * (1 if q.shape[2] == k.shape[2] else 1.02)

    patch.setattr(mx.fast, "scaled_dot_product_attention", for_few)


def reduced_products(patch):
    """As TF32: 10 bits of the inputs' mantissas."""
    whole = mx.matmul

    def rounded(x):
        return (x.view(mx.uint32) & 0xFFFFE000).view(mx.float32) if x.dtype == mx.float32 else x

    patch.setattr(mx, "matmul", lambda x, w: whole(rounded(x), rounded(w)))


def lost_products(patch):
    """Without the last part of a split sum, where there are many rows."""
    whole = mx.matmul

    def part(x, w):
        kept = x.shape[-1] - (8 if len(x) > 28 else 0)
        return whole(x[:, :kept], w[:kept])

    patch.setattr(mx, "matmul", part)


def shifted_groups(patch):
    """Packed numbers one place further, beside the scales of others."""
    whole = mx.dequantize
    patch.setattr(mx, "dequantize", lambda w, *more, **others: whole(mx.roll(w, 1, 1), *more, **others))


def winograd_on(patch):
    patch.setenv("MLX_CONV_WINOGRAD", "1")
    with winograd.emulated(least=(0, 0)):
        emulated = mx.conv2d
    patch.setattr(mx, "conv2d", emulated)


def wrong_compiled(patch):
    patch.setattr(vae, "affine_silu", lambda x, scale, shift: x * scale + shift)


def early_refill(patch):
    """A buffer is free before its block was computed."""
    patch.setattr(worker, "_start", lambda block, *args: block(*args))
    patch.setattr(worker, "_wait", lambda result: None)


ATTENTION = 4 * (16896 // CPU_DIVISOR) ** 2 * 128  # operations of the longest one, divided
RATE = ATTENTION / 3.5  # a second


def endless_command(patch):
    """Nothing is split, since the rate is not known; the clock goes by operations."""
    clock = SimpleNamespace(now=0.0)
    for place, name in ((mx.fast, "scaled_dot_product_attention"), (mx, "matmul")):
        whole = getattr(place, name)

        def counted(rows, other, *args, whole=whole, **more):
            clock.now += rows.size * (4 * other.shape[2] if other.ndim == 4 else 2 * other.shape[1]) / RATE
            return whole(rows, other, *args, **more)

        patch.setattr(place, name, counted)
    patch.setattr(machine, "perf_counter", lambda: clock.now)
    patch.setattr(machine, "is_gpu", lambda: True)


def no_error(patch):
    patch.setattr(machine, "is_gpu", lambda: True)
    patch.setattr(machine, "ALLOCATION", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")


def slow_disk(patch):
    patch.setattr(streaming, "read_speed", lambda *_: 10.0)
    patch.setattr(streaming, "machine_memory", lambda: 6 * 10**9)


def links_that_replace(patch):
    patch.setattr(os, "link", lambda old, new: None)


def locks_that_do_not(patch):
    patch.setattr(fcntl, "flock", lambda *_: None)


# Of each check, what breaks its part, and a piece of what it says then.
BROKEN = {
    "TF32": (lambda patch: patch.setenv("MLX_ENABLE_TF32", "1"), "on, MLX_ENABLE_TF32 is 1"),
    "Winograd": (lambda patch: patch.delenv("MLX_CONV_WINOGRAD"), "on, MLX_CONV_WINOGRAD is not set"),
    "small model, float32": (swapped_gelu, "latents"),
    "small model, bfloat16": (unscaled_queries, "latents"),
    "small model, float16": (swapped_gelu, "latents"),
    "small model, 8 bits": (shifted_groups, "latents"),
    "small model, 4 bits": (shifted_groups, "latents"),
    "products, float32": (reduced_products, "error 0.000"),
    "products, bfloat16": (lost_products, "error 0."),
    "products, float16": (lost_products, "error 0."),
    "products, 8 bits, bfloat16": (shifted_groups, "error"),
    "products, 8 bits, float16": (lost_products, "error"),
    "products, 4 bits, bfloat16": (lost_products, "error"),
    "products, 4 bits, float16": (shifted_groups, "error"),
    "products, mxfp4, bfloat16": (shifted_groups, "error"),
    "products, mxfp4, float16": (lost_products, "error"),
    "products, nvfp4, bfloat16": (lost_products, "error"),
    "products, nvfp4, float16": (shifted_groups, "error"),
    "attention, width 128": (unscaled_queries, "error 0."),
    "attention, width 64 with mask": (without_mask, "error"),
    "attention, width 72": (chunks_of_another_kind, "chunks differ by 0.02"),
    "attention, width 512": (unscaled_queries, "error"),
    "attention, width 128 grouped": (other_groups, "error"),
    "convolution, bfloat16": (winograd_on, "error 0."),
    "convolution, float16": (winograd_on, "error 0."),
    "compiled functions": (wrong_compiled, "affine_silu"),
    "streamed blocks": (early_refill, "differs from"),
    "longest command": (endless_command, "attention 3.5 s (1 commands)"),
    "too large an allocation": (no_error, "the process ended with -11"),
    "disk": (slow_disk, "reads 0.00 GB/s; expected"),
    "names": (links_that_replace, "a taken name is written over"),
    "locks": (locks_that_do_not, "let in while it is held"),
}
ON_A_MAC = {"mlx's library", "device", "writing down", "staying awake"}  # broken below, and the terminal's pictures


def test_every_check_is_broken_on_purpose():
    assert CHECKS.keys() == BROKEN.keys() | ON_A_MAC | {"pictures in the terminal"}


SLOW.append("small model, float32")  # whose stored outputs are broken below


@pytest.mark.parametrize("name", [quick(name) for name in BROKEN])
def test_a_check_notices_that_its_part_is_broken(name, setting, monkeypatch):
    break_it, says = BROKEN[name]
    break_it(monkeypatch)
    result = CHECKS[name](setting)
    assert not result.is_right, str(result)
    assert says in str(result)
    assert str(result).startswith("WRONG: ")


@pytest.mark.parametrize("kind", ["latents", "picture"])
def test_other_stored_outputs_are_noticed(kind, setting, monkeypatch):
    runs, bounds = outputs.stored()
    exact = runs["none"]
    if kind == "latents":
        other = outputs.SmallRun(exact.latents * 1.0001, exact.picture)
    else:
        other = outputs.SmallRun(exact.latents, np.roll(exact.picture, 1, axis=1))
    monkeypatch.setattr(outputs, "run", RUN)
    monkeypatch.setattr(outputs, "stored", lambda: (runs | {"none": other}, bounds))
    assert not CHECKS["small model, float32"](setting).is_right


def test_numbers_that_are_not_finite_are_wrong(setting, monkeypatch):
    monkeypatch.setattr(mx, "matmul", lambda x, w: mx.full((len(x), w.shape[1]), float("nan")))
    result = CHECKS["products, bfloat16"](setting)
    assert (result.is_right, result.figures["error"]) == (False, float("inf"))


def test_commands_are_as_short_as_the_rate_of_the_chip_asks(setting, monkeypatch):
    endless_command(monkeypatch)
    monkeypatch.setattr(layers, "rate", lambda: RATE)
    result = CHECKS["longest command"](setting)
    assert (result.is_right, "attention 0.64 s (6 commands)" in str(result)) == (True, True), str(result)


@pytest.mark.parametrize(
    ("script", "is_right"),
    [
        ("print('[metal::malloc] Attempting to allocate 4398046511104 bytes'); print(4.0)", True),
        ("print('[metal::malloc] Attempting to allocate 4398046511104 bytes')", False),
        ("print('another error'); print(4.0)", False),
        ("print(4.0)", False),
    ],
)
def test_too_large_an_allocation_raises_an_error_that_is_known_and_computing_goes_on(
    script, is_right, setting, monkeypatch
):
    monkeypatch.setattr(machine, "is_gpu", lambda: True)
    monkeypatch.setattr(machine, "ALLOCATION", script)
    assert machine.allocation(setting).is_right == is_right


def test_the_disk_needs_the_more_the_less_memory_there_is(setting, monkeypatch):
    monkeypatch.setattr(streaming, "read_speed", lambda *_: 1e9)
    least, some = (streaming.disk(Setting(CPU_DIVISOR, setting.folder, gigabytes * 10**9)) for gigabytes in (1, 8))
    assert least.figures["bytes_per_step"] > some.figures["bytes_per_step"] > 0
    assert "streamed blocks" in str(some)
    plenty = streaming.disk(Setting(CPU_DIVISOR, setting.folder, 40 * 10**9))
    assert (plenty.figures["needed"], plenty.is_right) == (0, True)


def test_numpy_unpacks_what_mlx_packs():
    weight = mx.random.normal((8, 128), key=mx.random.key(1))
    exact = np.array(weight)
    for bound, (name, how) in zip((0.01, 0.12, 0.2, 0.2), products.QUANTIZED.items(), strict=True):
        packed = mx.quantize(weight, **how)
        found = products.unpacked(packed, how)
        assert np.allclose(found, as_numpy(mx.dequantize(*packed, **how, dtype=mx.float32)), atol=1e-6), name
        assert distance(found, exact) < bound, name


def test_a_picture_of_another_shape_is_wrong():
    one = outputs.SmallRun(np.ones((1, 4, 64), np.float32), np.zeros((16, 16, 3), np.uint8))
    assert one.errors(outputs.SmallRun(one.latents, one.picture[:8])) == (float("inf"),) * 3


# --- on a Mac ---


@pytest.mark.parametrize(
    ("chip", "version", "kernels_", "says"),
    [
        ("Apple M2", "15.6", b"gemm", "made for Apple M2 and macOS 15.6"),
        ("Apple M5", "26.2", b"gemm_nax", "made for Apple M5 and macOS 26.2"),
        ("Apple M5", "26.2", b"gemm", "WRONG: this mlx was made for an older macOS"),
        ("Apple M5", "26.0", b"gemm_nax", "WRONG: this mlx uses the accelerators"),
    ],
)
def test_the_wheel_fits_chip_and_macos(mac, setting, tmp_path, monkeypatch, chip, version, kernels_, says):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libmlx.dylib").write_bytes(b"\0MLX_CONV_WINOGRAD\0")
    (tmp_path / "lib" / "mlx.metallib").write_bytes(b"\0" + kernels_ + b"\0")
    mac.says("machdep.cpu.brand_string", chip)
    mac.says("kern.osproductversion", version)
    monkeypatch.setattr(mx, "device_info", dict)
    monkeypatch.setattr(wheel, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    assert str(CHECKS["mlx's library"](setting)).startswith(says)


def test_metal_is_the_default_of_a_mac(mac, setting, monkeypatch):
    monkeypatch.setattr(mx, "device_info", dict)
    assert str(CHECKS["device"](setting)).startswith("WRONG: Apple M2, flux-krea ")
    monkeypatch.setattr(machine, "is_gpu", lambda: True)
    assert str(CHECKS["device"](setting)).endswith(" on its GPU, peak 3.6 TFLOP/s; expected Metal")


def test_a_disk_that_cannot_write_down_is_named(mac, setting):
    assert str(CHECKS["writing down"](setting)) == "F_FULLFSYNC"
    mac.refuse_full_sync()
    assert str(CHECKS["writing down"](setting)).startswith("WRONG: F_FULLFSYNC fails")


def test_caffeinate_runs_and_ends(mac, setting, monkeypatch):
    result = CHECKS["staying awake"](setting)
    assert (result.is_right, str(result)) == (
        True, "caffeinate runs during a run, ends with it; expected runs, then ends"
    )  # fmt: skip
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    monkeypatch.setattr(macos, "_PATIENCE", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(popen, "kill", lambda process: None)
        assert "does not end" in str(CHECKS["staying awake"](setting))
    started[0].kill()
    started[0].wait()
    monkeypatch.setenv("PATH", str(mac.folder))
    assert "WRONG: caffeinate does not run" in str(CHECKS["staying awake"](setting))


# --- the terminal ---

ASKS = "from mlx_flux_krea.chip import machine; print(machine.shows_pictures(None))"


@pytest.mark.parametrize(
    ("variables", "answer", "says"),
    [
        pytest.param(
            {"TERM": "xterm-kitty"},
            "\x1b_Gi=31;OK\x1b\\\x1b[?62;c",
            "by the protocol of kitty, and it answers",
            marks=pytest.mark.slow,
        ),
        ({"TERM": "xterm-kitty"}, "\x1b[?62;4c", "WRONG: by the protocol of kitty, but it does not answer"),
        pytest.param(
            {"TERM": "xterm", "TERM_PROGRAM": "iTerm.app"},
            "\x1b]1337;ReportCellSize=17;8\x1b\\\x1b[?62;4c",
            "by the protocol of iterm, and it answers",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_terminal_that_says_it_shows_pictures_is_asked(tmp_path, variables, answer, says):
    """By a program of its own, at a terminal that answers or does not."""
    variables |= {"PYTHONPATH": str(ROOT)}
    code, out, shown = at_terminal(
        cwd=tmp_path, program=(sys.executable, "-c", ASKS), **variables,
        answer=lambda text: answer if text.endswith("\x1b[c") else "",
    )  # fmt: skip
    assert (code, out.startswith(says)) == (0, True), out + shown
    assert "62" not in shown, "the answer was shown"


def test_without_a_terminal_nobody_is_asked(setting, monkeypatch):
    monkeypatch.setattr(machine.terminal, "protocol", lambda: "kitty")
    assert "nobody asked" in str(CHECKS["pictures in the terminal"](setting))


# --- the command ---


def broken(setting):
    """As where a command of the GPU fails."""
    raise RuntimeError("[metal::malloc] no")


FEW = (
    Check("first", broken),
    Check("second", lambda setting: CheckResult("3", "3", figures={"count": 3})),
    Check("third", lambda setting: CheckResult("4", "3", False, "mend it", {"error": math.inf})),
)


def test_the_command_makes_every_check_and_ends_with_3_where_one_is_wrong(command, monkeypatch):
    monkeypatch.setattr(table, "CHECKS", FEW)
    code, out, err = command("doctor", "--chip")
    assert code == 3
    assert out.splitlines() == [
        "first   WRONG: RuntimeError: [metal::malloc] no; expected a result; please report it",
        "second  3; expected 3",
        "third   WRONG: 4; expected 3; mend it",
    ]
    assert "2 checks show that something is wrong: first, third; see the lines marked WRONG" in err
    assert "3 checks at FLUX.1's shapes divided by 48: MLX computes on the CPU here" in err
    code, out, err = command("doctor", "--chip", "--json")
    facts = json.loads(out)
    assert (code, facts["wrong"], [one["right"] for one in facts["checks"]]) == (
        3,
        ["first", "third"],
        [False, True, False],
    )
    assert [one["figures"] for one in facts["checks"]] == [{}, {"count": 3}, {"error": None}]
    assert "2 of 3: second" in err
    monkeypatch.setattr(table, "CHECKS", FEW[1:2])
    assert command("doctor", "--chip")[:2] == (0, "second  3; expected 3\n")
    assert command("doctor", "--chip", "--full")[0] == 2


def test_the_stored_outputs_are_small_and_in_the_wheel():
    assert outputs.FILE.stat().st_size < 2e6
    assert '"chip/outputs.safetensors"' in (ROOT / "pyproject.toml").read_text()
    assert outputs.stored()[1].keys() == outputs.KINDS.keys()
    assert outputs.stored()[1]["float32"] == outputs.EXACT == (1e-5, 1.0)


@pytest.mark.slow
def test_the_stored_outputs_are_those_that_the_small_model_gives(monkeypatch):
    monkeypatch.setattr(recording, "run", RUN)
    runs, bounds = recording.record()
    stored, stored_bounds = outputs.stored()
    for bits, one in runs.items():
        assert one.errors(stored[bits])[0] < 1e-6
    for kind, pair in bounds.items():
        assert stored_bounds[kind] == pytest.approx(pair, rel=0.2), kind
