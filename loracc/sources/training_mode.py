"""A program that was traced in training mode computes something random: it is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracc.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

__all__ = ["refuse_training_mode"]


def refuse_training_mode(program: torch.export.ExportedProgram, path: Path) -> None:
    """
    Raises:
        UnsupportedError: A dropout with a chance to drop, or a normalisation by the batch's own statistics.
    """
    import torch

    for module in program.graph_module.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.nodes:
            if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and _trains(node):
                raise UnsupportedError(
                    f"{path}: the model was traced in training mode ({node.target} at {node.name!r}).",
                    hint="Call model.eval() before torch.export.export, and save it again.",
                )


def _trains(node: Any) -> bool:
    values = {
        argument.name: node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        for i, argument in enumerate(node.target._schema.arguments)
    }
    name = node.target._schema.name
    if "dropout" in name:
        return bool(values.get("train", True)) and values.get("p") != 0
    if "attention" in name:
        return bool(values.get("dropout_p"))
    return "norm" in name and values.get("training", values.get("use_input_stats" if "batch" in name else "")) is True
