"""``.pt2`` files as base models: the program is loaded, its weights are not.

torch is given a copy of the archive in memory without the weights' bytes and makes tensors on the meta device of them.
Views of the mapped file take their place, and in the graph the file's own spans.
"""

from __future__ import annotations

import io
import json
import logging
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array
from loracc.errors import InputError, UnsupportedError, require
from loracc.model import BaseModel, LoadOptions
from loracc.quiet import quiet
from loracc.sources.pt2_archive import CONSTANTS, MODEL, SAMPLES, WEIGHTS, Payload, Pt2Archive, read_archive
from loracc.sources.pt2_safety import unsafe_parts
from loracc.sources.torch_export import tied_groups, to_ir
from loracc.sources.torch_sites import trace_sites
from loracc.sources.torch_trace import TORCH_LOGGERS, reason_of
from loracc.sources.training_mode import refuse_training_mode
from loracc.sources.user_inputs import given_inputs
from loracc.tensors import file_tensor

if TYPE_CHECKING:
    import torch

__all__ = ["load_exported_program", "load_program", "program_weight_names"]


def load_exported_program(path: Path, options: LoadOptions) -> BaseModel:
    """Read a ``.pt2`` file. ``origin`` is its :class:`~loracc.sources.pt2_archive.Pt2Archive`.

    Raises:
        InputError: Damaged, or it could run code when loaded (see :mod:`loracc.sources.pt2_safety`).
        UnsupportedError: An old format, traced in training mode, or an operator that ONNX has not.
        MissingExtraError: torch is not installed.
    """
    require("torch", "read a .pt2 file")
    archive = read_archive(path)
    program = load_program(archive, allow_pickle=options.allow_pickle)
    refuse_training_mode(program, path)
    lazy = {
        name: _in_file(archive, name, payload, program.state_dict[name])
        for name, payload in archive.weights.items()
        if _stays(payload)
    }
    graph = to_ir(program, options.opset, lazy)
    samples, notes = _samples(archive, program, graph, options)
    return BaseModel(
        path=path,
        format="exported_program",
        ir=graph,
        sites=trace_sites(graph, program.state_dict, tied_groups(program)),
        sample_inputs=samples,
        origin=archive,
        notes=notes,
    )


def load_program(archive: Pt2Archive, *, allow_pickle: bool = False) -> torch.export.ExportedProgram:
    """The program; every weight that is its record from the first byte on is a view of the mapped file.

    Raises:
        InputError: torch cannot read it, or it could run code and ``allow_pickle`` is not set.
    """
    import torch

    document = archive.read_json(MODEL)
    unsafe = [] if allow_pickle else unsafe_parts(archive, document)
    if unsafe:
        raise InputError(
            f"{archive.path}: loading this file could run code of its author's: {'; '.join(unsafe[:5])}.",
            hint="Pass --allow-pickle if you trust where it comes from.",
        )
    problems = _Problems()
    try:
        with quiet(*TORCH_LOGGERS), problems.heard("torch.export"):
            program = torch.export.load(_without_weights(archive, document))
    except Exception as error:  # a parser's boundary: torch has no error class of its own for damaged programs
        reason = problems.reason or reason_of(error)
        raise InputError(
            f"{archive.path}: torch {torch.__version__} cannot read this program ({reason}).",
            hint="It is damaged or written by another torch version: save it again with torch.export.save.",
        ) from error
    _check_sizes(archive, program)
    _map_weights(archive, program)
    return program


def program_weight_names(program: torch.export.ExportedProgram) -> dict[str, str]:
    """Placeholder in the program's graph -> name in its state dict, for parameters and buffers."""
    signature = program.graph_signature
    return {**signature.inputs_to_parameters, **signature.inputs_to_buffers}


class _Problems(logging.Handler):
    """torch.export.load logs what went wrong and raises something else."""

    reason = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self.reason = reason_of(record.exc_info[1])

    @contextmanager
    def heard(self, name: str) -> Iterator[None]:
        """Take what a logger says, and let nobody else hear it."""
        logger = logging.getLogger(name)
        level, propagate = logger.level, logger.propagate
        logger.addHandler(self)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.setLevel(level)
            logger.propagate = propagate


def _stays(payload: Payload) -> bool:
    return payload.plain and 0 not in payload.shape


def _without_weights(archive: Pt2Archive, document: Any) -> io.BytesIO:
    """The archive as torch is to see it: weights on the meta device, no samples, no guards, everything else on the CPU.

    torch makes an empty tensor for an empty record, on the device that its entry says.
    """
    first = {payload.record: payload for payload in reversed(archive.weights.values())}
    real = {p.record for p in archive.weights.values() if not _stays(p) or p.shape != first[p.record].shape}
    document["guards_code"] = []  # Python source that checks inputs; the graph is traced already
    config = _on_cpu(archive.read_json(WEIGHTS))
    for name, entry in config["config"].items():
        if archive.weights[name].record not in real:
            entry["tensor_meta"]["device"] = {"type": "meta", "index": None}
    replaced = dict.fromkeys((SAMPLES, *(first.keys() - real)), b"")
    replaced |= {MODEL: json.dumps(_on_cpu(document)).encode(), WEIGHTS: json.dumps(config).encode()}
    replaced[CONSTANTS] = json.dumps(_on_cpu(archive.read_json(CONSTANTS))).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as copy:
        for name in archive.records:
            copy.writestr(f"{archive.root}/{name}", replaced[name] if name in replaced else archive.read(name))
    buffer.seek(0)
    return buffer


def _on_cpu(part: Any) -> Any:
    """The same JSON with every device a CPU: a program that was exported on a GPU is traced where there is none."""
    if isinstance(part, list):
        return [_on_cpu(item) for item in part]
    if isinstance(part, dict):
        if part.keys() == {"type", "index"} and isinstance(part["type"], str):
            return {"type": "cpu", "index": None}
        return {key: _on_cpu(item) for key, item in part.items()}
    return part


def _check_sizes(archive: Pt2Archive, program: torch.export.ExportedProgram) -> None:
    for name, payload in archive.weights.items():
        tensor = program.state_dict.get(name)
        nbytes = archive.records[payload.record].nbytes
        if tensor is None or (_stays(payload) and tensor.nbytes > nbytes):
            wanted = "the program has no such weight" if tensor is None else f"expected {tensor.nbytes}"
            raise InputError(
                f"{archive.path}: weight {name!r}: {payload.record} has {nbytes} bytes, {wanted}.",
                hint="The archive is damaged: save it again with torch.export.save.",
            )


def _map_weights(archive: Pt2Archive, program: torch.export.ExportedProgram) -> None:
    """Views of the file in the place of meta tensors. The map is private: a write to a view never reaches the file."""
    import torch

    size = archive.path.stat().st_size
    storage = torch.UntypedStorage.from_file(str(archive.path), shared=False, nbytes=size)
    parts: dict[str, torch.UntypedStorage] = {}  # one per record: tied weights stay one tensor
    for name, old in program.state_dict.items():
        if old.device.type != "meta":
            continue
        record = archive.weights[name].record
        if record not in parts:
            span = archive.records[record]
            parts[record] = storage[span.offset : span.offset + span.nbytes]
        new = torch.empty(0, dtype=old.dtype).set_(parts[record], 0, old.shape, old.stride())
        is_parameter = isinstance(old, torch.nn.Parameter)
        program.state_dict[name] = torch.nn.Parameter(new, requires_grad=False) if is_parameter else new


def _in_file(archive: Pt2Archive, name: str, payload: Payload, tensor: torch.Tensor) -> ir.TensorProtocol:
    """The weight in the archive; ``tensor`` is what torch made of it and knows its dtype and size."""
    from onnx_ir.tensor_adapters import from_torch_dtype

    offset = archive.records[payload.record].offset
    return file_tensor(archive.path, offset, tensor.nbytes, from_torch_dtype(tensor.dtype), payload.shape, name)


def _samples(
    archive: Pt2Archive, program: torch.export.ExportedProgram, graph: ir.Model, options: LoadOptions
) -> tuple[Mapping[str, Array], tuple[str, ...]]:
    """(inputs by ONNX name, notes): the user's, else the archive's own."""
    names = [str(value.name) for value in graph.graph.inputs]
    given = given_inputs(options)
    if unknown := [name for name in given if name not in names]:
        raise InputError(
            f"{archive.path}: the model has no input {unknown[0]!r}.", hint=f"Its inputs: {', '.join(names)}."
        )
    if given or SAMPLES not in archive.records or not archive.records[SAMPLES].nbytes:
        return given, ()
    return _own_samples(archive, program, names, allow_pickle=options.allow_pickle)


def _own_samples(
    archive: Pt2Archive, program: torch.export.ExportedProgram, names: list[str], *, allow_pickle: bool
) -> tuple[Mapping[str, Array], tuple[str, ...]]:
    import pickle

    import torch
    from torch.utils import _pytree

    data = archive.read(SAMPLES)
    try:
        saved = torch.load(io.BytesIO(data), weights_only=not allow_pickle, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        note = f"the file's sample inputs are not used: reading them needs --allow-pickle ({reason_of(error)})"
        return {}, (note,)
    leaves = _pytree.tree_leaves(saved)
    inputs = program.graph_signature.user_inputs
    if len(leaves) != len(inputs):
        raise UnsupportedError(f"{archive.path}: {len(leaves)} sample inputs for a program of {len(inputs)}.")
    found = {str(name): leaf for name, leaf in zip(inputs, leaves, strict=True) if isinstance(leaf, torch.Tensor)}
    return {name: _array(found[name]) for name in names if name in found}, ()


def _array(tensor: torch.Tensor) -> Array:
    import torch

    plain = tensor.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:
        return plain.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.array(plain.numpy())
