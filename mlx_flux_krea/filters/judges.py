"""The installed filters: their answers, and the self-tests that show they are unchanged.

When a filter is converted, its answers about a drawn picture and a few prompts are recorded beside its weights. When it
is opened it must give them again, and they must be right: zeroed or permuted weights, swapped labels or another
tokenizer change them. Any answer that is not finite, has other labels than expected, or is exactly undecided is an
error: a GPU command that fails without a word leaves zeros, and zeros are a margin of 0 and probabilities of 0.5.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, cast

import mlx.core as mx
import numpy as np
from PIL import Image

from .. import home
from ..errors import FiltersError, FluxKreaError, Interrupted, ResourceError, amount, gpu_error
from ..files import may_exist, parse_json, read_small, sha256_if_exists, written_whole
from ..models import pixtral, vit
from ..models.filter_config import NSFW_SHA256, NSFW_VIT, SELF_TEST, PixtralConfig, ViTConfig
from ..models.pixtral import Pixtral, Question, held_bytes
from ..models.vit import ViT
from ..presets import NSFW_THRESHOLD
from ..residency import Blocks, read_rows
from ..tokenizers import PixtralTokenizer
from ..weights import FilterFolder, open_filter
from ..worker import evaluated
from . import instructions
from .instructions import CANARIES

FILTERS = {"nsfw": "Falconsai/nsfw_image_detection", "pixtral": "mistral-community/pixtral-12b"}
LABELS = {"nsfw": {"normal", "nsfw"}, "pixtral": {"integrity"}}  # of each filter's answers
SPREAD = 0.05  # logits by which answers about the drawn pictures differ at least; a constant classifier's do not
TOLERANCE = 0.25  # of a self-test, in logits: a probability near 0 or 1 would hide damaged weights
REVIEW = "or review every picture yourself: --check review"
RETRY = f"a GPU command may have failed: try again; {REVIEW}"
INSTALL = f"install: flux-krea setup; {REVIEW}"  # setup converts missing or damaged filters and runs missing self-tests


class Judge(Protocol):
    """A filter for pictures. The gate checks every number of its answers.

    Attributes:
        about: facts for the log: source, hashes, precision.
    """

    about: dict

    def images(self, pixels: Sequence[np.ndarray]) -> Sequence[dict[str, float]]:
        """Returns the labels (`LABELS`) of each (H, W, 3) uint8 picture with probabilities, or with the margin."""
        ...

    def free(self) -> None:
        """Frees the weights; the filter may be asked again."""


class PromptJudge(Judge, Protocol):
    """A filter for pictures and prompts: the language model."""

    def prompts(self, texts: Sequence[str]) -> Sequence[float]:
        """Returns the margin of yes over no for each text."""
        ...

    def together(
        self, pixels: Sequence[np.ndarray], texts: Sequence[str]
    ) -> tuple[Sequence[dict[str, float]], Sequence[float]]:
        """Returns the answers of `images` and of `prompts`, for which each block is read once."""
        ...


HELD = 2**27  # bytes of questions that go through the blocks together: four pictures, or forty prompts of 300 tokens
MakeRun = Callable[..., Callable]  # (number of parts, function that runs a part) to one that also reports and stops
_passed: set[tuple] = set()  # filters whose self-tests have passed in this process, by their files


def open_judges(
    make_run: MakeRun = lambda parts, run: run, waiting: Callable[[], Sequence[str]] = tuple
) -> tuple[dict[str, Judge], dict[str, float]]:
    """Returns the installed filters, after their self-tests, which a process runs once; and answers about prompts.

    Args:
        make_run: see `NSFWJudge` and `PixtralJudge`.
        waiting: returns the texts that are to be judged next. Where a self-test has to run, they go through the
            language model with its questions, so that the weights are read once for both.

    Returns:
        The filters, and the margin of each of these texts; none where no self-test ran, or where not all answers are
        valid: then the texts are to be asked about again.

    Raises:
        FiltersError: a filter is missing or damaged, or does not answer as it did when it was converted.
    """
    judges, margins, folder = {}, {}, home.path(home.FILTERS)
    missing = [name for name in FILTERS if not may_exist(folder / name)]
    if missing:
        names = " and ".join(missing) + (" are" if len(missing) > 1 else " is")
        found = f"content filters are to check this run, and {names} not in {folder}"
        raise FiltersError(found, "", INSTALL)
    for name in FILTERS:
        judges[name] = _asked(name, lambda name=name: load_judge(name, folder / name, make_run))
        files = sorted(path for path in (folder / name).rglob("*") if path.is_file())
        state = (name, *((str(path), (stat := path.stat()).st_size, stat.st_mtime_ns, stat.st_ino) for path in files))
        if state not in _passed:
            texts = list(waiting()) if name == "pixtral" else []
            answers = check_self_test(name, judges[name], folder / name / SELF_TEST, texts)
            _passed.add(state)
            if len(answers) == len(texts) and all(map(_is_valid, answers)):
                margins = dict(zip(texts, map(float, answers), strict=True))
    return judges, margins


def needed_bytes() -> int:
    """Returns the memory that both filters need beside a model at work: computed from their files, not measured.

    The classifier is whole in memory. Of Pixtral, an eighth: three of its 40 layers, its eye and the numbers of a
    block; and the questions that wait between two blocks.
    """
    sizes = {}
    for name in FILTERS:
        files = home.path(home.FILTERS, name).rglob("*.safetensors")
        sizes[name] = sum(path.stat().st_size for path in files)
    return max(sizes["nsfw"], sizes["pixtral"] // 8 + HELD)


def load_judge(name: str, folder: Path, make_run: MakeRun) -> Judge:
    """Opens an installed filter.

    Raises:
        ModelError: files are missing or damaged.
    """
    if name == "nsfw":
        return NSFWJudge(open_filter("nsfw", folder), make_run)
    return PixtralJudge(open_filter("pixtral", folder), make_run)


class NSFWJudge:
    """The classifier of pictures. It is small, and computes in float32.

    Args:
        folder: the converted filter.
        make_run: called as make_run(parts, run) before that many parts of the network are run, see `FluxPipeline`.

    Raises:
        FiltersError: the filter was not converted from the published file, and nobody allowed that.
    """

    def __init__(self, folder: FilterFolder[ViTConfig, ViT], make_run: MakeRun):
        folder.check()
        _check_weights("nsfw", folder, NSFW_VIT, NSFW_SHA256)
        self.about = _about(folder)
        self._folder, self._make_run = folder, make_run

    def images(self, pixels: Sequence[np.ndarray]) -> list[dict[str, float]]:
        """Returns the probability of each label for each picture."""
        network = self._folder.network.load(mx.float32)
        run = self._make_run(len(pixels) * (len(network.layers) + 2), evaluated)
        answers = []
        for image in pixels:
            logits = network(vit.preprocess(Image.fromarray(image), network.config.image_size), run)
            probabilities = np.array(mx.softmax(logits[0])).tolist()
            answers.append(dict(zip(network.config.labels, probabilities, strict=True)))
        return answers

    def free(self) -> None:
        """Clears MLX's cache; no weights stay between calls."""
        mx.clear_cache()


class PixtralJudge:
    """The language model. Its blocks are streamed; each is read once for all questions that are asked together.

    Arguments are those of `NSFWJudge`.
    """

    def __init__(self, folder: FilterFolder[PixtralConfig, Pixtral], make_run: MakeRun):
        folder.check()
        _check_weights("pixtral", folder, None, "files whose sha256 the hub states")
        self.about = _about(folder)
        self._folder, self._make_run = folder, make_run
        yes, no, *_ = folder.network.sizes.head_ids
        self._tokenizer = PixtralTokenizer(folder.path / "tokenizer", (yes, no), read_small)

    def prompts(self, texts: Sequence[str]) -> list[float]:
        """Returns the margin of yes for each text."""
        return self.together((), texts)[1]

    def images(self, pixels: Sequence[np.ndarray]) -> list[dict[str, float]]:
        """Returns the margin of yes for each picture."""
        return self.together(pixels, ())[0]

    def together(
        self, pixels: Sequence[np.ndarray], texts: Sequence[str]
    ) -> tuple[list[dict[str, float]], list[float]]:
        """Returns the margins of pictures and of texts. Each is the one that the question has alone, bit for bit."""
        questions = (*map(self._about_picture, pixels), *((self._tokenizer(*request(text)), ()) for text in texts))
        margins = [margin for group in self._groups(questions) for margin in self._margins(group)]
        return [{"integrity": margin} for margin in margins[: len(pixels)]], margins[len(pixels) :]

    def free(self) -> None:
        """Clears MLX's cache; no weights stay between calls."""
        mx.clear_cache()

    def _about_picture(self, pixels: np.ndarray) -> Question:
        vision = self._folder.network.sizes.vision_config
        before, after = (_text(part) for part in (instructions.IMAGE_BEFORE, instructions.IMAGE_AFTER))
        seen = pixtral.preprocess(pixtral.to_area(Image.fromarray(pixels)), vision)
        return self._tokenizer(before, pixtral.grid(seen, vision), after), (seen,)

    def _groups(self, questions: Sequence[Question]) -> Iterator[list[Question]]:
        """Yields the questions in groups of `HELD` bytes, or of a question that needs more alone."""
        network, group, held = self._folder.network, [], 0
        for question in questions:
            more = held_bytes(network.sizes, question, getattr(mx, network.dtype).size)
            if group and held + more > HELD:
                yield group
                group, held = [], 0
            group, held = [*group, question], held + more
        if group:
            yield group

    def _margins(self, questions: Sequence[Question]) -> list[float]:
        """Returns the margins of questions that go through each block one after the other."""
        folder = self._folder.network
        network, tensors = folder.load(getattr(mx, folder.dtype)), folder.tensors()
        dtype = network.norm.weight.dtype
        tokens = sorted({token for ids, _ in questions for token in ids})
        network.keep_rows(tokens, read_rows(tensors, "embed_tokens", tokens, dtype))
        eye = [*network.vision_tower.layers, network.multi_modal_projector]
        parts = eye * any(images for _, images in questions) + network.layers
        blocks = Blocks(network, tensors, parts, dtype=dtype, budget=0)
        with blocks.streaming(1) as run:
            run = self._make_run(network.stages(questions), run)
            return [float(np.array(margin).item()) for margin in network.margins(questions, run)]


def request(text: str) -> tuple[str, str, str]:
    """Returns the question about a prompt in three parts: the text before, the prompt, the text after.

    The lines around the prompt contain its own hash, so nobody can write a prompt that closes the quotation.
    """
    mark = hashlib.sha256(text.encode()).hexdigest()[:16]
    before, after = (_text(part).format(mark=mark) for part in (instructions.TEXT_BEFORE, instructions.TEXT_AFTER))
    return f"{before}\n{mark}\n", text, f"\n{mark}\n{after}"


def _text(sentences: Sequence[tuple[str, str]]) -> str:
    return " ".join(sentence for sentence, _ in sentences)


def is_unknown(folder: FilterFolder) -> bool:
    """Returns True where a filter was not made from its published files, as far as is known."""
    return not folder.index.is_published(folder.network.component)


def unknown_filters(judges: dict[str, Judge]) -> list[str]:
    """Returns the names of filters that were not made from their published files."""
    return [name for name, judge in judges.items() if judge.about.get("unknown")]


def unknown_installed() -> list[str]:
    """Returns the names of installed filters that were not made from their published files."""
    unknown = []
    for name in FILTERS:
        with contextlib.suppress(FluxKreaError):
            unknown += [name] if is_unknown(open_filter(name)) else []
    return unknown


def _check_weights(name: str, folder: FilterFolder, published: ViTConfig | None, expected: str) -> None:
    """Refuses a filter from other weights than the published ones, unless --allow-unknown-filter was given for it.

    Folders of earlier versions do not say so; of those only a classifier of the published sizes is refused.

    Raises:
        FiltersError: it was made from other weights.
    """
    said, sizes = folder.index.weights, folder.network.sizes
    if is_unknown(folder) and (said == "published" or (said == "" and sizes == published)):
        hashes = ", ".join(source.sha256 for source in folder.index.source)
        found = f"the filter {name} was converted from another file than the published one, sha256 {hashes}"
        raise FiltersError(found, expected, _renew(name))


def _about(folder: FilterFolder) -> dict:
    about = {"source": folder.index.base, "manifest_sha256": sha256_if_exists(folder.path / "manifest.json")}
    return about | ({"unknown": True} if is_unknown(folder) else {})


def self_test(name: str, judge: Judge, texts: Sequence[str] = ()) -> tuple[dict[str, float], Sequence[float]]:
    """Returns a filter's answers about drawn pictures and the canary prompts; they are recorded at conversion.

    Args:
        name: of the filter.
        judge: the filter.
        texts: prompts that the language model is asked about in the same pass.

    Returns:
        The answers, which are right; and the margins of `texts`, which nobody has checked.

    Raises:
        FiltersError: the answers are wrong, or the classifier gives the same about different pictures.
    """
    if name == "nsfw":
        pictures = {"drawn picture": drawn_picture(), **more_pictures()}
        answers = image_labels(name, judge, list(pictures.values()))
        values = {
            picture: _log_odds(labels["nsfw"], labels["normal"])
            for picture, labels in zip(pictures, answers, strict=True)
        }
        flagged, more = {"drawn picture": answers[0]["nsfw"] >= NSFW_THRESHOLD}, []
        spread = max(values.values()) - min(values.values())
        if spread < SPREAD:
            found = (
                f"the filter nsfw fails its self-test: its logits over {len(values)} pictures differ by {spread:.4f}"
            )
            raise FiltersError(found, f"{SPREAD} or more", _renew(name))
    else:

        def ask() -> tuple[list[dict[str, float]], list[float]]:
            answers, margins = cast(PromptJudge, judge).together([drawn_picture()], [*CANARIES, *texts])
            return list(answers), list(margins)

        answers, margins = _asked(name, ask)
        (labels,) = _checked_labels(name, answers, 1)
        margins, more = _checked_margins(margins[: len(CANARIES)], len(CANARIES)), margins[len(CANARIES) :]
        values = {"drawn picture": float(labels["integrity"]), **dict(zip(CANARIES, margins, strict=True))}
        flagged = {question: margin > 0 for question, margin in values.items()}
    judge.free()
    for canary, is_flagged in flagged.items():
        if is_flagged != CANARIES.get(canary, False):
            found = f"the filter {name} fails its self-test: it {'flags' if is_flagged else 'passes'} {canary!r}"
            raise FiltersError(found, "the opposite", _renew(name))
    return values, more


def record_self_test(name: str, folder: Path, make_run: MakeRun = lambda parts, run: run) -> None:
    """Records the answers of a newly converted filter, for `check_self_test`.

    Raises:
        FiltersError: the answers are wrong, so the filter cannot be used.
    """
    judge = _asked(name, lambda: load_judge(name, folder, make_run))
    values, _ = self_test(name, judge)
    with written_whole(folder / SELF_TEST) as file:
        file.write(json.dumps(values, indent=1).encode())


def check_self_test(name: str, judge: Judge, path: Path, texts: Sequence[str] = ()) -> Sequence[float]:
    """Compares a filter's answers with those recorded at its conversion. Arguments and result as for `self_test`.

    Returns:
        The margins of `texts`, which nobody has checked.

    Raises:
        FiltersError: they differ, or none were recorded.
    """
    try:
        recorded = parse_json(read_small(path))
        recorded = {text: float(value) for text, value in recorded.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FiltersError(f"{path} cannot be read: {error}", "recorded answers", INSTALL) from None
    values, margins = self_test(name, judge, texts)
    known = (values.keys(), values.keys() - more_pictures().keys())  # earlier versions recorded one picture
    if recorded.keys() not in known or not all(
        abs(values[text] - value) <= TOLERANCE for text, value in recorded.items()
    ):
        found = "does not answer its self-test as it did when it was converted"
        raise FiltersError(f"the filter {name} {found}", "the recorded answers", _renew(name))
    return margins


def drawn_picture() -> np.ndarray:
    """Draws a sun over a meadow, (128, 192, 3) uint8, to which no filter should object."""
    y, x = np.mgrid[:128, :192]
    sky = np.stack([120 + y // 2, 170 + y // 3, 230 - y // 8], axis=-1)
    meadow = np.stack([60 + (x * y) % 13, 140 + (x + 2 * y) % 17, 50 + (3 * x + y) % 11], axis=-1)
    picture = np.where((y > 80)[..., None], meadow, sky)
    picture[(x - 140) ** 2 + (y - 35) ** 2 < 18**2] = (250, 220, 90)
    return picture.astype(np.uint8)


def more_pictures() -> dict[str, np.ndarray]:
    """Draws two more pictures by name, (128, 192, 3) uint8, that are as unlike the first one as can be."""
    y, x = np.mgrid[:128, :192]
    board = np.where((x // 16 + y // 16) % 2, 235, 20)
    night = np.stack([10 + x // 8, 12 + y // 6, 40 + (x + y) // 4], axis=-1)
    night[(x - 60) ** 2 + (y - 70) ** 2 < 40**2] = (30, 90, 220)
    return {"drawn board": np.stack([board] * 3, axis=-1).astype(np.uint8), "drawn night": night.astype(np.uint8)}


def image_labels(name: str, judge: Judge, pixels: Sequence[np.ndarray]) -> list[dict[str, float]]:
    """Returns a filter's answer about each picture, checked for labels and for finite numbers that decide.

    Raises:
        FiltersError: the filter raised an error, its labels or numbers are not valid, or it is exactly undecided.
    """
    return _checked_labels(name, _asked(name, lambda: list(judge.images(pixels))), len(pixels))


def _checked_labels(name: str, answers: Sequence[dict[str, float]], count: int) -> list[dict[str, float]]:
    """Returns answers about so many pictures, checked.

    Raises:
        FiltersError: as `image_labels`.
    """
    given: list[dict[str, float]] = _asked(name, lambda: [dict(answer) for answer in answers])
    for answer in given:
        fits = answer.keys() == LABELS[name] and all(map(_is_finite, answer.values()))
        if fits and name == "nsfw":
            fits = all(0 <= p <= 1 for p in answer.values()) and abs(sum(answer.values()) - 1) < 1e-3
        if not fits:
            found = ", ".join(f"{label} {value}" for label, value in answer.items())
            expected = ", ".join(sorted(LABELS[name]))
            raise FiltersError(f"the filter {name} answered {found}", expected, _renew(name))
        _check_decided(name, answer["nsfw"] - answer["normal"] if name == "nsfw" else answer["integrity"])
    if len(given) != count:
        raise FiltersError(f"the filter {name} gave {amount(len(given), 'answer')}", f"{count}", _renew(name))
    return given


def margins_of(judge: PromptJudge, texts: list[str]) -> list[float]:
    """Returns the margin of yes for each text, checked for finite numbers that decide.

    Raises:
        FiltersError: the filter raised an error, its numbers are not valid, or it is exactly undecided.
    """
    return _checked_margins(_asked("pixtral", lambda: list(judge.prompts(texts))) if texts else [], len(texts))


def _checked_margins(margins: Sequence[float], count: int) -> list[float]:
    """Returns margins of so many texts, checked.

    Raises:
        FiltersError: as `margins_of`.
    """
    if len(margins) != count or not all(map(_is_finite, margins)):
        raise FiltersError(f"the filter pixtral answered {margins}", amount(count, "number"), _renew("pixtral"))
    for margin in margins:
        _check_decided("pixtral", margin)
    return [float(margin) for margin in margins]


def _check_decided(name: str, margin: float) -> None:
    """Refuses an answer without any margin between yes and no.

    Raises:
        FiltersError: the margin is exactly 0.
    """
    if margin == 0:
        raise FiltersError(f"the filter {name} is exactly undecided", "an answer other than 0", RETRY)


def _log_odds(p: float, q: float) -> float:
    return math.log(max(p, 1e-30) / max(q, 1e-30))


def _asked(name: str, ask: Callable):
    """Returns a filter's answer; any error that it raises becomes a `FiltersError`."""
    try:
        return ask()
    except (FiltersError, Interrupted, ResourceError):
        raise
    except Exception as error:
        if failed := gpu_error(error):
            raise failed from None
        is_damaged = isinstance(error, FluxKreaError)
        found = f"the filter {name} failed: {'' if is_damaged else f'{type(error).__name__}: '}{error}"
        raise FiltersError(found, "", INSTALL if is_damaged else _renew(name)) from error


def _is_finite(value) -> bool:
    return isinstance(value, int | float | np.floating) and not isinstance(value, bool) and math.isfinite(value)


def _is_valid(margin) -> bool:
    """Returns True for a margin that decides."""
    return _is_finite(margin) and margin != 0


def _renew(name: str) -> str:
    """Returns the next step for an installed filter that is not valid."""
    return f"convert it again: flux-krea convert {FILTERS[name]} --force; {REVIEW}"
