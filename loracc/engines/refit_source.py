"""What can be refitted into an engine: the base's weights, and those with adapters folded in. No GPU is needed here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from loracc.errors import InputError, UnsupportedError
from loracc.model import BaseModel
from loracc.targets.tensorrt_manifest import Manifest, masked_graph

__all__ = ["RefitSource"]

Path_ = str | Path


class RefitSource:
    """The base model of a refittable engine.

    Args:
        engine: The engine's path.
        manifest: Its manifest.
        base: The ``.onnx`` that it was built from; the file of that name beside the engine when None.

    Raises:
        UnsupportedError: The engine was not built refittable.
        InputError: The base is not there, or not what the engine was built from.
    """

    def __init__(self, engine: Path, manifest: Manifest, base: Path_ | None = None) -> None:
        from loracc.engines.build import load_onnx

        self.engine, self.manifest = engine, manifest
        self.refittable = manifest.refittable()
        if not self.refittable:
            raise UnsupportedError(
                f"{engine}: was not built refittable.",
                hint="Build it with --refittable adapter or --refittable all; a plain engine of the folded model "
                "(build-trt --adapter) is the default, and may be faster.",
            )
        path = Path(base) if base is not None else engine.with_name(manifest.model)
        if not path.is_file():
            raise InputError(
                f"{path}: no such file, and refitting needs the base's weights.",
                hint=f"Name the {manifest.model} that the engine was built from with --base.",
            )
        self.model: BaseModel = load_onnx(path)
        self._check(path)

    def folded(self, adapters: Sequence[Path_], maps: Sequence[str] = (), **told: Any) -> dict[str, ir.TensorProtocol]:
        """The weights that the adapters change, folded, by initializer.

        Raises:
            BindingError: An adapter does not fit.
            UnsupportedError: A weight of theirs cannot be refitted; nothing was sent.
        """
        from loracc.binding import bind_adapters, read_adapters
        from loracc.folded import FoldedTensor, clear_bindings
        from loracc.formats import parse_adapter_spec
        from loracc.lower import lower

        specs = [parse_adapter_spec(str(adapter)) for adapter in adapters]
        read = read_adapters(specs, told, combine=None, density=None, rank=None, seed=0)
        try:
            bind_adapters(self.model, read, maps, False)
            lowered = lower(self.model).ir
        finally:
            for value in self.model.ir.graph.initializers.values():
                clear_bindings(value)
        names = {
            str(name): tensor
            for name, value in lowered.graph.initializers.items()
            if isinstance(tensor := value.const_value, FoldedTensor)
        }
        if fixed := sorted(names.keys() - self.refittable):
            raise UnsupportedError(
                f"{self.engine}: these weights of the adapter cannot be refitted: {', '.join(fixed[:8])}.",
                hint="Build the engine with this adapter and --refittable adapter, or with --refittable all.",
            )
        return {name: ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name) for name, tensor in names.items()}

    def base(self, names: Sequence[str]) -> Mapping[str, ir.TensorProtocol]:
        """The base's own values."""
        found = {name: self.model.ir.graph.initializers[name].const_value for name in names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _check(self, path: Path) -> None:
        """The graph is the engine's, and so is every weight that nothing was folded into."""
        if masked_graph(self.model.ir) != self.manifest.graph_sha256:
            raise InputError(f"{path}: not the graph that {self.engine} was built from.", hint="Name the right --base.")
        folded = set(self.manifest.options["marked"])
        for name, place in self.manifest.weights.items():
            tensor = self.model.ir.graph.initializers[name].const_value
            if name in folded or tensor is None:
                continue
            if hashlib.sha256(np.ascontiguousarray(tensor.numpy()).tobytes()).hexdigest() != place.sha256:
                raise InputError(
                    f"{path}: its weight {name!r} is not the one that {self.engine} was built with.",
                    hint="Name the right --base.",
                )
