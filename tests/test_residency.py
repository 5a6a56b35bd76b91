"""Resident, streamed or half of each: the picture is the same, and memory stays within the budget."""

import dataclasses
import errno
import gc
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers import rel
from mac import path_of
from mlx_flux_krea.convert import convert

from mlx_flux_krea import FluxPipeline, residency, worker
from mlx_flux_krea.errors import Interrupted, ModelError
from mlx_flux_krea.models import vae
from mlx_flux_krea.models.config import FLUX_VAE
from mlx_flux_krea.models.vae import VAE
from mlx_flux_krea.residency import Blocks, Reader, Unit, matrices, resident_places
from mlx_flux_krea.weights import open_model, read_header

CAT = "A cat holding a sign that says hello world"
SMALL = {"height": 32, "width": 48, "num_inference_steps": 2}

# --- blocks ---


@pytest.fixture(scope="module")
def folder(model):
    return open_model(model)


def blocks_of(folder, budget, dtype=mx.float32, **more):
    flux = folder.flux.load(dtype)
    return Blocks(flux, folder.flux.tensors(), flux.blocks, dtype=dtype, budget=budget, **more)


def test_a_layer_and_its_modulation_have_all_matrices_between_them(folder):
    flux = folder.flux.load(mx.float32)
    for layer in (*flux.blocks, flux.final_layer):
        names = [set(matrices(part)[1]) for part in (layer, layer.modulate)]
        assert not names[0] & names[1]
        assert all("mod" in name or "adaLN" in name for name in names[1])
    double = set(matrices(flux.double_blocks[0])[1])
    assert {"img_attn.qkv.weight", "txt_mlp.2.weight"} <= double
    assert len(double) == 8
    assert set(matrices(flux.single_blocks[0])[1]) == {"linear1.weight", "linear2.weight"}


def test_a_unit_reads_the_contents_of_the_file(folder):
    whole, streamed = folder.flux.load(mx.float32), folder.flux.load(mx.float32)
    unit = Unit(streamed.double_blocks[1], "double_blocks.1.", folder.flux.tensors())
    unit.drop()
    buffer, reader = mx.ones((unit.size,), mx.uint8), Reader(cached=False)
    for future in reader.read(unit, buffer):
        future.result()
    reader.close()
    unit.put(buffer, mx.float32, cast=False)
    for name, *_ in unit.tensors:
        arrays = [dict(flat(net.double_blocks[1]))[name] for net in (whole, streamed)]
        assert mx.array_equal(*arrays), name


def flat(module):
    from mlx.utils import tree_flatten

    return tree_flatten(module.parameters())


@pytest.mark.parametrize("budget", range(0, 120, 7))
def test_resident_blocks_fit_and_lie_evenly(budget):
    sizes = [8] * 5 + [4] * 10
    places = resident_places(sizes, budget)
    assert sum(sizes[place] for place in places) <= budget or places == set()
    gaps = np.diff(sorted(places)) if len(places) > 1 else [1]
    assert max(gaps) - min(gaps) <= 1
    assert resident_places(sizes, None) == resident_places(sizes, 80) == set(range(15))


# --- pictures ---


@pytest.fixture(scope="module")
def models(model, tmp_path_factory):
    """The tiny pipeline in its own precision, in bfloat16, and quantized as far as its widths allow."""
    root, made = tmp_path_factory.mktemp("models"), {"float32": model}
    made["bfloat16"] = convert([model], root / "bf16", dtype="bfloat16").path
    for bits in ("8", "4"):
        made[bits] = convert([model], root / bits, quantize=bits, group_size=32, dtype="float32").path
    return made


def pipe_with_resident(path, share, **more) -> FluxPipeline:
    """Returns a pipeline with a share of the transformer's blocks resident, 0 to 1, whatever the machine offers."""
    pipe = FluxPipeline.from_pretrained(path, **more)

    def plan(request):
        made = FluxPipeline.plan(pipe, request)
        return dataclasses.replace(made, resident_bytes=int(share * sum(pipe._weights.blocks.computed)))

    pipe.plan = plan
    return pipe


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "8", "4"])
@pytest.mark.core("float32")
def test_streamed_resident_and_half_of_each_give_the_same_bits(models, precision):
    images = []
    for share in (1, 0, 0.6):
        pipe = pipe_with_resident(models[precision], share)
        images.append(pipe(CAT, seed=3, output_type="np", **SMALL).images)
        resident, loaded, total = (
            len(x)
            for x in (pipe._generator.blocks.resident, pipe._generator.blocks.loaded, pipe._generator.blocks.units)
        )
        assert resident == loaded
        assert (share == 1 and resident == total) or (share == 0 and resident == 0) or 0 < resident < total
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0], images[2])


@pytest.mark.slow
def test_a_computed_type_other_than_the_stored_is_streamed_too(models):
    images = [
        pipe_with_resident(models["bfloat16"], share, dtype="float32")(CAT, seed=3, output_type="np", **SMALL).images
        for share in (1, 0, 0.6)
    ]
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0], images[2])


@pytest.mark.slow
def test_true_cfg_and_several_images_go_round_and_round(model):
    call = {"negative_prompt": "a dog", "true_cfg_scale": 3.0, "num_images_per_prompt": 2, "output_type": "np"}
    images = [pipe_with_resident(model, share)(CAT, seed=[1, 2], **call, **SMALL).images for share in (1, 0)]
    assert np.array_equal(*images)


@pytest.mark.slow
def test_a_callback_may_generate_with_the_pipeline_that_calls_it(model):
    alone = pipe_with_resident(model, 1)(CAT, seed=3, output_type="np", **SMALL).images
    for share in (0, 0.6, 1):
        pipe, inner = pipe_with_resident(model, share), []

        def callback(pipe, *_, inner=inner):
            inner.append(pipe(CAT, seed=3, output_type="np", **SMALL).images)

        outer = pipe(CAT, seed=3, output_type="np", callback_on_step_end=callback, **SMALL).images
        assert all(np.array_equal(images, alone) for images in (outer, *inner))


def test_at_most_two_blocks_are_in_buffers(model, monkeypatch):
    counts, original = [], residency._Streaming.run

    def counted(self, block, *args):
        result = original(self, block, *args)
        counts.append(len(self._buffers) + len(self._free))
        return result

    monkeypatch.setattr(residency._Streaming, "run", counted)
    pipe_with_resident(model, 0)(CAT, seed=3, **SMALL)
    assert max(counts) == residency.SLOTS == 2


class Watched:
    """Counts blocks: those that were started, and the most that were started and not waited for."""

    def __init__(self, monkeypatch):
        self.started = self.in_flight = self.most = 0
        start, wait = worker._start, worker._wait

        def counted_start(part, *args):
            self.started, self.in_flight = self.started + 1, self.in_flight + 1
            self.most = max(self.most, self.in_flight)
            return start(part, *args)

        def counted_wait(results):
            wait(results)
            self.in_flight -= 1

        monkeypatch.setattr(worker, "_start", counted_start)
        monkeypatch.setattr(worker, "_wait", counted_wait)


@pytest.mark.parametrize("share", [1, 0.6, 0])
def test_a_block_starts_before_the_one_before_it_has_ended(model, monkeypatch, share):
    images = []
    for switch, most in (("1", 2), ("0", 0)):
        with monkeypatch.context() as patch:
            patch.setenv("FLUX_KREA_IN_FLIGHT", switch)
            watched = Watched(patch)
            images.append(pipe_with_resident(model, share)(CAT, seed=3, output_type="np", **SMALL).images)
        assert (watched.most, watched.in_flight) == (most, 0)
    assert np.array_equal(*images)


def test_a_plan_without_room_for_two_starts_none_before_the_one_before_has_ended(model, monkeypatch):
    pipe, watched = FluxPipeline.from_pretrained(model), Watched(monkeypatch)
    pipe._generator.encode([(CAT, CAT)], pipe.folder.index.max_sequence_length)
    plan = pipe.plan
    pipe.plan = lambda request: dataclasses.replace(plan(request), in_flight=False)
    watched.started = 0
    pipe(CAT, seed=3, **SMALL)
    assert watched.started == 0


def test_an_interrupt_ends_within_two_blocks_and_leaves_none_in_flight(model, monkeypatch):
    watched, started = Watched(monkeypatch), []
    pipe = pipe_with_resident(model, 0)

    def interrupt(stage, done, total):
        if stage == "denoise" and watched.in_flight:
            started.append(watched.started)
            pipe.interrupt()

    with pytest.raises(Interrupted):
        pipe(CAT, seed=3, progress=interrupt, **SMALL)
    assert watched.in_flight == 0
    assert watched.started <= started[0] + 1
    assert pipe(CAT, seed=3, **SMALL).images[0].size == (48, 32)


@pytest.mark.slow
def test_fewer_blocks_are_resident_when_a_picture_needs_more(model):
    pipe = FluxPipeline.from_pretrained(model)
    shares, images = iter((1, 0.5, 0, 1)), []
    pipe.plan = lambda request: dataclasses.replace(
        FluxPipeline.plan(pipe, request), resident_bytes=int(next(shares) * sum(pipe._weights.blocks.computed))
    )
    loaded = []
    for _ in range(4):
        images.append(pipe(CAT, seed=3, output_type="np", **SMALL).images)
        loaded.append(len(pipe._generator.blocks.loaded))
    assert loaded[0] == loaded[3] == 5
    assert 0 < loaded[1] < 5
    assert loaded[2] == 0
    assert all(np.array_equal(images[0], image) for image in images)


@pytest.mark.slow
def test_a_second_picture_prepares_nothing_again(model):
    pipe, stages = FluxPipeline.from_pretrained(model), []

    def stages_of(**more):
        stages.clear()
        pipe(CAT, seed=3, progress=lambda stage, *_: stages.append(stage), **(SMALL | more))
        return set(stages)

    assert "modulation" in stages_of()
    assert stages_of() == {"denoise", "decode"}
    for change in ({"guidance_scale": 2.0}, {"num_inference_steps": 3}, {"height": 64}):
        assert stages_of(**change) == {"modulation", "denoise", "decode"}, change
        assert stages_of(**change) == {"denoise", "decode"}


@pytest.mark.slow
def test_two_pictures_take_no_more_memory_than_one(model):
    for share in (0, 1):
        pipe = pipe_with_resident(model, share)
        gc.collect()
        mx.clear_cache()
        base = mx.get_active_memory()
        first, *others = (max(pipe(CAT, seed=seed, **SMALL).peaks.values()) - base for seed in (1, 2, 3))
        assert max(others) <= 1.01 * first


# --- bad luck while reading ---


@pytest.fixture
def copy(model, tmp_path):
    return Path(shutil.copytree(model, tmp_path / "copy"))


def shard_of(path, tensor):
    return open_model(path).flux.tensors()[tensor][0]


def test_a_file_that_becomes_shorter_is_named_with_its_tensor(copy):
    shard = shard_of(copy, "single_blocks.2.linear2.weight")

    def cut(pipe, step, *_):
        os.truncate(shard, shard.stat().st_size // 2)

    with pytest.raises(ModelError, match=rf"{shard.name}: \w+_blocks.*weight: the file has become shorter") as caught:
        pipe_with_resident(copy, 0)(CAT, seed=1, callback_on_step_end=cut, **SMALL)
    assert caught.value.exit_code == 3


def test_a_file_that_disappears_is_named(copy):
    pipe = pipe_with_resident(copy, 0)
    pipe(CAT, seed=1, **SMALL)
    shard = shard_of(copy, "double_blocks.0.img_mlp.0.weight")
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name} cannot be read: No such file"):
        pipe(CAT, seed=1, **SMALL)


def test_a_disk_that_fails_is_an_error_with_file_and_tensor(copy, monkeypatch):
    original = os.preadv

    def preadv(file, buffers, offset):
        if path_of(file).endswith(shard.name) and offset > shard.stat().st_size // 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(file, buffers, offset)

    shard = shard_of(copy, "double_blocks.0.img_mlp.0.weight")
    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(ModelError, match=rf"{shard.name}: .*weight cannot be read: Input/output error"):
        pipe_with_resident(copy, 0)(CAT, seed=1, **SMALL)


@pytest.mark.slow
def test_a_slow_disk_is_waited_for_and_the_wait_can_be_ended(copy, monkeypatch):
    """One read takes a second; `interrupt` waits for those that have begun, and not for all that are left."""
    pipe, original, slow, never = pipe_with_resident(copy, 0), os.preadv, threading.Event(), threading.Event()

    def preadv(file, buffers, offset):
        if slow.is_set():
            pipe.interrupt()
            never.wait(1)
        return original(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    expected = pipe(CAT, seed=1, output_type="np", **SMALL).images
    begin = []

    def callback(pipe, step, *_):
        slow.set()
        begin.append(time.monotonic())

    with pytest.raises(Interrupted):
        pipe(CAT, seed=1, callback_on_step_end=callback, **SMALL)
    assert time.monotonic() - begin[0] < 5  # of a step that takes ten
    slow.clear()
    assert np.array_equal(pipe(CAT, seed=1, output_type="np", **SMALL).images, expected)


@pytest.mark.slow
def test_no_file_stays_open_and_no_thread_stays_behind(copy):
    def state():
        return len(os.listdir("/dev/fd")), threading.active_count()

    pipe = pipe_with_resident(copy, 0)
    pipe(CAT, seed=1, **SMALL)
    before = state()
    pipe(CAT, seed=1, **SMALL)
    with pytest.raises(Interrupted):
        pipe(CAT, seed=2, callback_on_step_end=lambda pipe, *_: pipe.interrupt(), **SMALL)
    assert state() == before


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="shown on Linux")
@pytest.mark.parametrize("cached", [False, True])
def test_streaming_leaves_the_page_cache_to_others(cached):
    """RWF_NOWAIT reads only what is in the page cache; the file lies where the checkout does, on a disk."""
    linear = nn.Linear(2048, 2048)
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:
        path = Path(folder) / "linear.safetensors"
        mx.save_safetensors(str(path), {"layer.weight": linear.weight})
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            layer = nn.Sequential(linear)
            unit = Unit(layer, "", {"layers.0.weight": (path, read_header(path)[0]["layer.weight"])})
            reader = Reader(cached)
            for future in reader.read(unit, mx.zeros((unit.size,), mx.uint8)):
                future.result()
            reader.close()
            middle = path.stat().st_size // 2
            try:
                found = os.preadv(file.fileno(), [bytearray(1)], middle, os.RWF_NOWAIT)
            except BlockingIOError:
                found = 0
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                pytest.skip("this filesystem cannot say what is cached")
            assert found == cached


# --- the autoencoder in strips ---


@pytest.mark.parametrize("strip", [2**9, 2**11, 2**13])
def test_strips_decode_and_encode_as_the_whole_does(folder, monkeypatch, strip):
    network = folder.vae.load(mx.float32)
    mx.random.seed(0)
    z, x = mx.random.normal((1, 6, 10, 16)), mx.random.normal((1, 48, 80, 3))
    whole = network.decode(z), *network.encode(x)
    mx.eval(whole)
    calls = []

    def run(stage, *args):
        calls.append(stage)
        result = stage(*args)
        mx.eval(result)
        return result

    monkeypatch.setattr(vae, "STRIP", strip)
    monkeypatch.setattr(vae, "_STATISTICS_CHUNK", strip)
    monkeypatch.setattr(vae, "_ATTENTION_CHUNK", 16)
    parts = network.decode(z, run), *network.encode(x, run)
    assert len(calls) > 150
    for a, b in zip(parts, whole, strict=True):
        assert rel(a, b) < 2e-6


def test_strips_take_less_memory_than_the_whole(monkeypatch):
    config = dataclasses.replace(FLUX_VAE, ch=8, norm_num_groups=2)
    network, z = VAE(config), mx.zeros((1, 16, 16, 16))
    mx.eval(network.parameters(), z)

    def run(stage, *args):
        result = stage(*args)
        mx.eval(result)
        return result

    peaks = []
    for strip in (2**24, 2**12):
        monkeypatch.setattr(vae, "STRIP", strip)
        mx.clear_cache()
        base = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(network.decode(z, run))
        peaks.append(mx.get_peak_memory() - base)
    assert peaks[1] < peaks[0] / 3
