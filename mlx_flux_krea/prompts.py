"""Prompts to what the transformer reads: T5's states and CLIP's pooled vector. Results are kept, encoders are not."""

import logging
import traceback
from collections import OrderedDict
from collections.abc import Callable

import mlx.core as mx

from .residency import Blocks
from .tokenizers import Tokens
from .weights import ModelFolder

logger = logging.getLogger("mlx_flux_krea")

KEPT = 32  # encoded prompts; one takes 4 MB at FLUX.1's size in 16 bits


class Encoded:
    """One prompt as the transformer reads it.

    Attributes:
        embeds: (1, S, context_in_dim) of T5.
        pooled: (1, vec_in_dim) of CLIP.
        cut: sentences about text that did not fit.
    """

    def __init__(self, embeds: mx.array, pooled: mx.array, cut: tuple[str, ...] = ()):
        self.embeds, self.pooled, self.cut = embeds, pooled, cut


class PromptEncoder:
    """Tokenizers and text encoders of a model folder.

    Args:
        folder: the model.
        dtype: the compute type.
        check: called while weights are waited for; raises to stop.
    """

    def __init__(self, folder: ModelFolder, dtype: mx.Dtype, check: Callable[[], None]):
        self._folder, self._dtype, self._check = folder, dtype, check
        self._kept: OrderedDict[tuple, Encoded] = OrderedDict()

    def encode(self, pairs: list[tuple[str, str]], length: int, make_run: Callable) -> list[Encoded]:
        """Encodes pairs of (text for CLIP, text for T5).

        Args:
            pairs: of each prompt.
            length: tokens of T5.
            make_run: from a number of pieces and what runs one to what also reports and stops, see `T5Encoder`.

        Raises:
            ModelError: encoders or tokenizers missing or damaged, or not of one another.
        """
        keys = [(*pair, length) for pair in pairs]
        missing = [key for key in dict.fromkeys(keys) if key not in self._kept]
        if missing:
            _ = self._folder.tokenizers  # before any weight is read, so that what is wrong with them is found early
            try:
                networks = self._folder.clip.load(self._dtype), self._folder.t5.load(self._dtype)
                t5 = networks[1]
                blocks = Blocks(t5, self._folder.t5.tensors(), t5.stages, t5.dtype, 0, self._check)
                with blocks.reading(len(missing)) as run:
                    run = make_run(len(missing) * (len(t5.stages) + 3), run)
                    for key in missing:
                        self._kept[key] = self._encode(key, networks, run)
            except BaseException as error:
                traceback.clear_frames(error.__traceback__)  # who keeps the traceback, as notebooks do, would keep T5
                raise
            finally:
                networks = t5 = blocks = run = None
                mx.clear_cache()
        encoded = [self._kept[key] for key in keys]
        for key in keys:
            self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return encoded

    def _encode(self, key: tuple[str, str, int], networks, run) -> Encoded:
        clip_text, t5_text, length = key
        clip, t5 = networks
        tokens = read_prompt(self._folder, clip_text, t5_text, length)
        cut = cut_off(tokens)
        for note in cut:
            logger.warning(note)
        ids = [mx.array([one.ids]) for one in tokens]
        _, pooled = run(clip, ids[0])
        return Encoded(t5(ids[1], run), pooled, cut)


def read_prompt(folder: ModelFolder, clip_text: str, t5_text: str, length: int) -> tuple[Tokens, Tokens]:
    """What CLIP and what T5 reads of a prompt; T5 takes `length` tokens.

    Raises:
        ModelError: tokenizers missing or damaged.
    """
    clip, t5 = folder.tokenizers
    return clip(clip_text, folder.clip.sizes.max_position_embeddings), t5(t5_text, length)


def cut_off(tokens: tuple[Tokens, Tokens]) -> tuple[str, ...]:
    """Sentences about what did not fit."""
    named = zip(("CLIP", "T5"), tokens, strict=True)
    return tuple(f"{name} reads {len(t.ids)} tokens; not read: {t.cut[:200]!r}" for name, t in named if t.cut)
