"""``OUT.onnx.variants.json``: which graph, which base weights, which variants; and what each of them must look like.

::

    OUT.onnx                    the base's graph; any ONNX runtime runs it as it is
    OUT.onnx.data               the base's weights (or, linked, the base's own data file)
    OUT.onnx.variants.json      this manifest
    OUT.onnx.variants/*.safetensors   one file a variant: its deltas (loracc.formats.bound_deltas)

Every path is relative to the manifest's folder and may not leave it. Nothing in here is a time or an absolute path: the
same inputs give the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from loracc.errors import InputError
from loracc.runtime.digests import FileDigest

__all__ = ["BASE", "Manifest", "Variant", "contained", "manifest_path", "read_manifest", "variants_folder"]

#: Name of the base among the variants.
BASE = "base"
_FORMAT, _VERSION = "loracc-variants", 1
#: A manifest of ten thousand variants with a thousand sites each would be this large.
_MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Variant:
    """One adapter of a deployment.

    Attributes:
        name: What to ask for it by.
        file: Its stored deltas.
        source: Where they come from: ``{"format": "peft", "digest": "...", "weight": 1.0}``.
        sites: One row a delta: ``{"name", "initializer", "kind", "rank", "scale"}``.
    """

    name: str
    file: FileDigest
    source: Mapping[str, Any]
    sites: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Manifest:
    """A deployment's description.

    Attributes:
        graph: The ``.onnx``.
        weights: Its data files.
        variants: By name, in the order they were attached.
    """

    graph: FileDigest
    weights: tuple[FileDigest, ...] = ()
    variants: Mapping[str, Variant] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The file's content."""
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "graph": asdict(self.graph),
            "weights": [asdict(file) for file in self.weights],
            "variants": {
                name: {"file": asdict(one.file), "source": dict(one.source), "sites": [dict(row) for row in one.sites]}
                for name, one in self.variants.items()
            },
        }
        return (json.dumps(content, indent=1) + "\n").encode()


def manifest_path(graph: Path) -> Path:
    """Where the manifest of ``OUT.onnx`` lies."""
    return graph.with_name(f"{graph.name}.variants.json")


def variants_folder(graph: Path) -> Path:
    """Where the variants of ``OUT.onnx`` lie."""
    return graph.with_name(f"{graph.name}.variants")


def read_manifest(path: Path) -> Manifest:
    """Read and check it; the files that it names are not looked at.

    Raises:
        InputError: Missing, damaged, of another version, or naming a file outside its folder.
    """
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise _damaged(path, f"{size:,} bytes are no manifest")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror or error}.",
            hint="Make a deployment with: loracc attach MODEL ADAPTER --as variants -o OUT.onnx",
        ) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"not a JSON file ({error})") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise _damaged(path, f"its format is not {_FORMAT!r}")
    if content.get("version") != _VERSION:
        raise InputError(
            f"{path}: version {content.get('version')!r:.20} of the manifest; this loracc reads version {_VERSION}.",
            hint="Attach the adapters again with this version.",
        )
    try:
        return _manifest(path, content)
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"an entry is missing or of the wrong type ({type(error).__name__}: {error})") from error


def contained(path: Path, relative: str) -> Path:
    """The real path of a file that a manifest names, inside the manifest's folder.

    Raises:
        InputError: It leaves the folder: absolute, with "..", or through a link.
    """
    inside, windows = Path(relative), PureWindowsPath(relative)
    foreign = inside.is_absolute() or windows.drive or windows.root
    if not relative or "\0" in relative or foreign or ".." in inside.parts or ".." in windows.parts:
        raise _damaged(path, f"{relative!r:.120} is not a path inside its folder")
    folder = Path(os.path.realpath(path.parent))
    try:
        real = Path(os.path.realpath(folder / inside))
    except ValueError as error:  # characters that no file name can have
        raise _damaged(path, f"{relative!r:.120} is not a path inside its folder") from error
    if not real.is_relative_to(folder):
        raise _damaged(path, f"{relative!r:.120} is a link that leaves its folder")
    return real


def _manifest(path: Path, content: dict[str, Any]) -> Manifest:
    weights = tuple(_file(path, entry) for entry in content["weights"])
    variants = {}
    for name, entry in content["variants"].items():
        rows = entry["sites"]
        if not isinstance(entry["source"], dict) or not all(isinstance(row, dict) for row in rows):
            raise TypeError(f"variant {name!r:.80}")
        variants[name] = Variant(name, _file(path, entry["file"]), entry["source"], tuple(rows))
    return Manifest(_file(path, content["graph"]), weights, variants)


def _file(path: Path, entry: Any) -> FileDigest:
    text = [entry["path"], entry["sha256"], entry["sampled"]]
    if type(entry["nbytes"]) is not int or not all(isinstance(value, str) for value in text):
        raise TypeError(f"file {entry['path']!r:.80}")
    contained(path, entry["path"])
    return FileDigest(entry["path"], entry["nbytes"], entry["sha256"], entry["sampled"])


def _damaged(path: Path, problem: str) -> InputError:
    return InputError(
        f"{path}: not a sound manifest of variants: {problem}.", hint="Restore it, or attach the adapters again."
    )
