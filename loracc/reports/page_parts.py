"""Pieces of the page. Their text is escaped here; only ``svg`` is markup already."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from html import escape

__all__ = ["figure", "section", "table"]


def section(title: str, remark: str = "") -> Iterator[str]:
    """A heading and what it is about."""
    yield f"<h2>{escape(title)}</h2>"
    if remark:
        yield f'<p class="remark">{escape(remark)}</p>'


def figure(title: str, svg: str, caption: str, *, broad: bool = False) -> str:
    """A plot with its heading and caption; a broad one scrolls in itself where the page is narrow."""
    kind, drawn = (' class="broad"', f'<div class="scroll">{svg}</div>') if broad else ("", svg)
    return f"<figure{kind}><h3>{escape(title)}</h3>{drawn}<figcaption>{escape(caption)}</figcaption></figure>"


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Collection[int] = (),
    extra: Collection[int] = (),
) -> str:
    """A table; the columns ``numbers`` are right-aligned, the columns ``extra`` are left out on a narrow page."""

    def attributes(index: int) -> str:
        names = (
            ["number"] * (index in numbers)
            + ["extra"] * (index in extra)
            + ["name"] * (index == 0)
            + ["short"] * (index == 0 and not heads[0])
        )
        return f' class="{" ".join(names)}"' if names else ""

    def row(cells: Sequence[str], tag: str) -> str:
        found = (f"<{tag}{attributes(at)}>{escape(str(cell))}</{tag}>" for at, cell in enumerate(cells))
        return f"<tr>{''.join(found)}</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    return f'<div class="scroll"><table><thead>{row(heads, "th")}</thead><tbody>{body}</tbody></table></div>'
