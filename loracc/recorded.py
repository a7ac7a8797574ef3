"""An output's own record as the arguments it was made with: what to write down, and how to find the inputs again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracc.errors import InputError, LoraccError

if TYPE_CHECKING:
    from loracc.model import BaseModel
    from loracc.provenance import Identity, Provenance

__all__ = ["found_inputs", "recorded_rounding", "said"]

#: Options of the model's reader that decide what comes out. A file of sample inputs does not; and a path is no record.
_READING = ("opset", "task", "part", "factory", "dynamic", "inputs")
#: What a folder is looked at as a whole for, and endings of files that are looked at one by one.
_FOLDER_SIGNS = ("config.json", "adapter_config.json")
_ENDINGS = (".onnx", ".pt2", ".pt", ".pth", ".bin", ".safetensors", ".gguf", ".onnx_adapter")


def said(load: Mapping[str, Any], told: Mapping[str, Any], **chosen: Any) -> dict[str, Any]:
    """What of the call decides the result and was not left alone: names of the Python API's arguments and values.

    Args:
        load: Options of the model's reader.
        told: Options of the adapters' reader.
        chosen: The others; ``original``, a path, is recorded by what lies there.
    """
    from loracc.provenance import identify
    from loracc.sources import load_model

    found = {key: value for key in _READING if (value := load.get(key))}
    found |= {key: value for key, value in told.items() if value and key not in ("allow_pickle", "describe")}
    found |= {key: value for key, value in chosen.items() if value}
    if "original" in found:
        from loracc.model import LoadOptions

        found["original"] = identify(load_model(found["original"], LoadOptions(graph=False))).digest
    return {key: list(value) if isinstance(value, tuple) else value for key, value in sorted(found.items())}


def found_inputs(
    output: str | Path, folders: Sequence[str | Path], adapters: Sequence[str | Path], options: Mapping[str, Any]
) -> tuple[str | Path, list[str], dict[str, Any]]:
    """The base, the adapters and the options that an output was made with, found by digest.

    Args:
        output: What was made; it says from what.
        folders: Where to look, folders in them included.
        adapters: Must be empty: they are found too.
        options: ``allow_pickle`` of them is respected while looking.

    Returns:
        The base's path, adapters as ``NAME=PATH@WEIGHT``, and arguments of :func:`loracc.verify`.

    Raises:
        InputError: The output says nothing, or something is not found.
    """
    from loracc.model import LoadOptions
    from loracc.provenance import read_provenance
    from loracc.sources import load_model

    if adapters:
        raise InputError("an adapter was named and no base.", hint="Name both, or neither and --search DIR.")
    if not folders:
        raise InputError(
            "one model was named, and no --search DIR in which to find what it was made from.",
            hint="loracc verify BASE OUT --adapter ADAPTER, or loracc verify OUT --search DIR.",
        )
    if missing := [folder for folder in folders if not Path(folder).is_dir()]:
        raise InputError(f"{missing[0]}: no such folder to search.")
    record = read_provenance(load_model(output, LoadOptions(graph=False)))
    if record is None:
        raise InputError(
            f"{output}: it does not say from what it was made.",
            hint="Only .onnx files and checkpoint folders that loracc wrote do. Name the base and the adapters.",
        )
    allow_pickle = bool(options.get("allow_pickle"))
    search = _Search(record, Path(output), allow_pickle)
    for path in _candidates([Path(folder) for folder in folders]):
        search.look(path)
    return search.result()


def _candidates(folders: Sequence[Path]) -> Iterator[Path]:
    """Folders before the files in them, hidden ones left out, in the order of their names."""
    for folder in folders:
        for here, inside, files in os.walk(folder):
            inside[:] = sorted(name for name in inside if not name.startswith("."))
            if any(sign in files for sign in _FOLDER_SIGNS):
                yield Path(here)
            yield from (Path(here, name) for name in sorted(files) if name.endswith(_ENDINGS))


def recorded_rounding(output: BaseModel) -> str | None:
    """How an output says that it was rounded; None for to nearest, and where it says nothing.

    Raises:
        InputError: Its record is damaged.
    """
    from loracc.provenance import read_provenance

    record = read_provenance(output)
    return str(record.options["rounding"]) if record is not None and "rounding" in record.options else None


@dataclass
class _Search:
    """What is wanted, and what was found of it."""

    record: Provenance
    output: Path
    allow_pickle: bool
    base: Path | None = None
    original: Path | None = None
    adapters: dict[str, Path] = field(default_factory=dict)
    unreadable: int = 0

    @property
    def wanted(self) -> dict[str, float]:
        """Digests of the adapters and their strengths; of combined ones, those of each."""
        found: dict[str, float] = {}
        for row in self.record.adapters:
            parts = str(row["digest"]).removeprefix("sha256:").split("+")
            for part in parts:
                digest, _, weight = part.partition("@")
                found[digest] = float(weight) if weight else float(row["weight"])
        return found

    def look(self, path: Path) -> None:
        """Whether this is one of them. What cannot be read is none, and is counted."""
        from loracc.formats import is_adapter

        if path.resolve() == self.output.resolve():
            return
        try:
            if is_adapter(path):
                self._adapter(path)
            else:
                self._model(path)
        except LoraccError:
            self.unreadable += 1

    def _adapter(self, path: Path) -> None:
        from loracc.formats import load_adapter

        names = ("alpha", "scale", "dora_axis", "moe_layout", "component", "residual_base")
        told = {key: self.record.options[key] for key in names if key in self.record.options}
        told |= {key: tuple(self.record.options[key]) for key in ("enable_lora", "heads") if key in self.record.options}
        digest = load_adapter(path, allow_pickle=self.allow_pickle, **told).digest
        if digest in self.wanted:
            self.adapters.setdefault(digest, path)

    def _model(self, path: Path) -> None:
        from loracc.model import LoadOptions
        from loracc.provenance import identify
        from loracc.sources import load_model

        if self.base is not None and (self.original is not None or "original" not in self.record.options):
            return
        found = identify(load_model(path, LoadOptions(allow_pickle=self.allow_pickle, graph=False)))
        if self.base is None and _same(found, self.record.base):
            self.base = path
        if self.original is None and found.digest == self.record.options.get("original"):
            self.original = path

    def result(self) -> tuple[Path, list[str], dict[str, Any]]:
        options = {key: tuple(v) if isinstance(v, list) else v for key, v in self.record.options.items()}
        options.pop("dtype", None)  # the output shows it
        for key in ("calibration", "calibration_inputs"):  # how it was rounded is not what it was made from
            options.pop(key, None)
        missing = [] if self.base else [f"the base ({self.record.base.format}, {self.record.base.digest})"]
        if "original" in options:
            missing += [] if self.original else [f"the original checkpoint ({options['original']})"]
            options["original"] = self.original
        missing += [f"an adapter (sha256:{digest})" for digest in self.wanted if digest not in self.adapters]
        if missing or self.base is None:
            more = f" {self.unreadable} files there could not be read." if self.unreadable else ""
            raise InputError(
                f"{self.output}: not found: {', '.join(missing)}.{more}", hint="Search other folders: --search DIR."
            )
        return self.base, self._specs(), options

    def _specs(self) -> list[str]:
        """In the recorded order; a single adapter keeps the name it was recorded under."""
        if any("+" in str(row["digest"]) for row in self.record.adapters):
            return [f"{self.adapters[digest]}@{weight!r}" for digest, weight in self.wanted.items()]
        return [
            f"{_name(row['name'])}{self.adapters[digest]}@{row['weight']!r}"
            for row in self.record.adapters
            if (digest := str(row["digest"]).removeprefix("sha256:"))
        ]


def _name(name: str) -> str:
    """``NAME=`` where the name can be given that way."""
    return f"{name}=" if all(c.isalnum() or c in "_.+-" for c in name) and name.isascii() else ""


def _same(one: Identity, other: Identity) -> bool:
    return (one.format, one.digest) == (other.format, other.digest)
