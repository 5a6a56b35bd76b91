"""Standard input, output and error that were closed at the start: no file of ours gets their numbers."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

TINY = "--width 32 --height 32 --steps 1 --seed 1"
COMMANDS = [
    ("generate 'a cat' -m {model} " + TINY, 0),
    ("demo", 0),
    ("purge --logs", 2),  # there is nobody to ask
    ("shell -m {model}", 0),
    ("review", 0),
    ("plan {model}", 0),
    ("inspect {model}", 0),
    ("generate -m {model}", 2),
]


CASES = [(command, code, "<&-") for command, code in COMMANDS]
CASES += [(*COMMANDS[0], closed) for closed in (">&-", "2>&-", "<&- >&- 2>&-")]


@pytest.mark.parametrize(("command", "code", "closed"), CASES)
def test_every_verb_ends_properly(model, tmp_path, home, command, code, closed):
    (home / "log").mkdir(parents=True)
    (home / "log" / "log.jsonl").write_text("")
    program = shlex.quote(str(Path(sys.executable).parent / "flux-krea"))
    line = f"exec {program} {command.format(model=shlex.quote(str(model)))} {closed}"
    ran = subprocess.run(
        ["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )
    assert ran.returncode == code, ran.stderr
    assert "Traceback" not in ran.stderr
    assert "bug in flux-krea" not in ran.stderr
    if command.startswith("generate 'a"):
        assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
