"""The policy: the checks, their order, and the meaning of each answer. Fails closed.

Order: filters and log are tested before anything else is loaded; every prompt, raw and normalised, is checked before
the encoders are; then an input image as the autoencoder will see it; at last every picture, exactly the pixels that are
released. If a filter raises an error, answers NaN or answers with unexpected labels, nothing of the call is released.
No value of any argument turns checking off, and thresholds can only be made stricter.

Answers follow black-forest-labs/flux: a picture passes where its NSFW probability is below 0.85; a prompt or a picture
passes the integrity check where the margin of yes over no is not above 0.
"""

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np

from ..errors import FiltersError, ResourceError, UsageError, Withheld
from ..presets import CHECKS, NSFW_THRESHOLD
from ..provenance import Picture
from ..request import ResolvedRequest
from .judges import Judge, MakeRun, PromptJudge, image_labels, margins_of, open_judges, unknown_filters
from .ledger import Ledger, LedgerRun, QuarantinedImage, Verdict
from .lookalikes import forms

logger = logging.getLogger("mlx_flux_krea")

DELETE_NSFW = 0.98  # a picture at or above it is deleted at once, without review
CHUNK, OVERLAP = 1500, 300  # characters of each part of a long prompt, and how many neighbours share

MANY_CHUNKS = 4  # of one prompt, above which a note tells that judging takes long


@dataclass(frozen=True)
class Policy:
    """How prompts and pictures of a model that requires filters are checked.

    Attributes:
        check: "filters", "review" (a person looks at every picture) or "both".
        nsfw: a picture passes below this probability; 0.85, or less.
        integrity: a prompt or a picture passes where the margin of yes is not above minus this; 0, or more.

    Raises:
        UsageError: another value, for example one that would let more pass.
    """

    check: str = "filters"
    nsfw: float = NSFW_THRESHOLD
    integrity: float = 0.0

    def __post_init__(self):
        if self.check not in CHECKS:
            raise UsageError(f"check is {self.check!r}", f"one of {', '.join(CHECKS)}")
        for name, low, high in (("nsfw", 0.0, NSFW_THRESHOLD), ("integrity", 0.0, 1000.0)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not low <= value <= high:
                todo = "thresholds can only be made stricter"
                raise UsageError(f"the threshold {name} is {value!r}", f"a number from {low:g} to {high:g}", todo)


class OpenGate:
    """The gate of a model that requires no filters: it checks nothing, and the log records that."""

    notes: tuple[str, ...] = ()

    def check_prompts(self, texts: Sequence[str]) -> None:
        """Does nothing."""

    def check_inputs(self, images: Sequence[Callable[[], np.ndarray]]) -> None:
        """Does nothing."""

    def release(
        self, pixels: Sequence[np.ndarray], records: Sequence[dict]
    ) -> tuple[tuple[str, ...], Sequence[Picture]]:
        """Returns outcomes and pictures."""
        pictures = [Picture.from_pixels(image, record) for image, record in zip(pixels, records, strict=True)]
        return ("released",) * len(pictures), pictures


class Gate:
    """The checks of one call of the pipeline; from `open_gate`.

    Attributes:
        notes: sentences for the user.
    """

    def __init__(
        self,
        policy: Policy,
        run: LedgerRun,
        judges: dict[str, Judge],
        margins: dict[tuple, float] | None = None,
        ready: Callable[[], None] = lambda: None,
    ):
        self.policy, self.run, self._judges, self._ready = policy, run, judges, ready
        self._margins: dict[tuple[str, str], float] = {} if margins is None else margins
        self.notes: list[str] = []

    def check_prompts(self, texts: Sequence[str]) -> None:
        """Checks every text, raw and normalised, before any encoder is loaded.

        Raises:
            Withheld: a text was flagged.
            FiltersError: a filter failed.
        """
        if not self._judges or not texts:
            return
        margins = self._judged(texts)
        hashes = [self.run.ledger.fingerprint(text) for text in texts]
        worst = max(margins, default=-math.inf)
        flagged = not worst <= -self.policy.integrity
        event = "prompt_flagged" if flagged else "prompts_passed"
        self.run.note(event, prompts_salted_sha256=hashes, margins=[round(margin, 4) for margin in margins])
        if flagged:
            raise Withheld(
                "the prompt seems to ask for a protected character or brand, or a living person of public life "
                f"(margin {worst:.2f})",
                f"at most {-self.policy.integrity or 0:g}",
                "say it in other words",
            )

    def passing(self, requests: Sequence[ResolvedRequest]) -> list[ResolvedRequest]:
        """Returns the requests without a flagged text. All are judged at once; `check_prompts` reuses the answers.

        Raises:
            FiltersError: a filter failed.
        """
        if not self._judges:
            return list(requests)
        self._judged([text for request in requests for text in request.texts()])
        return [r for r in requests if max(self._judged(r.texts()), default=-math.inf) <= -self.policy.integrity]

    def _judged(self, texts: Sequence[str]) -> list[float]:
        """Returns the margin of each form of each text; the filter is not asked about the same text again."""
        judge = cast(PromptJudge, self._judges["pixtral"])
        if any(len(forms(text)) > 2 for text in texts):
            self.notes.append("the prompt spells words in an unusual way: it was also judged as it looks")
        keys = [_key(judge, text) for text in _questions(texts)]
        if missing := [key for key in keys if key not in self._margins]:
            _warn_of_length(texts, len(missing))
            with self._noted():
                margins = margins_of(judge, [text for _, text in missing])
            judge.free()
            self._margins.update(zip(missing, margins, strict=True))
        return [self._margins[key] for key in keys]

    def check_inputs(self, images: Sequence[Callable[[], np.ndarray]]) -> None:
        """Checks input images together: (H, W, 3) uint8 each, as the autoencoder will see it.

        Raises:
            Withheld: an image was flagged.
            FiltersError: a filter failed.
        """
        if not self._judges or not images:
            return
        pixels = [image() for image in images]
        with self._noted():
            scores = self._scores(pixels)
        reasons = [self._reasons(one) for one in scores]
        for image, why, one in zip(pixels, reasons, scores, strict=True):
            digest = hashlib.sha256(image.tobytes()).hexdigest()
            self.run.note("input_flagged" if why else "input_passed", input_sha256=digest, scores=one)
        for why in filter(None, reasons):
            raise Withheld(f"the input image was withheld: {'; '.join(why)}", "", "start from another one")

    def passes_preview(self, pixels: np.ndarray) -> bool:
        """Checks an unfinished picture, (H, W, 3) uint8, exactly as it will be shown. Returns True where it passed.

        Raises:
            FiltersError: a filter failed.
        """
        if not self._judges or self.policy.check != "filters":
            return False
        with self._noted():
            (scores,) = self._scores([pixels])
        passed = not self._reasons(scores)
        digest = hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()
        self.run.note("preview_passed" if passed else "preview_flagged", preview_sha256=digest, scores=scores)
        return passed

    def release(
        self, pixels: Sequence[np.ndarray], records: Sequence[dict]
    ) -> tuple[tuple[str, ...], Sequence[Picture]]:
        """Checks every picture, and releases those that pass.

        Args:
            pixels: (H, W, 3) uint8 of each picture.
            records: the record of each picture.

        Returns:
            An outcome for each picture ("released", "waiting", or "withheld: " with reasons), and those released.

        Raises:
            FiltersError: a filter failed; no picture is released, and all wait for review.
        """
        ledger = self.run.ledger
        quarantined = [self.run.keep(image, record) for image, record in zip(pixels, records, strict=True)]
        try:
            scores = self._scores(pixels) if self._judges else [{}] * len(quarantined)
        except (FiltersError, ResourceError) as error:
            for image in quarantined:
                ledger.settle(image, Verdict("error", image.facts["pixels"], (error.found,)))
            raise error.with_next_step("the pictures wait for review: flux-krea review") from error
        settled = [self._settle(image, answers) for image, answers in zip(quarantined, scores, strict=True)]
        passed = [image for image in settled if image.facts["event"] == "passed"]
        self._ready()
        pictures = [ledger.hand_over(image) for image in passed]
        self._ready()  # if it raises, pictures that were handed over wait for review
        for image in passed:
            ledger.discard(image)
        return tuple(map(_outcome, settled)), pictures

    def _settle(self, image: QuarantinedImage, scores: dict[str, float]) -> QuarantinedImage:
        ledger, digest = self.run.ledger, image.facts["pixels"]
        reasons = self._reasons(scores)
        if self._judges:
            image = ledger.settle(image, Verdict("flagged" if reasons else "passed", digest, reasons, scores))
        if reasons and scores["nsfw"] >= DELETE_NSFW:
            ledger.log.append("purged", image=image.image)
            ledger.discard(image)
        elif not reasons and self.policy.check != "filters":
            image = ledger.settle(image, Verdict("waiting", digest))
        return image

    def _reasons(self, scores: dict[str, float]) -> tuple[str, ...]:
        """Returns the reasons why a picture with these scores does not pass; none: it passes."""
        reasons = []
        if scores and not scores["nsfw"] < self.policy.nsfw:
            reasons.append(f"it seems not to be safe for work ({scores['nsfw']:.3f})")
        if scores and not scores["integrity"] <= -self.policy.integrity:
            reasons.append(
                "it seems to show a protected character or brand, or a person of public life "
                f"(margin {scores['integrity']:.2f})"
            )
        return tuple(reasons)

    def _scores(self, pixels: Sequence[np.ndarray]) -> list[dict[str, float]]:
        """Returns {"nsfw": probability, "integrity": margin} for each picture; filters run one after the other."""
        scores: list[dict[str, float]] = [{} for _ in pixels]
        for name, judge in self._judges.items():
            views = [_views(image) if name == "nsfw" else [image] for image in pixels]
            answers = iter(image_labels(name, judge, [view for of_image in views for view in of_image]))
            label = "nsfw" if name == "nsfw" else "integrity"
            for score, of_image in zip(scores, views, strict=True):
                score[label] = max(float(next(answers)[label]) for _ in of_image)
            judge.free()
        return scores

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        """Logs a filter's failure within the block."""
        try:
            yield
        except (FiltersError, ResourceError) as error:
            self.run.note("error", reasons=[error.found])
            raise


@contextlib.contextmanager
def open_gate(
    policy: Policy | None,
    make_run: MakeRun,
    margins: dict[tuple, float] | None = None,
    ready: Callable[[], None] = lambda: None,
    texts: Sequence[str] = (),
    **about,
) -> Iterator[Gate | OpenGate]:
    """Opens the gate for one call, after testing filters, quarantine and log.

    Args:
        policy: None: the model requires no filters.
        make_run: makes the function that runs each part of a filter, see `judges`.
        margins: the filter's answers about texts in earlier calls; new ones are added.
        ready: called before and after pictures are handed over; an exception stops that.
        texts: that will be checked first; where the language model has to be tested, it reads them in the same pass.
        about: further facts of the run for the log.

    Raises:
        FiltersError: filters, quarantine or log are missing or unhealthy.
    """
    if policy is None:
        try:
            Ledger().log.append("unfiltered", **about)
        except FiltersError as error:
            logger.warning("this run is not in the log: %s", error.found)
        yield OpenGate()
        return
    judges, margins = {}, {} if margins is None else margins
    if policy.check != "review":
        judges, answers = open_judges(make_run, partial(_waiting, texts))
        margins.update({_key(judges["pixtral"], text): margin for text, margin in answers.items()})
    filters = {name: judge.about for name, judge in judges.items()}
    unknown = unknown_filters(judges)
    thresholds = {"nsfw": policy.nsfw, "integrity": policy.integrity}
    try:
        with Ledger().run(policy.check, filters=filters, thresholds=thresholds, unknown=unknown, **about) as run:
            yield Gate(policy, run, judges, margins, ready)
    finally:
        for judge in judges.values():
            judge.free()


def _waiting(texts: Sequence[str]) -> list[str]:
    """Returns the questions about texts, of which none was asked before."""
    questions = _questions(texts)
    _warn_of_length(texts, len(questions))
    return questions


def _questions(texts: Sequence[str]) -> list[str]:
    """Returns every chunk of each form of each text, once."""
    return list(dict.fromkeys(chunk for text in texts for form in forms(text) for chunk in _chunks(form)))


def _warn_of_length(texts: Sequence[str], count: int) -> None:
    if any(len(_chunks(text)) > MANY_CHUNKS for text in texts):
        logger.warning("the prompt is long: the filter reads %d parts of it one by one", count)


def _key(judge: Judge, text: str) -> tuple[str, str]:
    """Returns the key of an answer about a text: that of another filter is another one."""
    return json.dumps(judge.about, sort_keys=True), text


def _chunks(text: str) -> list[str]:
    """Splits a long text into overlapping chunks, so that nothing hides in the middle of it."""
    return [text[i : i + CHUNK] for i in range(0, max(len(text) - OVERLAP, 1), CHUNK - OVERLAP)]


def _views(pixels: np.ndarray) -> list[np.ndarray]:
    """Returns the picture and, if it is long, squares that cover it: the classifier resizes its input to a square."""
    side, length = sorted(pixels.shape[:2])
    if length <= 2 * side:
        return [pixels]
    count = -(-length // side)
    starts = [round(i * (length - side) / (count - 1)) for i in range(count)]
    upright = pixels.shape[0] == length
    return [pixels, *(pixels[at : at + side] if upright else pixels[:, at : at + side] for at in starts)]


def _outcome(image: QuarantinedImage) -> str:
    event = image.facts["event"]
    if event == "passed":
        return "released"
    return "waiting" if event == "waiting" else f"withheld: {'; '.join(image.facts['reasons'])}"
