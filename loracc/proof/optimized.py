"""The same comparison after ONNX Runtime's own optimizer: what will really run is the same graph, too."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from loracc.passes.encode_weights import encoded
from loracc.proof.graphs import uses_bfloat16
from loracc.proof.memory import available_memory, weights_in
from loracc.proof.options import VerifyOptions
from loracc.proof.structure import compare_graphs
from loracc.proof.verdict import Verdict
from loracc.runners.runner import OnnxRunner, RunError

__all__ = ["Optimized", "compare_optimized"]


@dataclass(frozen=True)
class Optimized:
    """Verdict on the optimized graphs; ``nodes`` counts the base's."""

    verdict: Verdict
    reason: str = ""
    differences: tuple[str, ...] = ()
    nodes: int = 0


def compare_optimized(base: ir.Model, out: ir.Model, options: VerifyOptions) -> Optimized:
    """Optimize both as far as the CPU provider does without changing layouts ("extended"), and compare the graphs.

    Skipped, with the reason, where the runtime is missing, does not load the base, or the model is too large to be
    written twice.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    base, out = encoded(base), encoded(out)
    size = sum(weights_in(model, ir.DataType.FLOAT) for model in (base, out))
    free = available_memory()
    if size > 2 * options.optimized_bytes or (free is not None and size > options.memory_share * free):
        return Optimized("skipped", f"the two models take {size / 1e9:.3g} GB")
    if uses_bfloat16(base):
        return Optimized("skipped", "onnxruntime's CPU provider does not load bfloat16 models")
    with tempfile.TemporaryDirectory(prefix="loracc-") as folder:
        try:
            before = _optimized(base, Path(folder) / "base.onnx")
        except RunError as error:
            return Optimized("skipped", f"the base does not load here: {error.message}")
        try:
            after = _optimized(out, Path(folder) / "out.onnx")
        except RunError as error:
            return Optimized("fail", f"the output does not load, and the base does: {error.message}")
        match = compare_graphs(before, after)
    if match.differences:
        first = f"after onnxruntime's optimizer: {match.differences[0]}"
        return Optimized("fail", first, (first, *match.differences[1:]), match.nodes)
    return Optimized("pass", nodes=match.nodes)


def _optimized(model: ir.Model, path: Path) -> ir.Model:
    OnnxRunner(model, save_optimized=path)
    return ir.load(path)
