"""``loracc slot``: one slot of a graph of ``attach --as batched`` gets another adapter, in place.

Nothing else of the graph or its data file is written. What lies in the ``.onnx`` is replaced by renaming a new file
over it. What lies in the data file is written where it is, and a crash may leave half of it: before the first byte the
slot's name in the graph's record becomes "(being written)", and the adapter's name only when all of it is on the
disk.

A session that was opened before may see the old slot, the new one or a mixture; open a new one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from loracc.binding import bind_each, read_adapters
from loracc.dtypes import Array
from loracc.errors import InputError
from loracc.folded import Binding
from loracc.formats import parse_adapter_spec
from loracc.manifest import MANIFEST_KEY, Manifest, weights_digest
from loracc.manifest_check import check_manifest, check_places
from loracc.model import BaseModel, LoadOptions
from loracc.passes.delta_nodes import PREFIX
from loracc.passes.delta_points import refuse_other_kinds
from loracc.sites import SiteTable
from loracc.slot_layout import Index, slot_parts, slot_places
from loracc.sources import load_model

__all__ = ["SlotResult", "fill_slot"]

UNFINISHED = "(being written)"


@dataclass(frozen=True)
class SlotResult:
    """What was done.

    Attributes:
        output: The graph.
        slot: The slot's number.
        adapter: Name of the adapter in it, "" when it was cleared.
        rank: The adapter's largest rank; the slots have room for ``room``.
        sites: How many sites the adapter changes.
        bytes: Bytes written for the slot.
        notes: What the user should know.
    """

    output: str
    slot: int
    adapter: str
    rank: int
    room: int
    sites: int
    bytes: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "notes": list(self.notes)}


def fill_slot(
    output: str | os.PathLike[str],
    slot: int,
    adapter: str | os.PathLike[str] | None,
    *,
    maps: Sequence[str] = (),
    allow_unmatched: bool = False,
    **told: Any,
) -> SlotResult:
    """Put an adapter into a slot.

    Args:
        output: A graph that ``attach --as batched`` wrote.
        slot: Which, from 0.
        adapter: ``NAME=PATH@WEIGHT``; None clears the slot: it is the base then.
        maps, allow_unmatched: As for :func:`loracc.attach`.
        told: Fields of :class:`loracc.formats.AdapterOptions`.

    Raises:
        LoraccError: No such graph or slot; the graph's weights are not those it was made with; the adapter does not
            fit: its rank is larger than the slots', it has sites that the graph has not, or is not of low rank.
    """
    path = Path(output)
    model = load_model(path, LoadOptions())
    manifest = Manifest.from_metadata(model.ir.metadata_props, path)
    _check_graph(path, model, manifest, slot)
    model = replace(model, sites=SiteTable(s for s in model.sites if s.initializer not in manifest.parameters))
    bindings: list[Binding] = []
    name, notes = "", list[str]()
    if adapter is not None:
        [read] = read_adapters([parse_adapter_spec(str(adapter))], told, combine=None, density=None, rank=None, seed=0)
        [bound] = bind_each(model, [read], maps, allow_unmatched)
        refuse_other_kinds(bound.bindings)
        _refuse_other_sites(path, manifest, bound.bindings)
        check_places(manifest, bound.bindings, path)
        bindings, name, notes = bound.bindings, read.name, bound.notes
    parts = slot_parts(manifest, bindings, manifest.rank)
    written = _write(path, model, manifest, slot, name, parts)
    rank = max((int(binding.delta.rank or 0) for binding in bindings), default=0)
    return SlotResult(str(path), slot, name, rank, manifest.rank, len(bindings), written, tuple(notes))


def _check_graph(path: Path, model: BaseModel, manifest: Manifest, slot: int) -> None:
    if manifest.mode != "batched":
        raise InputError(f"{path}: attached as {manifest.mode}, which has no slots.", hint="Slots: --as batched.")
    if not 0 <= slot < len(manifest.slots):
        raise InputError(f"{path}: there is no slot {slot}.", hint=f"Its slots: 0 to {len(manifest.slots) - 1}.")
    check_manifest(manifest, model.ir, path)
    names = {str(name) for name in model.ir.graph.initializers}
    added = {name for name in names if name.startswith(PREFIX)} | set(manifest.parameters)
    if weights_digest(model.ir, frozenset(added)) != manifest.base:
        raise InputError(
            f"{path}: its weights are not those that it was made with: the adapters were attached to another base.",
            hint="Attach them to this one: loracc attach MODEL ADAPTER... --as batched -o OUT.onnx",
        )


def _refuse_other_sites(path: Path, manifest: Manifest, bindings: Sequence[Binding]) -> None:
    known = {place.site for branch in manifest.branches for _, place in branch.sites()}
    missing = [binding.site.name for binding in bindings if binding.site.name not in known]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} site(s) of the adapter have no branch in the graph: {', '.join(missing[:3])}"
            + (", ..." if len(missing) > 3 else "."),
            hint=f"The graph has branches at {len(known)} sites, those of the adapters it was made with. Attach again, "
            "with an adapter that has all of them.",
        )


def _write(path: Path, model: BaseModel, manifest: Manifest, slot: int, name: str, parts: Mapping[str, Array]) -> int:
    places = [
        (stack, where, parts[stack][own])
        for branch in manifest.branches
        for stack, where, own in slot_places(branch, len(manifest.slots), manifest.rank, slot)
    ]
    proto = onnx.load(str(path), load_external_data=False)
    inside = {tensor.name: tensor for tensor in proto.graph.initializer if tensor.data_location != tensor.EXTERNAL}
    outside = [place for place in places if place[0] not in inside]
    if outside:
        _record(proto, path, replace(manifest, slots=_renamed(manifest, slot, UNFINISHED)))
        for file in _write_outside(model, outside):
            _sync(file)
    for stack, where, part in places:
        if stack in inside:
            _write_inside(inside[stack], where, part)
    _record(proto, path, replace(manifest, slots=_renamed(manifest, slot, name)))
    return sum(part.nbytes for _, _, part in places)


def _renamed(manifest: Manifest, slot: int, name: str) -> tuple[str, ...]:
    return (*manifest.slots[:slot], name, *manifest.slots[slot + 1 :])


def _write_outside(model: BaseModel, places: Sequence[tuple[str, Index, Array]]) -> set[Path]:
    """Write into the data file where the stacks lie; nothing else of it is touched."""
    files: set[Path] = set()
    for stack, where, part in places:
        tensor = model.ir.graph.initializers[stack].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        shape = tuple(int(n) for n in tensor.shape.numpy())
        try:
            mapped = np.memmap(tensor.path, part.dtype, "r+", offset=tensor.offset or 0, shape=shape)
            mapped[where] = part
            mapped.flush()
        except OSError as error:
            raise InputError(
                f"{tensor.path}: cannot be written: {error.strerror or error}.",
                hint=f"The slot may be half written; its name is {UNFINISHED!r} now. Write it again, or --clear it.",
            ) from error
        files.add(Path(tensor.path))
    return files


def _write_inside(tensor: onnx.TensorProto, where: Index, part: Array) -> None:
    array = np.frombuffer(tensor.raw_data, part.dtype).reshape(tuple(tensor.dims)).copy()
    array[where] = part
    tensor.raw_data = array.tobytes()


def _record(proto: onnx.ModelProto, path: Path, manifest: Manifest) -> None:
    """Write the graph with another record, by renaming a new file over the old one; a link stays one."""
    for entry in proto.metadata_props:
        if entry.key == MANIFEST_KEY:
            entry.value = manifest.to_text()
    real = Path(os.path.realpath(path))
    aside: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=real.parent, prefix=f".{real.name}.", delete=False) as file:
            aside = Path(file.name)
            file.write(proto.SerializeToString())
        shutil.copymode(real, aside)
        _sync(aside)
        os.replace(aside, real)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}.") from error
    finally:
        if aside is not None:
            aside.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
