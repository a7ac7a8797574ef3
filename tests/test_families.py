"""Every architecture of the table: the folded ONNX file against unmerged PEFT (run with -s for the table)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loracc.cli import run
from tests.models import FAMILIES, adapted, build, image_inputs, save_base, text_inputs, torch_inputs

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # PEFT and transformers warn about what these tiny models do on purpose (tied embeddings, untrained weights).
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def largest_relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """max|got − expected| / max|expected|."""
    return float(np.abs(got.astype(np.float64) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_folded_onnx_equals_unmerged_peft(name: str, tmp_path: Path) -> None:
    import onnxruntime
    import torch

    torch.manual_seed(0)
    family = FAMILIES[name]
    folder = save_base(build(name), tmp_path / "base")
    peft_model = adapted(build(name), **family.lora)
    peft_model.save_pretrained(tmp_path / "adapter")
    assert run(["fold", str(folder), str(tmp_path / "adapter"), "-o", str(tmp_path / "out.onnx"), "--quiet"]) == 0

    # Other sizes than anything was traced with.
    inputs = image_inputs(name, batch=3) if family.vision else text_inputs(batch=3, sequence=11)
    with torch.no_grad():
        expected = peft_model(**torch_inputs(inputs))[0].double().numpy()
    session = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"])
    fed = {value.name: inputs[value.name] for value in session.get_inputs() if value.name in inputs}
    for value in session.get_inputs():
        if value.name == "token_type_ids":
            fed[value.name] = np.zeros_like(inputs["input_ids"])
    error = largest_relative_error(session.run(None, fed)[0], expected)
    print(f"{name:10} max relative error {error:.2e}")
    assert error < 1e-5
