"""The stages in which a model is calibrated: weights next to each other in the graph that multiply one value.

A stage ends before the first product of the next: what the model computes up to there can still be set right by the
stage's weights, and does not depend on later ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

import onnx_ir as ir

from loracc.passes.constant_values import Constants
from loracc.passes.site_inputs import SiteInput, readers
from loracc.passes.site_targets import site_target
from loracc.passes.value_dims import Dims

__all__ = ["Stage", "stages"]


@dataclass(frozen=True)
class Stage:
    """Weights that are rounded together.

    Attributes:
        seen: The value that they multiply.
        targets: The initializers, and what each is fitted to (:mod:`loracc.passes.site_targets`).
        end: Place of the first node that is no more the stage's.
    """

    seen: SiteInput
    targets: Mapping[str, SiteInput | None]
    end: int


def stages(model: ir.Model, inputs: Mapping[str, SiteInput]) -> list[Stage]:
    """The stages in the graph's order.

    Args:
        model: The graph.
        inputs: What the initializers are multiplied with, in the graph's order.
    """
    known = Dims(Constants(model.opset_imports.get("", 1)), model)
    places = {node: place for place, node in enumerate(model.graph)}
    groups = [(seen, [name for name, _ in group]) for seen, group in groupby(inputs.items(), key=lambda item: item[1])]
    begins = [min(_first(model, name, places) for name in names) for _, names in groups]
    ends = [*begins[1:], len(places)]
    return [
        Stage(seen, {name: site_target(model, name, known, places, end) for name in names}, end)
        for (seen, names), end in zip(groups, ends, strict=True)
    ]


def _first(model: ir.Model, name: str, places: Mapping[ir.Node, int]) -> int:
    return min(places[node] for node, _ in readers(model.graph.initializers[name]))
