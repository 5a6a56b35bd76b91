"""The contents of the home folder: `models` lists and removes it, `doctor` examines it, `purge` deletes it."""

import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import REFERENCE, edit_json
from mlx_flux_krea.convert import convert

from mlx_flux_krea.checkpoint import Checkpoint
from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.files import try_lock
from mlx_flux_krea.filters import judges
from mlx_flux_krea.filters.ledger import Ledger, Verdict
from mlx_flux_krea.home import find_model
from mlx_flux_krea.presets import NSFW_THRESHOLD
from mlx_flux_krea.worker import Worker


@pytest.fixture
def two(model, home):
    """Two installed models and a filter."""
    for name in ("one", "two"):
        shutil.copytree(model, home / "models" / name)
    path = convert([REFERENCE / "vit"], allow_unknown_filter=True).path
    (path / "selftest.json").write_text("{}")
    return path.parent.parent


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
    assert (code, out.split()[4:6], "flux-krea setup" in err) == (0, ["nano", "built"], True)
    (one,) = json.loads(command("models", "--json")[1])
    assert (one["name"], one["kind"]) == ("nano", "built in")


@pytest.mark.parametrize(
    ("recorded", "asked", "is_found"),
    [
        ({"repository": "black-forest-labs/FLUX.1-Krea-dev"}, "black-forest-labs/FLUX.1-Krea-dev", True),
        ({"repository": "black-forest-labs/FLUX.1-Krea-dev"}, "Black-Forest-Labs/flux.1-krea-dev", True),
        ({"repository": "somebody/FLUX.1-Krea-dev"}, "black-forest-labs/FLUX.1-Krea-dev", False),
        ({"name": "FLUX.1-Krea-dev"}, "black-forest-labs/FLUX.1-Krea-dev", True),  # from a folder of that name
        ({"name": "flux1-krea-dev"}, "black-forest-labs/FLUX.1-Krea-dev", True),  # from the published single file
        ({"name": "flux1-dev"}, "black-forest-labs/FLUX.1-Krea-dev", False),
        ({"name": "FLUX.1-Krea-dev"}, "FLUX.1-Krea-dev", False),  # no hub id
    ],
)
def test_a_hub_id_opens_the_model_that_was_converted_from_it(two, recorded, asked, is_found):
    edit_json(two / "models" / "two" / "model_index.json", **recorded)
    if is_found:
        assert find_model(asked) == two / "models" / "two"
    else:
        with pytest.raises(ModelError, match="flux-krea convert"):
            find_model(asked)


def test_a_hub_id_with_nothing_installed_is_answered_with_the_command_that_converts_it(two):
    with pytest.raises(ModelError, match="flux-krea convert owner/name"):
        find_model("owner/name")


def test_of_several_models_from_one_hub_id_the_default_is_meant(command, two):
    for name in ("one", "two"):
        edit_json(two / "models" / name / "model_index.json", repository="owner/name")
    with pytest.raises(ModelError, match=r"made from owner/name: one, two; .*models default NAME"):
        find_model("owner/name")
    assert command("models", "default", "two")[0] == 0
    assert find_model("owner/name") == two / "models" / "two"


def test_the_default_is_one_truth_for_command_config_and_python(command, two, tmp_path):
    with pytest.raises(ModelError, match="flux-krea models default NAME"):
        find_model(None)
    assert command("models", "default", "two")[0] == 0
    assert find_model(None) == two / "models" / "two"
    assert json.loads(command("config", "--json")[1]) == {"model": "two"}
    assert [row["default"] for row in json.loads(command("models", "--json")[1])] == [False, True, False]
    tiny = ["--width", "32", "--height", "32", "--steps", "1", "--json"]
    code, _, err = command("generate", "a frog", *tiny)
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
    assert (code, "its target is still there" in err) == (0, True)
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
    assert convert([REFERENCE / "vit"], force=True, allow_unknown_filter=True).path == two / "filters" / "nsfw"


# --- doctor ---


def examined(command, *options):
    code, out, err = command("doctor", "--json", *options)
    report = json.loads(out)
    return code, report["findings"], report["wrong"], err


def test_a_whole_installation_is_called_so(command, two):
    code, found, wrong, err = examined(command)
    assert (code, wrong) == (0, []), err
    assert found["model one"].endswith("complete by size")
    assert found["hub login"].startswith("no")
    assert found["log"] == "none yet"
    assert re.fullmatch(r".* free, reads \d+\.\d GB/s", found["disk"])
    assert re.search(r"^model two ", command("doctor")[1], re.M)


def test_an_empty_home_is_not_wrong_and_stays_empty(command, home):
    """The small model is there for everybody."""
    code, found, wrong, _ = examined(command)
    assert (code, wrong) == (0, [])
    assert found["models"] == "none but the built-in one; install one: flux-krea setup"
    assert not home.exists()


def test_nobodys_name_path_or_token_is_in_it(command, two, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    (two / "models" / "one" / "vae" / "config.json").write_text("{")
    for options in ((), ("--json",)):
        code, out, err = command("doctor", *options)
        assert code == 3
        assert "$FLUX_KREA_HOME/models/one/vae/config.json" in out
        assert not any(secret in out + err for secret in ("hf_secret", str(two), str(two.parent), str(Path.home())))
    assert examined(command)[1]["hub login"].startswith("yes")
    monkeypatch.delenv("FLUX_KREA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "Ada"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "Ada" / "data"))
    shutil.copytree(two / "models", tmp_path / "Ada" / "data" / "flux-krea" / "models")
    assert "~/data/flux-krea/models/one/vae" in command("doctor")[1] or sys.platform == "darwin"
    assert "Ada" not in command("doctor")[1]


@pytest.mark.parametrize(
    ("damage", "code", "says"),
    [("model", 3, "model one"), ("filter", 6, "filter nsfw"), ("untried", 6, "filter nsfw"), ("log", 6, "log")],
)
def test_what_is_damaged_is_named_and_decides_the_exit_code(command, two, damage, code, says):
    if damage == "model":
        next((two / "models" / "one" / "vae").glob("*.safetensors")).unlink()
    elif damage == "filter":
        shard = next((two / "filters" / "nsfw" / "nsfw").glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-4])
    elif damage == "untried":
        (two / "filters" / "nsfw" / "selftest.json").unlink()
    else:
        with Ledger().run("review"):
            pass
        path = two / "log" / "log.jsonl"
        path.write_text(path.read_text().replace("review", "nobody"))
    got, found, wrong, _ = examined(command)
    assert (got, len(wrong)) == (code, 1)
    assert found[says].startswith("WRONG: ")


def test_a_model_that_requires_filters_makes_their_absence_wrong(command, two):
    edit_json(two / "models" / "one" / "model_index.json", filters="required")
    edit_json(two / "models" / "one" / "manifest.json", **{"model_index.json": None})
    shutil.rmtree(two / "filters")
    _, found, _, _ = examined(command)
    assert found["filter pixtral"] == "WRONG: not installed, and a model here requires it; flux-krea setup"


def test_full_asks_the_filters_again(command, two):
    """The tiny classifier has random weights: its answers are recorded by its own question, and one is changed."""
    judge = judges.load_judge("nsfw", two / "filters" / "nsfw", lambda stages, run: run)
    (labels,) = Worker().run(judge.images, [judges.drawn_picture()])
    is_right = labels["nsfw"] < NSFW_THRESHOLD
    value = math.log(labels["nsfw"] / labels["normal"])
    (two / "filters" / "nsfw" / "selftest.json").write_text(json.dumps({"drawn picture": value}))
    assert examined(command)[0] == 0
    assert examined(command, "--full")[0] == (0 if is_right else 6)
    (two / "filters" / "nsfw" / "selftest.json").write_text(json.dumps({"drawn picture": value + 1}))
    assert examined(command)[0] == 0
    assert examined(command, "--full")[0] == 6


# --- purge ---

OF_THE_PAGE = ("page.sqlite", "page.sqlite-wal", "uploads")


def kept_picture(event: str = "waiting"):
    with Ledger().run("review") as run:
        one = run.keep(np.zeros((16, 16, 3), np.uint8), {"seed": 1})
        return run.ledger.settle(one, Verdict(event, one.facts["pixels"]))


def left(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("options", "stay"),
    [
        (["--weights"], {"filters", "log", "quarantine", "interrupted", *OF_THE_PAGE}),
        (["--filters"], {"models", "log", "quarantine", "interrupted", *OF_THE_PAGE}),
        (["--logs"], {"models", "filters", "quarantine", "interrupted", *OF_THE_PAGE}),
        (["--quarantine"], {"models", "filters", "log", "interrupted", *OF_THE_PAGE}),
        (["--unfinished"], {"models", "filters", "log", "quarantine", *OF_THE_PAGE}),
        (["--uploads"], {"models", "filters", "log", "quarantine", "interrupted", "page.sqlite", "page.sqlite-wal"}),
        (["--page"], {"models", "filters", "log", "quarantine", "interrupted", "uploads"}),
        (["--weights", "--filters", "--logs", "--quarantine", "--page"], {"log", "interrupted", "uploads"}),  # its log
    ],
)
def test_what_is_named_goes_and_nothing_else(command, two, options, stay):
    kept_picture()
    (two / "uploads").mkdir()
    for name in ("page.sqlite", "page.sqlite-wal", "uploads/0123456789abcdef.png"):
        (two / name).write_bytes(bytes(10))
    unfinished = Checkpoint({})
    unfinished.write()
    unfinished.close()
    command("models", "default", "one")
    size = sum(path.stat().st_size for path in (two / "models").rglob("*") if path.is_file())
    code, _, err = command("purge", *options)
    assert (code, "confirm with --yes" in err) == (2, True)
    kept = {"models", "filters", "log", "quarantine", "interrupted", "config.json", *OF_THE_PAGE}
    assert {Path(name).parts[0] for name in left(two)} == kept
    code, out, err = command("purge", *options, "--yes", "--json")
    assert code == 0, err
    assert {Path(name).parts[0] for name in left(two)} - {"config.json", "page.lock"} == stay
    if options == ["--page"]:
        assert json.loads(out)["bytes"] == 20
    if "--weights" in options:
        assert json.loads(out)["freed"]["weights"] == size
        assert json.loads((two / "config.json").read_text()) == {}


def test_data_of_an_open_page_stays(command, home):
    home.mkdir()
    (home / "page.sqlite").touch()
    lock = try_lock(home / "page.lock")
    assert lock is not None
    code, _, err = command("purge", "--page", "--yes")
    assert (code, "flux-krea ui is running" in err, (home / "page.sqlite").exists()) == (2, True, True)
    os.close(lock)
    assert command("purge", "--page", "--yes")[0] == 0


def test_nothing_goes_that_nobody_named(command, two):
    for options in ([], ["--yes"]):
        code, _, err = command("purge", *options)
        named = "--weights, --adapters, --components, --filters, --logs, --quarantine, --unfinished, --uploads, --page"
        assert (code, named in err) == (2, True)
    assert left(two / "models")


def test_the_log_says_that_the_pictures_went_and_stays_whole(command, home):
    one = kept_picture()
    assert command("purge", "--quarantine", "--yes")[0] == 0
    entry = Ledger().log.picture(one.image)
    assert (entry["event"], entry["reasons"]) == ("purged", ["its owner deleted it"])
    assert left(home / "quarantine") == []
    assert command("log", "verify")[0] == 0


def test_a_picture_of_a_run_at_work_stays(command, home):
    ledger = Ledger()
    with ledger.run("filters") as run:
        one = run.keep(np.zeros((16, 16, 3), np.uint8), {"seed": 1})
        code, out, _ = command("purge", "--quarantine", "--yes", "--json")
        assert (code, json.loads(out)["bytes"]) == (0, 0)
        assert one.path.exists()


@pytest.mark.parametrize("linked", ["models", "models/one"])
def test_no_link_out_of_the_home_folder_is_followed(command, two, tmp_path, linked):
    shutil.move(two / linked, tmp_path / "elsewhere")
    (two / linked).symlink_to(tmp_path / "elsewhere")
    before = left(tmp_path / "elsewhere")
    code, _, err = command("purge", "--weights", "--yes")
    assert (code, "was a link: its target is still there" in err) == (0, True)
    assert left(tmp_path / "elsewhere") == before
    assert not (two / "models").exists()
