"""One more ``.onnx_adapter`` for a graph that ``attach --as inputs`` made before: the graph stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loracc.adapter import Adapter
from loracc.binding import bind_each
from loracc.errors import CheckFailed, InputError
from loracc.formats.runtime_adapter import write_runtime_adapter
from loracc.manifest import Manifest
from loracc.manifest_check import check_manifest, check_places
from loracc.model import BaseModel
from loracc.packed_factors import Packed, pack
from loracc.passes.delta_nodes import detach
from loracc.passes.delta_points import refuse_other_kinds
from loracc.proof.attached import AttachedBase, Trial, verify_attached
from loracc.proof.verdict import Verification
from loracc.sites import SiteTable
from loracc.staging import Staging, check_destination
from loracc.switching.request import AttachResult, Bound
from loracc.switching.sums import Part, summed

__all__ = ["OneMore", "write_one_more"]


@dataclass(frozen=True)
class OneMore:
    """What was asked for.

    Attributes:
        graph: The attached graph's file.
        output: The ``.onnx_adapter`` to write.
        verify, force, dry_run: As for :func:`loracc.attach`.
    """

    graph: Path
    output: Path
    verify: bool
    force: bool
    dry_run: bool


def write_one_more(
    call: OneMore, model: BaseModel, adapters: Sequence[Adapter], maps: Sequence[str], allow_unmatched: bool
) -> AttachResult:
    """Write the adapters' exact sum as one file.

    Args:
        call: Where and how.
        model: The attached graph, loaded.
        adapters: One, or several that add up.

    Raises:
        LoraccError: The model is no graph of ``attach --as inputs``, or the adapters do not fit it.
        CheckFailed: With the file active, the graph does not compute what it should; nothing was moved into place.
    """
    inputs = [call.graph, *(Path(adapter.path) for adapter in adapters)]
    check_destination(call.output, inputs=inputs, force=call.force or call.dry_run)
    manifest = Manifest.from_metadata(model.ir.metadata_props, call.graph)
    if manifest.mode != "inputs":
        raise InputError(
            f"{call.graph}: attached as {manifest.mode}, which takes no .onnx_adapter files.",
            hint="Fill a slot of it instead: loracc slot OUT.onnx NUMBER ADAPTER",
        )
    check_manifest(manifest, model.ir, call.graph)
    graph = model.ir.clone()
    detach(graph, manifest.parameters)
    sites = SiteTable(site for site in model.sites if site.initializer not in manifest.parameters)
    base = replace(model, ir=graph, sites=sites)
    bound = [Bound(*pair) for pair in zip(adapters, bind_each(base, adapters, maps, allow_unmatched), strict=True)]
    for one in bound:
        refuse_other_kinds(one.bindings)
    bindings = summed([Part(one, 1.0) for one in bound])
    check_places(manifest, bindings, call.graph)
    packed = pack(manifest, bindings)
    result = _result(call, bound, packed)
    if call.dry_run:
        return replace(result, dry_run=True)
    with Staging(call.output, inputs=inputs, force=call.force) as stage:
        write_runtime_adapter(stage.path, packed.parameters, manifest)
        trial = Trial(call.output.stem, bindings, adapter_file=str(stage.path))
        verification = _verified(call, base, trial) if call.verify else None
        size = stage.size()
    return replace(result, verification=verification, files=stage.files, bytes=size)


def _verified(call: OneMore, base: BaseModel, trial: Trial) -> Verification:
    found = verify_attached(AttachedBase(base, base.ir), call.graph, [trial])
    if found.verdict == "fail":
        raise CheckFailed(
            f"{call.output}: the result did not pass its verification, and was not written.\n{found.summary()}",
            verification=found.to_json(),
        )
    return found


def _result(call: OneMore, bound: Sequence[Bound], packed: Packed) -> AttachResult:
    rows = [
        {
            "name": binding.site.name,
            "kind": binding.delta.kind,
            "rank": binding.delta.rank,
            "scale": binding.delta.scale,
            "relative_norm": None,
            "survived": packed.survived.get(binding.site.name),
            "adapter": one.name,
            "way": binding.way,
        }
        for one in bound
        for binding in one.bindings
    ]
    adapter = {
        "name": call.output.stem,
        "file": call.output.name,
        "rank": packed.rank,
        "sites": len(packed.survived),
    }
    return AttachResult(
        str(call.output),
        [call.output.name],
        rows,
        [key for one in bound for key in one.result.unmatched],
        None,
        [note for one in bound for note in one.result.notes],
        adapters=[adapter],
    )
