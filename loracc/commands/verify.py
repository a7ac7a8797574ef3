"""``loracc verify``."""

from __future__ import annotations

import json
from typing import Any

import click

from loracc.commands.github import announce
from loracc.commands.options import (
    adapter_options,
    base_option,
    combine_options,
    model_options,
    output_options,
    report_option,
    timing_options,
)
from loracc.commands.terminal import console
from loracc.rounding_spec import ROUNDINGS

__all__ = ["verify"]

_EPILOG = """\b
Examples:
  loracc verify model.pt2 out.onnx --adapter adapter/
  loracc verify out.onnx --search models/ --search adapters/
  loracc verify hf_folder/ merged/ --adapter a/ --adapter b/@0.5 --json
  loracc verify base.onnx out.onnx --adapter adapter/ --latency --junit result.xml
  loracc verify base.engine out.engine                  two TensorRT plans, outside their weights

\b
Exit code 0 when every check passed, 1 when one said no, 2 when the call or a file is wrong."""


@click.command(epilog=_EPILOG)
@click.argument("models", nargs=-1, required=True, type=click.Path(), metavar="[BASE] OUT")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="ADAPTER",
    help="What was folded, as given to fold. Repeatable, in order.",
)
@click.option(
    "--search", multiple=True, metavar="DIR", type=click.Path(),
    help="Find the base and the adapters that OUT names, by their digests. Repeatable.",
)  # fmt: skip
@adapter_options
@base_option
@combine_options
@model_options
@click.option(
    "--round", "rounding", type=click.Choice(ROUNDINGS),
    help="calibrated: OUT was rounded so, and cannot say it itself (a .safetensors file; others do).",
)  # fmt: skip
@click.option(
    "--reference", type=click.Choice(["fp32", "as-trained"]), default="fp32", show_default=True,
    help="The truth: the unfused model in higher precision than the output, or in the base's own type.",
)  # fmt: skip
@click.option(
    "--labels", metavar="FILE.npz", type=click.Path(),
    help="The right classes ('labels') of --inputs: accuracy of base, unfused and folded.",
)  # fmt: skip
@click.option(
    "--text", metavar="FILE", type=click.Path(),
    help="Text, a sample a line, for the model's own tokenizer: perplexity of base, unfused and folded.",
)  # fmt: skip
@click.option("--tokenizer", metavar="DIR", type=click.Path(), help="Of --text, when it does not lie with the model.")
@click.option("--taps", is_flag=True, help="Measure the error right after every site (always done when a check fails).")
@click.option("--latency/--no-latency", default=False, help="Also compare latency with the base (takes a while).")
@timing_options(seconds=30.0)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampled inputs, and of --combine.")
@report_option
@click.option("--junit", metavar="FILE", type=click.Path(), help="Write the verdicts as JUnit XML.")
@output_options
def verify(models: tuple[str, ...], adapters: tuple[str, ...], as_json: bool, quiet: bool, **values: Any) -> int:
    """Prove that OUT is BASE with the adapters folded in: numbers, structure and, when asked, latency."""
    from loracc import proving
    from loracc.progress import progress_for
    from loracc.reports import terminal

    if len(models) > 2:
        raise click.UsageError(f"verify takes BASE and OUT, or OUT alone with --search; {len(models)} were named.")
    base, output = models if len(models) == 2 else (None, models[0])
    out = console(as_json=as_json, quiet=quiet)
    with progress_for(quiet=quiet) as progress:
        result = proving.verify(base, output, adapters, progress=progress, **values)
    terminal.print_verification(result, out)
    announce("verify", result.to_json(), output, as_json=as_json)
    if as_json:
        click.echo(json.dumps(result.to_json()))
    return 1 if result.verdict == "fail" or result.verdict == "inconclusive" else 0
