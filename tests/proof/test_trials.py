"""No false alarm and no miss over many seeds, adapters from strong to weak, and every type."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from loracc.proof.verification import VerifyOptions, verify
from tests.proof.test_faults import DTYPES
from tests.verifying import MODELS, bind, build, folded, write


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strength", [1.0, 0.3, 0.05])
def test_right_folds_pass_and_a_scale_of_one_percent_more_fails(strength: float, dtype: str, tmp_path: Path) -> None:
    """The two errors end to end are within a factor of each other that the default multiple leaves room for."""
    for seed, name in enumerate(MODELS):
        base = build(name, DTYPES[dtype], seed)
        bindings = [replace(b, delta=b.delta.scaled(strength)) for b in bind(base, seed=seed + 1)]
        options = VerifyOptions(threads=1, seed=seed)
        right = verify(base, write(base, folded(base, bindings), tmp_path / "right.onnx"), bindings, options)
        assert right.verdict == "pass", right.reason
        for row in right.numbers.end_to_end.outputs:
            assert row.folded < 3.0 * row.unfused
        wrong = [replace(b, delta=b.delta.scaled(1.01)) for b in bindings]
        result = verify(base, write(base, folded(base, wrong), tmp_path / "wrong.onnx"), bindings, options)
        assert result.verdict == "fail"


def test_an_infinite_error_is_valid_json(tmp_path: Path) -> None:
    base = build("mlp")
    bindings = bind(base)
    out = folded(base, bindings)
    array = np.full((16, 16), np.inf, np.float32)
    out.graph.initializers["fc2.weight"].const_value = ir.tensor(array, name="fc2.weight")
    result = verify(base, write(base, out, tmp_path / "out.onnx"), bindings, VerifyOptions(threads=1))
    assert result.verdict == "fail" and "inf or NaN" in result.reason
    body = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert body["numbers"]["max_relative_error"] is None
