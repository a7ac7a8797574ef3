"""``loracc bench`` from Python: what is measured, and the files it is written to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loracc.progress import Progress

__all__ = ["bench"]

Path_ = str | Path


def bench(
    models: Sequence[Path_],
    *,
    inputs_file: Path_ | None = None,
    batch: int | Sequence[int] = 1,
    sequence: int | Sequence[int] = 128,
    adapter_file: Path_ | None = None,
    provider: str = "cpu",
    threads: int = 0,
    seconds: float = 20.0,
    processes: int = 4,
    margin: float | None = None,
    csv_file: Path_ | None = None,
    plot: Path_ | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Latency of each model against the first, in interleaved pairs.

    Args:
        models: Files that take the same inputs.
        inputs_file: ``.npz`` of inputs by name; seeded random ones when None.
        batch, sequence: Sizes of the dynamic axes, one or several.
        adapter_file: An ``.onnx_adapter`` to have active in the models with switchable sites.
        provider: What runs the models.
        threads: Threads inside one operator.
        seconds: Time to spend per pair, over all ``processes``.
        processes: Processes to measure in, one after the other.
        margin: Ratios inside 1 ± margin count as equal.
        csv_file, plot: Files to write the rows and a picture of them to.
        progress: Told what is going on; None is silent.

    Returns:
        A row for each setting and model: see :func:`loracc.bench_grid.bench_models`.
    """
    from loracc.bench_files import PLOT_ENDINGS, bench_csv, write_plot
    from loracc.bench_grid import BenchOptions, bench_models
    from loracc.reports.report_files import check_reports, write_text

    inputs = [Path(model) for model in models]
    check_reports([csv_file] if csv_file else [], inputs, endings=())
    check_reports([plot] if plot else [], inputs, endings=PLOT_ENDINGS)
    options = BenchOptions(
        inputs_file=inputs_file,
        batches=(batch,) if isinstance(batch, int) else batch,
        sequences=(sequence,) if isinstance(sequence, int) else sequence,
        adapter_file=adapter_file,
        provider=provider,
        threads=threads,
        seconds=seconds,
        processes=processes,
        margin=margin,
    )
    rows = bench_models(inputs, options, progress)
    if csv_file:
        write_text(csv_file, bench_csv(rows))
    if plot:
        write_plot(rows, plot)
    return rows
