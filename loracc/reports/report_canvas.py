"""One matplotlib figure as a piece of HTML: no fonts, colours or addresses of its own.

Colours are drawn as placeholders and become the page's CSS variables, so one drawing serves a light and a dark page.
The bytes depend on what is drawn only: ids are salted with a constant, and there is no date.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

from loracc.errors import require

__all__ = ["ACCENT", "BAD", "GOOD", "INK", "LINE", "MUTED", "SECOND", "drawn", "log_scale"]

INK, MUTED, LINE, ACCENT, SECOND, GOOD, BAD = (f"#10000{digit}" for digit in range(1, 8))
_VARIABLES = dict(
    zip(
        (INK, MUTED, LINE, ACCENT, SECOND, GOOD, BAD),
        ("ink", "muted", "line", "accent", "second", "good", "bad"),
        strict=True,
    )
)
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "loracc",
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of sites are not formulas
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.4,
}


def drawn(name: str, paint: Callable[[Any], None], *, width: float = 4.4, height: float = 2.6) -> str:
    """An ``<svg>`` element.

    Args:
        name: Begins the element's ids; no two figures of a page have the same.
        paint: Draws on the axes it is given.
        width, height: In inches, of 72 user units each.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib: Any = require("matplotlib", "draw a report's plots")
    from matplotlib.figure import Figure

    file = io.StringIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser has its own fonts
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_alpha(0.0)
        axes = figure.subplots()
        axes.patch.set_alpha(0.0)
        paint(axes)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return _inlined(file.getvalue(), name)


def log_scale(axis: Any, lowest: float, highest: float, label: Callable[[float], str]) -> None:
    """Whole powers of ten around ``lowest`` and ``highest``, at most seven ticks, labelled without formulas."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = math.floor(math.log10(lowest) + 1e-9), math.ceil(math.log10(highest) - 1e-9)
    high = max(high, low + 1)
    step = -(-(high - low) // 6)
    horizontal = axis.axis_name == "x"
    (axis.axes.set_xscale if horizontal else axis.axes.set_yscale)("log")
    (axis.axes.set_xlim if horizontal else axis.axes.set_ylim)(10.0**low, 10.0**high)
    axis.set_major_locator(FixedLocator([10.0**power for power in range(low, high + 1, step)]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))


def _inlined(svg: str, name: str) -> str:
    """Without what only a file of its own needs, and with the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]*)"', svg)
    start = f'<svg viewBox="{box.group(1) if box else ""}" aria-hidden="true">'
    svg = start + svg[svg.index(">") + 1 :]
    svg = re.sub(r'(<[^>]* id=")', rf"\1{name}-", svg)
    svg = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    svg = re.sub(r'font: ((?:\w+ )*?)([\d.]+)px [^;"]+', r"font-size: \2px", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return re.sub(r"\n\s*", "\n", svg).strip()
