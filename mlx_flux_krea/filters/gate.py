"""The policy: what is checked, in which order, and what an answer means. Fails closed.

Order: the filters and the log are known to work before anything else is loaded; every prompt, raw and normalised,
before the encoders; an input image as the autoencoder will see it; every picture, the very pixels that are released.
What raises, answers NaN, or answers with other labels than expected has not passed: then nothing of the call is
released. There is no value of anything here that turns checking off, and thresholds move in one direction only.

Answers follow black-forest-labs/flux: a picture passes where its NSFW probability is below 0.85; a prompt or a picture
passes the integrity check where the margin of yes over no is not above 0.
"""

import contextlib
import hashlib
import json
import logging
import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import FiltersError, UsageError, Withheld
from ..presets import CHECKS, NSFW_THRESHOLD
from ..provenance import Picture
from ..request import ResolvedRequest
from .judges import Judge, MakeRun, image_labels, margins_of, open_judges
from .ledger import Kept, Ledger, Run, Verdict

logger = logging.getLogger("mlx_flux_krea")

DELETE_NSFW = 0.98  # a picture at or above it is deleted at once, and waits for nobody
PIECE, OVERLAP = 1500, 300  # characters of a long prompt that are judged at a time
_LOOKALIKES = str.maketrans(
    "аеорсухіјѕԁһԛԝАВЕКМНОРСТХІЈЅУοανικρτυχΑΒΕΖΗΙΚΜΝΟΡΤΥΧ",
    "aeopcyxijsdhqwABEKMHOPCTXIJSYoavikptuxABEZHIKMNOPTYX",
)


@dataclass(frozen=True)
class Policy:
    """What a model that requires filters is checked by.

    Attributes:
        check: "filters", "review" (a person looks at every picture) or "both".
        nsfw: a picture passes below this probability; 0.85, or less.
        integrity: a prompt or a picture passes where the margin of yes is not above minus this; 0, or more.

    Raises:
        UsageError: another value, such as one that would let more pass.
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


class Open:
    """What a model has that requires no filters: nothing is checked, and the log says so."""

    notes: tuple[str, ...] = ()

    def check_prompts(self, texts: Sequence[str]) -> None:
        """Nothing."""

    def check_input(self, pixels: Callable[[], np.ndarray]) -> None:
        """Nothing."""

    def release(self, pixels: Sequence[np.ndarray], records: Sequence[dict]) -> tuple[tuple[str, ...], list[Picture]]:
        """Outcomes and pictures."""
        pictures = [Picture.from_pixels(one, record) for one, record in zip(pixels, records, strict=True)]
        return ("released",) * len(pictures), pictures


class Gate:
    """What one call of the pipeline has to pass; from `open_gate`.

    Attributes:
        notes: what the user should know.
    """

    def __init__(
        self,
        policy: Policy,
        run: Run,
        judges: dict[str, Judge],
        margins: dict[tuple, float] | None = None,
        ready: Callable[[], None] = lambda: None,
    ):
        self.policy, self.run, self._judges, self._ready = policy, run, judges, ready
        self._margins: dict[tuple[str, str], float] = {} if margins is None else margins
        self.notes: list[str] = []

    def check_prompts(self, texts: Sequence[str]) -> None:
        """Judges every text, as it is and normalised, before any encoder is loaded.

        Raises:
            Withheld: one was flagged.
            FiltersError: a filter failed.
        """
        if not self._judges or not texts:
            return
        margins = self._judged(texts)
        hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        worst = max(margins, default=-math.inf)
        flagged = not worst <= -self.policy.integrity
        event = "prompt_flagged" if flagged else "prompts_passed"
        self.run.note(event, prompts_sha256=hashes, margins=[round(margin, 4) for margin in margins])
        if flagged:
            raise Withheld(
                "the prompt seems to ask for a protected character or brand, or a living person of public life "
                f"(margin {worst:.2f})",
                f"at most {-self.policy.integrity or 0:g}",
                "say it in other words",
            )

    def passing(self, requests: Sequence[ResolvedRequest]) -> list[ResolvedRequest]:
        """Those of whose texts none is flagged. All are judged at once, and what was found is kept for `check_prompts`.

        Raises:
            FiltersError: a filter failed.
        """
        if not self._judges:
            return list(requests)
        self._judged([text for request in requests for text in request.texts()])
        return [r for r in requests if max(self._judged(r.texts()), default=-math.inf) <= -self.policy.integrity]

    def _judged(self, texts: Sequence[str]) -> list[float]:
        """The margin of each form of each text; those that this filter has judged before it is not asked again."""
        judge = self._judges["pixtral"]
        read = list(dict.fromkeys(piece for text in texts for form in self._forms(text) for piece in _pieces(form)))
        keys = [(json.dumps(judge.about, sort_keys=True), text) for text in read]
        if missing := [key for key in keys if key not in self._margins]:
            with self._noted():
                found = margins_of(judge, [text for _, text in missing])
            judge.free()
            self._margins.update(zip(missing, found, strict=True))
        return [self._margins[key] for key in keys]

    def check_input(self, pixels: Callable[[], np.ndarray]) -> None:
        """Judges an input image: (H, W, 3) uint8, as the autoencoder will see it.

        Raises:
            Withheld: it was flagged.
            FiltersError: a filter failed.
        """
        if not self._judges:
            return
        image = pixels()
        with self._noted():
            (scores,) = self._scores([image])
        reasons = self._reasons(scores)
        digest = hashlib.sha256(image.tobytes()).hexdigest()
        self.run.note("input_flagged" if reasons else "input_passed", input_sha256=digest, scores=scores)
        if reasons:
            raise Withheld(f"the input image was withheld: {'; '.join(reasons)}", "", "start from another one")

    def release(self, pixels: Sequence[np.ndarray], records: Sequence[dict]) -> tuple[tuple[str, ...], list[Picture]]:
        """Judges every picture, and lets out what passed.

        Args:
            pixels: (H, W, 3) uint8 of each picture.
            records: of each picture.

        Returns:
            An outcome for each ("released", "waiting", or "withheld: " and why), and the pictures that were released.

        Raises:
            FiltersError: a filter failed; none is released, all wait for a person.
        """
        ledger = self.run.ledger
        kept = [self.run.keep(one, record) for one, record in zip(pixels, records, strict=True)]
        try:
            scores = self._scores(pixels) if self._judges else [{}] * len(kept)
        except FiltersError as error:
            for one in kept:
                ledger.settle(one, Verdict("error", one.facts["pixels"], (error.found,)))
            raise error.with_next_step("the pictures wait for review: flux-krea review") from error
        settled = [self._settle(one, some) for one, some in zip(kept, scores, strict=True)]
        passed = [one for one in settled if one.facts["event"] == "passed"]
        self._ready()
        pictures = [ledger.hand_over(one) for one in passed]
        self._ready()  # or what was handed over waits for a person
        for one in passed:
            ledger.discard(one)
        return tuple(map(_outcome, settled)), pictures

    def _settle(self, kept: Kept, scores: dict[str, float]) -> Kept:
        ledger, digest = self.run.ledger, kept.facts["pixels"]
        reasons = self._reasons(scores)
        if self._judges:
            kept = ledger.settle(kept, Verdict("flagged" if reasons else "passed", digest, reasons, scores))
        if reasons and scores["nsfw"] >= DELETE_NSFW:
            ledger.log.append("purged", image=kept.image)
            ledger.discard(kept)
        elif not reasons and self.policy.check != "filters":
            kept = ledger.settle(kept, Verdict("waiting", digest))
        return kept

    def _reasons(self, scores: dict[str, float]) -> tuple[str, ...]:
        """Why a picture with these scores does not pass."""
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
        """{"nsfw": probability, "integrity": margin} of each picture, one filter after the other."""
        scores: list[dict[str, float]] = [{} for _ in pixels]
        for name, judge in self._judges.items():
            views = [_views(one) if name == "nsfw" else [one] for one in pixels]
            answers = iter(image_labels(name, judge, [view for some in views for view in some]))
            label = "nsfw" if name == "nsfw" else "integrity"
            for one, some in zip(scores, views, strict=True):
                one[label] = max(float(next(answers)[label]) for _ in some)
            judge.free()
        return scores

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        """Writes a filter's failure into the log."""
        try:
            yield
        except FiltersError as error:
            self.run.note("error", reasons=[error.found])
            raise

    def _forms(self, text: str) -> list[str]:
        """The text, normalised, and with letters of other alphabets that look like Latin ones as those."""
        plain = normalised(text)
        latin = " ".join(_as_latin(word) for word in plain.split(" "))
        if latin != plain:
            self.notes.append(
                "a word of the prompt mixes alphabets, or only looks Latin: it was also judged as it looks"
            )
        return [form for form in dict.fromkeys((text, plain, latin)) if form.strip()]


@contextlib.contextmanager
def open_gate(
    policy: Policy | None,
    make_run: MakeRun,
    margins: dict[tuple, float] | None = None,
    ready: Callable[[], None] = lambda: None,
    **about,
) -> Iterator[Gate | Open]:
    """The gate for one call. Filters, quarantine and log are known to work when it opens.

    Args:
        policy: None: the model requires no filters.
        make_run: what the filters' pieces are run by, see `judges`.
        margins: what the filter said of texts in earlier calls; what it says is added.
        ready: called before and after pictures are handed over; what it raises stops that.
        about: what the log should say of the run.

    Raises:
        FiltersError: filters, quarantine or log are missing or unhealthy.
    """
    if policy is None:
        try:
            Ledger().log.append("unfiltered", **about)
        except FiltersError as error:
            logger.warning("this run is not in the log: %s", error.found)
        yield Open()
        return
    judges = {} if policy.check == "review" else open_judges(make_run)
    filters = {name: judge.about for name, judge in judges.items()}
    thresholds = {"nsfw": policy.nsfw, "integrity": policy.integrity}
    try:
        with Ledger().run(policy.check, filters=filters, thresholds=thresholds, **about) as run:
            yield Gate(policy, run, judges, margins, ready)
    finally:
        for judge in judges.values():
            judge.free()


def normalised(text: str) -> str:
    """NFKC, without characters that show nothing: zero-width ones, controls, variation selectors."""
    shown = (c for c in unicodedata.normalize("NFKC", text) if not _is_hidden(c))
    return " ".join(unicodedata.normalize("NFKC", "".join(shown)).split())


def _is_hidden(c: str) -> bool:
    fillers = "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0"
    hidden = unicodedata.category(c) in ("Cf", "Cc", "Co", "Cn") and not c.isspace()
    return hidden or c in fillers or "\ufe00" <= c <= "\ufe0f" or c >= "\U000e0000"


def _as_latin(word: str) -> str:
    """The word as it looks, where all its letters are Latin or look so."""
    latin = word.translate(_LOOKALIKES)
    return latin if all(c.isascii() or not c.isalpha() or "LATIN" in unicodedata.name(c, "") for c in latin) else word


def _pieces(text: str) -> list[str]:
    """A long text in overlapping pieces, so that nothing hides in the middle of it."""
    return [text[i : i + PIECE] for i in range(0, max(len(text) - OVERLAP, 1), PIECE - OVERLAP)]


def _views(pixels: np.ndarray) -> list[np.ndarray]:
    """The picture, and of a long one its squares: the classifier makes a square of whatever it sees."""
    side, length = sorted(pixels.shape[:2])
    if length <= 2 * side:
        return [pixels]
    count = -(-length // side)
    starts = [round(i * (length - side) / (count - 1)) for i in range(count)]
    upright = pixels.shape[0] == length
    return [pixels, *(pixels[at : at + side] if upright else pixels[:, at : at + side] for at in starts)]


def _outcome(kept: Kept) -> str:
    event = kept.facts["event"]
    if event == "passed":
        return "released"
    return "waiting" if event == "waiting" else f"withheld: {'; '.join(kept.facts['reasons'])}"
