"""Builders of PEFT's kinds that come down to a low-rank product, without PEFT (see ``peft_table``)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from loracc.adapter import Delta
from loracc.dtypes import Array
from loracc.errors import UnsupportedError
from loracc.kinds.named import DeLoRA, GraLoRA, PVeRA, RandLoRA, TinyLoRA, UniLoRA, VBLoRA
from loracc.kinds.spec import Config, number, pending, take, take64

__all__ = ["delora", "gralora", "pvera", "randlora", "regenerated", "tinylora", "unilora", "vblora"]

Arrays = Mapping[str, Array]


def regenerated(kind: str, module: str) -> UnsupportedError:
    return UnsupportedError(
        f"{module}: the {kind} adapter was saved without its frozen projections, and the random numbers that would "
        "make them again depend on every layer of the training model and on its torch version.",
        hint="Load it where it was trained and save it again with save_projection=True (UniLoRA: save_indices=True).",
    )


def vblora(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """Each piece of A and B is Σ softmax(top-k logits)·bank over the k best vectors.

    ``logits_A`` is ``[r, in/v, n]``, ``logits_B`` ``[out/v, r, n]``, ``bank`` ``[n, v]``; a file of
    ``save_only_topk_weights`` has the k indices and the first k − 1 weights instead.
    """
    bank = take64(arrays, "bank", "VB-LoRA", module)

    def pieces(side: str) -> Array:
        if f"{side}_indices" in arrays:
            indices = arrays[f"{side}_indices"].astype(np.int64)
            first = take64(arrays, f"{side}_weights", "VB-LoRA", module)
            weights = np.concatenate([first, 1.0 - first.sum(-1, keepdims=True)], axis=-1)
        else:
            logits = take64(arrays, side, "VB-LoRA", module)
            k = int(number(config.get("topk", 2), "topk", module))
            indices = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
            top = np.take_along_axis(logits, indices, -1)
            weights = np.exp(top - top.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
        mixed: Array = np.einsum("...k,...kv->...v", weights, bank[indices])
        return mixed

    a = pieces("A")  # [r, in/v, v]
    b = pieces("B").swapaxes(1, 2)  # [out/v, v, r]
    return {"weight": VBLoRA(a.reshape(a.shape[0], -1), b.reshape(-1, b.shape[-1]), 1.0)}


def randlora(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """ΔW = α/r·B·A, A = λ ⊙ base ⊙ γ; base A spans the shorter side of the weight, base B the longer one."""
    if "A" not in arrays or "B" not in arrays:
        raise regenerated("RandLoRA", module)
    base_a, base_b = take64(arrays, "A", "RandLoRA", module), take64(arrays, "B", "RandLoRA", module)
    weights, gamma = take64(arrays, "lambda", "RandLoRA", module), take64(arrays, "gamma", "RandLoRA", module)
    rank, bases = weights.shape
    scale = number(config.get("randlora_alpha"), "randlora_alpha", module) / rank

    def make(shape: tuple[int, ...]) -> Delta:
        short, long = min(shape), max(shape)
        if gamma.shape[1] != short:
            raise ValueError(f"gamma is for {gamma.shape[1]}")
        a = (weights[:, :, None] * base_a[:, :bases, :short] * gamma).reshape(-1, short)
        b = base_b[:long, :bases].reshape(long, -1)
        return RandLoRA(a, b, scale) if short == shape[1] else RandLoRA(b.T, a.T, scale)

    own = {role: array for role, array in arrays.items() if role not in ("A", "B")}
    return {"weight": pending(own, "RandLoRA", module, make)}


def pvera(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """VeRA with the first half of λ_d and A: the mean; the second half is the variance."""
    if config.get("sample_at_inference"):
        raise UnsupportedError(f"{module}: PVeRA with sample_at_inference draws new weights at every call.")
    if "A" not in arrays or "B" not in arrays:
        raise regenerated("PVeRA", module)
    base_a, base_b = arrays["A"], arrays["B"]
    lambda_b, lambda_d = take64(arrays, "lambda_b", "PVeRA", module), take64(arrays, "lambda_d", "PVeRA", module)
    rank = lambda_d.size // 2

    def make(shape: tuple[int, ...]) -> Delta:
        if shape[1] > base_a.shape[1] or shape[0] != lambda_b.size:
            raise ValueError("the shared matrices are smaller than the weight")
        a = base_a[:rank, : shape[1]] * lambda_d[:rank, None]
        return PVeRA(a, base_b[: shape[0]] * lambda_b[:, None], 1.0)

    own = {role: array for role, array in arrays.items() if role not in ("A", "B")}
    return {"weight": pending(own, "PVeRA", module, make)}


def delora(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """ΔW = B·diag(λ/(r‖aᵢ‖‖bᵢ‖))·A·diag(w_norm), norms at least 10⁻⁴."""
    a, b = take64(arrays, "A", "DeLoRA", module), take64(arrays, "B", "DeLoRA", module)
    strength = float(take64(arrays, "lambda", "DeLoRA", module).reshape(-1)[0])
    norms = np.maximum(np.linalg.norm(a, axis=1), 1e-4) * np.maximum(np.linalg.norm(b, axis=0), 1e-4)
    scaled = b * (strength / a.shape[0] / norms)
    return {"weight": DeLoRA(a * take64(arrays, "w_norm", "DeLoRA", module), scaled, 1.0)}


def unilora(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """A and B are picked from θ by index and scaled."""
    if "indices_A" not in arrays:
        raise regenerated("UniLoRA", module)
    theta = take64(arrays, "theta", "UniLoRA", module)
    a, b = (
        theta[take(arrays, f"indices_{side}", "UniLoRA", module).astype(np.int64)]
        * take64(arrays, f"scales_{side}", "UniLoRA", module)
        for side in "AB"
    )
    return {"weight": UniLoRA(a, b, 1.0)}


def tinylora(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """ΔW = B·(Σ vᵢPᵢ)·A, with the one v that all layers share."""
    if "P" not in arrays:
        raise regenerated("TinyLoRA", module)
    groups = [role for role in arrays if role.startswith("v.")]
    if groups != ["v.0"]:
        raise UnsupportedError(
            f"{module}: the TinyLoRA adapter has {len(groups)} vectors for groups of layers, and which layer belongs "
            "to which depends on the order of the training model's modules, which the file does not hold.",
            hint="Merge it with PEFT, or train with weight_tying=1.0.",
        )
    middle = np.einsum("i,ijk->jk", take64(arrays, "v.0", "TinyLoRA", module), take64(arrays, "P", "TinyLoRA", module))
    a, b = take64(arrays, "A", "TinyLoRA", module), take64(arrays, "B", "TinyLoRA", module)
    return {"weight": TinyLoRA(a, b @ middle, 1.0)}


def gralora(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """ΔW = α/(r + hybrid_r)·(blocks + general product). ``A`` is ``[k, in/k, r]``, ``B`` ``[k, r, out/k]``.

    Output block j takes from input block n by A[n]'s j-th r/k columns and B[j]'s n-th r/k rows.
    """
    a, b = take64(arrays, "A", "GraLoRA", module), take64(arrays, "B", "GraLoRA", module)
    k, width, rank = a.shape
    if rank % k or b.shape[:2] != (k, rank):
        raise ValueError(f"{k} blocks of rank {rank} against {list(b.shape)}")
    part = rank // k
    hybrid = int(number(config.get("hybrid_r", 0), "hybrid_r", module))
    left = np.zeros((k, b.shape[2], k, k, part))  # [j, out/k, n, j', part], filled where j' = j
    right = np.zeros((k, k, part, k, width))  # [n, j, part, n', in/k], filled where n' = n
    for n in range(k):
        for j in range(k):
            left[j, :, n, j] = b[j, n * part : (n + 1) * part].T
            right[n, j, :, n] = a[n][:, j * part : (j + 1) * part].T
    factor_b, factor_a = left.reshape(k * b.shape[2], -1), right.reshape(-1, k * width)
    if hybrid:
        factor_b = np.concatenate([factor_b, take64(arrays, "B_general", "GraLoRA", module)], axis=1)
        factor_a = np.concatenate([factor_a, take64(arrays, "A_general", "GraLoRA", module)], axis=0)
    scale = number(config.get("alpha"), "alpha", module) / number(config.get("r"), "r", module)
    if hybrid:
        scale = number(config.get("alpha"), "alpha", module) / (rank + hybrid)
    return {"weight": GraLoRA(factor_a, factor_b, scale)}
