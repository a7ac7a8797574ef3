"""``attach --as inputs``: one graph, and an ``.onnx_adapter`` beside it for every adapter and every asked-for sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loracc.formats.runtime_adapter import write_runtime_adapter
from loracc.manifest import Manifest
from loracc.packed_factors import Packed, pack
from loracc.passes.attach_inputs import AttachInputsPass
from loracc.passes.delta_points import refuse_other_kinds
from loracc.proof.attached import Trial
from loracc.switching.lowered import attached_base, finished, write_attached
from loracc.switching.request import AttachRequest, AttachResult, union_of_sites
from loracc.switching.sums import Part, parse_sums, summed

__all__ = ["make"]


@dataclass(frozen=True)
class _File:
    """One ``.onnx_adapter``: what adds up in it, and as which parameters."""

    name: str
    parts: tuple[Part, ...]
    packed: Packed

    @property
    def file(self) -> str:
        return f"{self.name}.onnx_adapter"


def make(request: AttachRequest) -> AttachResult:
    """Attach, verify, and move the graph and the adapters into place."""
    for one in request.bound:
        refuse_other_kinds(one.bindings)
    base = attached_base(request)
    attaching = AttachInputsPass(union_of_sites(request.base, request.bound), base.digest)
    attaching(base.graph)
    graph = finished(base, request)
    manifest = attaching.manifest
    made = _files(request, manifest)

    def others(folder: Path) -> None:
        for one in made:
            write_runtime_adapter(folder / one.file, one.packed.parameters, manifest)

    trials = [Trial(one.name, summed(one.parts), adapter_file=one.file) for one in made]
    rows = _rows(made)
    companions = [one.file for one in made]
    result = write_attached(request, base, graph, companions, others, trials, _survived(made))
    return replace(result, mode="inputs", adapters=rows)


def _files(request: AttachRequest, manifest: Manifest) -> list[_File]:
    """One file an adapter, then one a sum."""
    parts: dict[str, tuple[Part, ...]] = {one.name: (Part(one, 1.0),) for one in request.bound}
    parts |= parse_sums(request.sums, request.bound)
    return [_File(name, found, pack(manifest, summed(found))) for name, found in parts.items()]


def _survived(made: Sequence[_File]) -> dict[tuple[str, str], float | None]:
    """(adapter, site) -> how much of ΔW the parameters hold."""
    return {(one.name, site): kept for one in made for site, kept in one.packed.survived.items()}


def _rows(made: Sequence[_File]) -> list[dict[str, Any]]:
    return [
        {"name": one.name, "file": one.file, "rank": one.packed.rank, "sites": len(one.packed.survived)} for one in made
    ]
