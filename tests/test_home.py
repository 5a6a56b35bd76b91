"""What lies in the home folder: `models` lists and removes it, `doctor` examines it, `purge` deletes it."""

import json
import shutil

import pytest
from helpers import REFERENCE
from mlx_flux_krea.convert import convert

from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.weights import find_model


@pytest.fixture
def two(model, home):
    """Two installed models and a filter."""
    for name in ("one", "two"):
        shutil.copytree(model, home / "models" / name)
    return convert([REFERENCE / "vit"]).path.parent.parent


# --- models ---


def test_what_is_installed_is_listed_with_size_precision_and_licence(command, two):
    code, out, err = command("models", "--json")
    assert code == 0, err
    rows = json.loads(out)
    assert [(row["name"], row["kind"], row["problem"]) for row in rows] == [
        ("one", "model", None), ("two", "model", None), ("nsfw", "filter", None),
    ]  # fmt: skip
    assert {row["precision"] for row in rows} == {"float32"}
    assert rows[0]["bytes"] == sum(p.stat().st_size for p in (two / "models" / "one").rglob("*") if p.is_file())
    assert "one   model" in command("models")[1]


def test_nothing_installed_is_said_with_what_to_type(command):
    code, out, err = command("models")
    assert (code, out, "flux-krea setup" in err) == (0, "", True)
    assert command("models", "--json")[:2] == (0, "[]\n")


def test_the_default_is_one_truth_for_command_config_and_python(command, two, tmp_path):
    with pytest.raises(ModelError, match="flux-krea models default NAME"):
        find_model(None)
    assert command("models", "default", "two")[0] == 0
    assert find_model(None) == two / "models" / "two"
    assert json.loads(command("config", "--json")[1]) == {"model": "two"}
    assert [row["default"] for row in json.loads(command("models", "--json")[1])] == [False, True, False]
    tiny = ["--width", "32", "--height", "32", "--steps", "1", "--json"]
    code, out, err = command("generate", "a frog", *tiny)
    assert code == 0, err
    assert command("config", "model", "one")[0] == 0
    assert find_model(None) == two / "models" / "one"
    for name in ("three", "nsfw"):
        code, _, err = command("models", "default", name)
        assert (code, f"no model is installed as '{name}'; expected one, two" in err) == (3, True)
    assert find_model(None) == two / "models" / "one"


def test_a_damaged_config_is_not_passed_over(command, two):
    (two / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json cannot be read"):
        find_model(None)
    assert command("models")[0] == 3


def test_a_model_is_removed_by_yes_alone_and_is_no_default_any_more(command, two):
    command("models", "default", "one")
    code, _, err = command("models", "rm", "one")
    assert (code, "--yes" in err) == (2, True)
    assert (two / "models" / "one").is_dir()
    size = sum(p.stat().st_size for p in (two / "models" / "one").rglob("*") if p.is_file())
    code, _, err = command("models", "rm", "one", "--yes")
    assert (code, f"{size / 1e6:.1f} MB freed" in err) == (0, True)
    assert [path.name for path in (two / "models").iterdir()] == ["two"]
    assert find_model(None) == two / "models" / "two"
    assert command("models", "rm", "nsfw", "--yes")[0] == 0
    assert not (two / "filters" / "nsfw").exists()
    assert command("models", "rm", "one", "--yes")[0] == 3


def test_files_that_the_converter_did_not_write_are_not_deleted(command, two):
    (two / "models" / "one" / "notes.txt").write_text("mine")
    code, _, err = command("models", "rm", "one", "--yes")
    assert (code, "also holds notes.txt" in err) == (2, True)
    assert (two / "models" / "one" / "model_index.json").exists()


def test_a_linked_model_loses_its_link_and_nothing_else(command, model, home):
    (home / "models").mkdir(parents=True)
    (home / "models" / "linked").symlink_to(model)
    assert [row["name"] for row in json.loads(command("models", "--json")[1])] == ["linked"]
    code, _, err = command("models", "rm", "linked", "--yes")
    assert (code, "what it led to is still there" in err) == (0, True)
    assert (model / "model_index.json").exists()
    assert list((home / "models").iterdir()) == []


@pytest.mark.parametrize("damage", ["shorter", "missing", "json"])
def test_what_is_damaged_is_listed_as_such_and_can_be_removed(command, two, damage):
    shard = next((two / "models" / "one" / "vae").glob("*.safetensors"))
    if damage == "shorter":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "missing":
        shard.unlink()
    else:
        (two / "models" / "one" / "manifest.json").write_text("[]")
    row = json.loads(command("models", "--json")[1])[0]
    assert {"shorter": "bytes, not", "missing": "is missing", "json": "holds a list"}[damage] in row["problem"]
    assert command("models", "rm", "one", "--yes")[0] == 0


def test_a_filter_that_was_tried_can_be_replaced(two, home):
    (two / "filters" / "nsfw" / "selftest.json").write_text("{}")
    assert convert([REFERENCE / "vit"], force=True).path == two / "filters" / "nsfw"
