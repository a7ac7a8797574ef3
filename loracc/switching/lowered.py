"""What the modes that put branches into a graph share: the base they start from, and writing, proving and reporting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from loracc import __version__
from loracc.errors import CheckFailed
from loracc.facts import SiteFacts, site_facts
from loracc.folded import FoldedTensor, clear_bindings
from loracc.manifest import weights_digest
from loracc.passes.retype import RetypePass
from loracc.proof.attached import AttachedBase, More, Trial, verify_attached
from loracc.proof.verdict import Verification
from loracc.sites import write_records
from loracc.switching.request import AttachRequest, AttachResult
from loracc.targets.onnx_file import stamp

__all__ = ["AttachedTo", "attached_base", "finished", "write_attached"]

_FLOATS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE)


@dataclass(frozen=True)
class AttachedTo:
    """The base in the output's types.

    Attributes:
        graph: A copy that branches may be put into.
        plain: The same without branches, for comparison.
        digest: Of its weights.
    """

    graph: ir.Model
    plain: ir.Model
    digest: str


def attached_base(request: AttachRequest) -> AttachedTo:
    """The base as the output has it: its own types, or those of ``--dtype``."""
    plain = request.base.ir.clone()
    for value in plain.graph.initializers.values():
        clear_bindings(value)
    if request.job.dtype is not None:
        RetypePass(request.job.dtype, sources=_FLOATS)(plain)
    return AttachedTo(plain.clone(), plain, weights_digest(plain))


def finished(base: AttachedTo, request: AttachRequest) -> ir.Model:
    """The graph with its records: where the sites are, and what it was made from."""
    graph = base.graph
    write_records(graph, [site for site in request.base.sites if site.module])
    described = [f"{one.name} {one.adapter.format} sha256:{one.adapter.digest}" for one in request.bound]
    stamp(graph, {"version": __version__, "adapters": "; ".join(described)})
    return graph


def write_attached(
    request: AttachRequest,
    base: AttachedTo,
    graph: ir.Model,
    companions: Sequence[str],
    others: Callable[[Path], None],
    trials: Sequence[Trial],
    survived: Mapping[tuple[str, str], float | None],
    off: More | None = None,
) -> AttachResult:
    """Write the graph and what goes beside it, prove it, and move it into place.

    Args:
        request: What was asked for.
        base: What the graph was made from.
        graph: What to write.
        companions: Names of the files that ``others`` writes.
        others: Writes them into a folder.
        trials: What to try for the proof.
        survived: By adapter and site, for the report.
        off: Inputs that switch everything off, where the graph needs some for that.
    """
    job = request.job
    extra = tuple(companions)
    job = replace(job, beside=extra)
    job.check(request.inputs, force=request.force or request.dry_run)
    facts = _facts(request, survived)
    result = AttachResult(str(job.output), [], facts, request.unmatched, None, request.notes)
    if request.dry_run:
        plan = job.plan(replace(request.base, ir=graph), job.output)
        names = [path.name for path in (*plan.small, *(file.path for file in plan.weights))]
        return replace(result, files=[*extra, *names], bytes=plan.nbytes, dry_run=True)
    with job.staging(request.inputs, force=request.force) as stage:
        plan = job.plan(replace(request.base, ir=graph), stage.path)
        stage.expected_bytes = plan.nbytes
        plan.write(job.progress)
        others(stage.path.parent)
        verification = _verified(request, base, stage.path, trials, off) if request.verify else None
        size = stage.size()
    return replace(result, files=stage.files, verification=verification, bytes=size)


def _verified(
    request: AttachRequest, base: AttachedTo, path: Path, trials: Sequence[Trial], off: More | None
) -> Verification:
    attached = AttachedBase(request.base, base.plain, request.job.dtype)
    found = verify_attached(attached, path, trials, off=off)
    if found.verdict == "fail":
        raise CheckFailed(
            f"{request.job.output}: the result did not pass its verification, and was not written.\n{found.summary()}",
            verification=found.to_json(),
            hint="An adapter that changes nothing was not trained, or is the wrong file. Anything else is a bug of "
            "loracc's; --no-verify writes the output all the same.",
        )
    return found


def _facts(request: AttachRequest, survived: Mapping[tuple[str, str], float | None]) -> list[dict[str, object]]:
    """A row an adapter's delta. Its norm is estimated as a fold's is; what survives is of the parameters, not of W."""
    rows: list[SiteFacts] = []
    initializers = request.base.ir.graph.initializers
    for one in request.bound:
        by_weight: dict[str, list[int]] = {}
        for index, binding in enumerate(one.bindings):
            by_weight.setdefault(binding.site.initializer, []).append(index)
        for name, indices in by_weight.items():
            tensor = initializers[name].const_value
            assert tensor is not None
            found = site_facts([FoldedTensor(tensor, [one.bindings[i] for i in indices])])
            rows += [replace(row, survived=survived.get((row.adapter, row.name))) for row in found]
    return [row.to_json() for row in rows]
