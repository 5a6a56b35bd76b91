"""Rounds the matrix of a layer to MLX's affine grid so that its outputs, not its weights, change least (GPTQ).

Frantar et al. 2022, arXiv:2210.17323. With the second moment H = X^T X of a layer's inputs, the outputs change by
tr(E H E^T) for weights that change by E. With H = L L^T that is the sum over k of L_kk^2 (E_k + sum_{j > k} E_j L_jk /
L_kk)^2: so columns are rounded from the last to the first, each after the changes of those before it were added. This
is the form of LDLQ (Chee et al. 2023, arXiv:2307.13304, section 3.2), equal to GPTQ's own with its inverse of H.

Everything is float32 numpy, on the CPU. Moments are the largest arrays, 944 MB for FLUX.1's widest layers, and are
changed in place. Three choices are measured in docs/precision.md: the damping, to begin with the columns of the largest
inputs (GPTQ's "act order", here inside groups that stay together), and to search the range of each group.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_flux_krea.models.config import Quantization

DAMPING = 0.1  # of the mean of H's diagonal, added to it: what the samples do not show may still occur
_SHRUNK = np.linspace(1, 0.7, 7, dtype=np.float32)  # shares of a group's range that are tried for its scale
_PANEL = 512  # columns that are factorized at a time
_STRIP = 1024  # columns that are changed at a time: no intermediate array has the size of a moment
_LEAST = 1e-7  # scale of a group of zeros, as in mx.quantize


@dataclass(frozen=True)
class Rounded:
    """A rounded matrix (O, I), as a quantized layer stores it, and how far its outputs are from the exact ones.

    Attributes:
        weight: (O, I * bits / 32) uint32, packed codes.
        scales: (O, I / group_size), in the type asked for.
        biases: the same.
        error: sum of the squares of changes of the outputs, on the samples.
        plain: the same for the nearest codes, as `mx.quantize` chooses them.
        size: sum of the squares of the outputs, without the layer's bias.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array
    error: float
    plain: float
    size: float


def round_matrix(weight: np.ndarray, moment: np.ndarray, q: Quantization, dtype: mx.Dtype) -> Rounded:
    """Rounds a matrix.

    Args:
        weight: (O, I) float32.
        moment: (I, I) float32, of the inputs: its lower triangle. It is overwritten.
        q: bits and group size, mode affine.
        dtype: of scales and biases.

    Raises:
        ValueError: the moment is not of real inputs: it is not finite.
    """
    diagonal = np.array(np.diagonal(moment))
    if not np.isfinite(diagonal).all():
        raise ValueError("[round_matrix] The moment must be finite.")
    nearest = mx.quantize(mx.array(weight).astype(dtype), q.group_size, q.bits)
    codes, scales, biases = (part if part.dtype == mx.uint32 else part.astype(mx.float32) for part in nearest)
    changed = np.array(mx.dequantize(codes, scales, biases, q.group_size, q.bits)) - weight
    order, damping = _order(diagonal, q.group_size), float(DAMPING * diagonal.mean() + _LEAST)
    _permute(moment, order)
    moment[np.diag_indices(len(moment))] += damping
    factorize(moment)

    def outputs(change: np.ndarray) -> float:
        """Returns the sum of the squares of the outputs of a matrix."""
        return _squares(change[:, order] @ moment) - damping * _squares(change)

    plain, size = outputs(changed), outputs(weight)
    ordered, by_group, error, change = _round_columns(weight.T[order], moment, q, dtype)
    unordered, places = np.empty_like(ordered), np.argsort(order[:: q.group_size] // q.group_size)
    unordered[order] = ordered
    grids = [mx.array(np.ascontiguousarray(part[places].T)).astype(dtype) for part in by_group]
    return Rounded(
        weight=mx.array(pack(np.ascontiguousarray(unordered.T), q.bits)),
        scales=grids[0],
        biases=grids[1],
        error=error - damping * change,
        plain=plain,
        size=size,
    )


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs codes (O, I) as `mx.quantize` does: a stream of bits along each row, the lowest first, in uint32 words."""
    rows, width = codes.shape
    packed = np.empty((rows, width * bits // 32), np.uint32)
    for row in range(0, rows, _STRIP):
        part = codes[row : row + _STRIP]
        stream = ((part[..., None] >> np.arange(bits, dtype=np.uint8)) & 1).reshape(len(part), -1)
        packed[row : row + _STRIP] = np.packbits(stream, axis=1, bitorder="little").view(np.uint32)
    return packed


def factorize(matrix: np.ndarray) -> None:
    """Overwrites a positive definite matrix with its lower Cholesky factor; reads its lower triangle.

    LAPACK through numpy would hold it three times.
    """
    count = len(matrix)
    for start in range(0, count, _PANEL):
        end = min(start + _PANEL, count)
        corner = np.linalg.cholesky(matrix[start:end, start:end])
        matrix[start:end, start:end] = corner
        matrix[start:end, end:] = 0
        below = matrix[end:, start:end]
        below[:] = below @ np.linalg.inv(corner).T
        for left in range(end, count, _STRIP):
            strip = slice(left, min(left + _STRIP, count))
            matrix[left:, strip] -= matrix[left:, start:end] @ matrix[strip, start:end].T


def _order(diagonal: np.ndarray, group_size: int) -> np.ndarray:
    """Returns the columns by their inputs, the largest last: groups by their sums, and columns inside each group."""
    groups = diagonal.reshape(-1, group_size)
    inside = np.argsort(groups, axis=1, kind="stable")
    return np.concatenate([group * group_size + inside[group] for group in np.argsort(groups.sum(1), kind="stable")])


def _permute(moment: np.ndarray, order: np.ndarray) -> None:
    """Reorders rows and columns in place, of a symmetric matrix whose lower triangle is given."""
    count = len(moment)
    strips = [slice(first, min(first + _STRIP, count)) for first in range(0, count, _STRIP)]
    for strip in strips:
        corner = np.tril(moment[strip, strip])
        moment[strip, strip] = corner + np.tril(corner, -1).T
        moment[strip, strip.stop :] = moment[strip.stop :, strip].T
    for strip in strips:
        moment[:, strip] = moment[order, strip]
    for strip in strips:
        moment[strip] = moment[strip][:, order]


def _round_columns(
    columns: np.ndarray, lower: np.ndarray, q: Quantization, dtype: mx.Dtype
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Rounds columns from the last to the first.

    Args:
        columns: (I, O) of the matrix, in the order of the factor.
        lower: (I, I), the factor L.
        q: bits and group size.
        dtype: of scales and biases.

    Returns:
        Codes (I, O); scales and biases (2, I / group_size, O); ||E L||^2 and ||E||^2.
    """
    count, outputs = columns.shape
    diagonal = np.diagonal(lower)[:, None]
    change, codes = np.zeros_like(columns), np.empty(columns.shape, np.uint8)
    grids = np.empty((2, count // q.group_size, outputs), np.float32)
    error = 0.0
    for start in range(count - q.group_size, -1, -q.group_size):
        end, group = start + q.group_size, start // q.group_size
        part = slice(start, end)
        feedback = lower[end:, part].T @ change[end:]
        # the values of least change that the columns of the group could have: those that its grid is for
        best = columns[part] + np.linalg.solve(lower[part, part].T, feedback)
        scale, bias = grids[:, group] = choose_grid(best, q.bits, dtype)
        moved = columns[part] + feedback / diagonal[part]
        for k in range(end - 1, start - 1, -1):
            wanted = moved[k - start] + (lower[k + 1 : end, k] @ change[k + 1 : end]) / diagonal[k]
            codes[k] = _nearest(wanted, scale, bias, q.bits)
            rounded = codes[k] * scale + bias
            change[k] = columns[k] - rounded
            error += float(diagonal[k, 0]) ** 2 * _squares(wanted - rounded)
    return codes, grids, error, _squares(change)


def choose_grid(numbers: np.ndarray, bits: int, dtype: mx.Dtype) -> tuple[np.ndarray, np.ndarray]:
    """Chooses scale and bias of groups: of `mx.quantize`'s rule for several ranges the one with the least error.

    Args:
        numbers: (group_size, O) float32.
        bits: of a code.
        dtype: of scales and biases.

    Returns:
        Scales and biases (O,) float32, with values that the type holds.
    """
    least, most = numbers.min(0), numbers.max(0)
    found = []
    for share in _SHRUNK:
        scale, bias = _grid(least * share, most * share, bits, dtype)
        error = np.square(_nearest(numbers, scale, bias, bits) * scale + bias - numbers).sum(0)
        found.append((error, scale, bias))
    errors, scales, biases = map(np.stack, zip(*found, strict=True))
    best = errors.argmin(0), np.arange(numbers.shape[1])
    return scales[best], biases[best]


def _grid(least: np.ndarray, most: np.ndarray, bits: int, dtype: mx.Dtype) -> tuple[np.ndarray, np.ndarray]:
    """Returns scale and bias as `mx.quantize` has them: the end farther from zero is on the grid, and so is zero."""
    steps = 2**bits - 1
    is_low = np.abs(least) > np.abs(most)
    scale = np.maximum((most - least) / steps, _LEAST) * np.where(is_low, 1, -1)
    end = np.where(is_low, least, most)
    whole = np.rint(end / scale)
    scale = np.where(whole != 0, end / np.where(whole == 0, 1, whole), scale)
    return _stored(scale, dtype), _stored(np.where(whole == 0, 0, end), dtype)


def _nearest(numbers: np.ndarray, scale: np.ndarray, bias: np.ndarray, bits: int) -> np.ndarray:
    return np.clip(np.rint((numbers - bias) / scale), 0, 2**bits - 1)


def _stored(numbers: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """Returns numbers as a type holds them, in float32."""
    return np.array(mx.array(numbers.astype(np.float32)).astype(dtype).astype(mx.float32))


def _squares(numbers: np.ndarray) -> float:
    return float(np.square(numbers).sum(dtype=np.float64))
