"""What a file must be: its size, its sha256, and a digest of samples for files too large to be read at every start.

The samples are 64 blocks of 64 KiB, evenly spread, the first and the last bytes among them. Another model, another
training step, a file cut short or half copied differ in them; a few bytes changed on purpose between two samples do
not, and only the whole digest (``verify=True``) sees those.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracc.errors import InputError

__all__ = ["FileDigest", "digest_file", "digest_of_bytes", "sampled"]

#: Up to this size a file is read whole at every start: 30 to 150 ms.
WHOLE_BYTES = 64 << 20
_BLOCKS, _BLOCK = 64, 64 << 10
_CHUNK = 1 << 22


@dataclass(frozen=True)
class FileDigest:
    """A file as a manifest describes it.

    Attributes:
        path: Relative to the manifest, with forward slashes.
        nbytes: Its size.
        sha256: Of all of it.
        sampled: sha256 of its samples; equal to ``sha256`` for a file up to 64 MiB.
    """

    path: str
    nbytes: int
    sha256: str
    sampled: str

    def check(self, file: Path, *, whole: bool = False) -> None:
        """Compare with the file that is there.

        Raises:
            InputError: Missing, or not the file that the manifest was made for.
        """
        try:
            size = file.stat().st_size
            found = digest_whole(file) if whole or size <= WHOLE_BYTES else sampled(file)
        except OSError as error:
            raise InputError(
                f"{file}: cannot be read: {error.strerror or error}.", hint="It belongs to the deployment: fetch it."
            ) from error
        expected = self.sha256 if whole or size <= WHOLE_BYTES else self.sampled
        if size != self.nbytes or found != expected:
            raise changed(file, self, size, found)


def changed(file: Path, expected: FileDigest, nbytes: int, digest: str) -> InputError:
    """The refusal of a file that is not the one in the manifest."""
    what = (
        f"{nbytes:,} bytes, expected {expected.nbytes:,}"
        if nbytes != expected.nbytes
        else f"sha256 {digest[:16]}..., expected {expected.sha256[:16]}..."
    )
    return InputError(
        f"{file}: not the file that this deployment was made with: {what}.",
        hint="It was changed or cut short since: restore it, or attach the adapters again.",
    )


def digest_file(file: Path, path: str) -> FileDigest:
    """Read a file once and describe it."""
    size, whole = file.stat().st_size, digest_whole(file)
    return FileDigest(path, size, whole, whole if size <= WHOLE_BYTES else sampled(file))


def digest_of_bytes(content: bytes) -> str:
    """sha256 of a small file's content."""
    return hashlib.sha256(content).hexdigest()


def digest_whole(file: Path) -> str:
    """sha256 of a file."""
    digest = hashlib.sha256()
    with open(file, "rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sampled(file: Path) -> str:
    """sha256 of the size and of 64 blocks of 64 KiB."""
    with open(file, "rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size

        def read(offset: int, length: int) -> bytes:
            stream.seek(offset)
            return stream.read(length)

        return _sampled(size, read)


def _sampled(size: int, read: Callable[[int, int], Any]) -> str:
    digest = hashlib.sha256(str(size).encode())
    last = max(size - _BLOCK, 0)
    for index in range(_BLOCKS):
        digest.update(read(last * index // (_BLOCKS - 1), _BLOCK))
    return digest.hexdigest()
