"""Weights of other programs on this disk: where setup looks, and what it says where it may not look."""

import errno
import json
import os
import shutil
from pathlib import Path

import foreign
import pytest

from mlx_flux_krea.commands.shared import on_disk
from mlx_flux_krea.commands.shared.on_disk import Search, find_sources


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A user's folder with nothing in it; the hub's cache is empty."""
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    for name in ("MFLUX_CACHE_DIR", "INVOKEAI_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(on_disk, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """The tiny model as ComfyUI's files: one for each component, in `models`."""
    target = tmp_path_factory.mktemp("comfy") / "models"
    foreign.write(model, target, "ComfyUI", text_encoder_2="F16")
    return target


def put(files: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(files, target)


PLACES = {
    "ComfyUI": ("ComfyUI/models", "ComfyUI"),
    "ComfyUI in Documents": ("Documents/ComfyUI/models", "ComfyUI"),
    "comfy-cli": ("comfy/ComfyUI/models", "ComfyUI"),
    "InvokeAI": ("invokeai/models/flux", "InvokeAI"),
    "InvokeAI 6": ("invokeai/models/8f3c-uuid/deep", "InvokeAI"),
}


@pytest.mark.parametrize("place", PLACES)
def test_files_are_found_where_other_programs_keep_them(own, files, place):
    where, program = PLACES[place]
    put(files, own / where)
    search = Search()
    (source,) = find_sources("model", True, search)
    assert source.where.startswith(f"{program}, ")
    assert len(source.sources) == 4
    assert Path(source.sources[0]).name.startswith("flux1-krea-dev")
    assert any(program in line and "~/" in line for line in search.told())


EXTRA = {
    "folders one by one": "comfyui:\n    base_path: {root}\n    diffusion_models: models/diffusion_models\n"
    "    text_encoders: models/text_encoders/\n    vae: 'models/vae'\n",
    "several of a kind": "# mine\na111:\n  base_path: {root}/models  # a remark\n  is_default: true\n"
    "  diffusion_models: |\n    nowhere\n    diffusion_models\n  clip: |\n    text_encoders\n  vae: vae\n",
    "whole paths": "x:\n  unet: {root}/models/diffusion_models\n  text_encoders: {root}/models/text_encoders\n"
    '  vae: "{root}/models/vae"\n',
    "a list": "x:\n  base_path: {root}/models\n  diffusion_models:\n    - diffusion_models\n"
    "  clip:\n    - text_encoders\n  vae:\n    - vae\n",
}


@pytest.mark.parametrize("text", EXTRA.values(), ids=EXTRA)
def test_extra_model_paths_are_followed(own, files, tmp_path, text):
    put(files, tmp_path / "disk" / "models")
    (own / "ComfyUI").mkdir()
    (own / "ComfyUI" / "extra_model_paths.yaml").write_text(text.format(root=tmp_path / "disk"))
    (source,) = find_sources("model", True)
    assert len(source.sources) == 4


def test_the_desktop_app_says_where_its_folder_is(own, files, tmp_path, monkeypatch):
    put(files, tmp_path / "elsewhere" / "models")
    for system, folder in (("darwin", "Library/Application Support/ComfyUI"), ("linux", ".config/ComfyUI")):
        monkeypatch.setattr("sys.platform", system)
        place = own / folder
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps({"basePath": str(tmp_path / "elsewhere")}))
        assert len(find_sources("model", True)) == 1
        (place / "config.json").unlink()
        text = f"x:\n  base_path: {tmp_path / 'elsewhere' / 'models'}\n" + "".join(
            f"  {name}: {name}\n" for name in ("diffusion_models", "text_encoders", "vae")
        )
        (place / "extra_models_config.yaml").write_text(text)
        assert len(find_sources("model", True)) == 1
        shutil.rmtree(place)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"basePath": 7}', '{"other": "x"}'])
def test_a_damaged_setting_of_the_desktop_app_is_passed_over(own, monkeypatch, text):
    place = own / "Library" / "Application Support" / "ComfyUI"
    place.mkdir(parents=True)
    (place / "config.json").write_text(text)
    monkeypatch.setattr("sys.platform", "darwin")
    assert find_sources("model", True) == []


@pytest.mark.parametrize(
    "refused",
    ["Documents/ComfyUI", "ComfyUI/models/vae", "invokeai/models", "Library/Containers/com.liuliu.draw-things"],
)
@pytest.mark.parametrize("code", [errno.EPERM, errno.EACCES, errno.EIO])
def test_a_folder_that_the_system_refuses_stops_nobody_and_is_named(own, files, monkeypatch, refused, code):
    """macOS refuses Documents, and the containers of other programs, until a person has agreed."""
    put(files, own / "ComfyUI" / "models")
    (own / "invokeai").mkdir()
    below = (own / refused).parts
    scandir, isdir = os.scandir, os.path.isdir

    def is_refused(path) -> bool:
        return Path(path).parts[: len(below)] == below

    def refuse(path):
        if is_refused(path):
            raise OSError(code, os.strerror(code), str(path))
        return scandir(path)

    search = Search()
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        patch.setattr(os.path, "isdir", lambda path: isdir(path) and not is_refused(path))
        (source,) = find_sources("model", True, search)
    assert source.where.startswith("ComfyUI")
    told = [line for line in search.told() if "refuses to show" in line]
    assert told
    assert all("--model" in line for line in told)


def test_draw_things_is_looked_at_and_its_format_is_named(own):
    place = own / "Library" / "Containers" / "com.liuliu.draw-things" / "Data" / "Documents" / "Models"
    place.mkdir(parents=True)
    (place / "flux_1_krea_dev_q8p.ckpt").write_bytes(b"SQLite format 3\0")
    (place / "sdxl.ckpt").write_bytes(b"SQLite format 3\0")
    search = Search()
    assert find_sources("model", True, search) == []
    (line,) = (line for line in search.told() if "ckpt" in line)
    assert "flux_1_krea_dev_q8p.ckpt, which is in Draw Things' own format" in line


def test_mflux_and_lm_studio_and_other_repositories_of_the_cache(own, model, tmp_path, monkeypatch):
    foreign.write(model, own / "mflux" / "somebody" / "krea-4bit", "mflux")
    monkeypatch.setenv("MFLUX_CACHE_DIR", str(own / "mflux"))
    (source,) = find_sources("model", True)
    assert source.where.startswith("mflux, ")
    ready = own / ".lmstudio" / "models" / "mlx-community" / "pixtral-12b-4bit"
    ready.mkdir(parents=True)
    (ready / "model.safetensors").write_bytes(b"")
    assert find_sources("pixtral", True)[0].sources == (str(ready),)
    cached = tmp_path / "cache" / "models--somebody--Flux.1-Krea-dev-fp8"
    cached.mkdir(parents=True)
    monkeypatch.setattr(on_disk, "cached", lambda repo: cached if repo == "somebody/Flux.1-Krea-dev-fp8" else None)
    assert find_sources("model", True)[-1].sources == ("somebody/Flux.1-Krea-dev-fp8",)


def test_the_ready_copy_is_offered_first_where_nothing_is_on_disk(own, monkeypatch):
    assert [one.sources[0] for one in find_sources("pixtral", False)] == [
        "mlx-community/pixtral-12b-4bit",
        "mistral-community/pixtral-12b",
    ]
    monkeypatch.setattr(on_disk, "cached", lambda repo: own if repo == "mistral-community/pixtral-12b" else None)
    assert [one.where for one in find_sources("pixtral", False)] == ["the hub's cache, mistral-community/pixtral-12b"]


def test_a_place_full_of_files_is_not_searched_for_ever(own, monkeypatch):
    monkeypatch.setattr(on_disk, "_MOST", 50)
    for number in range(40):
        (own / "invokeai" / "models" / f"{number}" / "deep" / "deeper").mkdir(parents=True)
    (own / "invokeai" / "models" / "loop").symlink_to(own / "invokeai")
    assert find_sources("model", True) == []
