"""What is in a ``.pt2`` archive and where, read from the zip's directory and the JSON in it; no tensor, no pickle.

``torch.export.save`` writes an uncompressed zip: ``models/model.json`` (the graph), ``data/weights/weight_N`` (raw
bytes) with ``data/weights/model_weights_config.json`` (which parameter is which view of which file), the same for
constants, and pickled sample inputs.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracc.errors import InputError, UnsupportedError

__all__ = ["CONSTANTS", "MODEL", "SAMPLES", "WEIGHTS", "Payload", "Pt2Archive", "Record", "damaged", "read_archive"]

MODEL = "models/model.json"
SAMPLES = "data/sample_inputs/model.pt"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
_CONFIGS = {"data/weights/": WEIGHTS, "data/constants/": CONSTANTS}
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., lengths of the name and of the extra field


@dataclass(frozen=True)
class Record:
    """One member of the archive: ``nbytes`` bytes at ``offset`` of the file."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class Payload:
    """A named tensor (or object) of the program: a view of a record, or a pickle.

    Attributes:
        record: Name of the member, e.g. "data/weights/weight_0".
        shape, strides, start: The view, in elements; empty for a pickle.
        pickled: The record is a pickle, which may run code.
    """

    record: str
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    start: int = 0
    pickled: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is its record from the first byte on, row by row."""
        expected, step = [], 1
        for length in reversed(self.shape):
            expected.append(step)
            step *= max(length, 1)
        rows = zip(self.shape, self.strides, reversed(expected), strict=True)
        return not self.pickled and not self.start and all(n <= 1 or stride == want for n, stride, want in rows)


@dataclass(frozen=True)
class Pt2Archive:
    """An archive's directory.

    Attributes:
        path: The file.
        root: The folder that every member lies in.
        records: Members by name without the root, in file order.
        weights: Parameters and persistent buffers by name in the state dict.
        constants: The other tensors and objects of the program.
    """

    path: Path
    root: str
    records: dict[str, Record]
    weights: dict[str, Payload]
    constants: dict[str, Payload]

    def read(self, name: str) -> bytes:
        """The bytes of a member."""
        record = self.records[name]
        with open(self.path, "rb") as file:
            file.seek(record.offset)
            return file.read(record.nbytes)

    def read_json(self, name: str) -> Any:
        """A member that is JSON.

        Raises:
            InputError: It is not.
        """
        try:
            return json.loads(self.read(name))
        except (ValueError, RecursionError) as error:
            raise damaged(self.path, f"{name} is not JSON ({error})") from error


def read_archive(path: Path) -> Pt2Archive:
    """Read the directory.

    Raises:
        InputError: Not a sound archive, or one without a program.
        UnsupportedError: Written by a torch before 2.8.
    """
    root, records = _records(path)
    if "serialized_exported_program.json" in records or "data/weights/model.pt" in records:
        raise UnsupportedError(
            f"{path}: a .pt2 file in the format of torch before 2.8, whose weights are pickled.",
            hint="Load it with torch.export.load and save it again with a current torch.export.save.",
        )
    missing = [name for name in (MODEL, *_CONFIGS.values()) if name not in records]
    if missing:
        raise damaged(path, f"{missing[0]} is missing")
    archive = Pt2Archive(path, root, records, {}, {})
    for folder, into in zip(_CONFIGS, (archive.weights, archive.constants), strict=True):
        into.update(_payloads(archive, folder))
    return archive


def _records(path: Path) -> tuple[str, dict[str, Record]]:
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            size = path.stat().st_size
            members = [(info, _data_offset(file, info)) for info in archive.infolist()]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, struct.error) as error:
        raise damaged(path, f"the zip directory cannot be read ({error})") from error
    root = members[0][0].filename.partition("/")[0] if members else ""
    records: dict[str, Record] = {}
    for info, offset in members:
        folder, _, name = info.filename.partition("/")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise damaged(path, f"{info.filename} is compressed; torch writes its archives uncompressed")
        if offset + info.file_size > size:
            raise damaged(path, f"{info.filename} ends at byte {offset + info.file_size}, and the file has {size}")
        if folder != root or name in records:
            raise damaged(path, f"{info.filename} lies outside the archive's folder or comes twice")
        records[name] = Record(offset, info.file_size)
    return root, records


def _data_offset(file: Any, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: the local header's extra field (alignment) is not the directory's."""
    file.seek(info.header_offset)
    signature, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if signature != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"{info.filename}: bad local header")
    return info.header_offset + _LOCAL_HEADER.size + int(name) + int(extra)


def _payloads(archive: Pt2Archive, folder: str) -> Iterator[tuple[str, Payload]]:
    config = archive.read_json(_CONFIGS[folder])
    try:
        entries = dict(config["config"])
        for name, entry in entries.items():
            payload = _payload(folder + str(entry["path_name"]), entry)
            if payload.record not in archive.records:
                raise damaged(archive.path, f"{payload.record}, the data of {name!r}, is missing")
            yield str(name), payload
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(archive.path, f"{_CONFIGS[folder]} is malformed ({error!r})") from error


def _payload(record: str, entry: Any) -> Payload:
    meta = entry["tensor_meta"]
    if entry["use_pickle"] or meta is None:
        return Payload(record, pickled=True)
    shape, strides = (tuple(int(n["as_int"]) for n in meta[key]) for key in ("sizes", "strides"))
    start = int(meta["storage_offset"]["as_int"])
    if len(shape) != len(strides) or min((*shape, *strides, start), default=0) < 0:
        raise ValueError(f"shape {shape} with strides {strides}")
    return Payload(record, shape, strides, start)


def damaged(path: Path, problem: str) -> InputError:
    """The error for an archive that torch did not write so."""
    return InputError(
        f"{path}: not a sound .pt2 archive: {problem}.",
        hint="The file is damaged, truncated or of another kind: save it again with torch.export.save.",
    )
