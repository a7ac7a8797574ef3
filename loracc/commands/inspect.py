"""``loracc inspect``."""

from __future__ import annotations

import json

import click

from loracc.commands.options import console, output_options

__all__ = ["inspect"]

_EPILOG = """\b
Examples:
  loracc inspect model.onnx
  loracc inspect adapter/ --json
  loracc inspect hf_folder/"""


@click.command(epilog=_EPILOG)
@click.argument("path", type=click.Path())
@click.option("--alpha", type=float, help="lora_alpha of an adapter file that does not say it.")
@click.option(
    "--allow-pickle", is_flag=True, help="Unpickle a .pt module. Unpickling runs code: only for files you trust."
)
@click.option("--sites", is_flag=True, help="List every site of a model.")
@output_options
def inspect(path: str, alpha: float | None, allow_pickle: bool, sites: bool, as_json: bool, quiet: bool) -> None:
    """Say what is in a model, an adapter or an exported file."""
    from loracc import inspection, report

    out = console(as_json=as_json, quiet=quiet)
    found = inspection.inspect(path, alpha=alpha, allow_pickle=allow_pickle)
    report.print_inspection(found, out, sites=sites)
    if as_json:
        click.echo(json.dumps(found))
