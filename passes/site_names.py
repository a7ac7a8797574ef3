"""What names tell about a weight: its own, when it is a parameter's, and the scopes that exporters leave on nodes."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

import onnx_ir as ir

__all__ = ["ParameterName", "node_scope", "parse_parameter", "partner_parameter", "related"]

#: A dotted parameter name; exporters' own names are not ("onnx::MatMul_12", "val_7", "/fc/Constant_output_0", "x.3").
_DOTTED = re.compile(r"(?P<module>[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*)\.(?P<parameter>[A-Za-z_]\w*)", re.ASCII)
#: Names that a parameter of the root module may have and that no exporter makes up.
_ROOT = frozenset({"weight", "bias", "in_proj_weight", "in_proj_bias"})
_REPEATED_CALL = re.compile(r"_\d+$")


@dataclass(frozen=True)
class ParameterName:
    """A parameter: module path ("" for the root) and name."""

    module: str
    parameter: str


def parse_parameter(name: str | None, op_type: str = "") -> ParameterName | None:
    """The parameter that a value's name means, None when it means none.

    onnxruntime-genai's builder names a weight after its module *and* the op: ``op_type`` at the end is dropped.

    >>> parse_parameter("encoder.layer.0.query.weight")
    ParameterName(module='encoder.layer.0.query', parameter='weight')
    >>> parse_parameter("layers.0.q_proj.MatMul.weight", "MatMul").module
    'layers.0.q_proj'
    >>> parse_parameter("onnx::MatMul_12"), parse_parameter("val_7"), parse_parameter("x.3")
    (None, None, None)
    """
    if name in _ROOT:
        return ParameterName("", name)
    match = _DOTTED.fullmatch(name or "")
    if not match:
        return None
    module = match["module"]
    if op_type and module.endswith(f".{op_type}"):
        module = module.removesuffix(f".{op_type}")
    return ParameterName(module, match["parameter"])


def partner_parameter(name: ParameterName, *, bias: bool) -> ParameterName | None:
    """The bias that goes with a weight, or the weight with a bias, by torch's habit; None where there is no habit.

    >>> partner_parameter(ParameterName("attn", "in_proj_bias"), bias=False)
    ParameterName(module='attn', parameter='in_proj_weight')
    """
    old, new = ("weight", "bias") if bias else ("bias", "weight")
    if name.parameter != old and not name.parameter.endswith(f"_{old}"):
        return None
    return ParameterName(name.module, name.parameter.removesuffix(old) + new)


def node_scope(node: ir.Node) -> str | None:
    """The module path in whose forward a node was traced; "" for the root, None when nothing tells.

    1. ``pkg.torch.onnx.name_scopes`` (torch's exporter): a list of module paths and, last, the FX node.
    2. ``namespace`` (the same exporter, and its earlier releases): ``path: class/path: class/.../node: op``.
    3. The node's name as a path: ``/encoder/layer.0/query/MatMul`` (torch's TorchScript exporter, genai's builder).
    """
    for key, read in (("pkg.torch.onnx.name_scopes", _name_scopes), ("namespace", _namespace)):
        text = node.metadata_props.get(key)
        if text and (scope := read(text)) is not None:
            return scope
    path, slash, _ = (node.name or "").rpartition("/")
    return path.strip("/").replace("/", ".") if slash else None


def _name_scopes(text: str) -> str | None:
    """
    >>> _name_scopes("['', 'encoder', 'encoder.query', 'linear_3']")
    'encoder.query'
    """
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None  # another tool's text under this key: the next source may tell
    if not isinstance(scopes, list) or len(scopes) < 2 or not isinstance(scopes[-2], str):
        return None
    return scopes[-2]


def _namespace(text: str) -> str | None:
    """
    >>> _namespace(": my.Model/encoder: my.Encoder/encoder.query: torch.nn.Linear/linear_3: aten.linear.default")
    'encoder.query'
    """
    parts = text.split("/")
    if len(parts) < 2 or ":" not in parts[-2]:
        return None
    return parts[-2].partition(":")[0].strip()


def related(module: str, scope: str | None) -> bool:
    """Whether a node in ``scope`` may be the reader of a parameter of ``module``.

    The scope is the module itself, a module that it lies in (a functional call on a child's weight), or either of them
    behind a wrapper's prefix that the other has not. A module called again has a number at its scope's end.

    >>> related("attn.out_proj", "model.attn"), related("model.attn.q", "attn.q"), related("head", "head_1")
    (True, True, True)
    >>> related("conv", "bn"), related("transformer.wte", "lm_head")
    (False, False)
    """
    if not scope or not module:
        return True
    return any(_aligned(module.split("."), text.split(".")) for text in (scope, _REPEATED_CALL.sub("", scope)))


def _aligned(module: list[str], scope: list[str]) -> bool:
    """Whether the end of the scope begins the module path, or the whole scope lies in it from some part on."""
    if any(scope[i:] == module[: len(scope) - i] for i in range(len(scope))):
        return True
    return any(module[i : i + len(scope)] == scope for i in range(len(module)))
