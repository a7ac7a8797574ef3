"""The ``.pt2`` target: the base's own archive again, with other numbers in its weights.

1. From a ``.pt2`` file nothing of torch is used: the archive is copied, each folded weight's record is written in the
   parameter's own orientation, and the checksums are put right. Every other byte is the base's.
2. Any other PyTorch model is saved as a ``.pt2`` file first and read again (:func:`saved_program`), so that the output
   is compared with a base that went the same way.

A fold that changes more than values cannot be written so and is refused: another dtype, a tie that is broken, LoRA
branches that were lifted out of the graph.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from loracc.errors import UnsupportedError
from loracc.folded import Binding, FoldedTensor
from loracc.model import BaseModel, LoadOptions
from loracc.progress import Progress
from loracc.quiet import quiet
from loracc.sites import Layout, Site
from loracc.sources.pt2_archive import Payload, Pt2Archive, Record
from loracc.streaming import OutputFile, Segment
from loracc.targets.plan import WritePlan
from loracc.targets.zip_checksums import update_checksums
from loracc.tensors import PermutedTensor, dims, file_tensor

__all__ = ["plan_exported_program", "saved_program", "write_exported_program"]

_HINT = "Write .onnx: there the graph is loracc's own."


def write_exported_program(
    model: BaseModel, path: Path, *, progress: Progress | None = None, workers: int | None = None
) -> None:
    """Write the folded program.

    Raises:
        UnsupportedError: The model is no PyTorch program, or the fold changes more than values.
        NumericsError: A folded weight is not finite.
    """
    plan_exported_program(model, path).write(progress, workers=workers)


def plan_exported_program(model: BaseModel, path: Path) -> WritePlan:
    """What :func:`write_exported_program` will write."""
    parameters = list(_parameters(model))
    if isinstance(model.origin, Pt2Archive):
        return _plan(model.origin, parameters, path)
    raise UnsupportedError(
        f"{model.path}: a .pt2 file holds a PyTorch program, and this model is none ({model.format}).", hint=_HINT
    )


@contextmanager
def saved_program(model: BaseModel, beside: Path) -> Iterator[BaseModel]:
    """The model as the ``.pt2`` file that it would be (rule 2); the file is there inside the block only.

    Args:
        model: A traced PyTorch model; one that is a ``.pt2`` file already, or no program at all, is given back.
        beside: The output, in whose folder the file is made.
    """
    if not hasattr(model.origin, "graph_signature"):
        yield model
        return
    import torch

    from loracc.sources.exported_program import load_exported_program

    with tempfile.TemporaryDirectory(prefix=f".{beside.name}.base.", dir=beside.parent) as folder:
        path = Path(folder, beside.name)
        with quiet("torch"):
            torch.export.save(model.origin, path)
        saved = load_exported_program(path, LoadOptions())
        yield replace(
            saved,
            path=model.path,
            notes=model.notes,
            input_ranges=model.input_ranges,
            sample_inputs=model.sample_inputs or saved.sample_inputs,
            elsewhere=model.elsewhere,
        )


@dataclass(frozen=True)
class _Parameter:
    """A folded weight as the program holds it.

    Attributes:
        names: What the graph calls it; one of them is its name in the program's state dict.
        value: The fold, in the parameter's own orientation.
        source: Where the base's bytes lie, if in a file.
    """

    names: tuple[str, ...]
    value: FoldedTensor
    source: tuple[str, int] | None


@dataclass(frozen=True)
class _ArchivePlan(WritePlan):
    """Rule 1."""

    changed: frozenset[str] = frozenset()

    def write(
        self,
        progress: Progress | None = None,
        *,
        workers: int | None = None,
        also: Sequence[Callable[[], None]] = (),
    ) -> None:
        super().write(progress, workers=workers, also=also)
        update_checksums(self.weights[0].path, self.changed)


def _plan(archive: Pt2Archive, parameters: list[_Parameter], path: Path) -> WritePlan:
    values: dict[str, FoldedTensor] = {}
    for parameter in parameters:
        record = _record_of(archive, parameter)
        if record in values:
            raise _unsupported(parameter.names[0], "another folded weight shares its bytes")
        values[record] = parameter.value
    size = archive.path.stat().st_size
    segments: list[Segment] = []
    at = 0
    for record, value in sorted(values.items(), key=lambda item: archive.records[item[0]].offset):
        span = archive.records[record]
        segments += [Segment(at, _bytes_of(archive.path, at, span.offset)), Segment(span.offset, value)]
        at = span.offset + span.nbytes
    segments.append(Segment(at, _bytes_of(archive.path, at, size)))
    return _ArchivePlan(
        weights=(OutputFile(path, size, tuple(segments)),),
        nbytes=size,
        folded=sum(value.nbytes for value in values.values()),
        changed=frozenset(f"{archive.root}/{record}" for record in values),
    )


def _bytes_of(path: Path, start: int, stop: int) -> ir.TensorProtocol:
    return file_tensor(path, start, stop - start, ir.DataType.UINT8, (stop - start,), path.name)


def _record_of(archive: Pt2Archive, parameter: _Parameter) -> str:
    """The member that holds the parameter's bytes and nothing else: by its place in this very file, else by name."""
    places = {(str(archive.path.resolve()), record.offset): name for name, record in archive.records.items()}
    record = places.get(parameter.source) if parameter.source else None
    candidates = [
        payload
        for name, payload in archive.weights.items()
        if (payload.record == record if record else name in parameter.names)
    ]
    for payload in candidates:
        if _holds(payload, archive.records[payload.record], parameter.value):
            return payload.record
    raise _unsupported(parameter.names[0], "the program holds no such parameter as a tensor of its own")


def _holds(payload: Payload, record: Record, value: FoldedTensor) -> bool:
    return payload.plain and payload.shape == dims(value) and record.nbytes == value.nbytes


def _parameters(model: BaseModel) -> Iterator[_Parameter]:
    """The folded weights; initializers that are views of one base tensor are one parameter."""
    views: dict[object, list[tuple[str, ir.TensorProtocol]]] = {}
    for value in model.ir.graph.initializers.values():
        if value.const_value is not None:
            base, _ = _unturned(value.const_value)
            views.setdefault(_identity(base), []).append((str(value.name), value.const_value))
    for members in views.values():
        if any(isinstance(tensor, FoldedTensor) for _, tensor in members):
            yield _parameter(members)


def _parameter(members: list[tuple[str, ir.TensorProtocol]]) -> _Parameter:
    name = members[0][0]
    base, _ = _unturned(members[0][1])
    changes = [_own_bindings(tensor) for _, tensor in members]
    for member, tensor in members:
        if isinstance(tensor, FoldedTensor) and tensor.dtype != base.dtype:
            raise _unsupported(member, f"it would change from {base.dtype.name} to {tensor.dtype.name}")
    if any(binding.way == "graph" for binding in changes[0]):
        raise _unsupported(name, "the program computes its LoRA branch itself, and only the graph was rid of it")
    if any(_facts(own) != _facts(changes[0]) for own in changes):
        raise _unsupported(name, f"the program ties it to {members[-1][0]!r}, and the adapter changes only one of them")
    source = (str(Path(base.path).resolve()), base.offset or 0) if isinstance(base, ir.ExternalTensor) else None
    names = dict.fromkeys([*(member for member, _ in members), *(binding.site.name for binding in changes[0])])
    return _Parameter(tuple(names), FoldedTensor(base, changes[0]), source)


def _unturned(tensor: ir.TensorProtocol) -> tuple[ir.TensorProtocol, tuple[int, ...]]:
    """The parameter as the program holds it, and the axes of it that the graph's tensor has."""
    inner = tensor.base if isinstance(tensor, FoldedTensor) else tensor
    if isinstance(inner, PermutedTensor):
        return inner.base, inner.perm
    return inner, tuple(range(len(dims(inner))))


def _identity(tensor: ir.TensorProtocol) -> object:
    if isinstance(tensor, ir.ExternalTensor):
        return tensor.path, tensor.offset or 0, tensor.nbytes
    raw = tensor.raw if isinstance(tensor, ir.Tensor) else None
    pointer = getattr(raw, "data_ptr", None)
    return pointer() if pointer is not None else id(tensor)


def _own_bindings(tensor: ir.TensorProtocol) -> tuple[Binding, ...]:
    """The tensor's bindings, on the parameter's own axes."""
    if not isinstance(tensor, FoldedTensor):
        return ()
    _, turned = _unturned(tensor)
    return tuple(replace(binding, site=_own_site(binding.site, turned)) for binding in tensor.bindings)


def _own_site(site: Site, turned: tuple[int, ...]) -> Site:
    layout = site.layout
    perm = tuple(turned[axis] for axis in layout.perm or range(len(turned)))
    own = () if perm == tuple(range(len(perm))) else perm
    return replace(site, layout=Layout(own, layout.start, layout.stop))


def _facts(bindings: tuple[Binding, ...]) -> list[tuple[int, Layout]]:
    return [(id(binding.delta), binding.site.layout) for binding in bindings]


def _unsupported(name: str, reason: str) -> UnsupportedError:
    return UnsupportedError(f"{name}: cannot be changed in the .pt2 program: {reason}.", hint=_HINT)
