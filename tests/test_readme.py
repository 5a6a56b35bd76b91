"""Every command of the README, run as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import macs
import pytest
from helpers import DATA, ROOT
from pictures import is_right
from PIL import Image

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


def test_the_first_command_installs_and_makes_a_right_picture(workplace):
    install, _, demo = blocks("sh")[0].strip().rpartition(" && ")
    assert install == 'python3 -m venv .venv && . .venv/bin/activate && pip install -e ".[tests]"'  # as .ci/run does
    run(demo, workplace)
    assert is_right(Image.open(workplace / "demo.png"), [("circle", "red")], "blue")
    assert Image.open(workplace / "demo-large.png").size == (480, 480)


def test_the_second_command_is_the_one_that_runs_this():
    assert blocks("sh")[1] == "python -m pytest\n"
    assert "python -m pytest\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
def test_the_other_commands_work_in_their_order(workplace):
    commands = [line for block in blocks("sh")[2:] for line in block.splitlines()]
    assert len(commands) == 24
    for command in commands:
        run(command, workplace)
    made = {path.name for path in workplace.iterdir()}
    assert {"two-large.png", "star.png", "again.webp", "out-3.png", "cross-sheet.png", "cross_3.png"} <= made


def test_the_python_example_works(workplace):
    (example,) = blocks("python")
    run(f"{sys.executable} -c '{example}'", workplace)
    assert is_right(Image.open(workplace / "star-7.png"), [("star", "white")], "red")


def test_commands_that_need_the_real_weights_are_only_shown():
    for line in "".join(blocks("bash")).splitlines():
        ran = run(f"{line.split()[0]} {line.split()[1]} --help", ROOT)
        for option in re.findall(r" (--?[a-z-]+)", line):
            assert option in ran.stdout


@pytest.mark.slow
def test_the_tables_are_what_their_program_computes():
    for table in macs.page().split("\n\n"):
        assert f"\n{table}\n" in README, "run: python benchmarks/macs.py"
