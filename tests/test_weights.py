"""Our own folder: strict, and clear about what is wrong with it."""

import dataclasses
import gc
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from helpers import PIPELINE, edit_json, edit_tensors, full_size_folder

from mlx_flux_krea import FluxPipeline
from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.files import read_json
from mlx_flux_krea.home import NANO, find_model
from mlx_flux_krea.home import root as home
from mlx_flux_krea.models import config as configs
from mlx_flux_krea.weights import NetworkFolder, open_model


@pytest.fixture
def folder(model, tmp_path):
    """A copy, to be damaged."""
    return shutil.copytree(model, tmp_path / "copy")


def shard(folder, component="vae"):
    return sorted((folder / component).glob("*.safetensors"))[0]


def damage(folder, how):
    file = shard(folder)
    data = file.read_bytes()
    if how == "tensor missing":
        edit_tensors(file, lambda a: a.pop("decoder.conv_in.bias"))
    elif how == "tensor missing in the index too":
        edit_tensors(file, lambda a: a.pop("decoder.conv_in.bias"))
        index = folder / "vae" / "model.safetensors.index.json"
        weights = json.loads(index.read_text())["weight_map"]
        del weights["decoder.conv_in.bias"]
        edit_json(index, weight_map=weights)
    elif how == "wrong shape":
        edit_tensors(file, lambda a: a.update({"decoder.conv_in.bias": mx.zeros((33,))}))
    elif how == "wrong type":
        edit_tensors(file, lambda a: a.update({"decoder.conv_in.bias": a["decoder.conv_in.bias"].astype(mx.float16)}))
    elif how == "truncated":
        file.write_bytes(data[:-1])
    elif how == "header larger than the file":
        file.write_bytes(struct.pack("<Q", 2**40) + data[8:])
    elif how == "shard missing":
        file.unlink()
    elif how == "index missing":
        (folder / "vae" / "model.safetensors.index.json").unlink()
    elif how == "index names a file outside":
        index = folder / "vae" / "model.safetensors.index.json"
        weights = json.loads(index.read_text())["weight_map"]
        edit_json(index, weight_map=dict.fromkeys(weights, "../transformer/model-00001-of-00002.safetensors"))
    elif how == "unreadable":
        file.unlink()
        file.mkdir()
    elif how == "tokenizer missing":
        shutil.rmtree(folder / "tokenizer")
    elif how == "tokenizer damaged":
        for name in ("tokenizer.json", "spiece.model"):
            if (folder / "tokenizer_2" / name).exists():
                (folder / "tokenizer_2" / name).write_bytes(b"{}")
    elif how == "tokenizer of another model":
        embedding = "text_model.embeddings.token_embedding.weight"
        edit_tensors(shard(folder, "text_encoder"), lambda a: a.update({embedding: a[embedding][:-1]}))
        edit_json(folder / "text_encoder" / "config.json", vocab_size=49407)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("tensor missing", "disagree about decoder.conv_in.bias"),
        ("tensor missing in the index too", r"1 missing \(decoder.conv_in.bias\)"),
        ("wrong shape", r"decoder.conv_in.bias has shape \[33\], expected \[32\]"),
        ("wrong type", "decoder.conv_in.bias is F16, expected F32"),
        ("truncated", "cannot be read: incomplete metadata"),
        ("header larger than the file", "cannot be read: header too large"),
        ("shard missing", "cannot be read: No such file"),
        ("index missing", "index.json is missing"),
        ("index names a file outside", r"names the file '\.\./transformer"),
        ("unreadable", "cannot be read: Is a directory"),
        ("tokenizer missing", "holds no CLIP tokenizer"),
        ("tokenizer damaged", "tokenizer_2 is damaged"),
        ("tokenizer of another model", "tokenizer has 49408 tokens; expected 49407 at most, as text_encoder has"),
    ],
)
def test_a_damaged_folder_is_refused_by_name_before_any_weight_is_read(folder, how, says, monkeypatch):
    damage(folder, how)
    monkeypatch.delattr(NetworkFolder, "load")
    pipe = FluxPipeline.from_pretrained(folder)
    with pytest.raises(ModelError, match=says) as caught:
        pipe("a", seed=1, height=32, width=32, num_inference_steps=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("model_index.json", {"more": 1}, "unknown fields: more"),
        ("model_index.json", {"format": 2}, "format is 2"),
        ("model_index.json", {"filters": "off"}, 'filters is "off"'),
        ("model_index.json", {"defaults": {"width": 64}}, "lacks height"),
        ("model_index.json", {"schedule": {"shift": "static"}}, 'shift is "static"'),
        ("model_index.json", {"_class_name": "Other"}, "is not of a FluxPipeline"),
        ("vae/config.json", {"dtype": "int8"}, "dtype is 'int8'"),
        ("vae/config.json", {"dtype": []}, r"dtype is \[\]"),
        ("transformer/config.json", {"in_channels": 96}, r"in_channels 96 .* is none of 64 \(text-to-image\), 384 "),
        (
            "transformer/config.json",
            {"in_channels": 384},
            'task is "text-to-image", and the transformer has in_channels 384; expected fill',
        ),
        ("transformer/config.json", {"vec_in_dim": 17}, "transformer and text_encoder do not fit: vec_in_dim is 17"),
        ("transformer/config.json", {"context_in_dim": 17}, "transformer and text_encoder_2 do not fit: context"),
        ("vae/config.json", {"ch": "16"}, "ch is str '16'; expected int"),
        ("vae/config.json", {"ch": 0}, "ch is .*0; expected a number from 1"),
        ("vae/config.json", {"norm_num_groups": 5}, "not divisible by 5 groups"),
        ("transformer/config.json", {"depth": 10**9}, "depth is .*1000000000; expected a number from 0 to 512"),
        ("transformer/config.json", {"num_heads": 3}, "not divisible by num_heads 3"),
        ("transformer/config.json", {"axes_dim": [8, 12]}, "three even numbers"),
        ("transformer/config.json", {"mlp_ratio": float("inf")}, "mlp_ratio is .*inf"),
        ("text_encoder/config.json", {"num_attention_heads": 5}, "not divisible by 5 heads"),
        ("text_encoder_2/config.json", {"relative_attention_num_buckets": 30}, "not divisible by 4"),
    ],
)
def test_a_wrong_field_is_named(folder, file, changes, says):
    edit_json(folder / file, **changes)
    with pytest.raises(ModelError, match=says):
        open_model(folder)


def test_a_missing_component_is_named(folder):
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(ModelError, match=r"has no text_encoder_2/config\.json"):
        open_model(folder)


@pytest.mark.parametrize("name", ["model_index.json", "vae/config.json"])
@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", "[" * 100_000])
def test_json_that_is_none_is_refused(folder, name, text):
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"cannot be read|holds a list"):
        open_model(folder)


@pytest.mark.parametrize("name", ["model_index.json", "vae/config.json", "manifest.json"])
@pytest.mark.parametrize("what", ["a terabyte", "/dev/zero"])
def test_json_without_end_is_refused_unread(folder, name, what):
    (folder / name).unlink()
    if what.startswith("/"):
        (folder / name).symlink_to(what)
    else:
        with open(folder / name, "wb") as file:
            file.truncate(2**40)  # with nothing on the disk
    with pytest.raises(ModelError, match=r"cannot be read: it is (larger than|a device)"):
        read_json(folder / name)


@pytest.mark.parametrize("path", [PIPELINE, PIPELINE / "vae", PIPELINE / "vae" / "diffusion_pytorch_model.safetensors"])
def test_foreign_weights_are_sent_to_the_converter(path):
    with pytest.raises(ModelError, match="convert it first: flux-krea convert"):
        FluxPipeline.from_pretrained(path)


def test_a_command_that_is_suggested_can_be_typed_as_it_is(tmp_path):
    (tmp_path / "my model").mkdir()
    with pytest.raises(ModelError, match=r"flux-krea convert '.*/my model'$"):
        FluxPipeline.from_pretrained(tmp_path / "my model")


def test_a_hub_id_is_sent_to_the_converter_and_a_wrong_name_with_a_folder():
    with pytest.raises(ModelError, match=r"from it; .*: flux-krea convert black-forest-labs/FLUX\.1-Krea-dev"):
        FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-Krea-dev")
    with pytest.raises(ModelError, match=r"no model '.*convert a downloaded folder: flux-krea convert FOLDER$"):
        FluxPipeline.from_pretrained("tyni")


def test_a_user_that_does_not_exist_is_a_name_like_others(monkeypatch):
    with pytest.raises(ModelError, match="there is nothing at ~nosuchuser/tiny"):
        find_model("~nosuchuser/tiny")
    monkeypatch.setenv("FLUX_KREA_HOME", "~nosuchuser")
    with pytest.raises(ModelError, match="no model is installed in ~nosuchuser/models"):
        find_model(None)


def test_the_only_installed_model_is_taken_and_several_are_asked_about(model):
    with pytest.raises(ModelError, match="no model is installed"):
        find_model(None)
    for name in ("one", "two"):
        shutil.copytree(model, home() / "models" / name)
        if name == "one":
            assert find_model(None) == home() / "models" / "one"
    with pytest.raises(ModelError, match="several models are installed: one, two"):
        find_model(None)
    assert find_model("two") == home() / "models" / "two"
    with pytest.raises(ModelError, match="one of nano, one, two"):
        find_model("three")


def test_the_small_model_is_found_by_its_name_unless_another_has_it(model, tmp_path, monkeypatch):
    assert find_model("nano") == NANO
    shutil.copytree(model, home() / "models" / "nano")
    assert find_model("nano") == home() / "models" / "nano"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()
    assert find_model("nano") == Path("nano")


def test_half_made_folders_are_no_models(model):
    shutil.copytree(model, home() / "models" / "one")
    shutil.copytree(model, home() / "models" / ".two.123.partial")
    assert find_model(None) == home() / "models" / "one"
    with pytest.raises(ModelError, match="there is no model"):
        find_model(".two.123.partial")


@pytest.mark.parametrize(("before", "after"), [(None, "0"), ("1", "1")])
@pytest.mark.parametrize("variable", ["MLX_ENABLE_TF32", "MLX_CONV_WINOGRAD"])
def test_nothing_is_rounded_behind_our_back_on_metal_unless_the_user_says_so(variable, before, after):
    """Products to TF32, convolutions to 16 bits inside; seen in the process's own environment, where MLX looks."""
    script = f"""
import ctypes
from mlx_flux_krea import FluxPipeline
libc = ctypes.CDLL(None)
libc.getenv.restype = ctypes.c_char_p
print(libc.getenv(b"{variable}").decode())
"""
    env = {name: value for name, value in os.environ.items() if name != variable}
    env |= {} if before is None else {variable: before}
    ran = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == after


def test_published_sizes_go_through_json_unchanged():
    for config in (configs.FLUX_DEV, configs.FLUX_SCHNELL, configs.T5_XXL, configs.CLIP_L, configs.FLUX_VAE):
        text = json.dumps(configs.to_json(config))
        assert configs.from_json(type(config), json.loads(text), "here") == config


@pytest.mark.parametrize(
    ("change", "required"),
    [
        ({}, True),
        ({"axes_dim": (8, 60, 60)}, True),
        ({"guidance_embed": False}, True),
        ({"depth": 8}, True),
        ({"hidden_size": 768, "num_heads": 6}, False),
    ],
)
def test_filters_are_required_by_what_the_transformer_is(change, required, tmp_path):
    folder = open_model(full_size_folder(tmp_path / "big", filters="none"))
    sizes = dataclasses.replace(configs.FLUX_DEV, **change)
    folder = dataclasses.replace(folder, flux=dataclasses.replace(folder.flux, sizes=sizes))
    assert folder.requires_filters is required
    strict = dataclasses.replace(folder, index=dataclasses.replace(folder.index, filters="required"))
    assert strict.requires_filters


def test_loading_reads_nothing_until_it_is_evaluated(model):
    gc.collect()  # what other tests left would be counted when it goes
    mx.clear_cache()
    before = mx.get_active_memory()
    flux = open_model(model).flux.load(mx.bfloat16)
    assert mx.get_active_memory() - before < 10_000
    mx.eval(flux.parameters())
    size = sum(info.end - info.start for _, info in open_model(model).flux.tensors().values())
    assert mx.get_active_memory() - before == pytest.approx(size / 2, rel=0.2)  # float32 in the file, half of it here
