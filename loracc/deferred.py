"""sympy is imported when a symbolic dimension is computed with, and not whenever onnx_ir is.

onnx_ir 1.1 imports sympy for arithmetic on symbolic dimensions: 0.3 s and 36 MB, measured, which is a sixth of the time
and more than a third of the memory of folding a 1.1B checkpoint, where no dimension is symbolic (docs/upstream.md).
While onnx_ir is being imported, and only then, a stand-in takes sympy's place; what onnx_ir keeps of it finds the real
one at the first use. Any other import of sympy, before or after, is untouched.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["defer_sympy"]


def defer_sympy() -> None:
    """Arrange it for the first import of onnx_ir; without effect when that, or sympy, is there already."""
    if "onnx_ir" not in sys.modules and "sympy" not in sys.modules:
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Sees the import of onnx_ir once, and takes itself off."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "onnx_ir":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if "sympy" in sys.modules or spec is None or spec.loader is None:
            return spec
        spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """onnx_ir's own loader, with the stand-in in place while it works."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        stand_in = _StandIn("sympy")
        sys.modules["sympy"] = stand_in
        try:
            self._loader.exec_module(module)
        except Exception:  # another onnx_ir that does more with sympy at its import: then as if nothing had been here
            for name in [name for name in sys.modules if name.startswith("onnx_ir.")]:
                del sys.modules[name]
            del sys.modules["sympy"]
            self._loader.exec_module(module)
        finally:
            stand_in.importing = False
            if sys.modules.get("sympy") is stand_in:
                del sys.modules["sympy"]


class _StandIn(ModuleType):
    """sympy, as far as onnx_ir's modules keep a reference to it."""

    importing = True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Function(name) if self.importing else getattr(importlib.import_module("sympy"), name)


class _Function:
    """A function of sympy's that was looked up at import time."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any) -> Any:
        return getattr(importlib.import_module("sympy"), self._name)(*args)
