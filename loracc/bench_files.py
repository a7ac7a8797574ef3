"""What ``loracc bench`` writes besides its table: CSV for a spreadsheet, and a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loracc.errors import InputError, require

__all__ = ["PLOT_ENDINGS", "bench_csv", "write_plot"]

PLOT_ENDINGS = (".svg", ".png")
_COLUMNS = (
    "model", "batch", "sequence", "median_ms", "ratio", "low", "high", "noise_floor", "margin", "verdict", "comparison",
    "pairs", "runner",
)  # fmt: skip
#: Okabe and Ito's colours, told apart by everybody.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def bench_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows with one column a number; times in milliseconds."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        low, high = row["interval"]
        writer.writerow({**row, "low": low, "high": high})
    return text.getvalue()


def write_plot(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Ratios to the first model with their 95 % intervals, one group of bars a setting.

    Raises:
        InputError: The file cannot be written.
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib: Any = require("matplotlib", "draw a plot")
    from matplotlib.figure import Figure

    path = Path(path)
    settings = list(dict.fromkeys(_setting(row) for row in rows))
    models = list(dict.fromkeys(str(row["model"]) for row in rows))
    figure = Figure(figsize=(max(6.0, 1.6 * len(settings) + 3.0), 4.0), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(models)
    for index, model in enumerate(models):
        mine = [row for row in rows if row["model"] == model]
        at = [settings.index(_setting(row)) + (index - (len(models) - 1) / 2) * width for row in mine]
        values = [row["ratio"] for row in mine]
        below, above = ([abs(row["interval"][end] - row["ratio"]) for row in mine] for end in (0, 1))
        axes.bar(
            at,
            values,
            width,
            yerr=[below, above],
            capsize=3,
            color=_COLOURS[index % len(_COLOURS)],
            label=Path(model).name,
        )
    margin = rows[0]["margin"]
    axes.axhspan(1 - margin, 1 + margin, color="0.5", alpha=0.25, label=f"±{100 * margin:g} %")
    axes.set_xticks(range(len(settings)), settings)
    axes.set_ylabel("latency relative to the first model")
    axes.legend(frameon=False, fontsize="small")
    with matplotlib.rc_context({"svg.hashsalt": "loracc", "svg.fonttype": "path"}):
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        try:
            figure.savefig(path, metadata=metadata, dpi=150)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror or error}.") from error


def _setting(row: Mapping[str, Any]) -> str:
    return f"{row['batch']} × {row['sequence']}" if "batch" in row else "given inputs"
