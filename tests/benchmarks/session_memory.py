"""What a further ONNX Runtime session of the same weights costs, by the way its weights are handed over.

::

    python -m tests.benchmarks.session_memory gpt2-124m

Each row is a process of its own that opens three sessions of one base and runs each on 1 x 16 tokens: resident memory
that the second and third add, how long opening takes, and a run. ``loracc.runtime.sessions`` was decided by this.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from loracc.rows import mapped
from tests.benchmarks.switching_soak import resident_bytes
from tests.benchmarks.workloads import WORKLOADS, export_base

__all__ = ["main"]

#: Name -> (how the weights are handed over, session options).
WAYS: dict[str, tuple[str, dict[str, str]]] = {
    "the file, as any session": ("file", {}),
    "add_external_initializers": ("external", {}),
    "add_initializer": ("initializer", {}),
    "add_initializer, use_env_allocators": ("initializer", {"session.use_env_allocators": "1"}),
    "add_initializer, use_device_allocator_for_initializers": (
        "initializer",
        {"session.use_device_allocator_for_initializers": "1"},
    ),
    "files in memory, copied": ("memory", {}),
    "files in memory, used directly (loracc.runtime)": (
        "memory",
        {"session.use_external_initializer_file_buffers_directly": "1"},
    ),
    "add_initializer, no packing": ("initializer", {"session.disable_prepacking": "1"}),
    "files in memory, used directly, no packing": (
        "memory",
        {
            "session.use_external_initializer_file_buffers_directly": "1",
            "session.disable_prepacking": "1",
        },
    ),
    "the same, no large constants folded (prepack=False)": (
        "memory",
        {
            "session.use_external_initializer_file_buffers_directly": "1",
            "session.disable_prepacking": "1",
            "optimization.constant_folding_max_output_size_in_bytes": str(1 << 20),
        },
    ),
}


def opener(path: Path, way: str, entries: dict[str, str]) -> Callable[[], Any]:
    """A function that opens one more session."""
    import onnxruntime

    proto = onnx.load(path, load_external_data=False)
    data = mapped(path.with_name(f"{path.name}.data"))
    names, values = [], []
    for tensor in proto.graph.initializer if way in ("external", "initializer") else ():
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            fields = {entry.key: entry.value for entry in tensor.external_data}
            start, length = int(fields["offset"]), int(fields["length"])
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            array = data[start : start + length].view(dtype).reshape(tuple(tensor.dims))
            names.append(tensor.name)
            values.append(onnxruntime.OrtValue.ortvalue_from_numpy(array))
    content = proto.SerializeToString()

    def open_one() -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 2, 3
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        if way == "external":
            options.add_external_initializers(names, values)
        elif way == "initializer":
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
            for name, value in zip(names, values, strict=True):
                options.add_initializer(name, value)
        elif way == "memory":
            options.add_external_initializers_from_files_in_memory([f"{path.name}.data"], [data], [len(data)])
        return onnxruntime.InferenceSession(str(path) if way == "file" else content, options)

    return open_one


def measure(path: Path, name: str) -> tuple[float, float, float]:
    """(MB a further session adds, seconds to open one, milliseconds a run)."""
    open_one = opener(path, *WAYS[name])
    feed = {"input_ids": np.ones((1, 16), np.int64), "attention_mask": np.ones((1, 16), np.int64)}
    sessions, resident, opening = [], [], []
    for _ in range(3):
        start = time.perf_counter()
        sessions.append(open_one())
        opening.append(time.perf_counter() - start)
        sessions[-1].run(None, feed)
        resident.append(resident_bytes())
    runs = []
    for _ in range(30):
        start = time.perf_counter()
        sessions[-1].run(None, feed)
        runs.append(time.perf_counter() - start)
    return (resident[-1] - resident[0]) / 2e6, statistics.median(opening), 1000 * statistics.median(runs)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--measure"]:
        print(*measure(Path(given[1]), given[2]))
        return
    parser = argparse.ArgumentParser(description="Memory of further sessions of the same weights.")
    parser.add_argument("workload", choices=[name for name in WORKLOADS if name.startswith("gpt2")])
    parser.add_argument("--folder", type=Path, help="where to make the data (default: a temporary folder, removed)")
    print(report(**vars(parser.parse_args(given))))


def report(workload: str, *, folder: Path | None = None) -> str:
    """The table, as Markdown."""
    lines = ["| weights handed over | MB a further session | s to open | ms a run, 1 × 16 |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory(prefix="loracc-bench-", dir=folder) as name:
        base = export_base(workload, Path(name) / "base.onnx")
        for way in WAYS:
            command = [sys.executable, "-m", "tests.benchmarks.session_memory", "--measure", str(base), way]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
            megabytes, opening, run = map(float, done.stdout.split())
            lines.append(f"| {way} | {megabytes:.0f} | {opening:.2f} | {run:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
