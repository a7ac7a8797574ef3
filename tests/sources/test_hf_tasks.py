"""``--task``: which class a folder is exported as, and what is said when there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from click.testing import CliRunner

from loracc.cli import main
from loracc.errors import InputError
from loracc.model import LoadOptions
from loracc.sources import load_model
from loracc.sources.huggingface import load_huggingface
from loracc.tasks import TASKS
from tests.models import FAMILIES, adapted, build, save_base, text_inputs, torch_inputs

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT and transformers about each other, and torch's exporter


def test_every_task_is_known_to_transformers_and_in_the_help() -> None:
    text = CliRunner().invoke(main, ["fold", "--help"]).output.replace("\n", "").replace(" ", "")
    for task, auto in TASKS.items():
        assert len(getattr(transformers, auto)._model_mapping) and task in text


def test_a_decoder_as_a_feature_extractor(tmp_path: Path) -> None:
    model = adapted(build("llama"), **FAMILIES["llama"].lora)
    save_base(build("llama"), tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    out = tmp_path / "out.onnx"
    arguments = ["fold", f"{tmp_path}/base", f"{tmp_path}/adapter", "-o", f"{out}", "--task", "feature-extraction"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    inputs = text_inputs(3, 11)
    with torch.no_grad():
        expected = model.get_base_model().model(**torch_inputs(inputs)).last_hidden_state.numpy()
    [got] = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"]).run(["last_hidden_state"], inputs)
    assert np.abs(got - expected).max() / np.abs(expected).max() < 1e-5


def test_the_folders_own_class_is_kept_where_it_does_the_task(tmp_path: Path) -> None:
    folder = save_base(build("roberta"), tmp_path)
    tasked = load_huggingface(folder, LoadOptions(task="text-classification"))
    plain = load_huggingface(folder, LoadOptions())
    assert [n.op_type for n in tasked.ir.graph] == [n.op_type for n in plain.ir.graph]


def test_a_task_of_which_the_weights_are_missing(tmp_path: Path) -> None:
    folder = save_base(build("bert"), tmp_path)
    with pytest.raises(InputError, match=r"lacks 2 weights .*classifier\.bias, classifier\.weight"):
        load_huggingface(folder, LoadOptions(task="text-classification"))


def test_unknown_tasks_list_the_known_ones(tmp_path: Path) -> None:
    folder = save_base(build("bert"), tmp_path)
    with pytest.raises(InputError, match="--task 'translation' is not known") as caught:
        load_huggingface(folder, LoadOptions(task="translation"))
    assert all(task in (caught.value.hint or "") for task in TASKS)
    with pytest.raises(InputError, match=r"no such model of the type 'bert'") as caught:
        load_huggingface(folder, LoadOptions(task="image-classification"))
    assert "fill-mask" in (caught.value.hint or "")


def test_a_task_that_could_do_nothing(tmp_path: Path) -> None:
    folder = save_base(build("bert"), tmp_path)
    with pytest.raises(InputError, match="only its weights are read"):
        load_model(folder, LoadOptions(task="fill-mask", graph=False))
    x = ir.val("x", ir.DataType.FLOAT, [1])
    ir.save(ir.Model(ir.Graph([x], [x], nodes=[], opset_imports={"": 18}), ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(InputError, match=r"an \.onnx file already"):
        load_model(tmp_path / "m.onnx", LoadOptions(task="fill-mask"))
