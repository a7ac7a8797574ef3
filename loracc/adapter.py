"""Deltas and adapters: the change at one site, kept symbolic, and the named collection of them.

A :class:`Delta` knows how to change a weight in canonical orientation (see :mod:`loracc.algebra.low_rank`) without
anybody forming ΔW whole: ``apply_slab`` changes the part of the weight between two indices of one axis. That is what
lets a fold run in the memory of one tile and in any storage layout.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from loracc.dtypes import Array

__all__ = ["Adapter", "Delta", "Entry", "PendingDelta", "ReadSlab", "slab_index"]

#: ``read(lo, hi)`` gives the weight between two indices of the tiled axis, in the compute dtype.
ReadSlab = Callable[[int, int], Array]


def slab_index(ndim: int, axis: int, lo: int, hi: int) -> tuple[slice, ...]:
    """The index of a slab between ``lo`` and ``hi`` of ``axis``; everything for a scalar."""
    return (slice(None),) * axis + (slice(lo, hi),) if ndim else ()


class Delta(abc.ABC):
    """A change at one site.

    Subclasses are frozen dataclasses that hold float arrays as the file had them (float16, bfloat16, float32, float64).
    """

    #: The kind's name in reports: "lora", "dora", "loha", ...
    kind: ClassVar[str]
    #: W' = W + ΔW with a ΔW that does not depend on W.
    additive: ClassVar[bool] = True
    #: The new value does not depend on W at all (full replacement): other deltas of the site act on the result.
    replaces: ClassVar[bool] = False

    @property
    def follows_tying(self) -> bool:
        """Whether the delta acts on the shared tensor itself: on every site of a tied weight, not on one of them."""
        return False

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int | None, ...]:
        """Canonical shape of the weight that this delta fits; None where it fits any length."""

    @property
    def rank(self) -> int | None:
        """The rank of ΔW's factors, None where the kind has none."""
        return None

    @property
    def scale(self) -> float:
        """The factor on the delta, user's weight included."""
        return 1.0

    @abc.abstractmethod
    def scaled(self, weight: float) -> Delta:
        """This delta at ``weight`` times its strength (``PATH@0.7``).

        Raises:
            UnsupportedError: The kind has no meaning at a strength other than one.
        """

    def resolve(self, shape: tuple[int, ...]) -> Delta:
        """This delta for a weight of canonical ``shape``: itself, but for kinds whose formula needs the shape.

        Binding calls it once, when it knows the site, and before it compares shapes.

        Raises:
            BindingError, UnsupportedError: The tensors cannot belong to a weight of that shape.
        """
        return self

    def materialize(self, dtype: np.dtype[np.generic]) -> Array:
        """ΔW, whole, in ``dtype``. Only for additive kinds."""
        raise TypeError(f"{self.kind} has no ΔW that is independent of W")

    def converted(self, dtype: np.dtype[np.generic]) -> Delta:
        """This delta with its factors in ``dtype`` once and for all: the same bits, for a fold of many slabs."""
        return self

    def prepare(self, read: ReadSlab, axis: int, length: int, step: int) -> Array | None:
        """First pass over W for kinds that need a statistic of the whole weight; its result goes to apply_slab.

        Args:
            read: Gives slabs of W along ``axis``.
            axis: Canonical axis along which the weight is tiled.
            length: W's length on that axis.
            step: Slab length to read at a time.
        """
        return None

    def apply_slab(self, w: Array, axis: int, lo: int, hi: int, statistic: Array | None = None) -> Array:
        """W' between ``lo`` and ``hi`` of ``axis``. ``w`` is that slab of W in the compute dtype; it may be changed.

        The default adds a slice of ``materialize``; kinds with factors override it.
        """
        w += self.materialize(w.dtype)[slab_index(w.ndim, axis, lo, hi)]
        return w

    def apply(self, w: Array) -> Array:
        """W' for a whole canonical weight in the compute dtype; ``w`` is left as it is."""
        length = w.shape[0] if w.ndim else 1
        statistic = self.prepare(lambda lo, hi: w[lo:hi].copy(), 0, length, length)
        return self.apply_slab(w.copy(), 0, 0, length, statistic)

    def arrays(self) -> dict[str, Array]:
        """The tensors this delta is made of, by role ("A", "B", "magnitude", ...): for digests, checks and export."""
        return {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}


@dataclass(frozen=True, eq=False)
class PendingDelta(Delta):
    """A change that can only be built once the shape of the weight it lands on is known; ``resolve`` builds it.

    Attributes:
        make: Builds the delta from the canonical shape.
        tensors: What the file holds for it, by role.
        strength: The user's weight, passed on to what ``make`` builds.
        name: What it will be, for messages and ``inspect``: "lokr".
    """

    kind: ClassVar[str] = "pending"
    additive: ClassVar[bool] = False
    make: Callable[[tuple[int, ...]], Delta]
    tensors: Mapping[str, Array]
    strength: float = 1.0
    name: str = "pending"

    @property
    def shape(self) -> tuple[int | None, ...]:
        raise TypeError("a pending delta has no shape before resolve()")

    def scaled(self, weight: float) -> PendingDelta:
        return replace(self, strength=self.strength * weight)

    def resolve(self, shape: tuple[int, ...]) -> Delta:
        delta = self.make(shape)
        return delta if self.strength == 1.0 else delta.scaled(self.strength)

    def apply_slab(self, w: Array, axis: int, lo: int, hi: int, statistic: Array | None = None) -> Array:
        raise TypeError("a pending delta cannot be applied before resolve()")

    def arrays(self) -> dict[str, Array]:
        return dict(self.tensors)


@dataclass(frozen=True)
class Entry:
    """One delta of an adapter and the parameter it is for.

    Attributes:
        module: Module path as the adapter's file has it, wrapper prefixes stripped, e.g. "encoder.layer.0.query".
        parameter: Name of the parameter inside the module: "weight", "bias", "in_proj_weight", "gate_up_proj".
        delta: The change.
        keys: The keys of the file that were consumed for it.
        fan_in_fan_out: The trainer saw the weight stored as [in, out] (GPT-2's Conv1D); settles square matrices of a
            checkpoint that has no graph. None where the file does not say.
        optional: The model may lack this parameter (IA3 scales a bias if there is one): it is dropped then.
        alternatives: What the same tensors are where the file leaves open which parameter they are for; the shapes of
            the model's parameters decide between this entry and those.
        covers: Names of the entries that the file has, where this one was made of them for a model that keeps the same
            parameters in other pieces.
    """

    module: str
    parameter: str
    delta: Delta
    keys: tuple[str, ...]
    fan_in_fan_out: bool | None = None
    optional: bool = False
    alternatives: tuple[Entry, ...] = ()
    covers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """``module.parameter``, the parameter's name in a state dict."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter

    def scaled(self, weight: float) -> Entry:
        """The entry at another strength."""
        others = tuple(other.scaled(weight) for other in self.alternatives)
        return replace(self, delta=self.delta.scaled(weight), alternatives=others)


@dataclass(frozen=True)
class Adapter:
    """Named deltas plus where they came from.

    Attributes:
        name: The user's name for it, else the file's or folder's.
        path: Where it was read.
        format: "peft", "loralib", "kohya", ...
        entries: The deltas, in the file's order.
        notes: What a user should know that is no error (e.g. dropout ignored at inference).
        config: The format's own configuration, as read, for provenance.
        digested: Computes ``digest``.
        naming: How the file spells a module path of the base, where that cannot be read backwards (kohya's underscores,
            GGUF's own names): entries' modules are such spellings, and binding looks the base's paths up under them.
            It returns None for a path that the file could not name.
        weight: At what strength it is applied; the entries' scales include it.
    """

    name: str
    path: str
    format: str
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()
    config: dict[str, object] = field(default_factory=dict)
    digested: Callable[[], str] = str
    naming: Callable[[str], str | None] | None = None
    weight: float = 1.0

    @property
    def digest(self) -> str:
        """sha256 of the tensors and configuration; "" where nothing was read from a file."""
        return self.digested()

    def scaled(self, weight: float) -> Adapter:
        """The adapter at another strength."""
        if weight == 1.0:
            return self
        return replace(self, entries=tuple(entry.scaled(weight) for entry in self.entries), weight=self.weight * weight)
