"""mlx-lm: ``adapters.safetensors`` beside an ``adapter_config.json`` of its own schema (not PEFT's, for all its name).

mlx-lm 0.32 ``tuner/{lora,dora}.py``; its forward is the oracle. ``scale`` is the whole factor:

========= ========================== =============================================
layer     lora_a, lora_b             ΔW
========= ========================== =============================================
linear    ``[in, r]``, ``[r, out]``  s·(lora_a·lora_b)ᵀ
experts   ``[E, r, in]``,            s·lora_b[e]·lora_a[e]
          ``[E, out, r]``
embedding ``[num, r]``, ``[r, dim]`` s·lora_a·lora_b; told from a linear layer by the weight's shape
DoRA      with ``m``                 ``m`` for each row of the weight, in linear layers and embeddings
full      the parameters themselves  they replace the base's
========= ========================== =============================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from loracc.adapter import Adapter, Delta, Entry
from loracc.deltas import DoRA, LowRank, Replacement, StackedLowRank
from loracc.dtypes import Array
from loracc.errors import InputError, LoraccError, UnsupportedError, combined
from loracc.formats.adapter_options import AdapterOptions
from loracc.formats.adapter_source import AdapterSource
from loracc.formats.embedding_names import names_embedding
from loracc.formats.key_table import Grouped, Keyed, KeyRule, group, unknown_keys
from loracc.formats.peft_fields import number
from loracc.formats.tensors import check_tensors, digest_of
from loracc.formats.told_scale import require_scale, told_scale

__all__ = ["MLXPair", "is_mlx", "read_mlx"]

_RULES = (
    KeyRule("a", re.compile(r"\.lora_a$")),
    KeyRule("b", re.compile(r"\.lora_b$")),
    KeyRule("m", re.compile(r"\.m$")),
)


def is_mlx(source: AdapterSource) -> bool:
    """Whether the configuration is mlx-lm's, or the factors are without one."""
    if source.config is not None:
        return "peft_type" not in source.config and bool({"lora_parameters", "fine_tune_type"} & set(source.config))
    return any(key.endswith(".lora_a") for key in source.tensors)


def read_mlx(source: AdapterSource, name: str, options: AdapterOptions) -> Adapter:
    """Read an mlx-lm adapter.

    Raises:
        InputError: Tensors, keys or configuration do not make an adapter; all that is wrong at once.
        UnsupportedError: Another way of fine-tuning than lora, dora and full.
        NumericsError: A tensor holds inf or NaN.
    """
    path, config = source.file, source.config
    check_tensors(path, source.tensors)
    kind = (config or {}).get("fine_tune_type", "lora")
    if kind not in ("lora", "dora", "full"):
        raise UnsupportedError(f"{path}: fine_tune_type is {kind!r:.40}; loracc reads lora, dora and full.")
    grouped = group(path, source.tensors, _RULES) if kind != "full" else Grouped(rest=dict(source.tensors))
    if grouped.rest and kind != "full":
        raise unknown_keys(path, "mlx-lm", grouped.rest)
    if config is None:
        require_scale(path, options, "an mlx-lm adapter without its adapter_config.json")
    scale = _scale(path, config) if kind != "full" and config is not None else None
    entries = [_whole(key, array) for key, array in grouped.rest.items()]
    errors: list[LoraccError] = []
    for module, roles in grouped.modules.items():
        try:
            entries.append(_entry(module, roles, scale, options, path))
        except LoraccError as error:
            errors.append(error)
    if errors:
        raise combined(errors)
    unused = config is not None and (options.alpha is not None or options.scale is not None)
    return Adapter(
        name=name,
        path=str(source.path),
        format="mlx",
        entries=tuple(entries),
        notes=("--alpha and --scale are not used: adapter_config.json says the scale.",) if unused else (),
        config=dict(config or {}),
        digested=digest_of(source.tensors, {**options.facts(), "scale": scale, "kind": kind}),
    )


def _scale(path: Path, config: Mapping[str, Any]) -> float:
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict) or "scale" not in parameters:
        raise InputError(
            f"{path}: adapter_config.json has no lora_parameters.scale.",
            hint="mlx-lm refuses it too: add the scale that the adapter was trained with (its old default was 20).",
        )
    return number(path, parameters, "scale", 20.0)


def _whole(key: str, array: Array) -> Entry:
    module, _, parameter = key.rpartition(".")
    return Entry(module, parameter, Replacement(array), (key,))


def _entry(module: str, roles: Mapping[str, Keyed], scale: float | None, options: AdapterOptions, path: Path) -> Entry:
    keys = tuple(roles[role].key for role in ("a", "b", "m") if role in roles)
    if not {"a", "b"} <= set(roles):
        raise InputError(f"{path}: {module}: {', '.join(keys)} are not a whole layer: lora_a and lora_b come in pairs.")
    a, b = roles["a"].array, roles["b"].array
    magnitude = roles["m"].array if "m" in roles else None
    sizes = f"lora_a {list(a.shape)} and lora_b {list(b.shape)}"
    if a.ndim == 3 and b.ndim == 3 and a.shape[0] == b.shape[0] and a.shape[1] == b.shape[2] and magnitude is None:
        return Entry(module, "weight", StackedLowRank(a, b, _told(scale, options, a.shape[1])), keys)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise InputError(f"{path}: {module}: {sizes} are no pair of [in, r] and [r, out].")
    embedding = names_embedding(module)
    if magnitude is not None:
        if magnitude.ndim != 1 or magnitude.size not in (a.shape[0], b.shape[1]):
            raise InputError(f"{path}: {roles['m'].key} {list(magnitude.shape)} fits no side of {sizes}.")
        if a.shape[0] != b.shape[1]:  # one magnitude for each row of the weight, which begins with num or out
            embedding = magnitude.size == a.shape[0]
    pair = MLXPair(a, b, _told(scale, options, a.shape[1]), embedding, magnitude)
    return Entry(module, "weight", pair, keys)


def _told(scale: float | None, options: AdapterOptions, rank: int) -> float:
    return scale if scale is not None else told_scale(options, rank)


@dataclass(frozen=True, eq=False)
class MLXPair(Delta):
    """lora_a ``[n, r]`` and lora_b ``[r, p]`` of a linear layer ``[p, n]`` or an embedding ``[n, p]``.

    Attributes:
        embedding: What the module's name says; the weight's shape overrules it where it is not square.
    """

    kind: ClassVar[str] = "lora"
    a: Array
    b: Array
    s: float
    embedding: bool
    magnitude: Array | None = None

    @property
    def shape(self) -> tuple[int | None, ...]:
        sizes = (self.b.shape[1], self.a.shape[0])
        return sizes[::-1] if self.embedding else sizes

    @property
    def rank(self) -> int:
        return int(self.a.shape[1])

    @property
    def scale(self) -> float:
        return self.s

    def scaled(self, weight: float) -> MLXPair:
        return replace(self, s=self.s * weight)

    def resolve(self, shape: tuple[int, ...]) -> Delta:
        """The product in the weight's orientation; as the name says where the shape leaves it open."""
        other = shape != self.shape and shape == self.shape[::-1]
        return self.oriented(embedding=self.embedding != other)

    def oriented(self, *, embedding: bool) -> Delta:
        """The pair as a linear layer's or an embedding's."""
        a, b = (self.b, self.a) if embedding else (self.a.T, self.b.T)
        inner = LowRank(np.ascontiguousarray(a), np.ascontiguousarray(b), self.s)
        return inner if self.magnitude is None else DoRA(inner, self.magnitude)

    def apply_slab(self, w: Array, axis: int, lo: int, hi: int, statistic: Array | None = None) -> Array:
        raise TypeError("an MLX pair cannot be applied before resolve()")

    def arrays(self) -> dict[str, Array]:
        return {"A": self.a, "B": self.b} | ({} if self.magnitude is None else {"magnitude": self.magnitude})
