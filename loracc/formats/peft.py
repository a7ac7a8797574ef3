"""PEFT adapters: ``adapter_config.json`` beside ``adapter_model.safetensors`` (or ``.bin``), or the bare tensors.

Facts and formulas: PEFT 0.21.2, whose *forward* is the oracle (FORMATS.md 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from loracc.adapter import Adapter, Entry
from loracc.errors import InputError, LoraccError, combined
from loracc.formats.adapter_options import AdapterOptions
from loracc.formats.adapter_source import AdapterSource
from loracc.formats.key_table import Grouped, group, unknown_keys
from loracc.formats.peft_config import PeftConfig, check_peft_type, parse_lora_config
from loracc.formats.peft_experts import expert_entries, targeted_parameters
from loracc.formats.peft_keys import BASE_LAYER, LORA_RULES, PREFIXES, plain_path
from loracc.formats.peft_kinds import KINDS, Context, Roles
from loracc.formats.peft_replacements import COUNTER, replacement_entries, token_entry
from loracc.formats.tensors import check_tensors, digest_of

__all__ = ["is_peft", "read_peft"]


def is_peft(source: AdapterSource) -> bool:
    """Whether PEFT wrote it: its configuration says so, or the keys are those of PEFT's LoRA."""
    if source.config is not None:
        return True
    return any(rule.tail.search(key) for rule in LORA_RULES for key in source.tensors)


def read_peft(source: AdapterSource, name: str, options: AdapterOptions) -> Adapter:
    """Read an adapter of any of PEFT's kinds; every key of the file is used once.

    Raises:
        InputError: Tensors, keys or configuration do not make an adapter; all that is wrong with the modules at once.
        UnsupportedError: A kind that cannot be folded, named.
        NumericsError: A tensor holds inf or NaN.
    """
    path = source.file
    if source.config is not None and (kind := check_peft_type(path, source.config)) != "LORA":
        from loracc.formats.peft_tuners import read_tuner  # fifty kinds more, which most adapters are not

        return read_tuner(source, name, kind)
    tensors = {key: array for key, array in source.tensors.items() if not key.endswith(f".{COUNTER}")}
    check_tensors(path, tensors)
    config = parse_lora_config(path, source.config, residual_base=options.residual_base) if source.config else None
    grouped = group(path, source.tensors, LORA_RULES, PREFIXES)
    context = Context(path, config, options, _attentions(grouped.modules))
    entries = _entries(grouped, context)
    _check_complete(path, config, entries)
    return Adapter(
        name=name,
        path=str(source.path),
        format="peft",
        entries=tuple(entries),
        notes=_notes(config, options, context.attention),
        config=dict(source.config or {}),
        digested=digest_of(source.tensors, _facts(config, options)),
    )


def _entries(grouped: Grouped, context: Context) -> list[Entry]:
    """Every module's entries; what is wrong with any of them is raised together."""
    entries: list[Entry] = []
    errors: list[LoraccError] = []

    def attempt(build: Callable[[], Iterable[Entry]]) -> None:
        try:
            entries.extend(build())
        except LoraccError as error:
            errors.append(error)

    wrapped: dict[str, dict[str, Roles]] = {}
    for path, roles in grouped.modules.items():
        if _wraps_parameters(path, context.config):
            wrapped.setdefault(plain_path(path), {})[path] = roles
        else:
            attempt(lambda path=path, roles=roles: _module_entries(path, roles, context))  # type: ignore[misc]
    for module, levels in wrapped.items():
        parameters = targeted_parameters(module, context.config.target_parameters if context.config is not None else ())
        attempt(lambda levels=levels, parameters=parameters: expert_entries(levels, parameters, context))  # type: ignore[misc]
    replaced, unknown = replacement_entries(grouped.rest, context, grouped.adapter)
    if unknown:
        why = "" if context.config is not None else "There is no adapter_config.json that could explain them."
        errors.append(unknown_keys(context.path, "PEFT LoRA", unknown, why))
    if errors:
        raise combined(errors)
    return entries + replaced


def _wraps_parameters(path: str, config: PeftConfig | None) -> bool:
    """Whether this is a wrapper around a raw parameter, and not LoRA on the module.

    A target may be a bare name ("gate_up_proj": PEFT itself writes that for models whose experts transformers stacks),
    which any module's path could continue with; what ``target_modules`` means is none of them.
    """
    if config is None or not targeted_parameters(plain_path(path), config.target_parameters):
        return False
    return path != plain_path(path) or not config.adapts_module(path)


def _module_entries(path: str, roles: Roles, context: Context) -> list[Entry]:
    factors = {role: tensor for role, tensor in roles.items() if role != "tokens"}
    entries = [token_entry(path, roles["tokens"], context)] if "tokens" in roles else []
    if not factors:
        return entries
    kind = next((kind for kind in KINDS if kind.fits(factors)), None)
    if kind is None:
        keys = ", ".join(tensor.key for tensor in factors.values())
        raise InputError(
            f"{context.path}: {plain_path(path)}: {keys} are not a whole LoRA layer: lora_A and lora_B come in pairs.",
            hint="The file is incomplete: save the adapter again.",
        )
    return kind.build(path, factors, context) + entries


def _attentions(paths: Iterable[str]) -> frozenset[str]:
    """Adapted ``nn.MultiheadAttention`` modules: only they wrap an ``out_proj`` inside their base layer."""
    tail = f".{BASE_LAYER}.out_proj"
    return frozenset(path.removesuffix(tail) for path in paths if path.endswith(tail))


def _check_complete(path: Path, config: PeftConfig | None, entries: list[Entry]) -> None:
    if not entries:
        raise InputError(f"{path}: the file holds no deltas.", hint="Save the adapter again.")
    if config is None or not config.tokens:
        return
    if not any(entry.delta.kind == "rows" for entry in entries):
        raise InputError(f"{path}: adapter_config.json sets trainable_token_indices, and the file has no token rows.")


def _notes(config: PeftConfig | None, options: AdapterOptions, attention: Iterable[str]) -> tuple[str, ...]:
    twice = tuple(
        f"{plain_path(path)}: PEFT's forward adds the delta of out_proj twice, in training too; so does the fold."
        for path in sorted(attention)
    )
    if config is None:
        return twice
    given = next((flag for flag in ("alpha", "scale") if getattr(options, flag) is not None), None)
    ignored = (f"--{given} is not used: adapter_config.json says the scale.",) if given else ()
    return (*config.notes, *ignored, *twice)


def _facts(config: PeftConfig | None, options: AdapterOptions) -> dict[str, Any]:
    """What beside the tensors decides the result."""
    if config is None:
        return {"alpha": options.alpha, "scale": options.scale}
    facts = {field: value for field, value in vars(config).items() if field != "notes"}
    return facts | {"residual_base": options.residual_base}
