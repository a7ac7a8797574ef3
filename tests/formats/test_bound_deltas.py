"""Every kind of delta, stored and read back: the same bits at work."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from loracc.adapter import Delta
from loracc.deltas import Addition, DoRA, LowRank, Replacement, RowReplacement, StackedLowRank
from loracc.folded import Binding
from loracc.formats.bound_deltas import read_bindings, write_bindings
from loracc.kinds.combined import Combined, Recipe
from loracc.kinds.peft_table import PEFT_KINDS
from loracc.sites import TRANSPOSED, Layout, Site
from tests.formats.peft_files import random_array
from tests.kinds.peft_cases import CASES
from tests.kinds.peft_layers import bare_layer, by_role, wrap

# PEFT warns of settings it mends by itself (fan_in_fan_out, block sizes) and of the seeds of shared matrices.
pytestmark = pytest.mark.filterwarnings("ignore")

PAIR = LowRank(random_array(3, 16), random_array(24, 3, seed=1), 0.7)


def there_and_back(path: Path, *deltas: Delta, layout: Layout = TRANSPOSED) -> list[Binding]:
    bindings = [
        Binding(Site(f"m{i}", "weight", "linear", f"w{i}", layout, "reader", "map"), delta, "a", f"m{i}.weight", "map")
        for i, delta in enumerate(deltas)
    ]
    write_bindings(path, bindings)
    found = read_bindings(path)
    for one, other in zip(bindings, found, strict=True):
        assert dataclasses.replace(one, delta=PAIR) == dataclasses.replace(other, delta=PAIR)
        assert type(one.delta) is type(other.delta)
    return found


@pytest.mark.parametrize("row", CASES)
def test_every_kind_of_peft_survives(row: str, tmp_path: Path) -> None:
    try:
        wrapped = wrap(bare_layer("linear"), CASES[row]())
    except (TypeError, ValueError, KeyError):
        pytest.skip("PEFT does not adapt a linear layer with this kind")
    spec = PEFT_KINDS[str(wrapped.config["peft_type"])]
    config = json.loads(json.dumps(wrapped.config, default=list))  # as it comes from a file
    changes = spec.build(by_role(wrapped.tensors, spec), config, "layer")
    shapes = {"weight": (24, 16), "bias": (24,)}
    deltas = [delta.resolve(shapes[parameter]) for parameter, delta in changes.items()]
    for parameter, delta, read in zip(changes, deltas, there_and_back(tmp_path / "x", *deltas), strict=True):
        weight = np.random.default_rng(0).standard_normal(shapes[parameter])
        np.testing.assert_array_equal(read.delta.apply(weight), delta.apply(weight))
        assert (read.delta.rank, read.delta.scale, read.delta.kind) == (delta.rank, delta.scale, delta.kind)


@pytest.mark.parametrize(
    ("delta", "shape"),
    [
        (PAIR, (24, 16)),
        (DoRA(PAIR, random_array(24, seed=2)), (24, 16)),
        (StackedLowRank(random_array(2, 3, 16), random_array(2, 24, 3), 2.0), (2, 24, 16)),
        (Replacement(random_array(24, 16)), (24, 16)),
        (RowReplacement(np.array([3, 5]), random_array(2, 16)), (24, 16)),
        (Addition(random_array(24, dtype=np.float16), -1.5), (24,)),
        (Combined((PAIR, PAIR), (0.5, 0.25), Recipe("dare_ties", 0.5, 7, "m"), 2), (24, 16)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Delta) else "",
)
def test_the_lora_family_survives(delta: Delta, shape: tuple[int, ...], tmp_path: Path) -> None:
    (read,) = there_and_back(tmp_path / "x", delta)
    weight = np.random.default_rng(0).standard_normal(shape)
    np.testing.assert_array_equal(read.delta.apply(weight), delta.apply(weight))


def test_equal_tensors_are_stored_once_and_the_bytes_are_the_same(tmp_path: Path) -> None:
    there_and_back(tmp_path / "one", PAIR)
    there_and_back(tmp_path / "three", PAIR, PAIR, dataclasses.replace(PAIR, s=2.0))
    there_and_back(tmp_path / "again", PAIR, PAIR, dataclasses.replace(PAIR, s=2.0))
    assert (tmp_path / "three").stat().st_size < (tmp_path / "one").stat().st_size + 1200
    assert (tmp_path / "three").read_bytes() == (tmp_path / "again").read_bytes()
