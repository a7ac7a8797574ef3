"""HoistTransposes: before, after, and the refusals."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from loracc.passes.hoist_transposes import SCOPES_KEY, HoistTransposes, module_scopes, reader_alias
from loracc.tensors import PermutedTensor

W = np.arange(12, dtype=np.float32).reshape(3, 4)


def graph_of(nodes: list[ir.Node], weight: ir.Value, outputs: list[ir.Value]) -> ir.Model:
    graph = ir.Graph([], outputs, nodes=nodes, initializers=[weight], opset_imports={"": 20})
    return ir.Model(graph, ir_version=10)


def weight(name: str = "a.weight", array: np.ndarray = W) -> ir.Value:
    return ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=ir.tensor(array)
    )


def transpose(value: ir.Value, perm: list[int] | None = None, scope: str = "") -> ir.Node:
    node = ir.node("Transpose", [value], {"perm": perm} if perm is not None else {})
    if scope:
        node.metadata_props[SCOPES_KEY] = str(["", scope, "linear"])
    return node


def relu(value: ir.Value, scope: str = "") -> ir.Node:
    node = ir.node("Relu", [value])
    if scope:
        node.metadata_props[SCOPES_KEY] = str(["", scope, "embedding"])
    return node


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("perm", [[1, 0], None])
def test_the_only_reader_turns_the_weight_and_keeps_its_name(perm: list[int] | None) -> None:
    w = weight()
    t = transpose(w, perm)
    out = relu(t.outputs[0])
    model = graph_of([t, out], w, [out.outputs[0]])
    assert HoistTransposes()(model).modified
    assert ops(model) == ["Relu"]
    turned = model.graph.initializers["a.weight"]
    assert out.inputs[0] is turned and turned.shape == ir.Shape([4, 3])
    assert isinstance(turned.const_value, PermutedTensor)
    assert np.array_equal(turned.const_value.numpy(), W.T)


def test_transposes_of_one_permutation_share_the_turned_weight() -> None:
    w = weight()
    first, second = transpose(w, [1, 0]), transpose(w)
    one, two = relu(first.outputs[0]), relu(second.outputs[0])
    model = graph_of([first, second, one, two], w, [one.outputs[0], two.outputs[0]])
    HoistTransposes()(model)
    assert ops(model) == ["Relu", "Relu"] and list(model.graph.initializers) == ["a.weight"]
    assert one.inputs[0] is two.inputs[0]


def test_two_turns_undo_each_other() -> None:
    w = weight()
    first = transpose(w)
    second = transpose(first.outputs[0])
    out = relu(second.outputs[0])
    model = graph_of([first, second, out], w, [out.outputs[0]])
    HoistTransposes()(model)
    HoistTransposes()(model)
    assert ops(model) == ["Relu"]
    value = model.graph.initializers["a.weight"]
    assert value.shape == ir.Shape([3, 4]) and not isinstance(value.const_value, PermutedTensor)


def tied(name: str) -> tuple[ir.Model, ir.Node, ir.Node]:
    w = weight(name)
    look_up = relu(w, "wte")
    turn = transpose(w, scope="lm_head")
    out = relu(turn.outputs[0])
    return graph_of([look_up, turn, out], w, [look_up.outputs[0], out.outputs[0]]), look_up, out


@pytest.mark.parametrize("held", ["wte.weight", "lm_head.weight"])
def test_a_tied_weight_becomes_two_initializers_each_with_its_own_name(held: str) -> None:
    model, look_up, out = tied(held)
    HoistTransposes([("wte.weight", "lm_head.weight")])(model)
    assert ops(model) == ["Relu", "Relu"]
    assert look_up.inputs[0] is model.graph.initializers["wte.weight"]
    assert out.inputs[0] is model.graph.initializers["lm_head.weight"]
    head = model.graph.initializers["lm_head.weight"].const_value
    assert head is not None and np.array_equal(head.numpy(), W.T)


def test_without_an_alias_the_second_initializer_gets_a_suffix() -> None:
    model, _, out = tied("wte.weight")
    HoistTransposes()(model)
    assert out.inputs[0] is model.graph.initializers["wte.weight.transposed"]


def test_a_large_shared_weight_keeps_its_transpose() -> None:
    model, _, _ = tied("wte.weight")
    assert not HoistTransposes(shared_limit=11)(model).modified
    assert ops(model) == ["Relu", "Transpose", "Relu"]
    assert HoistTransposes(shared_limit=12)(model).modified


def test_graph_inputs_and_outputs_are_left_alone() -> None:
    w = weight()
    t = transpose(w)
    model = graph_of([t], w, [t.outputs[0]])
    assert not HoistTransposes()(model).modified
    overridable = weight()
    turned = transpose(overridable)
    out = relu(turned.outputs[0])
    graph = ir.Graph([overridable], [out.outputs[0]], nodes=[turned, out], initializers=[overridable])
    assert not HoistTransposes()(ir.Model(graph, ir_version=10)).modified


def test_scopes() -> None:
    node = ir.node("Relu", [None])
    assert module_scopes(node) == ()
    node.metadata_props[SCOPES_KEY] = "not a list("
    assert module_scopes(node) == ()
    node.metadata_props[SCOPES_KEY] = "['', 'decoder', 'decoder.embed', 'embedding']"
    assert module_scopes(node) == ("", "decoder", "decoder.embed")
    assert reader_alias(node, ["shared.weight", "decoder.embed.weight", "decoder.weight"]) == "decoder.embed.weight"
    assert reader_alias(node, ["lm_head.weight"]) is None
