"""``.onnx_adapter`` files for a session on a graph of ``attach --as inputs``, checked before the runtime gets them.

::

    session = onnxruntime.InferenceSession("out.onnx")
    style = loracc.runtime.load_adapter(session, "style.onnx_adapter")
    session.run(None, inputs, loracc.runtime.run_options(style))   # with the adapter
    session.run(None, inputs)                                      # the base, bit for bit

ONNX Runtime itself checks nothing: parameters that the graph has not are an error of the run at best, those of another
base fit as they are, of two active adapters with the same names the second does nothing, and an adapter that Python has
dropped is read all the same (docs/upstream.md). Loaded here, an adapter is an ``onnxruntime.LoraAdapter`` and may be
used by many sessions and threads at once.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import onnx_ir as ir

from loracc.errors import InputError, require
from loracc.formats.runtime_adapter import RuntimeAdapter, model_version, read_runtime_adapter
from loracc.manifest import Branch, Manifest

__all__ = ["load_adapter", "run_options"]


def load_adapter(session: Any, file: str | os.PathLike[str]) -> Any:
    """Load an adapter for a session.

    Args:
        session: An ``onnxruntime.InferenceSession`` on a graph that ``attach --as inputs`` wrote.
        file: An ``.onnx_adapter`` that was written for that graph.

    Returns:
        An ``onnxruntime.LoraAdapter`` with two attributes more: ``name``, and ``parameters``, the names it sets.

    Raises:
        InputError: The graph has no switchable inputs, or the file is damaged or was made for another graph: another
            base, other sites, another export.
        MissingExtraError: ONNX Runtime is not installed.
    """
    path = Path(file)
    manifest = Manifest.from_metadata(session.get_modelmeta().custom_metadata_map, "the session's model")
    if manifest.mode != "inputs":
        raise InputError(
            f"the session's model was attached as {manifest.mode}, which takes no .onnx_adapter files.",
            hint="Fill a slot of it instead: loracc slot OUT.onnx NUMBER ADAPTER",
        )
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    _check(path, read_runtime_adapter(path), manifest, session)
    adapter = _classes()[0]()
    adapter.Load(str(path))
    adapter.name, adapter.parameters = path.stem, frozenset(manifest.parameters)
    return adapter


def run_options(*adapters: Any) -> Any:
    """``onnxruntime.RunOptions`` with adapters active, for ``session.run``.

    They keep their adapters alive, and refuse a second one that sets the same parameters: the runtime would use the
    first and say nothing. A sum of adapters is a file of its own: ``loracc attach --sum``.

    Raises:
        InputError: Two adapters set the same parameters.
    """
    options = _classes()[1]()
    for adapter in adapters:
        options.add_active_adapter(adapter)
    return options


def _check(path: Path, found: RuntimeAdapter, manifest: Manifest, session: Any) -> None:
    expected = model_version(manifest)
    if found.model_version != expected:
        made = "for no particular graph" if found.model_version == 1 else "for another graph"
        raise InputError(
            f"{path}: made {made} (model_version {found.model_version}; the session's model has {expected}): another "
            "base, other sites, or another export of them.",
            hint="Write it for this graph: loracc attach OUT.onnx ADAPTER -o NAME.onnx_adapter",
        )
    shapes = {value.name: list(value.shape) for value in session.get_overridable_initializers()}
    for name, array in found.parameters.items():
        wanted = shapes.get(name)
        fits = wanted is not None and len(wanted) == array.ndim
        if not fits or any(isinstance(n, int) and n != m for n, m in zip(wanted or (), array.shape, strict=True)):
            raise InputError(f"{path}: its parameter {name} {list(array.shape)} does not fit the model's {wanted}.")
    for branch in manifest.branches:
        _check_branch(path, found, branch, manifest.dtype)


def _check_branch(path: Path, found: RuntimeAdapter, branch: Branch, dtype: str) -> None:
    """A and the B's of a branch come together, of one rank and in the graph's type; or none of them does."""
    names = [branch.name, *(weight.name for weight in branch.weights)]
    there = {name: found.parameters[name] for name in names if name in found.parameters}
    if not there:
        return
    ranks = {array.shape[1 if name == branch.name else 0] for name, array in there.items()}
    types = {array.dtype for array in there.values()}
    if len(there) < len(names) or len(ranks) > 1 or types != {ir.DataType[dtype].numpy()}:
        shown = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in there.items())
        raise InputError(
            f"{path}: {' and '.join(names)} belong together, of one rank and as {dtype}; it has {shown}.",
            hint="Write it again: loracc attach OUT.onnx ADAPTER -o NAME.onnx_adapter",
        )


@functools.cache
def _classes() -> tuple[Any, Any]:
    """(adapter, run options): ONNX Runtime's own with attributes and the guard; made when it is first needed."""
    runtime: Any = require("onnxruntime", "run adapters")

    class Adapter(runtime.LoraAdapter):  # type: ignore[misc]  # a class of an untyped extension module
        name: str
        parameters: frozenset[str]

    class Options(runtime.RunOptions):  # type: ignore[misc]  # as above
        def __init__(self) -> None:
            super().__init__()
            self.active: list[Any] = []

        def add_active_adapter(self, adapter: Any) -> None:
            for other in self.active:
                if set(getattr(other, "parameters", ())) & set(getattr(adapter, "parameters", ())):
                    raise InputError(
                        f"adapters {other.name!r} and {adapter.name!r} set the same parameters: ONNX Runtime would use "
                        "the first and ignore the second.",
                        hint="Make their sum one adapter: loracc attach ... --sum NAME=a+b",
                    )
            super().add_active_adapter(adapter)
            self.active.append(adapter)

    return Adapter, Options
