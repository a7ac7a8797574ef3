"""A process that builds one plan and ends. :mod:`loracc.targets.tensorrt_process` runs this file as a script.

It imports nothing but the standard library and TensorRT, and takes care that two builds of one graph, whatever the
weights' values, find the same memory before them: TensorRT orders some tensors by their addresses (fused products, a
graph's outputs, equal shapes), so that the same process has to be at the same addresses to make the same plan.

1. The addresses are not randomized: the process asks for that and starts itself anew. Where the system refuses
   (containers may), the answer says so.
2. What differs between two builds lies outside the heap: weights are mapped, each in a slot of its own that depends on
   the sizes of those before it, wherever their bytes come from.
3. The caller gives it the same environment and a heap that nothing else has used.

Standard input is a file: see :func:`read_job`. The plan is written to the current folder, the answer to standard output
as JSON: ``memory`` (where 1. was granted, a digest of the addresses that the builder found; else empty), ``refused``
(null, or what TensorRT did not take), ``errno`` (null, or why the plan could not be written), ``messages`` (what
TensorRT said).
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import mmap
import os
import signal
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["CACHE", "HEAD", "PLAN", "WEIGHT", "Refused", "build", "configure", "main"]

#: Names of the files that it writes.
PLAN, CACHE = "plan", "cache"
#: Lengths of the four parts of the input: JSON, graph, timing cache, table of weights.
HEAD = struct.Struct("<4q")
#: A row of the table: file descriptor, offset, bytes.
WEIGHT = struct.Struct("<3q")

_ADDR_NO_RANDOMIZE = 0x0040000
_ASK = 0xFFFFFFFF
_PR_SET_PDEATHSIG, _SIGKILL = 1, 9
_MAP_FIXED_NOREPLACE = 0x100000
#: Far from the heap, the stacks and the libraries of a 47-bit process.
_WEIGHTS_AT = 0x2000_0000_0000
_DIGITS = 16
_QUOTED = ("WARNING", "ERROR", "INTERNAL_ERROR")


class Refused(Exception):
    """TensorRT took something not: ``step``, the ``names`` that it is about, and the parser's own ``errors``."""

    def __init__(self, step: str, names: Sequence[str] = (), errors: Sequence[str] = ()) -> None:
        super().__init__(step)
        self.step, self.names, self.errors = step, list(names), list(errors)


@dataclass(frozen=True)
class Job:
    """What is to be built: ``said`` is the JSON; ``weights`` are (name, address, bytes)."""

    said: Mapping[str, Any]
    graph: bytes
    cache: bytes
    weights: Sequence[tuple[str, int, int]]


def main() -> None:
    """The process."""
    fixed = _fix_addresses()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the caller too, and it ends this process
    _end_with_the_caller()
    # What a library prints must not be taken for the answer.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = read_job(0)
    sys.path[:1] = job.said["paths"]  # in place of this file's folder
    module = importlib.import_module(job.said["module"])
    logger = collector(module, _QUOTED)
    nudge = [bytearray(4096) for _ in range(job.said["attempt"])]  # so that another attempt finds other addresses
    answer: dict[str, Any] = {"memory": _memory() if fixed else "", "refused": None, "errno": None}
    try:
        plan, cache = build(module, logger, job)
        _write(PLAN, plan)
        _write(CACHE, cache)
    except Refused as refused:
        answer["refused"] = vars(refused)
    except OSError as error:
        answer["errno"] = error.errno
    answer["messages"] = logger.messages
    json.dump(answer, out)
    out.close()
    del nudge


def build(module: Any, logger: Any, job: Job) -> tuple[Any, Any]:
    """The plan and the timing cache, as buffers.

    Raises:
        Refused: TensorRT says no; it raises nothing itself.
    """
    said, options = job.said, job.said["options"]
    builder = module.Builder(logger)
    network = builder.create_network(0)
    parser = module.OnnxParser(network, logger)
    # The parser keeps pointers to the weights, which stay mapped.
    _parse(parser, job)
    config = configure(module, builder, options)
    for number, shapes in enumerate(said["profiles"], 1):
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in shapes.items():
            profile.set_shape(name, tuple(low), tuple(best), tuple(high))
        if config.add_optimization_profile(profile) < 0:
            raise Refused("profile", [str(number)])
    if unknown := [name for name in options["marked"] if not network.mark_weights_refittable(name)]:
        raise Refused("marks", unknown)
    cache = None
    if options["timed"]:
        cache = config.create_timing_cache(job.cache)  # must outlive the build
        if cache is None or not config.set_timing_cache(cache, False):
            raise Refused("cache")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Refused("build")
    return plan, config.get_timing_cache().serialize() if options["timed"] else b""


def configure(module: Any, builder: Any, options: Mapping[str, Any]) -> Any:
    """A builder's configuration; every flag is set or cleared, whatever the library's default."""
    config = builder.create_builder_config()
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    for name, wanted in options["flags"].items():
        flag = getattr(module.BuilderFlag, name)
        (config.set_flag if wanted else config.clear_flag)(flag)
    if options["workspace"] is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options["workspace"])
    if options["optimization_level"] is not None:
        config.builder_optimization_level = options["optimization_level"]
    return config


def collector(module: Any, kept: Sequence[str] | None = None) -> Any:
    """A logger that keeps what the library says, in ``messages``, in place of printing it.

    Args:
        module: The TensorRT module.
        kept: Names of the severities to keep; all when None.
    """

    class Collector(module.ILogger):  # type: ignore[misc]
        """Failures of TensorRT are return values; why is only ever logged."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.messages: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            if kept is None or severity.name in kept:
                self.messages.append((severity.name, message))

    return Collector()


def _parse(parser: Any, job: Job) -> None:
    if not parser.load_model_proto(job.graph):
        raise Refused("graph", errors=_errors(parser))
    for name, address, nbytes in job.weights:
        if not parser.load_initializer(name, address, nbytes):
            raise Refused("weight", [name], _errors(parser))
    if not parser.parse_model_proto():
        raise Refused("operators", errors=_errors(parser))


def _errors(parser: Any) -> list[str]:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return [f"{error.node_operator()} {error.node_name()!r}: {error.desc()}".strip() for error in errors]


def read_job(file: int) -> Job:
    """The job in an open file: :data:`HEAD`, JSON, graph, timing cache, a :data:`WEIGHT` for each name in the JSON.

    The descriptors in the table are open in this process; an offset may lie in any of their files.
    """
    sizes = HEAD.unpack(_read(file, 0, HEAD.size))
    parts, at = [], HEAD.size
    for size in sizes:
        parts.append(_read(file, at, size))
        at += size
    said = json.loads(parts[0])
    place = _slots() if sys.platform == "linux" else _whole()
    table = zip(said["weights"], WEIGHT.iter_unpack(parts[3]), strict=True)
    weights = [(name, place(where, offset, nbytes), nbytes) for name, (where, offset, nbytes) in table]
    return Job(said, parts[1], parts[2], weights)


def _read(file: int, at: int, size: int) -> bytes:
    os.lseek(file, at, os.SEEK_SET)
    found = bytearray()
    while len(found) < size:
        part = os.read(file, min(size - len(found), 1 << 24))
        if not part:
            raise EOFError(f"the job ends at byte {at + len(found)}")
        found += part
    return bytes(found)


def _slots() -> Any:
    """Maps stretches of files, each where the sizes of those before it say."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    ahead = _WEIGHTS_AT

    def place(file: int, offset: int, nbytes: int) -> int:
        nonlocal ahead
        before = offset % mmap.PAGESIZE
        flags = mmap.MAP_PRIVATE | _MAP_FIXED_NOREPLACE
        for address, how in ((ahead, flags), (None, mmap.MAP_PRIVATE)):  # anywhere, where that is not there
            found = libc.mmap(address, before + nbytes, mmap.PROT_READ, how, file, offset - before)
            if found != ctypes.c_void_p(-1).value:
                break
        else:
            raise OSError(ctypes.get_errno(), "a weight could not be mapped")
        ahead += -(-(nbytes + mmap.PAGESIZE) // mmap.PAGESIZE) * mmap.PAGESIZE
        return int(found) + before

    return place


def _whole() -> Any:
    """Maps files as a whole, once each."""
    maps: dict[int, tuple[mmap.mmap, int]] = {}

    def place(file: int, offset: int, nbytes: int) -> int:
        if file not in maps:
            mapped = mmap.mmap(file, 0, access=mmap.ACCESS_COPY)
            maps[file] = mapped, ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        return maps[file][1] + offset

    return place


def _write(name: str, data: Any) -> None:
    with open(name, "wb") as file:
        file.write(data)


def _fix_addresses() -> bool:
    """Whether this process is at the addresses at which the next one will be; starts it anew where it is not yet."""
    if sys.platform != "linux" or "random" in sys.argv[1:]:
        return False
    libc = ctypes.CDLL(None)
    now = libc.personality(_ASK)
    if now & _ADDR_NO_RANDOMIZE:
        return now != -1
    if libc.personality(now | _ADDR_NO_RANDOMIZE) == -1 or not libc.personality(_ASK) & _ADDR_NO_RANDOMIZE:
        return False
    os.execv(sys.executable, sys.orig_argv)
    raise AssertionError("execv came back")


def _memory() -> str:
    """A digest of what is mapped where; found out by a copy of this process, whose own heap must stay as it is."""
    read, write = os.pipe()
    copy = os.fork()
    if copy == 0:
        os.write(write, _mapped().encode())
        os._exit(0)
    os.close(write)
    found = os.read(read, _DIGITS)
    os.close(read)
    os.waitpid(copy, 0)
    return found.decode()


def _mapped() -> str:
    """The digest; the weights and the stack aside, whose size is the environment's."""
    with open("/proc/self/maps", encoding="utf-8") as file:
        lines = [line.split() for line in file]
    mapped = [(line[0], line[1]) for line in lines if line[-1] != "[stack]"]
    near = [" ".join(line) for line in mapped if int(line[0].partition("-")[0], 16) >> 44 != _WEIGHTS_AT >> 44]
    return hashlib.sha256("\n".join(near).encode()).hexdigest()[:_DIGITS]


def _end_with_the_caller() -> None:
    """However the caller ends, nobody waits for this process then."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _SIGKILL)


if __name__ == "__main__":
    main()
