"""``loracc bench``."""

from __future__ import annotations

import json
from typing import Any

import click

from loracc.commands.options import output_options, timing_options
from loracc.commands.terminal import console

__all__ = ["bench"]

_EPILOG = """\b
Examples:
  loracc bench base.onnx folded.onnx
  loracc bench base.onnx folded.onnx unfolded.onnx --batch 1,8 --sequence 16,128 --csv grid.csv --plot grid.svg
  loracc bench base.onnx switchable.onnx --adapter-file style.onnx_adapter"""


def _sizes(_context: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    """``1`` or ``1,8``."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise click.BadParameter(f"{text!r}: expected sizes with commas between, as in 1,8.")
    return tuple(dict.fromkeys(map(int, words)))


@click.command(epilog=_EPILOG)
@click.argument("models", nargs=-1, required=True, type=click.Path(), metavar="A.onnx B.onnx [...]")
@click.option("--inputs", "inputs_file", metavar="FILE.npz", type=click.Path(), help="Inputs to time with, by name.")
@click.option(
    "--batch", default="1", show_default=True, callback=_sizes, metavar="N[,N...]",
    help="Sizes of the dynamic batch axis.",
)  # fmt: skip
@click.option(
    "--sequence", default="128", show_default=True, callback=_sizes, metavar="N[,N...]",
    help="Sizes of the dynamic sequence axis.",
)  # fmt: skip
@click.option(
    "--adapter-file", metavar="FILE", type=click.Path(),
    help="An .onnx_adapter to have active where sites are switchable, or a file of OUT.onnx.variants.",
)  # fmt: skip
@timing_options(seconds=20.0)
@click.option("--csv", "csv_file", metavar="FILE", type=click.Path(), help="Write the rows as CSV.")
@click.option("--plot", metavar="FILE.svg|png", type=click.Path(), help="Draw the ratios with their intervals.")
@output_options
def bench(models: tuple[str, ...], as_json: bool, quiet: bool, **values: Any) -> None:
    """Compare the latency of models that take the same inputs, each with the first, in interleaved pairs."""
    from loracc.benching import bench as measure
    from loracc.progress import progress_for
    from loracc.reports import terminal

    if len(models) < 2:
        raise click.UsageError("bench compares models: name at least two.")
    out = console(as_json=as_json, quiet=quiet)
    with progress_for(quiet=quiet) as progress:
        rows = measure(models, progress=progress, **values)
    terminal.print_bench(rows, out)
    if as_json:
        click.echo(json.dumps(rows))
