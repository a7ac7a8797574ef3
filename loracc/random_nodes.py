"""Nodes that compute something else at every run: outputs behind them cannot be compared closely."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

__all__ = ["random_nodes"]

_DRAWING = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)


def random_nodes(model: ir.Model) -> list[ir.Node]:
    """Dropouts in training mode, and draws without a seed; in subgraphs and functions too."""
    return [node for node in _all_nodes(model) if node.domain in ("", "ai.onnx") and _is_random(node)]


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _is_random(node: ir.Node) -> bool:
    if node.op_type != "Dropout":
        return node.op_type in _DRAWING and "seed" not in node.attributes
    training = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = ir.convenience.get_const_tensor(training) if training is not None else None
    return tensor is not None and bool(tensor.numpy().any())
