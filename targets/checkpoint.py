"""The merged checkpoint: the base's own files again, with other numbers in them.

1. Same shards, same tensor names and order. A shard's header is the base's own bytes unless a dtype changed or a tensor
   came on top of the base's (a head that is no longer tied); then a new header is written, with the same metadata.
2. Every other file of the base (configuration, tokenizer, ...) is copied. ``config.json`` and the index change only
   where they would otherwise be wrong: the dtype, the tie of the embeddings, the map of the shards.
3. ``loracc.json`` says from what it was made; the tensor files themselves say nothing of it.
4. A base in another format (PyTorch's ``.bin``, a state dict) becomes one ``model.safetensors``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from loracc.dtypes import is_float
from loracc.errors import InputError, UnsupportedError
from loracc.model import BaseModel
from loracc.progress import Progress
from loracc.sources.checkpoint_files import CheckpointFiles
from loracc.sources.safetensors_file import SafetensorsFile, dtype_name
from loracc.streaming import OutputFile, Segment
from loracc.targets.plan import WritePlan, computed_bytes
from loracc.tensors import dims

__all__ = ["plan_checkpoint", "safetensors_header", "write_checkpoint"]

#: What the libraries look for where the base's own file name says nothing.
DEFAULT_NAME = "model.safetensors"
#: Where the record of what a checkpoint was made from is kept, and where a model has it: :mod:`loracc.provenance`.
RECORD_FILE, RECORD_KEY = "loracc.json", "loracc.provenance"
#: A header's length is a multiple of this, as the reference writer has it.
_HEADER_ALIGNMENT = 8
_CONFIG_DTYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.DOUBLE: "float64",
}

Tensors = Mapping[str, ir.TensorProtocol]


def write_checkpoint(
    model: BaseModel, out: Path, *, folder: bool, progress: Progress | None = None, workers: int | None = None
) -> None:
    """Write a checkpoint's tensors as they are now, folds included.

    Args:
        model: A bare checkpoint: its initializers are the base's tensors, and possibly some more.
        out: The folder (that may exist) or the ``.safetensors`` file; see :class:`loracc.staging.Staging`.
        folder: Which of the two it is.
        progress: Told of the bytes of the weights.
        workers: See :func:`loracc.streaming.write_files`.

    Raises:
        InputError: A source file cannot be read.
        UnsupportedError: The model is a graph and not a checkpoint.
        NumericsError: A folded weight is not finite.
    """
    plan_checkpoint(model, out, folder=folder).write(progress, workers=workers)


def plan_checkpoint(model: BaseModel, out: Path, *, folder: bool) -> WritePlan:
    """What :func:`write_checkpoint` will write; nothing is read but headers and configuration."""
    if model.traced or len(model.ir.graph):
        raise UnsupportedError(
            f"{model.path}: a graph, and the output {out.name} is a checkpoint: a graph has its exporter's names.",
            hint="Write .onnx or .pt2, or fold into the checkpoint that the graph was made from.",
        )
    tensors: dict[str, ir.TensorProtocol] = {}
    for value in model.ir.graph.initializers.values():
        if value.const_value is None:
            raise AssertionError(f"checkpoint tensor {value.name!r} has no value")
        tensors[str(value.name)] = value.const_value
    files = model.origin if isinstance(model.origin, CheckpointFiles) else CheckpointFiles(model.path, ())
    parts = _parts(files, tensors, folder=folder)
    weights = tuple(part.output(out / part.name if folder else out) for part in parts)
    small: dict[Path, Callable[[], bytes]] = {}
    copies: dict[Path, Path] = {}
    if folder:
        _surroundings(files, parts, tensors, out, small, copies)
        metadata = model.ir.metadata_props
        copies.pop(out / RECORD_FILE, None)  # the base's own, which is part of the new one
        if RECORD_KEY in metadata:  # what it says is known once the weights are written
            small[out / RECORD_FILE] = lambda: (metadata[RECORD_KEY] + "\n").encode()
    return WritePlan(
        weights,
        small,
        copies,
        nbytes=sum(file.size for file in weights) + sum(os.path.getsize(path) for path in copies.values()),
        folded=computed_bytes(list(tensors.values())),
    )


@dataclass(frozen=True)
class _Part:
    """One weight file to write.

    Attributes:
        name: Its name in the output folder, relative.
        tensors: What goes into it, in the order of the header.
        metadata: The header's strings.
        base: The base's file, where its header stays as it is.
    """

    name: str
    tensors: Tensors
    metadata: Mapping[str, str] = field(default_factory=dict)
    base: SafetensorsFile | None = None

    def output(self, path: Path) -> OutputFile:
        if self.base is None:
            return new_safetensors(path, self.tensors, self.metadata)
        segments = tuple(Segment(info.offset, self.tensors[info.name]) for info in self.base.tensors)
        size = max([self.base.data_start, *(info.offset + info.nbytes for info in self.base.tensors)])
        return OutputFile(path, size, segments, _head(self.base))


def _head(file: SafetensorsFile) -> bytes:
    try:
        with open(file.path, "rb") as source:
            return source.read(file.data_start)
    except OSError as error:
        raise InputError(f"{file.path}: cannot be read: {error.strerror or error}.") from error


def _parts(files: CheckpointFiles, tensors: Tensors, *, folder: bool) -> list[_Part]:
    """The weight files, shard by shard; tensors that the base has not go into the last one."""
    known = {info.name for info in files.tensors}
    extra = {name: tensor for name, tensor in tensors.items() if name not in known}
    if missing := known - tensors.keys():
        raise AssertionError(f"the model lost tensors of its checkpoint: {sorted(missing)[:5]}")
    if not files.shards:
        return [_Part(DEFAULT_NAME, extra, {"format": "pt"})]
    if not folder and len(files.shards) > 1:
        # One file was asked for: the shards come together.
        return [_Part("", tensors, files.shards[0].metadata)]
    parts = []
    for shard in files.shards:
        own = {info.name: tensors[info.name] for info in shard.tensors}
        if shard is files.shards[-1]:
            own |= extra
        same = len(own) == len(shard.tensors) and all(own[info.name].dtype == info.dtype for info in shard.tensors)
        name = os.path.relpath(shard.path, files.folder) if files.root.is_dir() else shard.path.name
        parts.append(_Part(name, own, shard.metadata, shard if same else None))
    return parts


def new_safetensors(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> OutputFile:
    """A safetensors file of these tensors with a header of its own."""
    header, offsets = safetensors_header(tensors, metadata)
    segments = tuple(Segment(len(header) + offsets[name], tensor) for name, tensor in tensors.items())
    size = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    return OutputFile(path, size, segments, header)


def safetensors_header(tensors: Tensors, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header's bytes, and each tensor's offset behind it: wider elements first, so that all are aligned.

    Raises:
        UnsupportedError: A dtype that the format has no name for.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets: dict[str, int] = {}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.bitwidth):
        try:
            dtype = dtype_name(tensor.dtype)
        except KeyError as error:
            raise UnsupportedError(f"tensor {name!r}: safetensors has no dtype {tensor.dtype.name}.") from error
        offsets[name] = end
        entries[name] = {"dtype": dtype, "shape": list(dims(tensor)), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, offsets


def _surroundings(
    files: CheckpointFiles,
    parts: Sequence[_Part],
    tensors: Tensors,
    out: Path,
    small: dict[Path, Callable[[], bytes]],
    copies: dict[Path, Path],
) -> None:
    """The files beside the weights: copied, except where they would no longer be true."""
    for path in files.others:
        copies[out / path.relative_to(files.folder)] = path
    config = out / "config.json"
    if config in copies and (changes := _config_changes(files, tensors)):
        source = copies.pop(config)
        small[config] = lambda: _changed_config(source, changes)
    if files.index is not None:
        target = out / files.index.name
        if all(part.base is not None for part in parts):
            copies[target] = files.index
        else:
            text = _new_index(files.index, parts)
            small[target] = lambda: text


def _config_changes(files: CheckpointFiles, tensors: Tensors) -> dict[str, Any]:
    """What ``config.json`` must say anew: ``dtype`` after a conversion, ``tie_word_embeddings`` after a split."""
    changes: dict[str, Any] = {}
    before = {info.name: info for info in files.tensors}
    if files.shards and any(
        name.endswith("weight") and len(dims(tensors[name])) == 2 for name in tensors.keys() - before
    ):
        changes["tie_word_embeddings"] = False
    if any(tensors[name].dtype != info.dtype for name, info in before.items()):
        dtypes = {tensor.dtype for tensor in tensors.values() if is_float(tensor.dtype)}
        # With several dtypes left (buffers that stay in float32), the narrowest is what the model is loaded in.
        changes["dtype"] = _CONFIG_DTYPES[min(dtypes, key=lambda dtype: (dtype.bitwidth, dtype.name))]
    return changes


def _changed_config(source: Path, changes: Mapping[str, Any]) -> bytes:
    config = json.loads(source.read_text(encoding="utf-8"))
    for key, value in changes.items():
        # transformers before 5 wrote torch_dtype; a nested text_config may hold either key as well.
        names = ("dtype", "torch_dtype") if key == "dtype" else (key,)
        found = False
        for part in (config, *(part for part in config.values() if isinstance(part, dict))):
            for name in names:
                if name in part:
                    part[name], found = value, True
        if not found:
            config[names[0]] = value
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _new_index(source: Path, parts: Sequence[_Part]) -> bytes:
    """The index with the tensors and the total size as they are now; its other keys stay."""
    index = json.loads(source.read_text(encoding="utf-8"))
    index["weight_map"] = {name: part.name for part in parts for name in part.tensors}
    if isinstance(index.get("metadata"), dict) and "total_size" in index["metadata"]:
        index["metadata"]["total_size"] = sum(t.nbytes for part in parts for t in part.tensors.values())
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
