"""GGUF adapters written by the ``gguf`` package as llama.cpp's ``convert_lora_to_gguf.py`` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loracc
from loracc.dtypes import Array
from loracc.errors import InputError, LoraccError, UnsupportedError
from loracc.formats import is_adapter, load_adapter

HEADS, KV, DIM, VOCAB, RANK, ALPHA = 4, 2, 16, 20, 2, 3.0
#: Module of the base -> (its GGUF name, outputs).
MODULES = {
    "model.layers.0.self_attn.q_proj": ("blk.0.attn_q", DIM),
    "model.layers.1.self_attn.k_proj": ("blk.1.attn_k", DIM // 2),
    "model.layers.1.self_attn.v_proj": ("blk.1.attn_v", DIM // 2),
    "model.layers.0.mlp.down_proj": ("blk.0.ffn_down", DIM),
}


def pairs() -> dict[str, tuple[Array, Array]]:
    """PEFT's (A, B) by module."""
    rng = np.random.default_rng(0)
    return {
        module: (
            rng.standard_normal((RANK, DIM)).astype(np.float32),
            rng.standard_normal((out, RANK)).astype(np.float32),
        )
        for module, (_, out) in MODULES.items()
    }


def permute(weights: Array, heads: int) -> Array:
    """llama.cpp's ``LlamaModel.permute``."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def write(path: Path, tensors: dict[str, Array], arch: str = "llama", **header: Any) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(header.pop("type", gguf.GGUFType.ADAPTER))
    writer.add_string(gguf.Keys.Adapter.TYPE, header.pop("kind", "lora"))
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, header.pop("alpha", ALPHA))
    if "tokens" in header:
        writer.add_array(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, header.pop("tokens"))
    for name, array in tensors.items():
        if array.dtype == np.uint8:
            writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(arch: str) -> dict[str, Array]:
    """What the converter makes of the PEFT pairs and of an embedding's."""
    tensors: dict[str, Array] = {}
    for module, (a, b) in pairs().items():
        name = MODULES[module][0]
        if arch == "llama" and name.endswith(("attn_q", "attn_k")):
            b = permute(b, HEADS if name.endswith("attn_q") else KV)
        tensors |= {f"{name}.weight.lora_a": a, f"{name}.weight.lora_b": b}
    a, b = embedding()
    return tensors | {"token_embd.weight.lora_a": a.T, "token_embd.weight.lora_b": b}


def embedding() -> tuple[Array, Array]:
    rng = np.random.default_rng(1)
    return rng.standard_normal((RANK, VOCAB)).astype(np.float32), rng.standard_normal((DIM, RANK)).astype(np.float32)


def base(folder: Path) -> tuple[Path, dict[str, Array]]:
    rng = np.random.default_rng(2)
    weights = {f"{module}.weight": rng.standard_normal((out, DIM)) for module, (_, out) in MODULES.items()}
    weights["model.embed_tokens.weight"] = rng.standard_normal((VOCAB, DIM))
    save_file(weights, folder / "base.safetensors")
    return folder / "base.safetensors", weights


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize(("alpha", "scale"), [(ALPHA, ALPHA / RANK), (0.0, 1.0)])
def test_folded_as_the_adapter_it_was_made_from(tmp_path: Path, arch: str, alpha: float, scale: float) -> None:
    path = write(tmp_path / "a.gguf", converted(arch), arch, alpha=alpha)
    checkpoint, weights = base(tmp_path)
    told: dict[str, Any] = {"heads": (HEADS, KV)} if arch == "llama" else {}
    loracc.fold(checkpoint, [path], tmp_path / "out.safetensors", **told)
    after = load_file(tmp_path / "out.safetensors")
    for module, (a, b) in pairs().items():
        expected = weights[f"{module}.weight"] + scale * b.astype(np.float64) @ a
        np.testing.assert_allclose(after[f"{module}.weight"], expected, rtol=1e-13, atol=1e-13)
    a, b = embedding()
    expected = weights["model.embed_tokens.weight"] + scale * (b.astype(np.float64) @ a).T
    np.testing.assert_allclose(after["model.embed_tokens.weight"], expected, rtol=1e-13, atol=1e-13)


def test_quantised_factors_are_dequantised_as_gguf_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    a = gguf.quantize(rng.standard_normal((RANK, 32)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    tensors = {"blk.0.ffn_up.weight.lora_a": a, "blk.0.ffn_up.weight.lora_b": np.ones((8, RANK), np.float16)}
    delta = load_adapter(write(tmp_path / "a.gguf", tensors, "qwen2")).entries[0].delta
    np.testing.assert_array_equal(delta.arrays()["a"], gguf.dequantize(a, gguf.GGMLQuantizationType.Q8_0))


def test_the_number_of_heads_is_asked_for_and_checked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", converted("llama"))
    assert is_adapter(path)
    assert load_adapter(path, describe=True).format == "gguf"
    with pytest.raises(InputError, match="--gguf-heads"):
        load_adapter(path)
    with pytest.raises(InputError, match="not 3 heads"):
        load_adapter(path, heads=(3, 1))


GOOD = {
    "blk.0.ffn_up.weight.lora_a": np.ones((2, 4), np.float32),
    "blk.0.ffn_up.weight.lora_b": np.ones((4, 2), np.float32),
}


@pytest.mark.parametrize(
    ("tensors", "header", "error", "message"),
    [
        (GOOD, {"tokens": [1, 2]}, UnsupportedError, "aLoRA"),
        (GOOD, {"kind": "control_vector"}, UnsupportedError, "control_vector"),
        (GOOD, {"type": gguf.GGUFType.MODEL}, InputError, "GGUF model"),
        (GOOD, {"arch": "mamba"}, UnsupportedError, "mamba"),
        (GOOD | {"blk.0.attn_norm.weight": np.ones(4, np.float32)}, {}, InputError, "attn_norm"),
        ({"blk.0.ffn_up.weight.lora_a": np.ones((2, 4), np.float32)}, {}, InputError, "pairs"),
        (GOOD | {"blk.0.ffn_up.weight.lora_b": np.ones((4, 3), np.float32)}, {}, InputError, "no pair"),
    ],
)
def test_wrong_files(
    tmp_path: Path, tensors: dict[str, Array], header: dict[str, Any], error: type[LoraccError], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_adapter(write(tmp_path / "a.gguf", tensors, **header))


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
def test_a_truncated_file_is_a_users_error(tmp_path: Path, share: float) -> None:
    path = write(tmp_path / "a.gguf", GOOD)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError, match=r"a\.gguf"):
        load_adapter(path)
