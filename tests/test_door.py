"""Whatever people hold is opened through one door: by first bytes, by the tensors that are there, whatever the names.

Each row of a table arranges a folder and says what is to come of it: the files that are used, or words of the refusal.
"""

import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import derived
import foreign
import gguf
import mlx.core as mx
import numpy as np
import pytest
from helpers import PIPELINE, TOKENIZERS
from hub import COMMIT, Hub
from mlx_flux_krea.convert import convert, hub, sets
from mlx_flux_krea.convert.choose import choose
from mlx_flux_krea.convert.sources import open_sources

from mlx_flux_krea import first_bytes
from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.weights import COMPONENTS, read_header

T, V, C, E = "flux1-tiny.safetensors", "ae.safetensors", "clip_l.safetensors", "t5xxl.safetensors"


@pytest.fixture
def files(tmp_path) -> Path:
    """The four files of a model in one folder, as links."""
    folder = tmp_path / "files"
    folder.mkdir()
    for file in derived.single_files().iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def tensors(file: Path) -> dict:
    """Every tensor of a safetensors file as `foreign.save` takes it."""
    data, (infos, _) = file.read_bytes(), read_header(file)
    return {n: (i.dtype, i.shape, data[i.start : i.end]) for n, i in infos.items()}


def split(folder: Path, pattern: str, name: str = V, count: int = 3, first: int = 1, index: str = "") -> list[Path]:
    """Cuts a file of the folder into shards named by the pattern, and removes it."""
    held = tensors(folder / name)
    names, made = sorted(held), []
    for k in range(count):
        made.append(folder / pattern.format(k + first, count))
        foreign.save(made[-1], {n: held[n] for n in names[k::count]})
    if index:
        weight_map = {n: made[i % count].name for i, n in enumerate(names)}
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    (folder / name).unlink()
    return made


def halved(source: Path, target: Path) -> Path:
    """Stores a file in 16 bits."""
    arrays = {n: mx.array(a) for n, a in mx.load(str(source)).items()}
    foreign.save(target, {n: foreign.plain(a, "F16") for n, a in arrays.items()})
    return target


def edit_json_index(folder: Path, edit) -> None:
    index = next(folder.glob("*.index.json"))
    index.write_text(json.dumps({"weight_map": edit(json.loads(index.read_text())["weight_map"])}))


# --- first bytes ---

ZIP = b"PK\x03\x04" + bytes(26)
KINDS = {
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n",
    "a web page": b"\n <!DOCTYPE html><html><head><title>Sign in</title>",
    "a web page ": b"\xef\xbb\xbf<HTML>",
    "JSON": b'{"error":"Repository not found"}',
    "JSON ": b"\xef\xbb\xbf[ {",
    "a zip archive": ZIP + b"readme.txt",
    "a torch archive": ZIP + b"archive/data.pkl",
    "a zip archive or DDUF": ZIP + b"model_index.json",
    "an SQLite database, as Draw Things": b"SQLite format 3\0" + bytes(84),
    "a pickle": b"\x80\x02}q\x00.",
    "an ONNX graph": b"\x08\x08\x12\x07pytorch\x1a\x052.1.0",
    "a TensorRT engine": b"ptrt" + bytes(60),
    "of ggml, from before GGUF": b"tjgg" + bytes(60),
    "an archive": b"\x1f\x8b\x08" + bytes(60),
    "a NumPy array": b"\x93NUMPY\x01\x00",
    "an HDF5 file": b"\x89HDF\r\n\x1a\n",
    "a pointer of Git LFS ": b"\xef\xbb\xbfversion https://hawser.github.com/spec/v1\noid sha256:ab\n",
    "a pointer of git-annex": b"/annex/objects/SHA256E-s23802932552--abc.safetensors\n",
    "a web page  ": b"<Error><Code>AccessDenied</Code></Error>",
    "a web page   ": "<html>".encode("utf-16"),
    "JSON  ": b'"Entry not found"',
    "JSON   ": b"[1, 2]",
    "a pickle ": pickle.dumps({"a": 1}, 0),
    "a pickle  ": pickle.dumps({"a": 1}, 1),
    "an ONNX graph ": b"\x08\x08\x12\x08skl2onnx\x1a\x06",
    "an ONNX graph  ": b"\x08\x08:\xd6\x12\n\x10",
    "an alias of the Finder": b"book\0\0\0\0mark\0\0\0\0" + bytes(60),
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(60),
    "empty": b"",
    "all zeros at its start": bytes(4096),
    "a text": b"just some words in a file",
    "a text ": b"404",
    "a text  ": "Zugriff verweigert f\u00fcr \u00c4".encode(),
    "of no format that is known": b"\x01\x02\x03\x04\xff" * 20,
}
NAMES = ("x.safetensors", "X.SafeTensors", "x.gguf", "x.sft")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_holds_no_weights_is_called_what_it_is(files, kind):
    """Named itself, in the folder of a model, and as the only file there."""
    for name in NAMES:
        (files / V).unlink(missing_ok=True)
        file = files / name
        file.write_bytes(KINDS[kind])
        for sources in ([files / T, file], [files]):
            with pytest.raises(ModelError, match=f"{name} is {kind.strip()}") as caught:
                choose(sources)
            assert caught.value.exit_code == 3
        file.unlink()


ENDINGS = [".part", ".crdownload", ".incomplete", ".PART", ".download", ".!qB", ".aria2", ".filepart", ".xltd", ".bc!"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_unfinished_download_is_named_where_it_is_missing_and_no_hindrance_elsewhere(files, ending):
    shutil.copy(files / V, files / f"more.safetensors{ending}")
    assert choose([files]).components.keys() == COMPONENTS.keys()
    (files / V).unlink()
    with pytest.raises(ModelError, match=rf"also vae.*|more\.safetensors\{ending} is still downloading") as caught:
        choose([files])
    assert "still downloading" in str(caught.value)


def test_a_file_beside_the_record_of_its_download_is_unfinished(files):
    (files / f"{V}.aria2").write_bytes(b"\0\1")
    with pytest.raises(ModelError, match=r"ae\.safetensors is still downloading"):
        choose([files / V])


@pytest.mark.parametrize("cut", [9, 100, 40_000, -1])
def test_a_file_that_ends_too_early_is_unfinished_and_no_hindrance_under_any_other_name(files, cut):
    half = (files / V).read_bytes()[:cut]
    for name in ("ae.safetensors.mine", "tmpabc", "ae.safetensors~"):
        (files / name).write_bytes(half)
        with pytest.raises(ModelError, match=r"it ends after [\d,]+ of [\d,]+ bytes, as an unfinished.*; wait for"):
            choose([files / T, files / C, files / E, files / name])
    assert choose([files]).components["vae"].source.path == files / V
    (files / V).unlink()
    (files / V).write_bytes(half)
    with pytest.raises(ModelError, match=rf"{V} cannot be read: .* \(it ends after"):
        choose([files])


def test_a_file_that_ends_in_zeros_is_doubted(files, tmp_path, model):
    """Some programs allot the whole length at once."""
    data = (files / V).read_bytes()
    (files / V).unlink()
    (files / V).write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    report = convert([files], tmp_path / "out", tokenizers=TOKENIZERS)
    assert [note for note in report.notes if f"{V} ends in zeros, as an unfinished download does" in note]


def firefox(folder: Path, half: bytes) -> None:
    (folder / V).write_bytes(b"")
    (folder / "ae.Xy12ab.safetensors.part").write_bytes(half)


def safari(folder: Path, half: bytes) -> None:
    (folder / f"{V}.download").mkdir()
    (folder / f"{V}.download" / V).write_bytes(half)
    (folder / f"{V}.download" / "Info.plist").write_bytes(b"bplist00")


def hugging_face(folder: Path, half: bytes) -> None:
    (place := folder / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (place / "abc=.0123.incomplete").write_bytes(half)


@pytest.mark.parametrize("program", [firefox, safari, hugging_face])
def test_the_places_of_half_downloads_of_each_program_are_known(files, program):
    half = (files / V).read_bytes()[:40_000]
    if program is not firefox:
        program(files, half)
        assert choose([files]).components["vae"].source.path == files / V
        shutil.rmtree(files / (".cache" if program is hugging_face else f"{V}.download"))
    (files / V).unlink()
    program(files, half)
    with pytest.raises(ModelError, match=r"is still downloading.*; wait for the download"):
        choose([files])


def test_a_file_that_only_icloud_has_is_named(files):
    (files / V).unlink()
    (files / f".{V}.icloud").write_bytes(b"bplist00")
    with pytest.raises(ModelError, match=rf"{V}\.icloud is kept in iCloud"):
        choose([files])


@pytest.mark.parametrize("name", ["ae.SAFETENSORS", "ae.sft", "ae.gguf", "ae.bin", "ae", "ae.safetensors.bak"])
def test_first_bytes_decide_and_not_the_ending(files, name):
    (files / V).rename(files / name)
    for sources in ([files], [files / f for f in (T, C, E, name)]):
        assert choose(sources).components["vae"].source.path == files / name


def test_an_archive_in_ones_own_folder_is_passed_over(files):
    (files / "model.ckpt").write_bytes(KINDS["a pickle"])
    (files / "notes.txt").write_text("mine")
    assert choose([files]).notes == []


# --- hidden files ---


def hidden_of(folder: Path) -> None:
    for file in [p for p in folder.rglob("*") if p.is_file()]:
        (file.parent / f"._{file.name}").write_bytes(b"\x00\x05\x16\x07" + bytes(4000))
        (file.parent / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / ".hidden").mkdir()
    shutil.copy(derived.single_files() / V, folder / ".hidden")


def test_hidden_files_are_skipped_in_every_kind_of_folder(files, tmp_path, model):
    pipeline = Path(shutil.copytree(PIPELINE, tmp_path / "pipeline"))
    ours = Path(shutil.copytree(model, tmp_path / "ours"))
    for folder in (files, pipeline, ours):
        before = [source.files for source in open_sources([folder])]
        hidden_of(folder)
        assert [source.files for source in open_sources([folder])] == before


# --- sets and indexes ---

SETS = {
    "numbered from one": ("ae-{:05d}-of-{:05d}.safetensors", 1),
    "numbered from zero": ("ae-{:05d}-of-{:05d}.safetensors", 0),
    "in capitals": ("ae-{:05d}-OF-{:05d}.SAFETENSORS", 1),
    "with other marks": ("ae_{}_of_{}.sft", 1),
    "without an ending": ("ae.{}of{}", 1),
    "with a variant": ("ae-{:05d}-of-{:05d}.fp16.safetensors", 1),
    "in round brackets": ("ae ({} of {}).safetensors", 1),
    "in square brackets": ("ae[{}of{}].safetensors", 1),
    "of many digits": ("ae-{:08d}-of-{:08d}.safetensors", 1),
    "after the ending": ("ae.safetensors.part{}of{}", 1),
    "with a copy's mark": ("ae-{}-of-{} (1).safetensors", 1),
}


@pytest.mark.parametrize("kind", SETS)
def test_a_set_is_joined_without_an_index_and_a_missing_part_is_named(files, kind):
    pattern, first = SETS[kind]
    whole = tensors(files / V).keys()
    parts = split(files, pattern, first=first)
    for sources in ([files], [*(files / f for f in (T, C, E)), *parts], [files / T, files / C, files / E, parts[1]]):
        source = choose(sources).components["vae"].source
        assert (source.files, source.tensors.keys()) == (tuple(parts), whole)
    (away := files.parent / "away").mkdir()
    moved = Path(shutil.move(parts[-1], away))
    for sources in ([files], [parts[0]], [files / T, *parts[:-1]]):
        with pytest.raises(ModelError, match=re.escape(f"lacks the shard {parts[-1].name}, part {2 + first} of 3")):
            choose(sources)
    rest = [files / T, files / C, files / E]
    for sources in ([*rest, *parts[:-1], moved], [files, moved], [*rest, parts[0], away]):
        assert choose(sources).components["vae"].source.tensors.keys() == whole


@pytest.mark.parametrize("mark", [" (1)", " copy", " - Copy", " copy 2"])
def test_a_part_that_was_downloaded_twice_is_no_hindrance(files, mark):
    parts = split(files, "ae-{:05d}-of-{:05d}.safetensors")
    shutil.copy(parts[1], parts[1].with_name(f"{parts[1].stem}{mark}.safetensors"))
    assert choose([files]).components["vae"].source.files == tuple(parts)


def test_shards_of_any_names_are_joined_by_their_index(files):
    parts = split(files, "part-{0}.safetensors", count=2, index="ae.safetensors.index.json")
    assert choose([files]).components["vae"].source.files == tuple(parts)
    parts[1].unlink()
    with pytest.raises(ModelError, match=r"lacks the shard part-2\.safetensors"):
        choose([files])


LIES = {
    "a tied tensor": lambda m: m | {"decoder.tied.weight": next(iter(m.values()))},
    "too little": lambda m: dict(list(m.items())[3:]),
    "another shard": lambda m: dict(zip(m, reversed(m.values()), strict=True)),
    "a path outside": lambda m: dict.fromkeys(m, "../ae-00001-of-00003.safetensors"),
    "a shard that was never there": lambda m: m | {"x": "ae-00009-of-00009.safetensors"},
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_only_orders_and_its_contradictions_are_named(files, lie):
    whole = tensors(files / V).keys()
    split(files, "ae-{:05d}-of-{:05d}.safetensors", index="ae.safetensors.index.json")
    edit_json_index(files, LIES[lie])
    choice = choose([files])
    assert choice.components["vae"].source.tensors.keys() == whole
    assert len(choice.notes) == (lie != "a path outside")


def test_an_index_of_shards_that_are_not_there_names_the_first(files, tmp_path):
    pipeline = Path(shutil.copytree(PIPELINE, tmp_path / "pipeline"))
    for shard in (pipeline / "transformer").glob("*.safetensors"):
        shard.unlink()
    for source in (pipeline, pipeline / "transformer"):
        with pytest.raises(ModelError, match=r"lacks the shard .*-00001-of-00002\.safetensors.*download it again"):
            choose([source])


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "", "\0"])
def test_a_damaged_index_is_no_hindrance(files, text):
    split(files, "ae-{:05d}-of-{:05d}.safetensors", index="ae.safetensors.index.json")
    (files / "ae.safetensors.index.json").write_text(text)
    assert len(choose([files]).components["vae"].source.files) == 3


def test_a_merged_file_beside_a_left_over_index_is_read_and_the_index_said_to_be_wrong(files):
    whole = (files / V).read_bytes()
    for part in split(files, "ae-{:05d}-of-{:05d}.safetensors", index="ae.safetensors.index.json"):
        part.unlink()
    (files / V).write_bytes(whole)
    choice = choose([files])
    assert choice.components["vae"].source.files == (files / V,)
    assert [note for note in choice.notes if "index.json is wrong about" in note]


def test_an_index_with_a_byte_order_mark_is_read(files):
    split(files, "part-{0}.safetensors", index="ae.safetensors.index.json")
    index = files / "ae.safetensors.index.json"
    index.write_bytes(b"\xef\xbb\xbf" + index.read_bytes())
    assert choose([files]).notes == []


def test_a_gguf_in_parts_is_joined_and_one_that_calls_itself_a_part_is_not_whole(files):
    arrays = {n: mx.array(a) for n, a in mx.load(str(files / T)).items()}
    names = sorted(arrays)

    def save(path: Path, kept: list[str], number: int) -> Path:
        def add(writer: gguf.GGUFWriter) -> None:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", 2)

        foreign.save_gguf(path, {n: arrays[n] for n in kept}, "F32", add=add)
        return path

    parts = [save(files / f"flux1-tiny-0000{k + 1}-of-00002.gguf", names[k::2], k) for k in range(2)]
    (files / T).unlink()
    assert choose([files]).components["transformer"].source.files == tuple(parts)
    save(files / "flux.gguf", names[::2], 0)
    with pytest.raises(ModelError, match=r"flux\.gguf is part 1 of 2"):
        choose([files / "flux.gguf"])


# --- variants and order ---

VARIANTS = ["ae.fp16.safetensors", "ae_fp16.safetensors", "AE-F16.sft", "ae.bf16.safetensors", "ae-float16.safetensors"]


@pytest.mark.parametrize("name", VARIANTS)
def test_of_variants_in_one_argument_the_most_precise_is_taken_and_it_is_said(files, name):
    halved(files / V, files / name)
    choice = choose([files])
    assert choice.components["vae"].source.path == files / V
    assert [note for note in choice.notes if "most precise" in note and name in note]


def test_of_variants_with_indexes_of_their_own_the_most_precise_is_taken(tmp_path):
    source = Path(shutil.copytree(PIPELINE, tmp_path / "source"))
    folder = source / "transformer"
    shards = sorted(folder.glob("*.safetensors"))
    for shard in shards:
        halved(shard, folder / shard.name.replace("_model-", "_model.fp16-"))
    index = next(folder.glob("*.index.json"))
    text = index.read_text().replace("_model-", "_model.fp16-")
    (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(text)
    choice = choose([source])
    assert choice.components["transformer"].source.files == tuple(shards)
    assert len(choice.notes) == 1


@pytest.mark.parametrize("name", ["other.safetensors", "ae2.safetensors", "ae-v2.safetensors", "ae_1.safetensors"])
def test_two_models_in_one_argument_are_refused_and_both_named(files, name):
    shutil.copy(files / V, files / name)
    with pytest.raises(ModelError, match=r"two different models as vae: .*one by one"):
        choose([files])


@pytest.mark.parametrize("first", [True, False])
def test_of_two_arguments_the_later_counts_and_it_is_said(files, tmp_path, first):
    other = halved(files / V, tmp_path / "mine.safetensors")
    shutil.copy(files / "config.json", tmp_path)
    choice = choose([other, files] if first else [files, other])
    assert choice.components["vae"].source.path == (files / V if first else other)
    (note,) = choice.notes
    assert note.startswith(f"vae: {files / V if first else other} replaces")


def test_stems_forget_precision_and_nothing_else():
    same = ["flux1-krea-dev.safetensors", "flux1-krea-dev-Q4_K_S.gguf", "FLUX1-krea-dev_fp8_scaled.safetensors",
            "svdq-int4_r32-flux.1-krea-dev.safetensors", "flux1-krea-dev-00001-of-00003.fp16.safetensors",
            "flux1-krea-dev-nvfp4.safetensors", "flux1-krea-dev-Q8_0.gguf", "flux1-krea-dev-IQ4_NL.gguf",
            "flux1_krea_dev-4bit.safetensors", "flux1-krea-dev_fp8_e4m3fn.safetensors"]  # fmt: skip
    assert {sets.stem(name) for name in same} == {"flux1kreadev"}
    others = ["flux1-dev.safetensors", "flux1-krea-dev-v2.safetensors", "flux1-krea-dev-2.safetensors",
              "flux1-krea-dev-ema.safetensors", "flux1-krea-dev-kontext.gguf"]  # fmt: skip
    assert len({sets.stem(name) for name in [*others, same[0]]}) == 6


# --- places ---


def in_comfyui(root: Path) -> Path:
    return foreign.write(derived_model(), root / "ComfyUI" / "models", "ComfyUI").parent


def derived_model() -> Path:
    from mlx_flux_krea import nano

    return nano.FOLDER


def in_old_comfyui(root: Path) -> Path:
    """With the names of folders of before."""
    root = in_comfyui(root)
    (root / "models" / "diffusion_models").rename(root / "models" / "unet")
    (root / "models" / "text_encoders").rename(root / "models" / "clip")
    (root / "models" / "transformer").mkdir()
    return root


def in_capitals(root: Path) -> Path:
    """A pipeline on a disk that ignores capitals."""
    pipeline = Path(shutil.copytree(PIPELINE, root / "Pipeline"))
    for name in COMPONENTS:
        (pipeline / name).rename(pipeline / name.upper())
    return pipeline


def in_forge(root: Path) -> Path:
    source = foreign.write(derived_model(), root / "raw", "ComfyUI")
    names = {"diffusion_models": "Stable-diffusion", "text_encoders": "text_encoder", "vae": "VAE"}
    for old, new in names.items():
        (root / "forge" / "models" / new).parent.mkdir(parents=True, exist_ok=True)
        (source / old).rename(root / "forge" / "models" / new)
    shutil.rmtree(source)
    return root / "forge"


def in_invokeai(root: Path) -> Path:
    source = foreign.write(derived_model(), root / "raw", "ComfyUI")
    for number, file in enumerate(sorted(source.rglob("*.safetensors"))):
        folder = root / "invokeai" / "models" / f"{number:08x}-0000" / "deep"
        folder.mkdir(parents=True)
        shutil.copy(file.parent / "config.json", folder)
        file.rename(folder / file.name)
    shutil.rmtree(source)
    return root / "invokeai"


def in_hub(root: Path) -> Path:
    """With an older commit beside that of main."""
    repo = root / "hub" / "models--owner--flux"
    for commit in ("0" * 40, COMMIT):
        shutil.copytree(PIPELINE, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return repo


PLACES = {
    "ComfyUI's root": in_comfyui,
    "ComfyUI's models": lambda root: in_comfyui(root) / "models",
    "ComfyUI's root of before": in_old_comfyui,
    "ComfyUI's models of before": lambda root: in_old_comfyui(root) / "models",
    "a pipeline in capitals": in_capitals,
    "Forge's root": in_forge,
    "InvokeAI's root": in_invokeai,
    "a repository in the hub's cache": in_hub,
    "the hub's cache": lambda root: in_hub(root).parent,
    "a snapshot": lambda root: in_hub(root) / "snapshots" / COMMIT,
    "mflux's folder": lambda root: foreign.write(derived_model(), root / "mflux", "mflux"),
    "a folder of pipelines": lambda root: in_hub(root) / "snapshots" / COMMIT / "..",
}


@pytest.mark.parametrize("place", [p for p in PLACES if p != "a folder of pipelines"])
def test_trees_of_programs_are_walked(tmp_path, place):
    root = PLACES[place](tmp_path)
    (link := tmp_path / "link").symlink_to(root)
    for path in (root, link):
        choice = choose([path])
        assert choice.components.keys() == COMPONENTS.keys()
        assert all(root.resolve() in one.source.path.resolve().parents for one in choice.components.values())


def test_other_models_in_a_tree_are_passed_over_and_it_is_said(tmp_path):
    root = in_comfyui(tmp_path)
    folder = root / "models" / "checkpoints"
    folder.mkdir()
    foreign.save(folder / "sdxl.safetensors", {"conditioner.embedders.0.x": ("F16", (1,), bytes(2))})
    (folder / "pony.safetensors").write_bytes(KINDS["a web page"])
    (folder / "old.ckpt").write_bytes(KINDS["a pickle"])
    (folder / "loop").symlink_to(root)
    choice = choose([root])
    assert choice.components.keys() == COMPONENTS.keys()
    assert [note for note in choice.notes if "sdxl.safetensors is Stable Diffusion XL" in note]


def test_a_tree_without_a_component_says_what_was_passed_over(tmp_path):
    root = in_comfyui(tmp_path)
    shutil.rmtree(root / "models" / "vae")
    (root / "models" / "vae").mkdir()
    (root / "models" / "vae" / "ae.safetensors").write_bytes(KINDS["a pointer of Git LFS"])
    with pytest.raises(ModelError, match=r"ae\.safetensors is a pointer of Git LFS.*also vae; fetch the file"):
        choose([root])


OTHERS = {
    "StableDiffusionXLPipeline": '{"_class_name": "StableDiffusionXLPipeline"}',
    "ChromaPipeline": '{"_class_name": "ChromaPipeline"}',
    "StableDiffusion3Pipeline": '{"_class_name": "StableDiffusion3Pipeline"}',
    "a pipeline of Stable Diffusion": None,
}


@pytest.mark.parametrize("kind", OTHERS)
def test_the_encoders_of_another_models_pipeline_are_not_taken(tmp_path, kind):
    """Its CLIP has the names and sizes of FLUX.1's."""
    root = tmp_path / "models"
    shutil.copytree(PIPELINE, root / "flux")
    other = Path(shutil.copytree(PIPELINE, root / "a" / "other"))
    (other / "model_index.json").unlink()
    if text := OTHERS[kind]:
        (other / "model_index.json").write_text(text)
    else:
        (other / "transformer").rename(other / "unet")
        (other / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    components = choose([root]).components
    assert all(root / "flux" in one.source.path.parents or one.source.path.parent == root / "flux"
               for one in components.values())  # fmt: skip
    with pytest.raises(ModelError, match=f"is a.*{kind.removeprefix('a ')}.*; name the folder"):
        choose([other])


def test_of_snapshots_the_one_with_weights_is_taken_and_half_of_one_is_said_to_be_coming(tmp_path):
    """Programs that ask for a configuration alone leave snapshots without weights."""
    repo = in_hub(tmp_path)
    whole, main = repo / "snapshots" / ("0" * 40), repo / "snapshots" / COMMIT
    for file in main.rglob("*.safetensors"):
        file.unlink()
    assert all(whole in one.source.path.parents or one.source.path.parent == whole
               for one in choose([repo]).components.values())  # fmt: skip
    shutil.rmtree(whole / "vae")
    (repo / "blobs").mkdir()
    (repo / "blobs" / "abc.incomplete").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"abc\.incomplete is still downloading.*also vae; wait for"):
        choose([repo])
    (whole / "vae").mkdir()
    (whole / "vae" / "x.safetensors").symlink_to("../../../blobs/abc")
    with pytest.raises(ModelError, match=r"x\.safetensors is a link to nothing; expected a file; download it again"):
        choose([repo])


def test_draw_things_models_are_named(tmp_path):
    (folder := tmp_path / "Documents" / "Models").mkdir(parents=True)
    (folder / "flux_1_krea_dev_q8p.ckpt").write_bytes(KINDS["an SQLite database, as Draw Things"])
    for path in (folder.parent, folder, folder / "flux_1_krea_dev_q8p.ckpt"):
        with pytest.raises(ModelError, match="is an SQLite database, as Draw Things keeps its models"):
            choose([path])


def test_a_folder_with_too_much_in_it_is_refused(tmp_path, monkeypatch):
    from mlx_flux_krea.convert import walk

    monkeypatch.setattr(walk, "_MOST", 3)
    for name in "abcd":
        (tmp_path / name).write_text("x")
    with pytest.raises(ModelError, match=r"more than 3 files.*nearer"):
        choose([tmp_path])


# --- the hub ---


ONE_FILE = """
from mlx_flux_krea.convert import fetch, hub
from mlx_flux_krea.errors import ModelError
print([file.name for file in hub.look("owner/name:sub/ae.safetensors").files])
with fetch.outlined(["owner/name:sub/ae.safetensors"], offline=False) as remote:
    print(remote.paths[0].name, len(remote.files))
try:
    hub.look("owner/name:x.gguf")
except ModelError as error:
    print(error)
fetch._RANGE = 40_000
print(fetch.fetch(hub.look("owner/name:x-1.gguf"), ["x-1.gguf"]) / "x-1.gguf")
"""


def test_one_file_of_a_repository_can_be_named_and_a_long_one_arrives_in_several_ranges(tmp_path, files):
    """And after a cut, the rest."""
    folder, data = tmp_path / "repo", np.random.default_rng(0).bytes(300_000)
    (folder / "sub").mkdir(parents=True)
    for name in (T, V, "config.json"):
        shutil.copy(files / name, folder / "sub" / name)
    (folder / "x-1.gguf").write_bytes(data)
    with Hub(folder, "owner/name") as served:
        served.cut_after = [10**9] * 2 + [40_000] * 5 + [10_000]
        env = {**os.environ, **served.env(tmp_path)}
        ran = subprocess.run([sys.executable, "-c", ONE_FILE], env=env, capture_output=True, text=True, check=True)
        begun = served.begun_at("x-1.gguf")
    listed, outlined, refused, place = ran.stdout.splitlines()
    assert listed == str(["sub/ae.safetensors", "sub/config.json"])
    assert outlined == "ae.safetensors 1"
    assert "owner/name holds no file x.gguf; expected one of sub/ae.safetensors, sub/flux1" in refused
    assert Path(place).read_bytes() == data
    assert {40_000, 80_000, 280_000} <= {*begun}
    assert begun.count(0) == 1, "the beginning was fetched again"


def test_of_variants_on_the_hub_the_largest_is_fetched():
    names = {"transformer/a.safetensors": 9, "transformer/a.fp16.safetensors": 5, "vae/m.safetensors": 3, "ae.sft": 1}
    assert hub._needed(names, names) == ["transformer/a.safetensors", "vae/m.safetensors"]


# --- all the way ---

WHOLE = ["ComfyUI's root", "InvokeAI's root", "a repository in the hub's cache"]


@pytest.mark.slow
@pytest.mark.parametrize("place", WHOLE)
def test_a_tree_gives_the_bits_of_its_files(tmp_path, place, model):
    root = PLACES[place](tmp_path / "tree")
    tokenizers = TOKENIZERS if "hub" in place else derived_model()
    path = convert([root], tmp_path / "out", dtype="float32", tokenizers=tokenizers).path
    foreign.assert_same(path, foreign.arrays_of(model if "hub" in place else derived_model()))


def test_sets_and_later_arguments_are_converted_to_the_bits_of_the_plain_files(files, tmp_path, model):
    split(files, "ae-{:05d}-of-{:05d}.SFT")
    better = tmp_path / "better.safetensors"
    arrays = {n: mx.array(a) for n, a in mx.load(str(files / T)).items()}
    foreign.save(better, {n: foreign.plain(a, "F32") for n, a in arrays.items()})
    foreign.save(files / "other.safetensors", {n: foreign.plain(a * 2, "F32") for n, a in arrays.items()})
    os.replace(files / "other.safetensors", files / T)
    shutil.copy(files / "config.json", tmp_path)
    report = convert([files, better], tmp_path / "out", dtype="float32", tokenizers=TOKENIZERS)
    foreign.assert_same(report.path, foreign.arrays_of(model))
    assert [note for note in report.notes if note.startswith(f"transformer: {better} replaces")]


def test_a_header_is_looked_at_and_no_more(tmp_path):
    """A sparse file of 24 GB."""
    file = tmp_path / "big.safetensors"
    size = 24 * 10**9
    header = json.dumps({"img_in.weight": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    with open(file, "wb") as sparse:
        sparse.write(struct.pack("<Q", len(header)) + header)
        sparse.truncate(8 + len(header) + size)
    assert first_bytes.look(file) is first_bytes.SAFETENSORS
    (source,) = open_sources([file])
    assert source.tensors["img_in.weight"].bytes == size


@pytest.mark.parametrize("way", [".", "..", "./", "sub/..", "../inside", "{absolute}/."])
def test_a_folder_is_opened_by_any_way_to_it(tmp_path, monkeypatch, way):
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    held = {"a": foreign.plain(mx.zeros((2, 2)), "F32")}
    foreign.save(inside / "one.safetensors", held)
    foreign.save(tmp_path / "two.safetensors", held)
    monkeypatch.chdir(inside)
    found = {file.name for source in open_sources([Path(way.format(absolute=inside))]) for file in source.files}
    assert found == {"one.safetensors", *(["two.safetensors"] if way == ".." else [])}
