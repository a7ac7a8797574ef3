"""``loracc fold lora_model.pt2 -o out.onnx``: a traced PEFT model needs no adapter argument."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from loracc.cli import run
from tests.models import FAMILIES, adapted, build, text_inputs, torch_inputs

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # PEFT warns about GPT-2's tied embedding, which is adapted here on purpose.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def save_program(module: object, inputs: dict[str, np.ndarray], path: Path) -> Path:
    import torch

    auto = torch.export.Dim.AUTO
    shapes = {name: {0: auto, 1: auto} for name in inputs}
    assert isinstance(module, torch.nn.Module)
    program = torch.export.export(module, (), torch_inputs(inputs), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, path)
    return path


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_lora_in_the_graph_is_folded(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnxruntime
    import torch

    inputs = text_inputs(2, 16)
    peft_model = adapted(build(name), **FAMILIES[name].lora)
    for module in (peft_model.base_model.model, base := build(name)):
        module.config.use_cache = False
    with_lora = save_program(peft_model.base_model.model, inputs, tmp_path / "lora.pt2")
    without = save_program(base, inputs, tmp_path / "base.pt2")
    peft_model.save_pretrained(tmp_path / "adapter")
    capsys.readouterr()
    assert run(["fold", str(with_lora), "-o", str(tmp_path / "raised.onnx"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["verification"]["verdict"] == "pass"
    assert run(["fold", str(without), str(tmp_path / "adapter"), "-o", str(tmp_path / "bound.onnx"), "--quiet"]) == 0

    ops = [Counter(n.op_type for n in onnx.load(tmp_path / f"{way}.onnx").graph.node) for way in ("raised", "bound")]
    assert ops[0] == ops[1]
    with torch.no_grad():
        expected = peft_model(**torch_inputs(inputs))[0].double().numpy()
    got = onnxruntime.InferenceSession(str(tmp_path / "raised.onnx")).run(None, inputs)[0]
    assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_graph_without_lora_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = save_program(build("bert"), text_inputs(2, 16), tmp_path / "base.pt2")
    assert run(["fold", str(program), "-o", str(tmp_path / "out.onnx")]) == 2
    assert "no LoRA branches" in capsys.readouterr().err
    assert not (tmp_path / "out.onnx").exists()
