"""Hostile and broken files: each is an error that names the file and says what is wrong, never another exception."""

from __future__ import annotations

import json
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy
from onnx import helper, numpy_helper

from loracc.errors import InputError, LoraccError, UnsupportedError
from loracc.sources import load_model
from tests.sources.onnx_files import external, linear_model, save

Make = Callable[[Path], Path]


def raw(content: bytes) -> Make:
    def make(folder: Path) -> Path:
        (folder / "model.onnx").write_bytes(content)
        return folder / "model.onnx"

    return make


def graph(model: Callable[[], onnx.ModelProto], **files: bytes) -> Make:
    def make(folder: Path) -> Path:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return save(folder / "model.onnx", model())

    return make


def archive(**members: bytes) -> Make:
    def make(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "model.pt", "w") as target:
            for name, content in members.items():
                target.writestr(name.replace("__", "/").replace("_dot_", "."), content)
        return folder / "model.pt"

    return make


def cut(make: Make, keep: float) -> Make:
    def shorter(folder: Path) -> Path:
        path = make(folder)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])
        return path

    return shorter


def tensor(**fields: object) -> Callable[[], onnx.ModelProto]:
    """A model whose weight [4, 3] float32 has these fields set."""

    def build() -> onnx.ModelProto:
        weight = numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
        for key, value in fields.items():
            if key == "dims":
                weight.dims[:] = value
            else:
                setattr(weight, key, value)
        return linear_model(weight)

    return build


def dangling() -> onnx.ModelProto:
    model = linear_model()
    model.graph.node[0].input[1] = "nowhere"
    return model


def sparse() -> onnx.ModelProto:
    model = linear_model()
    values = numpy_helper.from_array(np.ones(1, np.float32), "s")
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, numpy_helper.from_array(np.zeros(1, np.int64)), [4])
    )
    return model


def recorded(text: str) -> Callable[[], onnx.ModelProto]:
    def build() -> onnx.ModelProto:
        model = linear_model()
        model.metadata_props.add(key="loracc.sites", value=text)
        return model

    return build


def empty_graph() -> onnx.ModelProto:
    return helper.make_model(helper.make_graph([], "empty", [], []), ir_version=10)


def symlink_out(folder: Path) -> Path:
    secret = folder.parent / f"{folder.name}.secret"
    secret.write_bytes(bytes(48))
    os.symlink(secret, folder / "link.data")
    return save(folder / "model.onnx", linear_model(external("link.data")))


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.onnx")
    return folder / "pipe.onnx"


def files(**contents: bytes | str) -> Make:
    """A folder with these files; ``__`` stands for a dot in a name."""

    def make(folder: Path) -> Path:
        for name, content in contents.items():
            data = content.encode() if isinstance(content, str) else content
            (folder / name.replace("__", ".")).write_bytes(data)
        return folder

    return make


def tensors(**arrays: np.ndarray) -> bytes:
    """The bytes of a safetensors file."""
    return safetensors.numpy.save({name.replace("__", "."): array for name, array in arrays.items()})


def sharded(weight_map: object, **shards: bytes) -> Make:
    return files(model__safetensors__index__json=json.dumps({"weight_map": weight_map}), **shards)


ONE = np.ones(2, np.float32)
HOSTILE: dict[str, tuple[Make, str]] = {
    # -- nothing, or another kind
    "missing": (lambda folder: folder / "gone.onnx", "no such file or folder"),
    "null byte in the path": (lambda folder: folder / "a\0b", "no such file"),
    "empty file": (raw(b""), "empty"),
    "one byte": (raw(b"\x08"), "cut short|known kind"),
    "zeros": (raw(bytes(4096)), "known kind"),
    "noise": (raw(random.Random(0).randbytes(4096)), "known kind"),
    "text": (raw(b"hello world, this is text"), "known kind"),
    "a pipe": (fifo, "neither a file nor a folder"),
    "git lfs pointer": (raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "Git LFS"),
    "web page": (raw(b"<!DOCTYPE html><html>404</html>"), "web page"),
    "gguf": (raw(b"GGUF\x03\0\0\0" + bytes(64)), "GGUF"),
    "hdf5": (raw(b"\x89HDF\r\n\x1a\n" + bytes(64)), "HDF5"),
    "onnx adapter": (raw(b"\x1c\0\0\0TORT" + bytes(64)), "ONNX Runtime adapter"),
    "plain pickle": (raw(b"\x80\x04\x95\x0b\0\0\0\0\0\0\0}\x94."), "plain Python pickle"),
    "gzip": (raw(b"\x1f\x8b\x08\0" + bytes(64)), "gzip"),
    # -- ONNX
    "onnx cut short": (cut(graph(linear_model), 0.6), "cut short"),
    "onnx cut in the tail": (cut(graph(linear_model), 0.97), "cut short"),
    "onnx with a damaged graph": (raw(b"\x08\x0a\x3a\x08\xff\xff\xff\xff\xff\xff\xff\xff"), "readable|read"),
    "onnx with an empty graph": (graph(empty_graph), "empty"),
    "onnx with a dangling input": (graph(dangling), "'nowhere', which nothing produces"),
    "onnx with a sparse weight": (graph(sparse), "sparse initializer 's'"),
    "raw data too short": (graph(tensor(raw_data=bytes(44))), "takes 48 bytes, and the file holds 44"),
    "raw data too long": (graph(tensor(raw_data=bytes(52))), "takes 48 bytes, and the file holds 52"),
    "shape far beyond the data": (graph(tensor(dims=[1 << 40, 1 << 20])), "and the file holds 48"),
    "shape beyond any memory": (graph(tensor(dims=[1 << 40, 1 << 40])), "beyond any memory"),
    "negative axis": (graph(tensor(dims=[-4, 3])), "not a tensor's dtype and shape"),
    "unknown dtype": (graph(tensor(data_type=99)), "unknown dtype number 99"),
    "undefined dtype": (graph(tensor(data_type=0)), "not a tensor's dtype and shape"),
    "external data missing": (graph(lambda: linear_model(external("gone.data"))), "gone.data' is missing"),
    "external data absolute": (graph(lambda: linear_model(external("/etc/hostname"))), "not a path inside"),
    "external data on a drive": (graph(lambda: linear_model(external("C:\\x.data"))), "not a path inside"),
    "external data above": (graph(lambda: linear_model(external("../x.data"))), "not a path inside"),
    "external data above, other slashes": (graph(lambda: linear_model(external("a\\..\\..\\x"))), "not a path inside"),
    "external data by a link": (symlink_out, "a link that leaves"),
    "external data nowhere": (graph(lambda: linear_model(external(""))), "not a path inside"),
    "external data truncated": (graph(lambda: linear_model(external("d")), d=bytes(40)), "ends at byte 48 of d"),
    "external offset behind the end": (
        graph(lambda: linear_model(external("d", offset=1 << 60)), d=bytes(48)),
        "of d, which has 48",
    ),
    "external offset negative": (graph(lambda: linear_model(external("d", offset=-8)), d=bytes(48)), "offset '-8'"),
    "external offset not a number": (graph(lambda: linear_model(external("d", offset="x")), d=bytes(48)), "offset 'x'"),
    "external length wrong": (graph(lambda: linear_model(external("d", length=12)), d=bytes(48)), "its length says 12"),
    "site record not JSON": (graph(recorded("{")), "record of its sites is malformed"),
    "site record of another form": (graph(recorded('[{"module": 1}]')), "record of its sites is malformed"),
    "site record a number": (graph(recorded("3")), "record of its sites is malformed"),
    # -- zips
    "zip cut short": (cut(archive(a__data_dot_pkl=bytes(5000)), 0.5), "directory cannot be read"),
    "zip magic and nothing": (raw(b"PK\x03\x04" + bytes(100)), "directory cannot be read"),
    "empty zip": (archive(), "empty zip"),
    "zip of text": (archive(readme_dot_txt=b"hi"), "no model"),
    "npz": (archive(x_dot_npy=b"hi"), "NumPy arrays"),
    "aotinductor package": (archive(a__archive_format=b"pt2", a__data__x_dot_so=b""), "AOTInductor"),
    # -- safetensors and folders
    "empty folder": (files(), "the folder is empty"),
    "folder without weights": (files(readme__md="x"), "no weights in this folder"),
    "config without weights": (files(config__json="{}"), "the weights are not"),
    "diffusers pipeline": (files(model_index__json="{}"), "diffusers pipeline"),
    "tensorflow folder": (files(config__json="{}", tf_model__h5=b"x"), "TensorFlow or Flax"),
    "folder with a graph": (files(model__onnx=b"x"), "name the model file itself"),
    "adapter folder": (files(adapter_config__json="{}", adapter_model__safetensors=b"x"), "this is an adapter"),
    "adapter in a model's place": (
        lambda folder: (
            files(x__safetensors=tensors(a__lora_A__weight=ONE, a__lora_B__weight=ONE))(folder) / "x.safetensors"
        ),
        "this is an adapter",
    ),
    "safetensors cut short": (files(model__safetensors=tensors(w=np.ones(500, np.float32))[:900]), "the file has 900"),
    "several files, no index": (
        files(a__safetensors=tensors(w=ONE), b__safetensors=tensors(v=ONE)),
        "2 safetensors files and no index",
    ),
    "index without a map": (files(model__safetensors__index__json="{}"), "no weight_map"),
    "index not JSON": (files(model__safetensors__index__json="{"), "not a JSON file"),
    "index a list": (files(model__safetensors__index__json="[]"), "JSON list"),
    "index of numbers": (sharded({"w": 1}), "does not map names to files"),
    "shard missing": (sharded({"w": "a.safetensors"}), "'a.safetensors' is missing"),
    "shard above": (sharded({"w": "../a.safetensors"}), "outside the folder"),
    "shard absolute": (sharded({"w": "/a.safetensors"}), "outside the folder"),
    "key not in its shard": (sharded({"w": "a.safetensors"}, a__safetensors=tensors(v=ONE)), "'w' is not in"),
    "key in another shard": (
        sharded(
            {"w": "a.safetensors", "v": "b.safetensors"}, a__safetensors=tensors(v=ONE), b__safetensors=tensors(w=ONE)
        ),
        "the index says",
    ),
    "key in two shards": (
        sharded(
            {"w": "a.safetensors", "v": "b.safetensors"},
            a__safetensors=tensors(w=ONE),
            b__safetensors=tensors(w=ONE, v=ONE),
        ),
        "lies in both",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_it_is_named_and_refused(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    make, problem = HOSTILE[case]
    (tmp_path / "in").mkdir()
    path = make(tmp_path / "in")
    with pytest.raises((InputError, UnsupportedError), match=problem) as caught:
        load_model(path)
    assert str(path) in caught.value.message
    assert not caplog.records, "a library said the same thing in its own words"


def test_every_truncation_and_many_byte_flips_are_errors_or_models(tmp_path: Path) -> None:
    """No damage to a small file gets past the error tree."""
    rng = random.Random(0)
    save(tmp_path / "a.onnx", linear_model())
    safetensors.numpy.save_file({"fc.weight": np.ones((4, 3), np.float32)}, tmp_path / "b.safetensors")
    archive(m__data_dot_pkl=b"x" * 50)(tmp_path)
    outcomes = set()
    for source in ("a.onnx", "b.safetensors"):
        content = (tmp_path / source).read_bytes()
        damaged = [content[:size] for size in range(len(content))]
        for _ in range(300):
            flipped = bytearray(content)
            flipped[rng.randrange(len(flipped))] = rng.randrange(256)
            damaged.append(bytes(flipped))
        for data in damaged:
            (tmp_path / "damaged").write_bytes(data)
            try:
                load_model(tmp_path / "damaged")
                outcomes.add("loaded")
            except LoraccError as error:
                assert "damaged" in str(error)
                outcomes.add("refused")
    assert outcomes == {"loaded", "refused"}
