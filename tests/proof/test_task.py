"""Scores of the task itself: labels beside inputs, and text with the model's own tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from loracc.errors import InputError
from loracc.proof.task import task_scores
from loracc.proof.verification import VerifyOptions, verify
from loracc.task_data import from_labels, from_text
from tests.verifying import VOCABULARY, bind, build, folded, write


def test_scores_of_known_logits() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    assert task_scores({"base": [{"logits": logits}]}, [np.array([0, 2])])["base"] == {"accuracy": 0.5}
    two = [{"logits": logits[None]}]
    found = task_scores({"base": two}, [np.array([[0, -100]])])["base"]
    assert found["accuracy"] == 1.0 and found["perplexity"] == pytest.approx(2.0)
    with pytest.raises(InputError, match="none of the outputs"):
        task_scores({"base": two}, [np.array([0, 1])])
    with pytest.raises(InputError, match="the model knows 3 classes"):
        task_scores({"base": two}, [np.array([[0, 3]])])
    with pytest.raises(InputError, match="nothing to score"):
        task_scores({"base": two}, [np.array([[-100, -100]])])


def test_labels_score_base_unfused_and_folded(tmp_path: Path) -> None:
    base = build("attention")
    bindings = bind(base)
    out = write(base, folded(base, bindings), tmp_path / "o.onnx")
    inputs = {"input_ids": np.random.default_rng(0).integers(0, VOCABULARY, (4, 6))}
    # The folded model's own answers: what it and the unfused model get right, and the base does not.
    from loracc.runners.runner import OnnxRunner

    np.savez(tmp_path / "l.npz", labels=OnnxRunner(out.path).run(inputs)["logits"].argmax(-1))
    options = VerifyOptions(threads=1, task=from_labels(tmp_path / "l.npz", inputs))
    task = verify(base, out, bindings, options).to_json()["numbers"]["end_to_end"]["task"]
    assert task["folded"]["accuracy"] == task["unfused"]["accuracy"] == 1.0 > task["base"]["accuracy"]
    assert task["folded"]["perplexity"] == pytest.approx(task["unfused"]["perplexity"], rel=1e-5)
    with pytest.raises(InputError, match="of which inputs"):
        from_labels(tmp_path / "l.npz", {})
    np.savez(tmp_path / "no.npz", answers=np.zeros(3))
    with pytest.raises(InputError, match="expected an integer array 'labels'"):
        from_labels(tmp_path / "no.npz", inputs)


def test_text_with_the_models_own_tokenizer(tmp_path: Path) -> None:
    words = {"[PAD]": 0, "[UNK]": 1, "the": 2, "cat": 3, "sat": 4}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}
    whole = {"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "t.txt").write_text("the cat sat\n\nthe dog\n")
    base = build("attention")
    base = write(base, base.ir, tmp_path / "base.onnx")
    data = from_text(tmp_path / "t.txt", base)
    assert data.inputs[0]["input_ids"].tolist() == [[2, 3, 4], [2, 1, 0]]
    assert data.labels[0].tolist() == [[3, 4, -100], [1, -100, -100]]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match="no text in it"):
        from_text(tmp_path / "empty.txt", base)
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match="no tokenizer can be loaded"):
        from_text(tmp_path / "t.txt", base, tmp_path / "bare")
