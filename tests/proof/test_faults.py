"""The verifier passes right folds of every kind, and says no to wrong ones, naming the site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from loracc.deltas import DoRA, LowRank, Replacement
from loracc.dtypes import round_to
from loracc.folded import Binding
from loracc.model import BaseModel
from loracc.proof.verdict import Verification
from loracc.proof.verification import VerifyOptions, verify
from tests.verifying import MODELS, bind, build, folded, low_rank, write

DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
OPTIONS = VerifyOptions(threads=1)


def judge(
    name: str, dtype: ir.DataType, tmp_path: Path, fault: Callable[[BaseModel, list[Binding]], ir.Model] = folded
) -> Verification:
    """Fold with ``fault`` in place of the right fold, write, verify against the right bindings."""
    base = build(name, dtype)
    bindings = bind(base)
    return verify(base, write(base, fault(base, bindings), tmp_path / "out.onnx"), bindings, OPTIONS)


def tensor(graph: ir.Model, name: str) -> np.ndarray:
    value = graph.graph.initializers[name].const_value
    assert value is not None
    return np.array(value.numpy())


def put(graph: ir.Model, name: str, array: np.ndarray) -> None:
    graph.graph.initializers[name].const_value = ir.tensor(array, name=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_a_right_fold_passes(name: str, dtype: str, tmp_path: Path) -> None:
    result = judge(name, DTYPES[dtype], tmp_path)
    assert result.verdict == "pass", result.reason
    numbers, structure = result.numbers, result.structure
    assert numbers.end_to_end.verdict == "pass" and numbers.weights.verdict == "pass"
    assert structure.optimized == ("skipped" if dtype == "bf16" else "pass"), structure.optimized_reason
    assert [site.name for site in numbers.weights.sites] == [f"{module}.weight" for module in MODELS[name][1]]
    assert all(site.correctly_rounded > 0.998 and site.worst_excess <= 1 for site in numbers.weights.sites)
    found = numbers.end_to_end
    assert found.max_relative_error is not None and found.tolerance is not None and found.effect is not None
    assert found.max_relative_error <= found.tolerance < found.effect  # the check could have failed
    body = result.to_json()
    assert body["verdict"] == body["numbers"]["verdict"] == body["structure"]["verdict"] == "pass"
    assert body["latency"]["verdict"] == "skipped"
    assert body["numbers"]["tolerance"] == found.tolerance


def _scaled(base: BaseModel, bindings: list[Binding]) -> ir.Model:
    return folded(base, [replace(b, delta=b.delta.scaled(1.01)) for b in bindings])


def _skipped(base: BaseModel, bindings: list[Binding]) -> ir.Model:
    return folded(base, [b for b in bindings if b.site.module != "fc2"])


def _transposed(base: BaseModel, bindings: list[Binding]) -> ir.Model:
    def turned(delta: Any) -> LowRank:
        return LowRank(np.ascontiguousarray(delta.b.T), np.ascontiguousarray(delta.a.T), delta.s)

    return folded(base, [replace(b, delta=turned(b.delta)) if b.site.module == "fc1" else b for b in bindings])


def _swapped(base: BaseModel, bindings: list[Binding]) -> ir.Model:
    first, second = bindings
    return folded(base, [replace(first, delta=second.delta), replace(second, delta=first.delta)])


def _delta_rounded_first(base: BaseModel, bindings: list[Binding]) -> ir.Model:
    """W + round(ΔW), rounded again: what merging in the weight's own type does."""
    out = base.ir.clone()
    for binding in bindings:
        name = binding.site.initializer
        w = tensor(base.ir, name)
        delta = binding.delta.materialize(np.dtype(np.float32)).T
        dtype = base.ir.graph.initializers[name].dtype
        assert dtype is not None
        rounded = round_to(delta, dtype).astype(np.float32)
        put(out, name, round_to(w.astype(np.float32) + rounded, dtype))
    return out


def _other_weight_touched(base: BaseModel, bindings: list[Binding]) -> ir.Model:
    out = folded(base, bindings)
    scale = tensor(out, "attn.k.weight")
    scale[0, 0] = np.nextafter(scale[0, 0], np.float32(9))
    put(out, "attn.k.weight", scale)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("fault", "site", "words"),
    [
        (_scaled, "fc", "1.01 of its strength"),
        (_skipped, "fc2.weight", "the delta is not there"),
        (_transposed, "fc1.weight", "another one"),
        (_swapped, "fc", "another one"),
    ],
)
def test_a_wrong_fold_fails_and_names_the_site(
    fault: Callable[[BaseModel, list[Binding]], ir.Model], site: str, words: str, dtype: str, tmp_path: Path
) -> None:
    result = judge("mlp", DTYPES[dtype], tmp_path, fault)
    assert result.verdict == result.numbers.verdict == result.numbers.weights.verdict == "fail"
    assert result.structure.verdict == "pass"
    assert site in result.numbers.weights.worst_site
    if words != "1.01 of its strength" or dtype == "fp32":  # in 16 bits the noise leaves fewer digits
        assert words in result.reason
    assert result.to_json()["numbers"]["reason"].startswith(result.numbers.weights.worst_site)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_delta_rounded_before_it_is_added_fails(dtype: str, tmp_path: Path) -> None:
    """End to end nobody could see it: it is only as wrong as the type's own noise."""
    result = judge("mlp", DTYPES[dtype], tmp_path, _delta_rounded_first)
    assert result.numbers.weights.verdict == "fail"
    assert "correctly rounded" in result.reason


def test_end_to_end_sees_a_wrong_scale_by_itself_and_names_the_first_site(tmp_path: Path) -> None:
    found = judge("attention", DTYPES["fp32"], tmp_path, _scaled).numbers.end_to_end
    assert found.verdict == "fail"
    assert "the first site that is off is embed.weight" in found.reason
    assert found.would_pass_at is not None and found.multiple is not None and found.would_pass_at > found.multiple
    assert {site.site for site in found.sites} == {f"{module}.weight" for module in MODELS["attention"][1]}


def test_one_element_of_float32_that_is_an_ulp_off_is_found(tmp_path: Path) -> None:
    """So small a weight may have a misrounded element, by a tie; float64 sums are not off by an ulp of float32."""

    def flipped(base: BaseModel, bindings: list[Binding]) -> ir.Model:
        graph = folded(base, bindings)
        array = tensor(graph, "fc1.weight")
        array.view(np.uint32).flat[7] ^= 1
        put(graph, "fc1.weight", array)
        return graph

    result = judge("mlp", DTYPES["fp32"], tmp_path, flipped)
    assert result.verdict == "fail" and result.numbers.weights.worst_site == "fc1.weight"
    assert "times further from W + ΔW than rounding once allows" in result.reason


def test_an_unbound_weight_must_keep_its_bytes(tmp_path: Path) -> None:
    result = judge("attention", DTYPES["fp32"], tmp_path, _other_weight_touched)
    assert result.numbers.weights.changed == ("attn.k.weight",)
    assert "attn.k.weight" in result.reason


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_adapter_is_no_signal(dtype: str, tmp_path: Path) -> None:
    base = build("mlp", DTYPES[dtype])
    zero = {m: replace(low_rank((16, 16)), b=np.zeros((16, 3), np.float32)) for m in ("fc1", "fc2")}
    bindings = bind(base, zero)
    result = verify(base, write(base, folded(base, bindings), tmp_path / "out.onnx"), bindings, OPTIONS)
    assert result.verdict == "fail"
    assert "no signal" in result.numbers.weights.reason and "no signal" in result.numbers.end_to_end.reason


def test_constant_outputs_are_no_signal(tmp_path: Path) -> None:
    base = build("mlp")
    put(base.ir, "fc2.weight", np.zeros((16, 16), np.float32))
    bindings = [binding for binding in bind(base) if binding.site.module == "fc1"]
    found = verify(base, write(base, folded(base, bindings), tmp_path / "out.onnx"), bindings, OPTIONS).numbers
    assert found.weights.verdict == "pass"
    assert found.end_to_end.verdict == "fail" and "constant" in found.end_to_end.reason


def test_nan_outputs_are_no_signal(tmp_path: Path) -> None:
    base = build("mlp")
    fc2 = tensor(base.ir, "fc2.weight")
    fc2[0, 0] = np.nan
    put(base.ir, "fc2.weight", fc2)
    bindings = [binding for binding in bind(base) if binding.site.module == "fc1"]
    found = verify(base, write(base, folded(base, bindings), tmp_path / "out.onnx"), bindings, OPTIONS).numbers
    assert found.end_to_end.verdict == "fail" and "NaN" in found.end_to_end.reason


def test_nothing_bound_is_no_signal(tmp_path: Path) -> None:
    base = build("mlp")
    result = verify(base, write(base, base.ir, tmp_path / "out.onnx"), [], OPTIONS)
    assert result.verdict == "fail" and "no delta is bound" in result.reason


def test_other_kinds_of_delta(tmp_path: Path) -> None:
    base = build("mlp")
    rng = np.random.default_rng(0)
    dora = DoRA(low_rank((16, 16)), (1 + rng.random(16)).astype(np.float32))
    new = Replacement(rng.standard_normal((16, 16)).astype(np.float32))
    bindings = bind(base, {"fc1": dora, "fc2": new})
    out = write(base, folded(base, bindings), tmp_path / "out.onnx")
    right = verify(base, out, bindings, OPTIONS)
    assert right.verdict == "pass", right.reason
    assert any("not a branch" in note for note in right.numbers.end_to_end.notes)
    wrong = bind(base, {"fc1": replace(dora, axis=1), "fc2": new})
    result = verify(base, out, wrong, OPTIONS)
    assert result.numbers.weights.verdict == "fail" and result.numbers.weights.worst_site == "fc1.weight"


@pytest.mark.parametrize("strength", [1.0, 0.05])
def test_a_weak_adapter_in_bfloat16_is_no_false_alarm(strength: float, tmp_path: Path) -> None:
    base = build("attention", DTYPES["bf16"])
    bindings = [replace(b, delta=b.delta.scaled(strength)) for b in bind(base)]
    result = verify(base, write(base, folded(base, bindings), tmp_path / "out.onnx"), bindings, OPTIONS)
    assert result.verdict == "pass", result.reason
    survived = [site.survived for site in result.numbers.weights.sites]
    assert all(s is not None and (s > 0.98 if strength == 1.0 else s < 0.98) for s in survived)


def test_logits_get_agreement_and_divergence(tmp_path: Path) -> None:
    found = judge("attention", DTYPES["fp32"], tmp_path).numbers.end_to_end.outputs
    assert [row.name for row in found] == ["logits"]
    assert found[0].more["top1_agreement"] == 1.0
    assert 0 <= found[0].more["kl_divergence"] < 1e-9


def test_without_memory_the_weights_are_still_checked(tmp_path: Path) -> None:
    base = build("mlp")
    bindings = bind(base)
    out = write(base, folded(base, bindings), tmp_path / "out.onnx")
    result = verify(base, out, bindings, replace(OPTIONS, memory_share=1e-12))
    assert result.numbers.end_to_end.verdict == "skipped" and "free" in result.numbers.end_to_end.reason
    assert result.numbers.weights.verdict == result.verdict == "pass"
    assert result.to_json()["numbers"]["measured_on"] == "weights"
    assert result.to_json()["numbers"]["max_relative_error"] <= result.to_json()["numbers"]["tolerance"]
