"""A deployment of one base and many variants in ONNX Runtime: the base is in memory once, variants are folded on load.

::

    with Deployment("out.onnx") as deployment:
        session = deployment.session("style")        # an onnxruntime.InferenceSession
        outputs = deployment.run("task", {"input_ids": ids, "attention_mask": mask})
        base = deployment.session("base")

A session of a variant runs the base's own graph with other weights, so a call costs what a call of the base costs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from loracc.dtypes import Array
from loracc.errors import InputError
from loracc.formats.bound_deltas import read_bindings
from loracc.runners.runner import OnnxRunner
from loracc.runtime.heap import give_memory_back
from loracc.runtime.manifest import BASE, Manifest, Variant, contained, manifest_path, read_manifest
from loracc.runtime.once_cache import OnceCache
from loracc.runtime.sessions import SessionSettings, open_session
from loracc.runtime.shared_base import SessionSource, SharedBase
from loracc.runtime.variant_graph import check_bindings

__all__ = ["Deployment", "variant_runner"]


class Deployment:
    """See the module's docstring. Any number of threads may use one deployment.

    Args:
        path: ``OUT.onnx`` or its manifest ``OUT.onnx.variants.json``.
        capacity: How many variants are kept loaded; the one used longest ago makes room. The base is kept besides.
        provider: "cpu" or "cuda" (on a GPU each loaded variant has its own copy of all weights on the device).
        threads: Threads inside one operator; 0 is the runtime's own choice.
        prepack: See :class:`loracc.runtime.sessions.SessionSettings`: True is fast, False takes less memory.
        verify: Read the base's data files whole and compare their sha256; else the size and samples are compared.
        configure: Called with each session's ``onnxruntime.SessionOptions`` before it is opened.

    Raises:
        InputError: A file is missing, damaged, or not the one that the manifest was made for.
        MissingExtraError: onnxruntime is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        capacity: int = 8,
        provider: str = "cpu",
        threads: int = 0,
        prepack: bool = True,
        verify: bool = False,
        configure: Callable[[Any], None] | None = None,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}, expected 1 or more")
        given = Path(path)
        self._path = given if given.suffix == ".json" else manifest_path(given)
        self._settings = SessionSettings(provider, threads, prepack, configure)
        self._manifest: Manifest = read_manifest(self._path)
        self._shared: SharedBase | None = SharedBase(self._path, self._manifest, verify=verify)
        self._variants: OnceCache[OnnxRunner] = OnceCache(capacity, give_memory_back)
        self._base: OnceCache[OnnxRunner] = OnceCache(1)
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The variants, in the order they were attached."""
        return tuple(self._manifest.variants)

    def name_of(self, file: Path) -> str:
        """The variant that is stored in a file.

        Raises:
            InputError: None is.
        """
        real = os.path.realpath(file)
        for name, variant in self._manifest.variants.items():
            if str(contained(self._path, variant.file.path)) == real:
                return name
        raise InputError(f"{file}: not the file of a variant in {self._path}.", hint=f"It has {', '.join(self.names)}.")

    @property
    def loaded(self) -> tuple[str, ...]:
        """The variants that are in memory, the one used longest ago first."""
        return tuple(self._variants.keys())

    def session(self, name: str | None = None) -> Any:
        """The ``onnxruntime.InferenceSession`` of a variant; of the base for None or "base".

        A variant that is not loaded is read, checked, folded and opened; threads that ask for it meanwhile wait. The
        session may be used for as long as it is held, also after the deployment has dropped it or was closed.

        Raises:
            InputError: No such variant, its file is missing or damaged, or the deployment is closed.
            NumericsError: A folded weight is not finite.
        """
        return self._runner(name).session

    def run(self, name: str | None, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by name, for inputs by name.

        Raises:
            RunError: The runtime refused the inputs.
            InputError, NumericsError: As :meth:`session`.
        """
        return self._runner(name).run(inputs)

    def reload(self) -> tuple[str, ...]:
        """Read the manifest again, for variants that were added, replaced or taken away since; returns the names.

        Raises:
            InputError: The manifest is damaged or is of another base now; the deployment stays as it was.
        """
        fresh = read_manifest(self._path)
        with self._lock:
            before = self._manifest
            if (fresh.graph, fresh.weights) != (before.graph, before.weights):
                raise InputError(
                    f"{self._path}: the deployment's base was replaced.", hint="Open it again: Deployment(path)"
                )
            self._manifest = fresh
        for name, variant in before.variants.items():
            if fresh.variants.get(name) != variant:
                self._variants.drop(name)
        return self.names

    def close(self) -> None:
        """Drop the sessions and the base; sessions that are still held by a caller go on working."""
        with self._lock:
            self._shared = None
        self._variants.clear()
        self._base.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _runner(self, name: str | None) -> OnnxRunner:
        shared = self._shared
        if shared is None:
            raise InputError(f"{self._path}: the deployment is closed.", hint="Open it again: Deployment(path)")
        if name is None or name == BASE:
            return self._base.get(BASE, lambda: self._open(shared, shared.base()))
        variant = self._manifest.variants.get(name)
        if variant is None:
            listed = ", ".join(self.names) or "none"
            raise InputError(f"{self._path}: no variant {name!r}.", hint=f"It has: {listed}; and {BASE!r}.")
        return self._variants.get(name, lambda: self._load(shared, variant))

    def _load(self, shared: SharedBase, variant: Variant) -> OnnxRunner:
        file = contained(self._path, variant.file.path)
        try:
            variant.file.check(file, whole=True)
        except InputError as error:
            raise InputError(f"variant {variant.name!r}: {error.message}", hint=error.hint) from error
        bindings = read_bindings(file)
        check_bindings(str(file), shared.model.ir, bindings)
        return self._open(shared, shared.variant(bindings))

    def _open(self, shared: SharedBase, source: SessionSource) -> OnnxRunner:
        session = open_session(source, self._settings)
        if self._settings.prepack:
            shared.release()
        return OnnxRunner.of(session, self._settings.provider)


def variant_runner(path: Path, file: Path, *, provider: str = "cpu", threads: int = 0) -> OnnxRunner:
    """The variant that is stored in ``file``, for the clock: its idle threads sleep, as several sessions are timed.

    Raises:
        InputError: The deployment at ``path`` has no such variant, or is damaged.
    """

    def quiet(options: Any) -> None:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    with Deployment(path, provider=provider, threads=threads, configure=quiet) as deployment:
        return OnnxRunner.of(deployment.session(deployment.name_of(file)), provider)
