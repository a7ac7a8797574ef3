"""Is the ratio of two latencies one? Paired log-ratios, a two-level bootstrap, and an equivalence test.

The estimate is the mean over processes of the median over a process's blocks of log(model / reference). Its interval is
a bootstrap on two levels: processes are drawn with replacement, and in each the blocks. (Pairing before the median, and
not the ratio of two medians, is what cancels drift: simulated with a random walk of 1 % a block, its interval is three
times narrower. With blocks alone and a spread of 0.5 % between processes, a nominal 95 % interval holds the truth
in 53 % of the runs; with both levels in 85 to 100 %.)

The test is the confidence-interval form of two one-sided tests: equal when the whole 95 % interval lies inside
[1 − margin, 1 + margin], slower when the whole of it lies above. That is each one-sided test at 2.5 %; the 90 %
interval of the usual 5 % is reported beside and decides nothing. Everything else is too noisy to tell, with an
estimate of how much longer a verdict would take: an interval's width shrinks with the square root of the pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loracc.dtypes import Array
from loracc.proof.verdict import Verdict

__all__ = ["Ratio", "Ruling", "estimate", "rule"]

_RESAMPLES = 1000
#: Elements of resampled measurements in memory.
_AT_ONCE = 1 << 18
#: Estimates beyond this are no plan.
_MOST_PAIRS = 1_000_000


@dataclass(frozen=True)
class Ratio:
    """The ratio, its 95 % interval, and the 90 % one inside it."""

    value: float
    low: float
    high: float
    pairs: int
    low90: float = math.nan
    high90: float = math.nan

    @property
    def distance(self) -> float:
        """How far from 1 the interval reaches."""
        return max(abs(self.low - 1.0), abs(self.high - 1.0))


@dataclass(frozen=True)
class Ruling:
    """The verdict and what would have changed it.

    Attributes:
        verdict: pass, fail or inconclusive.
        reason: Why it is no pass.
        would_pass_at: The margin from which on it would have passed, the noise floor's included.
        more_pairs: About how many pairs more a verdict needs; None when there is one, or none can be expected.
        comparison: "equal", "slower", "faster" or "unclear": the same in a word about the model.
    """

    verdict: Verdict
    reason: str
    would_pass_at: float
    more_pairs: int | None
    comparison: str


def estimate(blocks: Sequence[Array], *, seed: int = 0) -> Ratio:
    """The ratio of paired times.

    Args:
        blocks: For each process float64 ``[rounds, 2]``: seconds of the reference, seconds of the model.
        seed: Of the bootstrap.

    >>> twice = estimate([np.full((20, 2), (1.0, 2.0)), np.full((9, 2), (1.5, 3.0))])
    >>> round(twice.value, 9), round(twice.low, 9), round(twice.high, 9), twice.pairs
    (2.0, 2.0, 2.0, 29)
    """
    logs = [np.log(times[:, 1]) - np.log(times[:, 0]) for times in blocks]
    rng = np.random.default_rng(seed)
    medians = np.stack([_medians(values, rng) for values in logs])
    drawn = rng.integers(0, len(logs), medians.shape)
    resampled = np.take_along_axis(medians, drawn, axis=0).mean(axis=0)
    ends = np.exp(np.quantile(resampled, [0.025, 0.05, 0.95, 0.975]))
    value = math.exp(float(np.mean([np.median(values) for values in logs])))
    low, low90, high90, high = (float(end) for end in ends)
    return Ratio(value, low, high, sum(map(len, logs)), low90, high90)


def _medians(values: Array, rng: np.random.Generator) -> Array:
    """Medians of resamples of one process's log-ratios."""
    many = max(1, _AT_ONCE // len(values))
    parts = [
        np.median(values[rng.integers(0, len(values), (min(many, _RESAMPLES - done), len(values)))], axis=1)
        for done in range(0, _RESAMPLES, many)
    ]
    return np.concatenate(parts)


def rule(ratio: Ratio, noise: Ratio, margin: float) -> Ruling:
    """Judge a ratio.

    Args:
        ratio: Output against base.
        noise: Base against base, from the same run: what no difference looks like here. It must itself pass.
        margin: What counts as equal.
    """
    needed = max(ratio.distance, noise.distance)
    if ratio.low > 1.0 + margin and ratio.low > 1.0 + noise.distance:
        reason = f"slower: {_percent(ratio)}, ±{100 * margin:g} % counts as equal"
        return Ruling("fail", reason, needed, None, "slower")
    if needed <= margin:
        return Ruling("pass", "", needed, None, "equal")
    if ratio.high < 1.0 - margin and ratio.high < 1.0 - noise.distance:
        reason = f"faster, so not the same work: {_percent(ratio)}"
        return Ruling("inconclusive", reason, needed, None, "faster")
    more = _more_pairs(ratio, noise, margin)
    longer = f"; about {more:,} more pairs would tell ({more / ratio.pairs:,.3g} times this run's)" if more else ""
    what = f"base against base reaches ±{100 * noise.distance:.2g} %" if noise.distance > margin else _percent(ratio)
    reason = f"too noisy to tell: {what}, margin ±{100 * margin:g} %{longer}"
    return Ruling("inconclusive", reason, needed, more, "unclear")


def _percent(ratio: Ratio) -> str:
    low, high = 100 * (ratio.low - 1), 100 * (ratio.high - 1)
    return f"{100 * (ratio.value - 1):+.2f} % [{low:+.2f}, {high:+.2f}]"


def _more_pairs(ratio: Ratio, noise: Ratio, margin: float) -> int | None:
    """Pairs still to be measured until both intervals fit; None when the centre itself lies on the border."""
    found = []
    for one in (ratio, noise):
        half = (one.high - one.low) / 2
        off = abs(one.value - 1.0)
        # A centre that nothing tells from 1 is planned for as 1.
        room = margin if half >= off else abs(margin - off)
        if half and room < half * math.sqrt(one.pairs / _MOST_PAIRS):
            return None
        found.append(math.ceil(one.pairs * (half / room) ** 2) - one.pairs if half else 0)
    return max(*found, 1)
