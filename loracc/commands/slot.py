"""``loracc slot``."""

from __future__ import annotations

import json
from typing import Any

import click

from loracc.commands.options import adapter_options, output_options
from loracc.commands.terminal import console

__all__ = ["slot"]

_EPILOG = """\b
Examples:
  loracc slot out.onnx 3 adapter/          adapter_ids 3 means this adapter from now on
  loracc slot out.onnx 3 style=a/@0.5      at half strength, under another name
  loracc slot out.onnx 3 --clear           slot 3 is the base again"""


@click.command(epilog=_EPILOG)
@click.argument("output", type=click.Path())
@click.argument("number", type=click.IntRange(0))
@click.argument("adapter", required=False)
@click.option("--clear", is_flag=True, help="Empty the slot.")
@adapter_options
@output_options
def slot(output: str, number: int, adapter: str | None, clear: bool, as_json: bool, quiet: bool, **values: Any) -> None:
    """Put ADAPTER into slot NUMBER of OUTPUT, a graph of attach --as batched; in place."""
    from rich.text import Text

    from loracc.switching.slots import fill_slot

    if clear == (adapter is not None):
        raise click.UsageError("name an adapter for the slot, or --clear it; one of them.")
    if values.pop("residual_base"):
        raise click.UsageError("--residual-base belongs to attach: attach to that base.")
    result = fill_slot(output, number, adapter, **values)
    out = console(as_json=as_json, quiet=quiet)
    for note in result.notes:
        out.print(Text(f"note: {note}"))
    what = f"{result.adapter}, rank {result.rank} of {result.room}, {result.sites} sites" if result.adapter else "free"
    out.print(Text(f"{result.output}: slot {result.slot} is {what} ({result.bytes:,} bytes written)"))
    if as_json:
        click.echo(json.dumps(result.to_json()))
