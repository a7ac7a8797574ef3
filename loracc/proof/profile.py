"""The kernels that ran: ONNX Runtime's own profile of base and output, operator by operator.

The third look at structure. The graphs may be alike, and what runs may not be: another provider, a fallback, another
shape on the way. From the profile come operator, provider and the types and shapes of inputs and outputs, in the order
in which the nodes ran; names and times are left out. (Weights that a kernel has packed are no inputs any more.)
"""

from __future__ import annotations

import difflib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from loracc.errors import InputError
from loracc.model import BaseModel
from loracc.passes.encode_weights import encoded
from loracc.proof.graphs import uses_bfloat16
from loracc.proof.memory import available_memory, weights_in
from loracc.proof.options import VerifyOptions
from loracc.proof.verdict import Verdict
from loracc.runners.runner import OnnxRunner, RunError
from loracc.sample_inputs import draw_inputs

__all__ = ["Kernels", "compare_kernels", "kernels_of"]

_SHOWN = 5


@dataclass(frozen=True)
class Kernels:
    """Verdict on what ran; ``count`` is of the base's kernels."""

    verdict: Verdict
    reason: str = ""
    differences: tuple[str, ...] = ()
    count: int = 0


def compare_kernels(base: BaseModel, expected: ir.Model, out: ir.Model, options: VerifyOptions) -> Kernels:
    """Run both once on the same inputs and compare the profiles.

    Args:
        base: The original model, for its inputs.
        expected: Its graph in the output's dtype.
        out: What was written.
        options: Provider, threads, inputs.

    Returns:
        The verdict; skipped, with the reason, where the models do not run here as they are.
    """
    size = 2 * sum(weights_in(model, ir.DataType.FLOAT) for model in (expected, out))
    free = available_memory()
    if free is not None and size > options.memory_share * free:
        return Kernels("skipped", f"the two models take {size / 1e9:.3g} GB to run")
    if uses_bfloat16(expected):
        return Kernels("skipped", "onnxruntime's CPU provider does not load bfloat16 models")
    try:
        inputs, _ = draw_inputs(base, seed=options.seed, draws=1, given=options.inputs)
        before = kernels_of(encoded(expected), inputs[0], options)
    except InputError as error:
        return Kernels("skipped", f"the base does not run here: {error.message}")
    try:
        after = kernels_of(encoded(out), inputs[0], options)
    except RunError as error:
        return Kernels("fail", f"the output does not run, and the base does: {error.message}")
    differences = _differences(before, after)
    return Kernels("fail" if differences else "pass", next(iter(differences), ""), differences, len(before))


def kernels_of(model: ir.Model, inputs: dict[str, Any], options: VerifyOptions) -> list[str]:
    """What ran, in order: "MatMul [CPUExecutionProvider] float[2,16] -> float[2,16]".

    Raises:
        RunError: The runtime does not load or run it.
    """
    with tempfile.TemporaryDirectory(prefix="loracc-") as folder:
        runner = OnnxRunner(model, provider=options.provider, threads=options.threads, profile=Path(folder) / "profile")
        runner.run(inputs)
        events = json.loads(Path(runner.session.end_profiling()).read_text(encoding="utf-8"))
    nodes = [event["args"] for event in events if event.get("cat") == "Node" and "op_name" in event.get("args", {})]
    return [_kernel(node) for node in nodes if "provider" in node and "output_type_shape" in node]


def _kernel(node: dict[str, Any]) -> str:
    ins, outs = (_shapes(node[key]) for key in ("input_type_shape", "output_type_shape"))
    return f"{node['op_name']} [{node['provider']}] {ins} -> {outs}"


def _shapes(values: list[dict[str, list[int]]]) -> str:
    return ", ".join(f"{kind}{json.dumps(shape, separators=(',', ':'))}" for v in values for kind, shape in v.items())


def _differences(base: list[str], out: list[str]) -> tuple[str, ...]:
    if base == out:  # which takes difflib the square of their number
        return ()
    found = []
    matcher = difflib.SequenceMatcher(None, base, out, autojunk=False)
    for tag, i, j, k, m in matcher.get_opcodes():
        if tag == "equal":
            continue
        gone, new = "; ".join(base[i:j]), "; ".join(out[k:m])
        where = f" after {base[i - 1]}" if i else " at the start"
        if tag == "insert":
            found.append(f"the output runs {new} more{where}")
        elif tag == "delete":
            found.append(f"the output does not run {gone}{where}")
        else:
            found.append(f"the output runs {new} in place of {gone}{where}")
    return tuple(found[:_SHOWN])
