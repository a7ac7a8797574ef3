"""One refittable TensorRT engine and many adapters, in memory.

::

    with_base = TrtDeployment("base.engine")              # base.onnx lies beside it
    with_base.switch("style/")                            # folded and refitted
    outputs = with_base.run({"input_ids": ids})
    with_base.restore()                                   # the base's own bytes again

Undo is never by subtraction: for every weight that the last adapter changed and the next one does not, the base's bytes
are sent. Two adapters in a row without that would leave a mixture.

A refittable engine may be slower than a plain one. Whoever decides for it looks at two comparisons, and
:attr:`TrtDeployment.comparisons` names both: with the refittable base, and with a plain engine of the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from loracc.dtypes import Array
from loracc.engines.refit_source import RefitSource
from loracc.errors import UnsupportedError
from loracc.targets.tensorrt_load import load_engine
from loracc.targets.tensorrt_manifest import read_engine, replaced_weights
from loracc.targets.tensorrt_refit import EngineRefitter, serialized

__all__ = ["COMPARISONS", "TrtDeployment"]

#: What a refitted engine is to be compared with.
COMPARISONS = {
    "refittable base": "the engine before refitting: shows that refitting changed numbers only",
    "plain base": "a plain engine of the base: shows what being refittable costs",
}


class TrtDeployment:
    """See the module's docstring. Not for several threads at once: an engine must be idle while it is refitted.

    Args:
        engine: A refittable engine that loracc built, its manifest beside it.
        base: The ``.onnx`` that it was built from; the file of that name beside the engine when None.

    Raises:
        InputError: A file is missing, damaged, or not what belongs to the engine.
        UnsupportedError: The engine is not refittable, there is no GPU, or TensorRT does not load it.
    """

    comparisons = COMPARISONS

    def __init__(self, engine: str | Path, base: str | Path | None = None) -> None:
        path = Path(engine)
        self.source = RefitSource(path, read_engine(path)[0], base)
        self._loaded = load_engine(path, "refit a TensorRT engine")
        self._refitter = EngineRefitter(self._loaded.trt, self._loaded.engine)
        self._runner: Any = None
        manifest = self._loaded.manifest
        #: What is in the engine now: weights that are not the base's, by name.
        self._present: dict[str, ir.TensorProtocol | None] = (
            dict.fromkeys(manifest.options["marked"]) if manifest.adapters else {}
        )
        self._broken = False

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the weights that are not the base's."""
        return tuple(self._present)

    def switch(self, *adapters: str | Path, maps: Sequence[str] = (), **told: Any) -> tuple[str, ...]:
        """Make the engine the base with these adapters folded in; returns the names of the weights sent.

        Args:
            adapters: As for :func:`loracc.fold`; none is :meth:`restore`.
            maps, told: As for :func:`loracc.fold`.

        Raises:
            BindingError: An adapter does not fit; nothing was sent.
            UnsupportedError: A weight cannot be refitted (nothing was sent), or TensorRT failed half-way (the engine is
                not used any more).
        """
        folded = self.source.folded(adapters, maps, **told) if adapters else {}
        back = self.source.base([name for name in self._present if name not in folded])
        return self._send({**back, **folded}, folded)

    def restore(self) -> tuple[str, ...]:
        """Send the base's bytes for every weight that the last adapter changed."""
        return self.switch()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs, by name, for inputs by name."""
        from loracc.runners.tensorrt import EngineRunner

        self._usable()
        if self._runner is None:
            self._runner = EngineRunner(self._loaded)
        outputs: dict[str, Array] = self._runner.run(inputs)
        return outputs

    def save(self, path: Path, manifest: Path, *, adapters: Sequence[str]) -> int:
        """Write the engine as it is now and its manifest; returns the plan's size.

        Args:
            path, manifest: Where to.
            adapters: What the manifest is to say of what is in it.
        """
        self._usable()
        plan = serialized(self._loaded.trt, self._loaded.engine)
        path.write_bytes(plan)
        weights = {name: tensor for name, tensor in self._present.items() if tensor is not None}
        weights = {**self.source.base([*self.source.manifest.weights]), **weights}
        said = replaced_weights(self._loaded.manifest, plan, weights)
        replace(said, adapters=list(adapters), sites=list(self._present)).write(manifest)
        return len(plan)

    def _send(
        self, weights: Mapping[str, ir.TensorProtocol], folded: Mapping[str, ir.TensorProtocol]
    ) -> tuple[str, ...]:
        self._usable()
        if not weights:
            return ()

        def present(name: str) -> ir.TensorProtocol:
            return folded[name] if name in folded else self.source.base([name])[name]

        # An execution context made before is not used for the new weights.
        self._runner = None
        self._broken = True  # until it is known to be whole
        sent = self._refitter.send(weights, present)
        self._broken, self._present = False, dict(folded)
        return tuple(sent)

    def _usable(self) -> None:
        if self._broken:
            raise UnsupportedError(
                "an earlier refit failed half-way: the engine's weights are a mixture.", hint="Load it again."
            )
