"""Which value a weight can set right."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from loracc.passes.constant_values import Constants
from loracc.passes.site_inputs import SiteInput
from loracc.passes.site_targets import site_target
from loracc.passes.value_dims import Dims

HEAD = """
<ir_version: 8, opset_import: ["": 17]>
agraph (float[n, s, 4] x, float[n, s, 4] r, float[4] row) => (float[n, s, 4] y)
<float[4, 4] w = {1,2,0,0, 0,1,0,3, 0,0,1,0, 2,0,0,1}, float[4] bias = {1,2,3,4}, int64[2] flat = {-1, 4}>
"""


def target(nodes: str, *, limit: int = 99) -> SiteInput | None:
    model = ir.from_onnx_text(HEAD + "{" + nodes + "}")
    places = {node: place for place, node in enumerate(model.graph)}
    return site_target(model, "w", Dims(Constants(17), model), places, limit)


@pytest.mark.parametrize(
    ("nodes", "limit", "expected"),
    [
        ("p = MatMul(x, w) b = Add(bias, p) s = Add(r, b) y = Relu(s)", 99, "s"),
        ("p = MatMul(x, w) s = Add(r, p) t = Add(s, x) y = Relu(t)", 99, "t"),
        ("p = MatMul(x, w) s = Add(r, p) t = Add(s, x) y = Relu(t)", 2, "s"),  # t belongs to a later stage
        ("p = MatMul(x, w) s = Add(r, p) t = Add(s, x) y = Add(t, s)", 99, "s"),  # s is read twice
        ("p = MatMul(x, w) b = Add(p, bias) y = Relu(b)", 99, None),  # no stream, a bias
        ("p = MatMul(x, w) b = Add(p, row) y = Relu(b)", 99, "b"),
        ("p = MatMul(x, w) q = Relu(p) y = Add(q, r)", 99, None),  # not linear
        ("p = MatMul(x, w) q = MatMul(r, w) y = Add(p, q)", 99, None),  # two products
    ],
)
def test_targets(nodes: str, limit: int, expected: str | None) -> None:
    found = target(nodes, limit=limit)
    assert found == (None if expected is None else SiteInput(expected, -1))


def test_a_reshape_that_leaves_the_features_alone() -> None:
    """As torch's exporters write addmm: rows are made one axis, and axes again."""
    nodes = "f = Reshape(x, flat) p = Gemm(f, w, bias) sh = Shape(x) q = Reshape(p, sh) s = Add(q, r) y = Relu(s)"
    assert target(nodes) == SiteInput("s", -1)
