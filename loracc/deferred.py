"""sympy and onnx are imported when something is computed with them, and not whenever onnx_ir is.

onnx_ir 1.1 imports sympy for arithmetic on symbolic dimensions (0.3 s and 36 MB, measured) and onnx for its protobuf
messages (0.05 s): a third of the time and of the memory of folding a 1.1B checkpoint, where no dimension is symbolic
and no ONNX file is read or written (docs/upstream.md). While onnx_ir is being imported, and only then, stand-ins take
their places; what onnx_ir keeps of them finds the real ones at the first use. Any other import of them, before or
after, is untouched.
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

__all__ = ["defer_imports"]

#: What onnx_ir's modules import by name, packages before what is in them.
_NAMES = ("sympy", "onnx", "onnx.external_data_helper")


def defer_imports() -> None:
    """Arrange it for the first import of onnx_ir; without effect on what is there already."""
    if "onnx_ir" not in sys.modules and _absent():
        sys.meta_path.insert(0, _Finder())


def _absent() -> list[str]:
    return [name for name in _NAMES if name.partition(".")[0] not in sys.modules]


class _Finder(MetaPathFinder):
    """Sees the import of onnx_ir once, and takes itself off."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "onnx_ir":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if not _absent() or spec is None or spec.loader is None:
            return spec
        spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """onnx_ir's own loader, with the stand-ins in place while it works."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        stand_ins = {name: _StandIn(name) for name in _absent()}
        sys.modules.update(stand_ins)
        try:
            self._loader.exec_module(module)
        except Exception:  # another onnx_ir that does more with them at its import: then as if nothing had been here
            for name in [name for name in sys.modules if name.startswith("onnx_ir.") or name in stand_ins]:
                del sys.modules[name]
            self._loader.exec_module(module)
        finally:
            for name, stand_in in stand_ins.items():
                stand_in.importing = False
                if sys.modules.get(name) is stand_in:
                    del sys.modules[name]


class _StandIn(ModuleType):
    """A module, as far as onnx_ir's modules keep a reference to it."""

    importing = True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self.importing:
            return _Function(self.__name__, name)
        return getattr(importlib.import_module(self.__name__), name)


class _Function:
    """A function that was looked up at import time."""

    def __init__(self, module: str, name: str) -> None:
        self._module = module
        self._name = name

    def __call__(self, *args: Any) -> Any:
        return getattr(importlib.import_module(self._module), self._name)(*args)
