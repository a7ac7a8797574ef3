"""Hugging Face folders: every family traced from its folder and run in ONNX Runtime at sizes it was not traced with."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from loracc.errors import InputError, UnsupportedError
from loracc.model import BaseModel, LoadOptions
from loracc.sites import read_records
from loracc.sources.huggingface import load_huggingface
from loracc.tensors import PermutedTensor, dims
from tests.models import FAMILIES, build, image_inputs, save_base, text_inputs, torch_inputs

TOLERANCE = 1e-5


@dataclass
class Loaded:
    model: Any
    folder: Path
    base: BaseModel


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Loaded]:
    """Each family is built and traced once."""
    torch.set_num_threads(1)
    cache: dict[str, Loaded] = {}

    def get(name: str) -> Loaded:
        if name not in cache:
            model = build(name)
            folder = save_base(model, tmp_path_factory.mktemp(name))
            cache[name] = Loaded(model, folder, load_huggingface(folder, LoadOptions()))
        return cache[name]

    return get


def run(model: ir.Model, inputs: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, inputs), strict=True))


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", FAMILIES)
def test_family(load: Callable[[str], Loaded], name: str, tmp_path: Path) -> None:
    loaded = load(name)
    inputs = image_inputs(name, 3) if FAMILIES[name].vision else text_inputs(3, 11)
    with torch.no_grad():
        expected = loaded.model(**torch_inputs(inputs))
    got = run(loaded.base.ir, inputs, tmp_path)
    assert list(got) == [key for key in expected if key in got] and got
    for key, value in got.items():
        assert relative_error(value, expected[key].numpy()) < TOLERANCE, key


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_is_a_site_that_holds_its_values(load: Callable[[str], Loaded], name: str) -> None:
    loaded = load(name)
    found = loaded.base.sites.by_name()
    conv1d = {f"{path}.weight" for path, m in loaded.model.named_modules() if type(m).__name__ == "Conv1D"}
    for parameter, tensor in loaded.model.named_parameters(remove_duplicate=False):
        if (name, parameter) == ("t5", "shared.weight"):  # tied to encoder.embed_tokens, the module that runs
            continue
        [site] = found.pop(parameter)
        stored = loaded.base.ir.graph.initializers[site.initializer].const_value
        assert stored is not None
        canonical = site.layout.view(stored.numpy())
        expected = tensor.detach().numpy()
        assert np.array_equal(canonical, expected.T if parameter in conv1d else expected), parameter
        assert site.layout.canonical_shape(dims(stored)) == canonical.shape
    assert all(parameter.endswith(("running_mean", "running_var")) for parameter in found)
    assert [site.name for site in read_records(loaded.base.ir)] == [site.name for site in loaded.base.sites]


def test_weights_stay_in_their_files(load: Callable[[str], Loaded]) -> None:
    loaded = load("llama")
    values = loaded.base.ir.graph.initializers
    for name, _ in loaded.model.named_parameters():
        tensor = values[name].const_value
        base = tensor.base if isinstance(tensor, PermutedTensor) else tensor
        assert isinstance(base, ir.ExternalTensor) and Path(base.path) == loaded.folder / "model.safetensors"


def test_kinds_of_a_convolution_and_of_experts(load: Callable[[str], Loaded]) -> None:
    kinds = {site.name: site.kind for site in load("mixtral").base.sites}
    assert (
        kinds["model.layers.0.mlp.experts.gate_up_proj"] == kinds["model.layers.1.mlp.experts.down_proj"] == "experts"
    )
    kinds = {site.name: site.kind for site in load("resnet").base.sites}
    assert kinds["resnet.embedder.embedder.convolution.weight"] == "conv"


def test_axes_are_named_and_ranges_respect_the_vocabulary(load: Callable[[str], Loaded]) -> None:
    base = load("bert").base
    axes = [(v.name, [str(d) for d in v.shape or ()]) for v in base.ir.graph.inputs]
    assert axes == [("input_ids", ["batch", "sequence"]), ("attention_mask", ["batch", "sequence"])]
    assert base.input_ranges["input_ids"] == (0, 99)
    assert base.format == "huggingface" and base.traced


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def mask_lm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A one-layer BertForMaskedLM: its names have the prefix "bert." that BertModel's have not."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    model: Any = transformers.BertForMaskedLM(config)
    model.eval()
    return model, save_base(model, tmp_path_factory.mktemp("mask_lm"))


def changed(folder: Path, to: Path, **config: Any) -> Path:
    """A copy of a folder with other values in its config.json; None removes one."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    values = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return to


def test_weights_that_the_checkpoint_lacks_are_listed(mask_lm: tuple[Any, Path], tmp_path: Path) -> None:
    folder = changed(mask_lm[1], tmp_path / "f", architectures=["BertModel"])
    with pytest.raises(InputError, match=r"lacks 2 weights.*: pooler\.dense\.bias, pooler\.dense\.weight"):
        load_huggingface(folder, LoadOptions())


def test_another_class_of_the_same_checkpoint(load: Callable[[str], Loaded], tmp_path: Path) -> None:
    """Its names have no prefix, and the head's weight belongs to no part of it."""
    loaded = load("llama")
    base = load_huggingface(changed(loaded.folder, tmp_path / "f", architectures=["LlamaModel"]), LoadOptions())
    assert base.notes == ("1 tensors of the checkpoint belong to no part of the model: lm_head.weight",)
    assert "layers.0.self_attn.q_proj.weight" in base.sites.by_name()
    inputs = text_inputs(3, 5)
    with torch.no_grad():
        expected = loaded.model.model(**torch_inputs(inputs)).last_hidden_state.numpy()
    assert relative_error(run(base.ir, inputs, tmp_path)["last_hidden_state"], expected) < TOLERANCE


def test_an_encoder_decoder_has_two_lengths_and_no_cache(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    model: Any = transformers.T5ForConditionalGeneration(config)
    model.eval()
    base = load_huggingface(save_base(model, tmp_path / "t5"), LoadOptions())
    inputs = text_inputs(3, 5, vocabulary=50) | {"decoder_input_ids": np.arange(12).reshape(3, 4)}
    with torch.no_grad():
        expected = model(**torch_inputs(inputs))
    got = run(base.ir, inputs, tmp_path)
    assert list(got) == ["logits", "encoder_last_hidden_state"]
    assert relative_error(got["logits"], expected.logits.numpy()) < TOLERANCE


def test_token_types_are_an_input_when_the_tokenizer_makes_them(mask_lm: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = mask_lm
    folder = changed(folder, tmp_path / "with")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    before = digests(folder)
    base = load_huggingface(folder, LoadOptions())
    assert digests(folder) == before
    assert {str(v.name) for v in base.ir.graph.inputs} == {"input_ids", "attention_mask", "token_type_ids"}
    assert base.input_ranges["token_type_ids"] == (0, 2)
    inputs = text_inputs(3, 5, vocabulary=50) | {"token_type_ids": np.array([[0, 0, 1, 1, 1]] * 3)}
    with torch.no_grad():
        expected = model(**torch_inputs(inputs)).logits.numpy()
    assert relative_error(run(base.ir, inputs, tmp_path)["logits"], expected) < TOLERANCE


def test_pytorch_bin_shards_bfloat16_and_the_users_inputs(mask_lm: tuple[Any, Path], tmp_path: Path) -> None:
    model, source = mask_lm
    folder = changed(source, tmp_path / "bin", dtype="bfloat16")
    (folder / "model.safetensors").unlink()
    torch.save({k: v.to(torch.bfloat16) for k, v in model.state_dict().items()}, folder / "pytorch_model.bin")
    options = LoadOptions(inputs=("input_ids:int64[2,8]",), opset=18)
    base = load_huggingface(folder, options)
    assert base.ir.opset_imports[""] == 18
    assert [str(v.name) for v in base.ir.graph.inputs] == ["input_ids"]
    assert base.sample_inputs["input_ids"].shape == (2, 8)
    weight = base.ir.graph.initializers["bert.encoder.layer.0.attention.self.query.weight"].const_value
    expected = model.bert.encoder.layer[0].attention.self.query.weight.detach().to(torch.bfloat16)
    assert weight is not None and weight.dtype == ir.DataType.BFLOAT16
    assert np.array_equal(weight.numpy().astype(np.float32).T, expected.float().numpy())


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        ({"architectures": None}, InputError, 'no "architectures"'),
        ({"architectures": ["NoSuchModel"]}, InputError, "no class 'NoSuchModel'"),
        (
            {"architectures": ["Mine"], "auto_map": {"AutoModel": "mine.Mine"}},
            UnsupportedError,
            "code in its own folder",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedError, "quantized"),
        ({"hidden_size": 8}, InputError, "cannot be built|other shapes"),
        ({"model_type": "nonsense"}, InputError, "refuses it"),
    ],
)
def test_folders_that_are_refused(
    mask_lm: tuple[Any, Path], tmp_path: Path, config: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        load_huggingface(changed(mask_lm[1], tmp_path / "f", **config), LoadOptions())


def test_truncated_weights_are_refused(mask_lm: tuple[Any, Path], tmp_path: Path) -> None:
    folder = changed(mask_lm[1], tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_huggingface(folder, LoadOptions())


def test_nothing_is_printed(mask_lm: tuple[Any, Path], capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    load_huggingface(mask_lm[1], LoadOptions())
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
