"""Greedy decoding with ONNX Runtime from a graph with a key-value cache, as optimum and transformers.js feed it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

__all__ = ["PROMPTS", "PROMPT_MASK", "greedy"]

#: Two prompts, the second padded on the left, as decoders are.
PROMPTS = np.array([[5, 6, 7, 8, 9, 10, 11], [0, 0, 3, 4, 5, 6, 7]], np.int64)
PROMPT_MASK = (PROMPTS > 0).astype(np.int64)


def greedy(path: Path, tokens: int, ids: np.ndarray = PROMPTS, mask: np.ndarray = PROMPT_MASK) -> np.ndarray:
    """The prompts and ``tokens`` more of each: the whole prompt with an empty past first, then one token at a time."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    past = {
        value.name: np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    takes = {value.name for value in session.get_inputs()}
    gives = [value.name for value in session.get_outputs()]
    assert {name.replace("past_key_values", "present") for name in past} == set(gives) - {"logits"}
    new = ids
    for _ in range(tokens):
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -new.shape[1] :]
        feeds = {"input_ids": new, "attention_mask": mask, "position_ids": positions, **past}
        out = dict(zip(gives, session.run(None, {k: v for k, v in feeds.items() if k in takes}), strict=True))
        past = {name: out[name.replace("past_key_values", "present")] for name in past}
        new = out["logits"][:, -1].argmax(-1)[:, None]
        ids, mask = np.concatenate([ids, new], 1), np.concatenate([mask, np.ones_like(new)], 1)
    return ids
