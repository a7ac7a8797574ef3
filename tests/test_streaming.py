"""Streaming: the same bytes whatever the tiles and workers, right against float64, nothing more read than there is."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from loracc import streaming
from loracc.adapter import Delta
from loracc.deltas import Addition, DoRA, LowRank, Replacement
from loracc.dtypes import Array
from loracc.errors import InputError, NumericsError
from loracc.file_space import reserve
from loracc.folded import Binding, FoldedTensor
from loracc.sites import Layout, Site
from loracc.streaming import OutputFile, Segment, write_files
from loracc.tensors import PermutedTensor, file_tensor

DTYPES = {"bf16": ir.DataType.BFLOAT16, "fp16": ir.DataType.FLOAT16, "fp32": ir.DataType.FLOAT}
ROWS, COLUMNS, RANK = 1500, 300, 6
TRANSPOSED = Layout(perm=(1, 0))


def store(path: Path, array: Array, dtype: ir.DataType, offset: int = 24) -> ir.ExternalTensor:
    path.write_bytes(b"\xff" * offset + array.tobytes() + b"\xff" * 5)
    return file_tensor(path, offset, array.nbytes, dtype, array.shape, "w")


def lora(seed: int, out: int = ROWS, fan_in: int = COLUMNS) -> LowRank:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((RANK, fan_in)).astype(np.float32)
    return LowRank(a, (rng.standard_normal((out, RANK)) * 0.1).astype(np.float32), 0.5)


def bind(delta: Any, layout: Layout | None = None) -> Binding:
    return Binding(Site("m", "weight", "linear", "w", layout or Layout()), delta, "a", "m.weight", "name")


def weight(dtype: ir.DataType, *, transposed: bool = False) -> Array:
    values = np.random.default_rng(7).standard_normal((ROWS, COLUMNS)) * 0.05
    return np.ascontiguousarray(values.T if transposed else values).astype(dtype.numpy())


def written(path: Path, tensor: ir.TensorProtocol, **options: Any) -> Array:
    """The tensor, written by the engine at an odd place and read back."""
    write_files([OutputFile(path, tensor.nbytes + 40, (Segment(32, tensor),), b"head")], **options)
    data = path.read_bytes()
    assert data[:32] == b"head" + bytes(28)
    assert data[32 + tensor.nbytes :] == bytes(8)
    shape = tuple(int(n) for n in tensor.shape.numpy())
    return np.frombuffer(data[32 : 32 + tensor.nbytes], tensor.dtype.numpy()).reshape(shape)


def cases(folder: Path, dtype: ir.DataType) -> dict[str, FoldedTensor]:
    """The same canonical fold on each way a weight can be stored."""
    plain = store(folder / "plain", weight(dtype), dtype)
    turned = store(folder / "turned", weight(dtype, transposed=True), dtype)
    return {
        "rows": FoldedTensor(plain, [bind(lora(1))]),
        "stored transposed": FoldedTensor(turned, [bind(lora(1), TRANSPOSED)]),
        "turned while read": FoldedTensor(PermutedTensor(plain, (1, 0)), [bind(lora(1), TRANSPOSED)]),
        "in memory": FoldedTensor(ir.tensor(weight(dtype), dtype=dtype, name="w"), [bind(lora(1))]),
        "dora": FoldedTensor(plain, [bind(DoRA(lora(1), np.linspace(0.5, 2, ROWS, dtype=np.float32)))]),
        "dora, two passes": FoldedTensor(
            turned, [bind(DoRA(lora(1), np.linspace(0.5, 2, ROWS, dtype=np.float32)), TRANSPOSED)]
        ),
    }


@pytest.mark.parametrize("name", DTYPES)
def test_bytes_depend_on_neither_tiles_nor_workers(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_SHARE_BYTES", 200_000)  # several workers on one tensor
    for case, tensor in cases(tmp_path, DTYPES[name]).items():
        digests = {
            hashlib.sha256(written(tmp_path / "out", tensor, tile_bytes=tile, workers=workers).tobytes()).hexdigest()
            for tile in (1, 64 << 10, 1 << 20, 16 << 20)
            for workers in (1, 2, 4)
        }
        digests.add(hashlib.sha256(tensor.numpy().tobytes()).hexdigest())
        assert len(digests) == 1, case


@pytest.mark.parametrize("name", DTYPES)
def test_values_against_float64(tmp_path: Path, name: str) -> None:
    dtype = DTYPES[name]
    delta = lora(1)
    v = weight(dtype).astype(np.float64) + 0.5 * (delta.b.astype(np.float64) @ delta.a.astype(np.float64))
    dora = v * (np.linspace(0.5, 2, ROWS, dtype=np.float32).astype(np.float64) / np.linalg.norm(v, axis=1))[:, None]
    for case, tensor in cases(tmp_path, dtype).items():
        result = written(tmp_path / "out", tensor)
        exact = dora if "dora" in case else v
        expected = (exact if result.shape == exact.shape else exact.T).astype(np.float32).astype(dtype.numpy())
        share = float(np.mean(result == expected))
        assert share >= 0.9999, (case, share)
        close = {"bf16": 2.0**-7, "fp16": 2.0**-10, "fp32": 2.0**-22}[name]
        np.testing.assert_allclose(result.astype(np.float64), expected.astype(np.float64), rtol=close, atol=1e-7)


def test_any_range_of_rows_has_the_bits_of_the_whole(tmp_path: Path) -> None:
    tensor = cases(tmp_path, ir.DataType.BFLOAT16)["rows"]
    whole = tensor.numpy()
    for lo, hi in ((0, 1), (3, 700), (218, 219), (1000, 1500)):
        assert tensor.rows(lo, hi).tobytes() == whole[lo:hi].tobytes()


def test_a_fused_block_changes_only_its_rows(tmp_path: Path) -> None:
    base = store(tmp_path / "w", weight(ir.DataType.FLOAT), ir.DataType.FLOAT)
    block = FoldedTensor(base, [bind(lora(2, out=500), Layout(start=500, stop=1000))])
    result = written(tmp_path / "out", block, tile_bytes=10_000)
    original = weight(ir.DataType.FLOAT)
    assert result[:500].tobytes() == original[:500].tobytes()
    assert result[1000:].tobytes() == original[1000:].tobytes()
    assert (result[500:1000] != original[500:1000]).mean() > 0.99


def test_replacement_then_addition(tmp_path: Path) -> None:
    base = store(tmp_path / "w", weight(ir.DataType.FLOAT), ir.DataType.FLOAT)
    new, extra = np.ones((ROWS, COLUMNS), np.float32), np.full((ROWS, COLUMNS), 0.25, np.float32)
    tensor = FoldedTensor(base, [bind(Addition(extra, 2.0)), bind(Replacement(new))])
    assert (written(tmp_path / "out", tensor) == 1.5).all()


def test_a_new_dtype_without_any_delta(tmp_path: Path) -> None:
    base = store(tmp_path / "w", weight(ir.DataType.FLOAT), ir.DataType.FLOAT)
    result = written(tmp_path / "out", FoldedTensor(base, [], ir.DataType.BFLOAT16))
    assert result.tobytes() == weight(ir.DataType.FLOAT).astype(ml_dtypes.bfloat16).tobytes()


@pytest.mark.parametrize("way", ["copy_file_range", "sendfile", "read and write"])
def test_neighbours_are_copied_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    if way != "copy_file_range":
        monkeypatch.setattr(os, "copy_file_range", refuse)
    if way == "read and write":
        monkeypatch.setattr(os, "sendfile", refuse)
    data = np.random.default_rng(0).integers(0, 256, 3 << 20, np.uint8).tobytes()
    (tmp_path / "in").write_bytes(data)
    parts = [
        file_tensor(tmp_path / "in", at, 1 << 20, ir.DataType.UINT8, (1 << 20,), str(at))
        for at in (0, 1 << 20, 2 << 20)
    ]
    together = [Segment(tensor.offset or 0, tensor) for tensor in parts]
    assert len(list(streaming._jobs([OutputFile(tmp_path / "out", 3 << 20, tuple(together))]))) == 1
    write_files([OutputFile(tmp_path / "out", 3 << 20, tuple(together))], tile_bytes=100_000)
    assert (tmp_path / "out").read_bytes() == data
    swapped = (Segment(0, parts[2]), Segment(1 << 20, parts[0]))
    write_files([OutputFile(tmp_path / "out", 2 << 20, swapped)], tile_bytes=100_000)
    assert (tmp_path / "out").read_bytes() == data[2 << 20 :] + data[: 1 << 20]


def test_scalars_empty_and_packed_tensors(tmp_path: Path) -> None:
    scalar = ir.tensor(np.float32(3.5), name="scalar")
    empty = ir.tensor(np.zeros((0, 4), np.float32), name="empty")
    packed = ir.tensor(np.array([1, -2, 3], ml_dtypes.int4), name="packed")
    segments = (Segment(0, scalar), Segment(4, empty), Segment(4, packed))
    write_files([OutputFile(tmp_path / "out", 6, segments)])
    assert (tmp_path / "out").read_bytes() == scalar.tobytes() + packed.tobytes()
    folded = FoldedTensor(scalar, [bind(Addition(np.array(0.25, np.float32)))])
    assert written(tmp_path / "out", folded) == 3.75


def test_a_truncated_source_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = store(tmp_path / "w", weight(ir.DataType.FLOAT), ir.DataType.FLOAT)
    os.truncate(tmp_path / "w", 1000)
    with pytest.raises(InputError, match="ends inside tensor 'w'"):
        write_files([OutputFile(tmp_path / "out", base.nbytes, (Segment(0, base),))])
    assert not (tmp_path / "out").exists()
    for tensor in (FoldedTensor(base, [bind(lora(1))]), PermutedTensor(base, (1, 0))):
        with pytest.raises(InputError, match="ends inside tensor 'w'"):
            write_files([OutputFile(tmp_path / "out", base.nbytes, (Segment(0, tensor),))])


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_result_that_is_not_finite_names_its_site(tmp_path: Path, name: str, bad: float) -> None:
    extra = np.zeros((ROWS, COLUMNS), np.float64)
    extra[1400, 7] = bad
    base = store(tmp_path / "w", weight(DTYPES[name]), DTYPES[name])
    with pytest.raises(NumericsError, match=r"folding m\.weight: .* \(the base weight is finite\)"):
        written(tmp_path / "out", FoldedTensor(base, [bind(Addition(extra))]))


class Recorder:
    """Progress that calls back on every step."""

    def __init__(self, on_advance: Callable[[], None] = lambda: None) -> None:
        self.total, self.done, self.names, self.ended = 0, 0, set[str](), False
        self._on_advance = on_advance
        self._lock = threading.Lock()

    def begin(self, what: str, total: int) -> None:
        self.total = total

    def advance(self, nbytes: int, name: str = "") -> None:
        with self._lock:
            self.done += nbytes
            self.names.add(name)
        self._on_advance()

    def end(self) -> None:
        self.ended = True


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    tensors = [
        cases(tmp_path, ir.DataType.FLOAT)["rows"],
        store(tmp_path / "x", weight(ir.DataType.FLOAT), DTYPES["fp32"]),
    ]
    size = tensors[0].nbytes
    recorder = Recorder()
    file = OutputFile(tmp_path / "out", 2 * size, (Segment(0, tensors[0]), Segment(size, tensors[1])))
    write_files([file], progress=recorder, tile_bytes=4096)
    assert (recorder.total, recorder.done, recorder.names, recorder.ended) == (2 * size, 2 * size, {"w"}, True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_stops_all_workers(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupt() -> None:
        if threading.current_thread() is threading.main_thread() and recorder.done > 100_000:
            raise error

    recorder = Recorder(interrupt)
    tensor = cases(tmp_path, ir.DataType.FLOAT)["rows"]
    segments = tuple(Segment(i * tensor.nbytes, tensor) for i in range(400))
    started, threads = time.monotonic(), threading.active_count()
    with pytest.raises(error):
        write_files([OutputFile(tmp_path / "out", 400 * tensor.nbytes, segments)], progress=recorder, workers=3)
    assert time.monotonic() - started < 5
    assert threading.active_count() == threads
    assert recorder.done < recorder.total
    assert recorder.ended


def test_an_error_in_a_helper_reaches_the_caller(tmp_path: Path) -> None:
    def fail() -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("helper")
        time.sleep(0.001)

    tensor = cases(tmp_path, ir.DataType.FLOAT)["rows"]
    segments = tuple(Segment(i * tensor.nbytes, tensor) for i in range(50))
    with pytest.raises(RuntimeError, match="helper"):
        write_files([OutputFile(tmp_path / "out", 50 * tensor.nbytes, segments)], progress=Recorder(fail), workers=2)


def test_a_kind_that_forms_its_change_whole_forms_it_once(tmp_path: Path) -> None:
    class Counting(Addition):
        made = 0

        def materialize(self, dtype: np.dtype[np.generic]) -> Array:
            type(self).made += 1
            return super().materialize(dtype)

        apply_slab = Delta.apply_slab

    base = store(tmp_path / "w", weight(ir.DataType.FLOAT), ir.DataType.FLOAT)
    extra = np.random.default_rng(3).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    result = written(tmp_path / "out", FoldedTensor(base, [bind(Counting(extra, 0.5))]), tile_bytes=1)
    assert Counting.made == 1
    exact = weight(ir.DataType.FLOAT).astype(np.float64) + 0.5 * extra.astype(np.float64)
    assert (result == exact.astype(np.float32)).all()


def test_reserved_space_is_zeros_of_the_size_asked_for(tmp_path: Path) -> None:
    with open(tmp_path / "out", "wb+") as file:
        file.truncate(10_000)
        reserve(file.fileno(), 10_000)
        assert file.read() == bytes(10_000)
    with open(tmp_path / "out", "rb") as read_only:
        reserve(read_only.fileno(), 20_000)  # refused by the system: no more than a hint
    assert (tmp_path / "out").stat().st_size == 10_000


def test_a_file_of_holes_takes_no_space(tmp_path: Path) -> None:
    write_files([OutputFile(tmp_path / "out", 64 << 20, head=b"head")])
    found = (tmp_path / "out").stat()
    assert found.st_size == 64 << 20 and found.st_blocks * 512 < 1 << 20
