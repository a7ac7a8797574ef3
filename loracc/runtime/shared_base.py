"""The base of a deployment, opened once: its graph, and its data files mapped into memory for all sessions.

After :class:`SharedBase` has been made nothing is read from the base's files by name any more: they may be deleted or
replaced, and every variant is still folded from, and shares, the bytes that were checked. (A file that is *truncated in
place* takes its mapped pages with it, as for any program that maps it: replace files, never overwrite them.)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array
from loracc.errors import InputError
from loracc.folded import Binding
from loracc.model import BaseModel, LoadOptions
from loracc.passes.encode_weights import encoded
from loracc.rows import give_back, mapped
from loracc.runtime.manifest import Manifest, contained
from loracc.runtime.mapped_files import MappedFiles
from loracc.runtime.variant_graph import variant_graph
from loracc.sources.onnx_model import load_onnx
from loracc.targets.linked_data import files_of
from loracc.targets.onnx_file import graph_bytes, initializers
from loracc.tensors import dims

__all__ = ["SessionSource", "SharedBase"]

#: Changed weights of fewer bytes are written into the graph.
_INLINE_BYTES = 1024
#: Weights folded at a time.
_WORKERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class SessionSource:
    """What a session is made of.

    Attributes:
        graph: The serialized graph; every large weight is a reference into one of ``files``.
        files: By the name the graph has for them: the base's data files, mapped, and each weight of the variant's own.
    """

    graph: bytes
    files: dict[str, Array]


class SharedBase:
    """See the module's docstring.

    Args:
        path: The manifest's path.
        manifest: What it says.
        verify: Read the data files whole to check them.

    Raises:
        InputError: A file is missing, or not the one that the manifest was made for.
    """

    def __init__(self, path: Path, manifest: Manifest, *, verify: bool = False) -> None:
        # One pool for all loads: every new thread may make the C library open another heap.
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="loracc-fold")
        graph = contained(path, manifest.graph.path)
        manifest.graph.check(graph, whole=True)
        self._content = graph.read_bytes()
        real = {file.path: contained(path, file.path) for file in manifest.weights}
        for file in manifest.weights:
            file.check(real[file.path], whole=verify)
        files = {name: mapped(file) for name, file in real.items()}
        self._mapped = MappedFiles(files, {str(file): name for name, file in real.items()})
        self.model: BaseModel = load_onnx(graph, LoadOptions())
        _check_named(path, self.model.ir, set(map(str, real.values())))
        self._mapped.put_under(self.model.ir)

    def base(self) -> SessionSource:
        """The base itself: the file's own bytes."""
        return SessionSource(self._content, dict(self._mapped.files))

    def variant(self, bindings: Sequence[Binding]) -> SessionSource:
        """The base with deltas folded in; computed here.

        Raises:
            NumericsError: A folded weight is not finite.
        """
        graph = encoded(variant_graph(self.model.ir, self.model.sites, bindings))
        places: dict[ir.Value, ir.TensorProtocol] = {}
        own: dict[str, ir.TensorProtocol] = {}
        for value in initializers(graph):
            tensor = value.const_value
            if tensor is None:
                continue
            if (place := self._mapped.place_of(tensor)) is not None:
                places[value] = _reference(value, tensor, *place)
            elif isinstance(tensor, ir.LazyTensor) and tensor.nbytes >= _INLINE_BYTES:
                file = f"{len(own)}.changed"
                own[file] = tensor
                places[value] = _reference(value, tensor, file, 0)
        changed = dict(zip(own, self._pool.map(_bytes_of, own.values()), strict=True))
        return SessionSource(graph_bytes(graph, places, self.model.path), {**self._mapped.files, **changed})

    def release(self) -> None:
        """Let the system have the pages that sessions have packed into copies; they are read again on demand."""
        for data in self._mapped.files.values():
            give_back(data)


def _check_named(path: Path, model: ir.Model, files: set[str]) -> None:
    """Every data file of the graph is one that the manifest vouches for."""
    for tensor in (value.const_value for value in initializers(model)):
        for file in files_of(tensor) if tensor is not None else ():
            if os.path.realpath(file) not in files:
                raise InputError(
                    f"{path}: the graph's weights lie in {file}, which the manifest does not name.",
                    hint="Restore the manifest, or attach the adapters again.",
                )


def _bytes_of(tensor: ir.TensorProtocol) -> Array:
    """A tensor computed, as bytes."""
    if tensor.dtype.bitwidth < 8:
        return np.frombuffer(tensor.tobytes(), np.uint8)
    array: Array = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
    return array


def _reference(value: ir.Value, tensor: ir.TensorProtocol, location: str, offset: int) -> ir.ExternalTensor:
    shape = ir.Shape(dims(tensor))
    return ir.ExternalTensor(location, offset, tensor.nbytes, tensor.dtype, shape=shape, name=str(value.name))
