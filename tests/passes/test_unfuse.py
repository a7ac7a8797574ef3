"""Unfusing: the graph with branches computes what the graph with the folded weight computes, in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from loracc.adapter import Delta
from loracc.deltas import DoRA, LowRank
from loracc.folded import Binding, FoldedTensor
from loracc.passes.retype import RetypePass
from loracc.passes.unfuse import UnfusePass
from loracc.proof.kernels import has_kernel
from loracc.runners.runner import OnnxRunner
from loracc.sites import TRANSPOSED, Layout, Site

RNG = np.random.default_rng(7)
F32 = ir.DataType.FLOAT
Nodes = Callable[[ir.Value, ir.Value], list[ir.Node]]


def weight(*shape: int, name: str = "w") -> ir.Value:
    array = RNG.standard_normal(shape).astype(np.float32)
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(F32), const_value=ir.tensor(array, name=name))


def build(x_shape: tuple[int, ...], w: ir.Value, nodes: Nodes, x_dtype: ir.DataType = F32) -> ir.Model:
    x = ir.Value(name="x", shape=ir.Shape(x_shape), type=ir.TensorType(x_dtype))
    made = nodes(x, w)
    for index, node in enumerate(made):
        node.name = f"n{index}"
        node.outputs[0].name = f"v{index}"
        node.outputs[0].dtype = F32
    out = made[-1].outputs[0]
    out.name = "y"
    graph = ir.Graph([x], [out], nodes=made, initializers=[w], opset_imports={"": 18}, name="g")
    return ir.Model(graph, ir_version=10)


def low_rank(out: int, *rest: int, r: int = 3) -> LowRank:
    return LowRank(
        RNG.standard_normal((r, *rest)).astype(np.float32), RNG.standard_normal((out, r)).astype(np.float32), 0.7
    )


def bound(delta: Delta, layout: Layout = Layout(), consumer: str = "") -> Binding:  # noqa: B008  # frozen
    return Binding(Site("m", "weight", "linear", "w", layout, consumer), delta, "a", "m.weight", "name")


def double(model: ir.Model) -> ir.Model:
    opsets = model.graph.opset_imports
    RetypePass(
        ir.DataType.DOUBLE,
        keep_outputs=False,
        in_float=lambda node, values: not has_kernel(node, values, ir.DataType.DOUBLE, opsets),
    )(model)
    return model


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    return OnnxRunner(model, threads=1).run({"x": x})["y"]


def check(model: ir.Model, x: np.ndarray, bindings: list[Binding], *, tolerance: float = 1e-12) -> UnfusePass:
    """The unfused graph against the folded one, both in float64; and the change must be there."""
    folded = model.clone()
    value = folded.graph.initializers["w"]
    assert value.const_value is not None
    value.const_value = FoldedTensor(value.const_value, bindings)
    unfused = model.clone()
    unfuse = UnfusePass(bindings)
    unfuse(unfused)
    expected, actual, base = (run(double(m), x) for m in (folded, unfused, model.clone()))
    scale = np.abs(expected).max()
    assert np.abs(expected - base).max() > 1e-2 * scale
    assert np.abs(expected - actual).max() < tolerance * scale
    return unfuse


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


LINEAR: dict[str, tuple[tuple[int, ...], Layout, Nodes, tuple[int, ...]]] = {
    "x @ W": ((6, 5), TRANSPOSED, lambda x, w: [ir.node("MatMul", [x, w])], (4, 6)),
    "W @ x": ((5, 6), Layout(), lambda x, w: [ir.node("MatMul", [w, x])], (6, 4)),
    "Gemm transB alpha": (
        (5, 6),
        Layout(),
        lambda x, w: [ir.node("Gemm", [x, w], attributes={"transB": 1, "alpha": 0.5})],
        (4, 6),
    ),
    "Gemm transA": ((6, 5), TRANSPOSED, lambda x, w: [ir.node("Gemm", [x, w], attributes={"transA": 1})], (6, 4)),
    "Gemm left": ((6, 5), TRANSPOSED, lambda x, w: [ir.node("Gemm", [w, x], attributes={"transA": 1})], (6, 4)),
    "Transpose": (
        (5, 6),
        Layout(),
        lambda x, w: [
            (t := ir.node("Transpose", [w], attributes={"perm": [1, 0]})),
            ir.node("MatMul", [x, t.outputs[0]]),
        ],
        (2, 4, 6),
    ),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear(name: str) -> None:
    w_shape, layout, nodes, x_shape = LINEAR[name]
    model = build(x_shape, weight(*w_shape), nodes)
    unfuse = check(model, floats(*x_shape), [bound(low_rank(5, 6), layout), bound(low_rank(5, 6, r=2), layout)])
    assert unfuse.branches == 2 and not unfuse.replaced
    assert [(tap.site, tap.before) for tap in unfuse.taps] == [("m.weight", "y")]


def test_block_of_a_fused_weight() -> None:
    model = build((4, 6), weight(6, 15), lambda x, w: [ir.node("MatMul", [x, w])])
    unfuse = check(
        model,
        floats(4, 6),
        [bound(low_rank(5, 6), Layout((1, 0), 5, 10)), bound(low_rank(5, 6), Layout((1, 0), 10, None))],
    )
    assert unfuse.branches == 2 and not unfuse.replaced


def test_embedding() -> None:
    model = build((3, 4), weight(9, 5), lambda x, w: [ir.node("Gather", [w, x])], ir.DataType.INT64)
    unfuse = check(model, RNG.integers(0, 9, (3, 4)), [bound(low_rank(9, 5))])
    assert unfuse.branches == 1


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution(groups: int) -> None:
    def nodes(x: ir.Value, w: ir.Value) -> list[ir.Node]:
        attributes: dict[str, int | list[int]] = {
            "pads": [1, 1, 1, 1],
            "strides": [2, 1],
            "group": groups,
            "kernel_shape": [3, 3],
        }
        return [ir.node("Conv", [x, w], attributes=attributes)]

    model = build((2, 4, 7, 7), weight(6, 4 // groups, 3, 3), nodes)
    # Conv has no float64 kernel on CPU: both sides are computed in float32.
    unfuse = check(model, floats(2, 4, 7, 7), [bound(low_rank(6, 4 // groups, 3, 3))], tolerance=2e-6)
    assert unfuse.branches == 1 and not unfuse.replaced


def test_what_has_no_branch_is_folded_and_listed() -> None:
    model = build((4, 6), weight(5, 6), lambda x, w: [ir.node("Gemm", [x, w], attributes={"transB": 1})])
    dora = DoRA(low_rank(5, 6), np.abs(floats(5)) + 1)
    unfuse = check(model, floats(4, 6), [bound(dora)])
    assert unfuse.branches == 0
    assert unfuse.replaced == {"w": "a dora delta has no branch"}
    assert unfuse.taps[0].before == unfuse.taps[0].after == "y"


def test_an_operator_without_a_rule_is_folded_and_listed() -> None:
    model = build((5, 6), weight(5, 6), lambda x, w: [ir.node("Mul", [x, w])])
    unfuse = check(model, floats(5, 6), [bound(low_rank(5, 6))])
    assert "Mul" in unfuse.replaced["w"]


@pytest.mark.parametrize("consumer", ["n0", "n1"])
@pytest.mark.parametrize("delta", [low_rank(6, 6), DoRA(low_rank(6, 6), np.arange(1, 7, dtype=np.float32))])
def test_only_the_named_reader_of_a_tied_weight_changes(consumer: str, delta: Delta) -> None:
    model = build(
        (4, 6),
        weight(6, 6),
        lambda x, w: [(first := ir.node("MatMul", [x, w])), ir.node("MatMul", [first.outputs[0], w])],
    )
    unfused = model.clone()
    UnfusePass([bound(delta, TRANSPOSED, consumer)])(unfused)
    x = floats(4, 6)
    value = model.graph.initializers["w"].const_value
    assert value is not None
    w = value.numpy().astype(np.float64)
    new = delta.apply(w.T).T
    first, second = (new, w) if consumer == "n0" else (w, new)
    expected = x.astype(np.float64) @ first @ second
    np.testing.assert_allclose(run(double(unfused), x), expected, rtol=1e-10, atol=1e-10)


def test_factors_keep_their_precision_until_the_graph_has_a_type() -> None:
    """Adapter in float32, weight in float16: the reference in float32 uses the adapter as it was trained."""
    w = weight(6, 5)
    assert w.const_value is not None
    w.const_value = ir.tensor(w.const_value.numpy().astype(np.float16), name="w")
    w.dtype = ir.DataType.FLOAT16
    model = build((4, 6), w, lambda x, w: [ir.node("MatMul", [x, w])], ir.DataType.FLOAT16)
    model.graph.outputs[0].dtype = ir.DataType.FLOAT16
    delta = low_rank(5, 6)
    unfused = model.clone()
    UnfusePass([bound(delta, TRANSPOSED)])(unfused)
    left = next(v for name, v in unfused.graph.initializers.items() if name.endswith(".left"))
    assert left.const_value is not None and left.const_value.dtype == ir.DataType.FLOAT16
    RetypePass(F32)(unfused)
    np.testing.assert_array_equal(left.const_value.numpy(), delta.a.T)
