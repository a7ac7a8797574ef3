"""What the report says of a site, against the whole matrices."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from loracc.deltas import LowRank
from loracc.facts import site_facts
from loracc.folded import Binding, FoldedTensor
from loracc.sites import Layout, Site


@pytest.mark.parametrize("layout", [Layout(), Layout(perm=(1, 0))], ids=["rows", "transposed"])
def test_norms_of_a_large_weight_whose_delta_lies_in_few_rows(layout: Layout) -> None:
    rng = np.random.default_rng(0)
    shape = (1200, 500)
    w = (rng.standard_normal(shape) * 0.02).astype(ml_dtypes.bfloat16)
    out, fan_in = layout.canonical_shape(shape)
    b = rng.standard_normal((out, 2)).astype(np.float32) * np.exp(2 * rng.standard_normal((out, 1))).astype(np.float32)
    delta = LowRank(rng.standard_normal((2, fan_in)).astype(np.float32), b, 1e-4)
    site = Site("m", "weight", "linear", "w", layout)
    tensor = FoldedTensor(ir.tensor(w, name="w"), [Binding(site, delta, "a", "m.weight", "name")])
    (row,) = site_facts([tensor])
    exact = layout.view(w.astype(np.float64)) + delta.materialize(np.dtype(np.float64))
    change = np.linalg.norm(delta.materialize(np.dtype(np.float64)))
    lost = np.linalg.norm(layout.view(tensor.numpy().astype(np.float64)) - exact)
    assert row.relative_norm == pytest.approx(change / np.linalg.norm(w.astype(np.float64)), rel=0.02)
    assert row.survived == pytest.approx(1 - lost / change, abs=0.02)
