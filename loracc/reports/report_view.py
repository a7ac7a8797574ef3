"""A report in a reader's words: the headline, the checks, and the figures worth knowing. HTML and Markdown show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from statistics import median
from typing import Any

from loracc.reports.report_body import deltas_of, verification_of
from loracc.reports.report_places import place_of
from loracc.reports.words import CHECKS, byte_count, counted, evidence, flip, number

__all__ = ["Check", "View", "delta_cells", "folded_where", "share", "view_of"]

_QUESTIONS = {
    "numbers": "Does it compute the same?",
    "structure": "Is the graph unchanged?",
    "latency": "Is it as fast as the base?",
}
_PASSED = {
    "numbers": "computes what the base with its adapters computes",
    "structure": "in the base's graph",
    "latency": "at the base's speed",
}


@dataclass(frozen=True)
class Check:
    """One check: what it asks, what came out, why, and what would have turned it."""

    name: str
    question: str
    verdict: str
    evidence: str
    flip: str


@dataclass(frozen=True)
class View:
    """What stands at the top of a report.

    Attributes:
        title: What was made, or looked at.
        kind: "fold", "attach" or "verify".
        verdict: The whole one.
        headline: It in a sentence.
        checks: A row a check.
        figures: (label, value, remark).
        notes: Everything else that a reader must know.
    """

    title: str
    kind: str
    verdict: str
    headline: str
    checks: tuple[Check, ...]
    figures: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]


def view_of(body: dict[str, Any]) -> View:
    """The view of a report's JSON."""
    judged = verification_of(body)
    checks = tuple(
        Check(name, _QUESTIONS[name], judged[name]["verdict"], evidence(name, judged[name]), flip(judged[name]))
        for name in CHECKS
        if name in judged
    )
    notes = [*body.get("notes", []), *(judged.get("notes", []) if judged is not body else [])]
    end = judged.get("numbers", {}).get("end_to_end", {})
    notes += [*end.get("notes", []), *(f"fits nowhere and was left out: {key}" for key in body.get("unmatched", []))]
    return View(
        title=_title(body),
        kind=body["report"],
        verdict=judged["verdict"],
        headline=_headline(body, judged, checks),
        checks=checks,
        figures=tuple(_figures(body)),
        notes=tuple(dict.fromkeys(notes)),
    )


def _title(body: dict[str, Any]) -> str:
    output = (body.get("provenance") or {}).get("output") or {}
    return PurePath(body.get("output") or "").name or output.get("name") or "verification"


def _headline(body: dict[str, Any], judged: dict[str, Any], checks: Sequence[Check]) -> str:
    if body.get("dry_run"):
        return "Planned only: nothing was written, and nothing was checked."
    if not checks:
        return "Not checked: the verification was turned off."
    if judged["verdict"] in ("pass", "skipped"):
        good = [_PASSED[check.name] for check in checks if check.verdict == "pass"]
        left = [check.name for check in checks if check.verdict == "skipped"]
        text = f"It {', '.join(good)}." if good else "Nothing could be checked."
        return text + (f" Not checked: {' and '.join(left)}." if left else "")
    bad = [check for check in checks if check.verdict == judged["verdict"]]
    word = "does not hold" if judged["verdict"] == "fail" else "cannot be told"
    refused = " Nothing was written." if body["report"] != "verify" else ""
    return f"{' and '.join(check.name for check in bad).capitalize()}: what is claimed {word}.{refused}"


def _figures(body: dict[str, Any]) -> list[tuple[str, str, str]]:
    deltas = deltas_of(body)
    found = []
    if deltas:
        adapters = len({row["adapter"] for row in deltas})
        places = len({row["name"] for row in deltas})
        kinds = ", ".join(dict.fromkeys(str(row["kind"]) for row in deltas))
        found.append(
            ("deltas", str(len(deltas)), f"{kinds}; {counted(places, 'site')}, {counted(adapters, 'adapter')}")
        )
    norms = [row["relative_norm"] for row in deltas if row.get("relative_norm") is not None]
    if norms:
        found.append(("strength", number(median(norms)), f"median ‖ΔW‖/‖W‖, at most {number(max(norms))}"))
    kept = [(row["survived"], row["name"]) for row in deltas if row.get("survived") is not None]
    if kept:
        least, where = min(kept)
        found.append(("survived", share(least), f"of ΔW after rounding, at least ({where})"))
    ranks = [row["effective_rank"] for row in deltas if row.get("effective_rank") is not None]
    if ranks:
        trained = [row["rank"] for row in deltas if row.get("rank")]
        remark = f"median effective rank{f', trained with {_range(trained)}' if trained else ''}"
        found.append(("directions", f"{median(ranks):.1f}", remark))
    if body.get("bytes"):
        found.append(("size", byte_count(body["bytes"]), counted(len(body.get("files", [])), "file")))
    return found


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def share(value: float | None) -> str:
    """A share in percent, that says 100 only where nothing is missing.

    >>> share(1.0), share(0.999999), share(0.5), share(0.9999999952), share(None)
    ('100 %', '99.9999 %', '50 %', '> 99.9999 %', '-')
    """
    if value is None:
        return "-"
    if 0.999999 < value < 1.0:
        return "> 99.9999 %"
    text = f"{100 * value:.4f}".rstrip("0").rstrip(".") if value > 0.99 else f"{100 * value:.3g}"
    return f"{text} %"


def folded_where(deltas: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The deltas by layer, in their order; those in no layer under ""."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in deltas:
        groups.setdefault(place_of(row["name"])[0], []).append(row)
    return groups


def delta_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One delta's row as both reports show it: site, adapter, kind, rank, scale, ‖ΔW‖/‖W‖, survived, effective rank."""
    return (
        row["name"],
        row["adapter"],
        row["kind"],
        "-" if row["rank"] is None else str(row["rank"]),
        number(row["scale"]),
        number(row.get("relative_norm")),
        share(row.get("survived")),
        "-" if row.get("effective_rank") is None else f"{row['effective_rank']:.1f}",
    )
