"""Changing a graph's precision: exact where it must be, types consistent everywhere."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from loracc.passes.retype import RetypePass, recast
from loracc.proof.kernels import has_kernel
from loracc.runners.runner import OnnxRunner

RNG = np.random.default_rng(3)
BF16, F16, F32, F64 = ir.DataType.BFLOAT16, ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE


def model(nodes: list[onnx.NodeProto], dtype: int = TensorProto.FLOAT, **weights: np.ndarray) -> ir.Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, ["n", 6])],
        [helper.make_tensor_value_info("y", dtype, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def everything() -> ir.Model:
    """Casts, constants of every form, a branch with a body, a contrib operator, and Resize's float32-only scales."""
    body = helper.make_graph(
        [
            helper.make_node("Constant", [], ["half"], value_float=0.5),
            helper.make_node("Mul", ["h", "half"], ["then"]),
        ],
        "then",
        [],
        [helper.make_tensor_value_info("then", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["h"], ["else"])],
        "else",
        [],
        [helper.make_tensor_value_info("else", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "mm"),
        helper.make_node("Shape", ["a"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("Add", ["a", "zeros"], ["b"]),
        helper.make_node("Gelu", ["b"], ["c"], "gelu", domain="com.microsoft"),
        helper.make_node("Constant", [], ["list"], value_floats=[0.25]),
        helper.make_node("Mul", ["c", "list"], ["d"]),
        helper.make_node("Cast", ["shape"], ["fshape"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["fshape"], ["sum"], keepdims=0),
        helper.make_node("Add", ["d", "sum"], ["h"]),
        helper.make_node("If", ["yes"], ["e"], then_branch=body, else_branch=other),
        helper.make_node("Resize", ["e", "", "scales"], ["y"], "resize", mode="nearest"),
    ]
    return model(
        nodes,
        w=RNG.standard_normal((6, 4)).astype(np.float32),
        yes=np.array(True),
        scales=np.array([1.0, 2.0], np.float32),
    )


def to_double(graph: ir.Model) -> RetypePass:
    opsets = graph.graph.opset_imports
    retype = RetypePass(F64, in_float=lambda node, values: not has_kernel(node, values, F64, opsets))
    retype(graph)
    return retype


def test_everything_becomes_float64_and_runs() -> None:
    base, wide = everything(), everything()
    for name, value in wide.graph.initializers.items():
        value.const_value = base.graph.initializers[name].const_value
    retype = to_double(wide)
    assert [name.split()[0] for name in retype.wrapped] == ["Gelu", "Resize"]
    x = {"x": RNG.standard_normal((3, 6)).astype(np.float32)}
    one, two = OnnxRunner(base).run(x)["y"], OnnxRunner(wide).run(x)["y"]
    assert two.dtype == np.float32  # outputs keep their type
    np.testing.assert_allclose(one, two, rtol=1e-5)


def test_the_arithmetic_is_float64() -> None:
    weights = RNG.standard_normal((6, 4)).astype(np.float32)
    wide = model([helper.make_node("MatMul", ["x", "w"], ["y"])], w=weights)
    RetypePass(F64, keep_outputs=False)(wide)
    x = RNG.standard_normal((3, 6)).astype(np.float32)
    y = OnnxRunner(wide).run({"x": x})["y"]
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, x.astype(np.float64) @ weights.astype(np.float64), rtol=1e-14)


def test_a_lower_type_for_export() -> None:
    weights = RNG.standard_normal((6, 4)).astype(np.float32)
    low = model([helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])], w=weights)
    RetypePass(F16, sources=[F32])(low)
    value = low.graph.initializers["w"].const_value
    assert value is not None and value.dtype == F16
    np.testing.assert_array_equal(value.numpy(), weights.astype(np.float16))
    assert [v.dtype for v in (*low.graph.inputs, *low.graph.outputs)] == [F32, F32]
    onnx.checker.check_model(ir.to_proto(low), full_check=True)
    x = RNG.standard_normal((3, 6)).astype(np.float32)
    np.testing.assert_allclose(OnnxRunner(low).run({"x": x})["y"], np.maximum(x @ weights, 0), rtol=0.02, atol=0.02)


def test_bfloat16_emulated_in_float32_rounds_after_every_operator() -> None:
    bf16 = ml_dtypes.bfloat16
    weights = RNG.standard_normal((6, 4)).astype(np.float32).astype(bf16)
    nodes = [
        helper.make_node("Cast", ["x"], ["xb"], to=TensorProto.BFLOAT16),
        helper.make_node("MatMul", ["xb", "w"], ["h"]),
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("Cast", ["t"], ["y"], to=TensorProto.FLOAT),
    ]
    graph = model(nodes, w=weights)
    RetypePass(F32, sources=[BF16], rounding=BF16)(graph)
    x = RNG.standard_normal((3, 6)).astype(np.float32)
    h = (x.astype(bf16).astype(np.float32) @ weights.astype(np.float32)).astype(bf16).astype(np.float32)
    expected = np.tanh(h).astype(bf16).astype(np.float32)
    np.testing.assert_array_equal(OnnxRunner(graph, optimize=False).run({"x": x})["y"], expected)


def test_a_recast_forgets_the_rounding_in_between() -> None:
    exact = ir.tensor(RNG.standard_normal((4, 3)), name="w")
    through = recast(recast(exact, BF16), F64)
    np.testing.assert_array_equal(through.numpy(), exact.numpy())


def test_missing_types_are_inferred() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("FastGelu", ["a"], ["b"], domain="com.microsoft"),
        helper.make_node("Softmax", ["b"], ["y"]),
    ]
    graph = model(nodes, w=RNG.standard_normal((6, 4)).astype(np.float32))
    to_double(graph)
    types = {node.op_type: node.outputs[0].dtype for node in graph.graph}
    assert types["MatMul"] == F64 and types["FastGelu"] == F32 and types["Softmax"] == F64


@pytest.mark.parametrize("to", [F16, BF16])
def test_a_masks_filler_stays_finite(to: ir.DataType) -> None:
    """x · (1 − mask) · lowest: with −inf the kept positions would be 0 · −inf."""
    lowest = float(np.finfo(np.float32).min)
    nodes = [
        helper.make_node("Constant", [], ["one"], value_float=lowest),
        helper.make_node("Constant", [], ["two"], value=numpy_helper.from_array(np.array(lowest, np.float32))),
        helper.make_node("Max", ["scalar", "one", "two", "vector"], ["lowest"]),
        helper.make_node("Mul", ["x", "lowest"], ["y"]),
    ]
    vector = np.array([lowest, np.inf, 1, 2, 3, 4], np.float32)
    graph = model(nodes, scalar=np.array(-3e38, np.float32), vector=vector)
    RetypePass(to, sources=[F32])(graph)
    largest = 65504.0 if to == F16 else float(np.uint32(0x7F7F0000).view(np.float32))
    for name in ("scalar", "vector"):
        value = graph.graph.initializers[name].const_value
        assert value is not None and value.dtype == to
        array = value.numpy().astype(np.float64).ravel()
        assert array[0] == (-largest if to == F16 or name == "vector" else array[0]) and np.isfinite(array[0])
    assert np.isinf(array[1]) and array[2] == 1  # an infinity that was one stays one
    for node in list(graph.graph)[:3]:
        if node.op_type == "Constant":
            assert float(node.attributes["value"].as_tensor().numpy()) == -largest
