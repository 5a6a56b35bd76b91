"""First run: what is missing, and `flux-krea setup` in a process of its own, whose lines say how far it is.

The steps are those of the command. Nobody is asked anything: the answers are given before it starts, and the licence is
agreed to by the hash of the text that was shown.
"""

import contextlib
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from mlx_flux_krea import home, presets
from mlx_flux_krea.commands.setup import STEPS
from mlx_flux_krea.commands.shared import estimates, settings, trials
from mlx_flux_krea.commands.shared.installation import FILTERS
from mlx_flux_krea.commands.shared.installed import find_installed
from mlx_flux_krea.errors import FluxKreaError
from mlx_flux_krea.filters import acknowledgement
from mlx_flux_krea.licence import PAGE

from .errors import HTTPProblem, invalid, plain

_LOG = 200  # lines that are kept
_FIELDS = {"check": str, "quantize": str, "accept_licence": str, "offline": bool}
_STEP = re.compile(rf"({'|'.join(STEPS)}): +(.*)")
_SHOWN = re.compile(r"This is the licence of .*; its sha256 is ([0-9a-f]{64})\.")
_PROGRESS = re.compile(r".{1,40}: .*\bof\b.*\d")


class Setup:
    """The process of `flux-krea setup`, while one runs, and what the last one said.

    Args:
        tell: called with the state when it changes.
    """

    def __init__(self, tell: Callable[[dict[str, Any]], None]):
        self._tell = tell
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._answers: dict[str, Any] = {}
        self._done: dict[str, str] = {}
        self._log: deque[str] = deque(maxlen=_LOG)
        self._said: list[str] = []  # since the last step
        self._progress: str | None = None
        self._licence: dict[str, str] | None = None
        self._error: dict[str, Any] | None = None

    @property
    def is_running(self) -> bool:
        """True while the process lives."""
        return self._process is not None and self._process.poll() is None

    def state(self) -> dict[str, Any]:
        """Returns what is missing, and how far the process is."""
        missing, running = _missing(), self.is_running
        now = next((name for name in STEPS if name not in self._done), None)
        steps = [{"name": name, "state": "done" if name in self._done else "waiting", "text": self._done.get(name, "")}
                 for name in STEPS]  # fmt: skip
        for step in steps:
            if step["name"] == now and (running or self._error):
                step["state"] = "running" if running else "failed"
        costs, seconds = estimates.filter_bytes(), estimates.filter_seconds()
        fetch, folder = (sum(costs[name][place] for name in FILTERS) for place in (0, 1))
        checks = [
            {"name": "filters", "download": fetch, "disk": folder, "seconds": seconds and seconds[0]},
            {"name": "review", "download": 0, "disk": 0, "seconds": 0},
        ]
        return {
            "ready": not missing,
            "missing": missing,
            "running": running,
            "steps": steps,
            "progress": self._progress if running else None,
            "log": list(self._log),
            "licence": self._licence,
            "error": self._error,
            "choices": {"checks": checks, "precisions": presets.PROPOSED_PRECISIONS},
            "models": [home.NANO_NAME, *home.installed_models()],
        }

    def start(self, answers: dict[str, Any]) -> None:
        """Starts the process.

        Args:
            answers: as docs/http.md has them. Where it had stopped at the licence, the answers of that start hold too.

        Raises:
            HTTPProblem: an answer that cannot be used, or a process that runs already.
        """
        if self._licence:
            answers = self._answers | answers
        words = _words(answers)
        with self._lock:
            if self.is_running:
                raise HTTPProblem(409, "conflict", "setup runs already")
            self._answers, self._licence = answers, None
            self._done, self._said, self._progress, self._error = {}, [], None, None
            self._log.clear()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlx_flux_krea.cli", "setup", "--json", *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            threading.Thread(target=self._follow, args=(self._process,), daemon=True).start()

    def stop(self) -> None:
        """Ends the process, which continues at its next start."""
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            if process.poll() is None:
                process.kill()

    def _follow(self, process: subprocess.Popen) -> None:
        """Reads the lines of the process until it ends."""
        assert process.stderr is not None
        for line in process.stderr:
            self._take(line.rstrip("\n"))
        code = process.wait()
        last = self._log[-1] if self._log else "it said nothing"
        if code and not self._licence:
            self._error = HTTPProblem(409, "setup_failed", last.removeprefix("flux-krea: ")).to_json()["error"]
        self._progress = None
        self._tell(self.state())

    def _take(self, line: str) -> None:
        text = plain(line)
        self._log.append(text)
        if match := _STEP.fullmatch(line):
            self._done[match[1]], self._said, self._progress = plain(match[2]), [], None
            if match[1] == "licence":
                self._licence = None
        elif match := _SHOWN.fullmatch(line):
            self._licence = {"text": "\n".join(self._said).strip(), "sha256": match[1], "page": PAGE}
        else:
            self._said.append(line)
            if not _PROGRESS.fullmatch(line):
                return
            self._progress = text
        self._tell(self.state())


def _missing() -> list[str]:
    """Returns the parts that a picture of the published model needs and that are not here."""
    try:
        found = [one for one in find_installed() if one.kind == "model" and not one.problem]
        needing = [one for one in found if one.filters == "required"]
        if not needing:
            return ["model"] if not found else []
        missing = []
        if settings.read_options().get("check", presets.CHECKS[0]) != "review" and any(map(trials.problem, FILTERS)):
            missing.append("filters")
        if not any(_is_acknowledged(one.path) for one in needing):
            missing.append("licence")
        return missing
    except FluxKreaError:
        return ["settings"]


def _is_acknowledged(path) -> bool:
    text = acknowledgement.find_text(path)[1]
    return acknowledgement.digest(text) in acknowledgement.acknowledged()


def _words(answers: dict[str, Any]) -> list[str]:
    """Returns the answers as options of the command.

    Raises:
        HTTPProblem: one that cannot be used.
    """
    for name, value in answers.items():
        if name not in _FIELDS:
            raise invalid(f"there is no field {name[:80]!r}; expected one of {', '.join(_FIELDS)}")
        if type(value) is not _FIELDS[name]:
            raise invalid(f"{name} has another type", name)
    choices = {"check": presets.CHECKS[:2], "quantize": presets.PROPOSED_PRECISIONS}
    words = []
    for name, known in choices.items():
        if name in answers:
            if answers[name] not in known:
                raise invalid(f"{name} is {answers[name][:40]!r}; expected one of {', '.join(known)}", name)
            words += [f"--{name}", answers[name]]
    if "accept_licence" in answers:
        if not re.fullmatch("[0-9a-f]{64}", answers["accept_licence"]):
            raise invalid("accept_licence is no sha256", "accept_licence")
        words += ["--accept-licence", answers["accept_licence"]]
    return words + ["--offline"] * answers.get("offline", False)
