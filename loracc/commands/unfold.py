"""``loracc unfold``."""

from __future__ import annotations

import json
from typing import Any

import click

from loracc.commands.options import model_options, output_options
from loracc.commands.terminal import console

__all__ = ["unfold"]

_EPILOG = """\b
Examples:
  loracc unfold out.onnx --base base.onnx -o restored.onnx
  loracc unfold merged/ --base hf_folder/ -o restored/

\b
OUT says from what it was made (loracc inspect OUT). The base that is given must be that one, by its digest, and OUT
must differ from it in the folded weights only; what is written has the base's digest."""


@click.command(epilog=_EPILOG)
@click.argument("output", type=click.Path(), metavar="OUT")
@click.option("--base", required=True, type=click.Path(), help="The base that OUT was made from.")
@click.option("-o", "--output", "restored", required=True, type=click.Path(), help="Where to write the base again.")
@model_options
@click.option("--force", is_flag=True, help="Replace the destination if it exists.")
@output_options
def unfold(output: str, base: str, restored: str, as_json: bool, quiet: bool, **values: Any) -> None:
    """Give back the base of a folded model, bit for bit."""
    from loracc.progress import progress_for
    from loracc.reports import terminal
    from loracc.unfolding import unfold as restore

    out = console(as_json=as_json, quiet=quiet)
    with progress_for(quiet=quiet) as progress:
        result = restore(output, base, restored, progress=progress, **values)
    terminal.print_unfolded(result, out)
    if as_json:
        click.echo(json.dumps(result.to_json()))
