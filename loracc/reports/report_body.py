"""What a report says, as JSON: a result's own contract, and beside it what only a report carries.

Every form of a report is made of this and of nothing else, so a page can be drawn again from its ``.json``. The schema
is docs/report.schema.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from loracc import __version__
from loracc.reports.report_command import command_line

if TYPE_CHECKING:
    import onnx_ir as ir

    from loracc.adapter import Adapter
    from loracc.folded import Binding
    from loracc.model import BaseModel

__all__ = ["SCHEMA", "deltas_of", "gathered", "report_body", "verification_of"]

SCHEMA = 1
#: Packages whose versions a reader may ask for; those that are not installed are left out.
_PACKAGES = ("numpy", "onnx-ir", "onnxruntime", "torch", "transformers", "tensorrt")
_MEASURED = ("relative_norm", "survived")
_JUDGED = ("verdict", "correctly_rounded", "worst_excess", "max_relative_error", "reason")


def report_body(kind: str, result: dict[str, Any], facts: dict[str, Any] | None = None) -> dict[str, Any]:
    """A report.

    Args:
        kind: "fold", "attach" or "verify".
        result: The result's ``to_json``; its keys stay where they are.
        facts: Of :func:`gathered`; None where nothing was bound (engines, variants added to a deployment).
    """
    facts = facts or {}
    body = {"schema": SCHEMA, "report": kind, **result}
    body["deltas"] = [_measured(row, result) for row in facts.get("deltas", [])]
    body["rounding_errors"] = facts.get("rounding_errors")
    body["provenance"] = {
        "command": command_line(),
        "versions": _versions(),
        **facts.get("provenance", {"base": None, "adapters": [], "output": None}),
    }
    return body


def gathered(
    base: BaseModel,
    adapters: Sequence[Adapter],
    bindings: Sequence[Binding],
    folded: ir.Model | None = None,
    made: BaseModel | None = None,
) -> dict[str, Any]:
    """What the models and deltas say beyond a result.

    Args:
        base: The original, before anything was raised or bound.
        adapters: As they were read.
        bindings: The deltas at their sites.
        folded: What a fold of them computes; None where nothing is folded.
        made: What was written; None where nothing was, or it is no model that loracc reads.
    """
    from loracc.reports.report_facts import delta_facts, rounding_errors

    return {
        "deltas": delta_facts(bindings),
        "rounding_errors": rounding_errors(folded, made.ir) if folded is not None and made is not None else None,
        "provenance": {
            "base": _identity(base),
            "adapters": [
                {"name": one.name, "format": one.format, "digest": f"sha256:{one.digest}", "weight": one.weight}
                for one in adapters
            ],
            "output": _identity(made) if made is not None else None,
        },
    }


def verification_of(body: dict[str, Any]) -> dict[str, Any]:
    """The verdicts in a report of any kind."""
    found: dict[str, Any] = body if "numbers" in body else body.get("verification") or {"verdict": "skipped"}
    return found


def deltas_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the deltas; of a report that knows no more, the result's own."""
    rows: list[dict[str, Any]] = body.get("deltas") or body.get("sites") or []
    return rows


def _identity(model: BaseModel) -> dict[str, Any]:
    from loracc.provenance import identify

    return {"name": model.path.name, **vars(identify(model))}


def _measured(row: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """A delta's row with what was measured at its site: by the fold, and by the verification."""
    measured: dict[str, Any] = dict.fromkeys((*_MEASURED, *_JUDGED))
    for site in result.get("sites", []):
        if (site["name"], site["adapter"]) == (row["name"], row["adapter"]):
            measured |= {key: site[key] for key in _MEASURED}
    for site in _judged_sites(result):
        if row["name"] in site["name"].split(", "):
            measured |= {key: site[key] for key in _JUDGED}
            measured |= {key: site[key] for key in _MEASURED if measured[key] is None}
    return {**row, **measured}


def _judged_sites(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from verification_of(result).get("numbers", {}).get("weights", {}).get("sites", [])


def _versions() -> dict[str, str]:
    found = {"loracc": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
