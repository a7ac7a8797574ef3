"""Is the ratio of two latencies one? Medians of paired log-ratios, a bootstrap interval, and an equivalence test.

The test is the confidence-interval form of two one-sided tests: equal when the whole 95 % interval lies inside
[1 − margin, 1 + margin], slower when the whole of it lies above. Everything else is too noisy to tell, with an estimate
of how much longer a verdict would take: the interval's width shrinks with the square root of the number of pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from loracc.dtypes import Array
from loracc.verdict import Verdict

__all__ = ["Ratio", "Ruling", "estimate", "rule"]

_RESAMPLES = 1000
#: Elements of resampled measurements in memory.
_AT_ONCE = 1 << 18
#: Estimates beyond this are no plan.
_MOST_PAIRS = 1_000_000


@dataclass(frozen=True)
class Ratio:
    """Median of the paired ratios and its 95 % interval."""

    value: float
    low: float
    high: float
    pairs: int

    @property
    def distance(self) -> float:
        """How far from 1 the interval reaches."""
        return max(abs(self.low - 1.0), abs(self.high - 1.0))


@dataclass(frozen=True)
class Ruling:
    """The verdict and what would have changed it."""

    verdict: Verdict
    reason: str
    would_pass_at: float
    more_pairs: int | None


def estimate(times: Array, against: Array, *, seed: int = 0) -> Ratio:
    """The ratio ``times / against`` of paired measurements, float64 ``[pairs]`` each.

    >>> twice = estimate(np.full(20, 2.0), np.full(20, 1.0))
    >>> round(twice.value, 9), round(twice.low, 9), round(twice.high, 9)
    (2.0, 2.0, 2.0)
    """
    logs = np.log(times) - np.log(against)
    rng = np.random.default_rng(seed)
    many = max(1, _AT_ONCE // len(logs))
    resampled = [
        np.median(logs[rng.integers(0, len(logs), (min(many, _RESAMPLES - done), len(logs)))], axis=1)
        for done in range(0, _RESAMPLES, many)
    ]
    low, high = np.quantile(np.concatenate(resampled), [0.025, 0.975])
    return Ratio(math.exp(float(np.median(logs))), math.exp(float(low)), math.exp(float(high)), len(logs))


def rule(ratio: Ratio, noise: Ratio, margin: float) -> Ruling:
    """Judge a ratio.

    Args:
        ratio: Output against base.
        noise: Base against base, from the same run: what no difference looks like here.
        margin: What counts as equal.
    """
    needed = ratio.distance
    if ratio.low > 1.0 + margin and ratio.low > 1.0 + noise.distance:
        return Ruling("fail", f"slower: {_percent(ratio)}, ±{100 * margin:g} % counts as equal", needed, None)
    if needed <= margin and noise.distance <= margin:
        return Ruling("pass", "", needed, None)
    if ratio.high < 1.0 - margin:
        return Ruling("inconclusive", f"faster, so not the same work: {_percent(ratio)}", needed, None)
    more = _more_pairs(ratio, noise, margin)
    longer = f"; about {more:,} more pairs would tell" if more else ""
    what = f"base against base reaches ±{100 * noise.distance:.2g} %" if noise.distance > margin else _percent(ratio)
    return Ruling("inconclusive", f"too noisy to tell: {what}, margin ±{100 * margin:g} %{longer}", needed, more)


def _percent(ratio: Ratio) -> str:
    low, high = 100 * (ratio.low - 1), 100 * (ratio.high - 1)
    return f"{100 * (ratio.value - 1):+.2f} % [{low:+.2f}, {high:+.2f}]"


def _more_pairs(ratio: Ratio, noise: Ratio, margin: float) -> int | None:
    """Pairs still to be measured until both intervals fit; None when the centre itself lies on the border."""
    found = []
    for one in (ratio, noise):
        half = (one.high - one.low) / 2
        room = abs(margin - abs(one.value - 1.0))
        if half and room < half * math.sqrt(one.pairs / _MOST_PAIRS):
            return None
        found.append(math.ceil(one.pairs * (half / room) ** 2) - one.pairs if half else 0)
    return max(*found, 1)
