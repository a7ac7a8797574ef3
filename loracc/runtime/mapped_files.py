"""A graph's tensors on the bytes of its mapped data files, and where in those files a tensor lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array
from loracc.encodings.decoded import DecodedTensor
from loracc.passes.decode_weights import ORIGIN_KEY, Origin
from loracc.targets.onnx_file import initializers
from loracc.tensors import PermutedTensor, dims

__all__ = ["MappedFiles"]


class MappedFiles:
    """The data files of one graph.

    Args:
        files: Mapped bytes by the name that the graph has for the file.
        names: Those names by the files' real paths.
    """

    def __init__(self, files: Mapping[str, Array], names: Mapping[str, str]) -> None:
        self.files = dict(files)
        self._names = dict(names)

    def put_under(self, model: ir.Model) -> None:
        """Let every initializer of a graph, decoded ones included, read the mapped bytes in place of the files."""
        for value in initializers(model):
            if value.const_value is not None:
                value.const_value = self._mapped(value.const_value)
        for node in model.graph.all_nodes():
            if isinstance(origin := node.meta.get(ORIGIN_KEY), Origin):
                node.meta[ORIGIN_KEY] = self._origin(origin)

    def place_of(self, tensor: ir.TensorProtocol | None) -> tuple[str, int] | None:
        """(file, offset) of a tensor that lies in one of the files as it is; None for any other."""
        if isinstance(tensor, ir.ExternalTensor):
            return self._names[tensor.path], tensor.offset or 0
        if isinstance(tensor, PermutedTensor) and tensor.perm == tuple(range(len(tensor.perm))):
            return self.place_of(tensor.base)
        array = tensor.raw if isinstance(tensor, ir.Tensor | ir.PackedTensor) else None
        if not isinstance(array, np.ndarray) or not array.nbytes:
            return None
        start = array.ctypes.data
        for name, data in self.files.items():
            if 0 <= start - data.ctypes.data < len(data):
                return name, start - data.ctypes.data
        return None

    def _mapped(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        if isinstance(tensor, DecodedTensor):
            weight = tensor.weight
            codes, scales = self._mapped(weight.codes), self._mapped(weight.scales)
            zeros = self._mapped(weight.zeros) if weight.zeros is not None else None
            decoded = tensor.with_weight(replace(weight, codes=codes, scales=scales, zeros=zeros))
            if isinstance(tensor.origin, Origin):
                decoded.origin = self._origin(tensor.origin)
            return decoded
        if not isinstance(tensor, ir.ExternalTensor):
            return tensor
        data, offset = self.files[self._names[tensor.path]], tensor.offset or 0
        span = data[offset : offset + tensor.nbytes]
        if tensor.dtype.bitwidth < 8:
            return ir.PackedTensor(span, tensor.dtype, shape=tensor.shape, name=tensor.name)
        array: Array = span.view(tensor.dtype.numpy()).reshape(dims(tensor))
        if not array.flags.aligned:
            return tensor  # its file is read; nothing that loracc writes lies so
        return ir.Tensor(array, dtype=tensor.dtype, name=tensor.name)

    def _origin(self, origin: Origin) -> Origin:
        return replace(origin, inputs={at: (name, self._mapped(old)) for at, (name, old) in origin.inputs.items()})
