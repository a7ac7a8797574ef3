"""loracc: a compiler for LoRA-adapted models.

>>> import loracc
>>> [name for name in sorted(loracc.__all__) if name[0].islower()]
['attach', 'bench', 'convert_adapter', 'extract_adapter', 'fold', 'load_adapter', 'load_model', 'unfold', 'verify']

The functions are the command line's own: ``loracc.fold("model.pt2", ["adapter/"], "out.onnx")``. Importing this package
loads neither torch nor onnxruntime nor transformers; what a function needs is loaded when it is called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from loracc.deferred import defer_imports

if TYPE_CHECKING:
    from loracc.adapter import Adapter as Adapter
    from loracc.benching import bench as bench
    from loracc.convert import convert_adapter as convert_adapter
    from loracc.errors import LoraccError as LoraccError
    from loracc.extract import extract_adapter as extract_adapter
    from loracc.formats import load_adapter as load_adapter
    from loracc.pipeline import fold as fold
    from loracc.proving import verify as verify
    from loracc.sources import load_model as load_model
    from loracc.switching.attaching import attach as attach
    from loracc.unfolding import unfold as unfold

__version__ = "0.1.0"

#: Where each public name lives; loaded on first use.
_HOME = {
    "Adapter": "loracc.adapter",
    "LoraccError": "loracc.errors",
    "attach": "loracc.switching.attaching",
    "bench": "loracc.benching",
    "convert_adapter": "loracc.convert",
    "extract_adapter": "loracc.extract",
    "fold": "loracc.pipeline",
    "load_adapter": "loracc.formats",
    "load_model": "loracc.sources",
    "unfold": "loracc.unfolding",
    "verify": "loracc.proving",
}

defer_imports()

__all__ = [
    "Adapter",
    "LoraccError",
    "attach",
    "bench",
    "convert_adapter",
    "extract_adapter",
    "fold",
    "load_adapter",
    "load_model",
    "unfold",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'loracc' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
