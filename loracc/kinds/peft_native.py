"""Builders of PEFT's common kinds: tensors and configuration to deltas, without PEFT (see ``peft_table``)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

from loracc.adapter import Delta
from loracc.algebra.rotations import (
    cayley,
    cayley_neumann,
    constrained_skew,
    householder_chain,
    orthonormal_columns,
    skew_from_triangle,
)
from loracc.dtypes import Array
from loracc.errors import InputError, UnsupportedError
from loracc.kinds.adalora import AdaLoRA
from loracc.kinds.hadamard import LoHa, TuckerLoHa
from loracc.kinds.kronecker import LoKr
from loracc.kinds.miss import MiSS, MiSSBat
from loracc.kinds.orthogonal import BOFT, HRA, BlockRotation
from loracc.kinds.spec import Config, number, pattern_value, pending, take
from loracc.kinds.vector import IA3, VeRA

__all__ = ["adalora", "boft", "hra", "ia3", "loha", "lokr", "miss", "oft", "vera"]

Arrays = Mapping[str, Array]


def adalora(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """ΔW = σ/(n + 10⁻⁵)·B(A ⊙ E), σ = lora_alpha if positive, else the rank; n = ranknum.

    PEFT sets ranknum to ``init_r`` and keeps it there when ``rank_pattern`` shrinks the factors
    (``resize_modules_by_rank_pattern``: "the scaling is exactly as the previous").
    """
    a, b, e = (take(arrays, role, "AdaLoRA", module).astype(np.float64) for role in ("A", "B", "E"))
    rank = a.shape[0]
    alpha = number(config.get("lora_alpha", 0), "lora_alpha", module)
    count = (
        float(arrays["ranknum"].reshape(-1)[0])
        if "ranknum" in arrays
        else number(config.get("init_r", rank), "init_r", module)
    )
    scale = (alpha if alpha > 0 else float(rank)) / (count + 1e-5)
    return {
        "weight": pending(arrays, "AdaLoRA", module, lambda shape: AdaLoRA((a * e).reshape(rank, *shape[1:]), b, scale))
    }


def _lycoris_scale(config: Config, module: str) -> float:
    rank = number(pattern_value(config, "rank_pattern", "r", module), "r", module)
    alpha = number(pattern_value(config, "alpha_pattern", "alpha", module), "alpha", module)
    if rank <= 0:
        raise InputError(f"{module}: rank {rank:g} in the adapter's configuration; expected a positive number.")
    return alpha / rank


def loha(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """ΔW = α/r·(w1_a·w1_b) ⊙ (w2_a·w2_b), or of Tucker kernels where the file has t1 and t2."""
    scale = _lycoris_scale(config, module)
    w1_a, w1_b, w2_a, w2_b = (take(arrays, role, "LoHa", module) for role in ("w1_a", "w1_b", "w2_a", "w2_b"))
    if "t1" in arrays:
        t1, t2 = arrays["t1"], take(arrays, "t2", "LoHa", module)
        return {
            "weight": pending(
                arrays, "LoHa", module, lambda shape: TuckerLoHa(scale, t1, w1_a, w1_b, t2, w2_a, w2_b, shape[2:])
            )
        }
    return {
        "weight": pending(arrays, "LoHa", module, lambda shape: LoHa(scale, w1_a, w1_b, w2_a, w2_b, _rest(shape, w1_b)))
    }


def _rest(shape: tuple[int, ...], b: Array) -> tuple[int, ...]:
    if math.prod(shape[1:]) != b.shape[1]:
        raise ValueError(f"a factor has {b.shape[1]} columns, the weight {math.prod(shape[1:])}")
    return shape[1:]


def lokr(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """ΔW = α/r·w1 ⊗ w2. PEFT keeps α/r when both sides are full, where LyCORIS forces 1."""
    last_axes = "w2" in arrays and arrays["w2"].ndim == 3
    return {"weight": lokr_delta(arrays, _lycoris_scale(config, module), module, last_axes=last_axes)}


def lokr_delta(arrays: Arrays, scale: float, module: str, *, last_axes: bool = False) -> Delta:
    """A LoKr change of any combination of full, factored and Tucker sides."""
    w1 = (arrays["w1"],) if "w1" in arrays else tuple(take(arrays, r, "LoKr", module) for r in ("w1_a", "w1_b"))
    if "w2" in arrays:
        w2: tuple[Array, ...] = (arrays["w2"],)
    else:
        w2 = tuple(take(arrays, role, "LoKr", module) for role in ("w2_a", "w2_b"))
        w2 = (arrays["t2"], *w2) if "t2" in arrays else w2
    size = math.prod(_outer(w1)) * math.prod(_outer(w2))

    def make(shape: tuple[int, ...]) -> Delta:
        if math.prod(shape) != size:
            raise ValueError(f"the product has {size} elements, the weight {math.prod(shape)}")
        return LoKr(scale, w1, w2, shape, last_axes)

    return pending(arrays, "LoKr", module, make)


def _outer(factors: tuple[Array, ...]) -> tuple[int, ...]:
    """The shape of a full, factored or Tucker side."""
    if len(factors) == 1:
        return factors[0].shape
    if len(factors) == 2:
        return (factors[0].shape[0], *factors[1].shape[1:])
    return (factors[1].shape[1], factors[2].shape[1], *factors[0].shape[2:])


def ia3(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """Outputs scaled by l, bias included; for a feedforward module inputs, and the bias stays.

    ``ia3_l`` is ``[out, 1]`` or ``[1, in]`` for a linear layer, ``[1, n, 1, …]`` for a convolution either way: there
    ``feedforward_modules`` of the configuration tells. A grouped convolution repeats l over its groups.
    """
    l = take(arrays, "l", "IA3", module).astype(np.float64)  # noqa: E741  # the paper's name
    feedforward = l.shape[0] == 1 and (l.size > 1 or _is_feedforward(config, module))
    if l.ndim > 2:
        feedforward = _is_feedforward(config, module)
    vector = l.reshape(-1)

    def make(shape: tuple[int, ...]) -> Delta:
        if not feedforward:
            if vector.size != shape[0]:
                raise ValueError(f"{vector.size} factors for {shape[0]} outputs")
            return IA3(vector.reshape(-1, *[1] * (len(shape) - 1)))
        groups, left = divmod(vector.size, shape[1])
        if left or not groups or shape[0] % groups:
            raise ValueError(f"{vector.size} factors for {shape[1]} inputs")
        grid = np.repeat(vector.reshape(groups, shape[1]), shape[0] // groups, axis=0) if groups > 1 else vector[None]
        return IA3(grid.reshape(*grid.shape, *[1] * (len(shape) - 2)))

    changes = {"weight": pending(arrays, "IA3", module, make)}
    if not feedforward:
        changes["bias"] = IA3(vector)
    return changes


def _is_feedforward(config: Config, module: str) -> bool:
    """As PEFT's ``_check_target_module_feedforward``: a regular expression, or suffixes."""
    modules = config.get("feedforward_modules")
    if isinstance(modules, str):
        return re.fullmatch(modules, module) is not None
    return isinstance(modules, list | tuple | set) and any(module.endswith(str(name)) for name in modules)


def vera(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """ΔW = (λ_b ⊙ B[:out])(λ_d ⊙ A[:, :in]) with the file's shared A and B."""
    if "A" not in arrays or "B" not in arrays:
        raise UnsupportedError(
            f"{module}: the VeRA adapter was saved without its shared matrices (save_projection=false), and the random "
            "numbers that would make them again depend on every layer of the training model and on its torch version.",
            hint="Load it where it was trained and save it again with save_projection=True.",
        )
    lambda_b, lambda_d = (take(arrays, role, "VeRA", module).astype(np.float64) for role in ("lambda_b", "lambda_d"))
    shared_a, shared_b = arrays["A"], arrays["B"]

    def make(shape: tuple[int, ...]) -> Delta:
        if shape[1] > shared_a.shape[1] or shape[0] > shared_b.shape[0] or shape[0] != lambda_b.size:
            raise ValueError("the shared matrices are smaller than the weight")
        return VeRA(shared_a[:, : shape[1]] * lambda_d[:, None], shared_b[: shape[0]] * lambda_b[:, None], 1.0)

    own = {role: array for role, array in arrays.items() if role not in ("A", "B")}
    return {"weight": pending(own, "VeRA", module, make)}


def oft(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """W' = W·blockdiag(Rᵀ), or E·blockdiag(R) for an embedding; R is the Cayley transform or its Neumann series."""
    embedding = "embedding_R" in arrays
    vectors = take(arrays, "embedding_R" if embedding else "R", "OFT", module)
    size = (1 + math.isqrt(1 + 8 * vectors.shape[1])) // 2
    if size * (size - 1) // 2 != vectors.shape[1]:
        raise InputError(f"{module}: oft_R of {list(vectors.shape)} is no set of strict upper triangles.")
    q = skew_from_triangle(vectors.astype(np.float64), size)
    if config.get("coft"):
        q = constrained_skew(q, number(config.get("eps", 6e-5), "eps", module))
    if config.get("use_cayley_neumann", False):
        _refuse_old_neumann(config, module)
        terms = int(number(config.get("num_cayley_neumann_terms", 5), "num_cayley_neumann_terms", module))
        rotations = cayley_neumann(q, terms)
    else:
        rotations = cayley(q)
    blocks = rotations if embedding else rotations.swapaxes(1, 2)

    def make(shape: tuple[int, ...]) -> Delta:
        if math.prod(shape[2:]) != 1:
            raise UnsupportedError(
                f"{module}: OFT on a convolution of {list(shape)}: PEFT rotates overlapping patches of the input and "
                "adds them up, which no kernel of that size does (its own merge computes something else).",
                hint="Only 1×1 convolutions can be folded.",
            )
        if shape[1] % size or (len(blocks) != 1 and len(blocks) * size != shape[1]):
            raise ValueError(f"{len(blocks)} blocks of {size}×{size} for {shape[1]} columns")
        if len(blocks) == 1 and size != shape[1] and not config.get("block_share"):
            raise ValueError(f"one block of {size}×{size} for {shape[1]} columns, and block_share is off")
        return BlockRotation(blocks, shape, vectors)

    return {"weight": pending(arrays, "OFT", module, make)}


def _refuse_old_neumann(config: Config, module: str) -> None:
    """PEFT changed the series in 0.18.0, the first version that wrote its number into the configuration."""
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    if version is None or (int(version[1]), int(version[2])) < (0, 18):
        raise UnsupportedError(
            f"{module}: the OFT adapter uses the Cayley-Neumann series of a PEFT before 0.18 "
            f"(peft_version is {config.get('peft_version')!r}), which is another series than today's.",
            hint="Merge it with the PEFT version that trained it.",
        )


def boft(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """W' = s ⊙ W·(butterfly)ᵀ; the tensors hold the block size and the number of factors."""
    r, s = take(arrays, "R", "BOFT", module), take(arrays, "s", "BOFT", module).reshape(-1)

    def make(shape: tuple[int, ...]) -> Delta:
        if r.shape[1] * r.shape[2] != math.prod(shape[1:]) or s.size != shape[0]:
            raise ValueError(f"{r.shape[1]} blocks of {r.shape[2]} and {s.size} factors")
        return BOFT(r, s, shape[1:])

    return {"weight": pending(arrays, "BOFT", module, make)}


def hra(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """W' = W·Π(I − 2uuᵀ), or W·(I − 2QQᵀ) with Q the Gram-Schmidt basis of U (``apply_GS``)."""
    u = take(arrays, "u", "HRA", module)
    u64 = u.astype(np.float64)
    if config.get("apply_GS"):
        unit, t = orthonormal_columns(u64), 2.0 * np.eye(u.shape[1])
    else:
        unit, t = householder_chain(u64)

    def make(shape: tuple[int, ...]) -> Delta:
        _rest(shape, u.T)
        return HRA(unit, t, shape[1:], u)

    return {"weight": pending(arrays, "HRA", module, make)}


def miss(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """The shard repeated over inputs; ``init_weights`` "bat" and "mini" are other rules, not initialisations."""
    block = take(arrays, "block", "MiSS", module)
    mode = config.get("init_weights")

    def make(shape: tuple[int, ...]) -> Delta:
        if mode == "bat":
            r = block.shape[-1]
            if block.ndim != 3 or block.shape[0] * r != shape[0] or shape[1] % r:
                raise ValueError("the blocks do not cover the weight")
            return MiSSBat(block, shape[1])
        if block.ndim != 2 or (shape[0] % block.shape[1] if mode == "mini" else shape[0] != block.shape[1]):
            raise ValueError(f"a shard of {list(block.shape)} for {shape[0]} outputs")
        return MiSS(1.0, block, (shape[0], shape[1]))

    return {"weight": pending(arrays, "MiSS", module, make)}
