"""Writes DFloat11 by its published rule, number by number: the independent side of convert/exponents.py.

    encode([weights as uint16])     the six tensors of a group

Codes are Huffman's, the most frequent exponents first, at most 32 bits; the stream goes from the highest bit to the
lowest. `luts` has a table of 256 for each beginning of a code that is a whole number of bytes: the exponent, or 256
minus the number of the table for the next byte. `gaps` has 5 bits for each 8 bytes of the stream: where the first code
that starts there begins. `output_positions` has the first number of every 4096 bytes, `split_positions` the ends of all
weights but the last.
"""

import heapq
from collections import Counter

import numpy as np

WINDOW, BLOCK = 64, 4096 * 8  # bits


def codes(numbers: Counter) -> dict[int, str]:
    """The code of each exponent, as text of 0 and 1; one code is left over for the end."""
    heap = [(count, exponent, {exponent: ""}) for exponent, count in numbers.items()] + [(1, -1, {-1: ""})]
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, first, ones), (b, second, others) = heapq.heappop(heap), heapq.heappop(heap)
        joined = {s: "0" + c for s, c in ones.items()} | {s: "1" + c for s, c in others.items()}
        heapq.heappush(heap, (a + b, min(first, second), joined))
    return heap[0][2]


def tables(code: dict[int, str]) -> np.ndarray:
    """The tables that decode these codes, and last the lengths."""
    starts = sorted({c[: 8 * n] for c in code.values() for n in range(-(-len(c) // 8))}, key=lambda s: (len(s), s))
    rows = np.zeros((len(starts) + 1, 256), np.uint8)
    for exponent, bits in code.items():
        if exponent < 0:
            continue
        rows[-1, exponent] = len(bits)
        head = bits[: (len(bits) - 1) // 8 * 8]
        rest = bits[len(head) :]
        first = int(rest.ljust(8, "0"), 2)
        rows[starts.index(head), first : first + 2 ** (8 - len(rest))] = exponent
    for number, start in enumerate(starts[1:], 1):
        rows[starts.index(start[:-8]), int(start[-8:], 2)] = 256 - number
    return rows


def encode(weights: list[np.ndarray]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The stored tensors of weights in bfloat16, given as their bits."""
    bits = np.concatenate([w.reshape(-1) for w in weights])
    exponents = (bits >> 7 & 0xFF).tolist()
    code = codes(Counter(exponents))
    lengths = np.array([len(code[e]) for e in exponents])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    text = "".join(code[e] for e in exponents)
    text = (text + (code[-1] * 8)[: -len(text) % 8]).ljust(-(-len(text) // 8) * 8, "0")  # the end's code fills the byte
    stream = np.packbits(np.frombuffer(text.encode(), np.uint8) - ord("0"))
    blocks = -(-stream.size * 8 // BLOCK)
    firsts = np.searchsorted(starts, np.arange(blocks * BLOCK // WINDOW) * WINDOW)
    offsets = [int(starts[n]) % WINDOW if n < len(starts) else 0 for n in firsts]
    gaps = np.packbits(np.frombuffer("".join(f"{o:05b}" for o in offsets).encode(), np.uint8) - ord("0"))
    positions = np.append(np.searchsorted(starts, np.arange(blocks) * BLOCK), bits.size).astype("<u4")
    split = np.cumsum([w.size for w in weights])[:-1].astype("<i8")
    signs = (bits >> 8 & 0x80 | bits & 0x7F).astype(np.uint8)
    made = {"encoded_exponent": stream, "sign_mantissa": signs, "luts": tables(code), "gaps": gaps}
    made["output_positions"] = positions.view(np.uint8)
    stored = {name: ("U8", array.shape, array.tobytes()) for name, array in made.items()}
    return stored | {"split_positions": ("I64", split.shape, split.tobytes())}
