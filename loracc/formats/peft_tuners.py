"""PEFT adapters of every kind but LoRA: keys to roles, and each module's tensors to the kind's own builder.

What a kind is made of stands in ``loracc.kinds.peft_table``; here is only how PEFT names it in a file:

1. ``base_model.model.<module>.<tail>``: a tensor of one module; ``KindSpec.roles`` has the tails.
2. ``base_model.<key>``: a tensor that all modules share (VeRA's projections, VB-LoRA's bank).
3. The rest: whole parameters of ``modules_to_save``, and biases, as in LoRA files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loracc.adapter import Adapter, Delta, Entry
from loracc.dtypes import Array
from loracc.errors import InputError, LoraccError, UnsupportedError, combined
from loracc.formats.adapter_options import AdapterOptions
from loracc.formats.adapter_source import AdapterSource
from loracc.formats.key_table import Keyed, KeyRule, group, unknown_keys
from loracc.formats.peft_config import PeftConfig
from loracc.formats.peft_fields import token_indices
from loracc.formats.peft_keys import PREFIXES, plain_path
from loracc.formats.peft_kinds import Context
from loracc.formats.peft_replacements import COUNTER, replacement_entries, token_entry
from loracc.formats.peft_tuner_fields import parse_tuner_config
from loracc.formats.tensors import check_tensors, digest_of, some
from loracc.kinds.peft_table import PEFT_KINDS
from loracc.kinds.spec import KindSpec

__all__ = ["read_tuner"]

#: Roles that are places in a weight or a bank, and not values.
_PLACES = re.compile(r"([AB]_)?indices(_[AB])?|(places|size)\..*")
#: PEFT's kind for new rows of an embedding alone; LoRA files may hold the same.
_TOKENS, _TOKEN_ROLE = "TRAINABLE_TOKENS", "tokens"


def read_tuner(source: AdapterSource, name: str, kind: str) -> Adapter:
    """Read an adapter of ``peft_type`` ``kind``; every key of the file is used once.

    Raises:
        InputError: Tensors, keys or configuration do not make an adapter; all that is wrong with the modules at once.
        UnsupportedError: A kind or a setting that cannot be folded, named.
        NumericsError: A tensor holds inf or NaN.
    """
    path, settings = source.file, source.config or {}
    spec = _spec(path, kind)
    config = _with_tokens(path, kind, parse_tuner_config(path, kind, spec, settings), settings)
    shared = _shared_tensors(path, spec, source.tensors)
    taken = {tensor.key for tensor in shared.values()}
    rest = {key: array for key, array in source.tensors.items() if key not in taken}
    grouped = group(path, rest, _rules(spec), PREFIXES)
    _check(path, source.tensors, [shared, *grouped.modules.values()])
    context = Context(path, config, AdapterOptions())
    entries, errors = _entries(spec, settings, grouped.modules, shared, context)
    replaced, unknown = replacement_entries(grouped.rest, context, grouped.adapter)
    if unknown:
        errors.append(unknown_keys(path, f"PEFT {spec.name}", unknown))
    if errors:
        raise combined(errors)
    if not entries and not replaced:
        raise InputError(f"{path}: the file holds no deltas.", hint="Save the adapter again.")
    return Adapter(
        name=name,
        path=str(source.path),
        format="peft",
        entries=(*entries, *replaced),
        config=dict(settings),
        digested=digest_of(source.tensors, _facts(spec, config, settings)),
    )


def _spec(path: Path, kind: str) -> KindSpec:
    if kind == _TOKENS:
        return KindSpec("trainable tokens", {"trainable_tokens_delta": _TOKEN_ROLE}, _no_changes)
    if kind in PEFT_KINDS:
        return PEFT_KINDS[kind]
    known = ", ".join(sorted(PEFT_KINDS))
    raise UnsupportedError(
        f"{path}: peft_type {kind} is not known to loracc; known are LORA, {_TOKENS}, {known}.",
        hint="Merge it with the PEFT version that trained it.",
    )


def _no_changes(arrays: Mapping[str, Array], config: Mapping[str, object], module: str) -> dict[str, Delta]:
    return {}


def _with_tokens(path: Path, kind: str, config: PeftConfig, settings: Mapping[str, Any]) -> PeftConfig:
    """The configuration with ``token_indices`` where LoRA's would have ``trainable_token_indices``."""
    if kind != _TOKENS:
        return config
    return replace(config, tokens=token_indices(path, {"trainable_token_indices": settings.get("token_indices")}))


def _shared_tensors(path: Path, spec: KindSpec, tensors: Mapping[str, Array]) -> dict[str, Keyed]:
    """Tensors that belong to no module, by role."""
    found: dict[str, Keyed] = {}
    for key, array in tensors.items():
        role = spec.shared_role(key.removeprefix("base_model.").removeprefix("model."))
        if role is None:
            continue
        if role in found:
            raise InputError(f"{path}: {key!r} and {found[role].key!r} are the same tensor.")
        found[role] = Keyed(key, array)
    return found


def _rules(spec: KindSpec) -> list[KeyRule]:
    """The kind's tails as a grammar; an adapter's name may stand after the first part (``hada_w1_a.default``)."""
    rules = []
    for tail, role in spec.roles.items():
        first, dot, leaf = tail.partition(".")
        name = r"(\.(?!weight$|bias$)(?P<name>[^.]+))?"
        rules.append(KeyRule(role, re.compile(rf"(^|\.){re.escape(first)}{name}{re.escape(dot + leaf)}$")))
    return rules


def _check(path: Path, tensors: Mapping[str, Array], owners: Iterable[Mapping[str, Keyed]]) -> None:
    """Values are finite floats, places are integers, nothing is empty."""
    places = {tensor.key for roles in owners for role, tensor in roles.items() if _PLACES.fullmatch(role)}
    odd = [f"{key} ({tensors[key].dtype})" for key in sorted(places) if tensors[key].dtype.kind not in "iu"]
    if odd:
        raise InputError(f"{path}: {len(odd)} tensors of indices are not of an integer dtype: {some(odd)}.")
    values = {key: a for key, a in tensors.items() if key not in places and not key.endswith(f".{COUNTER}")}
    check_tensors(path, values)


def _entries(
    spec: KindSpec,
    settings: Mapping[str, Any],
    modules: Mapping[str, Mapping[str, Keyed]],
    shared: Mapping[str, Keyed],
    context: Context,
) -> tuple[list[Entry], list[LoraccError]]:
    """Every module's entries, and what is wrong with any of them."""
    entries: list[Entry] = []
    errors: list[LoraccError] = []
    for module, roles in modules.items():
        try:
            if _TOKEN_ROLE in roles:
                entries.append(token_entry(module, roles[_TOKEN_ROLE], context))
                continue
            entries += _module_entries(spec, settings, module, {**shared, **roles}, context)
        except LoraccError as error:
            where = "" if error.message.startswith(str(context.path)) else f"{context.path}: "
            errors.append(type(error)(where + error.message, hint=error.hint))
    return entries, errors


def _module_entries(
    spec: KindSpec, settings: Mapping[str, Any], path: str, roles: Mapping[str, Keyed], context: Context
) -> list[Entry]:
    module, arrays = plain_path(path), {role: tensor.array for role, tensor in roles.items()}
    try:
        changes = spec.build(arrays, settings, module)
    except (ValueError, IndexError) as error:
        sizes = ", ".join(f"{role} {list(array.shape)}" for role, array in arrays.items())
        raise InputError(f"{module}: these tensors make no {spec.name} layer ({error}): {sizes}.") from error
    # Not every kind's configuration is set right on a Conv1D (HiRA's says false): only "true" tells something.
    turned = True if context.config is not None and context.config.fan_in_fan_out else None
    turned = False if any(role.startswith("embedding_") for role in roles) else turned
    keys = tuple(tensor.key for tensor in roles.values())
    return [
        Entry(module, parameter, delta, keys, turned if parameter == "weight" else None, parameter in spec.optional)
        for parameter, delta in changes.items()
    ]


def _facts(spec: KindSpec, config: PeftConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What beside the tensors decides the result."""
    fields = ("peft_type", "peft_version", "bias", "token_indices", *spec.config)
    return {field: settings.get(field) for field in fields} | {"fan_in_fan_out": config.fan_in_fan_out}
