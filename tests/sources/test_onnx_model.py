"""The ONNX front end on sound files: external data stays where it is, inputs are the user's, names are unique."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from loracc.errors import InputError
from loracc.model import LoadOptions
from loracc.sources import load_model
from loracc.sources.onnx_model import read_graph
from tests.sources.onnx_files import external, linear_model, save


def test_external_data_stays_in_its_file(tmp_path: Path) -> None:
    data = np.arange(12, dtype=np.float32).reshape(4, 3)
    (tmp_path / "m.data").write_bytes(bytes(16) + data.tobytes() + bytes(4))
    path = save(tmp_path / "m.onnx", linear_model(external("m.data", offset=16)))
    model = load_model(path)
    tensor = model.ir.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert (tensor.path, tensor.offset, tensor.length) == (str((tmp_path / "m.data").resolve()), 16, 48)
    np.testing.assert_array_equal(tensor.numpy(), data)
    assert [(s.name, s.kind, s.layout.perm, s.source) for s in model.sites] == [
        ("fc.weight", "linear", (1, 0), "scope")
    ]


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    """Model and data are links from a snapshot to blobs that lie side by side; hard links are as good."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots"
    blobs.mkdir()
    snapshot.mkdir()
    (blobs / "bbb").write_bytes(np.ones(12, np.float32).tobytes())
    os.link(blobs / "bbb", blobs / "hard")
    save(blobs / "aaa", linear_model(external("model.data")))
    os.symlink("../blobs/aaa", snapshot / "model.onnx")
    os.symlink("../blobs/bbb", snapshot / "model.data")
    tensor = load_model(snapshot / "model.onnx").ir.graph.initializers["w"].const_value
    assert tensor is not None
    assert tensor.numpy().sum() == 12


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (TensorProto.FLOAT16, np.arange(12).astype(np.float16)),
        (TensorProto.DOUBLE, np.arange(12).astype(np.float64)),
        (TensorProto.FLOAT, np.arange(12).astype(np.float32)),
    ],
)
def test_typed_fields_are_as_good_as_raw_data(tmp_path: Path, dtype: int, values: np.ndarray) -> None:
    weight = helper.make_tensor("w", dtype, [4, 3], values)
    assert not weight.HasField("raw_data")
    tensor = read_graph(save(tmp_path / "m.onnx", linear_model(weight))).graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy().ravel(), values)


def test_packed_and_string_tensors_pass_the_size_check(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
    packed = helper.make_tensor("q", TensorProto.INT4, [3], [1, -2, 3])
    text = TensorProto(name="t", data_type=TensorProto.STRING, dims=[2], string_data=[b"a", b"b"])
    model = read_graph(save(tmp_path / "m.onnx", linear_model(weight, packed, text)))
    tensor = model.graph.initializers["q"].const_value
    assert tensor is not None
    assert tensor.numpy().tolist() == [1, -2, 3]
    assert model.graph.initializers["t"].dtype == ir.DataType.STRING


def test_inputs_of_the_user(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", linear_model())
    assert load_model(path).sample_inputs == {}
    given = load_model(path, LoadOptions(inputs=("x:float32[2,4]",))).sample_inputs
    assert {name: array.shape for name, array in given.items()} == {"x": (2, 4)}
    with pytest.raises(InputError, match=r"m\.onnx: the model has no input 'z'"):
        load_model(path, LoadOptions(inputs=("z:float32[2,4]",)))
    for wrong, said in (
        ("x:float32[2,5]", r"shape \[2, 5\], the model takes"),
        ("x:int64[2,4]", "int64, the model takes"),
    ):
        with pytest.raises(InputError, match=said):
            load_model(path, LoadOptions(inputs=(wrong,)))


def test_an_overridable_weight_keeps_being_an_input(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
    model = load_model(save(tmp_path / "m.onnx", linear_model(weight, inputs=("w",))))
    assert model.ir.graph.initializers["w"].is_graph_input()
    assert [site.initializer for site in model.sites] == ["w"]


def test_weights_of_old_files_are_no_inputs(tmp_path: Path) -> None:
    """IR version 3 lists every initializer among the inputs and means nothing by it."""
    proto = linear_model(numpy_helper.from_array(np.ones((4, 3), np.float32), "w"), inputs=("w",))
    proto.ir_version = 3
    model = load_model(save(tmp_path / "m.onnx", proto))
    assert [value.name for value in model.ir.graph.inputs] == ["x"]
    assert not model.ir.graph.initializers["w"].is_graph_input()


def test_constant_weights_are_lifted_and_small_constants_left(tmp_path: Path) -> None:
    def constant(name: str, array: np.ndarray) -> onnx.NodeProto:
        return helper.make_node("Constant", [], [name], name=f"c_{name}", value=numpy_helper.from_array(array))

    nodes = [
        constant("w", np.ones((4, 6), np.float32)),
        constant("two", np.array(2, np.float32)),
        helper.make_node("MatMul", ["x", "w"], ["h"], name="/fc/MatMul"),
        helper.make_node("Mul", ["h", "two"], ["y"], name="/Mul"),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "y"))
    proto = helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 18)])
    model = load_model(save(tmp_path / "m.onnx", proto))
    assert [(site.name, site.initializer) for site in model.sites] == [("fc.weight", "w")]
    assert [node.op_type for node in model.ir.graph] == ["Constant", "MatMul", "Mul"]


def test_nodes_get_names_of_their_own_and_omitted_outputs_stay_omitted(tmp_path: Path) -> None:
    model = linear_model()
    model.graph.node[0].output[0] = "h"
    model.graph.node[0].name = "same"
    model.graph.node.append(helper.make_node("Relu", ["h"], ["r"], name="same"))
    model.graph.node.append(helper.make_node("Relu", ["r"], ["r2"]))
    model.graph.node.append(helper.make_node("Dropout", ["r2"], ["y", ""], name="drop"))
    read = read_graph(save(tmp_path / "m.onnx", model))
    names = [node.name for node in read.graph]
    assert len(set(names)) == 4
    assert all(names)
    assert [out.name for out in list(read.graph)[-1].outputs] == ["y", ""]


def test_a_folded_normalisation_is_noted(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((2, 1, 3, 3), np.float32), "onnx::Conv_9")
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "y"))
    node = helper.make_node("Conv", ["x", "onnx::Conv_9"], ["y"], name="/features/conv/Conv")
    proto = helper.make_model(helper.make_graph([node], "g", [x], [y], initializer=[weight]))
    model = load_model(save(tmp_path / "m.onnx", proto))
    assert [(site.module, site.source) for site in model.sites] == [("", "")]
    assert "batch normalisation" in model.notes[0]


def test_a_graph_exported_in_training_mode_is_said_to_be_one(tmp_path: Path) -> None:
    def notes(training: bool) -> tuple[str, ...]:
        model = linear_model()
        model.graph.initializer.append(numpy_helper.from_array(np.array(0.1, np.float32), "ratio"))
        model.graph.initializer.append(numpy_helper.from_array(np.array(training), "training"))
        model.graph.node[0].output[0] = "h"
        model.graph.node.append(helper.make_node("Dropout", ["h", "ratio", "training"], ["y"], name="drop"))
        return load_model(save(tmp_path / "m.onnx", model)).notes

    assert "training mode" in notes(training=True)[0] and not notes(training=False)
