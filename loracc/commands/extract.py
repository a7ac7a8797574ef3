"""``loracc extract``."""

from __future__ import annotations

import json

import click

from loracc.commands.options import output_options
from loracc.commands.terminal import console

__all__ = ["extract"]

_EPILOG = """\b
Examples:
  loracc extract base/ tuned/ --rank 16 -o adapter/
  loracc extract base.safetensors tuned.safetensors --energy 0.99 -o adapter/
  loracc extract base/ tuned/ --rank 32 --full -o adapter/     biases and norms as whole parameters
  loracc extract base.onnx tuned.onnx --rank 8 -o adapter/

\b
The adapter is PEFT's: adapter_model.safetensors and adapter_config.json. Of every weight the table says what the
rank leaves: ‖ΔW − B·A‖ / ‖ΔW‖."""


@click.command(epilog=_EPILOG)
@click.argument("base", type=click.Path())
@click.argument("tuned", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), help="The adapter folder to write.")
@click.option("--rank", type=click.IntRange(1), help="Rank of every delta.")
@click.option("--energy", type=float, help="In place of --rank: the part of ‖ΔW‖² to keep, such as 0.99.")
@click.option("--full", is_flag=True, help="Save changed biases and norms as whole parameters.")
@click.option(
    "--allow-pickle", is_flag=True, help="Unpickle a .pt module. Unpickling runs code: only for files you trust."
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@output_options
def extract(
    base: str,
    tuned: str,
    output: str,
    rank: int | None,
    energy: float | None,
    full: bool,
    allow_pickle: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the low-rank adapter that makes the model TUNED of the model BASE."""
    from loracc.extract import extract_adapter
    from loracc.progress import progress_for
    from loracc.reports import terminal

    out = console(as_json=as_json, quiet=quiet)
    with progress_for(quiet=quiet) as progress:
        result = extract_adapter(
            base,
            tuned,
            output,
            rank=rank,
            energy=energy,
            full=full,
            allow_pickle=allow_pickle,
            force=force,
            progress=progress,
        )
    terminal.print_extraction(result, out)
    if as_json:
        click.echo(json.dumps(result.to_json()))
