"""Every layout of this issue into the same folder; what is damaged, incomplete or something else is refused by name."""

import contextlib
import fcntl
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
from dataclasses import replace
from pathlib import Path

import derived
import mlx.core as mx
import numpy as np
import pytest
from helpers import PIPELINE, ROOT, TOKENIZERS, edit_json, edit_tensors, levels, without_guidance
from mlx_flux_krea.convert import convert, fit, index, maps, remap, write
from mlx_flux_krea.convert import folder as folders
from mlx_flux_krea.convert.identify import identify
from mlx_flux_krea.convert.sources import open_sources
from mlx_flux_krea.convert.tasks import TEXT_TO_IMAGE
from safetensors import safe_open

from mlx_flux_krea import FluxPipeline
from mlx_flux_krea.errors import ModelError, ResourceError, UsageError
from mlx_flux_krea.files import sha256
from mlx_flux_krea.licence import Evidence
from mlx_flux_krea.models import config as configs
from mlx_flux_krea.weights import COMPONENTS, open_model, read_header


@pytest.fixture
def source(tmp_path):
    """A copy of the diffusers folder, to be damaged."""
    return Path(shutil.copytree(PIPELINE, tmp_path / "source"))


@pytest.fixture
def singles(tmp_path):
    """A copy of the single files with their config.json."""
    folder = tmp_path / "files"
    shutil.copytree(derived.single_files(), folder)
    return folder


def run(*sources, **options):
    return convert(sources, dtype="float32", tokenizers=TOKENIZERS, **options)


def weight_files(folder: Path) -> list[str]:
    return sorted(
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.name != "manifest.json" and p.parent != folder
    )


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


# --- the same content from every layout ---


@pytest.mark.slow
def test_single_files_and_the_diffusers_folder_give_the_same_bytes_and_picture(full_model, singles, tmp_path):
    other = run(*sorted(singles.glob("*.safetensors")), out=tmp_path / "other").path
    assert weight_files(full_model) == weight_files(other)
    assert filecmp.cmpfiles(full_model, other, weight_files(full_model), shallow=False) == (
        weight_files(full_model),
        [],
        [],
    )
    call = {"prompt": "a cat", "seed": 1, "height": 32, "width": 48, "num_inference_steps": 2}
    pictures = [FluxPipeline.from_pretrained(folder)(**call).images[0] for folder in (full_model, other)]
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
    assert {name: n.dtype for name, n in folder.networks.items()} == dict.fromkeys(COMPONENTS, dtype)
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


@pytest.mark.slow
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
        assert manifest[name] == {"sha256": sha256(path), "bytes": path.stat().st_size}


def test_the_index_says_what_the_model_was_made_from(full_model):
    index = open_model(full_model).index
    assert index.base == "FLUX architecture, other sizes"
    assert index.filters == "none"
    assert index.max_sequence_length == 512
    assert {s.file.split("/")[0] for s in index.source} == set(COMPONENTS)
    by_name = {s.file: s for s in index.source}
    vae = PIPELINE / "vae" / "diffusion_pytorch_model.safetensors"
    assert by_name["vae/diffusion_pytorch_model.safetensors"].sha256 == sha256(vae)


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
        (["flux1-krea-lookalike"], configs.FLUX_SCHNELL, "FLUX.1 without guidance embedding", 0.0, "unknown"),
    ],
)
def test_the_family_follows_from_sizes_and_names(names, config, base, guidance, license):
    family = index._family(config, names, Evidence(config.architecture), TEXT_TO_IMAGE)
    assert (family.base, family.defaults.guidance_scale, family.license) == (base, guidance, license)


def test_schnells_kind_is_converted_with_its_schedule(tmp_path):
    path = run(without_guidance(tmp_path / "source"), out=tmp_path / "out").path
    folder = open_model(path)
    assert folder.index.schedule.shift == "none"
    assert folder.index.max_sequence_length == 256
    assert not folder.flux.sizes.guidance_embed


def test_without_a_scheduler_the_guidance_embedding_decides_the_schedule(tmp_path):
    for guided in (True, False):
        source = tmp_path / f"source-{guided}"
        shutil.copytree(PIPELINE, source) if guided else without_guidance(source)
        shutil.rmtree(source / "scheduler")
        made = open_model(run(source, out=tmp_path / f"out-{guided}").path).index
        assert (made.schedule.shift, made.max_sequence_length) == (("dynamic", 512) if guided else ("none", 256))


@pytest.mark.slow
def test_a_model_is_named_after_what_it_is_and_not_after_the_way_to_it(tmp_path, monkeypatch, home):
    """The current folder, a link, and the hub's cache, where a folder is called by its hash and files are links."""
    real = Path(shutil.copytree(PIPELINE, tmp_path / "tiny-krea"))
    (tmp_path / "link").symlink_to(real)
    hub = tmp_path / "models--somebody--Tiny-Krea-2"
    (hub / "snapshots").mkdir(parents=True)
    shutil.copytree(PIPELINE, hub / "snapshots" / "0123abc")
    monkeypatch.chdir(real)
    for source, name in (
        (".", "tiny-krea"),
        (tmp_path / "link", "tiny-krea"),
        (hub / "snapshots" / "0123abc", "Tiny-Krea-2"),
    ):
        report = run(source)
        assert report.path == home / "models" / f"{name}-fp32"
        assert open_model(report.path).index.name == name
        shutil.rmtree(report.path)


def test_the_family_is_known_by_the_name_in_the_hubs_cache(tmp_path):
    hub = tmp_path / "models--black-forest-labs--FLUX.1-Krea-dev"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots" / "0123abc").mkdir(parents=True)
    (hub / "blobs" / "fedc").write_bytes(b"")
    file = hub / "snapshots" / "0123abc" / "transformer.safetensors"
    file.symlink_to(Path("..", "..", "blobs", "fedc"))
    (tmp_path / "link.safetensors").symlink_to(file)

    def base(path: Path) -> str:
        evidence = Evidence(configs.FLUX_DEV.architecture)
        return index._family(configs.FLUX_DEV, index._names(path)[1], evidence, TEXT_TO_IMAGE).base

    for path in (file, file.parent, tmp_path / "link.safetensors", tmp_path / "flux1-krea-dev.safetensors"):
        assert base(path) == "FLUX.1 Krea [dev]"
    assert base(tmp_path / "flux1-dev") == "FLUX.1 [dev]"
    for path in (file, file.parent, tmp_path / "link.safetensors"):
        assert index._names(path)[2] == "black-forest-labs/FLUX.1-Krea-dev"
    assert index._names(tmp_path / "flux1-krea-dev.safetensors")[2] == ""


# --- full scale, names and shapes only ---


def test_the_tables_fill_the_published_sizes_completely():
    """Our names back through each table give exactly the names of that layout, 780, 1160 and 244 of them."""

    def names_of(table, component, config):
        last = len(config.ch_mult) - 1 if component == "vae" else 0
        return [n for name in fit.target_shapes(component, config) for n in remap.source_names(name, table, last)[0]]

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
        ("empty", "is empty"),
        ("overlapping tensors", "cannot be read: invalid"),
        ("NaN", "decoder.conv_in.bias holds NaN"),
        ("missing shard", "lacks the shard"),
        ("two shards with one tensor", "is in two shards"),
        ("another VAE", "use_quant_conv is True"),
        ("another activation", "hidden_act is 'gelu'"),
        ("config without sizes", "lacks 'num_attention_heads'"),
        ("config of another size", "lacks transformer_blocks.2"),
        ("config that contradicts itself", "axes_dim"),
        ("fixed shift", "fixed shift of 3.0"),
        ("transformer in the place of the VAE", "holds a CLIP text model.*; expected also vae"),
        ("pickle", "diffusion_pytorch_model.bin is a pickle"),
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
        ({"double_blocks.0.img_attn.qkv.weight.absmax": 1}, "bitsandbytes"),
        ({"something.else": 1}, r"has no known layout \(it holds something.else\); see flux-krea"),
        ({}, "has no known layout"),
    ],
)
def test_look_alikes_are_refused_by_name(tmp_path, tensors, says):
    file = tmp_path / "file.safetensors"
    mx.save_safetensors(str(file), {n: mx.zeros((2,) * d) for n, d in tensors.items()} or {})
    with pytest.raises(ModelError, match=says):
        run(file, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: None, "there is nothing at"),
        (lambda p: p.mkdir(), "holds no weights"),
        (lambda p: p.write_bytes(b"hello"), "thing is of no format that is known"),
        (lambda p: (p.mkdir(), (p / "model_index.json").write_text("{}")), "no component folder"),
        (lambda p: (p.mkdir(), (p / "model.ckpt").write_bytes(b"\x80")), "model.ckpt is a pickle"),
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


def test_two_models_in_one_folder_are_refused(singles, tmp_path):
    shutil.copy(singles / "ae.safetensors", singles / "other.safetensors")
    with pytest.raises(ModelError, match=r"holds two different models as vae: .*ae\.safetensors and .*other"):
        run(singles, out=tmp_path / "out")


def test_sizes_that_shapes_do_not_tell_are_asked_for(singles, tmp_path):
    (singles / "config.json").unlink()
    with pytest.raises(ModelError, match=r"other sizes than the published.*config.json beside it"):
        run(singles, out=tmp_path / "out")


def test_a_tensor_missing_in_a_single_file_is_named(model, singles, monkeypatch):
    """Against the published sizes that are nearest; none of the problem is that sizes are not known."""
    sizes = open_model(model).flux.sizes
    published = (replace(sizes, guidance_embed=False), sizes)
    monkeypatch.setitem(fit._PUBLISHED, "transformer", published)
    edit_tensors(singles / "flux1-tiny.safetensors", lambda a: a.pop("txt_in.bias"))
    (singles / "config.json").unlink()
    (source,) = open_sources([singles / "flux1-tiny.safetensors"])
    with pytest.raises(ModelError, match=r"flux1-tiny.safetensors lacks txt_in.bias; is it complete"):
        fit.make_plan(*identify(source))


def test_a_file_of_published_sizes_may_lie_beside_somebody_elses_config(model, source, monkeypatch):
    sizes = open_model(model).vae.sizes
    monkeypatch.setitem(fit._PUBLISHED, "vae", (sizes,))
    config = source / "vae" / "config.json"
    own = json.loads(config.read_text())
    (found,) = identify(open_sources([source / "vae"])[0])
    config.write_text('{"_class_name": "UNet2DConditionModel", "in_channels": 4}')
    assert fit.make_plan(found)[0] == sizes
    config.write_text(json.dumps(own | {"scaling_factor": 0.5}))  # one that says it is of a VAE is believed
    assert fit.make_plan(found)[0].scale_factor == 0.5


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
    with pytest.raises(ModelError, match=r"no tokenizer was found.*vocab.json and merges.txt.*`tokenizers` to DIR"):
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
    cached = Path(os.environ["HF_HOME"]) / "hub" / "models--black-forest-labs--FLUX.1-schnell"
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


def test_only_a_model_folder_is_ever_replaced(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    for force in (False, True):
        with pytest.raises(UsageError, match=r"exists and is not a model folder.*expected a new folder") as caught:
            run(source, out=out, force=force)
        assert caught.value.exit_code == 2
    (out / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')  # diffusers' own, and not ours
    with pytest.raises(UsageError, match="is not a model folder"):
        run(source, out=out, force=True)
    assert (out / "mine.txt").read_text() == "keep"
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("name", ["mine.txt", "transformer/lora.safetensors", "pictures/frog.png", "empty/", "link"])
def test_a_model_folder_with_somebodys_own_files_is_not_replaced(source, tmp_path, name):
    out = run(source, out=tmp_path / "out").path
    if name == "link":
        (out / name).symlink_to(tmp_path)
    else:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).mkdir() if name.endswith("/") else (out / name).write_text("keep")
    before = sorted(out.rglob("*"))
    first = name.split("/")[0] if name[0] in "pe" else name
    with pytest.raises(
        UsageError, match=rf"out also holds {first}, which `force` would delete.*move it away"
    ) as caught:
        run(source, out=out, force=True)
    assert caught.value.exit_code == 2
    assert sorted(out.rglob("*")) == before
    assert hidden(tmp_path) == []


def test_what_a_system_leaves_in_folders_does_not_keep_a_model(source, tmp_path):
    out = run(source, out=tmp_path / "out").path
    for name in (".DS_Store", "vae/.DS_Store", "._manifest.json", "Thumbs.db"):
        (out / name).write_bytes(b"")
    run(source, out=out, force=True)
    assert not (out / ".DS_Store").exists()


@pytest.mark.parametrize("name", ["manifest.json", "model_index.json"])
@pytest.mark.parametrize("text", [None, "{"])
def test_a_folder_that_does_not_say_what_it_is_or_holds_is_not_replaced(source, tmp_path, name, text):
    out = run(source, out=tmp_path / "out").path
    (out / name).write_text(text) if text else (out / name).unlink()
    with pytest.raises(UsageError, match=rf"out exists and is not|{name} (is missing|cannot be read)") as caught:
        run(source, out=out, force=True)
    assert caught.value.exit_code == 2
    assert (out / "vae" / "config.json").exists()


def test_a_model_is_replaced_when_it_is_to_be_and_the_new_one_is_complete(source, tmp_path):
    out = run(source, out=tmp_path / "out").path
    before = (out / "model_index.json").read_text()
    with pytest.raises(UsageError, match=r"exists.*`force`"):
        run(source, out=out)
    changed = Path(shutil.copytree(source, tmp_path / "changed"))
    damage(changed, "NaN")
    with pytest.raises(ModelError):
        run(changed, out=out, force=True)
    assert (out / "model_index.json").read_text() == before
    run(changed, out=out, force=True, allow_nonfinite=True)
    assert (out / "model_index.json").read_text() != before
    assert hidden(tmp_path) == []


def test_an_empty_folder_is_as_good_as_none(source, tmp_path):
    (tmp_path / "out").mkdir()
    assert open_model(run(source, out=tmp_path / "out").path)


@pytest.mark.parametrize("where", ["source", ".", "source/vae", "source/new", "source/vae/new", "link", "link/new"])
def test_a_target_that_overlaps_a_source_is_refused(source, tmp_path, where):
    (tmp_path / "link").symlink_to(source)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="overlaps the source") as caught:
        run(source, out=tmp_path / where, force=True)
    assert caught.value.exit_code == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_a_target_may_not_hold_what_a_source_links_to(source, tmp_path):
    """As files in the hub's cache do."""
    out = run(source, out=tmp_path / "out").path
    vae = source / "vae" / "diffusion_pytorch_model.safetensors"
    vae.rename(out / "linked.safetensors")
    vae.symlink_to(out / "linked.safetensors")
    with pytest.raises(UsageError, match="overlaps the source"):
        run(source, out=out, force=True)


def test_a_link_as_target_stays_a_link(source, tmp_path):
    real = run(source, out=tmp_path / "real").path
    (tmp_path / "link").symlink_to(real)
    assert run(source, out=tmp_path / "link", force=True).path == tmp_path / "link"
    assert (tmp_path / "link").is_symlink()
    assert open_model(real)
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_meanwhile_is_not_replaced(source, tmp_path, force):
    out = tmp_path / "out"

    def appear(*step):
        out.mkdir(exist_ok=True)
        (out / "mine.txt").write_text("keep")

    with pytest.raises(UsageError):
        run(source, out=out, force=force, progress=appear)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    assert hidden(tmp_path) == []


def test_what_appears_at_the_last_moment_is_not_replaced(source, tmp_path, monkeypatch):
    out, check = tmp_path / "out", folders.check_target

    def appear(target, force):
        check(target, force)
        if ".out.flux-krea.partial" in hidden(tmp_path):  # just before the rename
            shutil.copytree(source, out)

    monkeypatch.setattr(folders, "check_target", appear)
    with pytest.raises(UsageError, match="appeared meanwhile") as caught:
        run(source, out=out)
    assert caught.value.exit_code == 2
    assert not filecmp.dircmp(source, out).diff_files
    assert hidden(tmp_path) == []


def test_a_replacement_that_fails_gives_the_old_model_back(source, tmp_path, monkeypatch):
    out, rename = run(source, out=tmp_path / "out").path, Path.rename
    before = (out / "manifest.json").stat().st_ino

    def fail(path, target):
        if path.suffix == ".partial":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        run(source, out=out, force=True)
    assert (out / "manifest.json").stat().st_ino == before
    assert hidden(tmp_path) == []


_KILLED_RENAMING = """
import os, signal, sys
from pathlib import Path
from mlx_flux_krea.convert import convert
rename = Path.rename
def kill(path, target):
    after = rename(path, target)
    if str(path).endswith(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    return after
Path.rename = kill
convert([sys.argv[1]], sys.argv[2], dtype="float32", tokenizers=sys.argv[3], force=True)
"""


@pytest.mark.parametrize(("after", "again"), [("/out", False), ("/out", True), (".partial", False), (".old", True)])
@pytest.mark.core("/out-True")
def test_a_replacement_killed_at_any_rename_keeps_one_model_whole(source, tmp_path, after, again):
    """After the old model went aside, after the new one took its place, after the old one was given up."""
    out = run(source, out=tmp_path / "out").path
    old = (out / "manifest.json").stat().st_ino
    command = [sys.executable, "-c", _KILLED_RENAMING, source, out, TOKENIZERS, after]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    left = [".out.flux-krea.lock", *([".out.flux-krea.old"] if after != ".old" else [])]
    left += [".out.flux-krea.partial"] if after != ".partial" else []
    assert hidden(tmp_path) == left
    if again:
        run(source, out=out, force=True)
    else:
        with pytest.raises(UsageError, match="exists"):
            run(source, out=out)
        assert ((out / "manifest.json").stat().st_ino == old) == (after == "/out")
    assert FluxPipeline.from_pretrained(out)("a", seed=1, height=32, width=32, num_inference_steps=1).images
    assert hidden(tmp_path) == []


def test_recovery_touches_only_what_belongs_to_the_target(source, tmp_path):
    kept = [".other.flux-krea.old", ".out.flux-krea.old.txt", ".out.old", ".out.partial", ".out.v2.flux-krea.partial"]
    for name in (*kept, ".out.flux-krea.partial"):
        (tmp_path / name).mkdir()
    run(source, out=tmp_path / "out")
    assert hidden(tmp_path) == kept


def test_everything_is_on_the_disk_before_the_folder_has_its_name(source, tmp_path, monkeypatch):
    out, synced, sync = tmp_path / "out", {}, os.fsync

    def watch(descriptor):
        synced.setdefault(os.fstat(descriptor).st_ino, out.exists())
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    run(source, out=out)
    for path in (out, *out.rglob("*")):
        assert synced[path.stat().st_ino] is False, path
    assert synced[tmp_path.stat().st_ino] is True


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json", "vocab.json", "model_index.json"])
def test_what_the_disk_did_not_keep_is_found_before_the_folder_has_its_name(source, tmp_path, monkeypatch, name):
    """One bit of one file, turned while it is written."""

    class Bad:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.file.write(bytes([data[0] ^ 1]) + bytes(data[1:]))

        def __getattr__(self, attribute):
            return getattr(self.file, attribute)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

    def bad_open(path, mode, **options):
        file = open(path, mode, **options)  # noqa: SIM115
        return Bad(file) if Path(path).name == name and "x" in mode else file

    monkeypatch.setattr(folders, "open", bad_open, raising=False)
    with pytest.raises(UsageError, match=rf"{name} does not read back as it was written"):
        run(source, out=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_the_file_that_makes_a_folder_a_model_is_written_last(source, tmp_path, monkeypatch):
    written, real = [], folders.NewFolder.open

    def watch(folder, name):
        written.append(name)
        return real(folder, name)

    monkeypatch.setattr(folders.NewFolder, "open", watch)
    out = run(source, out=tmp_path / "out").path
    assert written[-1] == "model_index.json"
    assert sorted(written) == sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())


def test_a_file_in_the_place_of_the_target_is_refused(source, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UsageError, match="is a file"):
        run(source, out=tmp_path / "out", force=True)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a" * 300, "cannot be written: File name too long"),
        ("a" * 250, "cannot be written: File name too long"),
        ("file/new", "cannot be written: Not a directory"),
        ("file/x/new", "cannot be written: Not a directory"),
        ("/proc/x", "cannot be written"),
        ("/proc/x/y", "cannot be written"),
        ("loop", "is a broken link"),
        ("loop/new", "cannot be written"),
    ],
)
def test_a_target_that_cannot_be_written_is_a_matter_of_usage(source, tmp_path, name, says):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=says) as caught:
        run(source, out=tmp_path / name)
    assert caught.value.exit_code == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_made_for_a_target_go_with_it_and_others_stay(source, tmp_path):
    damage(source, "NaN")
    (tmp_path / "mine").mkdir()
    for out in (tmp_path / "x" / "y" / "z", tmp_path / "mine" / "z"):
        with pytest.raises(ModelError, match="NaN"):
            run(source, out=out)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["mine", "source"]
    assert run(source, out=tmp_path / "x" / "y" / "z", allow_nonfinite=True).path.exists()


@pytest.mark.parametrize("made", [".partial", "/x"])
def test_a_signal_at_any_folder_that_is_made_leaves_none(source, tmp_path, monkeypatch, made):
    mkdir = Path.mkdir

    def signalled(path, *args, **kwargs):
        mkdir(path, *args, **kwargs)
        if str(path).endswith(made):
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", signalled)
    with pytest.raises(KeyboardInterrupt):
        run(source, out=tmp_path / "x" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_users_that_do_not_exist_are_names_like_others(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="there is nothing at ~nosuchuser/a"):
        run("~nosuchuser/a")
    with pytest.raises(ModelError, match="there is no folder ~nosuchuser/a"):
        convert([source], "out", tokenizers="~nosuchuser/a")
    assert run(source, out="~nosuchuser/a").path == Path("~nosuchuser/a")
    assert open_model(tmp_path / "~nosuchuser" / "a")


def test_a_source_that_is_a_circle_of_links_is_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ModelError, match="there is nothing at"):
        run(tmp_path / "a", out=tmp_path / "out")


def test_without_a_target_the_model_goes_home(source, home):
    report = convert([source], dtype="bfloat16", tokenizers=TOKENIZERS)
    assert report.path == home / "models" / "source-bf16"
    assert FluxPipeline.from_pretrained("source-bf16").folder.path == report.path
    assert FluxPipeline.from_pretrained().folder.path == report.path


def test_a_disk_too_small_is_refused_before_the_first_byte(source, tmp_path, monkeypatch):
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
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


def test_a_killed_conversion_leaves_no_model_and_the_next_one_clears_up(source, tmp_path, monkeypatch):
    command = [sys.executable, "-c", _HELD, source, tmp_path / "out", TOKENIZERS]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert hidden(tmp_path) == [".out.flux-krea.lock", ".out.flux-krea.partial"]
    monkeypatch.setattr(os, "kill", lambda *args: None)  # whoever has its number by now
    run(source, out=tmp_path / "out")
    assert hidden(tmp_path) == []
    assert open_model(tmp_path / "out")


@pytest.mark.slow
def test_kills_at_random_moments_leave_a_whole_model_or_none(source, tmp_path):
    """The next conversion removes the files that a kill left, and no file lies elsewhere."""
    command = [
        sys.executable,
        "-m",
        "mlx_flux_krea.cli",
        "convert",
        source,
        "--tokenizers",
        TOKENIZERS,
        "-o",
        tmp_path / "out",
    ]
    choose, whole = random.Random(0), 0
    begin = time.monotonic()
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0
    alone = time.monotonic() - begin
    for _ in range(10):
        process = subprocess.Popen(
            [*command, "--force"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(choose.uniform(0.4, 1.05) * alone)
        process.kill()
        process.wait()
        left = {name.removeprefix(".out.flux-krea.") for name in hidden(tmp_path)}
        assert left <= {"lock", "partial", "old"}
        assert {path.name for path in tmp_path.iterdir() if path.name[0] != "."} <= {"out", "source"}
        if (tmp_path / "out").exists():
            whole += 1
            assert not any(folders.check_manifest(tmp_path / "out", lambda *_: None)[1].values())
    assert whole > 4
    run(source, out=tmp_path / "out", force=True)
    assert hidden(tmp_path) == []


_HELD = """
import sys
from mlx_flux_krea.convert import convert
def progress(component, done, total):
    print("writing", flush=True)
    sys.stdin.readline()
convert([sys.argv[1]], sys.argv[2], dtype="float32", tokenizers=sys.argv[3], progress=progress)
"""


@pytest.mark.slow
def test_two_conversions_at_once_do_not_disturb_one_another(source, tmp_path):
    command = [sys.executable, "-c", _HELD, source, tmp_path / "out", TOKENIZERS]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout.readline() == "writing\n"
    run(source, out=tmp_path / "other")
    process.communicate()
    assert process.returncode == 0
    assert open_model(tmp_path / "out")
    assert open_model(tmp_path / "other")


def test_a_target_that_another_conversion_writes_is_refused_and_left_to_it(source, tmp_path):
    command = [sys.executable, "-c", _HELD, source, tmp_path / "out", TOKENIZERS]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    for force in (False, True):
        with pytest.raises(UsageError, match=r"another conversion is writing .*out; expected one at a time; wait"):
            run(source, out=tmp_path / "out", force=force)
    assert hidden(tmp_path) == [".out.flux-krea.lock", ".out.flux-krea.partial"]
    process.communicate("")
    assert process.returncode == 0
    assert open_model(tmp_path / "out")
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("another", [False, True])
def test_a_lock_whose_file_went_before_it_was_taken_is_none(tmp_path, monkeypatch, another):
    """Its holder removed it in between; another run may have made the next one."""
    file, flock = tmp_path / ".out.flux-krea.lock", fcntl.flock

    def late(*args):
        file.rename(tmp_path / "gone")
        if another:
            file.touch()
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UsageError, match="another conversion is writing"), folders._lock(tmp_path / "out"):
        pytest.fail("taken")
    assert file.exists() == another


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
            for found in map(identify, open_sources([source / "vae"])):
                fit.make_plan(*found)
        except ModelError:
            refused += 1
    assert refused > 200
    assert time.perf_counter() - start < 60


def test_progress_reaches_the_end(source, tmp_path):
    seen = []
    run(source, out=tmp_path / "out", progress=lambda *step: seen.append(step))
    assert [s for s, _, _ in seen][:1] == ["vae"]  # the smallest comes first
    weights = sum(int(np.prod(t.shape)) * 4 for s in open_sources([source]) for t in s.tensors.values())
    made = [step for step in seen if step[0] != "reading back"]
    assert made[-1][1] == made[-1][2] == weights
    assert seen[-1][0] == "reading back"
    assert seen[-1][1] == seen[-1][2] > weights


@pytest.mark.parametrize(("path", "code"), [("config.json", 130), (".partial", 0)])
def test_a_signal_before_the_folder_has_its_name_undoes_it_and_after_that_does_nothing(source, tmp_path, path, code):
    command = [sys.executable, "-c", _SIGNALLED, path, "convert", source, "-o", tmp_path / "out"]
    command += ["--tokenizers", TOKENIZERS, "--force"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, (tmp_path / "out").exists()) == (code, code == 0), ran.stderr
    assert "Traceback" not in ran.stderr
    assert hidden(tmp_path) == []


_SIGNALLED = """
import os, signal, sys
from pathlib import Path
from mlx_flux_krea import cli
from mlx_flux_krea.convert.folder import NewFolder
rename, write_file = Path.rename, NewFolder.write
def signalled(function):
    def call(path, *rest):
        result = function(path, *rest)
        if any(str(part).endswith(sys.argv[1]) for part in (path, *rest)):
            os.kill(os.getpid(), signal.SIGINT)
        return result
    return call
Path.rename, NewFolder.write = signalled(rename), signalled(write_file)
cli.main(sys.argv[2:])
"""
