"""The proof: is this output that base with those adapters folded in? Numbers, structure and, when asked, latency.

:func:`verify` only strings the checks together; each is a file of its own:

* :mod:`loracc.proof.structure`: the two graphs are isomorphic. It also says which initializer of the output stands for
  which of the base, so that the other checks need no names.
* :mod:`loracc.proof.weights`: every bound weight against a float64 oracle, every other tensor byte for byte.
* :mod:`loracc.proof.numbers`: the outputs against the unfused model in higher precision.
* :mod:`loracc.proof.latency`: paired timing, and base against base as the noise floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from loracc.dtypes import is_float
from loracc.folded import Binding
from loracc.model import BaseModel, LoadOptions
from loracc.passes.encode_weights import is_decoded
from loracc.passes.retype import RetypePass, recast
from loracc.progress import Progress
from loracc.proof.graphs import FLOATS
from loracc.proof.numbers import check_end_to_end
from loracc.proof.optimized import compare_optimized
from loracc.proof.options import VerifyOptions
from loracc.proof.profile import compare_kernels
from loracc.proof.structure import Match, compare_checkpoints, compare_graphs
from loracc.proof.verdict import EndToEnd, Latency, Numbers, Structure, Verification
from loracc.proof.weights import check_weights

__all__ = ["VerifyOptions", "verify"]


def verify(
    base: BaseModel,
    out: BaseModel | Path,
    bindings: Sequence[Binding],
    options: VerifyOptions | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Judge ``out``.

    Args:
        base: The original model with its own weights; its ``ir`` is not changed.
        out: What was written: a path, or that path loaded.
        bindings: The adapters' deltas at sites of ``base``.
        options: See :class:`VerifyOptions`.
        progress: Told of the bytes compared.

    Returns:
        The verdicts. A check that says no raises nothing.

    Raises:
        LoraccError: A file or an input is wrong, or onnxruntime is needed and not installed.
    """
    options = options or VerifyOptions()
    made = _load(out, base) if isinstance(out, Path) else out
    traced = base.traced and made.traced
    options = replace(options, dtype=options.dtype or _changed_dtype(base.ir, made.ir, bindings))
    expected = _converted(base.ir, options.dtype, traced=traced)
    if traced:
        match = compare_graphs(expected, made.ir)
    else:
        match = compare_checkpoints(expected, made.ir, _untied(base, bindings))
    structure = _structure(match, base, expected, made.ir, options, traced=traced)
    weights = check_weights(expected, made.ir, match.pairs, bindings, progress, calibrated=options.calibrated)
    if options.end_to_end:
        end_to_end = check_end_to_end(base, made, _runnable(made), match, bindings, options)
    else:
        end_to_end = EndToEnd("skipped", "not asked for")
    return Verification(
        Numbers(weights, end_to_end, options.coverage),
        structure,
        _latency(base, made, options, progress, traced=traced),
    )


def _load(path: Path, base: BaseModel) -> BaseModel:
    from loracc.sources import load_model

    return load_model(path, LoadOptions(graph=base.traced))


def _changed_dtype(base: ir.Model, out: ir.Model, bindings: Sequence[Binding]) -> ir.DataType | None:
    """The dtype that ``fold --dtype`` wrote: what every bound weight has in the output and has not in the base."""
    names = [binding.site.initializer for binding in bindings]
    both = [(base.graph.initializers[name], out.graph.initializers[name]) for name in names
            if name in out.graph.initializers]  # fmt: skip
    found = {after.dtype for _, after in both}
    if len(found) != 1 or all(before.dtype == after.dtype for before, after in both):
        return None
    dtype = found.pop()
    return dtype if dtype is not None and is_float(dtype) else None


def _converted(model: ir.Model, dtype: ir.DataType | None, *, traced: bool) -> ir.Model:
    """The base with its float types changed as ``fold --dtype`` changes them: what the output's graph should be."""
    if dtype is None:
        return model
    copy = model.clone()
    if traced:
        RetypePass(dtype, sources=FLOATS)(copy)
        return copy
    for value in copy.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and is_float(tensor.dtype) and tensor.dtype != dtype:
            value.const_value = recast(tensor, dtype)
    return copy


def _untied(base: BaseModel, bindings: Sequence[Binding]) -> dict[str, str]:
    """Tensors that a checkpoint may have on top of the base's: modules tied to a weight that a delta changes."""
    names = base.ir.graph.initializers
    changed = {binding.site.initializer for binding in bindings}
    sites = [*(binding.site for binding in bindings), *(site for site in base.sites if site.initializer in changed)]
    return {
        name: site.initializer for site in sites for name in (site.name, site.consumer) if name and name not in names
    }


def _structure(
    match: Match, original: BaseModel, base: ir.Model, out: ir.Model, options: VerifyOptions, *, traced: bool
) -> Structure:
    found = Structure(
        "fail" if match.differences else "pass",
        match.differences[0] if match.differences else "",
        tuple(match.differences),
        match.nodes,
        match.clones,
    )
    if not traced:
        return replace(found, optimized_reason="a checkpoint has no graph", kernels_reason="a checkpoint has no graph")
    if match.differences:
        differ = "the graphs differ already"
        return replace(found, optimized_reason=differ, kernels_reason=differ)
    split = [name for name in match.clones if is_decoded(out.graph.initializers[name].const_value)]
    if split:
        # Each has an operator that decodes it: what one reader alone reads, the runtime fuses in another way.
        reason = f"the quantized weight {split[0]} was un-shared"
        return replace(found, optimized_reason=reason, kernels_reason=reason)
    after = compare_optimized(base, out, options)
    found = replace(found, optimized=after.verdict, optimized_reason=after.reason, optimized_nodes=after.nodes or None)
    if after.verdict == "fail":
        return replace(found, verdict="fail", reason=after.reason, differences=after.differences)
    if not options.end_to_end:
        return replace(found, kernels_reason="the models were not to be run")
    ran = compare_kernels(original, base, out, options)
    found = replace(found, kernels=ran.verdict, kernels_reason=ran.reason, kernels_run=ran.count or None)
    if ran.verdict != "fail":
        return found
    return replace(found, verdict="fail", reason=f"kernels that ran: {ran.reason}", differences=ran.differences)


def _runnable(out: BaseModel) -> Path | None:
    """The file itself, where ONNX Runtime reads it."""
    return out.path if out.format == "onnx" and out.path.is_file() else None


def _latency(
    base: BaseModel, out: BaseModel, options: VerifyOptions, progress: Progress | None, *, traced: bool
) -> Latency:
    if not options.latency:
        return Latency("skipped", "not asked for: --latency")
    if not traced:
        return Latency("skipped", "a checkpoint has no graph to run")
    from loracc.proof.latency import check_latency

    base_file, out_file = _timed_file(base, options.provider), _timed_file(out, options.provider)
    return check_latency(base, out, base_file, out_file, options, progress)


def _timed_file(model: BaseModel, provider: str) -> Path | None:
    """The file itself, where the provider runs it; None has an ``.onnx`` written."""
    wanted = "exported_program" if provider.startswith("torch") else "onnx"
    return model.path if model.format == wanted and model.path.is_file() else None
