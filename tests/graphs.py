"""Small ONNX graphs written by hand, and running them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = ["Builder", "op_counts", "relative_error", "run"]

Array = npt.NDArray[Any]


class Builder:
    """A graph in the making: every operator is a method call that gives the node's first output."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.inputs: list[ir.Value] = []
        self.weights: list[ir.Value] = []
        self.nodes: list[ir.Node] = []

    def input(self, name: str, shape: Sequence[int | str], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """A graph input."""
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.inputs.append(value)
        return value

    def weight(self, array: Array | Sequence[int], name: str = "") -> ir.Value:
        """An initializer: an array, or random float32 of a shape."""
        data = array if isinstance(array, np.ndarray) else self.random(*array)
        label = name or f"w{len(self.weights)}"
        tensor = ir.Tensor(data, name=label)
        value = ir.Value(name=label, shape=ir.Shape(data.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.weights.append(value)
        return value

    def random(self, *shape: int) -> Array:
        """Random float32."""
        return self.rng.standard_normal(shape).astype(np.float32)

    def number(self, value: float) -> ir.Value:
        """A scalar initializer."""
        return self.weight(np.asarray(value, np.float32))

    def __call__(self, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        name = f"{op.lower()}_{len(self.nodes)}"
        node = ir.node(op, list(inputs), attributes, name=name)
        node.outputs[0].name = f"{name}_out"
        self.nodes.append(node)
        return node.outputs[0]

    def model(self, *outputs: ir.Value, opset: int = 18) -> ir.Model:
        """The model; float outputs of unknown shape."""
        for value in outputs:
            if value.type is None:
                value.type = ir.TensorType(ir.DataType.FLOAT)
        graph = ir.Graph(
            self.inputs,
            list(outputs),
            nodes=self.nodes,
            initializers=self.weights,
            opset_imports={"": opset},
            name="test",
        )
        return ir.Model(graph, ir_version=10)


def run(model: ir.Model, feeds: Mapping[str, Array] | Sequence[Array]) -> list[Array]:
    """The model's outputs in ONNX Runtime, its optimizer off: what the graph says is what is computed."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString(), options)
    names = [value.name for value in session.get_inputs()]
    given = feeds if isinstance(feeds, Mapping) else dict(zip(names, feeds, strict=True))
    return list(session.run(None, dict(given)))


def op_counts(model: ir.Model) -> Counter[str]:
    """Nodes by operator, Constants left out: exporters write numbers either way."""
    return Counter(node.op_type for node in model.graph if node.op_type != "Constant")


def relative_error(one: Sequence[Array], other: Sequence[Array]) -> float:
    """The largest difference over the largest value, over all outputs."""
    errors = []
    for a, b in zip(one, other, strict=True):
        assert a.shape == b.shape
        errors.append(float(np.abs(a - b).max() / np.abs(a).max()))
    return max(errors)
