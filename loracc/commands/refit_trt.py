"""``loracc refit-trt``."""

from __future__ import annotations

import json
from typing import Any

import click

from loracc.commands.options import adapter_options, output_options
from loracc.commands.terminal import console

__all__ = ["refit_trt"]

_EPILOG = """\b
Examples:
  loracc build-trt base.onnx -o base.engine --refittable all --profile x:1x8:4x8:16x8
  loracc refit-trt base.engine --adapter adapter/ -o out.engine --plain plain.engine

\b
Needs a GPU. A refittable engine may be slower than a plain one: the result names both comparisons, with the
refittable base and (--plain) with a plain engine of the base. The default is build-trt --adapter: a plain engine."""


@click.command(name="refit-trt", epilog=_EPILOG)
@click.argument("engine", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), help="The engine to write (.engine or .plan).")
@click.option(
    "--adapter", "adapters", multiple=True, required=True, metavar="ADAPTER", help="Fold this in. Repeatable."
)
@click.option("--base", metavar="FILE.onnx", type=click.Path(), help="What ENGINE was built from (default: beside it).")
@click.option("--plain", metavar="ENGINE", type=click.Path(), help="A plain engine of the base, to compare with.")
@click.option(
    "--seconds", type=click.FloatRange(0.1), default=10.0, show_default=True, help="Time to spend per comparison."
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@adapter_options
@output_options
def refit_trt(engine: str, output: str, adapters: tuple[str, ...], as_json: bool, quiet: bool, **values: Any) -> None:
    """Put other adapters into a refittable TensorRT engine, without building it again."""
    from loracc.engines import refit

    if values.pop("allow_unmatched", None):
        raise click.UsageError("--allow-unmatched belongs to fold: fold into an .onnx file first.")
    result = refit.refit_trt(engine, adapters, output, **values)
    out = console(as_json=as_json, quiet=quiet)
    out.print(f"Refitted {result.output}: {result.bytes:,} bytes, {len(result.weights)} weights sent")
    for row in result.comparisons:
        found = f"{row['ratio']:.4f}" if "ratio" in row else row["reason"]
        out.print(f"against the {row['against']}: latency {row['verdict']}, {found}")
        numbers = row["numbers"]
        said = numbers["reason"]
        if "effect" in numbers:
            said = f"restored within {numbers['restored_error']:.2e}, effect {numbers['effect']:.2e} {said}".strip()
        out.print(f"against the {row['against']}: numbers {numbers['verdict']}, {said}")
    if as_json:
        click.echo(json.dumps(result.to_json()))
