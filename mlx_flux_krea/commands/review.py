"""flux-krea review: a person releases or rejects pictures in quarantine, by the licence's two questions."""

import getpass
import sys

import click

from mlx_flux_krea.errors import UsageError, Waiting, amount, printable
from mlx_flux_krea.filters.ledger import Ledger, QuarantinedImage, Verdict
from mlx_flux_krea.provenance import read_record

from .shared import signals
from .shared.options import FILE, METADATA, QUALITY
from .shared.output import check_output, names_from, save
from .shared.terminal import Console, show_picture

QUESTIONS = {
    "unlawful": "Does it show anything unlawful?",
    "infringing": "Does it show somebody's work or brand, or a real person, without the right to?",
}


@click.command()
@click.option(
    "-o",
    "--output",
    type=FILE,
    default="out.png",
    show_default=True,
    help="File of released pictures: this name, then the next free ones.",
)
@click.option("--reviewer", help="Your name, for the log.  [default: asked]")
@click.option("--quality", type=QUALITY, help="Quality of JPEG and WebP.  [default: 95]")
@click.option(
    "--metadata",
    type=METADATA,
    default="full",
    show_default=True,
    help="Record in the file: all settings, or only that an AI made it.",
)
def review(output, reviewer, quality, metadata):
    """Review waiting pictures, and release or reject them.

    The licence asks that nobody passes on a picture before a person has checked that it is neither unlawful nor
    infringing. Pictures that a filter flagged can be released too, with a reason. Pictures wait until somebody reviews
    them, or deletes them with `flux-krea purge --quarantine`. Without a terminal, the waiting pictures are listed.

    \b
    Example:
      flux-krea review -o frog.png
    """
    check_output(output, quality)
    console, ledger = Console(), Ledger()
    with console.library_notes():
        waiting = ledger.waiting()
        if not waiting:
            console.say("no picture waits for review")
            return
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            for picture in waiting:
                click.echo("\n".join(_facts(picture)) + "\n")
            raise Waiting(_count(len(waiting)), "", "review needs a terminal: flux-krea review")
        names, left = names_from(output), len(waiting)
        try:
            while not (reviewer or "").strip():
                reviewer = click.prompt("Your name", default=getpass.getuser(), err=True)
            for number, picture in enumerate(waiting, 1):
                with ledger.claimed(picture) as is_mine:
                    busy = "" if is_mine else ": another process is reviewing it"
                    console.say(f"\n{number} of {len(waiting)}{busy}")
                    verdict = _ask(picture, reviewer.strip(), console) if is_mine else None
                    if verdict is None:
                        continue
                    with signals.held():
                        settled = ledger.settle(picture, verdict)
                        if verdict.event == "approved":
                            released = ledger.hand_over(settled)
                            click.echo(save(released, names, force=False, metadata=metadata, quality=quality))
                        else:
                            console.say("rejected and deleted")
                        ledger.discard(settled)
                    left -= 1
        except (click.Abort, EOFError):
            console.say("")
        if left:
            raise Waiting(_count(left), "", "flux-krea review")


def _ask(picture: QuarantinedImage, reviewer: str, console: Console) -> Verdict | None:
    """Shows a picture and asks for the reviewer's verdict; None: later."""
    console.say("\n".join(_facts(picture)))
    if not show_picture(picture.path, console):
        console.say(f"it cannot be shown here; look at it first: {picture.path}")
    pixels, answers = picture.facts["pixels"], {}
    for name, question in QUESTIONS.items():
        answer = click.prompt(question, type=click.Choice(["yes", "no", "later"]), err=True)
        if answer == "later":
            return None
        answers[name] = answer == "yes"
        if answers[name]:
            return Verdict("rejected", pixels, (question,), reviewer=reviewer, answers=answers)
    reasons = ()
    if picture.facts["event"] != "waiting":
        reasons = (click.prompt("A filter withheld it. Your reason for releasing it", err=True).strip(),)
        if not reasons[0]:
            return None
    return Verdict("approved", pixels, reasons, reviewer=reviewer, answers=answers)


def _facts(picture: QuarantinedImage) -> list[str]:
    """Formats the facts that a reviewer needs, as lines."""
    try:
        record = read_record(picture.path) or {}
    except UsageError:
        record = {}
    facts, names = picture.facts, ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "model", "seed")
    rows = {"state": facts["event"], **{name: record[name] for name in names if name in record}}
    rows |= {"made": facts["time"], "why": "; ".join(facts.get("reasons", ()))}
    rows |= {"scores": ", ".join(f"{name} {value:.3f}" for name, value in facts.get("scores", {}).items())}
    return [f"{name + ':':18}{printable(str(value))}" for name, value in rows.items() if value != ""]


def _count(waiting: int) -> str:
    return amount(waiting, "picture waits for review", "pictures wait for review")
