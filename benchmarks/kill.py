"""SIGKILL at any moment: nothing half-written has a name, nothing is lost, and the next start completes the work.

    python benchmarks/kill.py [--kills 300] [--seed 0] [--scenarios generate resume convert review setup]

A scenario is a command on the small models of the tests. It runs once undisturbed, which gives its time and its files.
Then it is killed at a moment drawn uniformly from that time, its folder is examined, it is started again until it ends,
and what is there must be what the undisturbed run made, with a log that is whole and has each event of a picture once.
The last line is JSON: kills by scenario, how many came before the end, and every broken promise.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pexpect
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests")]
PIPELINE, TOKENIZERS = ROOT / "tests" / "data" / "reference" / "pipeline", ROOT / "tests" / "data" / "tokenizers"
PICTURE = ["-m", "nano", "--steps", "4", "--width", "64", "--height", "64"]


@dataclass
class Scenario:
    """A command, the folders it starts with, and the command that completes it after a kill.

    Attributes:
        command: arguments of `flux-krea`.
        again: arguments of the next starts, one list after the other, until the first exits with `code`.
        code: exit code of a complete run.
        start: folder that every run begins with a copy of; None: an empty one.
        answers: to questions at a terminal, by their last words; None: there is no terminal.
        program: `python` arguments instead of the installed command.
        same: whether the files of the end must have the bytes of the undisturbed run.
    """

    command: list[str]
    again: list[list[str]]
    code: int = 0
    start: Path | None = None
    answers: dict[str, str] | None = None
    program: list[str] = field(default_factory=lambda: [str(Path(sys.executable).parent / "flux-krea")])
    environment: dict[str, str] = field(default_factory=dict)
    same: bool = True

    def begin(self, work: Path, argv: list[str]):
        """Starts the command in a folder; at a terminal of its own where it asks questions."""
        plain = {name: value for name, value in os.environ.items() if name not in ("TERM", "TERM_PROGRAM")}
        environment = plain | {"FLUX_KREA_HOME": str(work / "home"), "HOME": str(work), "HF_HUB_OFFLINE": "1"}
        environment |= self.environment
        where = work / "out"
        if self.answers is not None:
            return pexpect.spawn(
                self.program[0],
                [*self.program[1:], *argv],
                cwd=str(where),
                env=environment,
                encoding="utf-8",
                timeout=120,
            )
        return subprocess.Popen(
            [*self.program, *argv], cwd=where, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def finish(self, work: Path, argv: list[str]) -> tuple[int, str]:
        """Runs the command to its end. Returns its exit code and what it said."""
        process = self.begin(work, argv)
        if self.answers is None:
            said = process.communicate(timeout=300)[1]
            return process.returncode, said
        said = _answer(process, self.answers, until=None)
        process.close()
        return process.exitstatus if process.exitstatus is not None else -process.signalstatus, said

    def kill(self, work: Path, after: float) -> bool:
        """Starts the command and kills it after so many seconds. Returns whether it was still running."""
        process = self.begin(work, self.command)
        if self.answers is not None:
            _answer(process, self.answers, until=time.monotonic() + after)
            alive = process.isalive()
            if alive:
                os.killpg(process.pid, signal.SIGKILL)
            process.close(force=True)
            return alive
        try:
            process.communicate(timeout=after)
            return False
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return True


def _answer(process, answers: dict[str, str], until: float | None) -> str:
    """Answers questions until the end, or until a moment of the monotonic clock."""
    said, expected = "", [*answers, pexpect.EOF, pexpect.TIMEOUT]
    while True:
        left = 60 if until is None else until - time.monotonic()
        found = process.expect_exact(expected, timeout=max(left, 0))
        said += process.before or ""
        if expected[found] in (pexpect.EOF, pexpect.TIMEOUT):
            return said
        process.sendline(answers[expected[found]])


def scenarios(root: Path, wanted: list[str]) -> dict[str, Scenario]:
    """Makes the folders that scenarios start with.

    Args:
        root: for them.
        wanted: names of scenarios.
    """
    made: dict[str, Scenario] = {}
    three = ["a {red|green|blue} circle on a white background", *PICTURE, "--seed", "7", "-o", "out_{n}.png"]
    if "generate" in wanted:
        generate = ["generate", *three[:-1], "out_{n}.jpg", "--contact-sheet"]
        made["generate"] = Scenario(generate, [["resume"], generate])
    if "resume" in wanted:
        start, begun = root / "resume", root / "work"
        _interrupted(begun, ["generate", "a star", *PICTURE, "--steps", "16", "--seed", "3", "-o", "star.png"])
        begun.rename(start)
        made["resume"] = Scenario(["resume"], [["resume"]], start=start)
    if "convert" in wanted:
        convert = ["convert", str(PIPELINE), "--tokenizers", str(TOKENIZERS), "-o", "made"]
        made["convert"] = Scenario(convert, [convert, [*convert, "--force"]])
    if "review" in wanted:
        start = root / "review"
        (start / "out").mkdir(parents=True)
        asked = Scenario(["generate", *three, "--check", "review"], [])
        code, said = asked.finish(start, asked.command)
        assert code == 5, said
        answers = {"Your name": "a reviewer", "open it?": "yes", "unlawful?": "no", "without the right to?": "no"}
        made["review"] = Scenario(
            ["review", "-o", "r_{prompt}.png"], [["review", "-o", "r_{prompt}.png"]], 0, start, answers, same=False
        )
    if "setup" in wanted:
        from fitted import LICENCE, write_published
        from test_setup import PROGRAM

        (root / "published").mkdir()
        published = write_published(root / "published")
        agreed = ["--accept-licence", hashlib.sha256(LICENCE.encode()).hexdigest(), "--quantize", "none", "--offline"]
        named = [part for name in ("model", "nsfw", "pixtral") for part in (f"--{name}", str(published[name]))]
        setup = ["setup", *named, *agreed, "--allow-unknown-filter"]
        environment = {"PYTHONPATH": str(ROOT), "TINY": str(published["tiny"])}
        program = [sys.executable, "-c", PROGRAM]
        made["setup"] = Scenario(setup, [setup, setup], program=program, environment=environment, same=False)
    return made


def _interrupted(work: Path, argv: list[str]) -> None:
    """Leaves an unfinished run in a folder: terminated at the fifth step. (A job in the background ignores Ctrl-C.)"""
    (work / "out").mkdir(parents=True)
    process = Scenario(argv, []).begin(work, [*argv, "--json"])
    for line in process.stderr:
        if line.startswith("{") and json.loads(line).get("stage") == "denoise" and json.loads(line)["done"] >= 5:
            process.terminate()
            break
    process.communicate()
    assert process.returncode == 143, process.returncode


def examine(work: Path) -> list[str]:
    """Returns broken promises right after a kill: files that have a name are whole, and the log can be read."""
    broken = []
    for path in [*(work / "out").rglob("*"), *(work / "home" / "quarantine").rglob("*.png")]:
        if path.suffix in (".png", ".jpg") and path.is_file() and path.name[0] != ".":
            try:
                with Image.open(path) as image:
                    image.load()
            except Exception as error:
                broken.append(f"{path.name} is not whole: {error}")
    made = work / "out" / "made"
    if made.exists():
        code, said = Scenario([], []).finish(work, ["verify", str(made)])
        broken += [f"made is not whole: {said}"] if code else []
    if (work / "home" / "log").exists():
        code, said = Scenario([], []).finish(work, ["log", "verify"])
        broken += [f"the log is not whole: {said}"] if code else []
    return broken


def settled(work: Path) -> list[str]:
    """Returns broken promises at the end: leftovers, and events that a picture has twice."""
    broken = [f"{path.name} was left" for path in work.rglob(".*.partial*")]
    broken += [f"{path.name} was left" for path in (work / "home" / "interrupted").glob("*")]
    log = work / "home" / "log" / "log.jsonl"
    entries = (
        [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")] if log.exists() else []
    )
    events = Counter((entry.get("image"), entry["event"]) for entry in entries if entry.get("image"))
    for (image, event), count in events.items():
        if event in ("generated", "written") and count > 1:  # killed before it was written, it is reviewed once more
            broken.append(f"{event} stands {count} times in the log for picture {image[:8]}")
    return broken


def pictures(work: Path) -> dict[str, str]:
    """Returns the sha256 of every file in the output folder."""
    files = (path for path in sorted((work / "out").rglob("*")) if path.is_file())
    return {path.relative_to(work).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(scenario: Scenario, kills: int, rng: random.Random, root: Path, tick: Callable[[], None]) -> dict:
    """Kills a scenario so many times.

    Returns:
        "kills", "running" (how many came before the end) and "broken" (promises, each with the moment).
    """

    work = root / "work"  # always the same, since unfinished runs keep the paths of their outputs

    def fresh() -> None:
        shutil.rmtree(work, ignore_errors=True)
        if scenario.start:
            shutil.copytree(scenario.start, work)
        (work / "out").mkdir(parents=True, exist_ok=True)

    fresh()
    begin = time.monotonic()
    code, said = scenario.finish(work, scenario.command)
    seconds, expected = time.monotonic() - begin, pictures(work)
    assert code == scenario.code, said
    assert not settled(work), settled(work)
    running, broken = 0, []
    for _ in range(kills):
        fresh()
        after = rng.uniform(0.05, 1.02) * seconds
        running += scenario.kill(work, after)
        faults = examine(work)
        is_complete = expected and pictures(work) == expected  # setup makes none there, and can always start again
        for argv in [] if is_complete else scenario.again:
            code, said = scenario.finish(work, argv)
            if code == scenario.code:
                break
        there = pictures(work)
        if there.keys() != expected.keys() or (scenario.same and there != expected):
            different = sorted(name for name in expected.keys() | there.keys() if there.get(name) != expected.get(name))
            faults.append(f"not the files of an undisturbed run: {different[:6]}; {said.strip()[-300:]}")
        faults += settled(work)
        broken += [f"after {after:.2f} s of {seconds:.2f}: {fault}" for fault in faults]
        tick()
    return {"kills": kills, "running": running, "broken": broken}


def main() -> int:
    """Prints what each scenario came to."""
    names = ["generate", "resume", "convert", "review", "setup"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenarios", nargs="+", choices=names, default=names)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work, tqdm(total=given.kills, unit="kill", disable=None) as bar:
        found = {}
        for place, (name, scenario) in enumerate(scenarios(Path(work), given.scenarios).items()):
            share = len(range(place, given.kills, len(given.scenarios)))
            rng = random.Random(f"{given.seed} {name}")
            found[name] = run(scenario, share, rng, Path(work), lambda: bar.update())
            print(f"{name:10}{found[name]['kills']} kills, {found[name]['running']} before its end", flush=True)
            for fault in found[name]["broken"]:
                print(f"  {fault}", flush=True)
    print(json.dumps(found))
    return any(one["broken"] for one in found.values())


if __name__ == "__main__":
    sys.exit(main())
