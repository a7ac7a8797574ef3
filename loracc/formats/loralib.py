"""loralib state dicts: ``<module>.lora_A``, ``<module>.lora_B``, and trained biases; no configuration at all.

Which layer a pair belongs to is told by the weight's shape (loralib 0.1.2, ``layers.py``; its forward is the oracle):

============= =================================== =====================================================
layer         A, B                                ΔW
============= =================================== =====================================================
Linear        ``[r, in]``, ``[out, r]``           s·B·A
Embedding     ``[r, num]``, ``[dim, r]``          s·(B·A)ᵀ
MergedLinear  ``[r·n, in]``, ``[n·out/N, r]``     s·Bᵢ·Aᵢ in the rows of the i-th part that is switched on
Conv2d        ``[r·k, in·k]``, ``[out/g·k, r·k]`` s·B·A, its numbers in the order of W's
============= =================================== =====================================================

N is the number of parts of the outputs and n of those that are on; with fewer than N on, the file does not say which
(``--enable-lora``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from loracc.adapter import Adapter, Delta, Entry
from loracc.deltas import Addition, LowRank, Replacement
from loracc.dtypes import Array
from loracc.errors import BindingError, InputError, LoraccError, combined
from loracc.formats.adapter_options import AdapterOptions
from loracc.formats.adapter_source import AdapterSource
from loracc.formats.embedding_names import names_embedding
from loracc.formats.key_table import Keyed, KeyRule, group, unknown_keys
from loracc.formats.tensors import check_tensors, digest_of
from loracc.formats.told_scale import require_scale, told_scale

__all__ = ["LoralibPair", "is_loralib", "read_loralib"]

_RULES = (
    KeyRule("A", re.compile(r"\.lora_A$")),
    KeyRule("B", re.compile(r"\.lora_B$")),
    KeyRule("bias", re.compile(r"\.bias$")),
)


def is_loralib(source: AdapterSource) -> bool:
    """Whether there are factors without ``.weight``, and no singular values with them (PEFT's AdaLoRA)."""
    keys = source.tensors
    return any(key.endswith(".lora_A") for key in keys) and not any(key.endswith(".lora_E") for key in keys)


def read_loralib(source: AdapterSource, name: str, options: AdapterOptions) -> Adapter:
    """Read what ``loralib.lora_state_dict`` gave.

    Raises:
        InputError: The scale is not known, or the tensors are not pairs; all that is wrong at once.
        NumericsError: A tensor holds inf or NaN.
    """
    path = source.file
    check_tensors(path, source.tensors)
    require_scale(path, options, "a loralib state dict")
    grouped = group(path, source.tensors, _RULES)
    if grouped.rest:
        why = "Weights beside the factors are a whole model: save lora.lora_state_dict(model) instead."
        raise unknown_keys(path, "loralib", grouped.rest, why)
    entries: list[Entry] = []
    errors: list[LoraccError] = []
    for module, roles in grouped.modules.items():
        try:
            entries += _entries(module, roles, options, path)
        except LoraccError as error:
            errors.append(error)
    if errors:
        raise combined(errors)
    return Adapter(
        name=name,
        path=str(source.path),
        format="loralib",
        entries=tuple(entries),
        digested=digest_of(source.tensors, options.facts()),
    )


def _entries(module: str, roles: Mapping[str, Keyed], options: AdapterOptions, path: Path) -> list[Entry]:
    entries = []
    if "bias" in roles:
        entries.append(Entry(module, "bias", Replacement(roles["bias"].array), (roles["bias"].key,)))
    if not set(roles) & {"A", "B"}:
        return entries
    if not {"A", "B"} <= set(roles):
        raise InputError(f"{path}: {module}: lora_A and lora_B come in pairs, and only one is there.")
    a, b = roles["A"], roles["B"]
    if a.array.ndim != 2 or b.array.ndim != 2 or a.array.shape[0] % b.array.shape[1]:
        raise InputError(
            f"{path}: {a.key} {list(a.array.shape)} and {b.key} {list(b.array.shape)} are not a pair of [r, in] and "
            "[out, r]."
        )
    delta = LoralibPair(a.array, b.array, module, options)
    return [Entry(module, "weight", delta, (a.key, b.key)), *entries]


@dataclass(frozen=True, eq=False)
class LoralibPair(Delta):
    """A and B of one module before its weight's shape is known (see the module's docstring)."""

    kind: ClassVar[str] = "lora"
    a: Array
    b: Array
    module: str
    options: AdapterOptions
    strength: float = 1.0

    @property
    def parts(self) -> int:
        """n: how many parts of a MergedLinear have factors of their own; 1 elsewhere."""
        return int(self.a.shape[0] // self.b.shape[1])

    @property
    def shape(self) -> tuple[int | None, ...]:
        merged = self.parts > 1 or self.options.enable_lora is not None
        sizes = (None if merged else self.b.shape[0], self.a.shape[1])
        return sizes[::-1] if names_embedding(self.module) else sizes

    @property
    def rank(self) -> int:
        return int(self.b.shape[1])

    @property
    def scale(self) -> float:
        return told_scale(self.options, self.rank) * self.strength

    def scaled(self, weight: float) -> LoralibPair:
        return replace(self, strength=self.strength * weight)

    def resolve(self, shape: tuple[int, ...]) -> Delta:
        """The delta for a weight of this shape.

        Raises:
            BindingError: No layer of loralib's with these factors has such a weight, or several have.
        """
        out, columns = self.b.shape[0], self.a.shape[1]
        if len(shape) > 2:
            return self._convolution(shape)
        square_embedding = out == columns and names_embedding(self.module)
        if self.parts == 1 and (out, columns) == shape and not square_embedding:
            return LowRank(self.a, self.b, self.scale)
        if self.parts == 1 and (columns, out) == shape:
            return LowRank(np.ascontiguousarray(self.b.T), np.ascontiguousarray(self.a.T), self.scale)
        if len(shape) == 2 and columns == shape[1]:
            return self._merged(shape[0])
        raise self._misfit(shape, "")

    def _merged(self, outputs: int) -> LowRank:
        """MergedLinear: B block-diagonal in the rows that are on, zero elsewhere."""
        rows = self.b.shape[0] // self.parts  # outputs of one part
        if self.b.shape[0] % self.parts or outputs % rows:
            raise self._misfit((outputs, self.a.shape[1]), "")
        total = outputs // rows
        switches = self.options.enable_lora or ((True,) * total if total == self.parts else None)
        if switches is None:
            raise BindingError(
                f"{self.module}: {self.parts} of the {total} parts of its outputs are adapted (loralib's "
                "MergedLinear), and the file does not say which.",
                hint=f"Say it with --enable-lora, {total} switches: --enable-lora "
                + ",".join("1" if i < self.parts else "0" for i in range(total)),
            )
        if len(switches) != total or sum(switches) != self.parts:
            raise BindingError(
                f"{self.module}: --enable-lora switches {sum(switches)} of {len(switches)} parts on, and the tensors "
                f"are for {self.parts} of {total}."
            )
        b = np.zeros((outputs, self.a.shape[0]), self.b.dtype)
        for i, part in enumerate(part for part, on in enumerate(switches) if on):
            block = self.b[i * rows : (i + 1) * rows]
            b[part * rows : (part + 1) * rows, i * self.rank : (i + 1) * self.rank] = block
        return LowRank(self.a, b, self.scale)

    def _convolution(self, shape: tuple[int, ...]) -> Delta:
        kernel = shape[-1]
        fits = self.parts == 1 and self.rank % kernel == 0 and self.a.shape[1] == shape[1] * kernel
        if not fits or self.b.shape[0] * self.a.shape[1] != math.prod(shape):
            raise self._misfit(shape, " loralib's own Conv1d and Conv3d make a ΔW of another size than W.")
        s = told_scale(self.options, self.rank // kernel) * self.strength
        # The product's rows are not the weight's, so it is formed whole; in float64, which no fold is finer than.
        return Addition((self.b.astype(np.float64) @ self.a.astype(np.float64)).reshape(shape), s)

    def _misfit(self, shape: tuple[int, ...], why: str) -> BindingError:
        return BindingError(
            f"{self.module}: lora_A {list(self.a.shape)} and lora_B {list(self.b.shape)} do not fit a weight of "
            f"{list(shape)}.{why}"
        )

    def apply_slab(self, w: Array, axis: int, lo: int, hi: int, statistic: Array | None = None) -> Array:
        raise TypeError("a loralib pair cannot be applied before resolve()")

    def arrays(self) -> dict[str, Array]:
        return {"A": self.a, "B": self.b}
