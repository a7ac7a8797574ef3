"""The names of a PEFT model, back to those of the model inside it."""

from __future__ import annotations

import re
from collections.abc import Iterable

import onnx_ir as ir

__all__ = ["adapter_name", "clean_name", "clean_names"]

_ADAPTER = re.compile(r"\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)\.(?P<adapter>[^.]+)")
#: ``classifier.modules_to_save.default.weight`` is the trained copy of ``classifier.weight``.
_SAVED = re.compile(r"\.(?:modules_to_save\.[^.]+|original_module)(?=\.)")
_WRAPPED = re.compile(r"(?P<outer>(?:[^.]+\.)*?)base_model\.model\.")
_METADATA = ("pkg.torch.onnx.name_scopes", "namespace")


def clean_name(name: str) -> str:
    """
    >>> clean_name("base_model.model.encoder.layer.0.query.base_layer.weight")
    'encoder.layer.0.query.weight'
    """
    name = re.sub(r"\bbase_model\.model(?:\.|\b)", "", name)
    return _SAVED.sub("", name.replace(".base_layer", ""))


def clean_names(model: ir.Model) -> None:
    """Rename initializers, and the scopes on nodes, in place; a name that is taken is not taken twice."""
    wrappers = {m["outer"] for v in model.graph.initializers.values() if (m := _WRAPPED.match(str(v.name)))}
    for value in list(model.graph.initializers.values()):
        name = clean_name(str(value.name))
        turned = name.removesuffix(".transposed")
        wanted = turned if turned not in model.graph.initializers else name
        if wanted != value.name and wanted not in model.graph.initializers:
            value.name = wanted
    taken = {node.name for node in model.graph.all_nodes()}
    for node in model.graph.all_nodes():
        for key in _METADATA:
            if key in node.metadata_props:
                node.metadata_props[key] = clean_name(node.metadata_props[key])
        path = _clean_path(node.name or "", wrappers)
        if path not in taken:
            taken.add(path)
            node.name = path


def _clean_path(path: str, wrappers: Iterable[str]) -> str:
    """A TorchScript node name; PEFT's wrapper is one step in it, "model".

    >>> _clean_path("/model/transformer/h.0/attn/c_attn/base_layer/Gemm", [""])
    '/transformer/h.0/attn/c_attn/Gemm'
    """
    for outer in wrappers:
        start = "/" + outer.replace(".", "/")
        if path.startswith((f"{start}model/", f"{start}base_model/model/")):
            path = start + path.removeprefix(start).removeprefix("base_model/").removeprefix("model/")
            break
    return path.replace("/base_layer/", "/")


def adapter_name(names: Iterable[str]) -> str:
    """The adapter that parameters belong to, as PEFT writes it in their names; "graph" where none says.

    >>> adapter_name(["base_model.model.0.lora_A.second.weight"]), adapter_name(["val_7"])
    ('second', 'graph')
    """
    found = [match["adapter"] for name in names if (match := _ADAPTER.search(name))]
    return found[0] if found and len(set(found)) == 1 else "graph"
