"""A model run segment by segment computes what it computes at once, wherever it is cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from loracc.calibration.data import Batch
from loracc.calibration.segments import Segments, Walk
from loracc.runners.runner import OnnxRunner

GRAPH = """
<ir_version: 8, opset_import: ["": 17]>
agraph (float[n, 4] x, bool flag) => (float[n, 4] y, float[n, 4] a)
<float[4, 4] w = {1,2,0,0, 0,1,0,3, 0,0,1,0, 2,0,0,1}, float[4, 4] v = {0,1,0,0, 1,0,0,0, 0,0,2,0, 0,0,0,1}>
{
    a = MatMul(x, w)
    wt = Transpose(w)
    parts = SplitToSequence <axis: int = 0, keepdims: int = 1> (a)
    b = If (flag) <
        then_branch = yes () => (float[n, 4] t) { t = Add(a, x) },
        else_branch = no () => (float[n, 4] e) { e = Sub(a, x) }
    >
    c = MatMul(b, wt)
    joined = ConcatFromSequence <axis: int = 0> (parts)
    d = Add(c, joined)
    y = MatMul(d, v)
}
"""


def batches() -> list[Batch]:
    rng = np.random.default_rng(0)
    rows = (3, 5, 1)
    inputs = [{"x": rng.standard_normal((n, 4)).astype(np.float32), "flag": np.array(n > 1)} for n in rows]
    return [Batch(feeds, held_out=number == 2) for number, feeds in enumerate(inputs)]


def exact(_name: str) -> None:
    return None


@pytest.mark.parametrize("ends", [[8], [1, 8], [2, 3, 5, 8], [1, 2, 3, 4, 5, 6, 7, 8], [4, 4, 8]])
@pytest.mark.parametrize("held", [0, 1 << 20])
def test_wherever_it_is_cut(ends: list[int], held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loracc.calibration.segments.IN_MEMORY", held)
    model = ir.from_onnx_text(GRAPH)
    walk = Walk(Segments(model, ends), batches(), tmp_path, "walk")
    for number in range(len(ends)):
        walk.advance(number, exact)
    whole = OnnxRunner(model)
    for batch, found in walk.values(len(ends)):
        for name, value in whole.run(batch.inputs).items():
            np.testing.assert_array_equal(found[name], value)
    assert bool(list(tmp_path.iterdir())) is (held == 0)


def test_weights_may_change_on_the_way(tmp_path: Path) -> None:
    """What was computed stays; what follows from a weight alone is that of the moment; taps do not move the walk."""
    model = ir.from_onnx_text(GRAPH)
    walk = Walk(Segments(model, [4, 8]), batches(), tmp_path, "walk")
    tapped = [values["b"] for _, values in walk.run(0, exact, ["b"])]
    walk.advance(0, exact)
    zero = ir.tensor(np.zeros((4, 4), np.float32), name="w")
    walk.advance(1, lambda name: zero if name == "w" else None)
    weights = {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value}
    for (batch, found), b in zip(walk.values(2), tapped, strict=True):
        x = batch.inputs["x"]
        np.testing.assert_array_equal(b, x @ weights["w"] + (x if batch.inputs["flag"] else -x))
        np.testing.assert_allclose(found["y"], x @ weights["w"] @ weights["v"], rtol=1e-5)  # c = b · 0
