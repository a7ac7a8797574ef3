"""What a verification found: three checks, each with its verdict, its evidence and the threshold that decided.

A check that could not be made says ``skipped`` and why; nothing is ever passed because it was not looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loracc.proof.verdict_checks import Latency, Structure, Verdict, worst
from loracc.proof.verdict_flips import numbers_flip

if TYPE_CHECKING:
    from loracc.proof.coverage import Coverage

__all__ = [
    "EndToEnd",
    "Latency",
    "Numbers",
    "OutputError",
    "SiteError",
    "Structure",
    "Verdict",
    "Verification",
    "WeightSite",
    "Weights",
    "worst",
]


#: Of the JSON, as docs/verification.md has it: keys are added within a number, never renamed or removed.
SCHEMA = 1


@dataclass(frozen=True)
class WeightSite:
    """One bound initializer of the output against the float64 oracle.

    Attributes:
        name: The site's name; several sites of one initializer are joined with ", ".
        initializer: Its name in the output.
        adapter: Names of the adapters.
        dtype: Its type in the output.
        correctly_rounded: Share of the elements that are the oracle rounded once.
        required: The share that is needed; 0 of calibrated rounding, which chooses (loracc/proof/calibrated.py).
        worst_excess: Largest |W'−oracle| / (half an ulp + 2⁻²¹(|W|+|s|Σ|B||A|)), or over what calibrated rounding may
            move an element; at most 1 passes.
        max_relative_error: max |W'−oracle| / max |oracle|.
        relative_norm: ‖ΔW‖/‖W‖, None for a weight of zeros.
        survived: max(0, 1 − ‖(W'−W)−ΔW‖/‖ΔW‖), None when ΔW is zero.
        reason: Why it failed; empty when it passed.
        tolerance: What one rounding costs, relative to the largest element; None for that of ``dtype``. Of a quantized
            weight one step of its grid (half of one, or more at the ends), and ``survived`` is ⟨W'−W, ΔW⟩/‖ΔW‖².
    """

    name: str
    initializer: str
    adapter: str
    dtype: str
    correctly_rounded: float
    required: float
    worst_excess: float
    max_relative_error: float
    relative_norm: float | None
    survived: float | None
    reason: str = ""
    tolerance: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {"verdict": "fail" if self.reason else "pass", **vars(self)}


@dataclass(frozen=True)
class Weights:
    """Every initializer: the bound ones against the oracle, the others byte for byte.

    Attributes:
        verdict: Of this part.
        reason: Why it failed or was skipped.
        sites: One row per bound initializer of the output, in order.
        untouched: How many unbound initializers are what they were.
        changed: Unbound initializers that are not.
        worst_site: The site furthest from the oracle; empty without sites.
        max_relative_error: The largest of the sites'.
        tolerance: What rounding once may cost: the unit roundoff of the bound weights' least precise type, and the
            slack of DESIGN.md 4.
    """

    verdict: Verdict
    reason: str = ""
    sites: tuple[WeightSite, ...] = ()
    untouched: int = 0
    changed: tuple[str, ...] = ()
    worst_site: str = ""
    max_relative_error: float | None = None
    tolerance: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "sites": [site.to_json() for site in self.sites], "changed": list(self.changed)}


@dataclass(frozen=True)
class OutputError:
    """One output of the graph, the worst over all input draws.

    Attributes:
        name: The output.
        folded: max|folded − reference| / max|reference|.
        unfused: The same of the unfused model run in the output's own type.
        effect: The same of the base model: what the adapter does.
        relative_l2: ‖folded − reference‖ / ‖reference‖.
        tolerance: What ``folded`` may be.
        more: Top-1 agreement and KL divergence of logits, cosine of embeddings.
    """

    name: str
    folded: float
    unfused: float
    effect: float
    relative_l2: float
    tolerance: float
    more: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class SiteError:
    """How far the output's graph is from the reference right after one bound site."""

    site: str
    error: float

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class EndToEnd:
    """The folded graph against the unfused one in higher precision.

    Attributes:
        verdict: Of this part.
        reason: Why it failed or was skipped.
        max_relative_error: The folded model's, at the output that came closest to its tolerance or crossed it.
        tolerance: Of that output: max(multiple · the unfused model's error in the output's own type, floor).
        would_pass_at: The smallest multiple that would have passed; None when the verdict did not hang on it.
        multiple, floor: What the tolerance is made of.
        reference: Type of the reference ("double").
        dtype: The output's own type.
        effect: The largest of the outputs' effects.
        noise_floor: What the effect must exceed.
        outputs: One row an output.
        sites: Errors after each bound site, when the check failed or ``taps`` were asked for; the first that is off is
            the culprit.
        worst_site: The site after which the error is largest.
        task: Where there were labels or text, the scores of "base", "unfused" and "folded": accuracy, perplexity.
        rounding: Of calibrated rounding, the outputs' relative error (L2, the largest; a decoder's cache left out) as
            "calibrated", and as "nearest" that of the same fold, rounded to nearest, on the same inputs.
        draws: How many input draws, and where they come from.
        notes: What the reader must know about how it was computed.
    """

    verdict: Verdict
    reason: str = ""
    max_relative_error: float | None = None
    tolerance: float | None = None
    would_pass_at: float | None = None
    multiple: float | None = None
    floor: float | None = None
    reference: str = ""
    dtype: str = ""
    effect: float | None = None
    noise_floor: float | None = None
    outputs: tuple[OutputError, ...] = ()
    sites: tuple[SiteError, ...] = ()
    worst_site: str = ""
    task: dict[str, dict[str, float]] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)
    draws: str = ""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        parts = {"outputs": [o.to_json() for o in self.outputs], "sites": [s.to_json() for s in self.sites]}
        return {**vars(self), **parts, "notes": list(self.notes)}


@dataclass(frozen=True)
class Numbers:
    """Weights and end-to-end outputs together."""

    weights: Weights
    end_to_end: EndToEnd
    coverage: Coverage | None = None

    @property
    def verdict(self) -> Verdict:
        covered = (self.coverage.verdict,) if self.coverage else ()
        return worst((self.weights.verdict, self.end_to_end.verdict, *covered))

    @property
    def reason(self) -> str:
        """Why it failed, worst site included."""
        parts = (self.coverage, self.weights, self.end_to_end)
        failed = [part.reason for part in parts if part is not None and part.verdict == "fail"]
        if failed or self.verdict == "pass":
            return "; ".join(failed)
        return self.weights.reason or self.end_to_end.reason

    def to_json(self) -> dict[str, Any]:
        outputs = self.end_to_end.max_relative_error is not None
        measured: Weights | EndToEnd = self.end_to_end if outputs else self.weights
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "max_relative_error": measured.max_relative_error,
            "tolerance": measured.tolerance,
            "measured_on": "outputs" if outputs else "weights",
            "would_pass_at": self.end_to_end.would_pass_at,
            "worst_site": self.weights.worst_site,
            "summary": self._summary(),
            "threshold": numbers_flip(self),
            "effect": self._effect(),
            "coverage": self.coverage.to_json() if self.coverage else {"verdict": "skipped"},
            "weights": self.weights.to_json(),
            "end_to_end": self.end_to_end.to_json(),
        }

    def _effect(self) -> dict[str, Any]:
        """Whether the adapter does anything: to the outputs, or where those were not looked at, to the weights."""
        end = self.end_to_end
        if end.effect is not None and end.noise_floor is not None:
            value, floor, what = end.effect, end.noise_floor, "outputs"
        elif self.weights.verdict != "skipped":
            value, floor, what = (
                max((site.relative_norm or 0.0 for site in self.weights.sites), default=0.0),
                0.0,
                "weights",
            )
        else:
            return {"verdict": "skipped"}
        return {
            "verdict": "pass" if value > floor else "fail",
            "value": value,
            "noise_floor": floor,
            "measured_on": what,
        }

    def _summary(self) -> str:
        sites = self.weights.sites
        share = min((site.correctly_rounded for site in sites), default=None)
        text = "" if share is None else f"{len(sites)} weights, {100 * share:.4g} % correctly rounded"
        skipped = f"end to end skipped: {self.end_to_end.reason}" if self.end_to_end.verdict == "skipped" else ""
        return "; ".join(part for part in (text, skipped) if part)


@dataclass(frozen=True)
class Verification:
    """The whole verdict."""

    numbers: Numbers
    structure: Structure
    latency: Latency
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """A failure anywhere is a failure."""
        return worst((self.numbers.verdict, self.structure.verdict, self.latency.verdict))

    @property
    def reason(self) -> str:
        """The failed checks and why."""
        checks: dict[str, Numbers | Structure | Latency] = {
            "numbers": self.numbers,
            "structure": self.structure,
            "latency": self.latency,
        }
        bad = {name: check for name, check in checks.items() if check.verdict in ("fail", "inconclusive")}
        return "; ".join(f"{name}: {check.reason}" for name, check in bad.items())

    def summary(self) -> str:
        """The reason, or what was found where nothing failed: one paragraph for a person."""
        return self.reason or f"numbers {self.numbers.verdict}, structure {self.structure.verdict}"

    def to_json(self) -> dict[str, Any]:
        """The contract of ``verify --json`` (DESIGN.md 2). JSON has no infinity: an error without bound is null."""
        body: dict[str, Any] = {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "reason": self.reason,
            "numbers": self.numbers.to_json(),
            "structure": self.structure.to_json(),
            "latency": self.latency.to_json(),
            "notes": list(self.notes),
        }
        finite: dict[str, Any] = _finite(body)
        return finite


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
