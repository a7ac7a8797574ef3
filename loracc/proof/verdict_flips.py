"""The threshold that decided a verdict, and where it would have turned: for a reader who asks how close it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loracc.proof.verdict import Numbers
    from loracc.proof.verdict_checks import Latency, Structure

__all__ = ["latency_flip", "numbers_flip", "structure_flip"]


def _flip(name: str, value: float | None, flips_at: float | None, text: str) -> dict[str, Any]:
    return {"name": name, "value": value, "flips_at": flips_at, "text": text}


def numbers_flip(numbers: Numbers) -> dict[str, Any] | None:
    """Of the check that came closest: the outputs' tolerance, or the share of correctly rounded elements."""
    end, weights = numbers.end_to_end, numbers.weights
    if end.max_relative_error is not None and end.tolerance is not None and end.verdict != "skipped":
        error, tolerance = end.max_relative_error, end.tolerance
        no_signal = end.verdict == "fail" and error <= tolerance
        if no_signal and end.effect is not None:
            text = f"the adapter's effect is {end.effect:.3g}; above {end.noise_floor:.3g} it would have counted"
            return _flip("noise_floor", end.noise_floor, end.effect, text)
        if weights.verdict != "fail" or end.verdict == "fail":
            word = "passes from" if end.verdict == "fail" else "fails below"
            return _flip("tolerance", tolerance, error, f"tolerance {tolerance:.3g}; {word} {error:.3g}")
    site = next((site for site in weights.sites if site.name == weights.worst_site), None)
    if site is None:
        return None
    if not site.required:  # calibrated rounding: no element need be the nearest one
        text = f"no element further from W + ΔW than allowed; {site.name} comes to {site.worst_excess:.3g} of it"
        return _flip("worst_excess", 1.0, site.worst_excess, text)
    shown = f"{100 * site.correctly_rounded:.5g}"
    word = "passes from" if site.reason else "fails above"
    text = f"{100 * site.required:g} % correctly rounded are required; {site.name} {word} {shown} %"
    return _flip("correctly_rounded", site.required, site.correctly_rounded, text)


def structure_flip(structure: Structure) -> dict[str, Any] | None:
    """One difference is enough."""
    if structure.verdict == "skipped":
        return None
    count = len(structure.differences)
    text = f"{count} differences, none is allowed" if count else "the first difference fails it"
    return _flip("differences", 0, float(max(count, 1)), text)


def latency_flip(latency: Latency) -> dict[str, Any] | None:
    """The margin at which both intervals would just fit."""
    if latency.would_pass_at is None or latency.margin is None:
        return None
    margin, fits = 100 * latency.margin, 100 * latency.would_pass_at
    word = "fails below" if latency.verdict == "pass" else "passes from"
    return _flip("margin", latency.margin, latency.would_pass_at, f"margin ±{margin:g} %; {word} ±{fits:.3g} %")
