"""What in a ``.pt2`` archive could run code when torch loads it.

``torch.export.load`` unpickles sample inputs (with a fallback to full unpickling), pickled weights and custom objects,
loads compiled libraries, evaluates symbolic expressions with sympy's ``sympify`` (which is ``eval``) and resolves call
targets by attribute (``torch.os.system`` is one). loracc loads an archive only when it has none of these, unless the
user vouches for it with ``--allow-pickle``. Sample inputs are left out of what torch sees and read on their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from loracc.sources.pt2_archive import Pt2Archive

__all__ = ["unsafe_parts"]

#: Functions in symbolic expressions: torch's own (torch/_export/serde/serialize.py) and sympy's, as ``srepr`` has them.
_FUNCTIONS = frozenset(
    """
    FloorDiv ModularIndexing Where PythonMod Mod CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift PowByNatural
    FloatPow FloatTrueDiv IntTrueDiv IsNonOverlappingAndDenseIndicator TruncToFloat TruncToInt RoundToInt RoundDecimal
    ToFloat Identity Symbol Integer Float Rational Min Max Abs Pow Add Mul And Or Not Xor Piecewise ExprCondPair
    Equality Unequality StrictLessThan LessThan StrictGreaterThan GreaterThan Eq Ne Lt Le Gt Ge floor ceiling sqrt
    """.split()  # noqa: SIM905
)
_QUOTED = re.compile(r"'[\w.+-]*'", re.ASCII)
_EXPRESSION = re.compile(r"[\w\s+\-*/%(),<>=&|~.]{1,10000}", re.ASCII)
_CALL = re.compile(r"(\w+)\s*\(", re.ASCII)
_TARGET = re.compile(
    r"torch\.ops\.(?P<namespace>[A-Za-z]\w*)\.(?P<op>\w+)(\.[A-Za-z]\w*)?"
    r"|_operator\.(?P<operator>\w+)"
    r"|torch\.sym_\w+|torch\._sym_\w+"
    r"|math\.\w+",
    re.ASCII,
)
#: Arithmetic on sizes, and picking an output.
_OPERATORS = frozenset(
    """
    add sub mul truediv floordiv mod pow neg pos abs eq ne lt le gt ge and_ or_ xor not_ lshift rshift getitem
    """.split()  # noqa: SIM905
)
#: ``torch.ops``' own attributes that are no namespaces of operators.
_NO_NAMESPACE = frozenset({"load_library", "loaded_libraries", "import_module"})
_DUNDER_OPS = frozenset(f"__{mark}{op}__" for mark in ("", "i") for op in ("and", "or", "xor", "lshift", "rshift"))


def unsafe_parts(archive: Pt2Archive, program: Any) -> list[str]:
    """Reasons not to load the archive, empty when there are none.

    Args:
        program: The parsed ``models/model.json``.
    """
    return list(dict.fromkeys((*_pickles(archive), *_graph(program))))


def _pickles(archive: Pt2Archive) -> Iterator[str]:
    for name, payload in (*archive.weights.items(), *archive.constants.items()):
        if payload.pickled:
            yield f"{name!r} is pickled ({payload.record})"
    for name in archive.records:
        if name.startswith("data/aotinductor/"):
            yield "it holds compiled code (data/aotinductor)"
        if name.startswith("models/") and name.endswith(".json") and name != "models/model.json":
            yield f"it holds a second program ({name})"


def _graph(part: Any) -> Iterator[str]:
    """Walk the JSON without recursion: it may be nested as deeply as its reader allows."""
    pending = [part]
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending.extend(reversed(item))
        elif isinstance(item, dict):
            if "inputs" in item and "outputs" in item and "target" in item and not _safe_target(item["target"]):
                yield f"it calls {str(item['target'])[:80]!r}, which is no operator"
            if "expr_str" in item and not _safe_expression(item["expr_str"]):
                yield f"it evaluates {str(item['expr_str'])[:80]!r}, which is no size"
            pending.extend(reversed(item.values()))


def _safe_target(target: Any) -> bool:
    match = _TARGET.fullmatch(target) if isinstance(target, str) else None
    if match is None:
        return False
    if match["operator"]:
        return match["operator"] in _OPERATORS
    if match["namespace"]:
        op = match["op"]
        return match["namespace"] not in _NO_NAMESPACE and (not op.startswith("__") or op in _DUNDER_OPS)
    return "__" not in target


def _safe_expression(text: Any) -> bool:
    """Numbers, names, operators and calls of known functions; no attribute, no string but a symbol's name."""
    if not isinstance(text, str) or "__" in text or re.search(r"\D\.|\.\D|\.$", text):
        return False
    plain = _QUOTED.sub("x", text)
    return bool(_EXPRESSION.fullmatch(plain)) and all(name in _FUNCTIONS for name in _CALL.findall(text))
