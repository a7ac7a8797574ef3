"""The delta is brought to its own strength, at a small cost in the products."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from loracc.algebra.strength import restore_strength


@given(st.integers(0, 10_000), st.integers(8, 40), st.integers(8, 40), st.floats(0.02, 2.0))
@settings(max_examples=40, deadline=None)
def test_less_of_the_direction_is_left(seed: int, inside: int, outside: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    change, x = size * rng.standard_normal((outside, inside)), rng.standard_normal((50, inside))
    exact, moment, tolerance = rng.standard_normal((outside, inside)), x.T @ x, 0.02
    error = np.rint(exact) - exact
    along = float(np.vdot(error, change))
    moves = -np.sign(along * change)
    moved = restore_strength(error, change, moment, moves, tolerance)
    after = error + np.where(moved, moves, 0.0)
    left = abs(float(np.vdot(after, change)))
    assert left <= abs(along) + 1e-9
    # What is left is within the tolerance, or less than any move that is still to be had can mend.
    power = float(np.vdot(change, change))
    worth = np.abs(moves * change)[~moved]
    assert left <= tolerance * power + 1e-9 or not (worth <= left + tolerance * power - 1e-9).any()


def test_cheap_elements_are_moved() -> None:
    """Of an input that is seldom seen, not of one that is large."""
    change, error = np.ones((4, 6)), np.full((4, 6), 0.25)
    moment = np.diag([100.0, 100.0, 100.0, 1.0, 1.0, 1.0])
    moved = restore_strength(error, change, moment, np.full((4, 6), -1.0), 0.01)
    assert moved.sum() == 6 and not moved[:, :3].any()


def test_nothing_to_do() -> None:
    zeros = np.zeros((2, 3))
    assert not restore_strength(zeros, zeros, np.eye(3), np.ones((2, 3)), 0.01).any()
    assert not restore_strength(zeros + 1, zeros + 1, np.eye(3), zeros, 0.01).any()  # none may be moved
