"""Builders of LyCORIS' and kohya's kinds: tensors to deltas (see ``lycoris_table``).

``alpha`` is a scalar tensor among the arrays, not configuration. Where a kind has a rank r, s = α/r, and an alpha
that is absent or 0 means s = 1 (LyCORIS; sd-scripts too).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from loracc.adapter import Delta
from loracc.deltas import Addition, LowRank
from loracc.dtypes import Array
from loracc.errors import BindingError, InputError
from loracc.kinds.decomposed import Decomposed
from loracc.kinds.generalized import GLoRA
from loracc.kinds.hadamard import LoHa, TuckerLoHa
from loracc.kinds.output_rotation import OutputButterfly, OutputRotation
from loracc.kinds.peft_native import lokr_delta
from loracc.kinds.spec import Config, pending, take
from loracc.kinds.tucker_lora import TuckerLoRA
from loracc.kinds.vector import IA3

__all__ = ["full", "glora", "ia3", "locon", "loha", "lokr", "norm", "oft"]

Arrays = Mapping[str, Array]


def _scalar(array: Array, what: str, module: str) -> float:
    if array.size != 1 or not np.isfinite(array.astype(np.float64)).all():
        raise InputError(f"{module}: {what} is {array.tolist()!r}; expected one finite number.")
    return float(array.reshape(()))


def _scale(arrays: Arrays, rank: int, module: str) -> float:
    """α/r; 1 without an alpha or with 0."""
    if rank == 0:
        raise InputError(f"{module}: the factors have rank 0.")
    alpha = _scalar(arrays["alpha"], "alpha", module) if "alpha" in arrays else 0.0
    return alpha / rank if alpha else 1.0


def _two(array: Array) -> Array:
    """A factor as a matrix; Linear layers' factors are sometimes kept as 1×1 convolutions."""
    return array.reshape(array.shape[0], -1)


def _maybe_decomposed(
    arrays: Arrays, config: Config, kind: str, module: str, make: Callable[[tuple[int, ...]], Delta]
) -> dict[str, Delta]:
    """The change as it is, or under LyCORIS' weight decomposition where the file has a ``dora_scale``."""
    if "dora_scale" not in arrays:
        return {"weight": pending(arrays, kind, module, make)}
    magnitude = arrays["dora_scale"]

    def decompose(shape: tuple[int, ...]) -> Delta:
        inner = make(shape).resolve(shape)
        # LyCORIS modules are float32 whatever the file's dtype; the epsilon is that of the computation.
        eps = float(np.finfo(np.float64 if magnitude.dtype == np.float64 else np.float32).eps)
        return Decomposed(inner, magnitude.reshape(-1), dora_axis(magnitude, shape, config, module), eps)

    return {"weight": pending(arrays, kind, module, decompose)}


def dora_axis(magnitude: Array, shape: tuple[int, ...], config: Config, module: str) -> int:
    """Which axis a ``dora_scale`` has a length on: 0 (``[out, 1, …]``) or 1 (``[1, in, …]``).

    A one-dimensional magnitude of a weight with as many inputs as outputs does not tell; ``config["dora_axis"]`` ("out"
    or "in", the user's answer) does.

    Raises:
        BindingError: The shape fits neither, or both and nobody said.
    """
    fits = [axis for axis in (0, 1) if magnitude.size == shape[axis]]
    if magnitude.ndim >= 2:
        fits = [axis for axis in fits if magnitude.shape[axis] == shape[axis] and magnitude.shape[1 - axis] == 1]
    asked = {"out": 0, "in": 1}.get(str(config.get("dora_axis")))
    if asked in fits:
        return int(asked)
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise BindingError(
            f"{module}: a dora_scale of {list(magnitude.shape)} on a weight of {list(shape)} may belong to "
            "outputs or to inputs.",
            hint="Say which: --dora-axis out (LyCORIS wd_on_out=True) or --dora-axis in.",
        )
    raise BindingError(f"{module}: a dora_scale of {list(magnitude.shape)} does not fit a weight of {list(shape)}.")


def locon(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """ΔW = α/r·up·down, or with a Tucker core ``mid`` between them; kohya's LoRA and LyCORIS' LoCon."""
    up, down = _two(take(arrays, "up", "LoCon", module)), take(arrays, "down", "LoCon", module)
    rank = down.shape[0]
    scale = _scale(arrays, rank, module)
    mid = arrays.get("mid")

    def make(shape: tuple[int, ...]) -> Delta:
        if mid is not None:
            return TuckerLoRA(scale, up, mid, _two(down))
        return LowRank(down.reshape(rank, *shape[1:]), up, scale)

    return _maybe_decomposed(arrays, config, "LoCon", module, make)


def loha(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """ΔW = α/r·(w1_a·w1_b) ⊙ (w2_a·w2_b), or of Tucker kernels with t1 and t2."""
    w1_a, w1_b, w2_a, w2_b = (take(arrays, role, "LoHa", module) for role in ("w1_a", "w1_b", "w2_a", "w2_b"))
    scale = _scale(arrays, w1_b.shape[0], module)

    def make(shape: tuple[int, ...]) -> Delta:
        if "t1" in arrays:
            t1, t2 = arrays["t1"], take(arrays, "t2", "LoHa", module)
            return TuckerLoHa(scale, t1, w1_a, w1_b, t2, w2_a, w2_b, shape[2:])
        if math.prod(shape[1:]) != _two(w1_b).shape[1]:
            raise ValueError(f"factors of {_two(w1_b).shape[1]} columns")
        return LoHa(scale, _two(w1_a), _two(w1_b), _two(w2_a), _two(w2_b), shape[1:])

    return _maybe_decomposed(arrays, config, "LoHa", module, make)


def lokr(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """ΔW = s·w1 ⊗ w2 with s = α/r; 1 when both sides are full, whatever alpha says."""
    if "w1" in arrays and "w2" in arrays:
        scale = 1.0
    else:
        factor = arrays["w1_b"] if "w1_b" in arrays else take(arrays, "w2_b", "LoKr", module)
        scale = _scale(arrays, factor.shape[0], module)
    factors = {role: array for role, array in arrays.items() if role not in ("alpha", "dora_scale")}
    inner = lokr_delta(factors, scale, module)
    return _maybe_decomposed(arrays, config, "LoKr", module, lambda shape: inner.resolve(shape))


def full(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """ΔW = diff, Δb = diff_b; either may be alone (sd-scripts trains biases so)."""
    roles = {"diff": "weight", "diff_b": "bias"}
    return {parameter: Addition(arrays[role]) for role, parameter in roles.items() if role in arrays}


def norm(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """Differences of a normalisation layer's weight and bias."""
    roles = {"w_norm": "weight", "b_norm": "bias"}
    return {parameter: Addition(arrays[role]) for role, parameter in roles.items() if role in arrays}


def ia3(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """W' = W ⊙ (1 + w) on inputs or outputs as ``on_input`` says; unlike PEFT's, the bias stays."""
    weight = take(arrays, "weight", "IA3", module).astype(np.float64).reshape(-1)
    axis = int(_scalar(take(arrays, "on_input", "IA3", module), "on_input", module) != 0)

    def make(shape: tuple[int, ...]) -> Delta:
        if weight.size != shape[axis]:
            raise ValueError(f"{weight.size} factors for {shape[axis]} {'inputs' if axis else 'outputs'}")
        return IA3(1.0 + weight.reshape([-1 if i == axis else 1 for i in range(len(shape))]), relative=True)

    return {"weight": pending(arrays, "IA3", module, make)}


def glora(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """W' = W + α/r·(W·a1·a2 + b1·b2)."""
    a1, a2, b1 = (_two(take(arrays, role, "GLoRA", module)) for role in ("a1", "a2", "b1"))
    b2 = take(arrays, "b2", "GLoRA", module)
    scale = _scale(arrays, a2.shape[0], module)

    def make(shape: tuple[int, ...]) -> Delta:
        if a1.shape[0] != shape[1] or a2.shape[1] != shape[1]:
            raise ValueError(f"A is for {a1.shape[0]} inputs")
        return GLoRA(a1, a2, b1, b2.reshape(b2.shape[0], *shape[1:]), scale)

    return {"weight": pending(arrays, "GLoRA", module, make)}


def oft(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """Rotated outputs: three axes of ``oft_blocks`` are Diag-OFT, four BOFT; alpha × outputs bounds ‖Q‖ unless 0."""
    blocks = take(arrays, "oft_blocks", "OFT", module)
    rescale = arrays["rescale"].reshape(-1) if "rescale" in arrays else None
    constraint = _scalar(arrays["alpha"], "alpha", module) if "alpha" in arrays else 0.0
    if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
        expected = "[blocks, b, b] or [factors, blocks, b, b]"
        raise InputError(f"{module}: oft_blocks of {list(blocks.shape)}; expected {expected}.")

    def make(shape: tuple[int, ...]) -> Delta:
        if blocks.shape[-3] * blocks.shape[-1] != shape[0] or (rescale is not None and rescale.size != shape[0]):
            raise ValueError(f"{blocks.shape[-3]} blocks of {blocks.shape[-1]} rows")
        rotation = OutputButterfly if blocks.ndim == 4 else OutputRotation
        return rotation(blocks, rescale, constraint * shape[0], shape)

    return {"weight": pending(arrays, "OFT", module, make)}
