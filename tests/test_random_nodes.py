"""A graph that draws at random: its outputs are not compared, and the weights are checked all the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from loracc import fold
from loracc.random_nodes import random_nodes
from tests.graphs import Builder


def traced(op: str, **attributes: object) -> ir.Model:
    """A layer with LoRA, and something behind it."""
    b = Builder()
    x = b.input("x", ["n", 8])
    delta = b("MatMul", b("MatMul", x, b.weight((8, 2))), b.weight((2, 6)))
    y = b("Add", b("MatMul", x, b.weight((8, 6), "fc.weight")), delta)
    if op == "Dropout":
        y = b(op, y, b.number(0.5), b.weight(np.asarray(attributes["training"])))
    elif op == "RandomNormalLike":
        y = b("Add", y, b(op, y, **attributes))
    y.name = "y"
    return b.model(y)


@pytest.mark.parametrize(
    ("op", "attributes", "random"),
    [
        ("Dropout", {"training": True}, True),
        ("Dropout", {"training": False}, False),
        ("RandomNormalLike", {}, True),
        ("RandomNormalLike", {"seed": 3.0}, False),
        ("Relu", {}, False),
    ],
)
def test_what_draws(op: str, attributes: dict[str, object], *, random: bool) -> None:
    assert bool(random_nodes(traced(op, **attributes))) is random


@pytest.mark.parametrize("op", ["Dropout", "RandomNormalLike"])
def test_no_tolerance_is_made_of_what_was_drawn(tmp_path: Path, op: str) -> None:
    source = tmp_path / "m.onnx"
    ir.save(traced(op, **({"training": True} if op == "Dropout" else {})), source)
    verification = fold(source, [], tmp_path / "out.onnx").verification
    assert verification is not None and verification.verdict == "pass"
    assert verification.numbers.end_to_end.verdict == "skipped"
    assert "draws at random" in verification.numbers.end_to_end.reason
    assert verification.numbers.weights.verdict == "pass"
