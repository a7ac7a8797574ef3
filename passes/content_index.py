"""The tensors of a checkpoint by their shape and a few of their elements: what a weight of unknown name may be.

A lookup costs as many element reads as a sample has, whatever the number of tensors: they are sorted by their first
sampled element within each shape. A matrix is known both ways round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array, is_float
from loracc.passes.content_samples import SAMPLES, Elements, Matrix, agree, sample_positions
from loracc.tensors import dims

__all__ = ["Candidate", "ContentIndex"]

#: Elements that are read first; the others only where these agree with some tensor.
_FIRST = 4


@dataclass(frozen=True)
class Candidate:
    """A tensor of the checkpoint.

    Attributes:
        name: Its name there.
        turned: It is meant transposed.
    """

    name: str
    turned: bool = False


@dataclass(frozen=True)
class _Class:
    """Tensors of one shape: their samples as rows, sorted by the first."""

    candidates: tuple[Candidate, ...]
    dtypes: tuple[ir.DataType, ...]
    samples: Array


class ContentIndex:
    """See the module's docstring.

    Args:
        tensors: A checkpoint's tensors by name; floats with axes are indexed. ``SAMPLES`` elements of each are read.
    """

    def __init__(self, tensors: Mapping[str, ir.TensorProtocol]) -> None:
        self.tensors = {name: t for name, t in tensors.items() if is_float(t.dtype) and len(t.shape) and t.size}
        rows: dict[tuple[int, tuple[int, ...]], list[tuple[Candidate, ir.DataType, Array]]] = {}
        for name, tensor in self.tensors.items():
            shape = dims(tensor)
            with Elements(tensor) as elements:
                for turned in (False, True) if len(shape) == 2 else (False,):
                    key = (shape[1], shape[:1]) if turned else (shape[0], shape[1:])
                    found = self._sample(elements, Matrix.of(shape, turned=turned), 0, key[0], slice(None))
                    rows.setdefault(key, []).append((Candidate(name, turned), tensor.dtype, found))
        self._classes = {key: _class(found) for key, found in rows.items()}
        self._lengths: dict[tuple[int, ...], list[int]] = {}
        for length, tail in sorted(self._classes, reverse=True):
            self._lengths.setdefault(tail, []).append(length)

    def lengths(self, tail: tuple[int, ...]) -> list[int]:
        """How many rows the tensors with rows of shape ``tail`` have, longest first."""
        return self._lengths.get(tail, [])

    def find(self, elements: Elements, view: Matrix, start: int, length: int, tail: tuple[int, ...]) -> list[Candidate]:
        """Tensors of ``length`` rows of shape ``tail`` whose sampled elements are the view's from ``start`` on."""
        known = self._classes.get((length, tail))
        if known is None:
            return []
        first = self._sample(elements, view, start, length, slice(0, _FIRST))
        near = _near(known.samples[:, 0], first[0], elements.step)
        near = _agreeing(known, near, first, elements, slice(0, _FIRST))
        if not near.size:
            return []
        rest = self._sample(elements, view, start, length, slice(_FIRST, None))
        return [known.candidates[i] for i in _agreeing(known, near, rest, elements, slice(_FIRST, None))]

    @staticmethod
    def _sample(elements: Elements, view: Matrix, start: int, length: int, part: slice) -> Array:
        rows, columns = sample_positions(length, view.shape[1], SAMPLES)
        return elements.at(view.flat(rows[part] + start, columns[part]))


def _agreeing(known: _Class, near: Array, sample: Array, elements: Elements, part: slice) -> Array:
    """Those of the tensors that agree with a sample in some of its elements."""
    found = np.zeros(len(near), bool)
    for dtype in {known.dtypes[i] for i in near}:
        here = np.array([known.dtypes[i] == dtype for i in near])
        mine = known.samples[near[here], part]
        found[here] = agree(mine, sample, dtype, elements.dtype, elements.step).all(axis=1)
    return near[found]


def _class(found: list[tuple[Candidate, ir.DataType, Array]]) -> _Class:
    ordered = sorted(found, key=lambda item: _sortable(item[2][0]))
    candidates, dtypes, samples = zip(*ordered, strict=True)
    return _Class(candidates, dtypes, np.stack(samples))


def _near(keys: Array, value: float, step: float) -> Array:
    """Positions of the sorted keys that a cast may have made of ``value``, or the other way round."""
    value = _sortable(value)
    slack = max(abs(value) / 64 + 1e-6, step)
    ordered = np.where(np.isfinite(keys), keys, np.inf)
    if not np.isfinite(value) or abs(value) >= 65504:  # what float16 clips
        return np.arange(len(keys))
    return np.arange(np.searchsorted(ordered, value - slack), np.searchsorted(ordered, value + slack, "right"))


def _sortable(value: float) -> float:
    return float(value) if np.isfinite(value) else np.inf
