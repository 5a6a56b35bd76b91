"""Every command of the README, run as it stands there."""

import os
import re
import signal
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

import macs
import nano as judging
import numpy as np
import pytest
from helpers import DATA, ROOT
from pictures import is_right
from PIL import Image
from test_compat import CARDS, OPENING

from mlx_flux_krea.commands.demo import _PROMPT as DEMO
from mlx_flux_krea.licence import PAGE
from mlx_flux_krea.provenance import read_record

README = (ROOT / "README.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder that looks like the checkout as far as the README's commands see it."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "tests").mkdir()
    (folder / "tests" / "data").symlink_to(DATA)
    return folder


def run(command, folder):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    ran = subprocess.run(command, cwd=folder, env=environment, shell=True, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{command}\n{ran.stderr}"
    return ran


def open_page(command, folder):
    """Opens the page with a browser that does nothing, asks it for its state, and presses Ctrl-C."""
    environment = os.environ | {"BROWSER": "true"}
    words = [Path(sys.executable).parent / command.split()[0], *command.split()[1:]]
    with subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        link, _, token = process.stdout.readline().strip().partition("#token=")
        asked = urllib.request.Request(f"{link}api/status", headers={"Authorization": f"Bearer {token}"})
        for address in (link, asked):
            with urllib.request.urlopen(address, timeout=20) as answer:
                assert answer.status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def test_the_first_command_installs_and_makes_a_right_picture(workplace):
    install, _, demo = blocks("sh")[0].strip().rpartition(" && ")
    assert install == 'python3 -m venv .venv && . .venv/bin/activate && pip install -e ".[tests]"'  # as .ci/run does
    run(demo, workplace)
    assert is_right(Image.open(workplace / "demo.png"), [("circle", "yellow"), ("star", "white")], "blue")
    assert Image.open(workplace / "demo-large.png").size == (480, 480)


@pytest.mark.slow
def test_commands_with_fewer_evaluations_draw_what_they_ask_for(tmp_path):
    """Those of docs/fewer-steps.md."""
    page = (ROOT / "docs" / "fewer-steps.md").read_text()
    (commands,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    run(f"set -e\n{commands}", tmp_path)
    made = sorted(tmp_path.glob("*.png"))
    assert len(made) == commands.count("flux-krea generate") == 4
    assert all(is_right(Image.open(path), [("star", "red")], "blue") for path in made)


def test_the_second_command_is_the_one_that_runs_this():
    assert blocks("sh")[1] == "python -m pytest\n"
    assert "python -m pytest\n" in (ROOT / ".ci" / "run").read_text()


# Prompts of the README for the small model, and the things that their pictures must show.
SHOWN = {
    "a red circle on a blue background": ([("circle", "red")], "blue"),
    "a large yellow star above a small pink ring on a purple background": (
        [("star", "yellow"), ("ring", "pink")],
        "purple",
    ),
    DEMO: ([("circle", "yellow"), ("star", "white")], "blue"),
    "a white star on a red background": ([("star", "white")], "red"),
    "a white star to the left of a small blue circle on a red background": (
        [("circle", "blue"), ("star", "white")],
        "red",
    ),
    "a green star on a blue background": ([("star", "green")], "blue"),
    "a large circle on a blue background": None,  # its colour is not said, and must not be the negative prompt's
    "a large red cross on a white background": ([("cross", "red")], "white"),
    "a large red star on a blue background": ([("star", "red")], "blue"),
    "a large green cross on a white background": ([("cross", "green")], "white"),
    "a large pink square on a white background": ([("square", "pink")], "white"),
    "a large blue ring on a yellow background": ([("ring", "blue")], "yellow"),
}


def shows(path: Path) -> bool:
    """Returns True if a picture of the README shows its prompt."""
    expected, picture = SHOWN[read_record(path)["prompt"]], Image.open(path).convert("RGB")
    if expected is None:
        (shape,) = judging.look(np.array(picture))
        return shape.shape == "circle" and shape.colour != "red"
    return is_right(picture, *expected)


@pytest.mark.slow
def test_the_other_commands_work_in_their_order_and_draw_what_they_say(workplace):
    commands = [line for block in blocks("sh")[2:] for line in block.splitlines()]
    assert len(commands) == 29
    for command in commands:
        (open_page if command == "flux-krea ui" else run)(command, workplace)
    made = {path.name for path in workplace.glob("*.[pw]*") if not re.search("large|sheet", path.name)}
    assert {"two.png", "star.png", "again.webp", *(f"cross_{n}.png" for n in range(1, 6)), "out-3.png"} <= made
    wrong = [name for name in made if not shows(workplace / name)]
    assert wrong == []


def test_every_prompt_for_the_small_model_is_one_that_is_judged():
    prompts = re.findall(r'(?:generate|demo) "([^"]+)"', "".join(blocks("sh"))) + re.findall(
        r'pipe\("([^"]+)"', "".join(blocks("python"))
    )
    for prompt in prompts:
        choices = re.search(r"{(.*?)}", prompt)
        for choice in choices[1].split("|") if choices else [""]:
            assert (prompt.replace(choices[0], choice) if choices else prompt) in SHOWN
    assert len(prompts) >= 8


@pytest.mark.slow
def test_the_python_example_works(workplace):
    (example,) = blocks("python")
    run(f"{sys.executable} -c '{example}'", workplace)
    assert shows(workplace / "star-7.png")


def test_the_lines_that_install_name_this_distribution():
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = "".join(blocks("shell")).splitlines()
    assert [line.split()[-1] for line in lines] == [about["name"]] * len(lines)
    assert [line.split()[0] for line in lines] == ["uv", "pipx", "python3"]
    assert "mlx-flux-krea[gguf]" in README
    assert "mlx-flux-krea[ui]" in README
    assert {"gguf", "ui"} <= about["optional-dependencies"].keys()


def programs(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("i", range(len(programs("python.md"))))
@pytest.mark.slow
def test_the_programs_of_the_page_about_python_run(tmp_path, i):
    program = tmp_path / "program.py"
    program.write_text(programs("python.md")[i])
    ran = run(f"{sys.executable} {program}", tmp_path)
    assert "stopped" in ran.stdout or "interrupt" not in program.read_text()
    things = {"circle.png": "red circle blue", "square.png": "white square black"}
    things |= {f"shape-{seed}.png": "red star white" for seed in (1, 2)}
    things |= {f"shape-{seed}.png": "blue ring white" for seed in (3, 4)}
    things |= {f"after-4-steps-{seed}.png": "red star blue" for seed in (1, 2)}
    for path in tmp_path.glob("*.png"):
        colour, shape, ground = things[path.name].split()
        assert is_right(Image.open(path), [(shape, colour)], ground), path.name


def test_the_page_about_python_shows_the_card_as_it_is():
    page = (ROOT / "docs" / "python.md").read_text()
    assert f"```text\n{OPENING.format('FLUX.1-Krea-dev')}{CARDS['FLUX.1-Krea-dev']}```" in page


def test_the_page_about_the_licence_says_what_a_user_must_know():
    page = (ROOT / "docs" / "licence.md").read_text()
    for part in (
        "non-commercial", "2(d)", "competes with FLUX.1 [dev]", "https://bfl.ai", "safety@blackforestlabs.ai",
        "flux-krea log export", "at random", "Limitations", "not for", "made by AI",
    ):  # fmt: skip
        assert part in page, part
    assert README.count("docs/licence.md") >= 3
    home = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Homepage"]
    assert f"{home}/blob/main/docs/licence.md" == PAGE
    assert "{LICENCE_PAGE}" in (ROOT / "mlx_flux_krea" / "commands" / "setup.py").read_text()


def test_links_lead_to_files_and_headings():
    pages = [ROOT / "README.md", *(ROOT / "docs" / name for name in ("licence.md", "python.md"))]
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
            name, _, heading = target.partition("#")
            assert (page.parent / name).exists(), target
            slugs = [re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in HEADINGS.findall(README)]
            assert not heading or heading in slugs, target


HEADINGS = re.compile(r"^#+ (.*)$", re.MULTILINE)


@pytest.mark.slow
def test_commands_that_need_the_real_weights_are_only_shown(command):
    for line in "".join(blocks("bash")).splitlines():
        code, out, _ = command(line.split()[1], "--help")
        assert (line.split()[0], code) == ("flux-krea", 0)
        for option in re.findall(r" (--?[a-z-]+)", line):
            assert option in out


@pytest.mark.slow
def test_the_tables_are_what_their_program_computes():
    for table in macs.page().split("\n\n"):
        assert f"\n{table}\n" in README, "run: python benchmarks/macs.py"
