"""PEFT LoRA files: what is read, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from loracc.deltas import Addition, DoRA, LowRank, Replacement, RowReplacement
from loracc.errors import InputError, LoraccError, NumericsError, UnsupportedError
from loracc.formats import is_adapter, load_adapter
from loracc.kinds.packed_experts import PackedExperts
from tests.formats.peft_files import PREFIX, lora, random_array, write_adapter


def test_linear(tmp_path: Path) -> None:
    tensors = lora("layers.0.fc")
    adapter = load_adapter(write_adapter(tmp_path / "mine", tensors))
    (entry,) = adapter.entries
    assert (adapter.name, adapter.format, entry.name) == ("mine", "peft", "layers.0.fc.weight")
    assert isinstance(entry.delta, LowRank)
    assert (entry.delta.rank, entry.delta.scale, entry.delta.shape) == (2, 4.0, (6, 5))
    np.testing.assert_array_equal(entry.delta.a, tensors[f"{PREFIX}layers.0.fc.lora_A.weight"])
    assert set(entry.keys) == set(tensors)
    assert entry.fan_in_fan_out is False


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_tensors_keep_their_dtype(tmp_path: Path, dtype: Any) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    tensors = {key: array.astype(dtype) for key, array in lora("fc").items()}
    folder = write_adapter(tmp_path / "a", lora("fc"))
    names = {np.float16: "float16", ml_dtypes.bfloat16: "bfloat16", np.float32: "float32", np.float64: "float64"}
    as_torch = {
        key: torch.from_numpy(array.astype(np.float64)).to(getattr(torch, names[dtype]))
        for key, array in tensors.items()
    }
    save_torch(as_torch, folder / "adapter_model.safetensors")
    delta = load_adapter(folder).entries[0].delta
    for array in delta.arrays().values():
        assert array.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(delta.arrays()["b"], tensors[f"{PREFIX}fc.lora_B.weight"])


def test_torch_file(tmp_path: Path) -> None:
    import torch

    folder = write_adapter(tmp_path / "a", lora("fc"))
    expected = load_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({k: torch.from_numpy(v) for k, v in lora("fc").items()}, folder / "adapter_model.bin")
    assert load_adapter(folder).digest == expected.digest


def test_a_torch_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    import torch

    folder = write_adapter(tmp_path / "a", lora("fc"))
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": Path("y")}, folder / "adapter_model.bin")
    with pytest.raises(InputError, match="reading that runs code"):
        load_adapter(folder)


def test_named_adapters(tmp_path: Path) -> None:
    write_adapter(tmp_path / "all" / "one", lora("fc"))
    assert load_adapter(tmp_path / "all").name == "all"
    write_adapter(tmp_path / "all" / "two", lora("fc"))
    with pytest.raises(InputError, match="2 adapters: one, two"):
        load_adapter(tmp_path / "all")
    assert is_adapter(tmp_path / "all")
    assert is_adapter(tmp_path / "all" / "one" / "adapter_model.safetensors")


def test_adapter_name_in_the_keys(tmp_path: Path) -> None:
    named = lora("a", name="style") | lora("b", name="style")
    assert [e.name for e in load_adapter(write_adapter(tmp_path / "1", named)).entries] == ["a.weight", "b.weight"]
    mixed = lora("a", name="style") | lora("b", name="other")
    with pytest.raises(InputError, match=r"name 2 adapters: style .*, other"):
        load_adapter(write_adapter(tmp_path / "2", mixed))
    half = lora("a", name="style") | lora("b")
    with pytest.raises(InputError, match="name 2 adapters"):
        load_adapter(write_adapter(tmp_path / "3", half))


def test_patterns_and_rslora(tmp_path: Path) -> None:
    tensors = lora("layers.0.q", r=2) | lora("layers.1.q", r=4) | lora("layers.1.qq", r=2)
    folder = write_adapter(
        tmp_path / "a", tensors, use_rslora=True, rank_pattern={"1.q": 4}, alpha_pattern={"^layers.0.q": 3, "0.q": 99}
    )
    scales = {e.module: (e.delta.rank, e.delta.scale) for e in load_adapter(folder).entries}
    assert scales == {
        "layers.0.q": (2, 3 / 2**0.5),
        "layers.1.q": (4, 8 / 4**0.5),
        "layers.1.qq": (2, 8 / 2**0.5),
    }


def test_embedding_conv_dora_bias(tmp_path: Path) -> None:
    tensors = {
        f"{PREFIX}emb.lora_embedding_A": random_array(2, 11),
        f"{PREFIX}emb.lora_embedding_B": random_array(7, 2),
        f"{PREFIX}emb.lora_magnitude_vector": random_array(7),
        f"{PREFIX}conv.lora_A.weight": random_array(2, 3, 5, 5),
        f"{PREFIX}conv.lora_B.weight": random_array(4, 2, 1, 1),
        f"{PREFIX}conv.lora_magnitude_vector": random_array(1, 4, 1, 1),
    }
    adapter = load_adapter(write_adapter(tmp_path / "a", tensors, use_dora=True))
    conv, emb = sorted(adapter.entries, key=lambda entry: entry.name)
    assert isinstance(emb.delta, DoRA) and emb.delta.axis == 1 and emb.delta.shape == (11, 7)
    assert isinstance(conv.delta, DoRA) and conv.delta.axis == 0 and conv.delta.shape == (4, 3, 5, 5)
    assert conv.delta.magnitude.shape == (4,)

    biased = lora("fc") | {f"{PREFIX}fc.lora_B.bias": random_array(6)}
    weight, bias = load_adapter(write_adapter(tmp_path / "b", biased, lora_bias=True)).entries
    assert isinstance(bias.delta, Addition) and bias.name == "fc.bias" and bias.delta.scale == weight.delta.scale == 4.0


def test_replacements(tmp_path: Path) -> None:
    tensors = lora("fc") | {
        f"{PREFIX}fc.base_layer.bias": random_array(6),
        f"{PREFIX}norm.bias": random_array(6),
        f"{PREFIX}head.modules_to_save.default.dense.weight": random_array(3, 6),
        f"{PREFIX}head.out.bias": random_array(3),
        f"{PREFIX}model.embed_tokens.base_layer.weight": random_array(9, 6),
        f"{PREFIX}head.num_batches_tracked": np.array(3),
    }
    adapter = load_adapter(write_adapter(tmp_path / "a", tensors, bias="all", modules_to_save=["head"]))
    found = {entry.name: entry.delta for entry in adapter.entries}
    assert set(found) == {
        "fc.weight",
        "fc.bias",
        "norm.bias",
        "head.dense.weight",
        "head.out.bias",
        "model.embed_tokens.weight",
    }
    assert all(isinstance(delta, Replacement) for name, delta in found.items() if name != "fc.weight")
    assert found["model.embed_tokens.weight"].follows_tying and not found["norm.bias"].follows_tying
    with pytest.raises(UnsupportedError, match="has no meaning"):
        adapter.scaled(0.5)


def test_a_bias_that_nothing_explains_is_refused(tmp_path: Path) -> None:
    tensors = lora("fc") | {f"{PREFIX}fc.base_layer.bias": random_array(6), f"{PREFIX}norm.bias": random_array(6)}
    with pytest.raises(InputError, match=r"1 keys are not part.*norm\.bias"):
        load_adapter(write_adapter(tmp_path / "a", tensors, bias="lora_only"))


def test_token_rows(tmp_path: Path) -> None:
    key = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    tensors = lora("fc") | {key: random_array(2, 6)}
    for indices in ([4, 1], {"embed_tokens": [4, 1]}):
        entry = load_adapter(write_adapter(tmp_path / "a", tensors, trainable_token_indices=indices)).entries[-1]
        assert isinstance(entry.delta, RowReplacement) and entry.name == "model.embed_tokens.weight"
        np.testing.assert_array_equal(entry.delta.rows, [4, 1])
    for wrong, match in (([4], "names 1 tokens"), ([4, 4], "without repetition"), ({"wte": [4, 1]}, "names no model")):
        with pytest.raises(InputError, match=match):
            load_adapter(write_adapter(tmp_path / "a", tensors, trainable_token_indices=wrong))


def test_attention_and_experts(tmp_path: Path) -> None:
    attention = lora("attn", out=18, inner=6) | lora("attn.base_layer.out_proj", out=6, inner=6)
    adapter = load_adapter(write_adapter(tmp_path / "a", attention, rank_pattern={"attn": 2}, r=7))
    assert {entry.name for entry in adapter.entries} == {"attn.in_proj_weight", "attn.out_proj.weight"}

    experts = lora("mlp.experts", out=5, inner=4, r=6) | lora("mlp.experts.base_layer", out=8, inner=5, r=6)
    folder = write_adapter(
        tmp_path / "b", experts, target_parameters=["experts.gate_up_proj", "experts.down_proj"], peft_version="0.21.2"
    )
    inner, outer = load_adapter(folder).entries
    assert (inner.name, outer.name) == ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    assert [other.parameter for other in inner.alternatives] == ["down_proj"]
    assert isinstance(inner.delta, PackedExperts) and inner.delta.rank == 2 and inner.delta.input_first is None


def test_a_bare_target_parameter_is_no_module_of_target_modules(tmp_path: Path) -> None:
    """PEFT writes bare names itself when it converts an adapter of experts that transformers 5 stacks."""
    tensors = lora("attn.q_proj") | lora("mlp.experts", out=5, inner=4, r=6) | lora("mlp.router")
    fields: dict[str, Any] = {"target_parameters": ["gate_up_proj"], "target_modules": ["q_proj", "router"]}
    names = {entry.name for entry in load_adapter(write_adapter(tmp_path / "a", tensors, **fields)).entries}
    assert names == {"attn.q_proj.weight", "mlp.router.weight", "mlp.experts.gate_up_proj"}
    by_pattern = {**fields, "target_modules": r".*\.(q_proj|router)"}
    assert len(load_adapter(write_adapter(tmp_path / "b", tensors, **by_pattern)).entries) == 3
    with pytest.raises(InputError, match="regular expression"):
        load_adapter(write_adapter(tmp_path / "c", tensors, **{**fields, "target_modules": "("}))


@pytest.mark.parametrize("says", [True, False])
def test_a_bias_of_lora_b_and_the_configuration_agree(says: bool, tmp_path: Path) -> None:
    bias = {} if says else {"base_model.model.fc.lora_B.bias": np.ones(6, np.float32)}
    folder = write_adapter(tmp_path / "a", lora("fc") | bias, lora_bias=says)
    with pytest.raises(InputError, match=f"lora_B.bias, and adapter_config.json says lora_bias={says}"):
        load_adapter(folder)


def test_bare_file(tmp_path: Path) -> None:
    path = tmp_path / "bare.safetensors"
    save_file(lora("fc") | lora("fc2", r=4), path)
    with pytest.raises(InputError, match=r"no adapter_config.json") as caught:
        load_adapter(path)
    assert "--alpha" in str(caught.value) and "--scale" in str(caught.value)
    assert [e.delta.scale for e in load_adapter(path, alpha=8).entries] == [4.0, 2.0]
    assert [e.delta.scale for e in load_adapter(path, scale=0.3).entries] == [0.3, 0.3]
    assert load_adapter(path, describe=True).entries[0].delta.rank == 2
    assert load_adapter(path, alpha=8).digest != load_adapter(path, alpha=9).digest
    with pytest.raises(InputError, match="both"):
        load_adapter(path, alpha=8, scale=1)


def test_digest_tells_adapters_apart(tmp_path: Path) -> None:
    one = load_adapter(write_adapter(tmp_path / "a", lora("fc")))
    same = load_adapter(write_adapter(tmp_path / "b", lora("fc"), lora_dropout=0.1))
    other = load_adapter(write_adapter(tmp_path / "c", lora("fc"), lora_alpha=9))
    damaged = load_adapter(write_adapter(tmp_path / "d", lora("fc", seed=7)))
    assert one.digest == same.digest
    assert len({one.digest, other.digest, damaged.digest}) == 3


REFUSED_CONFIGS: list[tuple[dict[str, Any], type[LoraccError], str]] = [
    ({"alora_invocation_tokens": [1, 2]}, UnsupportedError, "aLoRA"),
    ({"arrow_config": {"top_k": 2}}, UnsupportedError, "Arrow"),
    ({"layer_replication": [[0, 2]]}, UnsupportedError, "layer_replication"),
    ({"monteclora_config": {"a": 1}}, UnsupportedError, "MonteCLoRA"),
    ({"a_field_of_tomorrow": 3}, UnsupportedError, "a_field_of_tomorrow=3"),
    ({"init_lora_weights": "pissa_niter_4"}, UnsupportedError, "residual base"),
    ({"init_lora_weights": "olora"}, UnsupportedError, "residual base"),
    ({"init_lora_weights": "something"}, UnsupportedError, "not known"),
    ({"init_lora_weights": 3}, InputError, "init_lora_weights"),
    ({"peft_type": "XLORA"}, UnsupportedError, "XLORA"),
    ({"peft_type": "PREFIX_TUNING"}, UnsupportedError, "PREFIX_TUNING"),
    ({"peft_type": None}, InputError, "no peft_type"),
    ({"lora_parameters": {"rank": 8}, "fine_tune_type": "lora"}, UnsupportedError, "mlx-lm"),
    ({"r": "2"}, InputError, "r in adapter_config.json"),
    ({"r": 0}, InputError, "positive integer"),
    ({"r": True}, InputError, "positive integer"),
    ({"r": 3}, InputError, r"rank 2, and adapter_config.json says 3"),
    ({"lora_alpha": 0}, InputError, "other than 0"),
    ({"lora_alpha": "8"}, InputError, "lora_alpha"),
    ({"rank_pattern": {"fc": 0}}, InputError, "rank_pattern"),
    ({"rank_pattern": {"(": 2}}, InputError, "regular expression"),
    ({"rank_pattern": ["fc"]}, InputError, "rank_pattern"),
    ({"use_dora": "yes"}, InputError, "use_dora"),
    ({"use_dora": True}, InputError, "no lora_magnitude_vector"),
    ({"bias": "some"}, InputError, "bias is 'some'"),
    ({"modules_to_save": "head"}, InputError, "modules_to_save"),
    ({"trainable_token_indices": [1]}, InputError, "no token rows"),
    ({"trainable_token_indices": [-1]}, InputError, "token ids"),
]


@pytest.mark.parametrize(("fields", "error", "words"), REFUSED_CONFIGS, ids=lambda value: str(value)[:40])
def test_refused_configurations(tmp_path: Path, fields: dict[str, Any], error: type[LoraccError], words: str) -> None:
    with pytest.raises(error, match=words):
        load_adapter(write_adapter(tmp_path / "a", lora("fc"), **fields))


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_alone(tmp_path: Path, init: Any) -> None:
    assert load_adapter(write_adapter(tmp_path / "a", lora("fc"), init_lora_weights=init)).entries


def test_residual_base(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", lora("fc"), init_lora_weights="pissa")
    assert load_adapter(folder, residual_base=True).entries


def without(tensors: dict[str, Any], end: str) -> dict[str, Any]:
    return {key: array for key, array in tensors.items() if not key.endswith(end)}


REFUSED_TENSORS: list[tuple[dict[str, Any], type[LoraccError], str]] = [
    (without(lora("fc"), "lora_B.weight"), InputError, "come in pairs"),
    (lora("fc") | {f"{PREFIX}fc.lora_C.weight": random_array(2)}, InputError, r"fc\.lora_C\.weight"),
    (lora("fc") | {f"{PREFIX}fc.lora_B.weight": random_array(6, 3)}, InputError, "ranks 2 and 3"),
    (lora("fc") | {f"{PREFIX}fc.lora_A.weight": random_array(0, 5)}, InputError, "empty"),
    (lora("fc") | {f"{PREFIX}fc.lora_A.weight": random_array(10)}, InputError, r"shape \[10\]"),
    (lora("fc") | {f"{PREFIX}fc.lora_A.weight": np.ones((2, 5), np.int32)}, InputError, "not of a float dtype"),
    (lora("fc") | {f"{PREFIX}fc.lora_A.weight": np.full((2, 5), np.nan, np.float32)}, NumericsError, "lora_A"),
    (lora("fc") | {f"{PREFIX}fc.lora_magnitude_vector": random_array(6)}, InputError, "use_dora=False"),
    (
        {f"{PREFIX}c.lora_A.weight": random_array(4, 3, 3, 3), f"{PREFIX}c.lora_B.weight": random_array(8, 2, 1, 1)},
        UnsupportedError,
        "2 groups",
    ),
    (
        {f"{PREFIX}c.lora_A.weight": random_array(2, 3, 3, 3), f"{PREFIX}c.lora_B.weight": random_array(8, 2, 3, 3)},
        InputError,
        r"expected \[out, r, 1",
    ),
    ({"model.layers.0.weight": random_array(3, 3)}, InputError, "not part of"),
]


@pytest.mark.parametrize(("tensors", "error", "words"), REFUSED_TENSORS, ids=lambda value: str(value)[:30])
def test_refused_tensors(tmp_path: Path, tensors: Any, error: type[LoraccError], words: str) -> None:
    with pytest.raises(error, match=words):
        load_adapter(write_adapter(tmp_path / "a", tensors))


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    tensors = without(lora("a"), "lora_B.weight") | lora("b", r=3) | {f"{PREFIX}c.weight": random_array(3)}
    with pytest.raises(InputError) as caught:
        load_adapter(write_adapter(tmp_path / "a", tensors))
    assert all(word in str(caught.value) for word in ("a.lora_A.weight", "rank 3", "c.weight"))


def test_damaged_files(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", lora("fc"))
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    for damaged in (data[:-1], data[:20], b"", b"\x00" * 40):
        path.write_bytes(damaged)
        with pytest.raises(InputError):
            load_adapter(folder)
    path.write_bytes(data)
    for text in ("{", "[]", json.dumps({"peft_type": "LORA", "r": [2]})):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(InputError):
            load_adapter(folder)
    (folder / "adapter_config.json").unlink()
    path.unlink()
    with pytest.raises(InputError, match="no adapter"):
        load_adapter(folder)
    with pytest.raises(InputError, match="no such file"):
        load_adapter(tmp_path / "nowhere")
