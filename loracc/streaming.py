"""Writing weights into files whose layout is known: copies by the kernel, folds tile by tile, in bounded memory.

What is to be written is planned before the first byte: each :class:`OutputFile` says where every tensor goes. The work
is cut into jobs that touch disjoint ranges, and a few workers take them in order, so the bytes depend neither on the
number of workers nor on the size of a tile (see :func:`loracc.folded.block_rows`).

1. A tensor that is bytes of a file is copied by the kernel; neighbours that stay neighbours are one copy.
2. Any other is read, computed and written in tiles of rows, through buffers that are made once per worker.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from loracc.blas import one_blas_thread
from loracc.dtypes import Array
from loracc.errors import InputError
from loracc.file_space import reserve
from loracc.folded import block_rows
from loracc.progress import NoProgress, Progress
from loracc.tensors import TILE_BYTES, dims, open_rows, tile_rows

__all__ = ["OutputFile", "Segment", "default_workers", "write_files"]

#: Bytes of one kernel copy: a Ctrl-C waits for no more than this, nor do other writers of the file.
_COPY_BYTES = 8 << 20
#: Computed tiles that a worker holds back while another writes to the file.
_HELD_TILES = 4
#: Stored bytes of a computed tensor that one worker takes at a time.
_SHARE_BYTES = 32 << 20
#: Why a kernel may refuse copy_file_range or sendfile between these two files: then the next way is tried.
_REFUSED = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY}


@dataclass(frozen=True)
class Segment:
    """One tensor's place in an output file: ``tensor.nbytes`` bytes at ``offset``."""

    offset: int
    tensor: ir.TensorProtocol


@dataclass(frozen=True)
class OutputFile:
    """A file to write. What no segment covers is ``head`` at its start, and zeros.

    Attributes:
        path: Created, or cut to nothing first.
        size: Its length in bytes.
        segments: Disjoint.
        head: Bytes at offset 0, e.g. a safetensors header.
    """

    path: Path
    size: int
    segments: tuple[Segment, ...] = ()
    head: bytes = b""


def default_workers() -> int:
    """Two, as measured: more wait for one another at the output file's lock. One where there is one core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(2, cores)


def write_files(
    files: Sequence[OutputFile],
    *,
    progress: Progress | None = None,
    workers: int | None = None,
    tile_bytes: int = TILE_BYTES,
    also: Sequence[Callable[[], None]] = (),
) -> None:
    """Write the files. Progress counts the bytes of the segments.

    ``also`` is what else a worker is to do, before it joins the others at writing (who do not wait for Python's lock
    when they read, compute and write).

    Raises:
        InputError: A source file is too short, or cannot be read.
        NumericsError: A folded weight is not finite.
        OSError: An output cannot be written (a full disk: :class:`loracc.staging.Staging` explains it).
    """
    progress = progress or NoProgress()
    writing = list(_jobs(files))
    jobs = [*map(_Call, also), *writing]
    progress.begin("writing", sum(job.nbytes for job in writing))
    try:
        for file in files:
            _create(file)
        with one_blas_thread():
            _Pool(jobs, progress, tile_bytes).run(workers or default_workers())
    finally:
        progress.end()


def _create(file: OutputFile) -> None:
    with open(file.path, "wb") as out:
        out.write(file.head)
        out.truncate(file.size)
        if file.segments:  # without any, it is a file of holes
            reserve(out.fileno(), file.size)


# ---------------------------------------------------------------------------------------------------------------- jobs


@dataclass(frozen=True)
class _Copy:
    """Bytes that stay as they are."""

    path: Path
    offset: int
    nbytes: int
    source: str
    source_offset: int
    name: str


@dataclass(frozen=True)
class _Compute:
    """Rows ``lo`` to ``hi`` of a tensor, which begin at ``offset``."""

    path: Path
    offset: int
    nbytes: int
    tensor: ir.TensorProtocol
    lo: int
    hi: int

    @property
    def name(self) -> str:
        return self.tensor.name or ""


@dataclass(frozen=True)
class _Call:
    """Something else that the caller wants done."""

    do: Callable[[], None]


_Job = _Copy | _Compute | _Call


def _jobs(files: Iterable[OutputFile]) -> Iterator[_Copy | _Compute]:
    sizes: dict[str, int] = {}
    for file in files:
        pending: _Copy | None = None
        for segment in sorted(file.segments, key=lambda segment: segment.offset):
            job = _copy_of(file.path, segment, sizes)
            if pending and job and _continues(pending, job):
                pending = replace(pending, nbytes=pending.nbytes + job.nbytes)
                continue
            if pending:
                yield from _split_copy(pending)
            pending = job
            if job is None and segment.tensor.nbytes:
                yield from _split_rows(file.path, segment)
        if pending:
            yield from _split_copy(pending)


def _copy_of(path: Path, segment: Segment, sizes: dict[str, int]) -> _Copy | None:
    """The copy that writes a segment; None where it is computed, or empty."""
    tensor = segment.tensor
    if not isinstance(tensor, ir.ExternalTensor) or not tensor.nbytes:
        return None
    start, source = tensor.offset or 0, tensor.path
    if source not in sizes:
        try:
            sizes[source] = os.stat(source).st_size
        except OSError as error:
            raise InputError(f"{source}: cannot be read: {error.strerror or error}.") from error
    if start + tensor.nbytes > sizes[source]:
        raise _truncated(source, tensor.name)
    return _Copy(path, segment.offset, tensor.nbytes, source, start, tensor.name)


def _continues(one: _Copy, other: _Copy) -> bool:
    return (
        one.source == other.source
        and one.offset + one.nbytes == other.offset
        and one.source_offset + one.nbytes == other.source_offset
    )


def _split_copy(job: _Copy) -> Iterator[_Copy]:
    for at in range(0, job.nbytes, _COPY_BYTES):
        size = min(_COPY_BYTES, job.nbytes - at)
        yield replace(job, offset=job.offset + at, source_offset=job.source_offset + at, nbytes=size)


def _split_rows(path: Path, segment: Segment) -> Iterator[_Compute]:
    """Parts of a tensor at multiples of its compute block; one part where its elements are packed."""
    tensor, shape = segment.tensor, dims(segment.tensor)
    length = shape[0] if shape else 1
    row_bytes = tensor.nbytes // length
    block = block_rows(shape)
    share = max(_SHARE_BYTES // max(row_bytes * block, 1), 1) * block if tensor.dtype.bitwidth >= 8 else length
    for lo in range(0, length, share):
        hi = min(lo + share, length)
        yield _Compute(path, segment.offset + lo * row_bytes, (hi - lo) * row_bytes, tensor, lo, hi)


# ------------------------------------------------------------------------------------------------------------- workers


class _Pool:
    """Workers that take jobs in order. The calling thread is one of them, so that Ctrl-C reaches it at work."""

    def __init__(self, jobs: Sequence[_Job], progress: Progress, tile_bytes: int) -> None:
        self._jobs = iter(jobs)
        self._lock = threading.Lock()
        self._files: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)
        self._stop = threading.Event()
        self._errors: list[BaseException] = []
        self._progress = progress
        self._tile_bytes = tile_bytes

    def run(self, workers: int) -> None:
        helpers = [threading.Thread(target=self._help, daemon=True) for _ in range(workers - 1)]
        try:
            for helper in helpers:
                helper.start()
            self._work()
            for helper in helpers:
                helper.join()
        finally:
            self._stop.set()
            for helper in helpers:
                if helper.ident is not None:
                    helper.join()
        if self._errors:
            raise self._errors[0]

    def _help(self) -> None:
        try:
            self._work()
        except BaseException as error:  # raised again by the calling thread
            self._errors.append(error)
            self._stop.set()

    def _work(self) -> None:
        worker = _Worker(self._progress, self._tile_bytes, self._stop)
        try:
            while not self._stop.is_set():
                with self._lock:
                    job = next(self._jobs, None)
                    lock = None if job is None or isinstance(job, _Call) else self._files[job.path]
                if job is None:
                    return
                worker.do(job, lock)
        finally:
            worker.close()


class _Worker:
    """One worker's buffers and open output file.

    The kernel lets one writer into a file at a time, and the others wait on a core of their own. So a worker asks
    first, and goes on computing while another writes, for as many tiles as it has buffers.
    """

    def __init__(self, progress: Progress, tile_bytes: int, stop: threading.Event) -> None:
        self._progress = progress
        self._tile_bytes = tile_bytes
        self._stop = stop
        self._buffers = [np.empty(0, np.uint8)] * _HELD_TILES
        self._held: list[tuple[Array, int]] = []
        self._path: Path | None = None
        self._fd = -1

    def close(self) -> None:
        if self._path is not None:
            os.close(self._fd)
            self._path = None

    def do(self, job: _Job, lock: threading.Lock | None) -> None:
        """Do a job; ``lock`` is that of the file it writes to."""
        if isinstance(job, _Call) or lock is None:
            assert isinstance(job, _Call)
            job.do()
            return
        self._open(job.path)
        if isinstance(job, _Copy):
            with lock:
                self._copy(job)
        elif job.tensor.dtype.bitwidth < 8 or not dims(job.tensor):
            data = job.tensor.tobytes()
            with lock:
                self._write(data, job.offset)
        else:
            self._compute(job, lock)
            return
        self._progress.advance(job.nbytes, job.name)

    def _open(self, path: Path) -> None:
        if path != self._path:
            self.close()
            self._fd, self._path = os.open(path, os.O_WRONLY | getattr(os, "O_BINARY", 0)), path

    def _copy(self, job: _Copy) -> None:
        source = os.open(job.source, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            copied = 0
            for way in (_copy_file_range, _sendfile, self._read_write):
                copied += way(source, job.source_offset + copied, self._fd, job.offset + copied, job.nbytes - copied)
                if copied == job.nbytes:
                    break
            else:
                raise _truncated(job.source, job.name)
        finally:
            os.close(source)

    def _read_write(self, source: int, source_offset: int, target: int, offset: int, count: int) -> int:
        view = self._room(min(count, self._tile_bytes)).data
        done = 0
        while done < count:
            got = os.preadv(source, [view[: count - done]], source_offset + done)
            if got == 0:
                break
            self._write(view[:got], offset + done)
            done += got
        return done

    def _compute(self, job: _Compute, lock: threading.Lock) -> None:
        tensor, shape = job.tensor, dims(job.tensor)
        dtype = tensor.dtype.numpy()
        row_bytes = job.nbytes // (job.hi - job.lo)
        block = block_rows(shape)
        step = max(tile_rows(shape, dtype.itemsize, self._tile_bytes) // block, 1) * block
        with open_rows(tensor) as rows:
            for lo in range(job.lo, job.hi, step):
                if self._stop.is_set():
                    return
                hi = min(lo + step, job.hi)
                tile = self._room((hi - lo) * row_bytes)
                rows.fill(lo, hi, tile.view(dtype).reshape(hi - lo, *shape[1:]))
                self._held.append((tile, job.offset + (lo - job.lo) * row_bytes))
                self._write_held(lock, wait=hi == job.hi or len(self._held) == len(self._buffers))
                self._progress.advance(tile.nbytes, job.name)

    def _write_held(self, lock: threading.Lock, *, wait: bool) -> None:
        """Write the tiles that are held, unless another writes to the file and there is no need to wait."""
        if lock.acquire(blocking=wait):
            try:
                for tile, offset in self._held:
                    self._write(tile.data, offset)
            finally:
                lock.release()
            self._held.clear()

    def _room(self, nbytes: int) -> Array:
        """That many bytes of a buffer that holds nothing."""
        index = len(self._held)
        if self._buffers[index].nbytes < nbytes:
            self._buffers[index] = np.empty(nbytes, np.uint8)
        return self._buffers[index][:nbytes]

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, offset)
            view, offset = view[done:], offset + done


def _copy_file_range(source: int, source_offset: int, target: int, offset: int, count: int) -> int:
    """Bytes that the kernel copied; shared instead of copied where the file system can (reflink)."""
    done = 0
    while done < count and hasattr(os, "copy_file_range"):
        try:
            got = os.copy_file_range(source, target, count - done, source_offset + done, offset + done)
        except OSError as error:
            if error.errno in _REFUSED:
                break
            raise
        if got == 0:
            break
        done += got
    return done


def _sendfile(source: int, source_offset: int, target: int, offset: int, count: int) -> int:
    done = 0
    if hasattr(os, "sendfile"):
        os.lseek(target, offset, os.SEEK_SET)
    while done < count and hasattr(os, "sendfile"):
        try:
            got = os.sendfile(target, source, source_offset + done, count - done)
        except OSError as error:
            if error.errno in _REFUSED:
                break
            raise
        if got == 0:
            break
        done += got
    return done


def _truncated(path: str, name: str) -> InputError:
    return InputError(f"{path}: the file ends inside tensor {name!r}.", hint="The file is truncated: fetch it again.")
