"""Distances between two runs of a model: pure functions on arrays.

The error of an output is max|a − r| / max|r| over all its elements and all input draws, r the reference: the size of
the largest deviation on the scale of the output. An element-wise relative error would have no bound at the zeros that
any output has.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loracc.dtypes import Array

__all__ = ["CACHE", "Outputs", "further_metrics", "is_float_array", "relative_error", "relative_l2"]

#: Outputs that a decoder's next step reads: not what the model is for, and most of its outputs.
CACHE = ("present", "past_key_values")
#: One dictionary of outputs for each draw of inputs.
Outputs = Sequence[dict[str, Array]]


def is_float_array(array: Array) -> bool:
    """Whether it holds floats, ml_dtypes' included."""
    return array.dtype.kind == "f" or array.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")


def relative_error(actual: Sequence[Array], reference: Sequence[Array]) -> float:
    """max|a − r| / max|r|; inf where shapes, NaN or infinities differ. Of integers: the share that differs.

    >>> float(relative_error([np.array([1.0, 2.5])], [np.array([1.0, 2.0])]))
    0.25
    """
    if any(a.shape != r.shape for a, r in zip(actual, reference, strict=True)):
        return float("inf")
    a, r = _joined(actual), _joined(reference)
    if not r.size:
        return 0.0
    if not is_float_array(reference[0]):
        return float(np.mean(a != r))
    finite = np.isfinite(r)
    if not np.array_equal(a[~finite], r[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
        return float("inf")
    largest = float(np.abs(r[finite]).max(initial=0.0))
    difference = float(np.abs(a[finite] - r[finite]).max(initial=0.0))
    return difference / largest if largest else difference


def relative_l2(actual: Sequence[Array], reference: Sequence[Array]) -> float:
    """‖a − r‖ / ‖r‖ over the finite elements."""
    a, r = _joined(actual), _joined(reference)
    if a.shape != r.shape:
        return float("inf")
    finite = np.isfinite(r)
    norm = float(np.linalg.norm(r[finite]))
    difference = float(np.linalg.norm(a[finite] - r[finite]))
    return difference / norm if norm else difference


def further_metrics(name: str, actual: Sequence[Array], reference: Sequence[Array]) -> dict[str, float]:
    """What people ask about such an output: top-1 agreement and KL divergence of logits, cosine of embeddings."""
    if not is_float_array(reference[0]) or reference[0].ndim < 2 or reference[0].shape[-1] < 2:
        return {}
    width = reference[0].shape[-1]
    if any(a.shape != r.shape or r.shape[-1] != width for a, r in zip(actual, reference, strict=True)):
        return {}
    a, r = _joined(actual).reshape(-1, width), _joined(reference).reshape(-1, width)
    if not (np.isfinite(a).all() and np.isfinite(r).all()):
        return {}
    if "logits" in name.lower():
        return {"top1_agreement": float(np.mean(a.argmax(-1) == r.argmax(-1))), "kl_divergence": _kl(r, a)}
    if any(word in name.lower() for word in ("embed", "hidden", "pool")):
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(r, axis=-1)
        cosine = np.sum(a * r, axis=-1)[norms > 0] / norms[norms > 0]
        return {"min_cosine": float(cosine.min(initial=1.0))}
    return {}


def _joined(arrays: Sequence[Array]) -> Array:
    """All elements of all draws; floats in float64."""
    flat = [array.astype(np.float64).ravel() if is_float_array(array) else array.ravel() for array in arrays]
    return np.concatenate(flat)


def _kl(reference: Array, actual: Array) -> float:
    """Mean KL(softmax(reference) ‖ softmax(actual)) over rows."""
    p, q = _log_softmax(reference), _log_softmax(actual)
    return float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))


def _log_softmax(x: Array) -> Array:
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
