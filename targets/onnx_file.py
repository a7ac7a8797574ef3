"""The ``.onnx`` target: a graph, with its weights inside or in one data file beside it.

Layout of the data file: tensors in the graph's order, each at a multiple of 64 bytes (of 4096 from 64 KiB on, so that a
runtime maps it and a file system can share it). Tensors below 1 KiB stay in the graph file: shapes, axes and scalars
that a runtime wants while it reads the graph. No time, path or version of anything is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import onnx_ir as ir

from loracc.errors import InputError, UnsupportedError, unwrapped
from loracc.passes.encode_weights import encoded
from loracc.progress import Progress
from loracc.streaming import OutputFile, Segment
from loracc.targets.linked_data import check_linked, check_sources, location_in
from loracc.targets.plan import WritePlan, aligned, computed_bytes
from loracc.tensors import dims, lies_in_file, read_rows

__all__ = ["EXTERNAL", "data_name", "plan_onnx", "stamp", "write_onnx"]

#: ``external``: by size, in the graph file, in a data file, or where the base has them.
EXTERNAL = ("auto", "inline", "data", "link")
#: Weights above this go to a data file: writing them inline takes three times their size in memory.
INLINE_BYTES = 64 << 20
#: Protobuf's limit, with room for the graph.
_PROTO_BYTES = (2 << 30) - (1 << 20)
#: Tensors of fewer bytes are always inline.
_SMALL_BYTES = 1024
_ALIGNMENT, _PAGE_ALIGNMENT, _PAGED_BYTES = 64, 4096, 64 << 10


def data_name(path: Path) -> str:
    """Name of the data file beside ``path``: ``out.onnx`` -> ``out.onnx.data``."""
    return f"{path.name}.data"


def write_onnx(
    model: ir.Model, path: Path, *, external: str = "auto", progress: Progress | None = None, workers: int | None = None
) -> None:
    """Write a model; folds are computed while they are written. ``model`` is left as it is.

    Args:
        model: What to write.
        path: The ``.onnx`` file; the data file goes beside it. Put it in place with :class:`loracc.staging.Staging`.
        external: "inline", "data", "auto" (a data file where the weights exceed 64 MiB) or "link": what did not change
            stays in the base's data file, which must lie in the output's folder: :mod:`loracc.targets.linked_data`.
        progress: Told of the bytes of the data file.
        workers: See :func:`loracc.streaming.write_files`.

    Raises:
        InputError: Inline weights of 2 GiB or more, or a source file that cannot be read.
        NumericsError: A folded weight is not finite.
    """
    plan_onnx(model, path, external=external).write(progress, workers=workers)


def plan_onnx(model: ir.Model, path: Path, *, external: str = "auto", home: Path | None = None) -> WritePlan:
    """What :func:`write_onnx` will write; nothing is read or computed yet.

    Args:
        model: See there.
        path: Where it is written.
        external: See there.
        home: The folder it will lie in once it is in place, where that is not the folder of ``path``.
    """
    if external not in EXTERNAL:
        raise ValueError(f"external is {external!r}, expected one of {', '.join(EXTERNAL)}")
    named, model = model, encoded(model)
    tensors = {value: tensor for value in initializers(model) if (tensor := value.const_value) is not None}
    total = sum(tensor.nbytes for tensor in tensors.values())
    inline = total <= INLINE_BYTES if external == "auto" else external == "inline"
    if inline and total > _PROTO_BYTES:
        raise InputError(
            f"{path}: {total:,} bytes of weights do not fit into one .onnx file: protobuf's limit is 2 GiB.",
            hint="Write them to a data file: --data data.",
        )
    home = home or path.parent
    check_sources(tensors.values(), [home / path.name, home / data_name(path)])
    layout = _Layout(data_name(path))
    for value, tensor in tensors.items():
        if inline or not _fits_outside(tensor):
            continue
        location = location_in(home, tensor) if external == "link" else None
        if location is None:
            layout.append(value, tensor)
        else:
            layout.refer(value, tensor, location)
    if external == "link":
        check_linked(path.name, home, tensors.values(), layout.borrowed)
    file = OutputFile(path.with_name(data_name(path)), layout.end, tuple(layout.segments))
    staged = {} if home == path.parent else {path.parent / name: home / name for name in sorted(layout.borrowed)}
    return WritePlan(
        weights=(file,) if layout.segments else (),
        small={path: lambda: graph_bytes(_stamped_as(named, model), layout.places, path)},
        links=staged,
        nbytes=layout.end + sum(tensor.nbytes for value, tensor in tensors.items() if value not in layout.places),
        folded=computed_bytes(list(tensors.values())),
    )


def _stamped_as(named: ir.Model, model: ir.Model) -> ir.Model:
    """``model`` with what has been stamped on ``named`` since it was copied from it."""
    if model is not named:
        model.producer_name, model.producer_version = named.producer_name, named.producer_version
        model.metadata_props.update(named.metadata_props)
    return model


class _Layout:
    """Which tensors lie outside the graph file, and where."""

    def __init__(self, data: str) -> None:
        self.places: dict[ir.Value, ir.TensorProtocol] = {}
        self.segments: list[Segment] = []
        self.borrowed: set[str] = set()
        self.end = 0
        self._data = data

    def append(self, value: ir.Value, tensor: ir.TensorProtocol) -> None:
        """The tensor goes into the data file."""
        offset = aligned(self.end, _PAGE_ALIGNMENT if tensor.nbytes >= _PAGED_BYTES else _ALIGNMENT)
        self.segments.append(Segment(offset, tensor))
        self.places[value] = _reference(value, tensor, self._data, offset)
        self.end = offset + tensor.nbytes

    def refer(self, value: ir.Value, tensor: ir.ExternalTensor | ir.TensorProtocol, location: str) -> None:
        """The tensor stays where it is."""
        offset = tensor.offset if isinstance(tensor, ir.ExternalTensor) else None
        self.places[value] = _reference(value, tensor, location, offset or 0)
        self.borrowed.add(location)


def stamp(model: ir.Model, provenance: Mapping[str, str]) -> None:
    """Record in the model's metadata how it was made: ``loracc.<key>``, in the order of the keys.

    Anything may be recorded that is the same for the same inputs: digests, names, versions; never a time or a path.
    """
    model.producer_name = "loracc"
    model.producer_version = None
    for key in sorted(provenance):
        model.metadata_props[f"loracc.{key}"] = provenance[key]


def initializers(model: ir.Model) -> Iterator[ir.Value]:
    """Every initializer of the graph, its subgraphs and its functions' subgraphs."""
    for graph in model.graphs():
        yield from graph.initializers.values()
    for function in model.functions.values():
        for graph in function.subgraphs():
            yield from graph.initializers.values()


def graph_bytes(model: ir.Model, places: Mapping[ir.Value, ir.TensorProtocol], path: Path) -> bytes:
    """The serialized graph, with the tensors of ``places`` by reference and all others inside."""
    _check_attributes(model)
    with _swapped(model, places), unwrapped():
        proto = ir.serde.serialize_model(model)
    if proto.ByteSize() >= 2 << 30:
        raise InputError(f"{path}: the graph exceeds protobuf's limit of 2 GiB.", hint="Use --data data.")
    return bytes(proto.SerializeToString(deterministic=True))


@contextmanager
def _swapped(model: ir.Model, places: Mapping[ir.Value, ir.TensorProtocol]) -> Iterator[None]:
    """Inside the block the model has references where ``places`` says so, and loaded tensors elsewhere."""
    before = {value: value.const_value for value in initializers(model)}
    try:
        for value, tensor in before.items():
            if value in places:
                value.const_value = places[value]
            elif isinstance(tensor, ir.ExternalTensor):
                value.const_value = _loaded(tensor)
        yield
    finally:
        for value, tensor in before.items():
            value.const_value = tensor


def _loaded(tensor: ir.ExternalTensor) -> ir.Tensor[Any]:
    shape = dims(tensor)
    array: Any = read_rows(tensor, 0, shape[0] if shape else 1) if lies_in_file(tensor) else tensor.numpy()
    return ir.Tensor(array, dtype=tensor.dtype, name=tensor.name, doc_string=tensor.doc_string)


def _reference(value: ir.Value, tensor: ir.TensorProtocol, location: str, offset: int) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        location,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(dims(tensor)),
        name=str(value.name),
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _fits_outside(tensor: ir.TensorProtocol) -> bool:
    return tensor.nbytes >= _SMALL_BYTES and tensor.dtype != ir.DataType.STRING


def _check_attributes(model: ir.Model) -> None:
    """A tensor of a node's attribute is written inside; one that lies in a file would become a dangling reference."""
    nodes = chain(model.graph.all_nodes(), *(function.all_nodes() for function in model.functions.values()))
    for node in nodes:
        for attribute in node.attributes.values():
            if isinstance(attribute.value, ir.ExternalTensor):
                raise UnsupportedError(
                    f"node {node.name!r} ({node.op_type}): its attribute {attribute.name!r} lies in the file "
                    f"{os.fspath(attribute.value.location)!r}; only initializers may.",
                    hint="Turn such constants into initializers and export again.",
                )
