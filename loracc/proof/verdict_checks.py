"""Verdicts, and what the structure and latency checks found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from loracc.proof.verdict_flips import latency_flip, structure_flip

__all__ = ["Latency", "Structure", "Verdict", "worst"]

Verdict = Literal["pass", "fail", "inconclusive", "skipped"]
_ORDER: tuple[Verdict, ...] = ("fail", "inconclusive", "pass", "skipped")


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict of several checks together: a failure beats doubt, doubt beats a pass, a pass beats a skipped check.

    >>> worst(["pass", "skipped"]), worst(["pass", "inconclusive"]), worst([])
    ('pass', 'inconclusive', 'skipped')
    """
    found = set(verdicts)
    return next((verdict for verdict in _ORDER if verdict in found), "skipped")


@dataclass(frozen=True)
class Structure:
    """Base and output graph, node for node.

    Attributes:
        verdict: Isomorphic or not.
        reason: The first difference.
        differences: Readable differences, the first ones.
        nodes: Nodes of the base graph, subgraphs included.
        clones: Output initializers that are un-shared copies: {name in the output: name in the base}.
        optimized: Verdict on the graphs after the runtime's optimizer.
        optimized_reason: Why that failed or was skipped.
        optimized_nodes: Nodes after it.
        kernels: Verdict on the kernels that ran, by the runtime's profile: operator, provider, shapes.
        kernels_reason: Why that failed or was skipped.
        kernels_run: How many the base runs.
        compared: What was compared, where it was no graph.
    """

    verdict: Verdict
    reason: str = ""
    differences: tuple[str, ...] = ()
    nodes: int = 0
    clones: dict[str, str] = field(default_factory=dict)
    optimized: Verdict = "skipped"
    optimized_reason: str = ""
    optimized_nodes: int | None = None
    kernels: Verdict = "skipped"
    kernels_reason: str = ""
    kernels_run: int | None = None
    compared: str = ""

    def to_json(self) -> dict[str, Any]:
        tensors = "the same tensors, in names, shapes, dtypes and order"
        compared = self.compared or (f"{self.nodes} nodes, isomorphic" if self.nodes else tensors)
        levels = f", {self.optimized_nodes} after the runtime's optimizer" if self.optimized == "pass" else ""
        levels += f", {self.kernels_run} kernels alike" if self.kernels == "pass" else ""
        summary = compared + levels if self.verdict == "pass" else ""
        return {
            **vars(self),
            "differences": list(self.differences),
            "summary": summary,
            "threshold": structure_flip(self),
        }


@dataclass(frozen=True)
class Latency:
    """Output against base, in time.

    Attributes:
        verdict: pass: the interval lies inside 1 ± margin; fail: wholly above it; inconclusive: neither.
        ratio: Median of the paired ratios output/base, averaged over the processes.
        interval: Its bootstrap 95 % interval, which decides.
        interval_90: The 90 % one: two one-sided tests at 5 %. It decides nothing.
        noise_ratio, noise_interval: The same for a second copy of the base against the base.
        noise_floor: How far from 1 that interval reaches.
        margin: What counts as equal.
        would_pass_at: The margin that would have passed.
        pairs: Pairs measured.
        processes: In how many processes.
        more_pairs: Estimated number of further pairs that a verdict needs; None when there is one.
        base_ms, output_ms: Median times.
        runner: What ran them.
        samples, noise_samples: Per process some of the pairs (base, output) and (base, base) in milliseconds.
    """

    verdict: Verdict
    reason: str = ""
    ratio: float | None = None
    interval: tuple[float, float] | None = None
    interval_90: tuple[float, float] | None = None
    noise_ratio: float | None = None
    noise_interval: tuple[float, float] | None = None
    noise_floor: float | None = None
    margin: float | None = None
    would_pass_at: float | None = None
    pairs: int = 0
    processes: int = 0
    more_pairs: int | None = None
    base_ms: float | None = None
    output_ms: float | None = None
    runner: str = ""
    samples: tuple[tuple[tuple[float, float], ...], ...] = ()
    noise_samples: tuple[tuple[tuple[float, float], ...], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "threshold": latency_flip(self)}
