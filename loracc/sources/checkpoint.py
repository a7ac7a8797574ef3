"""A bare checkpoint as a model: a graph without nodes, with the checkpoint's tensors in their files as initializers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from loracc.dtypes import is_float
from loracc.model import BaseModel, LoadOptions
from loracc.sites import TRANSPOSED, Layout, Site, SiteTable
from loracc.sources.checkpoint_files import STEMS, CheckpointFiles, is_index, read_config, read_files
from loracc.sources.safetensors_file import tensor_of
from loracc.sources.tied_weights import tied_head
from loracc.tensors import dims

__all__ = ["CheckpointFiles", "checkpoint_model", "checkpoint_sites", "load_checkpoint", "read_files"]

#: Layers that transformers builds as ``Conv1D`` (weight ``[in, out]``), by model type; from the calls of ``Conv1D(`` in
#: transformers 5.23's modeling files.
CONV1D_LAYERS: dict[str, frozenset[str]] = {
    "gpt2": frozenset({"c_attn", "q_attn", "c_proj", "c_fc"}),
    "imagegpt": frozenset({"c_attn", "q_attn", "c_proj", "c_fc"}),
    "decision_transformer": frozenset({"c_attn", "q_attn", "c_proj", "c_fc"}),
    "openai-gpt": frozenset({"c_attn", "c_proj", "c_fc"}),
    "clvp": frozenset({"c_proj", "c_fc"}),
    "clvp_decoder": frozenset({"c_proj", "c_fc"}),
}


def load_checkpoint(path: Path, options: LoadOptions) -> BaseModel:
    """Read a checkpoint for its weights only: a safetensors file, an index, or a folder.

    Raises:
        InputError: See :func:`loracc.sources.checkpoint_files.read_files`.
    """
    if path.is_dir() and torch_weight_files(path):
        from loracc.sources.torch_checkpoint import read_torch_weights

        files, tensors = read_torch_weights(path)
    else:
        files = read_files(path)
        tensors = [tensor_of(info) for info in files.tensors]
    # A file named by itself may lie among files that are not its own, unless it has a library's own name.
    config = read_config(files.folder) if not path.is_file() or is_index(path) or path.stem in STEMS else {}
    return checkpoint_model(path, files, tensors, config)


def torch_weight_files(folder: Path) -> bool:
    """Whether the folder's only weights are PyTorch's ``pytorch_model*.bin``."""
    return not any(folder.glob("*.safetensors")) and any(folder.glob("pytorch_model*.bin"))


def checkpoint_model(
    path: Path, files: CheckpointFiles, tensors: Sequence[ir.TensorProtocol], config: dict[str, Any]
) -> BaseModel:
    """A node-less model of these tensors, in their order and under their names."""
    values = [
        ir.Value(name=tensor.name, shape=ir.Shape(dims(tensor)), type=ir.TensorType(tensor.dtype), const_value=tensor)
        for tensor in tensors
    ]
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 18}, name="checkpoint")
    return BaseModel(
        path=path,
        format="checkpoint",
        ir=ir.Model(graph, ir_version=10),
        sites=SiteTable(checkpoint_sites(tensors, config)),
        traced=False,
        origin=files,
    )


def checkpoint_sites(tensors: Iterable[ir.TensorProtocol], config: dict[str, Any]) -> list[Site]:
    """A site for every float tensor with axes. Without a graph its name and shape are all that is known of it.

    Args:
        tensors: The checkpoint's tensors.
        config: The model's ``config.json``; its ``model_type`` tells which weights are stored as ``[in, out]``.
    """
    transposed = _conv1d_layers(config)
    sites = []
    for tensor in tensors:
        name = str(tensor.name)
        if not is_float(tensor.dtype) or not len(tensor.shape):
            continue
        module, _, parameter = name.rpartition(".")
        conv1d = parameter == "weight" and len(tensor.shape) == 2 and _is_conv1d(module, transposed)
        layout = TRANSPOSED if conv1d else Layout()
        sites.append(Site(module, parameter, "linear" if conv1d else "other", name, layout))
    if tied := tied_head({site.initializer for site in sites}, config):
        head, embedding = tied
        module, _, parameter = head.rpartition(".")
        # There is no node that reads it; its own name says that it is another reader than the embedding.
        sites.append(Site(module, parameter, "linear", embedding, consumer=head))
    return sites


def _conv1d_layers(config: dict[str, Any]) -> list[tuple[str, frozenset[str]]]:
    """(prefix of the module path, layer names) for the configuration and the models inside it.

    An encoder-decoder's parts lie under their configuration's key: ``{"decoder": {"model_type": "gpt2"}}`` has its
    weights under "decoder.".
    """
    found = [("", CONV1D_LAYERS.get(str(config.get("model_type")), frozenset()))]
    for key, part in config.items():
        if isinstance(part, dict) and str(part.get("model_type")) in CONV1D_LAYERS:
            prefix = f"{key}." if key in ("encoder", "decoder") else ""
            found.append((prefix, CONV1D_LAYERS[str(part["model_type"])]))
    return found


def _is_conv1d(module: str, layers: list[tuple[str, frozenset[str]]]) -> bool:
    leaf = module.rpartition(".")[2]
    return any(leaf in names and module.startswith(prefix) for prefix, names in layers)
