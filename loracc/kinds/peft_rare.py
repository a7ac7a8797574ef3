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
from loracc.kinds.pairs import RoAd
from loracc.kinds.peft_bridge import waveft_transformed
from loracc.kinds.peft_low_rank import regenerated
from loracc.kinds.sparse import FourierFT, SHiRA, SuperTuning, WaveFT
from loracc.kinds.spec import Config, number, pending, take, take64
from loracc.kinds.subspace import DEFT, OSF, FRoD

__all__ = [
    "beft",
    "c3a",
    "deft",
    "fourierft",
    "frod",
    "glora",
    "hira",
    "ln_tuning",
    "osf",
    "road",
    "shira",
    "supertuning",
    "waveft",
]

Arrays = Mapping[str, Array]


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
    theta, alpha = take64(arrays, "theta", "RoAd", module), take64(arrays, "alpha", "RoAd", module)
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
    values = take64(arrays, "spectrum", "FourierFT", module)
    seed = int(number(config.get("random_loc_seed", 777), "random_loc_seed", module))
    scale = number(config.get("scaling", 150.0), "scaling", module)

    def make(shape: tuple[int, ...]) -> Delta:
        return FourierFT(scale, *seeded_places(values.size, seed, shape, "FourierFT"), values, shape)

    return {"weight": pending(arrays, "FourierFT", module, make)}


def waveft(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """ΔW = scaling·values at seeded places; with the wavelet transform PEFT itself evaluates it (``peft_bridge``)."""
    if config.get("use_idwt", True):
        return waveft_transformed(arrays, config, module)
    values = take64(arrays, "waveft_spectrum", "WaveFT", module)
    seed = int(number(config.get("random_loc_seed", 777), "random_loc_seed", module))
    scale = number(config.get("scaling", 25.0), "scaling", module)

    def make(shape: tuple[int, ...]) -> Delta:
        return WaveFT(scale, *seeded_places(values.size, seed, shape, "WaveFT"), values, shape)

    return {"weight": pending(arrays, "WaveFT", module, make)}


def deft(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """W' = W + Q(s·R − rightᵀW): Q = P, right = relu(P), or both are the Q of P's QR; s = alpha/r if given."""
    p = take64(arrays, "P", "DEFT", module)
    method = config.get("decomposition_method", "relu")
    if method not in ("relu", "qr"):
        raise InputError(f"{module}: DEFT decomposition_method {method!r}; expected 'relu' or 'qr'.")
    left = np.linalg.qr(p)[0] if method == "qr" else p
    right = left if method == "qr" else np.maximum(p, 0.0)
    if config.get("para"):
        return {"weight": DEFT(left, right, None)}
    scale = number(config["alpha"], "alpha", module) / p.shape[1] if config.get("alpha") else 1.0
    return {"weight": DEFT(left, right, take64(arrays, "R", "DEFT", module) * scale)}


def osf(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """The m smallest singular triplets of W become U, S, V; the base must be the one that was trained on."""
    return {"weight": OSF(*(take(arrays, role, "OSF", module) for role in ("U", "S", "V")))}


def frod(arrays: Arrays, config: Config, module: str) -> dict[str, Delta]:
    """W' = U(diag λ + S)Vᵀ; V and S's places are those of the module's category."""
    category = _frod_category(module)
    if f"V.{category}" not in arrays:
        raise regenerated("FRoD", module)
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
