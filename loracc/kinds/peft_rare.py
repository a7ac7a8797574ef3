"""Builders of PEFT's rarer kinds, still without PEFT (see ``peft_table``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from loracc.adapter import Delta
from loracc.deltas import Addition, LowRank, Replacement
from loracc.dtypes import Array
from loracc.errors import BindingError, InputError, UnsupportedError, require
from loracc.kinds.circulant import C3A
from loracc.kinds.elementwise import GatedGLoRA, HiRA
from loracc.kinds.named import DeLoRA, GraLoRA, PVeRA, RandLoRA, TinyLoRA, UniLoRA, VBLoRA
from loracc.kinds.pairs import RoAd
from loracc.kinds.peft_bridge import waveft_transformed
from loracc.kinds.sparse import FourierFT, SHiRA, SuperTuning, WaveFT
from loracc.kinds.spec import Config, number, pending, take
from loracc.kinds.subspace import DEFT, OSF, FRoD

__all__ = [
    "beft",
    "c3a",
    "deft",
    "delora",
    "fourierft",
    "frod",
    "glora",
    "gralora",
    "hira",
    "ln_tuning",
    "osf",
    "pvera",
    "randlora",
    "road",
    "shira",
    "supertuning",
    "tinylora",
    "unilora",
    "vblora",
    "waveft",
]

Arrays = Mapping[str, Array]


def _f64(arrays: Arrays, role: str, kind: str, module: str) -> Array:
    return take(arrays, role, kind, module).astype(np.float64)


def vblora(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """Each piece of A and B is Σ softmax(top-k logits)·bank over the k best vectors.

    ``logits_A`` is ``[r, in/v, n]``, ``logits_B`` ``[out/v, r, n]``, ``bank`` ``[n, v]``; a file of
    ``save_only_topk_weights`` has the k indices and the first k − 1 weights instead.
    """
    bank = _f64(arrays, "bank", "VB-LoRA", module)

    def pieces(side: str) -> Array:
        if f"{side}_indices" in arrays:
            indices = arrays[f"{side}_indices"].astype(np.int64)
            first = _f64(arrays, f"{side}_weights", "VB-LoRA", module)
            weights = np.concatenate([first, 1.0 - first.sum(-1, keepdims=True)], axis=-1)
        else:
            logits = _f64(arrays, side, "VB-LoRA", module)
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
        raise _regenerated("RandLoRA", module)
    base_a, base_b = _f64(arrays, "A", "RandLoRA", module), _f64(arrays, "B", "RandLoRA", module)
    weights, gamma = _f64(arrays, "lambda", "RandLoRA", module), _f64(arrays, "gamma", "RandLoRA", module)
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


def _regenerated(kind: str, module: str) -> UnsupportedError:
    return UnsupportedError(
        f"{module}: the {kind} adapter was saved without its frozen projections, and the random numbers that would "
        "make them again depend on every layer of the training model and on its torch version.",
        hint="Load it where it was trained and save it again with save_projection=True (UniLoRA: save_indices=True).",
    )


def pvera(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """VeRA with the first half of λ_d and A: the mean; the second half is the variance."""
    if config.get("sample_at_inference"):
        raise UnsupportedError(f"{module}: PVeRA with sample_at_inference draws new weights at every call.")
    if "A" not in arrays or "B" not in arrays:
        raise _regenerated("PVeRA", module)
    base_a, base_b = arrays["A"], arrays["B"]
    lambda_b, lambda_d = _f64(arrays, "lambda_b", "PVeRA", module), _f64(arrays, "lambda_d", "PVeRA", module)
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
    a, b = _f64(arrays, "A", "DeLoRA", module), _f64(arrays, "B", "DeLoRA", module)
    strength = float(_f64(arrays, "lambda", "DeLoRA", module).reshape(-1)[0])
    norms = np.maximum(np.linalg.norm(a, axis=1), 1e-4) * np.maximum(np.linalg.norm(b, axis=0), 1e-4)
    scaled = b * (strength / a.shape[0] / norms)
    return {"weight": DeLoRA(a * _f64(arrays, "w_norm", "DeLoRA", module), scaled, 1.0)}


def unilora(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """A and B are picked from θ by index and scaled."""
    if "indices_A" not in arrays:
        raise _regenerated("UniLoRA", module)
    theta = _f64(arrays, "theta", "UniLoRA", module)
    a, b = (
        theta[take(arrays, f"indices_{side}", "UniLoRA", module).astype(np.int64)]
        * _f64(arrays, f"scales_{side}", "UniLoRA", module)
        for side in "AB"
    )
    return {"weight": UniLoRA(a, b, 1.0)}


def tinylora(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """ΔW = B·(Σ vᵢPᵢ)·A, with the one v that all layers share."""
    if "P" not in arrays:
        raise _regenerated("TinyLoRA", module)
    groups = [role for role in arrays if role.startswith("v.")]
    if groups != ["v.0"]:
        raise UnsupportedError(
            f"{module}: the TinyLoRA adapter has {len(groups)} vectors for groups of layers, and which layer belongs "
            "to which depends on the order of the training model's modules, which the file does not hold.",
            hint="Merge it with PEFT, or train with weight_tying=1.0.",
        )
    middle = np.einsum("i,ijk->jk", _f64(arrays, "v.0", "TinyLoRA", module), _f64(arrays, "P", "TinyLoRA", module))
    a, b = _f64(arrays, "A", "TinyLoRA", module), _f64(arrays, "B", "TinyLoRA", module)
    return {"weight": TinyLoRA(a, b @ middle, 1.0)}


def gralora(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """ΔW = α/(r + hybrid_r)·(blocks + general product). ``A`` is ``[k, in/k, r]``, ``B`` ``[k, r, out/k]``.

    Output block j takes from input block n by A[n]'s j-th r/k columns and B[j]'s n-th r/k rows.
    """
    a, b = _f64(arrays, "A", "GraLoRA", module), _f64(arrays, "B", "GraLoRA", module)
    k, width, rank = a.shape
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
        factor_b = np.concatenate([factor_b, _f64(arrays, "B_general", "GraLoRA", module)], axis=1)
        factor_a = np.concatenate([factor_a, _f64(arrays, "A_general", "GraLoRA", module)], axis=0)
    scale = number(config.get("alpha"), "alpha", module) / number(config.get("r"), "r", module)
    if hybrid:
        scale = number(config.get("alpha"), "alpha", module) / (rank + hybrid)
    return {"weight": GraLoRA(factor_a, factor_b, scale)}


def hira(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """W' = W ⊙ (1 + B·A); an embedding takes the product's transpose."""
    if "embedding_A" in arrays:
        a, b = arrays["embedding_A"], take(arrays, "embedding_B", "HiRA", module)
        return {"weight": HiRA(LowRank(b.T, a.T, 1.0))}
    a, b = take(arrays, "A", "HiRA", module), take(arrays, "B", "HiRA", module)
    return {"weight": HiRA(LowRank(a, b.reshape(b.shape[0], -1), 1.0))}


def beft(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """Only the bias changes: b' = b + β."""
    return {"bias": Addition(take(arrays, "bias", "BEFT", module).reshape(-1))}


def ln_tuning(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """The trained copy of a (normalisation) layer takes its place."""

    def placed(new: Array) -> Callable[[tuple[int, ...]], Delta]:
        # transformers' Conv1D keeps its copy as [in, out].
        return lambda shape: Replacement(new.T if new.shape != shape and new.T.shape == shape else new)

    return {
        parameter: pending({parameter: array}, "LN tuning", module, placed(array))
        for parameter, array in arrays.items()
    }


def c3a(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """ΔW of circulant blocks, divided by the number of inputs."""
    return {"weight": C3A(1.0, take(arrays, "kernel", "C3A", module))}


def road(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """W' and b' with c₁ = α·cos θ and c₂ = α·sin θ, shared by 2 (road_1), 1 (road_2) or ½ (road_4) outputs."""
    theta, alpha = _f64(arrays, "theta", "RoAd", module), _f64(arrays, "alpha", "RoAd", module)
    size = int(number(config.get("group_size", 64), "group_size", module))
    variant = config.get("variant", "road_1")
    if variant == "road_1":
        theta, alpha = (np.repeat(x.reshape(-1, size // 2), 2, axis=0).ravel() for x in (theta, alpha))
    elif variant == "road_4":
        halves = [x.reshape(-1, 2, size) for x in (theta, alpha)]
        first, second = ((halves[0][:, i].ravel(), halves[1][:, i].ravel()) for i in (0, 1))
        return _road(first[1] * np.cos(first[0]), second[1] * np.sin(second[0]), size)
    elif variant != "road_2":
        raise InputError(f"{module}: RoAd variant {variant!r}; expected road_1, road_2 or road_4.")
    return _road(alpha * np.cos(theta), alpha * np.sin(theta), size)


def _road(first: Array, second: Array, size: int) -> dict[str, Delta]:
    return {"weight": RoAd(first, second, size, 2), "bias": RoAd(first, second, size, 1)}


def shira(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """ΔW at ``indices`` ``[2, n]``, which the file holds."""
    rows, columns = take(arrays, "indices", "SHiRA", module).astype(np.int64)
    values = take(arrays, "weight", "SHiRA", module)
    return {"weight": pending(arrays, "SHiRA", module, lambda shape: SHiRA(1.0, rows, columns, values, shape))}


def supertuning(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """ΔW at flat ``indices`` that the file holds (``save_precomputed_indices``)."""
    if any(role.startswith("lora") for role in arrays):
        raise UnsupportedError(f"{module}: SuperTuning with a LoRA part (r is set) is not read.")
    if "indices" not in arrays:
        raise UnsupportedError(
            f"{module}: the SuperTuning adapter was saved without its indices (save_precomputed_indices=False); they "
            "depend on ties in the base weight.",
            hint="Save it again with save_precomputed_indices=True.",
        )
    flat, values = arrays["indices"].astype(np.int64), take(arrays, "values", "SuperTuning", module)

    def make(shape: tuple[int, ...]) -> Delta:
        rows, columns = np.unravel_index(flat, shape)
        return SuperTuning(1.0, rows, columns, values, shape)

    return {"weight": pending(arrays, "SuperTuning", module, make)}


def seeded_places(count: int, seed: int, shape: tuple[int, ...], kind: str) -> tuple[Array, Array]:
    """The first ``count`` of torch's random permutation of the weight's elements, as PEFT draws them: (rows, columns).

    Raises:
        BindingError: There are more values than elements.
    """
    if count > shape[0] * shape[1]:
        raise BindingError(f"a {kind} spectrum of {count} does not fit a weight of {list(shape)}.")
    torch = require("torch", f"draw the random places of a {kind} adapter")
    drawn = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed))[:count].numpy()
    return drawn // shape[1], drawn % shape[1]


def fourierft(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """ΔW = scaling·Re(ifft2(spectrum at seeded places))."""
    values = _f64(arrays, "spectrum", "FourierFT", module)
    seed = int(number(config.get("random_loc_seed", 777), "random_loc_seed", module))
    scale = number(config.get("scaling", 150.0), "scaling", module)

    def make(shape: tuple[int, ...]) -> Delta:
        return FourierFT(scale, *seeded_places(values.size, seed, shape, "FourierFT"), values, shape)

    return {"weight": pending(arrays, "FourierFT", module, make)}


def waveft(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """ΔW = scaling·values at seeded places; with the wavelet transform PEFT itself evaluates it (``peft_bridge``)."""
    if config.get("use_idwt", True):
        return waveft_transformed(arrays, config, module)
    values = _f64(arrays, "waveft_spectrum", "WaveFT", module)
    seed = int(number(config.get("random_loc_seed", 777), "random_loc_seed", module))
    scale = number(config.get("scaling", 25.0), "scaling", module)

    def make(shape: tuple[int, ...]) -> Delta:
        return WaveFT(scale, *seeded_places(values.size, seed, shape, "WaveFT"), values, shape)

    return {"weight": pending(arrays, "WaveFT", module, make)}


def deft(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """W' = W + Q(s·R − rightᵀW): Q = P, right = relu(P), or both are the Q of P's QR; s = alpha/r if given."""
    p = _f64(arrays, "P", "DEFT", module)
    method = config.get("decomposition_method", "relu")
    if method not in ("relu", "qr"):
        raise InputError(f"{module}: DEFT decomposition_method {method!r}; expected 'relu' or 'qr'.")
    left = np.linalg.qr(p)[0] if method == "qr" else p
    right = left if method == "qr" else np.maximum(p, 0.0)
    if config.get("para"):
        return {"weight": DEFT(left, right, None)}
    scale = number(config["alpha"], "alpha", module) / p.shape[1] if config.get("alpha") else 1.0
    return {"weight": DEFT(left, right, _f64(arrays, "R", "DEFT", module) * scale)}


def osf(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """The m smallest singular triplets of W become U, S, V; the base must be the one that was trained on."""
    return {"weight": OSF(*(take(arrays, role, "OSF", module) for role in ("U", "S", "V")))}


def frod(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """W' = U(diag λ + S)Vᵀ; V and S's places are those of the module's category."""
    category = _frod_category(module)
    if f"V.{category}" not in arrays:
        raise _regenerated("FRoD", module)
    return {
        "weight": FRoD(
            arrays[f"V.{category}"],
            take(arrays, "lambda", "FRoD", module),
            take(arrays, f"places.{category}", "FRoD", module),
            take(arrays, "values", "FRoD", module),
        )
    }


def _frod_category(module: str) -> str:
    """As PEFT's ``_category_from_key``: the last two parts of the path, without a layer's number."""
    parts = module.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def glora(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """W' = W + W ⊙ A + B and b' = b + b ⊙ D + E. A path through the weight into the bias (C) cannot be folded alone."""
    gate, shift = _glora_path(arrays, "A"), _glora_path(arrays, "B")
    changes: dict[str, Delta] = {
        "weight": pending(arrays, "GLoRA", module, lambda shape: GatedGLoRA(gate(shape), shift(shape)))
    }
    if _c_path(arrays):
        raise UnsupportedError(
            f"{module}: the GLoRA adapter's C path adds W·C to the bias, so the bias depends on the weight.",
            hint="Merge it with PEFT, or train with config_C='none'.",
        )
    if any(role.startswith(("D.X", "E.X")) for role in arrays):
        d, e = _glora_path(arrays, "D"), _glora_path(arrays, "E")
        changes["bias"] = pending(arrays, "GLoRA", module, lambda shape: GatedGLoRA(d(shape), e(shape)))
    return changes


def _glora_path(arrays: Arrays, letter: str) -> Callable[[tuple[int, ...]], Delta]:
    """A path's matrix as a delta, for a weight of the shape that is asked: low rank, a vector, a number, or nothing."""

    def make(shape: tuple[int, ...]) -> Delta:
        if f"{letter}.Xd" in arrays:
            return LowRank(take(arrays, f"{letter}.Xu", "GLoRA", "?"), arrays[f"{letter}.Xd"], 1.0)
        return Addition(np.broadcast_to(arrays.get(f"{letter}.X", np.zeros(1)), shape))

    return make


def _c_path(arrays: Arrays) -> bool:
    """Whether the C path adds anything."""
    if "C.Xd" in arrays:
        return bool(np.any(arrays["C.Xd"].astype(np.float64) @ arrays["C.Xu"].astype(np.float64)))
    return "C.X" in arrays and bool(np.any(arrays["C.X"]))
