"""Building a plan in a process of its own (:mod:`loracc.targets.tensorrt_worker`): the caller's side.

Three things are had by that. The same graph gives the same plan nearly always, since the builder finds the same memory.
Ctrl-C ends a build at once, where the library would go on. And where the library crashes, the caller lives to say so.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import onnx_ir as ir

from loracc.errors import UnsupportedError
from loracc.staging import deferred_signals
from loracc.targets import tensorrt_worker
from loracc.targets.plan import aligned
from loracc.targets.tensorrt_module import TensorRT
from loracc.targets.tensorrt_worker import CACHE, HEAD, PLAN, WEIGHT
from loracc.tensors import dims, lies_in_file, read_rows

__all__ = ["Answer", "run_worker"]

#: Of every weight in memory: at another place in its page, a folded weight's address would be another than the base's.
_ALIGNMENT = mmap.ALLOCATIONGRANULARITY
#: Bytes of a weight that are written at a time.
_PART = 64 << 20
#: Variables that the libraries look at; any other may differ between two builds, and shifts addresses.
_KEPT = {"PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "HOME", "TMPDIR", "TMP", "TEMP", "SYSTEMROOT", "USERPROFILE"}
_KEPT_PREFIXES = ("CUDA", "NVIDIA", "NV_", "TRT_", "TENSORRT")
#: Of Python; and of glibc: a heap for each of the builder's threads, which come and go in groups. (With one heap for
#: all of them 3 to 5 of 100 builds of a small switchable graph gave another plan, with these none of 750.)
_SET = {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "4096"}
_SHOWN = 6


@dataclass(frozen=True)
class Answer:
    """What the process found.

    Attributes:
        refused: What TensorRT did not take, see :class:`loracc.targets.tensorrt_worker.Refused`; None when it built.
        messages: (severity, text) of what TensorRT said.
        timing_cache: Bytes of the timing cache that the build left.
        memory: A digest of the addresses that the builder found, where they are fixed: another build finds them too.
            Empty where they are random.
    """

    refused: Mapping[str, Any] | None
    messages: Sequence[tuple[str, str]]
    timing_cache: bytes
    memory: str


def run_worker(
    trt: TensorRT,
    said: Mapping[str, Any],
    graph: bytes,
    weights: Mapping[str, ir.TensorProtocol],
    output: Path,
    *,
    cache: bytes = b"",
    fixed: bool = True,
) -> Answer:
    """Build a plan in a process of its own and write it to ``output``.

    Args:
        trt: Which TensorRT.
        said: What the process is told: "options", "profiles", "attempt".
        graph: The serialized graph.
        weights: By name; those that lie in files are read from there.
        output: Written where nothing was refused.
        cache: Bytes of a timing cache.
        fixed: Ask for fixed addresses.

    Raises:
        UnsupportedError: The library crashed.
        OSError: A file cannot be read, or the disk is full.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="build.", dir=output.parent)))
        job = stack.enter_context(_scratch(folder))
        told = {**said, "module": trt.module.__name__, "paths": _paths(trt), "weights": list(weights)}
        files = _write_job(job, [json.dumps(told).encode(), graph, cache], list(weights.values()), stack)
        answer = _run(job, folder, files, fixed=fixed)
        if answer["errno"] is not None:
            raise OSError(answer["errno"], os.strerror(answer["errno"]), str(output))
        left = b""
        if answer["refused"] is None:
            os.replace(folder / PLAN, output)
            left = (folder / CACHE).read_bytes()
        return Answer(answer["refused"], [(kind, text) for kind, text in answer["messages"]], left, answer["memory"])


@contextmanager
def _scratch(folder: Path) -> Iterator[BinaryIO]:
    """A file for the job: in memory where the system has such, else in the folder."""
    if sys.platform == "linux":
        with os.fdopen(os.memfd_create("loracc-job"), "w+b") as file:
            yield file
    else:
        with (folder / "job").open("w+b") as file:
            yield file


def _write_job(
    job: BinaryIO, parts: Sequence[bytes], tensors: Sequence[ir.TensorProtocol], stack: ExitStack
) -> list[int]:
    """Write the job; returns the descriptors of the files that weights are read from, open until ``stack`` ends."""
    opened: dict[Path, int] = {}
    rows: list[tuple[int, int, int]] = []
    job.write(HEAD.pack(*map(len, parts), WEIGHT.size * len(tensors)))
    for part in parts:
        job.write(part)
    table = job.tell()
    end = table + WEIGHT.size * len(tensors)
    for tensor in tensors:
        if sys.platform == "linux" and isinstance(tensor, ir.ExternalTensor) and _is_mapped(tensor):
            path = Path(tensor.path)
            if path not in opened:
                opened[path] = stack.enter_context(path.open("rb")).fileno()
            rows.append((opened[path], tensor.offset or 0, tensor.nbytes))
            continue
        end = aligned(end, _ALIGNMENT)
        job.seek(end)
        nbytes = _write_tensor(job, tensor)
        rows.append((0, end, nbytes))
        end += nbytes
    job.seek(table)
    for row in rows:
        job.write(WEIGHT.pack(*row))
    job.flush()
    return list(opened.values())


def _is_mapped(tensor: ir.ExternalTensor) -> bool:
    """Whether it can be read where it is; any other is copied to where a page begins."""
    return lies_in_file(tensor) and (tensor.offset or 0) % _ALIGNMENT == 0


def _write_tensor(job: BinaryIO, tensor: ir.TensorProtocol) -> int:
    """The bytes that the parser is to read, written in parts; types of less than a byte are packed."""
    shape = dims(tensor)
    if tensor.dtype.bitwidth < 8 or not shape:
        return job.write(tensor.tobytes())
    step = max(1, _PART * int(shape[0]) // max(int(tensor.nbytes), 1))
    written = 0
    for start in range(0, int(shape[0]), step):
        written += job.write(read_rows(tensor, start, min(start + step, int(shape[0]))).tobytes())
    return written


def _run(job: BinaryIO, folder: Path, files: Sequence[int], *, fixed: bool) -> dict[str, Any]:
    job.seek(0)
    command = [sys.executable, "-s", "-S", os.path.abspath(tensorrt_worker.__file__), *([] if fixed else ["random"])]
    process: subprocess.Popen[bytes] | None = None
    try:
        with deferred_signals():  # of a process that began and is not known yet
            process = subprocess.Popen(
                command,
                stdin=job,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env=_environment(),
                pass_fds=files if os.name == "posix" else (),
            )
        out, err = process.communicate()
    finally:
        if process is not None:  # Ctrl-C: the library would go on
            process.kill()
            with process:  # its pipes are closed, and it is waited for
                pass
    try:
        answer: dict[str, Any] = json.loads(out)
    except ValueError:
        raise _crash(process.returncode, err.decode(errors="replace")) from None
    return answer


def _crash(code: int, said: str) -> UnsupportedError:
    how = f"exit code {code}"
    if code < 0:
        how = f"signal {signal.Signals(-code).name}"
    last = "\n  ".join(["", *said.strip().splitlines()[-_SHOWN:]])
    hint = "A process that is killed has often asked for more memory than there is." if code == -9 else None
    return UnsupportedError(f"TensorRT ended its process while it built the engine ({how}).{last}", hint=hint)


def _environment() -> dict[str, str]:
    kept = {key: text for key, text in os.environ.items() if key.upper() in _KEPT or key.startswith(_KEPT_PREFIXES)}
    return {**dict(sorted(kept.items())), **_SET}


def _paths(trt: TensorRT) -> list[str]:
    """The folders that TensorRT's own packages lie in."""
    root = str(trt.module.__name__)
    names = [name for name in sys.modules if name == root or name.startswith((f"{root}_", f"{root}."))]
    files = [getattr(sys.modules[name], "__file__", None) for name in names if "." not in name]
    return sorted({os.path.dirname(os.path.dirname(os.path.abspath(file))) for file in files if file})
