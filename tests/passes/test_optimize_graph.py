"""OptimizeGraph: what the exporter's optimizer would do to parameters, and must not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from loracc.passes.optimize_graph import OptimizeGraph


def initializer(name: str, array: np.ndarray) -> ir.Value:
    return ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(array, name=name),
    )


def model_of() -> ir.Model:
    """relu(x·W + 0) ∘ relu(x·(W₂ + W₃) + 0): a zero bias twice, constants of parameters and of constants."""
    x = ir.Value(name="x", shape=ir.Shape(["n", 2]), type=ir.TensorType(ir.DataType.FLOAT))
    eye = np.eye(2, dtype=np.float32)
    parameters = {name: initializer(name, eye) for name in ("w", "w2", "w3")}
    parameters |= {name: initializer(name, np.zeros(2, np.float32)) for name in ("b", "b2")}
    constant = initializer("c", np.ones(2, np.float32))
    first = ir.node("Gemm", [x, parameters["w"], parameters["b"]])
    total = ir.node("Add", [parameters["w2"], parameters["w3"]])
    second = ir.node("Gemm", [first.outputs[0], total.outputs[0], parameters["b2"]])
    doubled = ir.node("Add", [constant, constant])
    last = ir.node("Add", [second.outputs[0], doubled.outputs[0]])
    last.outputs[0].name = "y"
    graph = ir.Graph(
        [x],
        [last.outputs[0]],
        nodes=[first, total, second, doubled, last],
        initializers=[*parameters.values(), constant],
        opset_imports={"": 20},
    )
    return ir.Model(graph, ir_version=10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # onnxscript's own
def test_parameters_are_opaque_and_constants_are_folded() -> None:
    model = model_of()
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    OptimizeGraph({"w", "w2", "w3", "b", "b2"})(model)
    assert [node.op_type for node in model.graph] == ["Gemm", "Add", "Gemm", "Add"]
    for name in ("w", "w2", "w3", "b", "b2"):
        assert model.graph.initializers[name].const_value is before[name]
    assert "c" not in model.graph.initializers


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_unprotected_parameters_show_that_the_protection_matters() -> None:
    model = model_of()
    OptimizeGraph(())(model)
    assert "b" not in model.graph.initializers and "w2" not in model.graph.initializers


def test_tensors_are_given_back_when_a_pass_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxscript.rewriter import onnx_fusions

    def broken(_model: ir.Model) -> None:
        raise RuntimeError("broken pass")

    monkeypatch.setattr(onnx_fusions, "fuse", broken)
    model = model_of()
    with pytest.raises(RuntimeError, match="broken pass"):
        OptimizeGraph({"w"})(model)
    assert model.graph.initializers["w"].const_value is not None


def chain(length: int) -> ir.Model:
    x = last = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    nodes = []
    for _ in range(length):
        nodes.append(ir.node("Sin", [last]))
        last = nodes[-1].outputs[0]
    return ir.Model(ir.Graph([x], [last], nodes=nodes, opset_imports={"": 20}), ir_version=10)


def test_a_longer_graph_is_not_looked_through_at_each_of_its_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    identifier = ir.Node.op_identifier

    def counted(node: ir.Node) -> tuple[str, str, str]:
        looks[-1] += 1
        return identifier(node)

    monkeypatch.setattr(ir.Node, "op_identifier", counted)
    for length in (100, 200):
        looks.append(0)
        OptimizeGraph(())(chain(length))
    assert looks[1] < 2.5 * looks[0], looks
