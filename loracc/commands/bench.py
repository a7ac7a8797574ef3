"""``loracc bench``."""

from __future__ import annotations

import json
from typing import Any

import click

from loracc.commands.options import console, output_options

__all__ = ["bench"]

_EPILOG = """\b
Examples:
  loracc bench base.onnx folded.onnx
  loracc bench base.onnx folded.onnx unfolded.onnx --batch 1 --sequence 128 --threads 2"""


@click.command(epilog=_EPILOG)
@click.argument("models", nargs=-1, required=True, type=click.Path(), metavar="A.onnx B.onnx [...]")
@click.option("--inputs", "inputs_file", metavar="FILE.npz", type=click.Path(), help="Inputs to time with, by name.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Size of the dynamic batch axis.")
@click.option(
    "--sequence", type=click.IntRange(1), default=128, show_default=True, help="Size of the dynamic sequence axis."
)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="Threads inside one operator.")
@click.option(
    "--seconds", type=click.FloatRange(0.5), default=20.0, show_default=True, help="Time to spend per pair of models."
)
@click.option(
    "--margin",
    type=click.FloatRange(0.0001, 1.0),
    default=0.02,
    show_default=True,
    help="Ratios inside 1 ± this count as equal.",
)
@output_options
def bench(models: tuple[str, ...], as_json: bool, quiet: bool, **values: Any) -> None:
    """Compare the latency of models that take the same inputs, each with the first, in interleaved pairs."""
    from loracc import pipeline, report

    if len(models) < 2:
        raise click.UsageError("bench compares models: name at least two.")
    out = console(as_json=as_json, quiet=quiet)
    rows = pipeline.bench(models, **values)
    report.print_bench(rows, out)
    if as_json:
        click.echo(json.dumps(rows))
