"""Trainable parameters before training, against what PEFT makes trainable; and the paper's samples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from loracc.cli import main
from loracc.counting import count_parameters
from loracc.errors import InputError, UnsupportedError
from tests.models import FAMILIES, adapted, build, save_base

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT asks for it
]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_counts_are_pefts(family: str, dora: bool, tmp_path: Path) -> None:
    settings = {
        **FAMILIES[family].lora,
        "use_dora": dora,
        "rank_pattern": {"v_proj" if family == "llama" else "value": 2},
    }
    model = adapted(build(family), **settings)
    expected = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "adapter")
    save_base(build(family), tmp_path / "base")
    found = count_parameters(tmp_path / "base", tmp_path / "adapter")
    assert found["trainable"] == expected and 0 < found["share"] < 1
    arguments = ["inspect", str(tmp_path / "base"), "--count", "--config", str(tmp_path / "adapter"), "--json"]
    assert json.loads(CliRunner().invoke(main, arguments).stdout)["count"]["trainable"] == expected
    of_file = CliRunner().invoke(main, ["inspect", str(tmp_path / "adapter"), "--count"]).output
    assert f"{expected:,}" in of_file


def test_what_cannot_be_counted_says_why(tmp_path: Path) -> None:
    save_base(build("llama"), tmp_path / "base")
    config = tmp_path / "adapter_config.json"
    for body, kind, words in (
        ({"r": 4, "target_modules": ["nothing"]}, InputError, "name no weight"),
        ({"r": 0}, InputError, "rank r of 1"),
        ({"r": 4, "peft_type": "LOHA"}, UnsupportedError, "LOHA"),
    ):
        config.write_text(json.dumps(body))
        with pytest.raises(kind, match=words):
            count_parameters(tmp_path / "base", config)
    with pytest.raises(InputError, match="cannot be read"):
        count_parameters(tmp_path / "base", tmp_path / "absent.json")


def sample(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_papers_counts() -> None:
    shown = sample("samples/parameter_counts.py")
    assert "294,912      294,912" in shown and shown.count("text and formula disagree") == 2


def test_the_latency_table_runs() -> None:
    shown = sample("samples/latency_table.py", "--fast")
    assert "folded 2 deltas found in the graph; numbers pass, structure pass" in shown
    assert all(label in shown for label in ("LoRA, folded", "LoRA, unfolded", "Adapter^L", "Adapter^H"))
