"""`bench`: a step in each type, resident and streamed, two pictures, the filters, and the block to share."""

import json
import re

import judges
import pytest
from helpers import PIPELINE, ROOT, TOKENIZERS, edit_index
from mlx_flux_krea.convert import convert

from mlx_flux_krea.commands import bench as bench_verb
from mlx_flux_krea.commands.shared import estimates, measuring
from mlx_flux_krea.filters import judges as filters_judges
from mlx_flux_krea.memory import step_flops
from mlx_flux_krea.weights import open_model

SIZE = ("--width", 32, "--height", 32, "--steps", 2)
ONE = (*SIZE, "--dtype", "float32")


@pytest.fixture
def short(model, tmp_path):
    """The tiny model, with few tokens, as one whose licence asks for filters: nobody sees what bench generates."""
    return judges.as_required(model, tmp_path / "short", max_sequence_length=16)


def test_a_step_is_measured_resident_and_streamed_and_a_second_picture(command, short, tmp_path):
    code, out, err = command("bench", "-m", short, *ONE, "--json")
    assert code == 0, err
    facts = json.loads(out)
    resident, streamed = facts["measured"]
    assert (resident["way"], resident["resident_blocks"], resident["read_per_step"]) == ("resident", 5, 0)
    assert (streamed["way"], streamed["resident_blocks"], streamed["total_blocks"]) == ("streamed", 0, 5)
    assert streamed["read_per_step"] > 0
    assert streamed["peak"] < resident["peak"]
    assert facts["seconds_per_step"] == resident["seconds"]
    operations = step_flops(open_model(short).flux.sizes, 32, 32, 16)
    assert facts["tflops"] * facts["seconds_per_step"] * 1e12 == pytest.approx(operations)
    assert facts["pictures"].keys() == {"first", "second"}
    assert facts["pictures"]["second"] == pytest.approx(sum(facts["stages"].values()))
    assert facts["peaks"].keys() == {"text", "denoise", "decode"}
    assert (facts["filters"], facts["steps"], facts["dtype"]) == (None, 2, "float32")
    assert [path.name for path in tmp_path.iterdir()] == ["short"]
    block = measuring.block(facts | {"filters": None}, "not installed").splitlines()
    assert len(block) == 8
    assert block[-1].split(" | ")[2] == f"{resident['seconds']:.3g} s"


@pytest.mark.slow
def test_the_block_says_everything_and_ends_with_a_row_of_the_readme(command, short, monkeypatch):
    monkeypatch.setattr(measuring, "device", lambda: "Apple M2 Pro")
    monkeypatch.setattr(measuring, "this_chip", lambda: "M2 Pro")
    code, out, err = command("bench", "-m", short, *ONE)
    assert code == 0, err
    machine, model, head, resident, streamed, pictures, filters, row = out.splitlines()
    assert machine.startswith("Apple M2 Pro, ")
    assert model == "pipeline, 16 bits or more; 32 x 32, 2 steps"
    assert re.split(r" {2,}", head)[-3:] == ["of peak", "read a step", "memory"]
    assert resident.split()[:4] == ["float32", "5", "of", "5"]
    assert streamed.split()[:4] == ["float32", "0", "of", "5"]
    assert re.search(r"first picture .* s, second .* s; 28 steps in ", pictures)
    assert filters == "filters not installed"
    assert row.count(" | ") == len(measuring.HEAD) - 1
    assert row.startswith("| Apple M2 Pro, ")
    assert f"to share these numbers: {bench_verb.SHARE}" in err


@pytest.mark.slow
def test_every_type_is_measured_and_the_better_16_bits_recommended(command, tmp_path, monkeypatch):
    folder = convert([PIPELINE], tmp_path / "half", tokenizers=TOKENIZERS, dtype="bfloat16").path
    edit_index(folder, max_sequence_length=16)
    code, out, err = command("bench", "-m", folder, *SIZE, "--json")
    assert code == 0, err
    measured = [(one["dtype"], one["way"]) for one in json.loads(out)["measured"]]
    types = ("bfloat16", "float16", "float32")  # the model's own first
    assert measured == [(dtype, way) for dtype in types for way in ("resident", "streamed")]
    assert "float16 takes" not in err
    monkeypatch.setattr(estimates, "has_fast_halves", lambda: True)
    assert "float16 takes" in command("bench", "-m", folder, *SIZE)[2]


@pytest.mark.slow
def test_one_amount_of_memory_is_measured_alone_and_the_duration_said_first(command, short, monkeypatch):
    monkeypatch.setattr(bench_verb, "this_chip", lambda: "M1")
    code, out, err = command("bench", "-m", short, *ONE, "--memory", "1GB", "--json")
    assert code == 0, err
    assert [one["way"] for one in json.loads(out)["measured"]] == ["1GB"]
    assert err.startswith("takes about under 1 s at half of the chip's peak")


@pytest.mark.slow
def test_a_type_that_does_not_fit_is_left_out_and_none_at_all_is_an_error(command, short, monkeypatch):
    assert command("bench", "-m", short, *ONE, "--memory", "1MB")[0] == 8
    plan = measuring.StepBench.plan

    def only_float32(self, dtype, memory):
        return plan(self, dtype, memory if dtype == "float32" else "1MB")

    monkeypatch.setattr(measuring.StepBench, "plan", only_float32)
    monkeypatch.setattr(measuring, "COMPUTE_TYPES", ("bfloat16", "float32"))
    code, out, err = command("bench", "-m", short, *SIZE, "--json")
    assert code == 0, err
    assert {one["dtype"] for one in json.loads(out)["measured"]} == {"float32"}
    assert "note: bfloat16 is not measured: " in err


@pytest.mark.slow
def test_filters_are_measured_where_they_are_installed(command, short, home, monkeypatch):
    judges.install()
    monkeypatch.setattr(filters_judges, "load_judge", judges.load_judge)
    code, out, err = command("bench", "-m", short, *ONE, "--memory", "1GB")
    assert code == 0, err
    times = re.search(r"^filters (.*) s at the start, (.*) s a prompt, (.*) s a picture$", out, re.M)
    assert times
    assert all(float(seconds) > 0 for seconds in times.groups())
    for path in (home / "filters" / "nsfw").glob("*.safetensors"):
        path.write_bytes(b"")
    assert "filters not measured: the filter nsfw" in command("bench", "-m", short, *ONE, "--memory", "1GB")[1]


def test_the_readme_shows_how_numbers_enter_its_table():
    readme = (ROOT / "README.md").read_text()
    head = f"| {' | '.join(measuring.HEAD)} |"
    assert head in readme
    rows = readme.partition(head)[2].partition("\n\n")[0].splitlines()[2:]
    assert rows
    assert all(row.count(" | ") == len(measuring.HEAD) - 1 for row in rows)
    assert bench_verb.SHARE in readme
    form = (ROOT / ".github" / "ISSUE_TEMPLATE" / bench_verb.SHARE.partition("=")[2]).read_text()
    for part in ("Share your Mac's numbers", "flux-krea bench", "flux-krea doctor --chip"):
        assert part in form
