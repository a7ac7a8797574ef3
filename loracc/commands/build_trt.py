"""``loracc build-trt``."""

from __future__ import annotations

import json
from typing import Any

import click

from loracc.commands.options import adapter_options, base_option, output_options
from loracc.commands.terminal import console

__all__ = ["build_trt"]

_EPILOG = """\b
Examples:
  loracc build-trt out.onnx -o out.engine --profile input_ids:1x1:1x128:8x512 --profile attention_mask:1x1:1x128:8x512
  loracc build-trt base.onnx --adapter adapter/ -o out.engine --flavor rtx --profile x:1x8:4x8:16x8
  loracc build-trt attached.onnx -o out.engine --max-rank 16 --profile x:1x8:4x8:16x8  switchable: factors are inputs
  loracc build-trt base.onnx --adapter adapter/ -o out.engine --like base.engine       comparable byte for byte

\b
--flavor rtx (TensorRT for RTX) builds on a machine without a GPU; refittable and stripped engines need one."""


@click.command(name="build-trt", epilog=_EPILOG)
@click.argument("model", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), help="The engine to write (.engine or .plan).")
@click.option("--adapter", "adapters", multiple=True, metavar="ADAPTER", help="Fold this first, in memory. Repeatable.")
@click.option("--flavor", type=click.Choice(["tensorrt", "rtx"]), help="Which TensorRT (default: the installed one).")
@click.option(
    "--profile", "profiles", multiple=True, metavar="NAME:MIN:OPT:MAX", help="Shapes of a dynamic input. Repeatable."
)
@click.option(
    "--max-rank",
    type=click.IntRange(1),
    metavar="N",
    help="Largest rank of an adapter for a graph of attach --as inputs: its factors become inputs of rank 0 to N.",
)
@click.option(
    "--workspace", type=click.IntRange(1, 2**63 - 1), metavar="BYTES", help="Scratch memory that tactics may use."
)
@click.option("--tf32/--no-tf32", default=False, show_default=True, help="Allow TF32 in float32 products.")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="The builder's effort.")
@click.option("--timing-cache", type=click.Path(), help="Read if it is there, and written: same tactics next time.")
@click.option(
    "--error-on-timing-cache-miss",
    is_flag=True,
    help="Time nothing: fail where the cache lacks a tactic (for a folded engine, with the cache of its base).",
)
@click.option("--strip", is_flag=True, help="Leave the weights out of the engine.")
@click.option(
    "--refittable",
    type=click.Choice(["none", "adapter", "all"]),
    default="none",
    show_default=True,
    help="Which weights can be refitted.",
)
@click.option(
    "--like", metavar="ENGINE", type=click.Path(), help="Build again until all but the weights is as in this engine."
)
@click.option(
    "--repeats",
    type=click.IntRange(1, 100),
    default=1,
    metavar="N",
    help="Build N times first and record whether the builds are equal; verify takes it into account.",
)
@click.option("--version-compatible", is_flag=True, help="The engine runs with later minor versions.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@adapter_options
@base_option
@output_options
def build_trt(model: str, output: str, adapters: tuple[str, ...], as_json: bool, quiet: bool, **values: Any) -> None:
    """Build a TensorRT engine from an ONNX file, with adapters folded in memory on the way."""
    from loracc.engines import build

    if any(values.pop(name, None) for name in ("allow_unmatched", "combine", "density", "rank")):
        raise click.UsageError("--allow-unmatched and --combine belong to fold: fold into an .onnx file first.")
    result = build.build_trt(model, adapters, output, **values)
    made = f"{result.bytes:,} bytes, {len(result.sites)} sites folded"
    console(as_json=as_json, quiet=quiet).print(f"Built {result.output} with {result.flavor} {result.version}: {made}")
    if as_json:
        click.echo(json.dumps(result.to_json()))
