"""``loracc inspect``."""

from __future__ import annotations

import json
from typing import Any

import click

from loracc.commands.options import output_options
from loracc.commands.terminal import console

__all__ = ["inspect"]

_EPILOG = """\b
Examples:
  loracc inspect model.onnx
  loracc inspect adapter/ --json
  loracc inspect hf_folder/
  loracc inspect hf_folder/ --count --config adapter_config.json"""


@click.command(epilog=_EPILOG)
@click.argument("path", type=click.Path())
@click.option("--alpha", type=float, help="lora_alpha of an adapter file that does not say it.")
@click.option(
    "--allow-pickle", is_flag=True, help="Unpickle a .pt module. Unpickling runs code: only for files you trust."
)
@click.option(
    "--count", is_flag=True, help="Count an adapter's trainable parameters, or with --config those it would have."
)
@click.option(
    "--config", metavar="adapter_config.json", type=click.Path(), help="A PEFT configuration to count on the model."
)
@click.option("--sites", is_flag=True, help="List every site of a model.")
@output_options
def inspect(
    path: str,
    alpha: float | None,
    allow_pickle: bool,
    count: bool,
    config: str | None,
    sites: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Say what is in a model, an adapter or an exported file."""
    from loracc import inspection
    from loracc.reports import terminal

    out = console(as_json=as_json, quiet=quiet)
    if config is not None and not count:
        raise click.UsageError("--config is what --count counts.")
    found = inspection.inspect(path, alpha=alpha, allow_pickle=allow_pickle)
    if count:
        found["count"] = _counted(path, found, config, allow_pickle=allow_pickle)
    terminal.print_inspection(found, out, sites=sites)
    if as_json:
        click.echo(json.dumps(found))


def _counted(path: str, found: dict[str, Any], config: str | None, *, allow_pickle: bool) -> dict[str, Any]:
    from loracc.counting import count_parameters

    if found["kind"] == "adapter":
        if config is not None:
            raise click.UsageError("--config counts on a model, and this is an adapter.")
        return {"trainable": found["parameters"]}
    if config is None:
        raise click.UsageError("--count on a model needs --config adapter_config.json.")
    return count_parameters(path, config, allow_pickle=allow_pickle)
