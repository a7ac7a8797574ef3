"""Weights inside the bodies of If, Loop and Scan become the main graph's: a body reads its outer graph's values anyway.

What is not moved: initializers that a body also takes as an input or gives as its output, and tensors that are no float
weights. A name that means something else anywhere in the model is changed.
"""

from __future__ import annotations

from itertools import count

import onnx_ir as ir

from loracc.dtypes import is_float

__all__ = ["LiftSubgraphWeights"]


class LiftSubgraphWeights(ir.passes.InPlacePass):
    """See the module's docstring. A model without such weights is left as it is."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        weights = [
            (graph, value)
            for graph in model.graph.subgraphs()
            for value in graph.initializers.values()
            if value.dtype is not None and is_float(value.dtype) and value.shape is not None and len(value.shape)
            if not value.is_graph_input() and not value.is_graph_output()
        ]
        if not weights:
            return ir.passes.PassResult(model, modified=False)
        taken = _names(model)
        for graph, value in weights:
            name = str(value.name)
            graph.initializers.pop(name)
            if taken[name] > 1:
                value.name = next(new for number in count(1) if (new := f"{name}_{number}") not in taken)
                taken[str(value.name)] = 1
            model.graph.register_initializer(value)
        return ir.passes.PassResult(model, modified=True)


def _names(model: ir.Model) -> dict[str, int]:
    """How many values have each name, in all graphs."""
    found: dict[str, int] = {}
    graphs = [model.graph, *model.graph.subgraphs()]
    for graph in graphs:
        values = [*graph.inputs, *(v for v in graph.initializers.values() if not v.is_graph_input())]
        for value in (*values, *(output for node in graph for output in node.outputs)):
            if value.name:
                found[value.name] = found.get(value.name, 0) + 1
    return found
