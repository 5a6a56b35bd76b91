"""The real networks as judges, small: converted, tried, opened, and asked by the command.

Random weights know nothing about rights. So the last layer is fitted, by least squares over the hidden states of a
handful of inputs, to answer those as a trained model would; all before it, and the whole way to it, is the real one.
"""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fitted import fitted_filters
from helpers import PIPELINE, TOKENIZERS, acknowledge, edit_index, edit_json, edit_tensors, run_command
from mlx_flux_krea.convert import convert
from mlx_flux_krea.convert.quantize import QuantizationRecipe, choose
from PIL import Image
from test_filter_folders import wide  # noqa: F401

from mlx_flux_krea import FluxPipeline
from mlx_flux_krea.commands.shared import estimates
from mlx_flux_krea.errors import FiltersError, ModelError
from mlx_flux_krea.filters import judges
from mlx_flux_krea.filters.instructions import CANARIES
from mlx_flux_krea.filters.ledger import Ledger
from mlx_flux_krea.home import root as home
from mlx_flux_krea.models import filter_config
from mlx_flux_krea.models.filter_config import NSFW_SHA256, PIXTRAL_12B
from mlx_flux_krea.residency import Reader
from mlx_flux_krea.weights import PACKED, build, layer_widths, open_filter, parameters
from mlx_flux_krea.worker import Worker

ALLOWED, FORBIDDEN = "a cat on a wall", "a famous mouse"
SMALL = {"height": 32, "width": 48, "num_inference_steps": 2, "seed": 3}
SIZE = ["--height", "32", "--width", "48", "--steps", "2", "--seed", "3"]


@pytest.fixture(scope="module")
def krea(tmp_path_factory):
    """The tiny pipeline as a model whose licence asks for filters, and the picture that it draws of what is allowed."""
    path = convert([PIPELINE], tmp_path_factory.mktemp("krea") / "krea", dtype="float32", tokenizers=TOKENIZERS).path
    edit_index(path, max_sequence_length=32)
    picture = FluxPipeline.from_pretrained(path)(ALLOWED, **SMALL).images[0]
    edit_json(path / "model_index.json", filters="required")
    return path, np.asarray(picture)


@pytest.fixture(scope="module")
def sources(wide, krea, tmp_path_factory):  # noqa: F811
    """Both filters as published, small, fitted to answer the canaries and these tests' inputs rightly."""
    texts = {ALLOWED: False, FORBIDDEN: True}
    return fitted_filters(tmp_path_factory.mktemp("filters"), wide, texts, [krea[1]])


@pytest.fixture(scope="module")
def tried(sources, tmp_path_factory):
    """The folder of both filters, as the command has converted and tried them."""
    folder = tmp_path_factory.mktemp("tried")
    for source in sources:
        ran = run_command("convert", source, "--allow-unknown-filter", cwd=folder, FLUX_KREA_HOME=str(folder / "home"))
        assert ran.returncode == 0, ran.stderr
    return folder / "home" / "filters"


@pytest.fixture
def installed(tried, krea, home):
    acknowledge(krea[0])
    return shutil.copytree(tried, home / "filters")


@pytest.mark.slow
def test_the_command_converts_tries_and_installs_both(installed):
    for name in ("nsfw", "pixtral"):
        recorded = json.loads((installed / name / "selftest.json").read_text())
        assert recorded.keys() == {"drawn picture", *(CANARIES if name == "pixtral" else judges.more_pictures())}
    assert set(Worker().run(judges.open_judges)[0]) == {"nsfw", "pixtral"}


@pytest.mark.slow
def test_what_is_allowed_is_released_and_what_is_not_is_not_even_drawn(installed, krea, tmp_path):
    path, picture = krea
    ran = run_command("generate", ALLOWED, "-m", path, *SIZE, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), picture)
    ran = run_command("generate", FORBIDDEN, "-m", path, *SIZE, "-o", "second.png", cwd=tmp_path)
    assert ran.returncode == 4
    assert "the prompt seems to ask for a protected character" in ran.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["out.png"]
    events = [json.loads(line)["event"] for line in next((home() / "log").glob("*.jsonl")).read_text().splitlines()]
    assert events.count("released") == events.count("prompt_flagged") == 1


@pytest.mark.slow
def test_questions_that_are_asked_together_have_the_answers_that_they_have_alone(installed, monkeypatch):
    """With the real blocks from disk; and in groups, where memory has no room for all of them."""
    judge, passes, run = judges.PixtralJudge(open_filter("pixtral"), lambda stages, run: run), [], Worker().run
    monkeypatch.setattr(judges.PixtralJudge, "_margins", counted(passes, judges.PixtralJudge._margins))
    texts, pictures = [ALLOWED, "a third"], [judges.drawn_picture()[:, ::-1]]
    alone = [run(judge.images, [one])[0] for one in pictures], [run(judge.prompts, [one])[0] for one in texts]
    assert alone[1][0] != alone[1][1]
    for held, groups in ((judges.HELD, [3]), (1, [1, 1, 1])):
        passes.clear()
        monkeypatch.setattr(judges, "HELD", held)
        assert run(judge.together, pictures, texts) == alone
        assert passes == groups


def counted(passes, margins):
    return lambda self, questions: passes.append(len(questions)) or margins(self, questions)


@pytest.mark.slow
def test_a_cold_first_picture_reads_the_language_model_twice_and_of_its_table_some_rows(installed, krea, monkeypatch):
    """Once for its self-test and the prompt, and once for the picture, however much memory the run has."""
    read, fill = {}, Reader._fill

    def count(self, file, target, *, offset, tensor):
        read[tensor.partition(": ")[2]] = read.get(tensor.partition(": ")[2], 0) + len(target)
        fill(self, file, target, offset=offset, tensor=tensor)

    pipe = FluxPipeline.from_pretrained(krea[0])
    monkeypatch.setattr(judges, "_passed", set())
    monkeypatch.setattr(Reader, "_fill", count)
    assert pipe(ALLOWED, **SMALL).outcomes == ("released",)
    sizes = {name: info.end - info.start for name, (_, info) in open_filter("pixtral").network.tensors().items()}
    table = {name for name in sizes if name.startswith("embed_tokens.")}
    blocks = {name for name in sizes.keys() & read.keys() if name not in table}
    assert {name: read[name] for name in blocks} == {name: 2 * sizes[name] for name in blocks}
    assert {name for name in sizes if name.endswith("proj.weight")} <= blocks
    assert table <= read.keys()
    pipe.memory = pipe.plan(prompt=ALLOWED, **SMALL).least
    assert pipe(ALLOWED, **SMALL).outcomes == ("released",)  # a second picture: of the filters' questions one is left
    assert {name: read[name] for name in blocks} == {name: 3 * sizes[name] for name in blocks}


def test_both_filters_read_at_most_15_gb_for_a_cold_first_picture():
    """Both sources of Pixtral that `setup` takes: two passes, without its table; and the classifier, twice."""
    layers = choose("pixtral", layer_widths("pixtral", PIXTRAL_12B), QuantizationRecipe("4"))[0]
    arrays = parameters(build("pixtral", PIXTRAL_12B, layers))
    sizes = {name: array.nbytes if array.dtype in PACKED else 2 * array.size for name, array in arrays.items()}
    own = sum(size for name, size in sizes.items() if not name.startswith("embed_tokens."))
    classifier, ready = (estimates.filter_bytes()[name][1] for name in ("nsfw", "pixtral"))
    assert 2 * own + 2 * classifier == pytest.approx(14.70e9, abs=1e7)
    assert 2 * ready + 2 * classifier < 14.3e9  # its table included


@pytest.mark.slow
def test_a_filter_that_does_not_know_its_canaries_is_not_installed(wide, home, tmp_path):  # noqa: F811
    ran = run_command("convert", wide, "--allow-unknown-filter", cwd=tmp_path)
    assert ran.returncode == 6
    assert "the filter pixtral fails its self-test" in ran.stderr
    assert not (home / "filters" / "pixtral" / "selftest.json").exists()


@pytest.mark.parametrize("damage", ["zeroed", "permuted", "swapped", "truncated", "renamed"])
@pytest.mark.slow
def test_weights_that_are_not_what_they_were_stop_everything(installed, krea, tmp_path, damage):
    shard = next((installed / "pixtral" / "pixtral").glob("*.safetensors"))
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "renamed":
        shard.rename(shard.with_name("other.safetensors"))
    else:
        edit_tensors(shard, globals()[damage])
    with pytest.raises(FiltersError, match="pixtral"):
        FluxPipeline.from_pretrained(krea[0])(ALLOWED, **SMALL)


def zeroed(arrays):
    arrays["layers.0.feed_forward.down_proj.scales"] *= 0
    arrays["layers.0.attention.o_proj.scales"] *= 0
    arrays["layers.0.feed_forward.down_proj.biases"] *= 0
    arrays["layers.0.attention.o_proj.biases"] *= 0


def permuted(arrays):
    for part in ("weight", "scales", "biases"):
        name = f"layers.1.feed_forward.up_proj.{part}"
        arrays[name] = arrays[name][::-1]


def swapped(arrays):
    arrays["lm_head.weight"] = -arrays["lm_head.weight"]


@pytest.mark.slow
def test_the_self_test_runs_once_in_a_process(installed, monkeypatch):
    tested, original = [], judges.self_test
    monkeypatch.setattr(judges, "_passed", set())
    monkeypatch.setattr(judges, "self_test", lambda name, *more: tested.append(name) or original(name, *more))
    for _ in range(2):
        Worker().run(judges.open_judges)
    assert tested == ["nsfw", "pixtral"]
    Path(installed / "nsfw" / "model_index.json").touch()
    Worker().run(judges.open_judges)
    assert tested == ["nsfw", "pixtral", "nsfw"]


@pytest.mark.slow
def test_a_classifier_that_is_not_the_published_file_is_no_filter(installed, krea, tmp_path, monkeypatch, command):
    """Told by its hash, whatever its size, unless its folder says that somebody allowed it."""
    arguments = ["generate", ALLOWED, "-m", krea[0], *SIZE]
    monkeypatch.setattr(judges, "_passed", set())
    edit_json(installed / "nsfw" / "model_index.json", weights="published")
    code, stdout, stderr = command(*arguments)
    assert (code, stdout, list(tmp_path.iterdir())) == (6, "", [])
    assert (
        f"converted from another file than the published one, sha256 {sha_of('nsfw')}; expected {NSFW_SHA256}" in stderr
    )
    assert "flux-krea convert Falconsai/nsfw_image_detection --force; or review" in stderr
    monkeypatch.setattr(filter_config, "NSFW_SHA256", sha_of("nsfw"))
    assert command(*arguments)[0] == 0


@pytest.mark.slow
def test_every_entry_of_a_run_with_unknown_filters_names_them(installed, krea, tmp_path, command):
    for name in ("nsfw", "pixtral"):
        assert json.loads((installed / name / "model_index.json").read_text())["weights"] == "unknown"
    code, _, err = command("generate", ALLOWED, "-m", krea[0], *SIZE[:-1], "3", "4", "--contact-sheet")
    assert code in (0, 4, 7), err
    code, _, err = command("generate", FORBIDDEN, "-m", krea[0], *SIZE)
    assert code == 4, err
    entries = Ledger().log.read()
    assert {"run", "generated", "prompts_passed", "prompt_flagged", "written", "sheet"} <= {e["event"] for e in entries}
    assert {tuple(e.get("unknown_filters", ())) for e in entries} == {("nsfw", "pixtral")}


@pytest.mark.slow
def test_a_folder_of_an_earlier_version_is_unknown_unless_it_is_pinned(installed, monkeypatch):
    path = installed / "nsfw" / "model_index.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "weights"}))
    load = lambda: judges.load_judge("nsfw", installed / "nsfw", lambda parts, run: run)  # noqa: E731
    assert load().about["unknown"]
    monkeypatch.setattr(judges, "NSFW_VIT", open_filter("nsfw").network.sizes)
    with pytest.raises(FiltersError, match="from another file than the published one"):
        load()
    monkeypatch.setattr(filter_config, "NSFW_SHA256", sha_of("nsfw"))
    assert "unknown" not in load().about


@pytest.mark.slow
def test_an_earlier_record_of_one_picture_still_counts(installed):
    path = installed / "nsfw" / "selftest.json"
    recorded = json.loads(path.read_text())
    path.write_text(json.dumps({"drawn picture": recorded["drawn picture"]}))
    Worker().run(judges.open_judges)


def constant(arrays):
    arrays["classifier.weight"] *= 0


def nearly_constant(arrays):
    arrays["classifier.weight"] *= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("edit", [constant, nearly_constant])
def test_a_classifier_that_says_the_same_of_everything_is_not_installed(sources, home, tmp_path, edit):
    source = shutil.copytree(sources[0], tmp_path / "constant")
    edit_tensors(source / "model.safetensors", edit)
    ran = run_command("convert", source, "--allow-unknown-filter", cwd=tmp_path)
    assert ran.returncode == 6, ran.stderr
    assert "its logits over 3 pictures differ by 0.000" in ran.stderr
    assert "expected 0.05 or more" in ran.stderr
    assert not (home / "filters" / "nsfw" / "selftest.json").exists()


@pytest.mark.parametrize("name", ["nsfw", "pixtral"])
def test_a_filter_that_is_not_published_is_refused_unless_it_is_allowed(sources, home, tmp_path, name):
    ran = run_command("convert", sources[name == "pixtral"], cwd=tmp_path)
    assert (ran.returncode, (home / "filters" / name).exists()) == (3, False)
    assert f"is not the published filter {name}" in ran.stderr
    assert "add --allow-unknown-filter: the log of every run will say so" in ran.stderr


def test_a_filter_of_the_published_sizes_and_another_hash_is_refused_too(sources, tmp_path, monkeypatch):
    from mlx_flux_krea.convert import filters

    monkeypatch.setattr(filters, "check_sizes", lambda job: None)
    monkeypatch.setattr("mlx_flux_krea.convert.check_sizes", lambda job: None)
    with pytest.raises(ModelError, match=f"is not the published filter nsfw: sha256 .*{NSFW_SHA256}"):
        convert([sources[0]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def sha_of(name: str) -> str:
    return open_filter(name).index.source[0].sha256


STOPPED = """
import sys
from mlx_flux_krea import cli
from mlx_flux_krea.filters import judges
asked = judges.self_test
def self_test(*args):
    print("moment", file=sys.stderr, flush=True)
    sys.stdin.read()  # until the signal was sent
    return asked(*args)
judges.self_test = self_test
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_ctrl_c_ends_the_self_test_of_a_filter_that_has_its_place(sources, krea, home, tmp_path):
    """The filter is untried then, which is not enough, and the next conversion completes it."""
    acknowledge(krea[0])
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, "convert", str(sources[0]), "--allow-unknown-filter"],
        cwd=tmp_path, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert any("moment" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    assert "flux-krea: interrupted" in process.communicate(timeout=30)[1]
    folder = home / "filters" / "nsfw"
    assert (process.returncode, folder.exists(), (folder / "selftest.json").exists()) == (130, True, False)
    assert run_command("convert", sources[1], "--allow-unknown-filter", cwd=tmp_path).returncode == 0
    ran = run_command("generate", ALLOWED, "-m", krea[0], *SIZE, cwd=tmp_path)
    assert (ran.returncode, list(tmp_path.glob("*.png"))) == (6, [])
    assert "selftest.json cannot be read" in ran.stderr
    assert "install: flux-krea setup" in ran.stderr
    assert run_command("convert", sources[0], "--force", "--allow-unknown-filter", cwd=tmp_path).returncode == 0
    assert (folder / "selftest.json").exists()


def test_a_request_cannot_hold_its_own_frame():
    before, text, after = judges.request("anything")
    mark = before.split("\n")[-2]
    assert mark in after
    assert mark not in text
    assert judges.request("anything ")[0] != before
    assert "{mark}" not in before + after
