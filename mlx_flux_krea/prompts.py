"""Encodes prompts for the transformer, with T5 and CLIP. Results stay in memory, encoders do not."""

import logging
import traceback
from collections import OrderedDict
from collections.abc import Callable

import mlx.core as mx

from .adapters.formulas import Attached, Measure, Uses
from .residency import Blocks
from .tokenizers import Tokens
from .weights import ModelFolder

logger = logging.getLogger("mlx_flux_krea")

_ENCODERS = ("text_encoder", "text_encoder_2")
CACHED = 32  # encoded prompts; one takes 4 MB at FLUX.1's size in 16 bits


class EncodedPrompt:
    """One prompt as the transformer reads it.

    Attributes:
        embeds: (1, S, context_in_dim) of T5.
        pooled: (1, vec_in_dim) of CLIP.
        cut: sentences about text that was cut off.
    """

    def __init__(self, embeds: mx.array, pooled: mx.array, cut: tuple[str, ...] = ()):
        self.embeds, self.pooled, self.cut = embeds, pooled, cut


class PromptEncoder:
    """Tokenizers and text encoders of a model folder.

    Args:
        folder: the model.
        dtype: the compute type.
        check: called while a read is waited for; raises to stop.
    """

    def __init__(self, folder: ModelFolder, dtype: mx.Dtype, check: Callable[[], None]):
        self._folder, self._dtype, self._check = folder, dtype, check
        self._encoded: OrderedDict[tuple, EncodedPrompt] = OrderedDict()

    def encode(
        self,
        pairs: list[tuple[str, str]],
        length: int,
        make_run: Callable[..., Callable],
        uses: Uses = (),
        measure: Measure | None = None,
    ) -> list[EncodedPrompt]:
        """Encodes pairs of (text for CLIP, text for T5).

        Args:
            pairs: of each prompt.
            length: tokens of T5.
            make_run: called as make_run(parts, run); returns a `run` that also reports progress and can be stopped.
            uses: adapters with their weights, of which those of the encoders take part.
            measure: measures rows for DoRA.

        Raises:
            ModelError: encoders or tokenizers missing or damaged, or they do not fit.
        """
        uses = [(adapter, weight) for adapter, weight in uses if weight and adapter.changes(*_ENCODERS)]
        changes = tuple((adapter.facts.sha256, weight) for adapter, weight in uses)
        keys = [(*pair, length, changes) for pair in pairs]
        missing = [key for key in dict.fromkeys(keys) if key not in self._encoded]
        if missing:
            _ = self._folder.tokenizers  # before any weight is read, so that a fault in them is found early
            try:
                self._encode_missing(missing, make_run, uses, measure)
            except BaseException as error:
                traceback.clear_frames(error.__traceback__)  # a traceback that a notebook holds would hold T5
                raise
            finally:
                mx.clear_cache()
        encoded = [self._encoded[key] for key in keys]
        for key in keys:
            self._encoded.move_to_end(key)
        while len(self._encoded) > CACHED:
            self._encoded.popitem(last=False)
        return encoded

    def forget(self) -> None:
        """Drops what was encoded: its values are not to be trusted."""
        self._encoded.clear()

    def _encode_missing(
        self, keys: list[tuple], make_run: Callable[..., Callable], uses: Uses, measure: Measure | None
    ) -> None:
        clip, t5 = self._folder.clip.load(self._dtype), self._folder.t5.load(self._dtype)
        if uses and measure:
            Attached(clip, "text_encoder", self._dtype).use(uses, measure)
            Attached(t5, "text_encoder_2", t5.dtype).use(uses, measure)
        blocks = Blocks(t5, self._folder.t5.tensors(), t5.stages, dtype=t5.dtype, budget=0, check=self._check)
        with blocks.streaming(len(keys)) as run:
            run = make_run(len(keys) * (len(t5.stages) + 3), run)
            for key in keys:
                clip_text, t5_text, length, _ = key
                tokens = tokenize(self._folder, clip_text, t5_text, length)
                cut = cut_notes(tokens)
                for note in cut:
                    logger.warning(note)
                ids = [mx.array([prompt.ids]) for prompt in tokens]
                _, pooled = run(clip, ids[0])
                self._encoded[key] = EncodedPrompt(t5(ids[1], run), pooled, cut)


def tokenize(folder: ModelFolder, clip_text: str, t5_text: str, length: int) -> tuple[Tokens, Tokens]:
    """Returns the tokens of a prompt for CLIP and for T5; T5 takes `length` tokens.

    Raises:
        ModelError: tokenizers missing or damaged.
    """
    clip, t5 = folder.tokenizers
    return clip(clip_text, folder.clip.sizes.max_position_embeddings), t5(t5_text, length)


def cut_notes(tokens: tuple[Tokens, Tokens]) -> tuple[str, ...]:
    """Returns sentences about text that CLIP or T5 had no room for."""
    named = zip(("CLIP", "T5"), tokens, strict=True)
    return tuple(f"{name} reads {len(t.ids)} tokens; not read: {t.cut[:200]!r}" for name, t in named if t.cut)
