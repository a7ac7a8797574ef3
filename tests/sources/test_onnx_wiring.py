"""What ONNX Runtime puts right in a graph, and what it would read otherwise than onnx_ir."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from loracc.cli import run
from loracc.dtypes import Array
from loracc.errors import InputError
from loracc.sources.onnx_model import read_graph

WEIGHT = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
RELU = helper.make_node("Relu", ["h"], ["y"], "act")
FC = helper.make_node("MatMul", ["x", "fc.weight"], ["h"], "/fc/MatMul")


def write(path: Path, *nodes: onnx.NodeProto, weights: list[Array] | None = None, batch: int | str = "b") -> Path:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 6])],
        [numpy_helper.from_array(weight, "fc.weight") for weight in weights or [WEIGHT]],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def fold(path: Path) -> Array:
    """Fold a rank-one adapter and run the result on eight rows."""
    one = np.ones((1, 8), np.float32)
    save_file({"fc.lora_A.weight": one, "fc.lora_B.weight": one[:, :6].T.copy()}, path.with_name("a.safetensors"))
    out = path.with_name("out.onnx")
    assert run(["fold", str(path), str(path.with_name("a.safetensors")), "--alpha", "1", "-o", str(out), "-q"]) == 0
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": np.eye(8, dtype=np.float32)})[0])


def test_nodes_before_what_they_read_are_put_in_order(tmp_path: Path) -> None:
    then = helper.make_graph(
        [helper.make_node("Identity", ["t"], ["u"]), helper.make_node("Neg", ["h"], ["t"])],
        "then",
        [],
        [helper.make_tensor_value_info("u", TensorProto.FLOAT, None)],
    )
    branch = helper.make_node("If", ["c"], ["y"], "branch", then_branch=then, else_branch=then)
    yes = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True)))
    plain = fold(write(tmp_path / "plain.onnx", RELU, FC))
    np.testing.assert_allclose(plain, np.maximum(WEIGHT + 1, 0), rtol=1e-6)
    (tmp_path / "out.onnx").unlink()
    np.testing.assert_allclose(fold(write(tmp_path / "body.onnx", branch, yes, FC)), -(WEIGHT + 1), rtol=1e-6)


def test_what_is_in_order_stays_as_it_is(tmp_path: Path) -> None:
    other = helper.make_node("Neg", ["x"], ["n"], "first")
    model = read_graph(write(tmp_path / "m.onnx", other, FC, RELU))
    assert [node.name for node in model.graph] == ["first", "/fc/MatMul", "act"]


@pytest.mark.parametrize(
    "nodes",
    [
        [helper.make_node("Add", ["h", "y"], ["z"], "a"), helper.make_node("Relu", ["z"], ["y"], "b"), FC],
        [helper.make_node("Add", ["h", "y"], ["y"], "self"), FC],
    ],
)
def test_a_circle_is_refused(nodes: list[onnx.NodeProto], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="wait for one another in a circle"):
        read_graph(write(tmp_path / "m.onnx", *nodes))


def test_two_initializers_of_one_name(tmp_path: Path) -> None:
    """ONNX Runtime reads the last and onnx_ir the first; where they are equal nobody can tell."""
    read_graph(write(tmp_path / "same.onnx", FC, RELU, weights=[WEIGHT, WEIGHT]))
    with pytest.raises(InputError, match=r"there are 2 initializers 'fc.weight', and they differ"):
        read_graph(write(tmp_path / "m.onnx", FC, RELU, weights=[WEIGHT, WEIGHT + 1]))


def test_a_size_below_zero_is_any_size(tmp_path: Path) -> None:
    np.testing.assert_allclose(
        fold(write(tmp_path / "m.onnx", FC, RELU, batch=-1)), np.maximum(WEIGHT + 1, 0), rtol=1e-6
    )


def test_inputs_beyond_any_memory_are_not_made_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The weights are checked all the same, and the reason for the rest is told."""
    path = write(tmp_path / "m.onnx", FC, RELU, batch=1 << 40)
    save_file(
        {"fc.lora_A.weight": WEIGHT[:, :1].T.copy(), "fc.lora_B.weight": np.ones((6, 1), np.float32)},
        tmp_path / "a.safetensors",
    )
    arguments = [str(path), str(tmp_path / "a.safetensors"), "--alpha", "1", "-o", str(tmp_path / "out.onnx")]
    assert run(["fold", *arguments, "--json"]) == 0
    assert "too large to be made up" in capsys.readouterr().out
