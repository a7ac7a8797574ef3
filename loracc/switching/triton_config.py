"""``config.pbtxt`` of NVIDIA Triton Inference Server: a ModelConfig message in protobuf's text format.

Written by a few lines of our own; tests parse it back with the message class that tritonclient carries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from loracc.errors import UnsupportedError

__all__ = ["TritonSettings", "batch_symbol", "model_config"]

_TYPES = {
    ir.DataType.BOOL: "TYPE_BOOL",
    ir.DataType.UINT8: "TYPE_UINT8",
    ir.DataType.UINT16: "TYPE_UINT16",
    ir.DataType.UINT32: "TYPE_UINT32",
    ir.DataType.UINT64: "TYPE_UINT64",
    ir.DataType.INT8: "TYPE_INT8",
    ir.DataType.INT16: "TYPE_INT16",
    ir.DataType.INT32: "TYPE_INT32",
    ir.DataType.INT64: "TYPE_INT64",
    ir.DataType.FLOAT16: "TYPE_FP16",
    ir.DataType.BFLOAT16: "TYPE_BF16",
    ir.DataType.FLOAT: "TYPE_FP32",
    ir.DataType.DOUBLE: "TYPE_FP64",
    ir.DataType.STRING: "TYPE_STRING",
}
_FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}


@dataclass(frozen=True)
class TritonSettings:
    """How the server is to run the models.

    Attributes:
        backend: "onnxruntime" or "tensorrt".
        max_batch: Largest batch that the server puts together, where the first axis is a batch axis.
        queue_microseconds: How long a request may wait for others.
        profiles: ``NAME:MIN:OPT:MAX`` for the engines of "tensorrt".
        flavor: Which TensorRT builds them; Triton runs only plans of "tensorrt".
    """

    backend: str = "onnxruntime"
    max_batch: int = 8
    queue_microseconds: int = 100
    profiles: Sequence[str] = ()
    flavor: str = "tensorrt"

    @property
    def file(self) -> str:
        """Name of the model's file in a version's folder."""
        return _FILES[self.backend]


def batch_symbol(model: ir.Model) -> str | None:
    """The symbol that is the first axis of every input and every output; None where there is no such one.

    That makes it a batch axis in shape only: whether rows are independent has to be tried.
    """
    firsts = set()
    for value in (*fed(model), *model.graph.outputs):
        dim = value.shape[0] if value.shape is not None and len(value.shape) else None
        firsts.add(dim.value if isinstance(dim, ir.SymbolicDim) else None)
    symbol = firsts.pop() if len(firsts) == 1 else None
    return str(symbol) if symbol else None


def fed(model: ir.Model) -> list[ir.Value]:
    """The inputs without a default."""
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def model_config(name: str, model: ir.Model, settings: TritonSettings, *, batched: bool, made_of: str) -> str:
    """The text of ``config.pbtxt``.

    Args:
        name: The entry's name, which is its folder's.
        model: Its inputs and outputs.
        settings: See there.
        batched: The first axis of everything is a batch axis; only then does the server batch.
        made_of: What is in it, as a parameter that the server shows.

    Raises:
        UnsupportedError: An input or output is of a type that the server has not.
    """
    lines = [
        f"name: {_quoted(name)}",
        f"backend: {_quoted(settings.backend)}",
        f"default_model_filename: {_quoted(settings.file)}",
        f"max_batch_size: {settings.max_batch if batched else 0}",
    ]
    lines += [_port("input", value, batched=batched) for value in fed(model)]
    lines += [_port("output", value, batched=batched) for value in model.graph.outputs]
    lines.append("version_policy { latest { num_versions: 1 } }")
    if batched:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {settings.queue_microseconds} }}")
    lines.append(f"parameters {{ key: {_quoted('loracc')} value {{ string_value: {_quoted(made_of)} }} }}")
    return "\n".join(lines) + "\n"


def _port(kind: str, value: ir.Value, *, batched: bool) -> str:
    """One input or output; the batch axis is not among its dims, and a scalar is one element reshaped."""
    if value.dtype not in _TYPES or value.shape is None:
        raise UnsupportedError(
            f"{kind} {value.name!r} is {value.dtype} of shape {value.shape}: Triton has no such type."
        )
    dims = [dim if isinstance(dim, int) else -1 for dim in value.shape][1 if batched else 0 :]
    shape = f"dims: [ {', '.join(map(str, dims))} ]" if dims else "dims: [ 1 ] reshape { shape: [ ] }"
    return f"{kind} {{ name: {_quoted(str(value.name))} data_type: {_TYPES[value.dtype]} {shape} }}"


def _quoted(text: str) -> str:
    """A string of the text format: bytes that are not plain ASCII in octal."""
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in text.encode())
    return f'"{"".join(plain)}"'
