"""GPTQ: the rounding of one matrix, that of a whole transformer, its folder, its ends and its refusals."""

import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import PIPELINE, TOKENIZERS, edit_index, edit_json
from mlx_flux_krea.convert import Gptq, blockwise, convert, gptq
from mlx_flux_krea.convert.folder import check_manifest
from mlx_flux_krea.convert.gptq import DAMPING, choose_grid, factorize, pack, round_matrix

from mlx_flux_krea import FluxPipeline, calibration, home
from mlx_flux_krea.commands.inspect import inspect
from mlx_flux_krea.commands.purge import purge
from mlx_flux_krea.commands.shared import rounding
from mlx_flux_krea.errors import ModelError, ResourceError, UsageError
from mlx_flux_krea.generator import Generator
from mlx_flux_krea.models.config import FLUX_DEV, Quantization
from mlx_flux_krea.presets import CHIPS
from mlx_flux_krea.samples import Samples
from mlx_flux_krea.weights import open_model

PROMPTS = ("a red circle on a blue background",)


def inputs(width, rows=2000, seed=0):
    """Inputs of a layer as networks have them: correlated, and of different size in each column."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(rows, width // 4)) @ rng.normal(size=(width // 4, width))
    return ((mixed + 0.3 * rng.normal(size=(rows, width))) * rng.lognormal(size=width)).astype(np.float32)


def matrix(rows, width):
    return np.random.default_rng(1).normal(size=(rows, width)).astype(np.float32) / 8


def values(rounded, q):
    return np.array(mx.dequantize(rounded.weight, rounded.scales, rounded.biases, q.group_size, q.bits), np.float64)


def by_the_paper(weight, moment, q):
    """Algorithm 1 of Frantar et al. 2022 in float64: by the inverse of H, whose rows change all columns that are left.

    Groups come in the order of their inputs, the largest first, and so do the columns inside each.
    """
    width, size = len(moment), q.group_size
    importance = np.diag(moment).astype(np.float64)
    groups = sorted(range(width // size), key=lambda g: -importance[g * size : g * size + size].sum())
    order = [c for g in groups for c in sorted(range(g * size, g * size + size), key=lambda c: -importance[c])]
    h = moment.astype(np.float64)[np.ix_(order, order)]
    inverse = np.linalg.inv(h + DAMPING * importance.mean() * np.eye(width))
    upper = np.linalg.cholesky(inverse).T
    left, done = weight[:, order].astype(np.float64), np.empty(weight.shape)
    for k in range(width):
        if k % size == 0:
            grid = choose_grid(left[:, k : k + size].T.astype(np.float32), q.bits, mx.float32)
            scale, bias = (part.astype(np.float64) for part in grid)
        done[:, k] = np.clip(np.rint((left[:, k] - bias) / scale), 0, 2**q.bits - 1) * scale + bias
        error = (left[:, k] - done[:, k]) / upper[k, k]
        left[:, k:] -= error[:, None] * upper[k, k:]
    back = np.empty_like(done)
    back[:, order] = done
    return back


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (3, 64), (4, 32)])
def test_a_matrix_is_rounded_as_the_paper_says(bits, group):
    q, weight, x = Quantization(bits, group), matrix(48, 256), inputs(256)
    moment = x.T @ x / len(x)
    rounded = round_matrix(weight, np.tril(moment), q, mx.float32)
    found, expected = values(rounded, q), by_the_paper(weight, moment, q)
    differ = np.abs(found - expected) > 1e-4 * np.abs(weight).max()
    assert differ.mean() < 0.05  # a tie may fall to either side in float32 and in float64, and then the rest of a row

    def lost(w):
        return np.linalg.norm((w - weight) @ x.T.astype(np.float64)) ** 2 / len(x)

    assert lost(found) == pytest.approx(lost(expected), rel=0.01)
    assert rounded.error == pytest.approx(lost(found), rel=0.01)
    assert rounded.size == pytest.approx(lost(np.zeros_like(weight)), rel=0.01)
    plain = mx.quantize(mx.array(weight), group, bits)
    nearest = np.array(mx.dequantize(*plain, group, bits), np.float64)
    assert rounded.plain == pytest.approx(lost(nearest), rel=0.01)
    assert lost(found) < 0.5 * lost(nearest)


def test_inputs_without_correlation_leave_little_to_gain():
    q, weight = Quantization(4, 64), matrix(32, 128)
    rounded = round_matrix(weight, np.eye(128, dtype=np.float32), q, mx.float32)
    assert 0.8 * rounded.plain < rounded.error <= 1.02 * rounded.plain


def test_columns_that_no_sample_shows_are_rounded_too():
    q, weight, moment = Quantization(4, 64), matrix(8, 64), np.zeros((64, 64), np.float32)
    moment[0, 0] = 1
    assert np.abs(values(round_matrix(weight, moment, q, mx.float32), q) - weight).max() < 0.2
    with pytest.raises(ValueError, match="must be finite"):
        round_matrix(weight, np.full((64, 64), np.nan, np.float32), q, mx.float32)


@pytest.mark.parametrize("bits", [3, 4])
def test_codes_are_packed_as_mlx_packs_them(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (5, 128)).astype(np.uint8)
    ones = mx.ones((5, 2))
    found = mx.dequantize(mx.array(pack(codes, bits)), ones, 0 * ones, 64, bits)
    assert (np.array(found) == codes).all()


def test_a_factor_is_made_in_place_and_in_panels():
    x = np.random.default_rng(0).normal(size=(2600, 1100)).astype(np.float32)
    matrix = x.T @ x / len(x)
    expected = np.linalg.cholesky(matrix.astype(np.float64))
    factorize(found := np.tril(matrix))
    assert np.abs(found - expected).max() < 1e-4
    assert gptq._PANEL < 1024 < 1100 > gptq._STRIP  # more than one of each


# --- a whole transformer ---


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The small model in float32 with three of its blocks, and pictures of one token."""
    work = tmp_path_factory.mktemp("gptq")
    left_out = shutil.ignore_patterns("manifest.json", "model_index.json")  # so that it is not a folder of ours
    whole = shutil.copytree(home.NANO, work / "whole", ignore=left_out) / "transformer"
    arrays = {name: array for file in whole.glob("*.safetensors") for name, array in mx.load(str(file)).items()}
    some = ("double_blocks.0.", "single_blocks.0.", "single_blocks.1.")
    kept = {name: array for name, array in arrays.items() if "blocks." not in name or name.startswith(some)}
    mx.eval(kept)
    for file in whole.glob("*.safetensors*"):
        file.unlink()
    mx.save_safetensors(str(whole / "model.safetensors"), kept)
    edit_json(whole / "config.json", depth=1, depth_single_blocks=2)
    files = sorted(whole.parent.glob("*/*.safetensors"))
    folder = convert(files, work / "nano", dtype="float32", tokenizers=whole.parent).path
    defaults = {"width": 16, "height": 16, "num_inference_steps": 28, "guidance_scale": 4.5}
    return edit_index(folder, defaults=defaults, max_sequence_length=16)


@pytest.fixture(scope="module")
def samples(source, tmp_path_factory):
    """The file of one prompt, collected by a generator that cannot decode."""
    file = tmp_path_factory.mktemp("samples") / "samples.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(Generator, "_decode")
        patch.delattr(Generator, "_vae")
        calibration.collect(open_model(source), file, prompts=PROMPTS)
    return file


@pytest.fixture(scope="module")
def how(samples):
    """The inputs of `samples`, and the calls that asked for them."""
    calls = []

    def collect(folder, file, prompts):
        calls.append(prompts)
        file.write_bytes(samples.read_bytes())

    return Gptq(collect, PROMPTS, begin=lambda folder, done: calls.append(done)), calls


@pytest.fixture(scope="module")
def rounded(source, how, tmp_path_factory):
    """The folder and the report."""
    work = tmp_path_factory.mktemp("rounded")
    before, os.environ["FLUX_KREA_HOME"] = os.environ.get("FLUX_KREA_HOME"), str(work / "home")
    try:
        report = convert([source], work / "model", dtype="bfloat16", quantize="4", gptq=how[0])
    finally:
        os.environ.pop("FLUX_KREA_HOME") if before is None else os.environ.update(FLUX_KREA_HOME=before)
    assert not list((work / "home" / home.CHECKPOINTS).iterdir())
    return report


def same(one: Path, other: Path) -> bool:
    files = [file.relative_to(one) for file in one.rglob("*") if file.is_file()]
    assert len(files) == sum(file.is_file() for file in other.rglob("*"))
    return all(filecmp.cmp(one / file, other / file, shallow=False) for file in files)


def test_inputs_are_those_of_the_steps(source, samples):
    """Six noise levels of a schedule of seven steps, and latents that are less and less noise."""
    found, pipe = Samples.load(samples), FluxPipeline.from_pretrained(source)
    assert len(found) == 6
    assert (np.diff(found.sigmas) < 0).all()
    assert 0 < found.sigmas[-1] < found.sigmas[0] < 1
    assert (found.width, found.height, found.guidance) == (2, 2, 4.5)
    latents = []
    keep = lambda pipe, step, sigma, given: latents.append(np.array(given["latents"]))  # noqa: E731
    pipe(PROMPTS[0], seed=0, num_inference_steps=7, output_type="latent", callback_on_step_end=keep, progress=False)
    assert np.array_equal(found.latents, np.concatenate(latents[:6]))
    assert np.array_equal(found.embeds, np.array(pipe.encode_prompt(PROMPTS[0])[0]))


@pytest.mark.slow
def test_prompts_that_are_done_are_not_run_again(source, samples, tmp_path):
    """After any end the next call takes up the prompts that are left; other prompts are others."""
    folder, seen = open_model(source), []
    prompts = (*PROMPTS, "a ring")

    def progress(label, done, total):
        assert (label, total) == (calibration.LABEL, 12)
        seen.append(done)
        if done == 8 and len(seen) == seen.index(8) + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibration.collect(folder, tmp_path / "a", prompts=prompts, progress=progress)
    assert len(list(tmp_path.iterdir())) == 1  # the latents of the first
    seen[:] = [8]
    calibration.collect(folder, tmp_path / "a", prompts=prompts, progress=progress)
    assert min(seen) >= 6
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    calibration.collect(folder, tmp_path / "b", prompts=prompts)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert np.array_equal(Samples.load(tmp_path / "a").latents[:6], Samples.load(samples).latents)


def test_the_folder_is_one_of_its_precision(source, rounded, tmp_path):
    """Plain rounding gives the same files, arrays, types, shapes and config: older versions read it."""
    plain = convert([source], tmp_path / "plain", dtype="bfloat16", quantize="4").path
    folder, other = open_model(rounded.path), open_model(plain)
    folder.check()
    assert not any(check_manifest(rounded.path, lambda *_: None)[1].values())
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        assert filecmp.cmp(rounded.path / name / "config.json", plain / name / "config.json", shallow=False)
        shapes = [{k: (i.dtype, i.shape) for k, (_, i) in f.networks[name].tensors().items()} for f in (folder, other)]
        assert shapes[0] == shapes[1]
        if name != "transformer":
            assert same(rounded.path / name, plain / name)
    ours, theirs = (json.loads((path / "model_index.json").read_text()) for path in (rounded.path, plain))
    assert ours.pop("converter") == f"{theirs.pop('converter')}, GPTQ"
    assert ours == theirs
    assert folder.index.is_by_gptq
    assert not other.index.is_by_gptq
    assert "rounded by GPTQ" in (rounded.path / "README.md").read_text()
    shown = CliRunner().invoke(inspect, [str(rounded.path)]).output
    assert "rounded by      GPTQ" in shown


@pytest.mark.slow
def test_each_layer_and_each_step_are_nearer_than_by_plain_rounding(source, samples, rounded, tmp_path):
    found = Samples.load(samples)
    plain = convert([source], tmp_path / "plain", dtype="bfloat16", quantize="4").path
    velocities = []
    for path in (source, rounded.path, plain):
        pipe = FluxPipeline.from_pretrained(path, dtype="float32")
        args = {"num_inference_steps": 2, "output_type": "latent", "progress": False, "width": 48, "height": 48}
        args |= {"prompt_embeds": mx.array(found.embeds), "pooled_prompt_embeds": mx.array(found.pooled), "seed": 3}
        velocities.append(np.array(pipe(**args).images))
    exact, ours, theirs = velocities
    assert np.linalg.norm(ours - exact) < 0.9 * np.linalg.norm(theirs - exact)
    assert rounded.gptq
    (note,) = (note for note in rounded.notes if note.startswith("GPTQ"))
    ours, theirs = (float(part.partition("%")[0].rpartition(" ")[2]) for part in note.split(";"))
    assert 0 < ours < 0.7 * theirs
    errors = {g.name: g.error for g in rounded.groups if "blocks, " in g.name and g.error is not None}
    assert len(errors) == 6
    assert all(0 < error < 0.09 for error in errors.values())


@pytest.mark.slow
@pytest.mark.parametrize(("end", "expected"), [(0.55, 1), (0.8, 2)])  # 0.55: streams are moved
def test_blocks_that_are_done_are_not_repeated(source, how, rounded, tmp_path, end, expected):
    """Continues by the same call after any end, and makes the same bytes."""
    gptq, calls = how
    stopped = []

    def stop(label, done, total):
        if label == blockwise.LABEL and done > end * total and not stopped:
            stopped.append(done)
            raise KeyboardInterrupt

    for progress in (stop, None):
        calls.clear()
        try:
            convert([source], tmp_path / "a", dtype="bfloat16", quantize="4", gptq=gptq, progress=progress)
        except KeyboardInterrupt:
            assert [file.name for file in tmp_path.iterdir()] == []
            (work,) = home.path(home.CHECKPOINTS).iterdir()
            blocks = len(list(work.glob("block-*")))
            assert work.stat().st_mode & 0o777 == 0o700
            assert len(list(work.glob("stream-*"))) <= 6 + 1  # of each sample one, and one that takes its place
    assert calls == [blocks]  # and no inputs were collected again
    assert blocks == expected
    assert same(tmp_path / "a", rounded.path)
    assert not list(home.path(home.CHECKPOINTS).iterdir())


def test_another_recipe_or_source_starts_anew(source, how, tmp_path):
    jobs = [
        {"quantize": "4"},
        {"quantize": "3"},
        {"quantize": "4", "group_size": 32},
        {"quantize": "4", "dtype": "float16"},
    ]
    places = set()

    def begin(folder, done):
        places.update(path.name for path in home.path(home.CHECKPOINTS).iterdir())
        raise KeyboardInterrupt

    for job in jobs:
        with pytest.raises(KeyboardInterrupt):
            convert([source], tmp_path / "a", gptq=Gptq(how[0].collect, PROMPTS, begin), **job)
    with pytest.raises(KeyboardInterrupt):
        convert([source], tmp_path / "a", quantize="4", gptq=Gptq(how[0].collect, ("another",), begin))
    assert len(places) == len(jobs) + 1
    CliRunner().invoke(purge, ["--unfinished", "--yes"], catch_exceptions=False)
    assert not list(home.path(home.CHECKPOINTS).iterdir())


# --- refusals ---


@pytest.mark.parametrize(("quantize", "named"), [("8", "8"), ("none", "none"), ("mxfp4", "mxfp4"), (None, "8")])
def test_other_bits_are_refused(source, how, tmp_path, quantize, named):
    with pytest.raises(UsageError, match=f"`gptq` with `quantize` {named}; expected `quantize` 4 or 3"):
        convert([source], tmp_path / "a", quantize=quantize, gptq=how[0])


def test_sources_that_cannot_be_run_are_refused(rounded, how, kontext, tmp_path):
    def refused(source, words):
        with pytest.raises(ModelError, match=words):
            convert([source], tmp_path / "a", quantize="4", gptq=how[0])
        assert not list(tmp_path.iterdir())
        assert not home.path(home.CHECKPOINTS).exists()

    refused(rounded.path, "is already quantized; expected one in 16 bits; convert the original with `quantize` none")
    refused(kontext, "kontext, whose inputs are not prompts alone")
    with pytest.raises(ModelError, match="this is not a model folder; expected a model folder in 16 bits"):
        convert([PIPELINE], tmp_path / "a", quantize="4", gptq=how[0], tokenizers=TOKENIZERS)


def test_too_little_disk_is_found_first(source, how, tmp_path, monkeypatch):
    monkeypatch.setattr(blockwise.Rounding, "bytes", property(lambda self: 10**18))
    how[1].clear()
    with pytest.raises(ResourceError, match=r"GB are free at .*; expected 1000000000.1 GB"):
        convert([source], tmp_path / "a", quantize="4", gptq=how[0])
    assert not how[1]
    assert not list(tmp_path.iterdir())
    assert not list(home.path(home.CHECKPOINTS).iterdir())


@pytest.mark.slow
def test_the_disk_is_counted_as_it_is_used(source, how, tmp_path):
    """No less than what lies there at any moment, and not twice as much; what is there is not asked for again."""
    most = [0]

    def look(label, done, total):
        if label == blockwise.LABEL:
            (work,) = home.path(home.CHECKPOINTS).iterdir()
            most.append(sum(file.stat().st_size for file in work.glob("*")))

    seen = []
    count = blockwise.Rounding.check_disk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise.Rounding, "check_disk", lambda self, *a: (seen.append(self.bytes), count(self, *a)))
        convert([source], tmp_path / "a", quantize="4", gptq=how[0], progress=look)
    assert max(most) <= seen[0] < 1.6 * max(most)


def test_two_conversions_do_not_share_the_work(source, how, tmp_path):
    def begin(folder, done):
        with pytest.raises(UsageError, match=r"another conversion rounds .* by GPTQ; expected one at a time"):
            convert([source], tmp_path / "b", quantize="4", gptq=how[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert([source], tmp_path / "a", quantize="4", gptq=Gptq(how[0].collect, PROMPTS, begin))


def test_weights_that_give_nan_are_named(source, how, samples, tmp_path):
    def collect(folder, file, prompts):
        found = Samples.load(samples)
        found.latents[0, 0, 0] = np.nan
        found.save(file)

    with pytest.raises(ModelError, match="a block of the transformer gave NaN"):
        convert([source], tmp_path / "a", quantize="4", gptq=Gptq(collect, PROMPTS))
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_of_inputs_is_named(source, tmp_path):
    gptq = Gptq(lambda folder, file, prompts: file.write_bytes(b"no inputs"), PROMPTS)
    with pytest.raises(ModelError, match=r"samples.safetensors cannot be read: .*; expected the inputs for GPTQ"):
        convert([source], tmp_path / "a", quantize="4", gptq=gptq)


# --- the command ---


def test_the_time_is_said_by_chip(source, monkeypatch):
    shape = {"width": 1024, "height": 1024, "length": 512}
    times = [rounding.seconds(FLUX_DEV, chip, **shape) for chip in CHIPS]
    m1, m4_max = (rounding.seconds(FLUX_DEV, chip, **shape) for chip in ("M1", "M4 Max"))
    assert 4 * 3600 < m1 < 6 * 3600
    assert 2400 < m4_max < 4200
    assert max(times) == m1
    half = rounding.seconds(FLUX_DEV, "M1", **shape, done=38)
    assert rounding.seconds(FLUX_DEV, "M1", **shape, done=57) == 0 < half < m1 / 2
    folder = open_model(source)
    assert "12 prompts at 6 times each: less than a minute on any chip" in rounding.said(folder, 0)
    monkeypatch.setattr(rounding, "_SHORT", 0)
    assert all(f"\n{chip} " in rounding.said(folder, 0) for chip in CHIPS)
    monkeypatch.setattr(rounding, "this_chip", lambda: "M1")
    assert "1 of 3 blocks are done: about under 1 s here" in rounding.said(folder, 1)


def test_the_command_refuses_with_the_names_of_its_options(command, source):
    code, _, said = command("convert", source, "-q", "8", "--gptq", "-o", "a")
    assert code == 2
    assert "--gptq with -q 8; expected -q 4 or 3" in said
    code, _, said = command("convert", PIPELINE, "--tokenizers", TOKENIZERS, "-q", "4", "--gptq")
    assert code == 3
    assert "--gptq runs the model, and this is not a model folder" in said
    assert "-q none" in said


@pytest.mark.slow
def test_a_killed_command_continues_and_makes_the_same_bytes(source, tmp_path):
    """SIGKILL while a block is rounded; the second call ends the work of the first."""
    argv = [str(Path(sys.executable).parent / "flux-krea"), "convert", str(source), "-q", "4", "--gptq", "-o"]

    def begin(name):
        env = os.environ | {"FLUX_KREA_HOME": str(tmp_path / name / "home")}
        return subprocess.Popen([*argv, str(tmp_path / name / "model")], env=env, stderr=subprocess.PIPE, text=True)

    process = begin("killed")
    work = tmp_path / "killed" / "home" / home.CHECKPOINTS
    while not list(work.glob("gptq-*/block-000.safetensors")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "model").exists()
    said = begin("killed").communicate()[1]
    assert "of 3 blocks are done" in said
    assert "collecting" not in said
    assert begin("whole").communicate()[1]
    assert same(tmp_path / "killed" / "model", tmp_path / "whole" / "model")
    assert not list(work.iterdir())
