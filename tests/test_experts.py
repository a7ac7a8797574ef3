"""Experts that transformers stacks on loading: adapters of the stack into the checkpoint's pieces, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from loracc.cli import run
from loracc.dtypes import Array
from tests.formats.peft_files import write_adapter
from tests.models import adapted, build, image_inputs, save_base, text_inputs, torch_inputs

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

EXPERTS = "model.layers.{layer}.block_sparse_moe.experts.{expert}"


def error_of(got: Array, expected: Array) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral whose checkpoint, like those on the hub, has each expert's w1, w2 and w3."""
    folder = save_base(build("mixtral"), tmp_path_factory.mktemp("mixtral"))
    assert f"{EXPERTS.format(layer=1, expert=3)}.w3.weight" in load_file(folder / "model.safetensors")
    return folder


def logits(folder: Path) -> Array:
    import torch
    import transformers

    model: Any = transformers.MixtralForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        found = model.eval()(**torch_inputs(text_inputs()))
    return np.asarray(found.logits.double())


def onnx_logits(path: Path) -> Array:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], text_inputs())[0], np.float64)


def test_an_adapter_of_the_stack_goes_into_the_pieces(mixtral: Path, tmp_path: Path) -> None:
    import torch

    model = adapted(
        build("mixtral"),
        target_modules=["q_proj", "gate"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(**torch_inputs(text_inputs())).logits.double().numpy()
    out = tmp_path / "merged"
    assert run(["fold", str(mixtral), str(tmp_path / "adapter"), "-o", str(out), "-q"]) == 0
    assert error_of(logits(out), expected) < 1e-5 < error_of(logits(mixtral), expected)
    assert run(["verify", str(mixtral), str(out), "--adapter", str(tmp_path / "adapter"), "-q"]) == 0


def small_adapter(folder: Path, base: Path, **config: Any) -> dict[str, Array]:
    """LoRA on the router, on w1 and w2 of some experts, with two ranks and scales; the merged tensors, in float64."""
    rng = np.random.default_rng(0)
    weights = load_file(base / "model.safetensors")
    names = [
        "model.layers.1.block_sparse_moe.gate",
        *(f"{EXPERTS.format(layer=1, expert=e)}.{w}" for e, w in ((0, "w1"), (2, "w1"), (2, "w3"), (3, "w2"))),
    ]
    tensors: dict[str, Array] = {}
    merged = {name: array.astype(np.float64) for name, array in weights.items()}
    for name in names:
        rows, columns = weights[f"{name}.weight"].shape
        r, scale = (3, 8 / 3) if name.endswith("w3") else (2, 2.0)
        a, b = (rng.standard_normal(s).astype(np.float32) * 0.2 for s in ((r, columns), (rows, r)))
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        merged[f"{name}.weight"] += scale * (b.astype(np.float64) @ a.astype(np.float64))
    fields = {"r": 2, "lora_alpha": 4, "rank_pattern": {"w3": 3}, "alpha_pattern": {"w3": 8}, **config}
    write_adapter(folder, tensors, {"peft_type": "LORA", **fields})
    return merged


def test_adapters_of_the_pieces_go_into_the_stack(mixtral: Path, tmp_path: Path) -> None:
    """The names are the checkpoint's, and the router's was another one too."""
    merged = small_adapter(tmp_path / "adapter", mixtral)
    adapter, out, whole = (str(tmp_path / name) for name in ("adapter", "merged", "out.onnx"))
    assert run(["fold", str(mixtral), adapter, "-o", out, "-q"]) == 0
    got = load_file(tmp_path / "merged/model.safetensors")
    assert all(error_of(got[name], merged[name]) < 1e-7 for name in merged)
    assert run(["fold", str(mixtral), adapter, "-o", whole, "-q"]) == 0
    expected = logits(tmp_path / "merged")
    assert error_of(onnx_logits(tmp_path / "out.onnx"), expected) < 1e-5 < error_of(logits(mixtral), expected)


def test_an_adapter_with_the_checkpoints_names_for_a_graph(tmp_path: Path) -> None:
    """Published adapters of vision transformers have the names of transformers 4, as the checkpoints do."""
    import onnxruntime
    import torch
    import transformers

    base = save_base(build("vit"), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    rng = np.random.default_rng(0)
    tensors = {}
    for name in [name.removesuffix(".weight") for name in weights if name.endswith(("query.weight", "value.weight"))]:
        assert ".attention.attention." in name
        tensors[f"base_model.model.{name}.lora_A.weight"] = rng.standard_normal((2, 32)).astype(np.float32) * 0.2
        tensors[f"base_model.model.{name}.lora_B.weight"] = rng.standard_normal((32, 2)).astype(np.float32) * 0.2
    write_adapter(tmp_path / "adapter", tensors)
    for out in ("merged", "out.onnx"):
        assert run(["fold", str(base), str(tmp_path / "adapter"), "-o", str(tmp_path / out), "-q"]) == 0
    inputs = image_inputs("vit")
    with torch.no_grad():
        models: list[Any] = [transformers.ViTModel.from_pretrained(folder) for folder in (tmp_path / "merged", base)]
        expected, before = (model.eval()(**torch_inputs(inputs))[0].numpy() for model in models)
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    assert error_of(session.run(None, inputs)[0], expected) < 1e-5 < error_of(before, expected)
