"""What kohya's and LyCORIS' files have in common: flat module names, kinds told by their keys, alpha as a tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from loracc.adapter import Adapter, Delta, Entry
from loracc.deltas import Addition, LowRank
from loracc.dtypes import Array
from loracc.errors import InputError, LoraccError, combined
from loracc.formats.adapter_options import AdapterOptions
from loracc.formats.adapter_source import AdapterSource
from loracc.formats.components import choose_component
from loracc.formats.key_table import Keyed, KeyRule, group, unknown_keys
from loracc.formats.kohya_names import dotted_names, mangle, split_component
from loracc.formats.tensors import check_tensors, digest_of
from loracc.kinds.lycoris_table import LYCORIS_KINDS, lycoris_kind

__all__ = ["TAILS", "is_network", "read_network"]

#: Every ending of a key, longest first: "weight" (IA3's) is the end of others.
TAILS: tuple[str, ...] = tuple(
    sorted({tail for spec in LYCORIS_KINDS.values() for tail in spec.roles}, key=lambda tail: (-len(tail), tail))
)
_RULES = tuple(KeyRule(tail, re.compile(rf"\.{re.escape(tail)}$")) for tail in TAILS)
#: Endings that only these files have: one of them tells the format.
_MARKS = tuple(
    f".{mark}" for marks in LYCORIS_KINDS for mark in marks if mark not in ("a1.weight", "diff", "diff_b", "on_input")
)
_WEAK_MARKS = (".a1.weight", ".diff", ".diff_b", ".on_input")
#: Tensors that are one number, which some writers store as an integer.
_NUMBERS = (".alpha", ".on_input")
#: The tensor whose first axis is the rank that alpha is divided by.
_RANK_TAILS = ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b", "a2.weight")
_BIAS_TAILS = frozenset({"diff_b", "b_norm"})

Roles = Mapping[str, Keyed]


def is_network(source: AdapterSource) -> bool:
    """Whether the file is of this family: a key with one of its endings, and no configuration of PEFT's or MLX's."""
    if source.config is not None:
        return False
    prefixed = any(key != split_component(key)[1] for key in source.tensors)
    marks = _MARKS + (_WEAK_MARKS if prefixed else ())
    return any(key.endswith(marks) for key in source.tensors)


def read_network(source: AdapterSource, name: str, options: AdapterOptions, format_name: str) -> Adapter:
    """Read a file of this family; every key is used once.

    Raises:
        InputError: Keys or tensors do not make an adapter; all that is wrong with the modules at once. The file has
            deltas for several models of a pipeline and nobody said which is meant.
        NumericsError: A tensor holds inf or NaN.
    """
    path = source.file
    tensors = {key: _as_number(key, array) for key, array in source.tensors.items()}
    check_tensors(path, tensors)
    modules = _known_modules(path, tensors)
    components = {module: split_component(module) for module in modules}
    chosen = choose_component(path, [component for component, _ in components.values()], options)
    dotted = dotted_names(path, source.metadata)
    kept = {module: roles for module, roles in modules.items() if chosen.keep(components[module][0])}
    entries: list[Entry] = []
    errors: list[LoraccError] = []
    for module, roles in kept.items():
        component, rest = components[module]
        try:
            entries += _entries(chosen.prefix(component) + dotted.get(module, rest), roles, options, path)
        except LoraccError as error:
            errors.append(error)
    if errors:
        raise combined(errors)
    return Adapter(
        name=name,
        path=str(source.path),
        format=format_name,
        entries=tuple(entries),
        notes=(*chosen.notes, *_alpha_notes(kept, options)),
        config={key: value for key, value in source.metadata.items() if key.startswith(("ss_", "modelspec."))},
        digested=digest_of(source.tensors, options.facts()),
        naming=None if set(kept) <= set(dotted) else mangle,
    )


def _known_modules(path: Path, tensors: Mapping[str, Array]) -> dict[str, dict[str, Keyed]]:
    """The file's modules, each of a known kind; a trained bias may stand beside any."""
    grouped = group(path, tensors, _RULES)
    unknown = list(grouped.rest)
    known = {}
    for module, roles in grouped.modules.items():
        spec = lycoris_kind(roles)
        odd = [keyed.key for tail, keyed in roles.items() if spec is None or tail not in {*spec.roles, *_BIAS_TAILS}]
        unknown += odd
        if not odd:
            known[module] = roles
    if unknown:
        why = "Does it mix files of two formats?" if known else ""
        raise unknown_keys(path, "kohya or LyCORIS", unknown, why)
    return known


def _as_number(key: str, array: Array) -> Array:
    """alpha and on_input in float64: sd-scripts writes an integer alpha as int64."""
    return array.astype(np.float64) if key.endswith(_NUMBERS) and array.dtype.kind in "biu" else array


def _entries(module: str, roles: Roles, options: AdapterOptions, path: Path) -> Iterator[Entry]:
    """One module's entries."""
    spec = lycoris_kind(roles)
    assert spec is not None, "checked before"
    own = {tail: keyed for tail, keyed in roles.items() if tail in spec.roles}
    arrays = {spec.roles[tail]: keyed.array for tail, keyed in own.items()}
    arrays |= _given_alpha(own, options)
    plain = set(own) <= {"lora_up.weight", "lora_down.weight", "alpha"}
    try:
        changes: Mapping[str, Delta]
        changes = _low_rank(own, arrays) if plain else spec.build(arrays, {"dora_axis": options.dora_axis}, module)
    except LoraccError as error:
        raise type(error)(f"{path}: {error.message}", hint=error.hint) from error
    for parameter, delta in changes.items():
        keys = [keyed.key for tail, keyed in own.items() if (tail in _BIAS_TAILS) == (parameter == "bias")]
        yield Entry(module, parameter, delta, tuple(keys))
    for tail in sorted(set(roles) - set(own)):
        yield Entry(module, "bias", Addition(roles[tail].array), (roles[tail].key,))


def _given_alpha(own: Roles, options: AdapterOptions) -> dict[str, Array]:
    """The user's ``--alpha`` or ``--scale`` as this module's alpha, where it has none of its own and a rank."""
    tail = next((tail for tail in _RANK_TAILS if tail in own), None)
    if "alpha" in own or tail is None or (options.alpha is None and options.scale is None):
        return {}
    alpha = options.alpha if options.alpha is not None else float(options.scale or 0) * own[tail].array.shape[0]
    return {"alpha": np.array(alpha, np.float64)}


def _low_rank(own: Roles, arrays: Mapping[str, Array]) -> dict[str, Delta]:
    """ΔW = α/r·up·down of a plain LoRA: a linear layer's factors may be kept as 1×1 convolutions."""
    for tail in ("lora_up.weight", "lora_down.weight"):
        if tail not in own:
            raise InputError(f"{', '.join(keyed.key for keyed in own.values())}: {tail} is missing.")
        if own[tail].array.ndim < 2:
            raise InputError(f"{own[tail].key} has shape {list(own[tail].array.shape)}, expected two axes or more.")
    up, down = own["lora_up.weight"], own["lora_down.weight"]
    rank = down.array.shape[0]
    if up.array.shape[1:] != (rank, *(1,) * (up.array.ndim - 2)):
        raise InputError(
            f"{up.key} {list(up.array.shape)} and {down.key} {list(down.array.shape)} are not a pair of [out, r] and "
            "[r, in, ...]."
        )
    alpha = arrays.get("alpha", np.zeros(()))
    if alpha.size != 1:
        raise InputError(f"{own['alpha'].key} has shape {list(alpha.shape)}, expected one number.")
    value = float(alpha.reshape(()))
    return {"weight": LowRank(down.array, up.array.reshape(up.array.shape[:2]), value / rank if value else 1.0)}


def _alpha_notes(modules: Mapping[str, Roles], options: AdapterOptions) -> list[str]:
    ranked = [roles for roles in modules.values() if any(tail in roles for tail in _RANK_TAILS)]
    absent = sum("alpha" not in roles for roles in ranked)
    zero = sum("alpha" in roles and not roles["alpha"].array.any() for roles in ranked)
    given = options.alpha is not None or options.scale is not None
    notes = []
    if absent and not given:
        notes.append(f"{absent} modules have no alpha: their scale is 1, as kohya's and LyCORIS' own tools take it.")
    if zero:
        notes.append(f"{zero} modules have alpha 0: their scale is 1, as kohya's and LyCORIS' own tools take it.")
    if given and absent < len(ranked):
        notes.append(f"--alpha and --scale are not used where the file has an alpha ({len(ranked) - absent} modules).")
    return notes
