"""Decodes the exponents of DFloat11's bfloat16 weights, Huffman codes of at most 32 bits. Arrays only.

Codes stand in a stream from the highest bit of each byte to the lowest. A window has 64 bits; a block, 512 windows.
5 bits tell where the first code of each window starts, so all windows are decoded side by side: some 30 million
numbers a second on one core, six minutes for FLUX.1, with 64 blocks at a time beside the weight itself.

Sources: Zhang et al., 70 % Size, 100 % Accuracy (arXiv 2504.11651), section 2; the files of the format's authors.
"""

import mlx.core as mx
import numpy as np

WINDOW, BLOCK = 8, 4096  # bytes
GAPS = BLOCK // WINDOW * 5 // 8  # bytes of the starts of a block's windows
POINTER = 240  # from here on an entry of a table names another table: 256 minus its number
_BATCH = 64  # blocks that are decoded at a time
_NO_CODE = 255


class Damaged(ValueError):
    """A stream that its tables do not decode."""


def decode(
    data: np.ndarray, shape: tuple[int, ...], stream: mx.array, gaps: mx.array, tables: mx.array, positions: mx.array,
    skipped: mx.array,
) -> mx.array:  # fmt: skip
    """Returns a weight in bfloat16.

    Args:
        data: sign and mantissa of each number, (numbers,) uint8.
        shape: of the weight.
        stream: the blocks in which its codes start, and the 8 bytes that follow, uint8.
        gaps: 5 bits for each window of these blocks, uint8.
        tables: (n + 1, 256) uint8: the exponent by a byte of the code, or the table for the next byte; last, the number
            of bits of each exponent's code.
        positions: of the first number of each block, and after the last, (blocks + 1) uint32 as uint8.
        skipped: how many numbers of the first block come before the weight.

    Raises:
        Damaged: codes that do not exist, or that do not meet at the ends of windows.
    """
    indexes = np.array(positions).view(np.uint32)
    exponents = _exponents(np.array(stream), np.array(gaps), np.array(tables), indexes)
    exponents = exponents[int(skipped) : int(skipped) + data.size]
    if exponents.size < data.size or np.any(exponents >= POINTER):
        raise Damaged("codes that its tables do not have, or too few of them")
    bits = (data & 0x80).astype(np.uint16) << 8 | exponents.astype(np.uint16) << 7 | (data & 0x7F)
    return mx.array(bits.reshape(shape)).view(mx.bfloat16)


def _exponents(stream: np.ndarray, gaps: np.ndarray, tables: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Returns the exponents of whole blocks, `_NO_CODE` where a code does not exist."""
    bits = np.unpackbits(gaps)
    starts = (bits[: bits.size // 5 * 5].reshape(-1, 5) @ np.array([16, 8, 4, 2, 1], np.uint8)).astype(np.uint64)
    blocks, short, lengths = positions.size - 1, _by_two_bytes(tables), tables[-1]
    padded = np.zeros(blocks * BLOCK + 2 * WINDOW, np.uint8)
    padded[: min(stream.size, padded.size)] = stream[: padded.size]
    words = padded.view(">u8").astype(np.uint64)
    parts, each, before = [], BLOCK // WINDOW, None
    for block in range(0, blocks, _BATCH):
        last = min(block + _BATCH, blocks)
        first, end = block * each, last * each
        found, counts, over = _windows(words[first : end + 1], starts[first:end], short, tables, lengths)
        numbers = np.diff(positions[block : last + 1].astype(np.int64))
        heads = np.cumsum(counts) - counts
        if before is not None and before != starts[first]:
            raise Damaged("codes that do not meet")
        inside = heads[1:] < numbers.sum()
        if np.any((over[:-1] != starts[first + 1 : end])[inside]):
            raise Damaged("codes that do not meet")
        per_block = counts.reshape(-1, each).sum(1)
        is_whole = np.arange(block, last) < blocks - 1
        if np.any((per_block != numbers) & is_whole) or per_block[-1] < numbers[-1]:
            raise Damaged("another count of codes than it says")
        parts.append(found[: numbers.sum()])
        before = over[-1] if last < blocks else None
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def _windows(
    words: np.ndarray, starts: np.ndarray, short: np.ndarray, tables: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decodes windows side by side, one code of each at a time.

    Returns:
        The exponents one after another; their count in each window; the bits by which its last code passes its end.
    """
    here, after, at = words[:-1], words[1:] >> np.uint64(1), starts.copy()
    found = np.full((starts.size, 64), _NO_CODE, np.uint8)
    counts = np.zeros(starts.size, np.int64)
    for number in range(64):
        is_open = at < 64
        if not is_open.any():
            break
        shift = np.minimum(at, 63)
        code = (here << shift | after >> (np.uint64(63) - shift)) >> np.uint64(32)
        exponent = short[code >> np.uint64(16)]
        if (is_long := exponent >= POINTER).any():
            exponent = _longer(exponent, code, is_long, tables)
        length = np.where(exponent < POINTER, lengths[exponent], 0)
        found[:, number] = np.where(length > 0, exponent, _NO_CODE)
        counts += is_open
        at += np.where(is_open, np.maximum(length, 1), 0).astype(np.uint64)
    return found[np.arange(64) < counts[:, None]], counts, at - np.uint64(64)


def _by_two_bytes(tables: np.ndarray) -> np.ndarray:
    """Returns the entry for every 16 bits with which a code may begin: (65536,) int16."""
    entries = np.repeat(tables[0].astype(np.int16), 256)
    return _next(entries, np.tile(np.arange(256, dtype=np.uint8), 256), tables)


def _next(entries: np.ndarray, byte: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Follows entries that name another table; one that there is not becomes -1."""
    row = 256 - entries
    is_there = (entries >= POINTER) & (row < len(tables) - 1)
    followed = tables[np.where(is_there, row, 0), byte].astype(np.int16)
    return np.where(is_there, followed, np.where(entries >= POINTER, np.int16(-1), entries))


def _longer(entries: np.ndarray, code: np.ndarray, is_long: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Looks up codes of more than 16 bits, which are rare."""
    rare, entries = code[is_long], entries.copy()
    third = _next(entries[is_long], (rare >> np.uint64(8)).astype(np.uint8), tables)
    fourth = _next(third, rare.astype(np.uint8), tables)
    entries[is_long] = np.where(fourth < POINTER, fourth, -1)
    return entries
