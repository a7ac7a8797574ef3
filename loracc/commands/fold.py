"""``loracc fold``."""

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
    write_options,
)
from loracc.commands.terminal import console
from loracc.rounding_spec import ROUNDINGS

__all__ = ["fold"]

_EPILOG = """\b
Examples:
  loracc fold model.pt2 adapter/ -o out.onnx            one adapter into a traced model
  loracc fold hf_folder/ adapter/ -o out.onnx           trace a Hugging Face folder, weights streamed
  loracc fold hf_folder/ adapter/ -o merged/            a merged checkpoint, same names, shards and dtypes
  loracc fold hf_folder/ adapter/ -o out.onnx --task text-generation-with-past      a decoder with a KV cache
  loracc fold t5/ adapter/ -o decoder_model.onnx --task text2text-generation-with-past --part decoder   (and encoder)
  loracc fold base.onnx a=one/ b=two/@0.5 -o out.onnx   two adapters, the second at half strength
  loracc fold base/ a/@0.7 b/@0.3 --combine ties_svd --density 0.5 -o merged/
  loracc fold other.onnx adapter/ --base hf_folder/ -o out.onnx     weights without names: by their values
  loracc fold base.onnx lora.safetensors --alpha 16 -o out.onnx
  loracc fold bf16_folder/ adapter/ --calibrate sentences.txt -o merged/
  loracc fold int4.onnx adapter/ --base hf_folder/ --calibrate sentences.txt -o out.onnx    quantized weights too
  loracc fold model.pt --allow-pickle --input x:float32[2,8] adapter/ -o out.onnx
  loracc fold lora_model.pt2 -o out.onnx --save-adapter found/   LoRA inside the graph, and as a PEFT adapter

\b
OUT decides the target: .onnx, .pt2, .safetensors, or a folder (merged checkpoint).
ADAPTER is a file or a folder, optionally NAME=PATH to name it and PATH@0.7 for a weight."""


@click.command(epilog=_EPILOG)
@click.argument("model", type=click.Path())
@click.argument("adapters", nargs=-1, metavar="[ADAPTER]...")
@click.option("-o", "--output", required=True, type=click.Path(), help="What to write; its ending decides the target.")
@adapter_options
@base_option
@combine_options
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of --combine dare's random masks.")
@click.option(
    "--round",
    "rounding",
    type=click.Choice(ROUNDINGS),
    help="To the nearest 16-bit number or code, or calibrated: so that the model's outputs change least.",
)
@click.option(
    "--calibrate",
    type=click.Path(),
    metavar="FILE",
    help="Inputs to calibrate the rounding with: an .npz by input name, or text, a sample a line.",
)
@click.option("--tokenizer", type=click.Path(), metavar="DIR", help="Tokenizer for that text (default: the model's).")
@model_options
@write_options
@click.option(
    "--save-adapter",
    metavar="DIR",
    type=click.Path(),
    help="Also write the LoRA that is found in MODEL's graph as a PEFT adapter.",
)
@output_options
def fold(model: str, adapters: tuple[str, ...], output: str, as_json: bool, quiet: bool, **values: Any) -> None:
    """Fold ADAPTERs, or the LoRA found in the graph, into MODEL's weights and export."""
    from loracc import pipeline
    from loracc.progress import progress_for

    values["verify"] = not values.pop("no_verify")
    with progress_for(quiet=quiet) as progress:
        result = pipeline.fold(model, adapters, output, progress=progress, **values)
    if not quiet:
        from loracc.reports.terminal import print_fold

        print_fold(result, console(as_json=as_json, quiet=quiet))
    elif result.unmatched:
        click.echo(f"loracc: warning: keys that fit nowhere were left out: {', '.join(result.unmatched)}", err=True)
    announce("fold", result.to_json(), output, as_json=as_json)
    if as_json:
        click.echo(json.dumps(result.to_json()))
