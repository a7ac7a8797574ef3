"""A report as Markdown, short enough for a pull request or a job's summary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from loracc.reports.report_body import deltas_of, verification_of
from loracc.reports.report_view import delta_cells, view_of
from loracc.reports.words import counted

__all__ = ["escaped", "report_text"]

_SIGNS = {"pass": "✅", "fail": "❌", "inconclusive": "⚠️", "skipped": "⏭️"}
#: Deltas listed; the JSON has them all.
_SHOWN = 40


def report_text(body: dict[str, Any]) -> str:
    """Verdicts first, then the figures; deltas and provenance folded away."""
    return "\n".join(_lines(body)) + "\n"


def _lines(body: dict[str, Any]) -> Iterator[str]:
    view = view_of(body)
    yield f"### {_signed(view.verdict)}: {escaped(view.title)} (loracc {view.kind})"
    yield f"\n{escaped(view.headline)}\n"
    if view.checks:
        rows = [(check.name, _signed(check.verdict), check.evidence, check.flip) for check in view.checks]
        yield from _table(("check", "verdict", "evidence", "what would flip it"), rows)
    if view.figures:
        yield "\n" + "\n".join(
            f"- **{escaped(value)}** {escaped(f'{label}: {said}')}" for label, value, said in view.figures
        )
    yield from (f"- note: {escaped(note)}" for note in view.notes)
    yield from _problems(verification_of(body))
    deltas = deltas_of(body)
    if deltas:
        yield from _folded_away(f"{len(deltas)} deltas", list(_deltas(deltas)))
    if body.get("provenance"):
        yield from _folded_away("provenance", list(_provenance(body["provenance"])))


def _problems(judged: dict[str, Any]) -> Iterator[str]:
    bad = [site for site in judged.get("numbers", {}).get("weights", {}).get("sites", []) if site["verdict"] == "fail"]
    if bad:
        yield f"\n**{counted(len(bad), 'weight')} {'is' if len(bad) == 1 else 'are'} wrong**\n"
        yield from _table(("site", "why"), [(site["name"], site["reason"]) for site in bad[:_SHOWN]])
    differences = judged.get("structure", {}).get("differences", [])
    if differences:
        yield "\n**Differences of the graphs**\n"
        yield from (f"- {escaped(line)}" for line in differences[:_SHOWN])


def _deltas(deltas: Sequence[dict[str, Any]]) -> Iterator[str]:
    shown = sorted(deltas, key=lambda row: -(row.get("relative_norm") or 0.0))[:_SHOWN]
    rows = [delta_cells(row) for row in shown]
    yield from _table(("site", "adapter", "kind", "rank", "scale", "‖ΔW‖/‖W‖", "survived", "effective rank"), rows)
    if len(deltas) > _SHOWN:
        yield f"\nThe strongest {_SHOWN} of {len(deltas)}; the .json report lists all."


def _provenance(found: dict[str, Any]) -> Iterator[str]:
    rows = [("base", found["base"]), *(("adapter", one) for one in found["adapters"]), ("output", found["output"])]
    listed = [(what, one["name"], one["format"], one["digest"]) for what, one in rows if one]
    if listed:
        yield from _table(("", "name", "format", "digest"), listed)
    yield "\n" + escaped(", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    if found["command"]:
        yield f"\n{escaped('$ ' + found['command'])}"


def _folded_away(title: str, lines: Sequence[str]) -> Iterator[str]:
    yield f"\n<details><summary>{escaped(title)}</summary>\n"
    yield from lines
    yield "\n</details>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{' --- |' * len(heads)}"
    yield from (f"| {' | '.join(escaped(cell) for cell in row)} |" for row in rows)


def _signed(verdict: str) -> str:
    return f"{_SIGNS.get(verdict, '')} {verdict}".strip()


def escaped(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line; an ``@name`` or a ``#7`` calls nobody.

    >>> escaped("<b>|a_b|</b>")
    '&lt;b&gt;&#124;a&#95;b&#124;&lt;/b&gt;'
    """
    safe = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
    safe |= {sign: f"&#{ord(sign)};" for sign in "\\`*_[]|!~$@#\"'"}
    return "".join(safe.get(sign, sign) for sign in " ".join(str(text).split()))
