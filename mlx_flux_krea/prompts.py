"""Prompts to what the transformer reads: T5's states and CLIP's pooled vector. Results are kept, encoders are not."""

import logging
from collections import OrderedDict
from collections.abc import Callable

import mlx.core as mx

from .errors import ModelError
from .tokenizers import CLIPTokenizer, T5Tokenizer
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
    """

    def __init__(self, folder: ModelFolder, dtype: mx.Dtype):
        self._folder, self._dtype = folder, dtype
        self._kept: OrderedDict[tuple, Encoded] = OrderedDict()

    def encode(self, pairs: list[tuple[str, str]], length: int, make_run: Callable[[int], Callable]) -> list[Encoded]:
        """Encodes pairs of (text for CLIP, text for T5).

        Args:
            pairs: of each prompt.
            length: tokens of T5.
            make_run: from a number of pieces to what evaluates them, see `T5Encoder`.

        Raises:
            ModelError: encoders or tokenizers missing or damaged, or not of one another.
        """
        keys = [(*pair, length) for pair in pairs]
        missing = [key for key in dict.fromkeys(keys) if key not in self._kept]
        if missing:
            tokenizers = CLIPTokenizer(self._folder.path / "tokenizer"), T5Tokenizer(self._folder.path / "tokenizer_2")
            networks = [self._folder.load(name, self._dtype) for name in ("text_encoder", "text_encoder_2")]
            run = make_run(len(missing) * (networks[1].config.num_layers + 4))
            for key in missing:
                self._kept[key] = self._encode(key, tokenizers, networks, run)
            del networks
            mx.clear_cache()
        encoded = [self._kept[key] for key in keys]
        for key in keys:
            self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return encoded

    @staticmethod
    def _encode(key: tuple[str, str, int], tokenizers, networks, run) -> Encoded:
        clip_text, t5_text, length = key
        clip, t5 = networks
        lengths = clip.config.max_position_embeddings, length
        ids, cut = [], []
        for name, tokenizer, network, text, size in zip(
            ("CLIP", "T5"), tokenizers, networks, (clip_text, t5_text), lengths, strict=True
        ):
            tokens = tokenizer(text, size)
            if max(tokens.ids) >= network.config.vocab_size:
                raise ModelError(
                    f"{name}'s tokenizer gives the id {max(tokens.ids)}", f"ids below {network.config.vocab_size}"
                )
            if tokens.cut:
                cut.append(f"{name} reads {size} tokens; not read: {tokens.cut[:200]!r}")
                logger.warning(cut[-1])
            ids.append(mx.array([tokens.ids]))
        _, pooled = run(clip, ids[0])
        return Encoded(t5(ids[1], run), pooled, tuple(cut))
