"""Isomorphism whatever the names; a difference of any kind is found and said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from loracc.folded import FoldedTensor
from loracc.model import BaseModel
from loracc.proof.structure import Pair, compare_checkpoints, compare_graphs
from loracc.proof.verdict import Structure
from loracc.proof.verification import VerifyOptions, verify
from loracc.sites import Site, SiteTable
from tests.verifying import bind, build, folded, low_rank, write

OPTIONS = VerifyOptions(threads=1, end_to_end=False)


def node(graph: ir.Model, op: str) -> ir.Node:
    return next(n for n in graph.graph if n.op_type == op)


def extra_node(graph: ir.Model) -> None:
    softmax = node(graph, "Softmax")
    identity = ir.node("Identity", [softmax.outputs[0]], name="extra")
    identity.outputs[0].name = "extra_out"
    for user, index in tuple(softmax.outputs[0].uses()):
        if user is not identity:
            user.replace_input_with(index, identity.outputs[0])
    softmax.append(identity)


def dead_node(graph: ir.Model) -> None:
    identity = ir.node("Identity", [node(graph, "Softmax").outputs[0]], name="dead")
    identity.outputs[0].name = "dead_out"
    graph.graph.append(identity)


def attribute(graph: ir.Model) -> None:
    node(graph, "Softmax").attributes["axis"] = ir.AttrInt64("axis", 1)


def attribute_gone(graph: ir.Model) -> None:
    del node(graph, "Transpose").attributes["perm"]


def operator(graph: ir.Model) -> None:
    node(graph, "Softmax").op_type = "LogSoftmax"


def edge(graph: ir.Model) -> None:
    """A product reads v where it read q."""
    product = next(
        n for n in graph.graph if n.op_type == "MatMul" and not any(v and v.is_initializer() for v in n.inputs)
    )
    value = graph.graph.initializers["attn.v.weight"].consumers()[0].outputs[0]
    product.replace_input_with(0, value)


def output_name(graph: ir.Model) -> None:
    graph.graph.outputs[0].name = "scores"


def input_type(graph: ir.Model) -> None:
    graph.graph.inputs[0].type = ir.TensorType(ir.DataType.INT32)


def opset(graph: ir.Model) -> None:
    graph.graph.opset_imports[""] = 17


def weight_shape(graph: ir.Model) -> None:
    value = graph.graph.initializers["scale"]
    value.const_value = ir.tensor(np.full((1,), 0.25, np.float32), name="scale")
    value.shape = ir.Shape([1])


def ballast(graph: ir.Model) -> None:
    tensor = ir.tensor(np.ones(3, np.float32), name="ballast")
    value = ir.Value(name="ballast", shape=ir.Shape([3]), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
    graph.graph.register_initializer(value)


def defused(graph: ir.Model) -> None:
    """x·W becomes (x·W₁ | x·W₂)."""
    weight = graph.graph.initializers["head.weight"]
    product = weight.consumers()[0]
    assert weight.const_value is not None
    array = weight.const_value.numpy()
    halves = []
    for index, part in enumerate((array[:, :20], array[:, 20:])):
        value = ir.Value(
            name=f"half{index}",
            shape=ir.Shape(part.shape),
            type=ir.TensorType(ir.DataType.FLOAT),
            const_value=ir.tensor(part, name=f"half{index}"),
        )
        graph.graph.register_initializer(value)
        half = ir.node("MatMul", [product.inputs[0], value], name=f"half{index}")
        half.outputs[0].name = f"half{index}_out"
        product.prepend(half)
        halves.append(half.outputs[0])
    product.op_type = "Concat"
    product.replace_input_with(0, halves[0])
    product.replace_input_with(1, halves[1])
    product.attributes["axis"] = ir.AttrInt64("axis", -1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (extra_node, "the output has Identity 'extra' more after Softmax"),
        (dead_node, "Identity 'dead'"),
        (attribute, "attribute axis is 1 in the output, -1 in the base"),
        (attribute_gone, "attribute perm is absent"),
        (operator, "LogSoftmax"),
        (edge, "MatMul"),
        (output_name, "outputs differ: base has ['logits'], output has ['scores']"),
        (input_type, "input input_ids"),
        (opset, "opset of ai.onnx: 18 in the base, 17 in the output"),
        (weight_shape, "initializer scale: shape [1] in the output, [] in the base"),
        (ballast, "initializer only in the output: ballast, which nothing reads"),
        (defused, "MatMul 'half1', Concat 'MatMul_11' more"),
    ],
)
def test_a_difference_is_found_and_said(change: Callable[[ir.Model], None], words: str, tmp_path: Path) -> None:
    base = build("attention")
    bindings = bind(base)
    out = folded(base, bindings)
    change(out)
    result = verify(base, write(base, out, tmp_path / "out.onnx"), bindings, OPTIONS)
    assert result.verdict == result.structure.verdict == "fail"
    assert any(words in text for text in result.structure.differences), result.structure.differences
    assert result.structure.reason == result.structure.differences[0]


def test_dead_nodes_of_the_base_stay_in_the_output(tmp_path: Path) -> None:
    base = build("attention")
    dead_node(base.ir)
    reader = ir.node("Neg", [base.ir.graph.node("dead").outputs[0]], name="dead reader")
    reader.outputs[0].name = "dead_reader_out"
    base.ir.graph.append(reader)
    bindings = bind(base)
    out = folded(base, bindings)
    result = verify(base, write(base, out, tmp_path / "out.onnx"), bindings, OPTIONS)
    assert result.structure.verdict == "pass", result.structure.differences
    out.graph.remove(out.graph.node("dead reader"), safe=True)
    result = verify(base, write(base, out, tmp_path / "less.onnx"), bindings, OPTIONS)
    assert any("Neg 'dead reader'" in text for text in result.structure.differences)


def test_names_and_order_do_not_matter(tmp_path: Path) -> None:
    base = build("attention")
    bindings = bind(base)
    out = folded(base, bindings)
    for index, inner in enumerate(out.graph):
        inner.name = f"renamed{index}"
        for value in inner.outputs:
            if not value.is_graph_output():
                value.name = f"other{index}"
    for index, value in enumerate(list(out.graph.initializers.values())):
        value.name = f"w{index}"
    q, later, *_ = (n for n in out.graph if n.op_type == "MatMul")
    out.graph.remove(q)
    out.graph.insert_after(later, q)  # another topological order
    result = verify(base, write(base, out, tmp_path / "out.onnx"), bindings, OPTIONS)
    assert result.verdict == "pass", result.reason
    assert result.structure.nodes == len(base.ir.graph)


def tied() -> BaseModel:
    """logits = embed[ids] · embedᵀ: one initializer, two readers."""
    rng = np.random.default_rng(0)
    array = rng.standard_normal((41, 16)).astype(np.float32)
    weight = ir.Value(
        name="embed.weight",
        shape=ir.Shape([41, 16]),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(array, name="embed.weight"),
    )
    ids = ir.Value(name="ids", shape=ir.Shape(["b", "s"]), type=ir.TensorType(ir.DataType.INT64))
    gather = ir.node("Gather", [weight, ids], name="embed")
    turn = ir.node("Transpose", [weight], attributes={"perm": [1, 0]}, name="turn")
    head = ir.node("MatMul", [gather.outputs[0], turn.outputs[0]], name="head")
    for name, one in zip(("h", "t", "logits"), (gather, turn, head), strict=True):
        one.outputs[0].name, one.outputs[0].dtype = name, ir.DataType.FLOAT
    graph = ir.Graph(
        [ids], head.outputs, nodes=[gather, turn, head], initializers=[weight], opset_imports={"": 18}, name="tied"
    )
    sites = [
        Site("embed", "weight", "embedding", "embed.weight", consumer="embed"),
        Site("head", "weight", "linear", "embed.weight", consumer="turn"),
    ]
    return BaseModel(Path("tied.onnx"), "onnx", ir.Model(graph, ir_version=10), SiteTable(sites))


@pytest.mark.parametrize("reader", ["embed", "turn"])
def test_an_unshared_weight_is_allowed_and_reported(reader: str, tmp_path: Path) -> None:
    base = tied()
    site = next(site for site in base.sites if site.consumer == reader)
    bindings = [replace(bind(build("mlp"))[0], site=site, delta=low_rank((41, 16)))]
    out = base.ir.clone()
    value = out.graph.initializers["embed.weight"]
    assert value.const_value is not None
    clone = ir.Value(
        name="embed.weight.2", shape=value.shape, type=value.type, const_value=FoldedTensor(value.const_value, bindings)
    )
    out.graph.register_initializer(clone)
    node_ = next(n for n in out.graph if n.name == reader)
    node_.replace_input_with(0, clone)
    result = verify(base, write(base, out, tmp_path / "out.onnx"), bindings, VerifyOptions(threads=1))
    assert result.verdict == "pass", result.reason
    assert result.structure.clones == {"embed.weight.2": "embed.weight"}
    # Folding the shared weight changes the other reader too: numbers say no, though the graphs are the same.
    wrong = base.ir.clone()
    shared = wrong.graph.initializers["embed.weight"]
    shared.const_value = FoldedTensor(value.const_value, bindings)
    result = verify(base, write(base, wrong, tmp_path / "wrong.onnx"), bindings, VerifyOptions(threads=1))
    assert result.structure.verdict == "pass"
    assert result.numbers.end_to_end.verdict == "fail"


def body(op: str, tensor: np.ndarray) -> ir.Model:
    """A branch with a body that reads a value of the outer graph, and a tensor in an attribute."""
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    yes = ir.Value(name="yes", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
    branches = []
    for kind in (op, "Neg"):
        constant = ir.node("Constant", [], attributes={"value": ir.tensor(tensor)})
        inner = ir.node(kind, [x])
        total = ir.node("Add", [inner.outputs[0], constant.outputs[0]])
        branches.append(ir.Graph([], total.outputs, nodes=[constant, inner, total], name=kind))
    branch = ir.node("If", [yes], attributes={"then_branch": branches[0], "else_branch": branches[1]})
    branch.outputs[0].name = "y"
    return ir.Model(ir.Graph([x, yes], branch.outputs, nodes=[branch], opset_imports={"": 18}, name="g"), ir_version=10)


def test_bodies_and_tensors_in_attributes_are_compared() -> None:
    one = np.ones(2, np.float32)
    assert not compare_graphs(body("Abs", one), body("Abs", one)).differences
    assert any("Sign" in text for text in compare_graphs(body("Abs", one), body("Sign", one)).differences)
    assert any("attribute value" in text for text in compare_graphs(body("Abs", one), body("Abs", 2 * one)).differences)


def checkpoint(**tensors: np.ndarray) -> ir.Model:
    values = [
        ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.tensor(array).dtype),
            const_value=ir.tensor(array, name=name),
        )
        for name, array in tensors.items()
    ]
    return ir.Model(ir.Graph([], [], nodes=[], initializers=values, name="checkpoint"), ir_version=10)


def test_checkpoints() -> None:
    a, b = np.ones((2, 3), np.float32), np.zeros(3, np.float32)
    base = checkpoint(a=a, b=b)
    assert compare_checkpoints(base, checkpoint(a=a, b=b), {}).pairs == [Pair("a", "a", ("a",)), Pair("b", "b", ("b",))]
    assert compare_checkpoints(base, checkpoint(b=b, a=a), {}).differences == ["the tensors are in another order"]
    assert compare_checkpoints(base, checkpoint(a=a), {}).differences == ["tensor b is missing in the output"]
    assert "shape" in compare_checkpoints(base, checkpoint(a=a.T, b=b), {}).differences[0]
    assert "FLOAT16" in compare_checkpoints(base, checkpoint(a=a.astype(np.float16), b=b), {}).differences[0]
    assert compare_checkpoints(base, checkpoint(a=a, b=b, c=a), {}).differences == ["tensor c is only in the output"]
    assert not compare_checkpoints(base, checkpoint(a=a, b=b, c=a), {"c": "a"}).differences


def test_a_checkpoint_is_verified_by_its_weights() -> None:
    rng = np.random.default_rng(0)
    w, v = rng.standard_normal((6, 4)).astype(np.float32), rng.standard_normal(3).astype(np.float32)
    base = BaseModel(Path("b"), "checkpoint", checkpoint(w=w, v=v), SiteTable(), traced=False)
    binding = replace(bind(build("mlp"))[0], site=Site("m", "weight", "other", "w"), delta=low_rank((6, 4)))
    right = (w + binding.delta.materialize(np.dtype(np.float64))).astype(np.float32)
    for array, verdict in ((right, "pass"), (w, "fail")):
        out = replace(base, ir=checkpoint(w=array, v=v))
        result = verify(base, out, [binding], OPTIONS)
        assert result.numbers.verdict == verdict
        assert result.numbers.end_to_end.verdict == "skipped"
        assert result.structure.verdict == "pass"
    halved = replace(base, ir=checkpoint(w=right.astype(np.float16), v=v.astype(np.float16)))
    exact = (w + binding.delta.materialize(np.dtype(np.float64))).astype(np.float16)
    assert np.array_equal(exact, right.astype(np.float16))  # no double rounding in this sample
    assert verify(base, halved, [binding], OPTIONS).verdict == "pass"


def test_structure_to_json_has_a_summary() -> None:
    assert Structure("pass", nodes=3).to_json()["summary"] == "3 nodes, isomorphic"
