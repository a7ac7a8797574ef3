"""torchtune: ``adapter_*.pt`` with ``<module>.lora_a.weight``, ``.lora_b.weight`` and, for DoRA, ``.magnitude``.

Alpha is in the recipe's configuration and not in the file. The names are torchtune's own: its checkpoints have them,
Hugging Face's do not, and torchtune also keeps the rows of query and key projections in another order than Hugging
Face. Its forward (0.6.1, ``modules/peft/{lora,dora}.py``) is the oracle.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from loracc.adapter import Adapter, Delta, Entry, PendingDelta
from loracc.deltas import DoRA, LowRank
from loracc.errors import InputError, LoraccError, UnsupportedError, combined
from loracc.formats.adapter_options import AdapterOptions
from loracc.formats.adapter_source import AdapterSource
from loracc.formats.key_table import Keyed, KeyRule, group, unknown_keys
from loracc.formats.tensors import check_tensors, digest_of
from loracc.formats.told_scale import require_scale, told_scale

__all__ = ["is_torchtune", "read_torchtune"]

_RULES = (
    KeyRule("A", re.compile(r"\.lora_a\.weight$")),
    KeyRule("B", re.compile(r"\.lora_b\.weight$")),
    KeyRule("magnitude", re.compile(r"\.magnitude$")),
)
_NOTE = (
    "torchtune orders the rows of query and key projections otherwise than Hugging Face: fold into torchtune's own "
    "checkpoint, or let torchtune write the adapter in PEFT's format (its recipes do so beside this file)."
)


def is_torchtune(source: AdapterSource) -> bool:
    """Whether the factors are torchtune's modules ``lora_a`` and ``lora_b``."""
    return source.config is None and any(rule.tail.search(key) for rule in _RULES[:2] for key in source.tensors)


def read_torchtune(source: AdapterSource, name: str, options: AdapterOptions) -> Adapter:
    """Read a torchtune adapter.

    Raises:
        InputError: The scale is not known, or the tensors are not whole layers; all that is wrong at once.
        NumericsError: A tensor holds inf or NaN.
    """
    path = source.file
    check_tensors(path, source.tensors)
    require_scale(path, options, "a torchtune adapter (alpha is in the recipe's configuration)")
    grouped = group(path, source.tensors, _RULES)
    if grouped.rest:
        raise unknown_keys(path, "torchtune", grouped.rest)
    entries: list[Entry] = []
    errors: list[LoraccError] = []
    for module, roles in grouped.modules.items():
        try:
            entries += _entries(module, roles, options, path)
        except LoraccError as error:
            errors.append(error)
    if errors:
        raise combined(errors)
    return Adapter(
        name=name,
        path=str(source.path),
        format="torchtune",
        entries=tuple(entries),
        notes=(_NOTE,),
        digested=digest_of(source.tensors, options.facts()),
    )


def _entries(module: str, roles: Mapping[str, Keyed], options: AdapterOptions, path: Path) -> list[Entry]:
    keys = tuple(roles[role].key for role in ("A", "B", "magnitude") if role in roles)
    if not {"A", "B"} <= set(roles):
        raise InputError(f"{path}: {module}: {', '.join(keys)} are not a whole layer: lora_a and lora_b come in pairs.")
    a, b = roles["A"].array, roles["B"].array
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise InputError(
            f"{path}: {module}: lora_a {list(a.shape)} and lora_b {list(b.shape)} are no pair of [r, in] and [out, r]."
        )
    inner = LowRank(a, b, told_scale(options, a.shape[0]))
    if "magnitude" not in roles:
        return [Entry(module, "weight", inner, keys)]
    magnitude = roles["magnitude"].array
    if magnitude.shape != b.shape[:1]:
        raise InputError(f"{path}: {roles['magnitude'].key} {list(magnitude.shape)}: expected {list(b.shape[:1])}.")
    return [
        Entry(module, "weight", DoRA(inner, magnitude), keys),
        Entry(module, "bias", _no_bias(module), (), optional=True),
    ]


def _no_bias(module: str) -> PendingDelta:
    """What a bias beside DoRA is to torchtune: scaled with the weight, which no change of the bias alone can say."""

    def refuse(shape: tuple[int, ...]) -> Delta:
        raise UnsupportedError(
            f"{module}: torchtune's DoRA also multiplies the bias by magnitude/norm, which loracc does not fold.",
            hint="Let torchtune merge this adapter.",
        )

    return PendingDelta(refuse, {})
