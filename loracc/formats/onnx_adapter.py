"""``.onnx_adapter``: ONNX Runtime's run-time adapters, as loracc, Olive and onnxruntime-genai name their parameters.

A is ``[in, r]`` and B ``[r, out]``, as ``x·A·B`` takes them, with the scale multiplied into B:

=================== ==================================================
written by          name
=================== ==================================================
loracc, Olive       ``<module>.lora_A.weight``, ``.lora_B.weight``
onnxruntime-genai   ``<module>.lora_A.MatMul.weight``, ...; it calls ``self_attn`` ``attn``
=================== ==================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from loracc.adapter import Adapter, Entry
from loracc.deltas import LowRank
from loracc.dtypes import Array
from loracc.errors import InputError, LoraccError, UnsupportedError, combined
from loracc.formats.adapter_options import AdapterOptions
from loracc.formats.adapter_source import AdapterSource
from loracc.formats.key_table import Keyed, KeyRule, group, unknown_keys
from loracc.formats.onnx_adapter_file import has_adapter_magic
from loracc.formats.tensors import check_tensors, digest_of
from loracc.formats.told_scale import told_scale

__all__ = ["is_onnx_adapter", "read_onnx_adapter"]

_GENAI = ".MatMul"
_RULES = tuple(KeyRule(role, re.compile(rf"\.lora_{role}(\{_GENAI})?\.weight$")) for role in "AB")


def is_onnx_adapter(source: AdapterSource) -> bool:
    """Whether the file is ONNX Runtime's."""
    return has_adapter_magic(source.file)


def read_onnx_adapter(source: AdapterSource, name: str, options: AdapterOptions) -> Adapter:
    """Read an ``.onnx_adapter``. With ``--alpha`` or ``--scale`` that factor is taken out of B again: the same ΔW.

    Raises:
        InputError: The parameters are not pairs, or the scale cannot be taken out without rounding.
        UnsupportedError: The factors are quantised.
        NumericsError: A parameter holds inf or NaN.
    """
    path = source.file
    quantised = [key for key in source.tensors if ".quant." in key]
    if quantised:
        raise UnsupportedError(f"{path}: {len(quantised)} parameters are of quantised factors ({quantised[0]}).")
    check_tensors(path, source.tensors)
    grouped = group(path, source.tensors, _RULES)
    if grouped.rest:
        raise unknown_keys(path, ".onnx_adapter", grouped.rest, "Names are chosen by whoever exported the graph.")
    entries: list[Entry] = []
    errors: list[LoraccError] = []
    for module, roles in grouped.modules.items():
        try:
            entries.append(_entry(module, roles, options, path))
        except LoraccError as error:
            errors.append(error)
    if errors:
        raise combined(errors)
    genai = any(_GENAI in key for key in source.tensors)
    return Adapter(
        name=name,
        path=str(source.path),
        format="onnx_adapter",
        entries=tuple(entries),
        digested=digest_of(source.tensors, {}),
        naming=_genai_name if genai else None,
    )


def _genai_name(module: str) -> str:
    return ".".join("attn" if part == "self_attn" else part for part in module.split("."))


def _entry(module: str, roles: Mapping[str, Keyed], options: AdapterOptions, path: Path) -> Entry:
    if set(roles) != {"A", "B"}:
        keys = ", ".join(keyed.key for keyed in roles.values())
        raise InputError(f"{path}: {module}: only {keys} is there: lora_A and lora_B come in pairs.")
    a, b = roles["A"].array, roles["B"].array
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise InputError(
            f"{path}: {roles['A'].key} {list(a.shape)} and {roles['B'].key} {list(b.shape)} are no pair of [in, r] and "
            "[r, out]."
        )
    scale = told_scale(options, a.shape[1])
    up = np.ascontiguousarray(b.T)
    if scale != 1.0:
        up = _without(up, scale, f"{path}: {roles['B'].key}")
    return Entry(module, "weight", LowRank(np.ascontiguousarray(a.T), up, scale), (roles["A"].key, roles["B"].key))


def _without(b: Array, scale: float, where: str) -> Array:
    """B before the scale was multiplied in, in its own dtype, such that scale·B is the file's B to the last bit."""
    exact = b.astype(np.float64)
    divided = (exact / scale).astype(b.dtype)
    if not np.array_equal(divided.astype(np.float64) * scale, exact):
        raise InputError(
            f"{where}: the scale {scale:g} cannot be taken out of B without rounding in {b.dtype}.",
            hint="Leave --alpha and --scale out: the file's scale is in its B already.",
        )
    return divided
