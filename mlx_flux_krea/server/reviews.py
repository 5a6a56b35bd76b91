"""Review by a person on the page: the quarantine, the questions and the log of `flux-krea review`.

A picture may be judged once its file was fetched from this server at full size.
"""

import contextlib
import datetime
import re
import threading
from pathlib import Path
from typing import Any

from mlx_flux_krea.commands.shared.output import meant_file
from mlx_flux_krea.commands.shared.reviewing import (
    DELETE,
    QUESTIONS,
    ReviewTarget,
    carry_out,
    needs_reason,
    record_of,
)
from mlx_flux_krea.errors import FluxKreaError
from mlx_flux_krea.filters.ledger import Ledger, QuarantinedImage, Verdict
from mlx_flux_krea.provenance import FORMATS

from . import pictures
from .errors import HTTPProblem, invalid, not_found, plain

_TEXTS = ("prompt", "negative_prompt", "model", "seed")
_LONGEST = 200  # characters of a name, 2000 of a reason
_ID = re.compile("[0-9a-f]{32}")


class Reviews:
    """Pictures in quarantine, and those of them that were shown."""

    def __init__(self):
        self._shown: set[tuple[str, str]] = set()  # id and hash of the pixels
        self._lock = threading.Lock()  # one verdict at a time
        self.reviewer = ""

    def listed(self) -> dict[str, Any]:
        """Returns the pictures that wait, the questions, and the last reviewer's name.

        Raises:
            FiltersError: the log is damaged.
        """
        ledger = Ledger()
        questions = [{"name": name, "text": text} for name, text in QUESTIONS.items()]
        waiting = [_facts(picture, ledger) for picture in ledger.waiting()]
        return {"questions": questions, "reviewer": self.reviewer, "delete": DELETE, "pictures": waiting}

    def file(self, key: str) -> bytes:
        """Returns a waiting picture's PNG, and notes that it was shown.

        Raises:
            HTTPProblem: there is none.
            FiltersError: the log is damaged.
        """
        picture = _find(Ledger(), key)
        try:
            data = picture.path.read_bytes()
        except OSError:
            raise not_found("picture that waits for review") from None
        self._shown.add((key, picture.facts["pixels"]))
        return data

    def judge(self, key: str, verdict: dict[str, Any]) -> dict[str, Any]:
        """Carries out a verdict. Returns its outcome; "job" and "number" name the job that made the picture.

        Args:
            key: of the picture.
            verdict: "reviewer", "answers", "reason", "confirm".

        Raises:
            HTTPProblem: the verdict is incomplete, the picture was not shown, or it does not wait.
            FiltersError: the log is damaged, or cannot be written.
        """
        reviewer, answers = _checked(verdict)
        with self._lock:
            ledger = Ledger()
            picture = _find(ledger, key)
            if (key, picture.facts["pixels"]) not in self._shown:
                raise HTTPProblem(409, "conflict", "the picture was not shown; fetch its file at full size first")
            judged = _verdict(picture, verdict, reviewer=reviewer, answers=answers)
            with ledger.claimed(picture) as is_mine:
                if not is_mine:
                    raise HTTPProblem(409, "conflict", "another process is reviewing this picture")
                target = _target(ledger.meant_for(picture), key)
                job = pictures.job_of(target.path.name)
                path = carry_out(judged, picture, ledger, target)
            self.reviewer = reviewer
        found = {"id": key, "outcome": "released" if path else "rejected", "job": job and job[0]}
        return found | {"number": job[1] if job else 0, "file": path}


def count() -> int:
    """Returns how many pictures wait for review; 0 where nobody can tell."""
    with contextlib.suppress(FluxKreaError):
        return len(Ledger().waiting())
    return 0


def _find(ledger: Ledger, key: str) -> QuarantinedImage:
    """Returns a picture that waits.

    Raises:
        HTTPProblem: there is none.
    """
    found = next((one for one in ledger.waiting() if one.image == key), None) if _ID.fullmatch(key) else None
    if found is None:
        raise not_found("picture that waits for review")
    return found


def _checked(verdict: dict[str, Any]) -> tuple[str, dict[str, bool]]:
    """Returns the reviewer's name and answers.

    Raises:
        HTTPProblem: one is missing.
    """
    reviewer, answers = verdict.get("reviewer"), verdict.get("answers")
    if not isinstance(reviewer, str) or not 0 < len(reviewer.strip()) <= _LONGEST:
        raise invalid("nobody reviews without a name; expected `reviewer`", "reviewer")
    whole = isinstance(answers, dict) and answers.keys() == QUESTIONS.keys()
    if not isinstance(answers, dict) or not whole or not all(type(one) is bool for one in answers.values()):
        raise invalid(f"expected true or false for each question: {', '.join(QUESTIONS)}", "answers")
    reason = verdict.get("reason", "")
    if not isinstance(reason, str) or len(reason) > 10 * _LONGEST:
        raise invalid("reason is no text of up to 2000 characters", "reason")
    if unknown := verdict.keys() - {"reviewer", "answers", "reason", "confirm"}:
        raise invalid(f"there is no field {min(unknown)[:80]!r}")
    return plain(reviewer.strip()), answers


def _verdict(picture: QuarantinedImage, verdict: dict[str, Any], *, reviewer: str, answers: dict[str, bool]) -> Verdict:
    """Returns the verdict that the answers make.

    Raises:
        HTTPProblem: a rejection was not confirmed, or a release has no reason where one is needed.
    """
    pixels, against = picture.facts["pixels"], [QUESTIONS[name] for name, answer in answers.items() if answer]
    if against:
        if verdict.get("confirm") != DELETE:
            raise invalid(f"a yes rejects and deletes the picture; expected confirm {DELETE!r}", "confirm")
        return Verdict("rejected", pixels, (against[0],), reviewer=reviewer, answers=answers)
    reason = verdict.get("reason", "").strip()
    if needs_reason(picture) and not reason:
        raise invalid("a filter withheld this picture; expected your reason for releasing it", "reason")
    reasons = (reason,) if needs_reason(picture) else ()
    return Verdict("approved", pixels, reasons, reviewer=reviewer, answers=answers)


def _target(meant: dict[str, Any], key: str) -> ReviewTarget:
    """Returns the file of a released picture: always one of the page's, under the name that it was meant to have."""
    path, how = meant_file(meant)
    if path is None or path.suffix.lower() not in FORMATS:
        return ReviewTarget(pictures.folder() / f"review-{key[:16]}.png")
    return ReviewTarget(pictures.folder() / path.name, how)


def _facts(picture: QuarantinedImage, ledger: Ledger) -> dict[str, Any]:
    """Returns the facts that a reviewer needs."""
    facts, record = picture.facts, record_of(picture)
    meant = ledger.meant_for(picture).get("output")
    job = pictures.job_of(Path(meant).name) if isinstance(meant, str) else None
    about = {name: record.get(name) for name in _TEXTS}
    return about | {
        "id": picture.image,
        "state": facts["event"],
        "made": _seconds(facts.get("time")),
        "width": facts.get("width"),
        "height": facts.get("height"),
        "reasons": [plain(reason) for reason in facts.get("reasons", ())],
        "scores": facts.get("scores", {}),
        "needs_reason": needs_reason(picture),
        "job": job and job[0],
    }


def _seconds(time: Any) -> float | None:
    """Returns a time of the log as seconds since 1970."""
    try:
        return datetime.datetime.fromisoformat(str(time)).timestamp()
    except ValueError:
        return None
