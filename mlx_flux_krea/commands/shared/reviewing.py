"""A person's verdict on a picture in quarantine: the licence's two questions, and the release or the deletion."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.filters.ledger import Ledger, QuarantinedImage, Verdict
from mlx_flux_krea.provenance import read_record

from . import signals
from .credentials import from_json, signed
from .output import names_from, save

DELETE = "delete"  # typed in full: a reflex does not reject
QUESTIONS = {
    "unlawful": "Does it show anything unlawful?",
    "infringing": "Does it show somebody's work or brand, or a real person, without the right to?",
}


@dataclass(frozen=True)
class ReviewTarget:
    """The file that a released picture gets, and options for it: metadata, credentials and quality."""

    path: Path
    how: dict[str, Any] = field(default_factory=dict)


def needs_reason(picture: QuarantinedImage) -> bool:
    """Returns True where a filter withheld a picture, or failed, so that its release needs a reason."""
    return picture.facts["event"] != "waiting"


def record_of(picture: QuarantinedImage) -> dict:
    """Returns the record of a picture in quarantine; {}: its file is damaged."""
    try:
        return read_record(picture.path) or {}
    except UsageError:
        return {}


def carry_out(verdict: Verdict, picture: QuarantinedImage, ledger: Ledger, target: ReviewTarget) -> Path | None:
    """Logs a verdict, then releases or deletes the picture. Returns the file of a released one.

    Args:
        verdict: "approved" or "rejected".
        picture: claimed by this process.
        ledger: of its quarantine.
        target: the file of a released picture; the next free name is taken.

    Raises:
        FiltersError: the picture's state does not allow it, or the log cannot be written.
        UsageError: the file cannot be written; the picture waits on.
        CredentialsError: it must be signed and cannot be; the picture waits on.
    """
    with signals.held():
        settled, path = ledger.settle(picture, verdict), None
        if verdict.event == "approved":
            how = {name: value for name, value in target.how.items() if name != "credentials"}
            how |= signed(target.how.get("credentials"), from_json(ledger.meant_for(picture).get("sources")))
            path = save(ledger.hand_over(settled), names_from(target.path), force=False, **how)
        ledger.discard(settled)
    return path
