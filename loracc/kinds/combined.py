"""Several adapters' changes of one weight made into one by a method that is no plain sum (see ``loracc.combine``)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from loracc.adapter import Delta
from loracc.algebra.merging import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from loracc.algebra.svd import truncated_svd
from loracc.dtypes import Array

__all__ = ["Combined", "Recipe", "mix"]


@dataclass(frozen=True)
class Recipe:
    """How task tensors are mixed.

    Attributes:
        method: "linear", "ties", "dare_linear", "dare_ties" or "magnitude_prune".
        density: The part of the elements that is kept.
        seed: Of DARE's masks.
        name: What the tensors are of: the same method draws other masks for another one.
    """

    method: str
    density: float
    seed: int
    name: str


def mix(tensors: list[Array], weights: list[float], recipe: Recipe) -> Array:
    """The one tensor, in float64. The same recipe gives the same masks."""

    def draw(index: int, shape: tuple[int, ...]) -> Array:
        return np.random.default_rng([recipe.seed, index, zlib.crc32(recipe.name.encode())]).random(shape)

    wide = [tensor.astype(np.float64) for tensor in tensors]
    if recipe.method == "linear":
        return task_arithmetic(wide, weights)
    if recipe.method == "ties":
        return ties(wide, weights, recipe.density)
    if recipe.method == "magnitude_prune":
        return magnitude_prune(wide, weights, recipe.density)
    if recipe.method == "dare_linear":
        return dare_linear(wide, weights, recipe.density, draw)
    return dare_ties(wide, weights, recipe.density, draw)


@dataclass(frozen=True, eq=False)
class Combined(Delta):
    """ΔW = s·mix(ΔW₁, ΔW₂, …), cut to its ``keep`` largest singular triplets where ``keep`` is set.

    Attributes:
        parts: The additive changes, unweighted.
        weights: One for each.
        recipe: How they are mixed.
        keep: Rank of the result; None leaves it as it is.
        s: The factor on the result.
    """

    kind: ClassVar[str] = "combined"
    parts: tuple[Delta, ...]
    weights: tuple[float, ...]
    recipe: Recipe
    keep: int | None = None
    s: float = 1.0

    @property
    def shape(self) -> tuple[int | None, ...]:
        return self.parts[0].shape

    @property
    def rank(self) -> int | None:
        return self.keep

    @property
    def scale(self) -> float:
        return self.s

    def scaled(self, weight: float) -> Combined:
        return replace(self, s=self.s * weight)

    def resolve(self, shape: tuple[int, ...]) -> Combined:
        return replace(self, parts=tuple(part.resolve(shape) for part in self.parts))

    def materialize(self, dtype: np.dtype[np.generic]) -> Array:
        tensors = [part.materialize(np.dtype(np.float64)) for part in self.parts]
        mixed = mix(tensors, list(self.weights), self.recipe)
        if self.keep is not None and mixed.ndim > 1 and np.any(mixed):
            u, s, v = truncated_svd(mixed.reshape(mixed.shape[0], -1), self.keep, None)
            mixed = ((u * s) @ v).reshape(mixed.shape)
        return (mixed * self.s).astype(dtype)

    def arrays(self) -> dict[str, Array]:
        return {f"{i}.{role}": array for i, part in enumerate(self.parts) for role, array in part.arrays().items()}
