"""``--base``: adapters folded into graphs whose weights have lost their names, through the command line."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from loracc.cli import run
from tests.anonymous import anonymous
from tests.lora_modules import legacy_text_model
from tests.models import FAMILIES, adapted, build, save_base, text_inputs, torch_inputs

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
LORA: dict[str, dict[str, Any]] = {
    "bert": {"target_modules": r".*encoder.*(query|key|value|dense)"},
    "llama": FAMILIES["llama"].lora,
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
}


@dataclass(frozen=True)
class Case:
    """A family's checkpoint, an adapter for it, and what unmerged PEFT computes."""

    base: Path
    adapter: Path
    inputs: dict[str, np.ndarray]
    expected: np.ndarray


@pytest.fixture(scope="module", params=sorted(LORA))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, ir.Model]:
    import torch

    folder, name = tmp_path_factory.mktemp(request.param), request.param
    base = save_base(build(name), folder / "base")
    tuned = adapted(build(name), **LORA[name])
    tuned.save_pretrained(folder / "adapter")
    inputs = text_inputs(batch=3, sequence=11)
    with torch.no_grad():
        expected = tuned(**torch_inputs(inputs))[0].double().numpy()
    graph = legacy_text_model(build(name), text_inputs())
    return Case(base, folder / "adapter", inputs, expected), graph


def write(model: ir.Model, path: Path) -> Path:
    ir.save(model, path)
    return path


def error(path: Path, case: Case) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (got, *_) = session.run(None, {value.name: case.inputs[value.name] for value in session.get_inputs()})
    return float(np.abs(got - case.expected).max() / np.abs(case.expected).max())


def fold(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert run(["fold", *map(str, arguments), "--json", "--quiet"]) == 0, capsys.readouterr().err
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_a_legacy_export_without_any_name(
    case: tuple[Case, ir.Model], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, graph = case
    path = write(anonymous(graph.clone()), tmp_path / "graph.onnx")
    assert run(["fold", str(path), str(files.adapter), "-o", str(tmp_path / "no.onnx"), "--quiet"]) == 2
    capsys.readouterr()
    out = tmp_path / "out.onnx"
    result = fold(capsys, path, files.adapter, "-o", out, "--base", files.base)
    assert Counter(site["way"] for site in result["sites"]) == {"content": len(result["sites"])}
    assert error(out, files) < 1e-5
    command = ["verify", str(path), str(out), "--adapter", str(files.adapter), "--base", str(files.base)]
    assert run([*command, "--quiet"]) == 0
    capsys.readouterr()
    # What was found is recorded: the output's own weights have names now.
    fold(capsys, out, files.adapter, "-o", tmp_path / "twice.onnx", "--no-verify")


def test_scopes_come_before_content(
    case: tuple[Case, ir.Model], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The names that the legacy exporter loses are in its nodes' scopes."""
    files, graph = case
    path = write(graph.clone(), tmp_path / "graph.onnx")
    result = fold(capsys, path, files.adapter, "-o", tmp_path / "out.onnx")
    ways = Counter(site["way"] for site in result["sites"])
    assert ways.keys() <= {"scope", "name"} and error(tmp_path / "out.onnx", files) < 1e-5


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(["fold", *map(str, arguments), "--quiet"]) == 2
    return capsys.readouterr().err


def test_a_base_that_is_another_model_is_refused(
    case: tuple[Case, ir.Model], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, graph = case
    path = write(anonymous(graph.clone()), tmp_path / "graph.onnx")
    rng = np.random.default_rng(0)
    tensors = load_file(files.base / "model.safetensors")
    out = tmp_path / "out.onnx"

    other = {name: rng.standard_normal(tensor.shape).astype(np.float32) for name, tensor in tensors.items()}
    save_file(other, tmp_path / "other.safetensors")
    text = refused(capsys, path, files.adapter, "-o", out, "--base", tmp_path / "other.safetensors")
    assert "none of its" in text and "other.safetensors" in text

    larger = {name: np.repeat(tensor, 2, axis=0) + 1 for name, tensor in tensors.items()}
    save_file(larger, tmp_path / "larger.safetensors")
    text = refused(capsys, path, files.adapter, "-o", out, "--base", tmp_path / "larger.safetensors")
    assert "none of its" in text

    # One weight of another training run, and one that differs in a single element.
    key = next(name for name in tensors if name.endswith(("query.weight", "q_proj.weight", "c_attn.weight")))
    save_file({**tensors, key: other[key]}, tmp_path / "partly.safetensors")
    text = refused(capsys, path, files.adapter, "-o", out, "--base", tmp_path / "partly.safetensors")
    assert key in text and "in no initializer" in text and "nearest of its shape: 'onnx::MatMul_" in text
    changed = tensors[key].copy()
    changed[0, 1] += 1
    save_file({**tensors, key: changed}, tmp_path / "nearly.safetensors")
    text = refused(capsys, path, files.adapter, "-o", out, "--base", tmp_path / "nearly.safetensors")
    assert key in text and "differs at" in text
    assert not out.exists()


def test_calls_that_make_no_sense(
    case: tuple[Case, ir.Model], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, graph = case
    path, out = write(graph.clone(), tmp_path / "graph.onnx"), tmp_path / "out.onnx"
    assert "no adapter" in refused(capsys, path, "-o", out, "--base", files.base)
    assert "checkpoint" in refused(capsys, files.base, files.adapter, "-o", tmp_path / "merged", "--base", files.base)
    assert "adapter" in refused(capsys, path, files.adapter, "-o", out, "--base", files.adapter)
    assert "nowhere" in refused(capsys, path, files.adapter, "-o", out, "--base", "nowhere")


def test_a_state_dict_is_a_base_too(
    case: tuple[Case, ir.Model], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    files, graph = case
    path = write(anonymous(graph.clone()), tmp_path / "graph.onnx")
    state = {name: torch.from_numpy(array) for name, array in load_file(files.base / "model.safetensors").items()}
    torch.save(state, tmp_path / "base.pt")
    result = fold(
        capsys, path, files.adapter, "-o", tmp_path / "out.onnx", "--base", tmp_path / "base.pt", "--no-verify"
    )
    assert {site["way"] for site in result["sites"]} == {"content"}


def optimized(graph: ir.Model, folder: Path) -> Path:
    """A BERT as ONNX Runtime's transformer optimizer fuses it: packed QKV, biases inside other operators."""
    import logging

    from onnxruntime.transformers import optimizer

    plain = write(graph.clone(), folder / "plain.onnx")
    logging.disable(logging.CRITICAL)
    try:
        made = optimizer.optimize_model(str(plain), model_type="bert", num_heads=4, hidden_size=32, opt_level=0)
    finally:
        logging.disable(logging.NOTSET)
    assert {node.op_type for node in made.model.graph.node} >= {
        "Attention",
        "EmbedLayerNormalization",
        "SkipLayerNormalization",
        "BiasGelu",
    }
    made.save_model_to_file(str(folder / "fused.onnx"))
    return folder / "fused.onnx"


@pytest.mark.parametrize("zeros", [False, True], ids=["trained biases", "fresh biases"])
def test_bert_fused_by_the_transformer_optimizer(
    zeros: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fresh biases are all zero, and the exporter keeps one: an adapter that leaves them alone does not care."""
    import torch

    model = build("bert")
    model.set_attn_implementation("eager")  # the optimizer's patterns are of that
    if zeros:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
    base = save_base(model, tmp_path / "base")
    path = optimized(legacy_text_model(model, text_inputs()), tmp_path)
    lora: dict[str, Any] = {
        "target_modules": r".*encoder.*(query|key|value|dense)|.*word_embeddings",
        "bias": "none" if zeros else "lora_only",
    }
    tuned = adapted(model, **lora)
    tuned.save_pretrained(tmp_path / "adapter")
    inputs = text_inputs(batch=3, sequence=11)
    with torch.no_grad():
        expected = tuned(**torch_inputs(inputs))[0].double().numpy()
    result = fold(capsys, path, tmp_path / "adapter", "-o", tmp_path / "out.onnx", "--base", base)
    assert len(result["sites"]) == 12 + (0 if zeros else 12) + 1
    numbers = result["verification"]["numbers"]
    assert (numbers["verdict"], numbers["measured_on"]) == ("pass", "outputs"), numbers
    assert error(tmp_path / "out.onnx", Case(base, tmp_path / "adapter", inputs, expected)) < 1e-5


def test_bases_that_hold_nothing_of_use(
    case: tuple[Case, ir.Model], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, graph = case
    path = write(anonymous(graph.clone()), tmp_path / "graph.onnx")
    tensors = load_file(files.base / "model.safetensors")
    bases = {
        "no float weights": {name: tensor.astype(np.int32) for name, tensor in tensors.items()},
        "none of its": {name: np.zeros_like(tensor) for name, tensor in tensors.items()},
        "holds no float": {name: np.zeros((0, 4), np.float32) for name in tensors},
        "in no initializer": {
            n: np.full_like(t, np.nan) if "weight" in n and t.ndim == 2 else t for n, t in tensors.items()
        },
    }
    for index, (words, content) in enumerate(bases.items()):
        save_file(content, tmp_path / f"{index}.safetensors")
        text = refused(
            capsys, path, files.adapter, "-o", tmp_path / "o.onnx", "--base", tmp_path / f"{index}.safetensors"
        )
        assert words in text
    # Another graph without names says nothing either.
    text = refused(capsys, path, files.adapter, "-o", tmp_path / "o.onnx", "--base", path)
    assert "the base has no such parameter" in text
