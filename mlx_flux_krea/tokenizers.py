"""Text to token ids as in the reference pipelines, with the text that was cut off.

The tokenizers of FLUX.1 give the ids of transformers 4 (CLIPTokenizer and T5TokenizerFast, without ftfy), which
diffusers, BFL and krea use. transformers itself is not needed; a folder holds the published tokenizer files. The filter
for text and pictures has a tokenizer of its own.
"""

import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from .errors import ModelError

Read = Callable[[Path], bytes]  # reads a whole file; who opens a stranger's folder passes one with a bound


@dataclass(frozen=True)
class Tokens:
    """A tokenized prompt."""

    ids: list[int]  # padded to the given length
    count: int  # tokens without padding, start and end tokens included
    cut: str  # the text that did not fit, as decoded from its tokens; "" if all of it did


# Blocks that BERT's tokenizer, and so CLIP's in transformers 4, sets apart with spaces: one token a character.
_CJK = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip
_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class CLIPTokenizer:
    """CLIP's lower-case byte-pair encoding, from vocab.json and merges.txt or from tokenizer.json.

    Before the merges, text is cleaned as in transformers 4 without ftfy: control and zero-width characters are removed,
    any whitespace is a space, CJK characters stand alone, Unicode is composed (NFC).

    Args:
        folder: holds the files.
        read: reads one of them.

    Raises:
        ModelError: files are missing or damaged.
    """

    def __init__(self, folder: Path, read: Read = Path.read_bytes):
        vocab, merges = _read_bpe(folder, read)
        try:
            bpe = models.BPE(vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix="</w>")
            self._start, self._end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
        except Exception as error:  # the tokenizers library raises plain Exception
            raise ModelError(f"the tokenizer in {folder} is damaged: {error}", "CLIP's vocabulary and merges") from None
        self._bpe = Tokenizer(bpe)
        words = pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True)
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        self._bpe.decoder = decoders.ByteLevel()
        self.vocab_size = max(vocab.values()) + 1

    def __call__(self, text: str, max_length: int = 77) -> Tokens:
        """Tokenizes a text, with start and end token, padded with the end token."""
        ids = []
        for part in re.split(r"(<\|startoftext\|>|<\|endoftext\|>)", text):
            if part in ("<|startoftext|>", "<|endoftext|>"):
                ids.append(self._start if part == "<|startoftext|>" else self._end)
            else:
                ids += self._bpe.encode(_clean(part)).ids
        room = max_length - 2
        cut = self._bpe.decode(ids[room:]).replace("</w>", " ").strip()
        ids = [self._start, *ids[:room], self._end]
        return Tokens(ids + [self._end] * (max_length - len(ids)), len(ids), cut)


# Appended to a sentencepiece model, these override its normalizer: no space is put in front of the text (field 3 of
# normalizer_spec, which is field 3 of the model), and in the second, none is taken away (field 4).
_INSIDE = b"\x1a\x02\x18\x00"
_SPACES_KEPT = b"\x1a\x04\x18\x00\x20\x00"


class T5Tokenizer:
    """T5's sentencepiece model, from tokenizer.json or spiece.model, whichever the folder holds.

    Special tokens written in the text (`</s>`, `<extra_id_0>`) become themselves, and the text after one starts a word
    only after a space. T5TokenizerFast of transformers 4 does so for the published files, transformers 5 always.

    Args:
        folder: holds the file.

    Raises:
        ModelError: files are missing or damaged.
    """

    def __init__(self, folder: Path, read: Read = Path.read_bytes):
        fast, slow = folder / "tokenizer.json", folder / "spiece.model"
        try:
            if fast.exists():
                tokenizer = Tokenizer.from_str(read(fast).decode())
                tokenizer.no_padding()
                tokenizer.no_truncation()
                self._encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
                self._decode = tokenizer.decode
                self._pad, self._end = tokenizer.token_to_id("<pad>"), tokenizer.token_to_id("</s>")
                self.vocab_size = max(tokenizer.get_vocab().values()) + 1
            elif slow.exists():
                self._pieces = sentencepiece.SentencePieceProcessor(model_proto=read(slow))
                proto = self._pieces.serialized_model_proto()
                self._inside = sentencepiece.SentencePieceProcessor(model_proto=proto + _INSIDE)
                self._normalizer = sentencepiece.SentencePieceNormalizer(model_proto=proto + _SPACES_KEPT)
                self._encode, self._decode = self._encode_pieces, self._decode_pieces
                self._pad, self._end = self._pieces.pad_id(), self._pieces.eos_id()
                self._special = self._special_tokens(folder, read)
                self.vocab_size = max(self._pieces.get_piece_size(), *(i + 1 for i in self._special.values()))
            else:
                raise ModelError(f"{folder} holds no T5 tokenizer", "tokenizer.json or spiece.model")
        except ModelError:
            raise
        except Exception as error:  # both libraries raise various errors on a damaged file
            raise ModelError(f"the tokenizer in {folder} is damaged: {error}", "T5's own file, unchanged") from None
        if self._pad is None or self._end is None or min(self._pad, self._end) < 0:
            raise ModelError(f"the tokenizer in {folder} has no <pad> or no </s>", "a T5 tokenizer")

    def __call__(self, text: str, max_length: int) -> Tokens:
        """Tokenizes a text, with the end token, padded."""
        ids = self._encode(text)
        cut = self._decode(ids[max_length - 1 :]).strip()
        ids = [*ids[: max_length - 1], self._end]
        return Tokens(ids + [self._pad] * (max_length - len(ids)), len(ids), cut)

    def _special_tokens(self, folder: Path, read: Read) -> dict[str, int]:
        config = folder / "tokenizer_config.json"
        extra = json.loads(read(config)).get("extra_ids", 100) if config.exists() else 100
        first = self._pieces.get_piece_size()
        special = {f"<extra_id_{n}>": first + extra - 1 - n for n in range(extra)}
        return special | {t: self._pieces.piece_to_id(t) for t in ("<pad>", "</s>", "<unk>")}

    def _encode_pieces(self, text: str) -> list[int]:
        ids = []
        for i, part in enumerate(re.split(f"({'|'.join(self._special)})", text)):
            if part in self._special:
                ids.append(self._special[part])
            else:
                starts_a_word = i == 0 or self._normalizer.normalize(part).startswith("▁")
                ids += (self._pieces if starts_a_word else self._inside).encode(part)
        return ids

    def _decode_pieces(self, ids: list[int]) -> str:
        return self._pieces.decode([i for i in ids if i < self._pieces.get_piece_size()])


# Pixtral's control tokens (Mistral's third tokenizer); one patch, the end of a row of them, the end of a picture
_BOS, _INST, _END_INST, _IMG, _IMG_BREAK, _IMG_END = 1, 3, 4, 10, 12, 13
_CONTROL = {
    _BOS: "<s>", _INST: "[INST]", _END_INST: "[/INST]", _IMG: "[IMG]", _IMG_BREAK: "[IMG_BREAK]", _IMG_END: "[IMG_END]",
}  # fmt: skip


class PixtralTokenizer:
    """Pixtral's byte-level encoding of an instruction, from tokenizer.json.

    A control token written in the text is text: only this class sets the frame of a prompt and the place of pictures.

    Args:
        folder: holds the file.
        answers: required ids of "yes" and "no".

    Raises:
        ModelError: the file is missing, damaged or not Pixtral's.
    """

    def __init__(self, folder: Path, answers: tuple[int, int], read: Read = Path.read_bytes):
        path = folder / "tokenizer.json"
        if not path.exists():
            raise ModelError(f"{folder} holds no tokenizer", "Pixtral's tokenizer.json")
        try:
            self._bpe = Tokenizer.from_str(read(path).decode())
        except Exception as error:  # the tokenizers library raises plain Exception
            raise ModelError(
                f"the tokenizer in {folder} is damaged: {error}", "Pixtral's own file, unchanged"
            ) from None
        self._bpe.no_padding()
        self._bpe.no_truncation()
        # all added tokens are control tokens, whatever the file calls them, and none is looked for in a text
        self._bpe.add_special_tokens([token.content for token in self._bpe.get_added_tokens_decoder().values()])
        self._bpe.encode_special_tokens = True
        self.vocab_size = max(self._bpe.get_vocab().values()) + 1
        expected = dict(zip(("yes", "no"), ([i] for i in answers), strict=True))
        for word, ids in expected.items():
            found = self._encode(word)
            if found != ids or self.decode(ids) != word:
                raise ModelError(f'the tokenizer in {folder} has {found} for "{word}"', f"{ids}", "take Pixtral's own")
        for number, token in _CONTROL.items():
            if self._bpe.token_to_id(token) != number or number in self._encode(token):
                raise ModelError(f"the tokenizer in {folder} has no {token} of its own as {number}", "Pixtral's own")

    def __call__(self, *parts: str | tuple[int, int]) -> list[int]:
        """Tokenizes one instruction.

        Args:
            parts: text, and pictures as their numbers of rows and columns of patches, in order.
        """
        ids = [_BOS, _INST]
        for part in parts:
            ids += self._encode(part) if isinstance(part, str) else _picture(*part)
        return [*ids, _END_INST]

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids, without control tokens."""
        return self._bpe.decode(ids)

    def _encode(self, text: str) -> list[int]:
        return self._bpe.encode(text, add_special_tokens=False).ids


def _picture(rows: int, columns: int) -> list[int]:
    return [*([*[_IMG] * columns, _IMG_BREAK] * rows)[:-1], _IMG_END]


def _read_bpe(folder: Path, read: Read) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Reads vocabulary and merges from either form of the published files."""
    try:
        if (folder / "vocab.json").exists():
            vocab = json.loads(read(folder / "vocab.json"))
            lines = read(folder / "merges.txt").decode().replace("\r\n", "\n").split("\n")
            merges = [line for line in lines if line and not line.startswith("#version")]
        elif (folder / "tokenizer.json").exists():
            model = json.loads(read(folder / "tokenizer.json"))["model"]
            vocab, merges = model["vocab"], model["merges"]
        else:
            raise ModelError(f"{folder} holds no CLIP tokenizer", "vocab.json and merges.txt, or tokenizer.json")
        pairs = (m.split(" ") if isinstance(m, str) else m for m in merges)
        return vocab, [(left, right) for left, right in pairs]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"the tokenizer in {folder} cannot be read: {error!r}", "CLIP's own files, unchanged"
        ) from None


def _clean(text: str) -> str:
    """Cleans a text as BERT's BasicTokenizer does for CLIPTokenizer: words in lower case, with one space between."""
    characters = []
    for char in text:
        code = ord(char)
        if char in "\t\n\r" or unicodedata.category(char) == "Zs":
            characters.append(" ")
        elif code == 0xFFFD or unicodedata.category(char).startswith("C"):
            continue
        elif any(low <= code <= high for low, high in _CJK):
            characters.append(f" {char} ")
        else:
            characters.append(char)
    words = unicodedata.normalize("NFC", "".join(characters)).split()
    return " ".join(word.lower() for word in words)
