"""Tiny ONNX files by hand, for the tests of the front end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["external", "linear_model", "save"]


def linear_model(*initializers: TensorProto, inputs: tuple[str, ...] = ()) -> onnx.ModelProto:
    """``y = x @ w`` with x [n, 4] and, unless given, w [4, 3]; ``inputs`` names initializers that are inputs too."""
    tensors = list(initializers) or [numpy_helper.from_array(np.ones((4, 3), np.float32), "w")]
    graph_inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])]
    graph_inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors if t.name in inputs]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", tensors[0].name], ["y"], name="/fc/MatMul")],
        "tiny",
        graph_inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        initializer=tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def external(location: str, *, name: str = "w", dims: tuple[int, ...] = (4, 3), **entries: Any) -> TensorProto:
    """A float32 tensor whose data lies in ``location``."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def save(path: Path, model: onnx.ModelProto) -> Path:
    """Write the protobuf as it is."""
    path.write_bytes(model.SerializeToString())
    return path
