"""`--lora`, <lora:NAME:W> in prompts, and the verbs that list, add, remove and describe adapters."""

import json

import adapters as files
import pytest
from helpers import levels
from hub import Hub
from PIL import Image
from test_resume import failing

from mlx_flux_krea.adapters.installed import installed
from mlx_flux_krea.provenance import read_record

QUICK = ["-m", "nano", "--width", "32", "--height", "32", "--steps", "1", "--seed", "1"]
FRAME = "a red circle on a blue background"


@pytest.fixture
def style(tmp_path):
    """An adapter for the small model."""
    return files.small(tmp_path / "style.safetensors", **{"modelspec.trigger_phrase": "ppr style"})


@pytest.fixture
def draw(command, tmp_path):
    """The pictures of a `generate` that must succeed, and what it said."""

    def draw(*args, prompt=(FRAME,)):
        code, out, err = command("generate", *prompt, *QUICK, "--force", *args)
        assert code == 0, err
        return [Image.open(tmp_path / name).copy() for name in out.split()], err

    return draw


def test_a_file_changes_the_picture_by_its_weight(draw, style, tmp_path):
    (plain,), _ = draw()
    (none,), _ = draw("--lora", f"{style}=0")
    (whole,), said = draw("--lora", style)
    assert "adapter style, weight 1: applied 58 of 58" in said
    assert levels(plain, none) == 0
    assert levels(plain, whole) > 20
    (one,) = read_record(tmp_path / "out.png")["adapters"]
    assert (one["name"], one["weight"], one["applied"], one["source"]) == ("style", 1.0, "58 of 58", style.name)
    assert str(tmp_path) not in json.dumps(read_record(tmp_path / "out.png"))  # pictures are passed on


def test_a_name_in_the_prompt_is_applied_and_never_drawn(command, draw, style, tmp_path):
    assert command("models", "add", style, "--name", "paper")[0] == 0
    (wanted,), _ = draw("--lora", "paper=0.5")
    (tagged,), _ = draw(prompt=[f"{FRAME} <lora:paper:0.5>"])
    assert levels(wanted, tagged) == 0
    assert read_record(tmp_path / "out.png")["prompt"] == FRAME
    code, out, err = command("generate", "a frog <lora:nowhere:1>", *QUICK)
    assert (code, out) == (2, "")
    assert "'nowhere', which is not installed; expected paper; install it: flux-krea models add FILE" in err


@pytest.mark.slow
def test_rows_of_a_prompt_file_have_adapters_of_their_own(draw, style, tmp_path):
    second = files.small(tmp_path / "second.safetensors", seed=2)
    lone = [draw("--lora", style)[0][0], draw("--lora", f"{style}=0.5", "--lora", second)[0][0], draw()[0][0]]
    rows = [{"lora": str(style)}, {"lora": [f"{style}=0.5", str(second)]}, {}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": FRAME, **row}) for row in rows))
    made, said = draw("--prompts", tmp_path / "rows.jsonl", "-o", "{n}.png", prompt=())
    assert [levels(a, b) for a, b in zip(lone, made, strict=True)] == [0, 0, 0]
    assert "adapter style, weight 1, 0.5: applied 58 of 58" in said
    (tmp_path / "rows.csv").write_text(f"prompt,lora\n{FRAME},{style}=0.5; {second}\n")
    made, _ = draw("--prompts", tmp_path / "rows.csv", "-o", "{n}.png", prompt=())
    assert levels(lone[1], made[0]) == 0


@pytest.mark.slow
def test_a_picture_is_repeated_with_its_adapters_and_without(draw, style, tmp_path):
    (first,), _ = draw("--lora", f"{style}=0.7")
    (plain,), _ = draw("-o", "plain.png")
    style.unlink()  # found by its hash, among the installed ones
    (again,), _ = draw("--from", "out.png", "-o", "again.png", prompt=())
    (without,), _ = draw("--from", "out.png", "--lora", "none", "-o", "without.png", prompt=())
    assert (levels(first, again), levels(plain, without)) == (0, 0)


@pytest.mark.slow
def test_a_missing_adapter_of_a_picture_is_an_error_with_its_hash_and_source(command, draw, style, home):
    draw("--lora", style)
    digest = read_record(style.parent / "out.png")["adapters"][0]["sha256"]
    assert command("models", "rm", "style", "--yes")[0] == 0
    moved = style.rename(style.with_name("moved.safetensors"))
    code, _, err = command("generate", "--from", "out.png")
    assert (code, digest in err, style.name in err) == (3, True, True)
    moved.rename(style)
    assert command("generate", "--from", "out.png", "--force", "-o", "again.png")[0] == 0


@pytest.mark.parametrize(
    "adapters",
    ["x", [1], [{"source": "a", "sha256": "x", "weight": 1}], [{"source": "a", "sha256": "0" * 64, "weight": "1"}],
     [{"source": 1, "sha256": "0" * 64, "weight": 1}], [{"source": "a", "sha256": "0" * 64, "weight": 1e9}]],
)  # fmt: skip
def test_a_record_with_other_things_than_adapters_is_refused(command, draw, monkeypatch, adapters):
    draw()
    record = read_record("out.png") | {"adapters": adapters}
    monkeypatch.setattr("mlx_flux_krea.commands.shared.jobs.read_record", lambda path: record)
    code, _, err = command("generate", "--from", "out.png")
    assert (code, "Traceback" in err) == (2, False)


@pytest.mark.slow
def test_a_run_is_resumed_with_its_adapters(command, draw, style, tmp_path):
    (whole,), _ = draw("--lora", f"{style}=0.7", "--steps", "3", "-o", "whole.png")
    with failing("denoise", 2):
        code, _, _ = command("generate", FRAME, *QUICK, "--lora", f"{style}=0.7", "--steps", "3", "-o", "cut.png")
    assert code == 1
    style.unlink()
    code, out, err = command("resume")
    assert code == 0, err
    assert levels(whole, Image.open(tmp_path / out.strip())) == 0


@pytest.mark.parametrize(
    ("args", "code", "word"),
    [
        (["--lora", "nowhere"], 3, "there is no adapter 'nowhere'"),
        (["--lora", "style=much"], 3, "no adapter 'style=much'"),
        (["--lora", "style=nan"], 2, "nan is not in the range"),
        (["--lora", "style=1000"], 2, "not in the range"),
        (["--lora", ""], 2, "names no adapter"),
        (["--lora", "{style}", "--lora", "{style}=0.5"], 2, "style is given twice"),
        (["--lora", "{kohya}"], 3, "expected (rank, 128)"),
        (["--lora", "{folder}/notes.txt"], 3, "no safetensors file"),
    ],
)
def test_what_cannot_be_used_is_said_before_anything_is_drawn(command, style, tmp_path, args, code, word):
    (tmp_path / "notes.txt").write_text("x")
    places = {"style": style, "kohya": files.reference("kohya"), "folder": tmp_path}
    got, out, err = command("generate", FRAME, *QUICK, *(arg.format(**places) for arg in args))
    assert (got, out, word in err) == (code, "", True), err


def test_adapters_are_listed_described_and_removed(command, style):
    assert command("models", "add", style)[0] == 0
    listed = json.loads(command("models", "--json")[1])
    (one,) = (entry for entry in listed if entry["kind"] == "adapter")
    assert (one["name"], one["precision"], one["triggers"]) == ("style", "58 LoRA, rank 2", ["ppr style"])
    assert "words: ppr style" in command("models")[1]
    for path in (style, "style"):
        code, out, _ = command("inspect", path)
        assert code == 0
        for word in ("58 LoRA, rank 2", "58 of 58 modules", "ppr style", "not stated", "adds no requirement"):
            assert word in out, (path, word)
    assert command("models", "rm", "style", "--yes")[0] == 0
    assert installed() == {}
    assert command("models", "rm", "style", "--yes")[0] == 3


def test_a_plan_counts_adapters_and_installs_none(command, style):
    plain = json.loads(command("plan", "nano", "--json")[1])
    code, out, err = command("plan", "nano", "--lora", f"{style}=0.5", "--json")
    assert code == 0, err
    planned = json.loads(out)
    (one,) = planned["adapters"]
    assert (one["name"], one["weight"], one["applied"]) == ("style", 0.5, "58 of 58")
    assert planned["stages"]["denoise"] - plain["stages"]["denoise"] == one["bytes"] > 0
    assert installed() == {}
    command("models", "add", style)
    again = json.loads(command("plan", "nano", "--lora", "style=0.5", "--json")[1])
    assert (again["adapters"], again["stages"]) == (planned["adapters"], planned["stages"])
    assert "adapter style, weight 1: 58 of 58 modules, " in command("plan", "nano", "--lora", "style")[1]
    assert command("plan", "nano", "--lora", "nowhere")[0] == 3


@pytest.mark.slow
def test_the_plan_of_flux_counts_adapters_at_every_precision(command, tmp_path):
    path = files.header(tmp_path / "Hyper-FLUX.1-dev-8steps-lora.safetensors", files.turbo_keys())
    plain, planned = (json.loads(command("plan", *lora, "--json")[1]) for lora in ([], ["--lora", path]))
    (one,) = planned["adapters"]
    assert (one["weight"], one["applied"]) == (0.125, "504 of 504")
    assert 1.0e9 < one["bytes"] < 1.2e9, "q, k and v of their own make a branch of three times the rank"
    for precision, stages in plain["precisions"].items():
        assert planned["precisions"][precision]["most"] - stages["most"] in (0, one["bytes"]), precision


def test_every_byte_of_an_installed_adapter_is_verified(command, style, home):
    command("models", "add", style)
    assert "2 files" in command("verify", "style")[2]
    place = home / "adapters" / "style"
    (place / "lengths-0123456789abcdef-float32.safetensors").write_bytes(b"made again when it is damaged")
    assert command("verify", "style")[0] == 0
    (place / "adapter.safetensors").write_bytes((place / "adapter.safetensors").read_bytes()[:-1] + b"x")
    code, out, err = command("verify", "style", "--json")
    assert (code, json.loads(out)["differs"]) == (3, ["adapter.safetensors"])
    assert "flux-krea models rm style" in err


def test_inspect_shows_the_adapters_of_a_picture(command, draw, style):
    draw("--lora", f"{style}=0.5")
    facts = json.loads(command("inspect", "out.png", "--json")[1])
    (one,) = facts["record"]["adapters"]
    shown = " ".join(command("inspect", "out.png")[1].split())
    for key in ("name", "weight", "sha256", "source", "applied"):
        assert f"adapters.1.{key} {one[key]}" in shown


def test_a_file_for_flux_is_described_without_a_model(command, tmp_path):
    path = files.header(tmp_path / "Hyper-FLUX.1-dev-8steps-lora.safetensors", files.turbo_keys())
    facts = json.loads(command("inspect", path, "--json")[1])
    assert (facts["applied"], facts["modules"], facts["preset"]) == (504, 504, [8.0, 3.5, 0.125])
    assert facts["dev"]
    out = command("inspect", path)[1]
    assert "8 steps, guidance 3.5, weight 0.125" in out
    assert "required: it is called" in out
    assert "perhaps" not in out
    assert "perhaps   for few steps" in command("inspect", path.rename(tmp_path / "renamed.safetensors"))[1]


@pytest.mark.slow
def test_an_adapter_for_few_steps_sets_what_it_was_published_with(command, tmp_path):
    path = files.small(tmp_path / "flux.1-turbo-alpha-lora.safetensors", only="")
    size = ["-m", "nano", "--width", "32", "--height", "32", "--seed", "1"]
    code, _, err = command("generate", FRAME, *size, "--lora", path)
    assert code == 0, err
    assert "8 steps and guidance 3.5, as alimama-creative/FLUX.1-Turbo-Alpha publishes" in err
    record = read_record(tmp_path / "out.png")
    assert (record["num_inference_steps"], record["guidance_scale"]) == (8, 3.5)
    command("generate", FRAME, *size, "--lora", path, "--steps", "1", "--guidance", "2", "-o", "two.png")
    record = read_record(tmp_path / "two.png")
    assert (record["num_inference_steps"], record["guidance_scale"]) == (1, 2.0)


@pytest.mark.slow
def test_an_adapter_that_may_be_one_for_few_steps_gets_a_note_and_sets_nothing(command, tmp_path):
    path = files.small(tmp_path / "renamed.safetensors", only="", rank=64)
    size = ["-m", "nano", "--width", "32", "--height", "32", "--seed", "1"]
    code, _, err = command("generate", FRAME, *size, "--lora", f"{path}=0.01")
    assert code == 0, err
    assert "renamed is perhaps for few steps" in err
    assert read_record(tmp_path / "out.png")["num_inference_steps"] == 28
    assert "perhaps" not in command("generate", FRAME, *size, "--lora", f"{path}=0.01", "--steps", "1", "--force")[2]


# --- the hub ---


@pytest.fixture
def hub(tmp_path, style, monkeypatch):
    """A repository with an adapter, a card and another file."""
    folder = tmp_path / "repository"
    folder.mkdir()
    style.rename(folder / "style.safetensors")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: flux-1-dev-non-commercial-license\n---\n")
    with Hub(folder, "someone/paper") as served:
        for name, value in served.env(tmp_path / "hub home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield served


@pytest.mark.slow
def test_an_adapter_is_fetched_from_the_hub_once_with_what_says_its_licence(run_elsewhere, hub, tmp_path):
    code, _, err = run_elsewhere("generate", FRAME, *QUICK, "--lora", "someone/paper=0.5")
    assert code == 0, err
    (one,) = read_record(tmp_path / "out.png")["adapters"]
    assert one["source"] == "someone/paper:style.safetensors"
    assert "flux-1-dev-non-commercial-license" in one["license"]
    before = len(hub.fetched())
    code, _, err = run_elsewhere("generate", FRAME, *QUICK, "--lora", "someone/paper:style.safetensors=0.5", "--force")
    assert (code, len(hub.fetched())) == (0, before), err


@pytest.mark.slow
def test_a_repository_with_several_files_asks_for_one(run_elsewhere, hub):
    (hub.folder / "other.safetensors").write_bytes((hub.folder / "style.safetensors").read_bytes())
    code, _, err = run_elsewhere("models", "add", "someone/paper")
    assert (code, "2 safetensors files; expected other.safetensors, style.safetensors" in err) == (3, True), err
    code, _, err = run_elsewhere("models", "add", "someone/paper:nothing.safetensors")
    assert (code, "no file 'nothing.safetensors'" in err) == (3, True), err
    code, _, err = run_elsewhere("models", "add", "someone/paper:other.safetensors", "--name", "p")
    assert code == 0, err


@pytest.fixture
def run_elsewhere(tmp_path, home, monkeypatch):
    """The installed command in a process of its own, which reads the variables of the hub."""
    from helpers import run_command

    def run(*args):
        ran = run_command(*args, cwd=tmp_path)
        return ran.returncode, ran.stdout, ran.stderr

    return run


def test_purge_deletes_adapters(command, style):
    command("models", "add", style)
    assert command("purge", "--adapters", "--yes")[0] == 0
    assert installed() == {}
