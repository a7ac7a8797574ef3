"""Every planted fault is caught, and no correct fold is called wrong."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from loracc.proof.verification import VerifyOptions, verify
from tests.mutants import FAULTS, Fault, base_of, bindings_of, random_fold, right
from tests.verifying import write

OPTIONS = VerifyOptions(threads=1)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught(fault: Fault, tmp_path: Path) -> None:
    base = base_of(fault.model, fault.dtype)
    bindings = bindings_of(base, fault.model, dora=fault.dora)
    out = write(base, fault.make(base, bindings), tmp_path / "wrong.onnx")
    found = verify(base, out, bindings, OPTIONS)
    assert found.verdict == "fail" and found.reason


@pytest.mark.parametrize(
    ("model", "dtype", "dora"), sorted({(f.model, f.dtype, f.dora) for f in FAULTS}, key=str), ids=str
)
def test_the_same_models_without_a_fault_pass(model: str, dtype: ir.DataType, dora: bool, tmp_path: Path) -> None:
    base = base_of(model, dtype)
    bindings = bindings_of(base, model, dora=dora)
    found = verify(base, write(base, right(base, bindings), tmp_path / "right.onnx"), bindings, OPTIONS)
    assert found.verdict == "pass", found.reason


@pytest.mark.parametrize("seed", range(8))
def test_random_correct_folds_pass(seed: int, tmp_path: Path) -> None:
    """tests/benchmarks/mutations.py tries 200."""
    base, path, bindings, what = random_fold(seed, tmp_path)
    found = verify(base, path, bindings, OPTIONS)
    assert found.verdict == "pass", f"{what}: {found.reason}"
