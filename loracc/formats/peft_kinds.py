"""PEFT's LoRA layers as deltas: what each set of tensors of one module means.

==================== ======================================= =====================================================
layer                A, B                                    ΔW
==================== ======================================= =====================================================
linear, Conv1D       ``[r, in]``, ``[out, r]``               s·B·A (``fan_in_fan_out`` is only how W is stored)
convolution          ``[r, in, *k]``, ``[out, r, 1...]``     s·Σ_r B[o, r]·A[r, i, ...]
embedding            ``[r, num]``, ``[dim, r]``              s·(B·A)ᵀ, which is LowRank with b = Aᵀ and a = Bᵀ
MultiheadAttention   ``[r, e]``, ``[3e, r]``                 s·B·A on ``in_proj_weight``; its ``out_proj`` gets 2·s·B·A
KaSA                 ``[r, in]``, ``[out, r]``, diagonal     s·B·diag·A, and W without its r smallest singular values
==================== ======================================= =====================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loracc.adapter import Delta, Entry
from loracc.algebra.low_rank import lora_scale
from loracc.algebra.products import block_diagonal
from loracc.deltas import Addition, DoRA, LowRank
from loracc.dtypes import Array
from loracc.errors import InputError, UnsupportedError
from loracc.formats.adapter_options import AdapterOptions
from loracc.formats.key_table import Keyed
from loracc.formats.peft_config import PeftConfig
from loracc.formats.peft_keys import BASE_LAYER, plain_path
from loracc.kinds.subspace import KaSA

__all__ = ["KINDS", "Context", "Kind", "Roles"]

Roles = Mapping[str, Keyed]


@dataclass(frozen=True)
class Context:
    """What a builder needs beside the tensors.

    Attributes:
        path: For messages.
        config: None for a bare file.
        options: What the user said.
        attention: Paths of ``nn.MultiheadAttention`` modules, as in the file.
    """

    path: Path
    config: PeftConfig | None
    options: AdapterOptions
    attention: frozenset[str] = frozenset()

    def scale(self, path: str, rank: int) -> float:
        """s of a module, its rank checked against the configuration's.

        Raises:
            InputError: The tensors have another rank, or a bare file came without ``--alpha`` or ``--scale``.
        """
        options = self.options
        if self.config is not None:
            expected = self.config.rank_of(path)
            if rank != expected:
                raise InputError(
                    f"{self.path}: {path}: the tensors have rank {rank}, and adapter_config.json says {expected} "
                    f"(r={self.config.r}, rank_pattern={dict(self.config.rank_pattern or {})}).",
                    hint="Tensors and configuration are of different adapters: fetch both again.",
                )
            return lora_scale(self.config.alpha_of(path), rank, rslora=self.config.rslora)
        if options.scale is not None:
            return options.scale
        if options.alpha is not None:
            return lora_scale(options.alpha, rank)
        if options.describe:
            return 1.0
        raise InputError(
            f"{self.path}: there is no adapter_config.json beside it, and the tensors do not say the scale.",
            hint="Give --alpha (lora_alpha; the scale is alpha/r) or --scale (the whole factor).",
        )


Build = Callable[[str, Roles, Context], list[Entry]]


@dataclass(frozen=True)
class Kind:
    """One line of ``KINDS``: the roles that a module must and may have, and what they make."""

    required: frozenset[str]
    optional: frozenset[str]
    build: Build

    def fits(self, roles: Roles) -> bool:
        return self.required <= set(roles) <= self.required | self.optional


def _factor(context: Context, tensor: Keyed, axes: str) -> Array:
    if tensor.array.ndim < 2:
        raise InputError(
            f"{context.path}: {tensor.key} has shape {list(tensor.array.shape)}, expected {axes}.",
            hint="DeepSpeed ZeRO-3 and FSDP flatten tensors that are not gathered before saving.",
        )
    return tensor.array


def _check_ranks(context: Context, a: Keyed, b: Keyed, rank_a: int, rank_b: int) -> None:
    if rank_a != rank_b:
        raise InputError(
            f"{context.path}: {a.key} {list(a.array.shape)} and {b.key} {list(b.array.shape)} have ranks {rank_a} and "
            f"{rank_b}; B·A needs them equal."
        )


def _linear(path: str, roles: Roles, context: Context) -> list[Entry]:
    """Linear, Conv1D, convolution, MultiheadAttention."""
    a, b = _factor(context, roles["A"], "[r, in]"), _factor(context, roles["B"], "[out, r]")
    if a.ndim > 2 and b.ndim == a.ndim and b.shape[1] and a.shape[0] % b.shape[1] == 0 and a.shape[0] != b.shape[1]:
        raise UnsupportedError(
            f"{context.path}: {plain_path(path)}: LoRA on a convolution with {a.shape[0] // b.shape[1]} groups cannot "
            "be folded: its A mixes channels across groups, which the weight cannot hold (PEFT does not merge it "
            "either)."
        )
    if b.ndim > 2:
        if any(n != 1 for n in b.shape[2:]):
            raise InputError(f"{context.path}: {roles['B'].key} has shape {list(b.shape)}, expected [out, r, 1, ...].")
        b = b.reshape(b.shape[:2])
    a, b = _whole_factors(path, context, a, b)
    _check_ranks(context, roles["A"], roles["B"], a.shape[0], b.shape[1])
    pattern_path = _pattern_path(path, context)
    if context.config is not None and context.config.kasa:
        raise InputError(
            f"{context.path}: {plain_path(path)} has no lora_diag, and adapter_config.json sets kasa_config."
        )
    scale = context.scale(pattern_path, a.shape[0])
    if any(path == f"{mha}.{BASE_LAYER}.out_proj" for mha in context.attention):
        scale *= 2  # PEFT's forward merges it twice, in training too (docs/upstream.md)
    inner = LowRank(a, b, scale)
    delta = _with_magnitude(path, roles, context, inner, axis=0)
    is_attention = path in context.attention
    parameter = "in_proj_weight" if is_attention else "weight"
    turned = context.config.fan_in_fan_out if context.config is not None and a.ndim == 2 and not is_attention else None
    keys = tuple(roles[role].key for role in ("A", "B", "magnitude") if role in roles)
    entries = [Entry(plain_path(path), parameter, delta, keys, turned)]
    _check_bias(path, roles, context)
    if "B_bias" in roles:
        entries.append(_bias(path, roles, context, delta.scale))
    return entries


def _check_bias(path: str, roles: Roles, context: Context) -> None:
    """``lora_bias`` gives every lora_B a bias; the configuration must agree."""
    wanted = context.config.lora_bias if context.config is not None else "B_bias" in roles
    if wanted != ("B_bias" in roles):
        what = "has no lora_B.bias" if wanted else f"has {roles['B_bias'].key}"
        raise InputError(
            f"{context.path}: {plain_path(path)} {what}, and adapter_config.json says lora_bias={wanted}.",
            hint="Tensors and configuration are of different adapters: fetch both again.",
        )


def _whole_factors(path: str, context: Context, a: Array, b: Array) -> tuple[Array, Array]:
    """BD-LoRA stores the factor that is block-diagonal as its blocks, stacked."""
    blocks = context.config.blocks if context.config is not None else None
    side = blocks.side(plain_path(path)) if blocks is not None else None
    if blocks is None or side is None:
        return a, b
    stacked = a if side == "A" else b
    if stacked.ndim != 2 or stacked.shape[0] % blocks.count:
        raise InputError(
            f"{context.path}: {plain_path(path)}: lora_{side} {list(stacked.shape)} is not a stack of {blocks.count} "
            "blocks (use_bdlora.nblocks)."
        )
    whole = block_diagonal(stacked, blocks.count)
    return (whole, b) if side == "A" else (a, whole)


def _kasa(path: str, roles: Roles, context: Context) -> list[Entry]:
    """KaSA: the diagonal of singular values between the factors; the base weight loses as many."""
    a, b, diagonal = roles["A"].array, roles["B"].array, roles["diagonal"].array
    if context.config is None or not context.config.kasa:
        raise InputError(f"{context.path}: {roles['diagonal'].key} is KaSA's, and no kasa_config is set.")
    if a.ndim != 2 or b.ndim != 2 or diagonal.shape != a.shape[:1] or b.shape[1] != a.shape[0]:
        raise InputError(
            f"{context.path}: {plain_path(path)}: KaSA needs A [r, in], B [out, r] and a diagonal [r]; found "
            f"{list(a.shape)}, {list(b.shape)} and {list(diagonal.shape)}."
        )
    delta = KaSA(a, b, diagonal, context.scale(plain_path(path), a.shape[0]))
    keys = tuple(roles[role].key for role in ("A", "B", "diagonal"))
    return [Entry(plain_path(path), "weight", delta, keys, fan_in_fan_out=False)]


def _pattern_path(path: str, context: Context) -> str:
    """The path that PEFT matches patterns against: an attention's for its out_proj too."""
    return next((plain_path(mha) for mha in context.attention if path.startswith(f"{mha}.")), plain_path(path))


def _bias(path: str, roles: Roles, context: Context, scale: float) -> Entry:
    """``lora_bias``: y = Wx + b + s·(B·A·x + β), so Δb = s·β."""
    tensor = roles["B_bias"]
    if "magnitude" in roles:
        raise UnsupportedError(f"{context.path}: {plain_path(path)}: lora_bias together with DoRA is not supported.")
    if any(path == mha or path.startswith(f"{mha}.") for mha in context.attention):
        raise UnsupportedError(
            f"{context.path}: {plain_path(path)}: PEFT's MultiheadAttention ignores lora_bias in its forward; what was "
            "meant is not known."
        )
    if tensor.array.shape != roles["B"].array.shape[:1]:
        raise InputError(
            f"{context.path}: {tensor.key} has shape {list(tensor.array.shape)}, expected "
            f"{list(roles['B'].array.shape[:1])}."
        )
    return Entry(plain_path(path), "bias", Addition(tensor.array, scale), (tensor.key,))


def _embedding(path: str, roles: Roles, context: Context) -> list[Entry]:
    a, b = _factor(context, roles["embedding_A"], "[r, num]"), _factor(context, roles["embedding_B"], "[dim, r]")
    _check_ranks(context, roles["embedding_A"], roles["embedding_B"], a.shape[0], b.shape[1])
    low_rank = LowRank(
        a=np.ascontiguousarray(b.T), b=np.ascontiguousarray(a.T), s=context.scale(plain_path(path), a.shape[0])
    )
    delta = _with_magnitude(path, roles, context, low_rank, axis=1)
    keys = tuple(roles[role].key for role in ("embedding_A", "embedding_B", "magnitude") if role in roles)
    return [Entry(plain_path(path), "weight", delta, keys, fan_in_fan_out=False)]


def _with_magnitude(path: str, roles: Roles, context: Context, inner: LowRank, *, axis: int) -> Delta:
    """DoRA when the module has a magnitude; the configuration must agree."""
    wanted = context.config.dora if context.config is not None else "magnitude" in roles
    if wanted != ("magnitude" in roles):
        what = "has no lora_magnitude_vector" if wanted else "has a lora_magnitude_vector"
        raise InputError(
            f"{context.path}: {plain_path(path)} {what}, and adapter_config.json says use_dora={wanted}.",
            hint="Tensors and configuration are of different adapters: fetch both again.",
        )
    if not wanted:
        return inner
    tensor, length = roles["magnitude"], inner.shape[axis]
    if tensor.array.size != length:
        raise InputError(
            f"{context.path}: {tensor.key} has shape {list(tensor.array.shape)}, expected {length} magnitudes."
        )
    return DoRA(inner, tensor.array.reshape(-1), axis)


#: What a module's tensors can be; the first that fits is built.
KINDS: tuple[Kind, ...] = (
    Kind(frozenset({"A", "B"}), frozenset({"B_bias", "magnitude"}), _linear),
    Kind(frozenset({"A", "B", "diagonal"}), frozenset(), _kasa),
    Kind(frozenset({"embedding_A", "embedding_B"}), frozenset({"magnitude"}), _embedding),
)
