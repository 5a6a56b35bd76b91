"""Pixtral's tokenizer.json from the vocabulary in `mistral-common`, as the published file was made, and its ids."""

import base64
import functools
import importlib.util
import json
from pathlib import Path

import tiktoken
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

FILE = "tekken_240911.json"
RESERVED = 1000  # ids of control tokens, before those of the vocabulary
CONTROL = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "[INST]", 4: "[/INST]", 10: "[IMG]", 11: "<pad>", 12: "[IMG_BREAK]"}
CONTROL |= {13: "[IMG_END]"}


@functools.cache
def vocabulary() -> tuple[str, dict[bytes, int]]:
    """The pattern that splits a text into words, and the rank of every token."""
    package = Path(importlib.util.find_spec("mistral_common").origin).parent
    obj = json.loads((package / "data" / FILE).read_text(encoding="utf-8"))
    size = obj["config"]["default_vocab_size"] - RESERVED
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in obj["vocab"][:size]}
    return obj["config"]["pattern"], ranks


def make_tekken(path: Path, size: int) -> None:
    pattern, ranks = vocabulary()
    assert len(ranks) == size - RESERVED
    spelled = byte_letters()
    words = {token: "".join(spelled[byte] for byte in token) for token in ranks}
    vocab = {CONTROL.get(i, f"<SPECIAL_{i}>"): i for i in range(RESERVED)}
    vocab |= {words[token]: RESERVED + rank for token, rank in ranks.items()}
    merges = []
    for token in ranks:  # every pair that makes a token; merges are ordered by what they make
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(a, b) for a, b in pairs if a in ranks and b in ranks]
        merges += [(words[a], words[b]) for a, b in sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([CONTROL.get(i, f"<SPECIAL_{i}>") for i in range(RESERVED)])
    tokenizer.save(str(path))


def tekken_ids(text: str) -> list[int]:
    """By the library that `mistral-common` itself uses."""
    pattern, ranks = vocabulary()
    encoding = tiktoken.Encoding("tekken", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return [RESERVED + rank for rank in encoding.encode_ordinary(text)]


def byte_letters() -> list[str]:
    """How byte-level vocabularies spell a byte: by itself where that can be seen, else by a letter above 255."""
    seen = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]
