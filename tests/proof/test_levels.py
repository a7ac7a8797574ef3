"""What else a verification tells: kernels that ran, thresholds, effect, coverage, sites, the other truth."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from loracc.adapter import Adapter, Entry
from loracc.deltas import Replacement
from loracc.proof.coverage import coverage_of
from loracc.proof.profile import compare_kernels, kernels_of
from loracc.proof.verification import VerifyOptions, verify
from tests.proof.test_faults import DTYPES, OPTIONS, _scaled
from tests.verifying import MODELS, bind, build, folded, write


def test_kernels_are_read_from_the_profile(tmp_path: Path) -> None:
    base = build("mlp")
    ran = kernels_of(base.ir, {"x": np.zeros((2, 16), np.float32)}, OPTIONS)
    assert "MatMul [CPUExecutionProvider] float[2,16] -> float[2,16]" in ran
    assert compare_kernels(base, base.ir, base.ir, OPTIONS).verdict == "pass"
    assert compare_kernels(build("mlp", ir.DataType.BFLOAT16), build("mlp", ir.DataType.BFLOAT16).ir, base.ir,
                           OPTIONS).verdict == "skipped"  # fmt: skip


def test_another_kernel_is_told_in_words() -> None:
    base, other = build("mlp"), build("mlp")
    tanh = next(node for node in other.ir.graph if node.op_type == "Tanh")
    tanh.op_type = "Sigmoid"
    found = compare_kernels(base, base.ir, other.ir, OPTIONS)
    assert found.verdict == "fail" and "the output runs Sigmoid" in found.reason and "in place of Tanh" in found.reason


def test_all_three_levels_are_in_the_result(tmp_path: Path) -> None:
    base = build("attention")
    bindings = bind(base)
    result = verify(
        base, write(base, folded(base, bindings), tmp_path / "o.onnx"), bindings, replace(OPTIONS, taps=True)
    )
    body = result.to_json()
    structure, numbers = body["structure"], body["numbers"]
    assert structure["optimized"] == structure["kernels"] == "pass" and structure["kernels_run"] > 5
    assert "kernels alike" in structure["summary"]
    assert numbers["threshold"]["flips_at"] == numbers["max_relative_error"] < numbers["threshold"]["value"]
    assert numbers["effect"]["verdict"] == "pass" and numbers["effect"]["value"] > numbers["effect"]["noise_floor"]
    sites = numbers["end_to_end"]["sites"]
    assert [site["site"] for site in sites] == [f"{module}.weight" for module in MODELS["attention"][1]]
    assert numbers["end_to_end"]["worst_site"] == max(sites, key=lambda site: site["error"])["site"]


def test_a_failure_says_what_would_have_passed(tmp_path: Path) -> None:
    base = build("attention")
    bindings = bind(base)
    result = verify(base, write(base, _scaled(base, bindings), tmp_path / "o.onnx"), bindings, OPTIONS)
    numbers = result.to_json()["numbers"]
    assert "passes from" in numbers["threshold"]["text"]
    assert numbers["threshold"]["flips_at"] > numbers["threshold"]["value"]
    assert numbers["end_to_end"]["worst_site"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_trainers_own_arithmetic_as_truth(dtype: str, tmp_path: Path) -> None:
    """A right fold is as far from it as its own roundings are; a scale of 1.05 is further, whatever the type."""
    base = build("attention", DTYPES[dtype])
    bindings = bind(base)
    options = VerifyOptions(threads=1, truth="as-trained")
    right = verify(base, write(base, folded(base, bindings), tmp_path / "r.onnx"), bindings, options)
    assert right.numbers.end_to_end.verdict == "pass", right.reason
    strong = [replace(b, delta=b.delta.scaled(1.3)) for b in bindings]
    wrong = verify(base, write(base, folded(base, strong), tmp_path / "w.onnx"), bindings, options)
    assert wrong.numbers.end_to_end.verdict == "fail"


def test_coverage_counts_every_tensor_once() -> None:
    bindings = bind(build("mlp"))
    entries = tuple(Entry(b.site.module, "weight", b.delta, (f"{b.key}.A", f"{b.key}.B")) for b in bindings)
    adapter = Adapter("adapter", "a", "peft", entries)
    full = coverage_of([adapter], bindings, [])
    assert (full.verdict, full.tensors, full.consumed) == ("pass", 4, 4)
    lost = coverage_of([adapter], bindings[:1], [])
    assert lost.verdict == "fail" and lost.consumed == 2 and "fc2.weight is bound to no weight" in lost.reason
    allowed = coverage_of([adapter], bindings[:1], ["fc2.weight.A", "fc2.weight.B"])
    assert allowed.verdict == "pass" and allowed.to_json()["unmatched"] == ["fc2.weight.A", "fc2.weight.B"]
    twice = coverage_of([adapter], [*bindings, bindings[0]], [])
    assert twice.verdict == "fail" and "bound twice" in twice.reason
    copy = Entry(bindings[0].site.module, "weight", Replacement(np.zeros((1, 1), np.float32)), ("copy",))
    both = [*bindings, replace(bindings[0], delta=copy.delta)]  # as PEFT saves an embedding's LoRA and the base's own
    assert coverage_of([replace(adapter, entries=(*entries, copy))], both, []).verdict == "pass"
    assert coverage_of([], bindings, []).verdict == "skipped"


def test_every_key_is_documented(tmp_path: Path) -> None:
    base = build("mlp")
    bindings = bind(base)
    out = write(base, folded(base, bindings), tmp_path / "o.onnx")
    body = verify(base, out, bindings, replace(OPTIONS, coverage=coverage_of([], bindings, []))).to_json()
    page = (Path(__file__).parents[2] / "docs" / "verification.md").read_text(encoding="utf-8")
    known = {word for line in page.splitlines() if line.startswith("|") for word in re.findall(r"\w+", line)}
    keys = {*body, *body["numbers"], *body["structure"], *body["latency"], *body["numbers"]["coverage"]}
    assert body["schema"] == 1
    assert not keys - known
