"""A report as one HTML page that needs nothing but itself: verdicts on top, for a manager; evidence below.

Everything that comes from a model or an adapter is text and is escaped; the page's own policy forbids whatever would be
loaded or run all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any

from loracc.reports.page_deltas import delta_sections
from loracc.reports.page_parts import figure, section, table
from loracc.reports.plots_checks import interval_plot, output_plot, time_plot
from loracc.reports.report_body import verification_of
from loracc.reports.report_style import STYLE
from loracc.reports.report_view import View, view_of

__all__ = ["report_html"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def report_html(body: dict[str, Any]) -> str:
    """The page.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    view = view_of(body)
    judged = verification_of(body)
    parts: Sequence[Callable[[], Iterator[str]]] = (
        lambda: _top(view),
        lambda: iter(["<main>"]),
        lambda: _figures(view),
        lambda: _problems(judged),
        lambda: delta_sections(body),
        lambda: _outputs(judged),
        lambda: _latency(judged.get("latency", {})),
        lambda: _notes(view),
        lambda: _provenance(body["provenance"]),
        lambda: iter(["</main>", _foot(body)]),
    )
    lines = [line for part in parts for line in part()]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(view.verdict)}: {escape(view.title)}</title><style>{STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(lines) + "\n</body></html>\n"


def _top(view: View) -> Iterator[str]:
    yield f'<header><p class="over">loracc {escape(view.kind)}</p><h1>{escape(view.title)}</h1>'
    yield f'<span class="verdict {escape(view.verdict)}">{escape(view.verdict)}</span>'
    yield f'<p class="lead">{escape(view.headline)}</p>'
    if view.checks:
        yield '<div class="checks">'
        for check in view.checks:
            yield f'<div class="check {escape(check.verdict)}"><div class="top"><h3>{escape(check.question)}</h3>'
            yield f'<span class="verdict">{escape(check.verdict)}</span></div>'
            yield f"<p>{escape(check.evidence)}</p><p>{escape(check.flip)}</p></div>"
        yield "</div>"
    yield "</header>"


def _figures(view: View) -> Iterator[str]:
    if view.figures:
        yield '<dl class="figures">'
        for label, value, remark in view.figures:
            yield f'<div><dt>{escape(label)}</dt><dd class="value">{escape(value)}</dd><dd>{escape(remark)}</dd></div>'
        yield "</dl>"


def _problems(judged: dict[str, Any]) -> Iterator[str]:
    """What is wrong and where, when something is."""
    numbers, structure = judged.get("numbers", {}), judged.get("structure", {})
    sites = [site for site in numbers.get("weights", {}).get("sites", []) if site["verdict"] == "fail"]
    after = numbers.get("end_to_end", {}).get("sites", [])
    if sites:
        yield from section("What is wrong", "Weights of the output that are not W + ΔW, rounded once.")
        yield table(("site", "why"), [(site["name"], site["reason"]) for site in sites])
    if structure.get("differences"):
        yield from section(
            "Where the graphs differ", "The first differences between the base's graph and the output's."
        )
        yield f"<pre>{escape(chr(10).join(structure['differences']))}</pre>"
    if after:
        yield from section(
            "Where the error begins", "Relative error right after each site; the first one off is the culprit."
        )
        rows = [(row["site"], "-" if row["error"] is None else f"{row['error']:.3g}") for row in after]
        yield _collapsed(f"{len(rows)} sites", table(("site", "error"), rows, numbers=(1,)), opened=len(rows) <= 12)


def _outputs(judged: dict[str, Any]) -> Iterator[str]:
    end = judged.get("numbers", {}).get("end_to_end") or {}
    outputs = end.get("outputs") or []
    if not outputs:
        return
    yield from section(
        "The model's outputs",
        f"The output against the unfused model in {end['reference']}, and beside it what {end['dtype']} costs the "
        f"unfused model anyway. Inputs: {end['draws']}.",
    )
    yield '<div class="plots">'
    yield figure("Largest error of each output", output_plot(outputs), "Left of the red line passes.")
    rows = [
        (row["name"], _three(row["folded"]), _three(row["unfused"]), _three(row["tolerance"]), _more(row["more"]))
        for row in outputs
    ]
    heads = ("output", "this output", "unfused", "allowed", "also measured")
    yield f"<div>{table(heads, rows, numbers=(1, 2, 3))}</div></div>"


def _more(measured: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_three(value)}" for name, value in measured.items())


def _three(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else "-"


def _latency(latency: dict[str, Any]) -> Iterator[str]:
    if latency.get("ratio") is None:
        return
    measured = f"{latency['pairs']} pairs of calls in {latency['processes']} processes, {latency['runner']}."
    yield from section("Latency", f"Output and base, timed in turn on the same inputs: {measured}")
    yield '<div class="plots">'
    text = f"Median {latency['base_ms']:.3f} ms for the base, {latency['output_ms']:.3f} ms for the output."
    if latency.get("samples") and any(latency["samples"]):
        yield figure("Times", time_plot(latency), text)
    said = "With 95 % intervals. Base against base is the noise: what this machine reports where nothing differs."
    yield figure("Ratios", interval_plot(latency), said)
    yield "</div>"


def _notes(view: View) -> Iterator[str]:
    if view.notes:
        yield from section("Notes")
        yield "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in view.notes) + "</ul>"


def _provenance(found: dict[str, Any]) -> Iterator[str]:
    yield from section("Provenance")
    rows = [("base", found["base"]), *(("adapter", one) for one in found["adapters"]), ("output", found["output"])]
    listed = [(what, one["name"], one["format"], one["digest"]) for what, one in rows if one]
    if listed:
        yield table(("", "name", "format", "digest"), listed)
    if found["command"]:
        yield f"<pre>$ {escape(found['command'])}</pre>"
    yield f'<p class="remark">{escape(", ".join(f"{name} {number}" for name, number in found["versions"].items()))}</p>'


def _collapsed(title: str, content: str, *, opened: bool) -> str:
    return f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>{content}</details>"


def _foot(body: dict[str, Any]) -> str:
    return (
        f"<footer>Written by loracc {escape(body['provenance']['versions']['loracc'])}. "
        "The same inputs give the same page; the .json report holds every figure on it.</footer>"
    )
