"""What transformers 5 does to a checkpoint's names and tensors when it loads them, without loading any.

Its tables (``transformers.conversion_mapping``) rename tensors and compute parameters of several. Of what it computes,
the stacking of experts is understood: ``MergeModulelist(dim=0)``, and ``Concatenate(dim=1)`` of two such stacks.
Older versions of transformers have no such tables, and load everything under its own name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loracc.sites import ExpertStack

__all__ = ["Loading", "empty_model", "loading_of"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Loading:
    """What becomes of a checkpoint's tensors.

    Attributes:
        sources: Parameter -> the tensor that it is; None where it is computed of several.
        stacks: Those of them that are stacks of experts.
    """

    sources: dict[str, str | None] = field(default_factory=dict)
    stacks: tuple[ExpertStack, ...] = ()

    @property
    def spelled(self) -> dict[str, str]:
        """Parameter -> the tensor's name, where it has another."""
        return {name: tensor for name, tensor in self.sources.items() if tensor is not None and tensor != name}


def empty_model(model_class: Any, config: Any) -> Any:
    """The model without weights: names, shapes and ties."""
    import torch

    with torch.device("meta"):
        model = model_class._from_config(config)
    model.tie_weights()
    return model


def loading_of(model: Any, shapes: Mapping[str, Shape]) -> Loading:
    """What loading a checkpoint with tensors of these names and shapes into the model does.

    Args:
        model: The model, with weights or without.
        shapes: The checkpoint's tensors, by name.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key
    except ImportError:
        return Loading()
    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings: list[Any] = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    targets: dict[str, dict[str | None, list[str]]] = {}
    for name in sorted(shapes, key=dot_natural_key):
        new, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if new not in parameters and name in parameters:
            new, pattern = name, None
        targets.setdefault(new, {}).setdefault(pattern, []).append(name)
    rule_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    sources: dict[str, str | None] = {}
    stacks = []
    for name, tensors in targets.items():
        if name not in parameters:
            continue
        whole = tensors.get(None, [])
        sources[name] = whole[0] if len(tensors) == 1 and len(whole) == 1 else None
        pattern = next(iter(tensors))
        rule = rule_of.get(pattern) if pattern is not None else None
        stack = _stack(name, rule, tensors, shapes) if rule is not None else None
        if stack is not None and stack.shape == tuple(parameters[name].shape):
            stacks.append(stack)
    return Loading(_with_ties(parameters, sources), tuple(stacks))


def _stack(
    name: str, rule: Any, tensors: Mapping[str | None, Sequence[str]], shapes: Mapping[str, Shape]
) -> ExpertStack | None:
    """The stack that a rule of transformers makes; None where it does something else."""
    done = [(type(operation).__name__, operation.dim) for operation in rule.operations if hasattr(operation, "dim")]
    plain = [("MergeModulelist", 0)] if len(rule.source_patterns) == 1 else [("MergeModulelist", 0), ("Concatenate", 1)]
    lists = [tensors.get(pattern, ()) for pattern in rule.source_patterns]
    if done != plain or len(done) != len(rule.operations) or len(tensors) != len(lists):
        return None
    found = [{shapes[tensor] for tensor in one} for one in lists]
    if len({len(one) for one in lists}) != 1 or any(len(shape) != 1 for shape in found):
        return None
    each = [next(iter(shape)) for shape in found]
    if any(len(shape) != 2 for shape in each) or len({columns for _, columns in each}) != 1:
        return None
    return ExpertStack(name, tuple(zip(*lists, strict=True)), tuple(rows for rows, _ in each), each[0][1])


def _with_ties(parameters: Mapping[str, Any], sources: dict[str, str | None]) -> dict[str, str | None]:
    """A parameter that the checkpoint lacks because it is another one."""
    known = {id(parameters[name]): tensor for name, tensor in sources.items()}
    tied = {name: known[id(value)] for name, value in parameters.items() if name not in sources and id(value) in known}
    return sources | tied
