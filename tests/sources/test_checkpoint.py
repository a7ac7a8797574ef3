"""Checkpoints as node-less models: file order, sites, orientation, and the files that go along."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loracc.errors import InputError
from loracc.model import LoadOptions
from loracc.sites import TRANSPOSED, Layout
from loracc.sources import load_model
from loracc.sources.checkpoint import CONV1D_LAYERS, CheckpointFiles
from loracc.tensors import dims

WEIGHTS_ONLY = LoadOptions(graph=False)


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "h.0.attn.c_attn.weight": rng.standard_normal((4, 12)).astype(np.float32),
        "h.0.attn.c_attn.bias": rng.standard_normal(12).astype(np.float32),
        "wte.weight": rng.standard_normal((7, 4)).astype(np.float32),
        "step": np.array(3, np.int64),
        "temperature": np.array(0.5, np.float32),
    }


def sharded(folder: Path) -> Path:
    """A folder of two shards with an index, a configuration and a tokenizer."""
    folder.mkdir()
    content = arrays()
    first, second = dict(list(content.items())[:2]), dict(list(content.items())[2:])
    save_file(first, folder / "model-00001-of-00002.safetensors")
    save_file(second, folder / "model-00002-of-00002.safetensors")
    weight_map = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    weight_map |= dict.fromkeys(second, "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"x")
    (folder / ".gitattributes").write_text("x")
    return folder


def test_a_folder_is_read_without_torch_when_only_its_weights_matter(tmp_path: Path) -> None:
    model = load_model(sharded(tmp_path / "m"), WEIGHTS_ONLY)
    assert (model.format, model.traced, len(model.ir.graph)) == ("checkpoint", False, 0)
    read = {name: value.const_value for name, value in model.ir.graph.initializers.items()}
    for name, array in arrays().items():
        tensor = read[name]
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), array)
    assert isinstance(model.origin, CheckpointFiles)
    assert [shard.path.name for shard in model.origin.shards] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert [info.name for info in model.origin.tensors] == list(read)
    assert model.origin.index == tmp_path / "m" / "model.safetensors.index.json"
    assert [path.name for path in model.origin.others] == ["config.json", "tokenizer.json"]


def test_sites_are_the_float_tensors_with_axes(tmp_path: Path) -> None:
    model = load_model(sharded(tmp_path / "m"), WEIGHTS_ONLY)
    found = {site.name: (site.module, site.parameter, site.kind, site.layout) for site in model.sites}
    assert found == {
        "h.0.attn.c_attn.weight": ("h.0.attn.c_attn", "weight", "linear", TRANSPOSED),
        "h.0.attn.c_attn.bias": ("h.0.attn.c_attn", "bias", "other", Layout()),
        "wte.weight": ("wte", "weight", "other", Layout()),
    }


def test_an_index_a_single_file_and_a_bare_file(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    by_index = load_model(folder / "model.safetensors.index.json")
    assert set(by_index.ir.graph.initializers) == set(arrays())
    assert {s.layout for s in by_index.sites if s.kind == "linear"} == {TRANSPOSED}
    bare = load_model(folder / "model-00002-of-00002.safetensors")
    assert list(bare.ir.graph.initializers) == [info.name for info in bare.origin.tensors]
    assert (bare.origin.root, bare.origin.others) == (folder / "model-00002-of-00002.safetensors", ())
    diffusion = tmp_path / "unet"
    diffusion.mkdir()
    save_file({"w.weight": np.ones((2, 2), np.float32)}, diffusion / "diffusion_pytorch_model.safetensors")
    assert [site.name for site in load_model(diffusion).sites] == ["w.weight"]


def test_a_decoder_inside_another_model_keeps_its_own_orientation(tmp_path: Path) -> None:
    one = np.ones((4, 4), np.float32)
    save_file({"encoder.mlp.c_fc.weight": one, "decoder.h.0.mlp.c_fc.weight": one}, tmp_path / "model.safetensors")
    config = {"model_type": "encoder-decoder", "encoder": {"model_type": "bert"}, "decoder": {"model_type": "gpt2"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    layouts = {site.name: site.layout for site in load_model(tmp_path, WEIGHTS_ONLY).sites}
    assert layouts == {"encoder.mlp.c_fc.weight": Layout(), "decoder.h.0.mlp.c_fc.weight": TRANSPOSED}


def test_module_folders_of_sentence_transformers_go_along(tmp_path: Path) -> None:
    save_file({"w.weight": np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"x")
    (tmp_path / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "../.."}]))
    others = load_model(tmp_path, WEIGHTS_ONLY).origin.others
    assert [str(path.relative_to(tmp_path)) for path in others] == ["1_Pooling/config.json", "modules.json"]


def test_pytorch_bin_folders_are_read_without_unpickling(tmp_path: Path) -> None:
    import torch

    state = {name: torch.from_numpy(array) for name, array in arrays().items()}
    state["half.weight"] = torch.ones(3, 2, dtype=torch.bfloat16)
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = load_model(tmp_path)
    assert list(model.ir.graph.initializers) == list(state)
    for name, array in arrays().items():
        tensor = model.ir.graph.initializers[name].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), array)
    half = model.ir.graph.initializers["half.weight"].const_value
    assert half is not None
    assert dims(half) == (3, 2)
    assert half.numpy().astype(np.float32).tolist() == [[1.0, 1.0]] * 3


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"model": {"w": 1}}, "'model' is a dict, expected only tensors"),
        ([1, 2], "holds a list"),
    ],
)
def test_pytorch_bin_of_something_else(tmp_path: Path, content: Any, problem: str) -> None:
    import torch

    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=problem):
        load_model(tmp_path)


def test_pytorch_bin_that_would_run_code_is_refused(tmp_path: Path) -> None:
    import torch

    torch.save(torch.nn.Linear(2, 2), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="holds more than tensors"):
        load_model(tmp_path)


@pytest.mark.parametrize("model_type", sorted(CONV1D_LAYERS))
def test_the_conv1d_table_agrees_with_transformers(model_type: str) -> None:
    """Every ``Conv1D(`` that the model's source builds is in the table, and the table names no other."""
    family = {"openai-gpt": "openai", "clvp_decoder": "clvp"}.get(model_type, model_type)
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    built = set(re.findall(r"self\.(\w+) = Conv1D\(", inspect.getsource(modeling)))
    assert built == CONV1D_LAYERS[model_type]
