"""A model whose licence asks for it draws nothing before a person has agreed to that licence."""

import hashlib
import json
import shutil

import pytest
from helpers import acknowledge, edit_json

from mlx_flux_krea import FluxPipeline
from mlx_flux_krea.errors import FiltersError
from mlx_flux_krea.filters import acknowledgement as licence

SIZE = ["--width", "32", "--height", "32", "--steps", "1", "--check", "review"]


@pytest.fixture
def strict(model, tmp_path):
    """The tiny pipeline as a model that requires filters, with a licence."""
    folder = shutil.copytree(model, tmp_path / "strict")
    edit_json(folder / "model_index.json", filters="required")
    (folder / "LICENSE.md").write_text("No commerce. Déjà vu.\n", encoding="utf-8")
    return folder


def test_nothing_is_loaded_before_somebody_agreed(command, strict, home):
    for shard in strict.rglob("*.safetensors"):
        shard.unlink()  # nobody gets as far as that
    code, out, err = command("generate", "a cat", "-m", strict, *SIZE)
    assert (code, out) == (6, "")
    assert f"the licence of this model was not acknowledged ({strict / 'LICENSE.md'})" in err
    assert f"flux-krea setup --model {strict}" in err
    with pytest.raises(FiltersError, match="flux-krea setup"):
        FluxPipeline.from_pretrained(strict)("a cat")
    assert not [path for path in home.rglob("*") if path.is_file()]


def test_once_is_enough_for_all_models_with_this_text(command, strict, home, tmp_path):
    acknowledge(strict)
    recorded = json.loads((home / "licences.json").read_text())
    assert list(recorded) == [hashlib.sha256((strict / "LICENSE.md").read_bytes()).hexdigest()]
    assert recorded.popitem()[1].keys() == {"model", "date", "software"}
    assert (home / "licences.json").stat().st_mode & 0o777 == 0o600
    assert command("generate", "a cat", "-m", strict, *SIZE)[0] == 5
    assert command("generate", "a cat", "-m", shutil.copytree(strict, tmp_path / "again"), *SIZE)[0] == 5


def test_another_text_is_another_licence(command, strict):
    acknowledge(strict)
    (strict / "LICENSE.md").write_text("No commerce. Version 2.\n")
    assert command("generate", "a cat", "-m", strict, *SIZE)[0] == 6
    acknowledge(strict)
    assert len(licence.acknowledged()) == 2
    assert command("generate", "a cat", "-m", strict, *SIZE)[0] == 5


def test_without_a_text_what_the_converter_wrote_is_what_counts(strict):
    (strict / "LICENSE.md").unlink()
    assert licence.find_text(strict)[0] == strict / "README.md"
    (strict / "NOTICE").write_text("A notice.\n")
    assert licence.find_text(strict) == (strict / "NOTICE", b"A notice.\n")
    for name in ("NOTICE", "README.md"):
        (strict / name).unlink()
    with pytest.raises(FiltersError, match=r"has no licence text in it"):
        FluxPipeline.from_pretrained(strict)("a cat")


@pytest.mark.parametrize("content", ["", "[]", "{", '"all"'])
def test_a_damaged_record_agrees_to_nothing(command, strict, home, content):
    acknowledge(strict)
    (home / "licences.json").write_text(content)
    code, out, err = command("generate", "a cat", "-m", strict, *SIZE)
    assert (code, out, "licences.json" in err) == (6, "", True)


def test_a_model_that_requires_no_filters_needs_nobody(command, model, home):
    assert command("generate", "a cat", "-m", model, *SIZE[:6])[0] == 0
    assert not (home / "licences.json").exists()
