"""The documentation is true: help pages, tree of files, exit codes, tool schema, completion, examples."""

import json
import re
import runpy
import shutil
import subprocess
import sys

import click
import pytest
from helpers import ROOT, run_command
from pictures import is_right
from PIL import Image

from mlx_flux_krea import errors
from mlx_flux_krea.home import NANO
from mlx_flux_krea.provenance import read_record


def test_the_help_pages_are_current():
    page = runpy.run_path(str(ROOT / "docs" / "make.py"))["page"]()
    assert (ROOT / "docs" / "commands.md").read_text() == page, "run: python docs/make.py"


def test_every_verb_and_its_options_are_in_the_help_pages():
    from mlx_flux_krea import cli

    page = (ROOT / "docs" / "commands.md").read_text()
    for name in cli.VERBS:
        command = cli.VERBS[name].load()
        section = page.partition(f"\n## flux-krea {name}\n")[2].partition("\n## ")[0]
        assert all(option.opts[-1] in section for option in command.params if isinstance(option, click.Option)), name


def test_options_and_files_that_the_advice_on_prompting_names_exist():
    text = (ROOT / "docs" / "prompting.md").read_text()
    page = (ROOT / "docs" / "commands.md").read_text()
    for option in set(re.findall(r"--[a-z-]+", text)):
        assert f"{option} " in page, option


def test_every_file_in_the_tree_exists():
    (tree,) = re.findall(r"```text\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    folder = ROOT
    for line in tree.splitlines():
        inside = line.startswith("  ")
        for name in re.split(r" {2,}", line.strip()):
            if re.fullmatch(r"[a-z_0-9]+(\.py|/)", name):
                path = (folder if inside else ROOT) / name
                assert path.exists(), path
                if not inside and name.endswith("/"):
                    folder = ROOT / name
    listed = set(re.findall(r"[a-z_0-9]+\.py", tree))
    ours = {p.name for p in [*(ROOT / "convert").glob("*.py"), *(ROOT / "mlx_flux_krea").glob("*.py")]}
    assert ours - {"__init__.py"} <= listed


def test_every_error_has_its_exit_code_in_the_docs():
    page = (ROOT / "docs" / "exit-codes.md").read_text()
    rows = {row[0]: row[2] for row in re.findall(r"^\| ([0-9, ]+) \| (.*?) \|(.*?)\|$", page, re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    for kind in kinds:
        if kind is not errors.FluxKreaError:
            (found,) = (named for codes, named in rows.items() if str(kind.exit_code) in codes.split(", "))
            assert f"`{kind.__name__}`" in found, kind


def test_each_route_that_is_shut_names_tests_that_exist():
    page = (ROOT / "docs" / "security.md").read_text()
    table = page.partition("## Routes")[2].partition("\n## ")[0]
    rows = [row for row in table.splitlines() if row.startswith("| ") and not row.startswith("| route")]
    assert len(rows) > 20
    for row in rows:
        names = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row.split("|")[3])
        assert names, row
        for file, name in names:
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), (file, name)


# --- tool-schema ---


def schema(command, *args):
    code, out, err = command("tool-schema", *args)
    assert code == 0, err
    return json.loads(out)


def test_an_answer_to_the_tool_schema_is_a_row_that_is_drawn(command, model, tmp_path):
    """Every default, and every end of a range that is small enough to be drawn."""
    properties = schema(command)["parameters"]["properties"]
    assert (properties["steps"]["default"], properties["guidance"]["default"]) == (28, 4.5)
    answer = {name: p["default"] for name, p in properties.items() if "default" in p}
    answer |= {"prompt": "a frog", "width": 32, "height": 32, "steps": properties["steps"]["minimum"]}
    answer["seed"] = properties["seed"]["maximum"]
    del answer["megapixels"], answer["style_rule"]  # the schema says what excludes the one and goes with the other
    (tmp_path / "answer.jsonl").write_text(json.dumps(answer))
    code, _, err = command("generate", "--prompts", "answer.jsonl", "-m", model)
    assert code == 0, err
    record = read_record(tmp_path / "out.png")
    assert (record["seed"], record["num_inference_steps"], record["guidance_scale"]) == (2**64 - 1, 1, 4.5)


def test_what_lies_outside_the_schema_is_refused(command, model, tmp_path):
    properties = schema(command)["parameters"]["properties"]
    tried = 0
    for name, p in properties.items():
        outside = [p["minimum"] - 1, p["maximum"] + 1] if "minimum" in p else ["nonsense"] if "enum" in p else []
        for value in outside:
            (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", name: value}))
            code, out, err = command("generate", "--prompts", "a.jsonl", "-m", model)
            assert (code, out) == (2, ""), (name, value, err)
            tried += 1
    assert tried == 28


def test_the_schema_has_the_defaults_of_the_model_that_is_named(command, model):
    properties = schema(command, "-m", model)["parameters"]["properties"]
    index = json.loads((model / "model_index.json").read_text())
    assert properties["guidance"]["default"] == index["defaults"]["guidance_scale"]
    assert properties["width"]["default"] == index["defaults"]["width"]


# --- completion ---


@pytest.mark.parametrize(
    ("words", "found"),
    [("gen", ["generate"]), ("generate --as", ["--aspect"]), ("generate --seed 1 2 --like d", ["diffusers"])],
)
def test_the_shell_is_told_what_can_follow(tmp_path, words, found):
    asked = {"COMP_WORDS": f"flux-krea {words}", "COMP_CWORD": str(len(words.split()))}
    ran = run_command(cwd=tmp_path, _FLUX_KREA_COMPLETE="bash_complete", **asked)
    assert (ran.returncode, ran.stdout.split()) == (0, [f"plain,{word}" for word in found])


def test_installed_models_are_completed(tmp_path, home):
    for name in ("krea-8bit", "krea-4bit", "schnell"):
        (home / "models" / name).mkdir(parents=True)
        (home / "models" / name / "model_index.json").write_text("{}")
    asked = {"COMP_WORDS": "flux-krea generate -m k", "COMP_CWORD": "3"}
    ran = run_command(cwd=tmp_path, _FLUX_KREA_COMPLETE="bash_complete", **asked)
    assert ran.stdout.split() == ["plain,krea-4bit", "plain,krea-8bit"]


@pytest.mark.parametrize("shell", ["zsh", "bash", "fish"])
def test_the_script_for_each_shell_is_one_that_it_reads(command, tmp_path, shell):
    code, out, _ = command("completion", shell)
    assert code == 0
    assert "_FLUX_KREA_COMPLETE" in out
    if shutil.which(shell) is None:
        pytest.skip(f"this machine has no {shell}")
    (tmp_path / "script").write_text(out)
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


# --- examples ---


@pytest.mark.parametrize(
    ("example", "made"),
    [
        ("side_by_side", ["star-1.png", "star-2.png", "star-3.png", "star-4.png"]),
        ("from_an_image", ["circle-0.3.png", "circle-0.6.png", "circle-0.9.png", "star.png"]),
        ("watch_and_stop", ["ring.png"]),
    ],
)
@pytest.mark.core("watch_and_stop-made2")
def test_the_examples_run_on_the_small_model(tmp_path, example, made):
    small = tmp_path / "model"
    shutil.copytree(NANO, small)
    index = json.loads((small / "model_index.json").read_text())
    index["defaults"]["num_inference_steps"] = 4
    (small / "model_index.json").write_text(json.dumps(index))
    program = [sys.executable, str(ROOT / "examples" / f"{example}.py"), str(small), "32"]
    ran = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert sorted(p.name for p in tmp_path.glob("*.png")) == (made if "stopped" not in ran.stdout else [])
    for name in tmp_path.glob("*.png"):
        assert Image.open(name).size == (32, 32)
    assert len(ran.stdout.splitlines()) >= 3


SHOWN = {
    "side_by_side": {f"star-{seed}.png": ("star", "red", "white") for seed in (1, 2, 3, 4)},
    "from_an_image": {"star.png": ("star", "white", "blue"), "circle-0.9.png": ("circle", "green", "blue")},
    "watch_and_stop": {},
}


@pytest.mark.parametrize("example", SHOWN)
@pytest.mark.slow
def test_the_examples_draw_what_they_say_and_stop_late(tmp_path, example):
    program = [sys.executable, str(ROOT / "examples" / f"{example}.py")]
    ran = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=True)
    for name, (shape, colour, ground) in SHOWN[example].items():
        assert is_right(Image.open(tmp_path / name), [(shape, colour)], ground), name
    steps = [int(step) for step in re.findall(r"^step (\d+)", ran.stdout, re.MULTILINE)]
    assert not steps or steps[-1] > 10
