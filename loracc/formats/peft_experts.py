"""``target_parameters``: LoRA on raw parameters, such as the stacked weights of a mixture of experts.

Each adapted parameter is one wrapper around its module, and wrappers nest: ``<module>.lora_A`` is the outermost,
``<module>.base_layer.lora_A`` the next one in. The innermost belongs to the parameter that the *model* registered first
(``BaseTuner._inject_parameters`` walks ``named_parameters``), which the file does not say. The usual order of
``target_parameters`` is taken first, and the other ones are kept as alternatives for the shapes to decide between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loracc.adapter import Entry
from loracc.errors import InputError
from loracc.formats.peft_keys import plain_path
from loracc.formats.peft_kinds import Context, Roles
from loracc.kinds.packed_experts import PackedExperts

__all__ = ["expert_entries", "targeted_parameters"]

#: PEFT before this version always took ``[E, in, out]``.
_OUTPUT_FIRST_SINCE = (0, 19)


def targeted_parameters(module: str, targets: Sequence[str]) -> list[str]:
    """Which of a module's parameters ``target_parameters`` may mean, in its order.

    >>> targeted_parameters("layers.0.mlp.experts", ["mlp.experts.gate_up_proj", "experts.down_proj", "router.weight"])
    ['gate_up_proj', 'down_proj']
    """
    found = []
    for target in targets:
        parameter = target.rpartition(".")[2]
        name = f"{module}.{parameter}"
        if (name == target or name.endswith(f".{target}")) and parameter not in found:
            found.append(parameter)
    return found


def expert_entries(levels: Mapping[str, Roles], parameters: Sequence[str], context: Context) -> list[Entry]:
    """The entries of one module.

    Args:
        levels: The wrappers' tensors by path as in the file ("experts", "experts.base_layer"); all of one module.
        parameters: ``targeted_parameters`` of that module.

    Raises:
        InputError: More wrappers than parameters, or tensors that are not of a wrapper.
    """
    module = plain_path(next(iter(levels)))
    inner_first = sorted(levels, key=len, reverse=True)
    if len(levels) > len(parameters):
        raise InputError(
            f"{context.path}: {module} has {len(levels)} pairs of lora_A and lora_B, and target_parameters names "
            f"{len(parameters)} of its parameters: {', '.join(parameters)}."
        )
    entries = []
    for position, path in enumerate(inner_first):
        usual = [parameters[position], *(other for other in parameters if other != parameters[position])]
        options = [entry for parameter in usual if (entry := _entry(module, parameter, levels[path], context))]
        if not options:
            a = levels[path]["A"]
            raise InputError(
                f"{context.path}: {a.key} {list(a.array.shape)} does not hold a whole number of experts of the rank "
                "that adapter_config.json says.",
                hint="Tensors and configuration are of different adapters: fetch both again.",
            )
        entries.append(replace(options[0], alternatives=tuple(options[1:])))
    return entries


def _entry(module: str, parameter: str, roles: Roles, context: Context) -> Entry | None:
    """The tensors as the delta of this parameter; None where its rank says that they are not."""
    if set(roles) != {"A", "B"}:
        extra = ", ".join(sorted(roles[role].key for role in roles if role not in ("A", "B")))
        raise InputError(
            f"{context.path}: {module}.{parameter}: PEFT's parameter wrapper has no {extra or 'single factor'}."
        )
    a, b = roles["A"].array, roles["B"].array
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise InputError(
            f"{context.path}: {roles['A'].key} {list(a.shape)} and {roles['B'].key} {list(b.shape)} are not a pair of "
            "[r·E, in] and [out, r·E]."
        )
    name, config = f"{module}.{parameter}", context.config
    if config is None or a.shape[0] % config.rank_of(name):
        return None
    rank = config.rank_of(name)
    old = config.peft_version is not None and config.peft_version < _OUTPUT_FIRST_SINCE
    delta = PackedExperts(a, b, context.scale(name, rank), rank, True if old else None)
    return Entry(module, parameter, delta, (roles["A"].key, roles["B"].key))
