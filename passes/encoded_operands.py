"""The quantized operands of a graph's nodes: which inputs are codes, scales and zero points, and what they encode.

One function an operator, each from its specification:

* ``DequantizeLinear``: per tensor, per axis, blocked (ONNX opset 21; also onnxruntime's own of an earlier time);
* ``MatMulNBits``: ``[N, K]`` in blocks along K, 2, 4 or 8 bits (onnxruntime contrib operators);
* ``GatherBlockQuantized``: an embedding in blocks along its last axis (likewise);
* ``DynamicQuantizeMatMul``: int8 or uint8 ``[K, N]``, per tensor or per column (likewise).

What does not fit its operator's specification, or has no constant codes, is an :class:`Unencoded` with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from loracc.dtypes import is_float
from loracc.encodings.encoded_weight import EncodedWeight
from loracc.encodings.grid import Blocks
from loracc.tensors import dims

__all__ = ["Operand", "Unencoded", "operand_of"]


@dataclass(frozen=True)
class Operand:
    """A node's encoded weight.

    Attributes:
        weight: What it encodes.
        parts: Which input of the node is which: "codes", "scales", "zeros".
        turned: Whether the node multiplies with the transpose.
    """

    weight: EncodedWeight
    parts: Mapping[str, int]
    turned: bool = False


@dataclass(frozen=True)
class Unencoded:
    """A quantized operand that deltas cannot be folded into, and why."""

    reason: str


def operand_of(node: ir.Node) -> Operand | Unencoded | None:
    """What a node decodes; None where it decodes no constant weight."""
    rule = _RULES.get((node.domain if node.domain != "ai.onnx" else "", node.op_type))
    if rule is None:
        return None
    read, codes = rule
    if len(node.inputs) <= codes or _tensor(node, codes) is None:
        return None
    try:
        return read(node)
    except _Wrong as wrong:
        return Unencoded(str(wrong))


class _Wrong(Exception):
    """The operand does not fit the operator's specification."""


def _dequantize_linear(node: ir.Node) -> Operand | None:
    codes, scales, zeros = _required(node, 0), _tensor(node, 1), _tensor(node, 2)
    bias = len(dims(codes)) == 1 and codes.dtype == ir.DataType.INT32
    if not bias and (len(dims(codes)) < 2 or not codes.dtype.is_integer() or codes.dtype.bitwidth > 16):
        return None  # an 8-bit float, a table of indices
    if scales is None or (zeros is None and _given(node, 2)):
        raise _Wrong("its scales or zero points are computed in the graph")
    shape = dims(codes)
    blocks = _dequantize_blocks(node, shape, dims(scales))
    alike = zeros is None or dims(zeros) == dims(scales) or (math.prod(dims(zeros)), math.prod(dims(scales))) == (1, 1)
    if zeros is not None and (not alike or zeros.dtype != codes.dtype):
        raise _Wrong(
            f"its zero points are {zeros.dtype.name}{list(dims(zeros))}; the codes are {codes.dtype.name} and the "
            f"scales {list(dims(scales))}"
        )
    weight = EncodedWeight(
        _name(node, 0),
        node.op_type,
        codes,
        scales,
        zeros,
        blocks,
        codes.dtype.bitwidth,
        pinned="a bias has the scale of what it is added to" if bias else "",
    )
    return Operand(weight, _parts(node, 0, 1, 2))


def _dequantize_blocks(node: ir.Node, shape: tuple[int, ...], scales: tuple[int, ...]) -> Blocks:
    axis, block = _int(node, "axis", 1), _int(node, "block_size", 0)
    if scales in ((), (1,)) and not block:
        return Blocks(shape)
    if not -len(shape) <= axis < len(shape):
        raise _Wrong(f"its axis is {axis}, of a weight of {len(shape)} axes")
    blocks = Blocks(shape, axis % len(shape), block)
    expected = blocks.grid if block else (shape[axis],)
    if block < 0 or scales != expected:
        raise _Wrong(f"its scales are {list(scales)}, and axis {axis} in blocks of {block} needs {list(expected)}")
    return blocks


def _matmul_nbits(node: ir.Node) -> Operand:
    bits, block = _int(node, "bits", 4), _int(node, "block_size", 0)
    rows, columns = _int(node, "N", 0), _int(node, "K", 0)
    if _int(node, "weight_prepacked", 0):
        raise _Wrong("its weight is prepacked for one execution provider")
    if bits not in (2, 4, 8) or block < 8 or rows < 1 or columns < 1 or block * bits % 8:
        raise _Wrong(f"{bits} bits in blocks of {block} for N={rows}, K={columns} are not what loracc can pack")
    codes, scales, zeros = _required(node, 1), _required(node, 2), _tensor(node, 3)
    count = -(-columns // block)
    blob = block * bits // 8
    _expect(codes, ((rows, count, blob), (rows, count * blob)), ir.DataType.UINT8, "packed codes")
    if math.prod(dims(scales)) != rows * count or not is_float(scales.dtype):
        raise _Wrong(f"its scales are {scales.dtype.name}{list(dims(scales))}, expected [{rows}, {count}]")
    _check_group_index(node, columns, block)
    if zeros is None and _given(node, 3):
        raise _Wrong("its zero points are computed in the graph")
    if zeros is not None and not (is_float(zeros.dtype) and math.prod(dims(zeros)) == rows * count):
        packed = -(-count * bits // 8)
        _expect(zeros, ((rows, packed), (rows * packed,)), ir.DataType.UINT8, "packed zero points")
    blocks = Blocks((rows, columns), 1, block)
    weight = EncodedWeight(
        _name(node, 1), node.op_type, codes, scales, zeros, blocks, bits, packed=True, default_zero=1 << bits - 1
    )
    return Operand(weight, _parts(node, 1, 2, 3), turned=True)


def _check_group_index(node: ir.Node, columns: int, block: int) -> None:
    """``g_idx`` may give every column a block of its own choice (GPTQ's act-order): only the usual one is read."""
    if not _given(node, 4):
        return
    groups = _tensor(node, 4)
    if groups is None or not np.array_equal(groups.numpy().ravel()[:columns], np.arange(columns) // block):
        raise _Wrong("its g_idx puts columns into blocks out of order (act-order): requantize without")


def _gather_block_quantized(node: ir.Node) -> Operand:
    codes, scales, zeros = _required(node, 0), _required(node, 2), _tensor(node, 3)
    packed = codes.dtype == ir.DataType.UINT8
    bits = _int(node, "bits", 4) if packed else codes.dtype.bitwidth
    block, rank = _int(node, "block_size", 128), len(dims(codes))
    if rank != 2 or _int(node, "gather_axis", 0) % rank != 0 or _int(node, "quantize_axis", 1) % rank != 1:
        raise _Wrong("only a matrix that is looked up by its rows and quantized along them is read")
    if bits not in (2, 4, 8) or not codes.dtype.is_integer() or codes.dtype.bitwidth > 8:
        raise _Wrong(f"codes are {bits} bits of {codes.dtype.name}")
    rows, width = dims(codes)
    blocks = Blocks((rows, width * 8 // bits if packed else width), 1, block)
    if dims(scales) != blocks.grid or not is_float(scales.dtype):
        raise _Wrong(f"its scales are {scales.dtype.name}{list(dims(scales))}, expected {list(blocks.grid)}")
    if zeros is not None:
        count = blocks.grid[1]
        expected = (rows, -(-count * bits // 8)) if packed else blocks.grid
        _expect(zeros, (expected,), codes.dtype, "zero points")
    elif _given(node, 3):
        raise _Wrong("its zero points are computed in the graph")
    default = 1 << bits - 1 if packed else 0
    weight = EncodedWeight(
        _name(node, 0), node.op_type, codes, scales, zeros, blocks, bits, packed=packed, default_zero=default
    )
    return Operand(weight, _parts(node, 0, 2, 3))


def _dynamic_quantize_matmul(node: ir.Node) -> Operand:
    codes, scales, zeros = _required(node, 1), _required(node, 2), _tensor(node, 3)
    shape = dims(codes)
    if len(shape) != 2 or codes.dtype not in (ir.DataType.INT8, ir.DataType.UINT8):
        raise _Wrong(f"its weight is {codes.dtype.name}{list(shape)}, expected a matrix of int8 or uint8")
    per_column = dims(scales) == (shape[1],) and shape[1] != 1
    if not per_column and math.prod(dims(scales)) != 1:
        raise _Wrong(f"its scales are {list(dims(scales))}, expected one, or one for each of {shape[1]} columns")
    if zeros is None and _given(node, 3):
        raise _Wrong("its zero points are computed in the graph")
    if zeros is not None:
        _expect(zeros, (dims(scales),), codes.dtype, "zero points")
    blocks = Blocks(shape, 1 if per_column else None)
    weight = EncodedWeight(_name(node, 1), node.op_type, codes, scales, zeros, blocks, 8)
    return Operand(weight, _parts(node, 1, 2, 3))


#: (domain, operator) -> (reader, which input has the codes).
_RULES: Mapping[tuple[str, str], tuple[Callable[[ir.Node], Operand | None], int]] = {
    ("", "DequantizeLinear"): (_dequantize_linear, 0),
    ("com.microsoft", "DequantizeLinear"): (_dequantize_linear, 0),
    ("com.microsoft", "MatMulNBits"): (_matmul_nbits, 1),
    ("com.microsoft", "GatherBlockQuantized"): (_gather_block_quantized, 0),
    ("com.microsoft", "DynamicQuantizeMatMul"): (_dynamic_quantize_matmul, 1),
}


def _expect(tensor: ir.TensorProtocol, shapes: tuple[tuple[int, ...], ...], dtype: ir.DataType, what: str) -> None:
    if tensor.dtype != dtype or dims(tensor) not in shapes:
        raise _Wrong(f"its {what} are {tensor.dtype.name}{list(dims(tensor))}, expected {dtype.name}{list(shapes[0])}")


def _given(node: ir.Node, index: int) -> bool:
    return index < len(node.inputs) and node.inputs[index] is not None


def _tensor(node: ir.Node, index: int) -> ir.TensorProtocol | None:
    """The constant at an input: an initializer's value that no caller can override."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or not value.is_initializer() or value.is_graph_input() or value.is_graph_output():
        return None
    return value.const_value


def _required(node: ir.Node, index: int) -> ir.TensorProtocol:
    tensor = _tensor(node, index)
    if tensor is None:
        raise _Wrong(f"its input {index} is no constant of the graph")
    return tensor


def _name(node: ir.Node, index: int) -> str:
    value = node.inputs[index]
    return str(value.name) if value is not None else ""


def _parts(node: ir.Node, codes: int, scales: int, zeros: int) -> dict[str, int]:
    parts = {"codes": codes, "scales": scales}
    return {**parts, "zeros": zeros} if _given(node, zeros) else parts


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None and attribute.type == ir.AttributeType.INT else default
