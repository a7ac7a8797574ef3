"""Options that several commands share, and how their values become arguments of the Python API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from loracc.combine_methods import METHODS
from loracc.tasks import PARTS, TASKS

__all__ = [
    "adapter_options",
    "base_option",
    "combine_options",
    "model_options",
    "output_options",
    "report_option",
    "timing_options",
    "write_options",
]

F = TypeVar("F", bound=Callable[..., Any])


def _switches(_context: click.Context, _option: click.Parameter, text: str | None) -> tuple[bool, ...] | None:
    """``1,0,1`` or ``true,false,true``."""
    known = {"1": True, "true": True, "0": False, "false": False}
    if text is None:
        return None
    words = [word.strip().lower() for word in text.split(",")]
    if not set(words) <= set(known):
        raise click.BadParameter(f"{text!r}: expected 1 or 0 for each part of the outputs, as in 1,0,1.")
    return tuple(known[word] for word in words)


def _heads(_context: click.Context, _option: click.Parameter, text: str | None) -> tuple[int, int] | None:
    """``32`` or ``32,8``."""
    if text is None:
        return None
    words = text.split(",")
    if len(words) > 2 or not all(word.strip().isdigit() for word in words):
        raise click.BadParameter(f"{text!r}: expected the number of heads, and of key-value heads: 32,8.")
    return int(words[0]), int(words[-1])


def model_options(command: F) -> F:
    """How to read a model."""
    for option in reversed(
        (
            click.option(
                "--allow-pickle",
                is_flag=True,
                help="Unpickle a .pt module. Unpickling runs code: only for files you trust.",
            ),
            click.option(
                "--input",
                "inputs",
                multiple=True,
                metavar="NAME:DTYPE[SHAPE]",
                help="An input to trace with, e.g. input_ids:int64[2,16]. Repeatable.",
            ),
            click.option(
                "--inputs", "inputs_file", metavar="FILE.npz", type=click.Path(), help="Sample inputs, by name."
            ),
            click.option(
                "--dynamic",
                multiple=True,
                metavar="NAME:AXIS=SYMBOL",
                help="A dynamic axis, e.g. input_ids:0=batch. Repeatable.",
            ),
            click.option("--opset", type=click.IntRange(13, 25), help="ONNX opset of the export."),
            click.option(
                "--task",
                metavar="TASK",
                help="What a Hugging Face folder is exported for (default: the class in its config.json, no cache). "
                f"Known: {', '.join(TASKS)}.",
            ),
            click.option(
                "--part",
                type=click.Choice(PARTS),
                help="Export this part of a Hugging Face encoder-decoder; with a cache it has to be two graphs.",
            ),
            click.option(
                "--factory",
                metavar="PACKAGE.MODULE:FUNCTION",
                help="Builds the module that a bare state dict belongs to.",
            ),
        )
    ):
        command = option(command)
    return command


def adapter_options(command: F) -> F:
    """How to read adapters and where they go."""
    for option in reversed(
        (
            click.option("--alpha", type=float, help="lora_alpha of an adapter file that does not say it."),
            click.option("--scale", type=float, help="The whole factor on B·A, in place of alpha/r."),
            click.option(
                "--component",
                metavar="NAME",
                help="Which model of a pipeline is meant (unet, text_encoder, ...), where a file adapts several.",
            ),
            click.option(
                "--dora-axis",
                type=click.Choice(["out", "in"]),
                help="What a flat DoRA magnitude of a square weight counts.",
            ),
            click.option(
                "--moe-layout",
                type=click.Choice(["peft", "unsloth"]),
                help="How the factors of stacked experts are packed in a PEFT file.",
            ),
            click.option(
                "--enable-lora",
                metavar="1,0,1",
                callback=_switches,
                help="loralib's MergedLinear: which parts of its outputs are adapted.",
            ),
            click.option(
                "--gguf-heads",
                "heads",
                metavar="HEADS[,KV]",
                callback=_heads,
                help="Attention heads of the base, for a GGUF adapter with reordered rows.",
            ),
            click.option(
                "--map",
                "maps",
                multiple=True,
                metavar="OLD=NEW",
                help="Rename the adapter's modules (a whole path or a prefix). Repeatable.",
            ),
            click.option(
                "--allow-unmatched", is_flag=True, help="Warn about adapter keys that fit nowhere, instead of stopping."
            ),
            click.option(
                "--residual-base",
                is_flag=True,
                help="The model is the residual base that a PiSSA-family adapter was trained on.",
            ),
        )
    ):
        command = option(command)
    return command


def base_option(command: F) -> F:
    """Where weights that lost their names are looked up."""
    return click.option(
        "--base",
        "original",
        metavar="PATH",
        type=click.Path(),
        help="The checkpoint that MODEL's graph was made of: weights that lost their names are found by their values.",
    )(command)


def combine_options(command: F) -> F:
    """How several adapters become one."""
    for option in reversed(
        (
            click.option(
                "--combine",
                type=click.Choice(METHODS),
                help="Make one adapter of several as PEFT's add_weighted_adapter does (default: their exact sum).",
            ),
            click.option("--density", type=float, help="Of --combine ties, dare, ...: the part of the elements kept."),
            click.option("--rank", type=click.IntRange(1), help="Of --combine svd, *_svd: rank of the result."),
        )
    ):
        command = option(command)
    return command


def output_options(command: F) -> F:
    """What to print."""
    for option in reversed(
        (
            click.option(
                "--json", "as_json", is_flag=True, help="Machine-readable result on stdout; everything else on stderr."
            ),
            click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors (and --json)."),
        )
    ):
        command = option(command)
    return command


def timing_options(*, seconds: float) -> Callable[[F], F]:
    """How to measure latency."""

    def decorate(command: F) -> F:
        for option in reversed(
            (
                click.option(
                    "--provider",
                    default="cpu",
                    show_default=True,
                    help="cpu or cuda (ONNX Runtime), torch-cpu or torch-cuda (.pt2), tensorrt (.engine).",
                ),
                click.option(
                    "--threads", type=click.IntRange(0), default=0, show_default=True,
                    help="Threads inside one operator; 0 is the runtime's own choice.",
                ),
                click.option(
                    "--seconds", type=click.FloatRange(0.1), default=seconds, show_default=True,
                    help="Time to spend on measuring, per pair of models.",
                ),
                click.option(
                    "--processes", type=click.IntRange(1, 64), default=4, show_default=True,
                    help="Measure in so many processes in turn, every second one with the load order swapped.",
                ),
                click.option(
                    "--margin", type=click.FloatRange(0.0001, 1.0),
                    help="Ratios inside 1 ± this count as equal (default: 0.02 on a CPU, 0.01 on a device).",
                ),
            )
        ):  # fmt: skip
            command = option(command)
        return command

    return decorate


def report_option(command: F) -> F:
    """Where to report to."""
    return click.option(
        "--report",
        "reports",
        multiple=True,
        metavar="FILE.{html,md,json}",
        type=click.Path(),
        help="Write a report, in the form of the ending. Repeatable.",
    )(command)


def write_options(command: F) -> F:
    """How an output is written: where its weights lie, proved or not, for real or not."""
    for option in reversed(
        (
            click.option(
                "--dtype",
                type=click.Choice(["fp32", "fp16", "bf16"]),
                help="Write weights in this dtype (default: the base's).",
            ),
            click.option(
                "--data-layout",
                "--data",
                "external",
                type=click.Choice(["auto", "inline", "data", "link"]),
                default="auto",
                help="Where an .onnx keeps its weights: inside, in OUT.data, or (link) unchanged ones in the base's "
                "own data file.",
            ),
            click.option("--no-verify", is_flag=True, help="Do not check the result before moving it into place."),
            report_option,
            click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing."),
            click.option("--force", is_flag=True, help="Replace what exists of OUT and the files beside it."),
        )
    ):
        command = option(command)
    return command
