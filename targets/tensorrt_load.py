"""Loading a plan: only one that loracc built, and only where there is a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loracc.devices import require_gpu
from loracc.errors import InputError, UnsupportedError
from loracc.targets.tensorrt_manifest import Manifest, read_engine
from loracc.targets.tensorrt_module import TensorRT, load_flavor

__all__ = ["LoadedEngine", "load_engine"]


class LoadedEngine:
    """A deserialized plan with what must outlive it.

    Attributes:
        trt: The flavour that built it and runs it.
        manifest: What it was built from.
        engine: The library's ``ICudaEngine``.
    """

    def __init__(self, trt: TensorRT, manifest: Manifest, plan: bytes) -> None:
        self.trt, self.manifest = trt, manifest
        self._runtime = trt.module.Runtime(trt.logger)
        # A version-compatible plan carries its own runtime: code, which the manifest's digest vouches for.
        self._runtime.engine_host_code_allowed = bool(manifest.options["version_compatible"])
        self.engine: Any = self._runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise UnsupportedError(
                trt.complaint("TensorRT cannot load the engine."),
                hint=f"It was built with {manifest.flavor} {manifest.version} (GPU: {manifest.gpu}); build it here.",
            )

    def layers(self) -> list[tuple[Any, ...]]:
        """What the engine runs, in order: (type, tactic, inputs' and outputs' formats and shapes) of each layer."""
        inspector = self.engine.create_engine_inspector()
        text = inspector.get_engine_information(self.trt.module.LayerInformationFormat.JSON)
        return [_layer(said) for said in json.loads(text)["Layers"]]


def load_engine(path: Path, purpose: str) -> LoadedEngine:
    """Load ``path`` with the flavour that built it.

    Args:
        path: The engine, its manifest beside it.
        purpose: For the message where there is no GPU.

    Raises:
        InputError: There is no such engine, or loracc did not build it.
        UnsupportedError: No GPU, or TensorRT does not load it.
        MissingExtraError: The flavour is not installed.
    """
    manifest, plan = read_engine(path)
    require_gpu(purpose)
    trt = load_flavor(manifest.flavor)
    if trt.version != manifest.version and not manifest.options["version_compatible"]:
        raise InputError(
            f"{path}: built with {manifest.flavor} {manifest.version}, and {trt.version} is installed.",
            hint="Build it with this version, or with --version-compatible.",
        )
    return LoadedEngine(trt, manifest, plan)


def _layer(said: Any) -> tuple[Any, ...]:
    """One entry of the inspector's JSON; a bare name where the plan was built without details."""
    if not isinstance(said, dict):
        return (said,)
    ports = [
        (port.get("Dimensions"), port.get("Format/Datatype"))
        for key in ("Inputs", "Outputs")
        for port in said.get(key, [])
    ]
    return (said.get("LayerType"), said.get("TacticName"), *map(str, ports))
