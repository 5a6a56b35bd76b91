"""flux-krea review: a person looks at what waits in quarantine, answers the licence's two questions, and signs."""

import getpass
import sys
from pathlib import Path

import click

from mlx_flux_krea.errors import Waiting, amount, printable

from .shared import signals
from .shared.output import check_output, names_from, save

QUESTIONS = {
    "unlawful": "Does it show anything unlawful?",
    "infringing": "Does it show somebody's work or brand, or a real person, without the right to?",
}


@click.command()
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default="out.png", show_default=True,
    help="Where released pictures go: this name, then the next free ones.",
)  # fmt: skip
@click.option("--reviewer", help="Your name, for the log.  [default: asked for]")
@click.option("--quality", type=int, help="1 to 100, of JPEG and WebP.  [default: 95]")
@click.option(
    "--metadata", type=click.Choice(["full", "minimal"]), default="full", show_default=True,
    help="What the picture's file tells: all that made it, or only that a machine did.",
)  # fmt: skip
def review(output, reviewer, quality, metadata):
    """Look at each picture that waits, and release or reject it.

    The licence asks that no picture is passed on before somebody has seen that it is neither unlawful nor infringing.
    Pictures that a filter flagged can be released too, with a reason. What nobody reviews is deleted after a month.
    Without a terminal this only says what waits.

    \b
    Example:
      flux-krea review -o frog.png
    """
    from mlx_flux_krea.filters.ledger import Ledger

    from .shared.terminal import say, show_notes

    check_output(output, quality)
    show_notes()
    ledger = Ledger()
    waiting = ledger.waiting()
    if not waiting:
        say("no picture waits for review")
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        for kept in waiting:
            click.echo("\n".join(_about(kept)) + "\n")
        raise Waiting(_count(len(waiting)), "", "review needs a terminal: flux-krea review")
    names, left = names_from(output), len(waiting)
    try:
        while not (reviewer or "").strip():
            reviewer = click.prompt("Your name", default=getpass.getuser(), err=True)
        for number, kept in enumerate(waiting, 1):
            with ledger.claimed(kept) as is_mine:
                say(f"\n{number} of {len(waiting)}" + ("" if is_mine else ": somebody else has it"))
                verdict = _judge(kept, reviewer.strip()) if is_mine else None
                if verdict is None:
                    continue
                with signals.held():
                    kept = ledger.settle(kept, verdict)
                    if verdict.event == "approved":
                        picture = ledger.hand_over(kept)
                        click.echo(save(picture, names, force=False, metadata=metadata, quality=quality))
                    else:
                        say("rejected, and deleted")
                    ledger.discard(kept)
                left -= 1
    except (click.Abort, EOFError):
        say("")
    if left:
        raise Waiting(_count(left), "", "flux-krea review")


def _judge(kept, reviewer: str):
    """A person's verdict about a picture; None: later."""
    from mlx_flux_krea.filters.ledger import Verdict

    from .shared.terminal import say, show_picture

    say("\n".join(_about(kept)))
    if not show_picture(kept.path):
        say(f"it cannot be shown here; look at it first: {kept.path}")
    answers = {}
    for name, question in QUESTIONS.items():
        answer = click.prompt(f"{question} (yes, no, later)", type=click.Choice(["yes", "no", "later"]), err=True)
        if answer == "later":
            return None
        answers[name] = answer == "yes"
        if answers[name]:
            return Verdict("rejected", kept.facts["pixels"], (question,), {}, reviewer, answers)
    reasons = ()
    if kept.facts["event"] != "waiting":
        reasons = (click.prompt("Then why did it not pass? Your reason for releasing it", err=True).strip(),)
        if not reasons[0]:
            return None
    return Verdict("approved", kept.facts["pixels"], reasons, {}, reviewer, answers)


def _about(kept) -> list[str]:
    """What a reviewer should know, as lines."""
    from mlx_flux_krea.errors import UsageError
    from mlx_flux_krea.provenance import read_record

    try:
        record = read_record(kept.path) or {}
    except UsageError:
        record = {}
    facts, names = kept.facts, ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "model", "seed")
    rows = {"state": facts["event"], **{name: record[name] for name in names if name in record}}
    rows |= {"made": facts["time"], "why": "; ".join(facts.get("reasons", ()))}
    rows |= {"scores": ", ".join(f"{name} {value:.3f}" for name, value in facts.get("scores", {}).items())}
    return [f"{name + ':':18}{printable(str(value))}" for name, value in rows.items() if value != ""]


def _count(waiting: int) -> str:
    return amount(waiting, "picture waits for review", "pictures wait for review")
