"""PyTorch, PEFT and ONNX Runtime, each as the callable that `evaluate.py` scores."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from samples.minilm.evaluate import Batch, Encoder, Vectors

if TYPE_CHECKING:
    from torch import nn

HIDDEN_STATES = "last_hidden_state"


def load_tokenizer(folder: Path) -> Any:
    """The model's own tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_base(folder: Path) -> Any:
    """The unadapted model in float32, ready for inference."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def load_peft(folder: Path, adapter: Path) -> Any:
    """The model with the adapter beside its weights, as PEFT runs it: y = Wx + s·B(Ax)."""
    from peft import PeftModel

    with quiet_peft():
        return PeftModel.from_pretrained(load_base(folder), str(adapter)).eval()


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence the one warning every PEFT model starts with: it asks transformers 5 for a property by its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def torch_encoder(model: nn.Module) -> Encoder:
    """A PyTorch model as an encoder."""
    import torch

    def run(batch: Batch) -> Vectors:
        with torch.inference_mode():
            output = model(**{name: torch.from_numpy(array) for name, array in batch.items()})
        hidden: Vectors = output.last_hidden_state.numpy()
        return hidden

    return run


def onnx_encoder(path: Path) -> Encoder:
    """An ONNX file in ONNX Runtime on the CPU; it is fed the inputs that its graph declares, no others."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]
    # A graph's first output is a transformers model's hidden states even where the exporter renamed it.
    wanted = HIDDEN_STATES if HIDDEN_STATES in outputs else outputs[0]

    def run(batch: Batch) -> Vectors:
        (hidden,) = session.run([wanted], {name: batch[name] for name in inputs})
        return np.asarray(hidden, dtype=np.float32)

    return run
