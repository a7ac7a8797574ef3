"""What each bound weight is multiplied with: the value whose second moments decide how it is best rounded.

1. A weight is read by MatMul, Gemm, or an attention that ONNX Runtime's optimizer fused, perhaps through Transpose,
   Cast or Identity. The other operand is the site's input, and its features lie along one axis.
2. Whatever else reads it (an embedding's Gather, a convolution, an operator of its own) has no such input: a rounding
   that is best for one reader is not best for another, so such a weight has none at all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx_ir as ir

__all__ = ["SiteInput", "readers", "site_inputs"]

_STEPS = ("Transpose", "Identity", "Cast")
#: Fused operators that multiply input 0 with a weight ``[in, out]`` at this place.
_FUSED = {("com.microsoft", "Attention"): 1, ("com.microsoft", "FusedMatMul"): 1, ("com.microsoft", "FusedGemm"): 1}


@dataclass(frozen=True)
class SiteInput:
    """A value that a site's weight is multiplied with.

    Attributes:
        value: Its name.
        axis: Its features' axis, counted from the end: -1 in x·W, -2 in W·x.
    """

    value: str
    axis: int


def site_inputs(model: ir.Model, names: Collection[str]) -> dict[str, SiteInput]:
    """What each of these initializers of the main graph is multiplied with, in the order in which the graph does it.

    Those without such an input (rule 2), or with several different ones, are left out.
    """
    places = {node: place for place, node in enumerate(model.graph)}
    found: list[tuple[int, str, SiteInput]] = []
    for name in names:
        value = model.graph.initializers.get(name)
        if value is None or value.is_graph_output():
            continue
        reading = list(readers(value))
        inputs = {_input_of(node, index) for node, index in reading}
        seen = inputs.pop() if len(inputs) == 1 else None
        if seen is not None and all(node in places for node, _ in reading):
            found.append((min(places[node] for node, _ in reading), name, seen))
    return {name: seen for _, name, seen in sorted(found, key=lambda row: row[:2])}


def readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """The operators that compute with a weight; steps that only pass it on are followed."""
    for node, index in value.uses():
        if node.op_type in _STEPS and node.domain == "":
            yield from readers(node.outputs[0])
        else:
            yield node, index


def _input_of(node: ir.Node, index: int) -> SiteInput | None:
    """Rule 1 for one reader."""
    fused = _FUSED.get((node.domain, node.op_type))
    product = node.domain == "" and node.op_type in ("MatMul", "Gemm")
    if not (product and index in (0, 1)) and not (fused is not None and index == fused):
        return None
    other = node.inputs[1 - index]
    if other is None or other.name is None or other.is_initializer():
        return None
    axis = -1 if index == 1 else -2
    if node.attributes.get_int("transA" if index == 1 else "transB", 0):
        axis = -3 - axis
    return SiteInput(other.name, axis)
