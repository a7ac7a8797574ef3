"""``loracc convert``."""

from __future__ import annotations

import json
from typing import Any

import click

from loracc.commands.options import adapter_options, output_options
from loracc.commands.terminal import console

__all__ = ["convert"]

_EPILOG = """\b
Examples:
  loracc convert adapter/ -o adapter.onnx_adapter
  loracc convert adapter/ -o kohya.safetensors
  loracc convert adapter/ -o mlx_adapter/ --to mlx
  loracc convert kohya.safetensors -o peft/ --model unet/
  loracc convert lora.pt -o peft/ --alpha 16 --model base.safetensors

\b
OUT decides the format: a folder is PEFT's, .safetensors is kohya's, .onnx_adapter is ONNX Runtime's."""


@click.command(epilog=_EPILOG)
@click.argument("adapter")
@click.option("-o", "--output", required=True, type=click.Path(), help="What to write.")
@click.option(
    "--to", type=click.Choice(["peft", "kohya", "mlx", "onnx_adapter"]), help="The format, where OUT does not tell."
)
@click.option(
    "--model",
    metavar="MODEL",
    type=click.Path(),
    help="The base model, for names and shapes that are only known against it.",
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@adapter_options
@output_options
def convert(adapter: str, output: str, as_json: bool, quiet: bool, allow_unmatched: bool, **values: Any) -> None:
    """Write an adapter in another format; what that cannot hold is refused by name."""
    from loracc.convert import convert_adapter

    if allow_unmatched:
        raise click.UsageError("convert carries a whole adapter over: --allow-unmatched does not apply.")
    out = console(as_json=as_json, quiet=quiet)
    result = convert_adapter(adapter, output, **values)
    out.print(f"{result.output}: {result.modules} modules, {result.source} -> {result.format}")
    for note in result.notes:
        out.print(f"note: {note}")
    if as_json:
        click.echo(json.dumps(result.to_json()))
