"""Rounding with feedback: on the grid, and never with more error in the products than rounding to nearest."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loracc.algebra.feedback import _inverse_factor, round_with_feedback


@given(st.integers(0, 10_000), st.integers(1, 90), st.integers(1, 12), st.integers(1, 90))
@settings(max_examples=40, deadline=None)
def test_on_the_grid_with_less_error(seed: int, inside: int, outside: int, rank: int) -> None:
    rng = np.random.default_rng(seed)
    exact = rng.standard_normal((outside, inside))
    x = rng.standard_normal((rank, inside))
    moment, damping = x.T @ x, 0.01

    def to_grid(values: np.ndarray, _column: int = 0, _row: int = 0) -> np.ndarray:
        return values.astype(ml_dtypes.bfloat16).astype(values.dtype)

    found = round_with_feedback(exact, moment, to_grid, damping=damping, sweeps=6)
    np.testing.assert_array_equal(found, to_grid(found))
    # What is made small is the error with the damping in it.
    system = moment + damping * np.diag(moment).mean() * np.eye(inside)
    errors = [float(np.trace((q - exact) @ system @ (q - exact).T)) for q in (found, to_grid(exact))]
    assert errors[0] <= 1.25 * errors[1] + 1e-12  # a greedy search: a matrix of few rows may be unlucky


def test_correlated_inputs_gain_much() -> None:
    rng = np.random.default_rng(0)
    exact, x = rng.standard_normal((64, 96)), rng.standard_normal((500, 12)) @ rng.standard_normal((12, 96))
    moment = x.T @ x
    found = round_with_feedback(exact, moment, lambda values, _k, _lo: np.rint(4 * values) / 4)
    errors = [float(np.trace((q - exact) @ moment @ (q - exact).T)) for q in (found, np.rint(4 * exact) / 4)]
    assert errors[0] < 0.1 * errors[1]


def test_inputs_that_are_always_zero() -> None:
    exact = np.array([[0.3, 0.7]])
    found = round_with_feedback(exact, np.zeros((2, 2)), lambda values, _k, _lo: np.rint(values))
    assert found.tolist() == [[0.0, 1.0]]


def test_moments_that_are_not_finite() -> None:
    with pytest.raises(np.linalg.LinAlgError):
        round_with_feedback(np.ones((1, 2)), np.full((2, 2), np.nan), lambda values, _k, _lo: values)


@pytest.mark.parametrize("size", [1, 3, 64, 65, 150])
def test_the_factor_of_the_inverse(size: int) -> None:
    rows = np.random.default_rng(size).standard_normal((2 * size, size))
    system = rows.T @ rows
    factor = _inverse_factor(system)
    np.testing.assert_array_equal(factor, np.triu(factor))
    np.testing.assert_allclose(factor.T @ factor @ system, np.eye(size), atol=1e-9)
