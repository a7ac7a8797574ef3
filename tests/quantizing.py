"""A small graph, the ways that onnxruntime quantizes it, and a LoRA adapter for it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)
from safetensors.numpy import save_file

__all__ = ["SCHEMES", "VOCABULARY", "adapter", "changed", "decoded", "float_model", "quantized", "tensors"]

#: The inner size is no multiple of any block: the last block of every row is padded.
VOCABULARY, INNER, OUTER = 50, 72, 96

Array = np.ndarray[Any, Any]


def float_model(path: Path, *, gemm: bool = False, seed: int = 0) -> Path:
    """``y = relu(emb[ids] · fc) · out`` with torch's parameter names; ``gemm``: the last is a Gemm with a bias."""
    rng = np.random.default_rng(seed)
    shapes = {"emb.weight": (VOCABULARY, INNER), "fc.weight": (INNER, OUTER), "out.weight": (OUTER, VOCABULARY)}
    weights = {name: (rng.standard_normal(shape) / 9).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Gather", ["emb.weight", "ids"], ["x"], name="/emb/Gather"),
        helper.make_node("MatMul", ["x", "fc.weight"], ["h"], name="/fc/MatMul"),
        helper.make_node("Relu", ["h"], ["r"], name="/Relu"),
    ]
    if gemm:
        weights["out.weight"] = np.ascontiguousarray(weights["out.weight"].T)
        weights["out.bias"] = (rng.standard_normal(VOCABULARY) / 9).astype(np.float32)
        nodes.append(helper.make_node("Gemm", ["r", "out.weight", "out.bias"], ["y"], name="/out/Gemm", transB=1))
    else:
        nodes.append(helper.make_node("MatMul", ["r", "out.weight"], ["y"], name="/out/MatMul"))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", VOCABULARY])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    return path


_SIZES = {"fc": (INNER, OUTER), "out": (OUTER, VOCABULARY), "emb": (INNER, VOCABULARY)}


def adapter(
    path: Path, *, scale: float = 1.0, inputs: slice = slice(None), names: Iterable[str] = ("fc", "out")
) -> Path:
    """PEFT's files of rank 3; only the input channels of ``inputs`` are changed."""
    rng = np.random.default_rng(7)
    arrays = {}
    for name in names:
        inside, outside = _SIZES[name]
        a = np.zeros((3, inside), np.float32)
        a[:, inputs] = rng.standard_normal(a[:, inputs].shape) / 9
        arrays[f"base_model.model.{name}.lora_A.weight"] = a
        b = rng.standard_normal((outside, 3)) / 3 * scale
        arrays[f"base_model.model.{name}.lora_B.weight"] = b.astype(np.float32)
    path.mkdir()
    save_file(arrays, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": list(names)}
    (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # untyped upstream
    def __init__(self) -> None:
        self._draws = iter([{"ids": np.arange(VOCABULARY)}])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._draws, None)


def _nbits(**options: Any) -> Callable[[Path, Path], None]:
    def quantize(source: Path, target: Path) -> None:
        config = DefaultWeightOnlyQuantConfig(**options)
        quantizer = MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
        quantizer.process()
        quantizer.model.save_model_to_file(str(target), False)

    return quantize


def _hqq(source: Path, target: Path) -> None:
    quantizer = MatMulNBitsQuantizer(onnx.load(source), algo_config=HQQWeightOnlyQuantConfig(block_size=32, bits=4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch, of read-only arrays that the quantizer hands it
        quantizer.process()
    quantizer.model.save_model_to_file(str(target), False)


def _static(**options: Any) -> Callable[[Path, Path], None]:
    def quantize(source: Path, target: Path) -> None:
        extra = {"ActivationSymmetric": False, **options.pop("extra_options", {})} if options else {}
        quantize_static(source, target, _Reader(), quant_format=QuantFormat.QDQ, extra_options=extra, **options)

    return quantize


#: Name -> quantizer (float model, quantized model).
SCHEMES: dict[str, Callable[[Path, Path], None]] = {
    "4 bit": _nbits(block_size=32, is_symmetric=True, bits=4),
    "4 bit, zero points": _nbits(block_size=16, is_symmetric=False, bits=4),
    "8 bit": _nbits(block_size=32, is_symmetric=True, bits=8),
    "8 bit, zero points": _nbits(block_size=64, is_symmetric=False, bits=8),
    "2 bit": _nbits(block_size=32, is_symmetric=False, bits=2),
    "float zero points": _hqq,
    "embedding": _nbits(
        block_size=32,
        is_symmetric=True,
        bits=4,
        op_types_to_quantize=("MatMul", "Gather"),
        quant_axes=(("MatMul", 0), ("Gather", 1)),
    ),
    "QDQ int4 blocked": _nbits(block_size=32, is_symmetric=True, bits=4, quant_format=QuantFormat.QDQ),
    "QDQ uint4 blocked": _nbits(block_size=32, is_symmetric=False, bits=4, quant_format=QuantFormat.QDQ),
    "QDQ int8": _static(weight_type=QuantType.QInt8),
    "QDQ int8 per channel": _static(weight_type=QuantType.QInt8, per_channel=True),
    "QDQ uint8": _static(weight_type=QuantType.QUInt8, activation_type=QuantType.QUInt8),
    "QDQ int16": _static(weight_type=QuantType.QInt16, activation_type=QuantType.QUInt16),
    "QDQ reduced range": _static(weight_type=QuantType.QInt8, reduce_range=True),
}


def quantized(folder: Path, scheme: str, *, gemm: bool = False) -> Path:
    """The float model, quantized."""
    source, target = float_model(folder / "float.onnx", gemm=gemm), folder / "base.onnx"
    SCHEMES[scheme](source, target)
    return target


def dynamically_quantized(folder: Path) -> Path:
    """MatMulInteger, as ``quantize_dynamic`` makes it."""
    target = folder / "dynamic.onnx"
    quantize_dynamic(float_model(folder / "float.onnx"), target, weight_type=QuantType.QInt8)
    return target


def tensors(path: Path) -> dict[str, Array]:
    """Every initializer of a file."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def changed(before: Path, after: Path) -> set[str]:
    """Names of the initializers whose bytes differ; the files must agree in all else."""
    ours, theirs = onnx.load(before), onnx.load(after)
    assert [n.SerializeToString(deterministic=True) for n in ours.graph.node] == [
        n.SerializeToString(deterministic=True) for n in theirs.graph.node
    ]
    one, other = tensors(before), tensors(after)
    assert list(one) == list(other)
    assert all(one[name].shape == other[name].shape and one[name].dtype == other[name].dtype for name in one)
    return {name for name in one if one[name].tobytes() != other[name].tobytes()}


def decoded(path: Path, name: str) -> Array:
    """A weight as ONNX Runtime's own kernel reads it, in the graph's orientation: the operator given the identity."""
    model = onnx.load(path)
    node = next(n for n in model.graph.node if any(i.startswith(f"{name}.weight") for i in n.input)
                and n.op_type in ("MatMulNBits", "GatherBlockQuantized", "DequantizeLinear"))  # fmt: skip
    own = [tensor for tensor in model.graph.initializer if tensor.name in node.input]
    feeds: dict[str, Array] = {}
    if node.op_type == "MatMulNBits":
        size = next(a.i for a in node.attribute if a.name == "K")
        feeds = {node.input[0]: np.eye(size, dtype=np.float32)}
    elif node.op_type == "GatherBlockQuantized":
        feeds = {node.input[1]: np.arange(own[0].dims[0])}
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in feeds.items()],
        [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)],
        own,
    )
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    session = ort.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, feeds)
    return np.asarray(result)
