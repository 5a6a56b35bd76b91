"""Every layout of this issue into the same folder; what is damaged, incomplete or something else is refused by name."""

import filecmp
import itertools
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import PIPELINE, SINGLE_FILES, TOKENIZERS, edit_json, edit_tensors, levels, without_guidance
from mlx_flux_krea.convert import convert, layouts, maps, remap, write
from mlx_flux_krea.convert.sources import open_sources
from safetensors import safe_open

from mlx_flux_krea import FluxPipeline
from mlx_flux_krea import config as configs
from mlx_flux_krea.errors import ModelError, ResourceError, UsageError
from mlx_flux_krea.weights import COMPONENTS, open_model, read_header


@pytest.fixture
def source(tmp_path):
    """A copy of the diffusers folder, to be damaged."""
    return Path(shutil.copytree(PIPELINE, tmp_path / "source"))


@pytest.fixture
def singles(tmp_path):
    """A copy of the single files with their config.json."""
    folder = tmp_path / "files"
    shutil.copytree(SINGLE_FILES[0].parent, folder)
    return folder


def run(*sources, **options):
    return convert(sources, dtype="float32", tokenizers=TOKENIZERS, **options)


def weight_files(folder: Path) -> list[str]:
    return sorted(
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.name != "manifest.json" and p.parent != folder
    )


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


# --- the same content from every layout ---


def test_single_files_and_the_diffusers_folder_give_the_same_bytes_and_picture(model, singles, tmp_path):
    other = run(*sorted(singles.glob("*.safetensors")), out=tmp_path / "other").path
    assert weight_files(model) == weight_files(other)
    assert filecmp.cmpfiles(model, other, weight_files(model), shallow=False) == (weight_files(model), [], [])
    call = {"prompt": "a cat", "seed": 1, "height": 32, "width": 48, "num_inference_steps": 2}
    pictures = [FluxPipeline.from_pretrained(folder)(**call).images[0] for folder in (model, other)]
    assert levels(*pictures) == 0


def test_a_folder_of_single_files_is_read_like_the_files(model, singles, tmp_path):
    other = run(singles, out=tmp_path / "other").path
    assert filecmp.cmpfiles(model, other, weight_files(model), shallow=False)[1:] == ([], [])


def test_converting_twice_gives_the_same_bytes(source, tmp_path):
    a, b = run(source, out=tmp_path / "a").path, run(source, out=tmp_path / "b").path
    names = [*weight_files(a), "manifest.json", "model_index.json"]
    assert filecmp.cmpfiles(a, b, names, shallow=False)[1:] == ([], [])


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_prefixes_are_taken_off(model, singles, tmp_path, prefix):
    file = singles / "flux1-tiny.safetensors"
    edit_tensors(file, lambda arrays: [arrays.update({prefix + n: arrays.pop(n)}) for n in list(arrays)])
    other = run(singles, out=tmp_path / "other").path
    assert filecmp.cmpfiles(model, other, weight_files(model), shallow=False)[1:] == ([], [])


def test_newer_names_of_norms_and_of_clip_are_read(model, singles, tmp_path):
    def norms(arrays):
        for name in [n for n in arrays if n.endswith("_norm.scale")]:
            arrays[name.replace(".scale", ".weight")] = arrays.pop(name)

    def transformers_5(arrays):
        for name in list(arrays):
            arrays[name.removeprefix("text_model.")] = arrays.pop(name)

    edit_tensors(singles / "flux1-tiny.safetensors", norms)
    edit_tensors(singles / "clip_l.safetensors", transformers_5)
    other = run(singles, out=tmp_path / "other").path
    assert filecmp.cmpfiles(model, other, weight_files(model), shallow=False)[1:] == ([], [])


def test_tensors_left_out_on_purpose_are_reported(singles, tmp_path):
    def add(arrays):
        arrays["encoder.embed_tokens.weight"] = arrays["shared.weight"] + 0

    edit_tensors(singles / "t5xxl.safetensors", add)
    report = run(singles, out=tmp_path / "other")
    t5 = next(c for c in report.components if c.name == "text_encoder_2")
    assert t5.dropped == (("encoder.embed_tokens.weight", "a second copy of shared.weight"),)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_stored_in_the_type_asked_for(source, tmp_path, dtype):
    path = convert([source], tmp_path / "out", dtype=dtype, tokenizers=TOKENIZERS).path
    folder = open_model(path)
    original = mx.load(str(PIPELINE / "vae" / "diffusion_pytorch_model.safetensors"))["decoder.conv_in.weight"]
    stored = mx.load(str(path / "vae" / "model-00001-of-00001.safetensors"))["decoder.conv_in.weight"]
    assert folder.dtypes == dict.fromkeys(COMPONENTS, dtype)
    assert mx.array_equal(stored, original.astype(getattr(mx, dtype)).transpose(0, 2, 3, 1))


def test_mixed_types_in_one_file_are_read_each_as_what_it_is(singles, tmp_path):
    """The published files do mix them."""

    def mix(arrays):
        for i, name in enumerate(sorted(arrays)):
            arrays[name] = arrays[name].astype((mx.float32, mx.bfloat16, mx.float16)[i % 3])

    edit_tensors(singles / "flux1-tiny.safetensors", mix)
    path = run(singles, out=tmp_path / "out").path
    mixed = mx.load(str(singles / "flux1-tiny.safetensors"))
    for shard in sorted((path / "transformer").glob("*.safetensors")):
        for name, array in mx.load(str(shard)).items():
            assert mx.array_equal(array, mixed[name].astype(mx.float32)), name


# --- the folder ---


def test_shards_can_be_read_by_the_safetensors_library_in_the_order_of_the_blocks(model):
    names = []
    for shard in sorted((model / "transformer").glob("*.safetensors")):
        infos, metadata = read_header(shard)
        starts = [info.start for info in infos.values()]
        assert starts == sorted(starts)
        assert metadata == {"format": "mlx"}
        names.append(list(infos))
        with safe_open(shard, "numpy") as file:
            for name in infos:
                assert file.get_tensor(name).shape == infos[name].shape
    modulation, rest = names
    assert all("mod" in n.lower() for n in modulation)
    assert not any("_mod." in n or "modulation" in n for n in rest)
    blocks = [n.split(".")[:2] for n in rest if "_blocks." in n]
    changes = sum(a != b for a, b in itertools.pairwise(blocks))
    assert changes == 4  # 2 double and 3 single blocks, each in one piece


def test_a_shard_never_ends_inside_a_block(source, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "SHARD_BYTES", 100_000)
    path = run(source, out=tmp_path / "out").path
    where = {}
    for shard in sorted((path / "transformer").glob("*.safetensors")):
        for name in read_header(shard)[0]:
            part = "modulation" if any(m in name for m in write._MODULATION) else "rest"
            where.setdefault((write._block(name), part), set()).add(shard.name)
    assert len({s for shards in where.values() for s in shards}) > 5
    assert {block: shards for block, shards in where.items() if len(shards) > 1} == {}
    assert FluxPipeline.from_pretrained(path)("a", seed=1, height=32, width=32, num_inference_steps=1).images


def test_the_manifest_names_every_file_with_its_hash(model):
    manifest = json.loads((model / "manifest.json").read_text())
    files = {p.relative_to(model).as_posix(): p for p in model.rglob("*") if p.is_file() and p.name != "manifest.json"}
    assert manifest.keys() == files.keys()
    for name, path in files.items():
        assert manifest[name] == {"sha256": write.sha256(path), "bytes": path.stat().st_size}


def test_the_index_says_what_the_model_was_made_from(model):
    index = open_model(model).index
    assert index.base == "FLUX architecture, other sizes"
    assert index.filters == "none"
    assert index.max_sequence_length == 512
    assert {s.file.split("/")[0] for s in index.source} == set(COMPONENTS)
    by_name = {s.file: s for s in index.source}
    vae = PIPELINE / "vae" / "diffusion_pytorch_model.safetensors"
    assert by_name["vae/diffusion_pytorch_model.safetensors"].sha256 == write.sha256(vae)


@pytest.mark.parametrize(
    ("names", "config", "base", "guidance", "license"),
    [
        (["flux1-krea-dev.safetensors"], configs.FLUX_DEV, "FLUX.1 Krea [dev]", 4.5, "flux-1-dev-non-commercial"),
        (
            ["models--black-forest-labs--flux.1-krea-dev", "abc"],
            configs.FLUX_DEV,
            "FLUX.1 Krea [dev]",
            4.5,
            "flux-1-dev-non-commercial",
        ),
        (["flux1-dev.safetensors"], configs.FLUX_DEV, "FLUX.1 [dev]", 3.5, "flux-1-dev-non-commercial"),
        (["flux1-krea-lookalike"], configs.FLUX_SCHNELL, "FLUX.1 [schnell]", 0.0, "apache-2.0"),
    ],
)
def test_the_family_follows_from_sizes_and_names(names, config, base, guidance, license):
    from mlx_flux_krea.convert import _family

    family = _family(config, names)
    assert (family.base, family.defaults.guidance_scale, family.license) == (base, guidance, license)


def test_schnells_kind_is_converted_with_its_schedule(tmp_path):
    path = run(without_guidance(tmp_path / "source"), out=tmp_path / "out").path
    folder = open_model(path)
    assert folder.index.schedule.shift == "none"
    assert not folder.sizes["transformer"].guidance_embed


# --- full scale, names and shapes only ---


def test_the_tables_fill_the_published_sizes_completely():
    """Our names back through each table give exactly the names of that layout, 780, 1160 and 244 of them."""

    def names_of(table, component, config):
        last = len(config.ch_mult) - 1 if component == "vae" else 0
        return [n for name in layouts.target_shapes(component, config) for n in remap._find_row(name, table, last)[0]]

    bfl = names_of(maps.FLUX_BFL, "transformer", configs.FLUX_DEV)
    diffusers = names_of(maps.FLUX_DIFFUSERS, "transformer", configs.FLUX_DEV)
    assert (len(bfl), len(set(bfl))) == (780, 780)
    assert (len(diffusers), len(set(diffusers))) == (1160, 1160)
    assert not any("{" in n or "*" in n for n in bfl + diffusers)
    vae = names_of(maps.VAE_DIFFUSERS, "vae", configs.FLUX_VAE)
    assert (len(vae), len(set(vae))) == (244, 244)
    assert "decoder.up_blocks.3.resnets.2.conv2.weight" in vae


# --- what is refused ---


def damage(source: Path, how: str) -> None:
    transformer = source / "transformer"
    shard = sorted(transformer.glob("*.safetensors"))[0]
    vae = source / "vae" / "diffusion_pytorch_model.safetensors"
    data = vae.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    if how == "missing component":
        shutil.rmtree(source / "vae")
    elif how == "missing tensor":
        edit_tensors(vae, lambda a: a.pop("decoder.conv_in.bias"))
    elif how == "unknown tensor":
        edit_tensors(vae, lambda a: a.update({"decoder.extra": mx.zeros((1,))}))
    elif how == "wrong shape":
        edit_tensors(vae, lambda a: a.update({"decoder.conv_in.bias": mx.zeros((33,))}))
    elif how == "truncated":
        vae.write_bytes(data[:-1000])
    elif how == "header larger than the file":
        vae.write_bytes(struct.pack("<Q", len(data) * 2) + data[8:])
    elif how == "empty":
        vae.write_bytes(b"")
    elif how == "overlapping tensors":
        header = json.loads(data[8 : 8 + length])
        names = [n for n in header if n != "__metadata__"]
        same = (
            next(n for n in names[1:] if header[n]["shape"] == header[names[0]]["shape"])
            if len(names) > 1
            else names[0]
        )
        header[same]["data_offsets"] = header[names[0]]["data_offsets"]
        text = json.dumps(header).encode()
        vae.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    elif how == "NaN":
        edit_tensors(vae, lambda a: a.update({"decoder.conv_in.bias": a["decoder.conv_in.bias"] * float("nan")}))
    elif how == "missing shard":
        shard.unlink()
    elif how == "shard path outside":
        index = next(transformer.glob("*.index.json"))
        weights = json.loads(index.read_text())["weight_map"]
        edit_json(index, weight_map=dict.fromkeys(weights, "../vae/diffusion_pytorch_model.safetensors"))
    elif how == "index without its tensors":
        index = next(transformer.glob("*.index.json"))
        weights = json.loads(index.read_text())["weight_map"]
        edit_json(index, weight_map=weights | {"x_embedder.other": shard.name})
    elif how == "index is no JSON":
        next(transformer.glob("*.index.json")).write_text("{")
    elif how == "two shards with one tensor":
        first, second = sorted(transformer.glob("*.safetensors"))
        arrays = mx.load(str(first))
        name = sorted(arrays)[0]
        array = arrays[name] + 0
        mx.eval(array)
        edit_tensors(second, lambda a: a.update({name: array}))
    elif how == "another VAE":
        edit_json(source / "vae" / "config.json", use_quant_conv=True)
    elif how == "another activation":
        edit_json(source / "text_encoder" / "config.json", hidden_act="gelu")
    elif how == "config without sizes":
        (source / "transformer" / "config.json").write_text("{}")
    elif how == "config of another size":
        edit_json(source / "transformer" / "config.json", num_layers=3)
    elif how == "config that contradicts itself":
        edit_json(source / "transformer" / "config.json", axes_dims_rope=[8, 12, 14])
    elif how == "fixed shift":
        edit_json(source / "scheduler" / "scheduler_config.json", use_dynamic_shifting=False, shift=3.0)
    elif how == "transformer in the place of the VAE":
        shutil.rmtree(source / "vae")
        shutil.copytree(source / "text_encoder", source / "vae")
    elif how == "pickle":
        vae.unlink()
        (source / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing component", "also vae"),
        ("missing tensor", "lacks decoder.conv_in.bias"),
        ("unknown tensor", "unknown tensor decoder.extra"),
        ("wrong shape", r"decoder.conv_in.bias has shape \[33\]"),
        ("truncated", "cannot be read: incomplete metadata"),
        ("header larger than the file", "cannot be read: invalid header length"),
        ("empty", "cannot be read: header too small"),
        ("overlapping tensors", "cannot be read: invalid"),
        ("NaN", "decoder.conv_in.bias holds NaN"),
        ("missing shard", "lacks the shard"),
        ("shard path outside", "names the file '../vae"),
        ("index without its tensors", "x_embedder.other is in"),
        ("index is no JSON", "cannot be read"),
        ("two shards with one tensor", "is in two shards"),
        ("another VAE", "use_quant_conv is True"),
        ("another activation", "hidden_act is 'gelu'"),
        ("config without sizes", "lacks 'num_attention_heads'"),
        ("config of another size", "lacks transformer_blocks.2"),
        ("config that contradicts itself", "axes_dim"),
        ("fixed shift", "fixed shift of 3.0"),
        ("transformer in the place of the VAE", "holds a CLIP text model; expected a vae"),
        ("pickle", "holds only diffusion_pytorch_model.bin"),
    ],
)
def test_a_damaged_source_is_refused_by_name_and_nothing_is_left(source, tmp_path, how, says):
    damage(source, how)
    with pytest.raises(ModelError, match=says) as caught:
        run(source, out=tmp_path / "out")
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert hidden(tmp_path) == []


def test_nan_is_accepted_where_it_is_allowed(source, tmp_path):
    damage(source, "NaN")
    path = run(source, out=tmp_path / "out", allow_nonfinite=True).path
    with pytest.raises(ModelError, match="the image decoder gave NaN"):
        FluxPipeline.from_pretrained(path)("a", seed=1, height=32, width=32, num_inference_steps=1)


def test_values_too_large_for_the_type_are_refused(source, tmp_path):
    edit_tensors(
        source / "vae" / "diffusion_pytorch_model.safetensors",
        lambda a: a.update({"decoder.conv_in.bias": a["decoder.conv_in.bias"] + 1e5}),
    )
    with pytest.raises(ModelError, match="too large for float16"):
        convert([source], tmp_path / "out", dtype="float16", tokenizers=TOKENIZERS)
    assert hidden(tmp_path) == []


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"double_stream_modulation_img.lin.weight": 2, "double_blocks.0.img_attn.qkv.weight": 2}, "is FLUX.2"),
        ({"distilled_guidance_layer.in_proj.weight": 2}, "is Chroma"),
        ({"transformer.x_embedder.lora_A.weight": 2}, "is a LoRA"),
        ({"redux_up.weight": 2}, "is FLUX.1 Redux"),
        ({"double_blocks.0.img_attn.qkv.weight.absmax": 1}, "bitsandbytes"),
        ({"something.else": 1}, "no layout that is known here"),
        ({}, "no layout that is known here"),
    ],
)
def test_look_alikes_are_refused_by_name(tmp_path, tensors, says):
    file = tmp_path / "file.safetensors"
    mx.save_safetensors(str(file), {n: mx.zeros((2,) * d) for n, d in tensors.items()} or {})
    with pytest.raises(ModelError, match=says):
        run(file, out=tmp_path / "out")


def test_a_types_that_cannot_be_decoded_is_named(singles, tmp_path):
    file = singles / "ae.safetensors"
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length].replace(b'"F32"', b'"U32"')
    file.write_bytes(data[:8] + header + data[8 + length :])
    with pytest.raises(ModelError, match="is stored as U32; expected one of F32, F16, BF16"):
        run(singles, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: None, "there is nothing at"),
        (lambda p: p.mkdir(), "holds no weights"),
        (lambda p: p.write_bytes(b"hello"), "cannot be read"),
        (lambda p: (p.mkdir(), (p / "model_index.json").write_text("{}")), "no component folder"),
        (lambda p: (p.mkdir(), (p / "model.ckpt").write_bytes(b"\x80")), "holds only model.ckpt"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path, make, says):
    make(tmp_path / "thing")
    with pytest.raises(ModelError, match=says):
        run(tmp_path / "thing", out=tmp_path / "out")


@pytest.mark.parametrize("name", ["a.ckpt", "a.pt", "a.bin", "a.pth"])
def test_pickles_are_never_opened(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "boom"),))

    import pickle

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError, match="is a pickle"):
        run(tmp_path / name, out=tmp_path / "out")
    assert not (tmp_path / "boom").exists()


def test_a_component_given_twice_is_refused(singles, tmp_path):
    shutil.copy(singles / "ae.safetensors", singles / "other.safetensors")
    with pytest.raises(ModelError, match="are both a vae"):
        run(singles, out=tmp_path / "out")


def test_sizes_that_shapes_do_not_tell_are_asked_for(singles, tmp_path):
    (singles / "config.json").unlink()
    with pytest.raises(ModelError, match=r"other sizes than the published.*config.json beside it"):
        run(singles, out=tmp_path / "out")


def test_our_own_config_beside_a_file_is_read_too(singles, tmp_path, model):
    apart = {}
    for file, component in (
        ("flux1-tiny", "transformer"),
        ("ae", "vae"),
        ("clip_l", "text_encoder"),
        ("t5xxl", "text_encoder_2"),
    ):
        apart[component] = tmp_path / component
        apart[component].mkdir()
        shutil.copy(singles / f"{file}.safetensors", apart[component])
        shutil.copy(model / component / "config.json", apart[component])
    other = run(*apart.values(), out=tmp_path / "other").path
    assert filecmp.cmpfiles(model, other, weight_files(model), shallow=False)[1:] == ([], [])


def test_tokenizers_are_asked_for_where_there_are_none(source, tmp_path):
    with pytest.raises(ModelError, match=r"no tokenizer was found.*vocab.json and merges.txt.*--tokenizers DIR"):
        convert([source], tmp_path / "out")
    with pytest.raises(ModelError, match="there is no folder"):
        convert([source], tmp_path / "out", tokenizers=tmp_path / "nowhere")
    shutil.copytree(TOKENIZERS / "tokenizer", tmp_path / "some" / "clip")
    with pytest.raises(ModelError, match="no tokenizer_2 was found"):
        convert([source], tmp_path / "out", tokenizers=tmp_path / "some")
    shutil.copytree(TOKENIZERS / "tokenizer_2", tmp_path / "some" / "t5")
    assert convert([source], tmp_path / "out", tokenizers=tmp_path / "some").path.exists()


def test_tokenizers_beside_the_source_and_in_the_hubs_cache_are_found(source, tmp_path):
    shutil.copytree(TOKENIZERS / "tokenizer", source / "tokenizer")
    cached = tmp_path / "hub" / "hub" / "models--black-forest-labs--FLUX.1-schnell"
    shutil.copytree(TOKENIZERS / "tokenizer_2", cached / "snapshots" / "abc" / "tokenizer_2")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    script = (
        "import sys; from mlx_flux_krea.convert import convert; "
        "print(convert([sys.argv[1]], sys.argv[2]).path)"
    )  # in a process of its own: huggingface-hub reads its environment once
    ran = subprocess.run(
        [sys.executable, "-c", script, source, tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out" / "tokenizer_2" / "tokenizer.json").exists()


def test_a_tokenizer_larger_than_its_encoder_is_refused(source, tmp_path):
    shutil.copytree(TOKENIZERS, tmp_path / "tokens")
    edit_json(tmp_path / "tokens" / "tokenizer" / "vocab.json", more=60_000)
    with pytest.raises(ModelError, match="60001 ids; expected at most the 49408"):
        convert([source], tmp_path / "out", tokenizers=tmp_path / "tokens")


# --- where it is written ---


def test_an_existing_target_is_kept_unless_it_is_to_be_replaced(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match=r"exists.*--force"):
        run(source, out=out)
    assert (out / "mine.txt").read_text() == "keep"
    damage(source, "NaN")
    with pytest.raises(ModelError):
        run(source, out=out, force=True)
    assert (out / "mine.txt").read_text() == "keep"  # a failed conversion replaces nothing
    run(PIPELINE, out=out, force=True)
    assert not (out / "mine.txt").exists()
    assert hidden(tmp_path) == []


def test_a_file_in_the_place_of_the_target_is_refused(source, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UsageError, match="is a file"):
        run(source, out=tmp_path / "out", force=True)


def test_without_a_target_the_model_goes_home(source, home):
    report = convert([source], dtype="bfloat16", tokenizers=TOKENIZERS)
    assert report.path == home / "models" / "source-bf16"
    assert FluxPipeline.from_pretrained("source-bf16").folder.path == report.path
    assert FluxPipeline.from_pretrained().folder.path == report.path


def test_a_disk_too_small_is_refused_before_the_first_byte(source, tmp_path, monkeypatch):
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(ResourceError, match=r"0.0 GB are free.*expected 0.1 GB") as caught:
        run(source, out=tmp_path / "out")
    assert caught.value.exit_code == 8
    assert hidden(tmp_path) == []


def test_a_disk_that_fills_up_leaves_nothing(source, tmp_path, monkeypatch):
    """A real limit on what the process may write, as a full disk is one."""
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from mlx_flux_krea.convert import convert\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
        "convert([sys.argv[1]], sys.argv[2], dtype='float32', tokenizers=sys.argv[3])\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, source, tmp_path / "out", TOKENIZERS],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode != 0
    assert "File too large" in ran.stderr
    assert not (tmp_path / "out").exists()
    assert hidden(tmp_path) == []


def test_a_killed_conversion_leaves_no_model_and_the_next_one_clears_up(source, tmp_path):
    command = [sys.executable, "-c", _KILLED, source, tmp_path / "out", TOKENIZERS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert len(hidden(tmp_path)) == 1
    run(source, out=tmp_path / "out")
    assert hidden(tmp_path) == []
    assert open_model(tmp_path / "out")


_KILLED = """
import sys, time
from mlx_flux_krea.convert import convert
def progress(component, done, total):
    print("writing", flush=True)
    time.sleep(60)
convert([sys.argv[1]], sys.argv[2], dtype="float32", tokenizers=sys.argv[3], progress=progress)
"""


def test_two_conversions_at_once_do_not_disturb_one_another(source, tmp_path):
    slow = _KILLED.replace("time.sleep(60)", "time.sleep(0.02)")
    command = [sys.executable, "-c", slow, source, tmp_path / "out", TOKENIZERS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "writing\n"
    run(source, out=tmp_path / "other")
    process.communicate()
    assert process.returncode == 0
    assert open_model(tmp_path / "out")
    assert open_model(tmp_path / "other")


def test_hostile_headers_are_refused_without_a_crash(source, tmp_path):
    """Bytes of the header changed at random: a clear error, or a file that is still valid and complete."""
    vae = source / "vae" / "diffusion_pytorch_model.safetensors"
    data = vae.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    choose, refused, start = random.Random(0), 0, time.perf_counter()
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(choose.randint(1, 4)):
            changed[choose.randrange(8 + length)] = choose.randrange(256)
        vae.write_bytes(changed)
        try:
            for found in map(layouts.identify, open_sources([source / "vae"])):
                layouts.make_plan(found)
        except ModelError:
            refused += 1
    assert refused > 200
    assert time.perf_counter() - start < 60


def test_progress_reaches_the_end(source, tmp_path):
    seen = []
    run(source, out=tmp_path / "out", progress=lambda *step: seen.append(step))
    assert [s for s, _, _ in seen][:1] == ["transformer"]
    assert (
        seen[-1][1]
        == seen[-1][2]
        == sum(int(np.prod(t.shape)) * 4 for s in open_sources([source]) for t in s.tensors.values())
    )
