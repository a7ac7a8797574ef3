"""The checksums of an uncompressed zip whose members' bytes were replaced in place, put right again.

A member's CRC stands in the central directory and, as its flags say, before its bytes (local header) or after them
(data descriptor). Sizes and offsets stay, so nothing else changes. Layout: PKWARE's APPNOTE.TXT, 4.3.7 to 4.3.12.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import IO

__all__ = ["update_checksums"]

_LOCAL = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field
_CENTRAL = struct.Struct("<4s24xHHH")  # signature, lengths of name, extra field and comment
_LOCAL_SIZE, _CENTRAL_SIZE = 30, 46
_LOCAL_CRC, _CENTRAL_CRC = 14, 16
_DESCRIPTOR = b"PK\x07\x08"
_HAS_DESCRIPTOR = 0x08
_CHUNK = 1 << 20


def update_checksums(path: Path, members: Collection[str]) -> None:
    """Recompute and write the CRC of some members of an uncompressed zip; its directory is as it was."""
    with zipfile.ZipFile(path) as archive:
        infos, directory = archive.infolist(), archive.start_dir
    with open(path, "r+b") as file:
        at = directory
        for info in infos:
            file.seek(at)
            signature, *lengths = _CENTRAL.unpack(file.read(_CENTRAL.size))
            if signature != b"PK\x01\x02":
                raise AssertionError(f"{path}: no directory entry at byte {at}")
            if info.filename in members:
                crc = struct.pack("<L", _rewrite_member(file, info))
                file.seek(at + _CENTRAL_CRC)
                file.write(crc)
            at += _CENTRAL_SIZE + sum(lengths)


def _rewrite_member(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Write the member's CRC where it stands beside its bytes, and return it."""
    file.seek(info.header_offset)
    _, name, extra = _LOCAL.unpack(file.read(_LOCAL.size))
    start = info.header_offset + _LOCAL_SIZE + name + extra
    crc = _checksum(file, start, info.file_size)
    if info.flag_bits & _HAS_DESCRIPTOR:
        file.seek(start + info.file_size)
        signed = file.read(len(_DESCRIPTOR)) == _DESCRIPTOR
        file.seek(start + info.file_size + (len(_DESCRIPTOR) if signed else 0))
    else:
        file.seek(info.header_offset + _LOCAL_CRC)
    file.write(struct.pack("<L", crc))
    return crc


def _checksum(file: IO[bytes], start: int, size: int) -> int:
    file.seek(start)
    crc = 0
    while size:
        data = file.read(min(size, _CHUNK))
        crc, size = zlib.crc32(data, crc), size - len(data)
    return crc
