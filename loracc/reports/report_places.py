"""Where a delta acts, for a reader: the layer, and the projection inside it, from a site's name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["Grid", "grid_of", "place_of", "shortened"]

_NUMBER = re.compile(r"^\d+$")


def place_of(name: str) -> tuple[str, str]:
    """(layer, projection) of ``module.parameter``: the path up to the first number, and the rest.

    Further numbers (an expert's) are ``*``. The parameter is left out where it is the weight.

    >>> place_of("encoder.layer.3.attention.self.query.weight")
    ('encoder.layer.3', 'attention.self.query')
    >>> place_of("model.layers.0.mlp.experts.7.up_proj.bias"), place_of("lm_head.weight")
    (('model.layers.0', 'mlp.experts.*.up_proj.bias'), ('', 'lm_head'))
    """
    parts = name.removesuffix(".weight").split(".")
    first = next((index for index, part in enumerate(parts) if _NUMBER.match(part)), None)
    if first is None or first + 1 == len(parts):
        return "", ".".join(parts)
    rest = ["*" if _NUMBER.match(part) else part for part in parts[first + 1 :]]
    return ".".join(parts[: first + 1]), ".".join(rest)


class Grid:
    """Strongest ‖ΔW‖/‖W‖ by layer and projection.

    Attributes:
        layers, projections: Rows and columns, in the model's order.
        values: By (layer, projection).
    """

    def __init__(self) -> None:
        self.layers: list[str] = []
        self.projections: list[str] = []
        self.values: dict[tuple[str, str], float] = {}

    def add(self, layer: str, projection: str, value: float) -> None:
        """One delta."""
        if layer not in self.layers:
            self.layers.append(layer)
        if projection not in self.projections:
            self.projections.append(projection)
        self.values[layer, projection] = max(value, self.values.get((layer, projection), 0.0))

    def layer_labels(self) -> list[str]:
        """``layer 3`` where all have one prefix, else the paths."""
        prefixes = {layer.rpartition(".")[0] for layer in self.layers if layer}
        if len(prefixes) <= 1:
            return [f"layer {layer.rpartition('.')[2]}" if layer else "outside" for layer in self.layers]
        return [shortened(layer, 26) if layer else "outside" for layer in self.layers]


def grid_of(deltas: Iterable[dict[str, Any]]) -> Grid:
    """The grid of all deltas whose strength was measured, layers by number."""
    grid = Grid()
    for row in deltas:
        if row.get("relative_norm") is not None:
            grid.add(*place_of(row["name"]), row["relative_norm"])
    grid.layers = in_order(grid.layers)
    return grid


def in_order(layers: Sequence[str]) -> list[str]:
    """By prefix as first seen and by number; what is in no layer comes last."""
    prefixes = list(dict.fromkeys(layer.rpartition(".")[0] for layer in layers))

    def key(layer: str) -> tuple[bool, int, int]:
        prefix, _, last = layer.rpartition(".")
        return not layer, prefixes.index(prefix), int(last) if layer else 0

    return sorted(layers, key=key)


def shortened(text: str, most: int) -> str:
    """With the middle left out where it is long.

    >>> shortened("attention.output.dense", 15)
    'attenti…t.dense'
    """
    if len(text) <= most:
        return text
    head = most // 2
    return f"{text[:head]}…{text[len(text) - (most - head - 1) :]}"
