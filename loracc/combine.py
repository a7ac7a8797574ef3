"""``--combine``: several adapters made into one by another rule than their exact sum.

The names mean what they mean in PEFT's ``add_weighted_adapter`` (0.21.2):

================================================== ==============================================================
linear, ties, dare_linear, dare_ties,              act on the factors: A and B are mixed apart, with weights
magnitude_prune                                    √|w·s|, so that B·A has cross terms between the adapters
cat                                                the exact sum, by concatenated ranks
svd, ties_svd, dare_linear_svd, dare_ties_svd,     act on the deltas s·B·A, as the papers do; the result is cut to
magnitude_prune_svd                                ``rank``, and stays as it is without one (a fold needs none)
================================================== ==============================================================

``dare`` is dare_linear. An adapter that has no delta for a weight takes no part in it there, as in PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from loracc.adapter import Adapter, Delta, Entry, PendingDelta
from loracc.combine_methods import METHODS, ON_DELTAS
from loracc.deltas import LowRank
from loracc.dtypes import Array
from loracc.errors import InputError, LoraccError, UnsupportedError, combined
from loracc.kinds.combined import Combined, Recipe, mix

__all__ = ["CombineOptions", "combine_adapters"]


@dataclass(frozen=True)
class CombineOptions:
    """What the user asked for.

    Attributes:
        method: One of ``METHODS``.
        density: The part of the elements that pruning keeps; needed by ties, dare and magnitude_prune.
        rank: Of the result of a method on deltas; for "svd" the largest of the adapters' when None.
        seed: Of DARE's random masks.

    Raises:
        InputError: A value is out of range, missing, or means nothing to the method.
    """

    method: str
    density: float | None = None
    rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"--combine {self.method}: expected one of {', '.join(METHODS)}.")
        if self.method == "dare":
            object.__setattr__(self, "method", "dare_linear")
        prunes = self.method not in ("linear", "cat", "svd")
        if prunes and self.density is None:
            raise InputError(
                f"--combine {self.method} needs --density, the part of the elements to keep.", hint="For example 0.5."
            )
        if not prunes and self.density is not None:
            raise InputError(f"--density means nothing to --combine {self.method}, which prunes nothing.")
        if self.density is not None and not 0.0 < self.density <= 1.0:
            raise InputError(f"--density {self.density:g}: expected a part above 0 and up to 1.")
        if self.rank is not None and self.method not in ON_DELTAS:
            raise InputError(f"--rank means nothing to --combine {self.method}; it does to svd and the *_svd methods.")
        if self.rank is not None and self.rank < 1:
            raise InputError(f"--rank {self.rank}: expected a positive number.")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed}: expected 0 or more.")


def combine_adapters(adapters: Sequence[Adapter], weights: Sequence[float], options: CombineOptions) -> Adapter:
    """One adapter of several.

    Args:
        adapters: Unweighted, in the user's order.
        weights: One for each (``PATH@0.7``).
        options: How.

    Raises:
        InputError: There are fewer than two, or they name modules in different ways, or a module twice.
        UnsupportedError: A delta that the method cannot act on; all of them.
    """
    _check_adapters(adapters)
    groups: dict[str, list[tuple[Entry, float]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for entry in adapter.entries:
            groups.setdefault(entry.name, []).append((entry, weight))
    entries, errors = [], list[LoraccError]()
    for name, members in groups.items():
        try:
            entries.append(_entry(name, members, options))
        except LoraccError as error:
            errors.append(error)
    if errors:
        raise combined(errors)
    return Adapter(
        name="+".join(adapter.name for adapter in adapters),
        path=", ".join(adapter.path for adapter in adapters),
        format=adapters[0].format,
        entries=tuple(entries),
        notes=tuple(note for adapter in adapters for note in adapter.notes),
        config={"combine": options.method, "density": options.density, "rank": options.rank, "seed": options.seed},
        digested=lambda: "+".join(f"{one.digest}@{weight:g}" for one, weight in zip(adapters, weights, strict=True)),
        naming=adapters[0].naming,
    )


def _check_adapters(adapters: Sequence[Adapter]) -> None:
    if len(adapters) < 2:
        raise InputError("--combine needs two adapters or more.", hint="Without it one adapter is folded as it is.")
    formats = {adapter.format for adapter in adapters}
    if len(formats) > 1 and any(adapter.naming is not None for adapter in adapters):
        raise InputError(
            f"--combine of {' and '.join(sorted(formats))} adapters: they spell module paths in different ways.",
            hint="Convert them to one format first: loracc convert ADAPTER -o OUT",
        )
    for adapter in adapters:
        names = [entry.name for entry in adapter.entries]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(
                f"adapter {adapter.name!r}: several deltas for {twice[0]}, which --combine cannot tell apart."
            )


def _entry(name: str, members: Sequence[tuple[Entry, float]], options: CombineOptions) -> Entry:
    first = members[0][0]
    if any(entry.alternatives for entry, _ in members):
        raise UnsupportedError(f"{name}: a delta whose parameter the file leaves open cannot be combined.")
    deltas, weights = [entry.delta for entry, _ in members], [weight for _, weight in members]
    if options.method in ON_DELTAS:
        delta = _of_deltas(name, deltas, weights, options)
    elif options.method == "cat":
        delta = _concatenated(name, deltas, weights)
    else:
        embedding = any(".lora_embedding_" in key for entry, _ in members for key in entry.keys)
        delta = _of_factors(name, deltas, weights, options, swapped=embedding)
    turned = {entry.fan_in_fan_out for entry, _ in members}
    if len(turned) > 1:
        raise InputError(f"{name}: the adapters disagree on fan_in_fan_out: {sorted(map(str, turned))}.")
    keys = tuple(dict.fromkeys(key for entry, _ in members for key in entry.keys))
    return replace(first, delta=delta, keys=keys, optional=all(entry.optional for entry, _ in members))


def _of_deltas(name: str, deltas: Sequence[Delta], weights: Sequence[float], options: CombineOptions) -> Delta:
    refused = sorted({delta.kind for delta in deltas if not (delta.additive or isinstance(delta, PendingDelta))})
    if refused:
        raise UnsupportedError(
            f"{name}: {', '.join(refused)} changes the weight in a way that is no ΔW, so --combine {options.method} "
            "has nothing to act on.",
            hint="Fold these adapters one after the other.",
        )
    shapes = {delta.shape for delta in deltas if not isinstance(delta, PendingDelta)}
    if len(shapes) > 1:
        raise InputError(f"{name}: the adapters are for weights of different shapes: {sorted(map(str, shapes))}.")
    recipe = Recipe(ON_DELTAS[options.method], options.density or 1.0, options.seed, name)
    keep = options.rank
    if keep is None and options.method == "svd":
        keep = max((delta.rank or 0 for delta in deltas), default=0) or None
    whole = Combined(tuple(deltas), tuple(weights), recipe, keep)
    if not any(isinstance(delta, PendingDelta) for delta in deltas):
        return whole
    return PendingDelta(lambda shape: _checked(name, whole.resolve(shape)), whole.arrays(), name="combined")


def _checked(name: str, whole: Combined) -> Combined:
    """``whole`` once its parts know their shapes.

    Raises:
        UnsupportedError: A part turned out to be no ΔW.
    """
    refused = sorted({part.kind for part in whole.parts if not part.additive})
    if refused:
        raise UnsupportedError(f"{name}: {', '.join(refused)} is no ΔW, and --combine has nothing to act on.")
    return whole


def _low_rank(name: str, deltas: Sequence[Delta], method: str) -> list[LowRank]:
    found = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(found) != len(deltas):
        odd = ", ".join(sorted({delta.kind for delta in deltas if not isinstance(delta, LowRank)}))
        raise UnsupportedError(
            f"{name}: --combine {method} acts on LoRA's factors A and B, and a {odd} delta has none.",
            hint="The exact sum (without --combine) and the *_svd methods take every additive kind.",
        )
    return found


def _concatenated(name: str, deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """[B₁, B₂]·[s₁w₁A₁; s₂w₂A₂] = Σ wᵢ·ΔWᵢ."""
    found = _low_rank(name, deltas, "cat")
    _check_shapes(name, found)
    a = [delta.a.astype(np.float64) * (delta.s * weight) for delta, weight in zip(found, weights, strict=True)]
    b = [delta.b.astype(np.float64) for delta in found]
    return LowRank(np.concatenate(a), np.concatenate(b, axis=1), 1.0)


def _of_factors(
    name: str, deltas: Sequence[Delta], weights: Sequence[float], options: CombineOptions, *, swapped: bool
) -> Delta:
    """Mixes of A with weights ±√|w·s| and of B with √|w·s|: PEFT's way to give each B·A its weight.

    ``swapped``: an embedding's, whose B·A is transposed: our b is PEFT's A.
    """
    found = _low_rank(name, deltas, options.method)
    _check_shapes(name, found)
    if len({delta.rank for delta in found}) > 1:
        ranks = ", ".join(str(delta.rank) for delta in found)
        raise InputError(
            f"{name}: --combine {options.method} mixes factors of one rank, and these have {ranks}.",
            hint=f"--combine {'svd' if options.method == 'linear' else options.method + '_svd'} takes any ranks.",
        )
    strengths = [delta.s * weight for delta, weight in zip(found, weights, strict=True)]
    roots = [math.sqrt(abs(strength)) for strength in strengths]
    signed = [math.copysign(root, strength) for root, strength in zip(roots, strengths, strict=True)]

    def mixed(role: str, tensors: list[Array], factors: list[float]) -> Array:
        return mix(tensors, factors, Recipe(options.method, options.density or 1.0, options.seed, f"{name}.{role}"))

    for_a, for_b = (roots, signed) if swapped else (signed, roots)
    a, b = mixed("A", [delta.a for delta in found], for_a), mixed("B", [delta.b for delta in found], for_b)
    return LowRank(a, b, 1.0)


def _check_shapes(name: str, deltas: Sequence[LowRank]) -> None:
    shapes = {delta.shape for delta in deltas}
    if len(shapes) > 1:
        raise InputError(f"{name}: the adapters are for weights of different shapes: {sorted(map(str, shapes))}.")
