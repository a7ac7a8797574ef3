"""Graphs as exporters and optimizers leave them at worst: no weight and no node has a name that tells anything."""

from __future__ import annotations

from itertools import count

import onnx_ir as ir

__all__ = ["anonymous"]


def anonymous(model: ir.Model) -> ir.Model:
    """The same graph without its names and its exporter's metadata, in place; inputs and outputs keep theirs."""
    kept = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    numbers = count(100)
    model.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.name = f"n{next(numbers)}"
        node.metadata_props.clear()
        for value in node.outputs:
            if value.name and value.name not in kept:
                value.name = f"val_{next(numbers)}"
    for value in list(model.graph.initializers.values()):
        if value.name not in kept:
            value.name = f"onnx::MatMul_{next(numbers)}"
    return model
