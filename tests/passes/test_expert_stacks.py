"""Deltas of experts, stacked and taken apart, against their dense sums."""

from __future__ import annotations

import numpy as np
import pytest

from loracc.adapter import Adapter, Delta, Entry
from loracc.deltas import DoRA, LowRank, Replacement, StackedLowRank
from loracc.dtypes import Array
from loracc.errors import BindingError
from loracc.kinds.packed_experts import PackedExperts
from loracc.passes.expert_stacks import in_the_models_pieces
from loracc.passes.match_names import parse_maps
from loracc.sites import ExpertStack

ROWS, COLUMNS = (3, 5), 4
STACK = ExpertStack("m.experts.up", tuple((f"m.{e}.a.weight", f"m.{e}.b.weight") for e in range(2)), ROWS, COLUMNS)
PIECES = [tensor for tensor, *_ in STACK.places()]


def array(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def adapter(**deltas: Delta) -> Adapter:
    entries = []
    for name, delta in deltas.items():
        module, _, parameter = name.replace("__", ".").rpartition(".")
        entries.append(Entry(module, parameter, delta, (f"key of {name}",)))
    return Adapter("a", "a", "peft", tuple(entries))


def dense(delta: Delta) -> Array:
    return delta.apply_slab(np.zeros([n or 0 for n in delta.shape]), 0, 0, delta.shape[0] or 0)


def low_rank(rows: int, rank: int, scale: float, columns: int = COLUMNS) -> LowRank:
    return LowRank(array(rank, columns), array(rows, rank, seed=1), scale)


@pytest.mark.parametrize("scales", [(2.0, 2.0, 2.0), (2.0, 0.5, -1.0)])
def test_pieces_are_stacked(scales: tuple[float, float, float]) -> None:
    """Parts and experts without a delta get zeros; ranks may differ."""
    first, second, third = (low_rank(*of, s) for of, s in zip([(3, 2), (5, 1), (5, 3)], scales, strict=True))
    given = adapter(m__0__a__weight=first, m__0__b__weight=second, m__1__b__weight=third, other__weight=first)
    kept, made = in_the_models_pieces(given, [STACK], {STACK.name, "other.weight"}).entries
    assert kept.name == "other.weight" and made.name == STACK.name
    assert isinstance(made.delta, StackedLowRank) and made.delta.rank == 2 + 3
    assert made.covers == ("m.0.a.weight", "m.0.b.weight", "m.1.b.weight") and len(made.keys) == 3
    expected = np.zeros(STACK.shape)
    expected[0, :3], expected[0, 3:], expected[1, 3:] = dense(first), dense(second), dense(third)
    np.testing.assert_allclose(dense(made.delta), expected, rtol=1e-14)


@pytest.mark.parametrize("packed", [True, False])
def test_a_stack_is_taken_apart(packed: bool) -> None:
    b, a = array(2, 8, 3), array(2, 3, COLUMNS, seed=1)
    delta: Delta = StackedLowRank(a, b, 1.5)
    expected = dense(delta)
    if packed:
        delta = PackedExperts(a.reshape(6, COLUMNS), np.moveaxis(b, 0, -1).reshape(8, 6), 1.5, 3)
    made = in_the_models_pieces(adapter(m__experts__up=delta), [STACK], PIECES).entries
    assert [entry.name for entry in made] == PIECES and {entry.covers for entry in made} == {(STACK.name,)}
    for entry, (_, expert, lo, hi) in zip(made, STACK.places(), strict=True):
        np.testing.assert_allclose(dense(entry.delta), expected[expert, lo:hi], rtol=1e-14)


def test_a_whole_parameter_is_taken_apart_and_a_prefix_is_no_hindrance() -> None:
    new = array(*STACK.shape)
    for name, maps in (("m__experts__up", ()), ("base_model__m__experts__up", ()), ("x__up", ("x.up=m.experts.up",))):
        made = in_the_models_pieces(adapter(**{name: Replacement(new)}), [STACK], PIECES, parse_maps(maps)).entries
        assert [entry.name for entry in made] == PIECES
        np.testing.assert_array_equal(made[3].delta.apply_slab(np.zeros((5, 4)), 0, 0, 5), new[1, 3:])


def test_what_the_model_has_stays_as_it_is() -> None:
    stacked = adapter(m__experts__up=StackedLowRank(array(2, 3, COLUMNS), array(2, 8, 3), 1.0))
    pieces = adapter(m__0__a__weight=low_rank(3, 2, 1.0))
    assert in_the_models_pieces(stacked, [STACK], {STACK.name}) is stacked
    assert in_the_models_pieces(pieces, [STACK], PIECES) is pieces
    assert in_the_models_pieces(pieces, [], set()) is pieces
    dora = adapter(m__0__a__weight=DoRA(low_rank(3, 2, 1.0), array(3), 0))
    assert in_the_models_pieces(dora, [STACK], {STACK.name}) is dora, "its norm is of the whole weight"


def test_a_piece_of_another_size_is_refused() -> None:
    with pytest.raises(BindingError, match=r"m.0.a.weight.*\[3, 7\], and it has \[3, 4\]"):
        in_the_models_pieces(adapter(m__0__a__weight=low_rank(3, 2, 1.0, columns=7)), [STACK], {STACK.name})
