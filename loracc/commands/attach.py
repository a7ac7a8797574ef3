"""``loracc attach``."""

from __future__ import annotations

import json
from typing import Any

import click

from loracc.commands.github import announce
from loracc.commands.options import adapter_options, base_option, model_options, output_options, write_options
from loracc.commands.terminal import console
from loracc.switching.modes import MODES

__all__ = ["attach"]

_EPILOG = """\b
Examples:
  loracc attach base.onnx adapter/ -o out.onnx          out.onnx, and adapter.onnx_adapter beside it
  loracc attach hf_folder/ style=a/ task=b/ -o out.onnx --sum both=style+task@0.5
  loracc attach out.onnx third/ -o third.onnx_adapter   one more adapter for that graph
  loracc attach base.onnx a/ b/ -o out.onnx --as batched --slots 8 --rank 16
  loracc attach base.onnx a/ b/ --as triton -o models/

\b
Ways of switching (--as):
"""


@click.command(epilog=_EPILOG + "\n".join(f"  {name:9} {mode.summary}" for name, mode in MODES.items()))
@click.argument("model", type=click.Path())
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("-o", "--output", required=True, type=click.Path(), help="The .onnx to write (triton: the folder).")
@click.option(
    "--as",
    "mode",
    type=click.Choice(list(MODES)),
    default="inputs",
    show_default=True,
    help="How to switch: see below.",
)
@click.option(
    "--sum",
    "sums",
    multiple=True,
    metavar="NAME=a+b@0.5",
    help="Of inputs: one more adapter, the exact weighted sum of others. Repeatable.",
)
@click.option(
    "--slots", type=click.IntRange(1), metavar="N", help="Of batched: places for adapters, some to fill later."
)
@click.option(
    "--rank", type=click.IntRange(1), metavar="R", help="Of batched: room of each place (default: what is needed)."
)
@click.option(
    "--backend",
    type=click.Choice(["onnxruntime", "tensorrt"]),
    help="Of triton: what runs the models (default: onnxruntime).",
)
@click.option("--max-batch", type=click.IntRange(1), help="Of triton: the largest batch put together (default: 8).")
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="NAME:MIN:OPT:MAX",
    help="Of triton with tensorrt: shapes of a dynamic input. Repeatable.",
)
@adapter_options
@base_option
@model_options
@write_options
@output_options
def attach(model: str, adapters: tuple[str, ...], output: str, as_json: bool, quiet: bool, **values: Any) -> None:
    """Keep ADAPTERs beside MODEL's weights, to be switched at run time; nothing is folded."""
    from loracc.progress import progress_for
    from loracc.reports import terminal
    from loracc.switching.attaching import attach as run

    out = console(as_json=as_json, quiet=quiet)
    values["verify"] = not values.pop("no_verify")
    with progress_for(quiet=quiet) as progress:
        result = run(model, adapters, output, progress=progress, **values)
    terminal.print_attached(result, out)
    if result.unmatched and quiet:
        click.echo(f"loracc: warning: keys that fit nowhere were left out: {', '.join(result.unmatched)}", err=True)
    announce("attach", result.to_json(), output, as_json=as_json)
    if as_json:
        click.echo(json.dumps(result.to_json()))
