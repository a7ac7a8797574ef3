"""onnxruntime-genai's model builder: adapters folded into its graphs, and what onnxruntime-genai then generates."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from loracc.cli import run
from tests.anonymous import anonymous
from tests.calibrating import write_tokenizer
from tests.genai_models import WORDS, build_with_genai, generate, logits, save_tokenizer, tiny_llama
from tests.models import FAMILIES, adapted

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
PROMPT, LENGTH = [1, 5, 6, 7], 32


@dataclass(frozen=True)
class Case:
    """A checkpoint, an adapter, and the greedy tokens of PEFT's unmerged model and of the base alone."""

    base: Path
    adapter: Path
    expected: list[int]
    unadapted: list[int]


def greedy(model: Any) -> list[int]:
    import torch

    with torch.no_grad():
        made = model.generate(
            input_ids=torch.tensor([PROMPT]), max_length=LENGTH, min_length=LENGTH, do_sample=False, use_cache=False
        )
    return [int(token) for token in made[0]]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("genai")
    model = tiny_llama()
    model.save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    unadapted = greedy(model)
    tuned = adapted(model, scale=0.05, **FAMILIES["llama"].lora)
    tuned.save_pretrained(folder / "adapter")
    expected = greedy(tuned)
    assert expected != unadapted
    return Case(folder / "base", folder / "adapter", expected, unadapted)


def fold(model: Path, out: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """Fold into a copy of the builder's folder."""
    shutil.copytree(model.parent, out, ignore=shutil.ignore_patterns("*.onnx*", "cache"))
    capsys.readouterr()
    code = run(["fold", str(model), *map(str, arguments), "-o", str(out / "model.onnx"), "--json", "--quiet"])
    told = capsys.readouterr()
    assert code == 0, told.err
    result: dict[str, Any] = json.loads(told.out)
    numbers = result["verification"]["numbers"]
    assert (numbers["verdict"], numbers["measured_on"]) == ("pass", "outputs"), numbers
    return result


def test_fused_queries_keys_and_values(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build_with_genai(case.base, tmp_path / "fp32", "fp32")
    result = fold(model, tmp_path / "out", capsys, case.adapter, "--base", case.base)
    ways = {site["name"].split(".")[-2]: site["way"] for site in result["sites"]}
    assert ways == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "content"),
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "name"),
    }
    assert generate(tmp_path / "fp32", PROMPT, LENGTH) == case.unadapted
    assert generate(tmp_path / "out", PROMPT, LENGTH) == case.expected


def test_switched_by_onnxruntime_genai(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``attach --base``: the graph and its ``.onnx_adapter``, loaded and switched by ``og.Adapters``."""
    model = build_with_genai(case.base, tmp_path / "fp32", "fp32")
    out = tmp_path / "out"
    shutil.copytree(model.parent, out, ignore=shutil.ignore_patterns("*.onnx*", "cache"))
    command = ["attach", str(model), f"tuned={case.adapter}", "--base", str(case.base), "-o", str(out / "model.onnx")]
    code = run([*command, "--quiet"])
    assert code == 0, capsys.readouterr().err
    assert generate(out, PROMPT, LENGTH) == case.unadapted
    assert generate(out, PROMPT, LENGTH, adapter=out / "tuned.onnx_adapter") == case.expected


def test_without_any_name(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build_with_genai(case.base, tmp_path / "fp32", "fp32")
    ir.save(anonymous(ir.load(model)), model, external_data="model.onnx.data")
    result = fold(model, tmp_path / "out", capsys, case.adapter, "--base", case.base)
    assert Counter(site["way"] for site in result["sites"]) == {"content": 14}
    assert generate(tmp_path / "out", PROMPT, LENGTH) == case.expected


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_16_bits(case: Case, precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime's CPU provider has no kernels for these graphs as they are: what is checked are their numbers."""
    model = build_with_genai(case.base, tmp_path / precision, precision)
    result = fold(model, tmp_path / "out", capsys, case.adapter, "--base", case.base)
    assert Counter(site["way"] for site in result["sites"]) == {"content": 8, "name": 6}


def test_four_bits(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The codes are found by the values that they were made of, and the delta is added to those.

    So the result loses what four bits lose, and not twice that: no more than the builder's own quantization of the
    merged checkpoint.
    """
    import peft
    import torch

    model = build_with_genai(case.base, tmp_path / "int4", "int4")
    result = fold(model, tmp_path / "out", capsys, case.adapter, "--base", case.base)
    assert Counter(site["way"] for site in result["sites"]) == {"content": 8, "name": 6}
    tuned = peft.PeftModel.from_pretrained(tiny_llama(), case.adapter)
    tokens = case.expected
    with torch.no_grad():
        expected = tuned(input_ids=torch.tensor([tokens])).logits.numpy()
    merged = tmp_path / "merged"
    tuned.merge_and_unload().save_pretrained(merged)
    save_tokenizer(merged)
    other = build_with_genai(merged, tmp_path / "merged_int4", "int4")

    def error(path: Path) -> float:
        return float(np.linalg.norm(logits(path, tokens) - expected) / np.linalg.norm(expected))

    # The two choose the blocks' scales differently: within a quarter of each other is the same loss.
    assert error(tmp_path / "out" / "model.onnx") < 1.25 * error(other)
    assert len(generate(tmp_path / "out", PROMPT, LENGTH)) == LENGTH


def test_four_bits_calibrated_with_text(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its cache's sizes are in no input's shape, and lines of unlike length must not be padded: it counts tokens."""
    model, rng = build_with_genai(case.base, tmp_path / "int4", "int4"), np.random.default_rng(0)
    write_tokenizer(tmp_path / "words", words=WORDS - 2)
    lines = [" ".join(f"w{i}" for i in rng.integers(0, WORDS - 2, 8 + rng.integers(24))) for _ in range(160)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    text = ("--calibrate", tmp_path / "text.txt", "--tokenizer", tmp_path / "words")
    result = fold(model, tmp_path / "out", capsys, case.adapter, "--base", case.base, *text)
    assert sum(site["gain"]["used"] for site in result["sites"]) >= 12
    assert result["calibration"]["calibrated"] < 0.9 * result["calibration"]["nearest"]
    assert all(abs(site["survived"] - 1) < 0.01 for site in result["sites"] if site["gain"]["used"])
    assert len(generate(tmp_path / "out", PROMPT, LENGTH)) == LENGTH


def test_a_graph_built_with_the_adapter_in_it(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build_with_genai(case.base, tmp_path / "lora", "fp32", adapter_path=case.adapter)
    result = fold(model, tmp_path / "out", capsys)
    assert len(result["sites"]) == 14
    nodes = [node.name or "" for node in ir.load(tmp_path / "out" / "model.onnx").graph]
    assert not [name for name in nodes if "lora" in name]
    assert generate(tmp_path / "out", PROMPT, LENGTH) == case.expected
