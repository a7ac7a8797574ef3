"""Paired timing in one process: blocks that cancel drift and give every model the same neighbours.

One round times every other model X against the reference A in a block A X X A. The halves of a block are centred on the
same moment, so a steady drift of the machine (heat, load) cancels in X/A; and within A X X A | A Y Y A | ... each of A
and X runs once right after itself, with its weights warm in the caches, and once after another. A block that is not
symmetrical in both ways (A B C C B A, where B never follows itself) makes small models look slower than they are.

Nothing here reads a clock: a :data:`loracc.runners.runner.TimedCall` says how long it took, so that a device's events,
a wall clock and a simulation are the same to it.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from loracc.dtypes import Array
from loracc.runners.runner import TimedCall

__all__ = ["Blocks", "measure"]

#: One timed unit lasts at least this long, so that the clock's and the call's own cost do not count.
_UNIT_SECONDS = 0.002
#: Rounds of one process: an interval needs some, and more than enough are no better.
_FEWEST_ROUNDS, _MOST_ROUNDS = 5, 1000
#: Part of the time that goes into warming up, and what it is at least: caches, clocks and a device's own tuning.
_WARM_SHARE, _WARM_SECONDS = 0.1, 0.2

#: Per other model a float64 array [rounds, 2] of seconds a run: the reference's, the model's.
Blocks = list[Array]


def measure(calls: Sequence[TimedCall], seconds: float, *, reverse: bool = False) -> Blocks:
    """Time every model against the first.

    Args:
        calls: The reference, and the others.
        seconds: Time to spend, warm-up included; a few rounds are run in any case.
        reverse: Blocks X A A X instead of A X X A: for every second process, so that no order is favoured.

    Returns:
        A ``[rounds, 2]`` array for each of ``calls[1:]``.
    """
    with _no_collection():
        repeats, spent = _warm_up(calls, max(seconds * _WARM_SHARE, _WARM_SECONDS))
        rounds: list[list[tuple[float, float]]] = []
        while len(rounds) < _FEWEST_ROUNDS or (spent < seconds and len(rounds) < _MOST_ROUNDS):
            rounds.append([_block(calls[0], other, repeats, reverse=reverse) for other in calls[1:]])
            spent += 2 * repeats * sum(a + b for a, b in rounds[-1])
    return list(np.asarray(rounds, np.float64).transpose(1, 0, 2))


def _block(reference: TimedCall, other: TimedCall, repeats: int, *, reverse: bool) -> tuple[float, float]:
    """Seconds a run of the reference and of the other model takes, each the mean of two units."""
    outer, inner = (other, reference) if reverse else (reference, other)
    first, second, third, fourth = (call(repeats) for call in (outer, inner, inner, outer))
    a, b = (first + fourth) / (2 * repeats), (second + third) / (2 * repeats)
    return (b, a) if reverse else (a, b)


def _warm_up(calls: Sequence[TimedCall], seconds: float) -> tuple[int, float]:
    """Run all of them for a while: how many runs make a timed unit, and the seconds spent."""
    fastest, spent = math.inf, 0.0
    while spent < seconds:
        for call in calls:
            took = call(1)
            fastest, spent = min(fastest, took), spent + max(took, 1e-6)
    return max(1, math.ceil(_UNIT_SECONDS / max(fastest, 1e-7))), spent


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's garbage collector rests while the clock runs."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
