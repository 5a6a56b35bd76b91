"""flux-krea review: a person releases or rejects pictures in quarantine, by the licence's two questions."""

import getpass
import sys
from pathlib import Path

import click

from mlx_flux_krea.errors import Waiting, amount, printable
from mlx_flux_krea.files import replacing
from mlx_flux_krea.filters.ledger import Ledger, QuarantinedImage, Verdict
from mlx_flux_krea.presets import CREDENTIALS
from mlx_flux_krea.provenance import FORMATS

from .shared import signals
from .shared.credentials import check_credentials
from .shared.jobs import default_output, output_name
from .shared.options import FILE, METADATA, QUALITY
from .shared.output import check_output, meant_file
from .shared.reviewing import DELETE, QUESTIONS, ReviewTarget, carry_out, needs_reason, record_of
from .shared.sheet import numbered_sheet, read_all
from .shared.terminal import Console, say_path, show_picture

_SHEET = 120  # pictures of a contact sheet
ANSWERS = ("yes", "no", "later")


@click.command()
@click.option(
    "-o",
    "--output",
    type=FILE,
    help="File of released pictures; {seed}, {n}, {prompt} are filled in.  [default: as given to generate, or out.png]",
)
@click.option("--reviewer", help="Your name, for the log.  [default: asked]")
@click.option("--quality", type=QUALITY, help="Quality of JPEG and WebP.  [default: as given to generate, or 95]")
@click.option(
    "--metadata",
    type=METADATA,
    help="Record in the file: all settings, or only that an AI made it.  [default: as given to generate, or full]",
)
@click.option(
    "--credentials",
    type=click.Choice(CREDENTIALS),
    help="Sign pictures (C2PA): on, or require, which saves none without.  [default: as given to generate, or off]",
)
@click.option("--contact-sheet", is_flag=True, help="Show all of them small and numbered first, to choose from.")
def review(output, reviewer, quality, metadata, credentials, contact_sheet):
    """Review waiting pictures, and release or reject them.

    The licence asks that nobody passes on a picture before a person has checked that it is neither unlawful nor
    infringing. Pictures that a filter flagged can be released too, with a reason. Pictures wait until somebody reviews
    them, or deletes them with `flux-krea purge --quarantine`. Without a terminal, the waiting pictures are listed.

    Where a picture cannot be shown (tmux, screen, ssh, no display), open its file: you are asked whether you did.
    A contact sheet is for finding pictures: each that you choose from it is shown and asked about by itself.
    A picture is rejected and deleted once you type "delete".

    \b
    Example:
      flux-krea review -o frog.png
      flux-krea review --contact-sheet
    """
    check_credentials(credentials)
    options = {"quality": quality, "metadata": metadata, "credentials": credentials}
    typed = {name: value for name, value in options.items() if value is not None}
    if output:
        check_output(output_name(output, prompt="", seed=0, number=1), quality)
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
        left = len(waiting)
        try:
            chosen = _choose(waiting, ledger, console) if contact_sheet else range(1, len(waiting) + 1)
            while chosen and not (reviewer or "").strip():
                reviewer = click.prompt("Your name", default=getpass.getuser(), err=True)
            for number in chosen:
                picture = waiting[number - 1]
                with ledger.claimed(picture) as is_mine:
                    busy = "" if is_mine else ": another process is reviewing it"
                    console.say(f"\n{number} of {len(waiting)}{busy}")
                    if is_mine:
                        target = _target(picture, output, number, meant=ledger.meant_for(picture), typed=typed)
                        left -= _settle(picture, ledger, target, reviewer=reviewer.strip(), console=console)
        except (click.Abort, EOFError):
            console.say("")
        if left:
            raise Waiting(_count(left), "", "flux-krea review")


def _choose(waiting: list[QuarantinedImage], ledger: Ledger, console: Console) -> list[int]:
    """Shows a numbered contact sheet, and asks which of its pictures to review. Nothing is approved by that."""
    if len(waiting) > _SHEET:
        console.say(f"the sheet has the first {_SHEET} of {len(waiting)}")
        waiting = waiting[:_SHEET]
    with ledger.temporary("sheet.png") as path:
        with replacing(path, mode=0o600) as file:
            numbered_sheet(read_all([picture.path for picture in waiting])).save(file, "PNG")
        shown = show_picture(path, console)
        console.say(f"contact sheet: {path}" + ("" if shown else "; it cannot be shown here, open the file"))

        def read(typed: str) -> list[int]:
            words = typed.replace(",", " ").split()
            if words in (["all"], ["none"]):
                return list(range(1, len(waiting) + 1)) if words == ["all"] else []
            wrong = [word for word in words if not (word.isdecimal() and 1 <= int(word[:9]) <= len(waiting))]
            if wrong:
                raise click.UsageError(f"{printable(wrong[0])!r} is no number from 1 to {len(waiting)}")
            return list(dict.fromkeys(map(int, words)))

        return click.prompt("Numbers to review, such as 1 3 4 (all, none)", value_proc=read, err=True)


def _settle(
    picture: QuarantinedImage, ledger: Ledger, target: ReviewTarget, *, reviewer: str, console: Console
) -> bool:
    """Asks about a picture, and releases or deletes it. Returns False where it waits on."""
    verdict = _ask(picture, reviewer, console)
    if verdict is None:
        return False
    with signals.held():
        if path := carry_out(verdict, picture, ledger, target):
            console.say(f"released {path}")
            say_path(path)
        else:
            console.say("rejected and deleted")
    return True


def _ask(picture: QuarantinedImage, reviewer: str, console: Console) -> Verdict | None:
    """Shows a picture and asks for the reviewer's verdict; None: later."""
    console.say("\n".join(_facts(picture)))
    if not show_picture(picture.path, console):
        console.say(f"it cannot be shown here; look at it first: {printable(str(picture.path))}")
        if _answer("Did you open it?") != "yes":
            return None
    pixels, answers = picture.facts["pixels"], {}
    for name, question in QUESTIONS.items():
        answer = _answer(question)
        if answer == "later":
            return None
        answers[name] = answer == "yes"
        if answers[name] and not _confirm(picture, console):
            return None
        if answers[name]:
            return Verdict("rejected", pixels, (question,), reviewer=reviewer, answers=answers)
    reasons = ()
    if needs_reason(picture):
        reasons = (click.prompt("A filter withheld it. Your reason for releasing it", err=True).strip(),)
        if not reasons[0]:
            return None
    return Verdict("approved", pixels, reasons, reviewer=reviewer, answers=answers)


def _confirm(picture: QuarantinedImage, console: Console) -> bool:
    """Says how the picture could be made again, and asks whether to reject and delete it."""
    record = record_of(picture)
    if {"prompt", "seed"} <= record.keys():
        prompt, seed = (printable(str(record[name])) for name in ("prompt", "seed"))
        console.say(f'its prompt and seed can make it again: "{prompt}", {seed}')
    question = f"Type {DELETE} to reject and delete it; anything else lets it wait"
    answer = click.prompt(question, default="", show_default=False, err=True)
    is_meant = answer.strip().lower() == DELETE
    if not is_meant:
        console.say("it waits on")
    return is_meant


def _answer(question: str) -> str:
    """Asks a question until it is answered. Returns "yes", "no" or "later"."""

    def read(typed: str) -> str:
        answers = [answer for answer in ANSWERS if typed.strip().lower() in (answer, answer[0])]
        if not answers:
            raise click.UsageError(f"{printable(typed)!r} is no answer: yes, no or later")
        return answers[0]

    return click.prompt(f"{question} ({', '.join(ANSWERS)})", value_proc=read, err=True)


def _target(picture: QuarantinedImage, output: Path | None, number: int, *, meant: dict, typed: dict) -> ReviewTarget:
    """Returns the file to save a picture in and options for it: as typed, else as given to generate.

    Raises:
        UsageError: --output has an unknown field, or cannot be written.
    """
    path, how = meant_file(meant)
    if output:
        record = record_of(picture)
        prompt, seed = (record.get(name, default) for name, default in (("prompt", ""), ("seed", 0)))
        path = output_name(output, prompt=str(prompt), seed=seed if type(seed) is int else 0, number=number)
    path, how = path or default_output(), how | typed
    if FORMATS.get(path.suffix.lower()) == "PNG":
        how.pop("quality", None)
    check_output(path, how.get("quality"))
    return ReviewTarget(path, how)


def _facts(picture: QuarantinedImage) -> list[str]:
    """Formats the facts that a reviewer needs, as lines."""
    record = record_of(picture)
    facts, names = picture.facts, ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "model", "seed")
    rows = {"state": facts["event"], **{name: record[name] for name in names if name in record}}
    rows |= {"made": facts["time"], "why": "; ".join(facts.get("reasons", ()))}
    rows |= {"scores": ", ".join(f"{name} {value:.3f}" for name, value in facts.get("scores", {}).items())}
    rows |= {"file": picture.path}
    return [f"{name + ':':18}{printable(str(value))}" for name, value in rows.items() if value != ""]


def _count(waiting: int) -> str:
    return amount(waiting, "picture waits for review", "pictures wait for review")
