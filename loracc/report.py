"""What a person reads: tables on a terminal. The machine-readable side is each result's ``to_json``."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loracc.errors import InputError

if TYPE_CHECKING:
    from loracc.estimate import Estimate
    from loracc.extract import ExtractResult
    from loracc.pipeline import FoldResult
    from loracc.switching.request import AttachResult
    from loracc.unfolding import UnfoldResult
    from loracc.verdict import Verification

__all__ = [
    "print_attached",
    "print_bench",
    "print_extraction",
    "print_fold",
    "print_inspection",
    "print_unfolded",
    "print_verification",
    "write_junit",
    "write_report",
    "write_text",
]

_STYLE = {"pass": "green", "fail": "bold red", "inconclusive": "yellow", "skipped": "dim"}
#: Rows of a long site table that are shown; --json has them all.
_SHOWN = 12


def counted(number: int, thing: str) -> str:
    """``1 site``, ``2 sites``."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def print_fold(result: FoldResult, console: Console) -> None:
    """The sites, the verdict and where the output is."""
    several = len({row["adapter"] for row in result.sites}) > 1
    places = len({row["name"] for row in result.sites})
    title = f"{counted(len(result.sites), 'delta')} at {counted(places, 'site')}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    # Deltas of several adapters at one site are rounded together, so what is measured there is their sum's.
    norm = "‖ΣΔW‖/‖W‖" if several else "‖ΔW‖/‖W‖"
    left = ("site", "kind", "bound by", "adapter")
    for column in ("site", "kind", "rank", "scale", norm, "survived", "bound by", *(["adapter"] if several else [])):
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    for row in result.sites[:_SHOWN]:
        rank = "-" if row["rank"] is None else str(row["rank"])
        numbers = (_number(row["scale"]), _number(row["relative_norm"]), _percent(row["survived"]))
        table.add_row(row["name"], row["kind"], rank, *numbers, row["way"], *([row["adapter"]] if several else []))
    if len(result.sites) > _SHOWN:
        table.add_row(f"... and {len(result.sites) - _SHOWN} more (--json lists all)")
    console.print(table)
    for note in result.notes:
        console.print(Text(f"note: {note}"))
    if result.verification is not None:
        print_verification(result.verification, console)
    done = "Would write" if result.dry_run else "Wrote"
    names = [*result.files[:3], *(["..."] if len(result.files) > 3 else [])]
    files = f"; {len(result.files)} files: {', '.join(names)}" if len(names) > 1 else ""
    console.print(Text(f"{done} {result.output} ({_bytes(result.bytes)}{files})"))
    if result.estimate is not None:
        _print_estimate(result, result.estimate, console)
    if result.saved_adapter is not None:
        console.print(Text(f"{done} {result.saved_adapter} (the LoRA of the graph, as a PEFT adapter)"))


def _print_estimate(result: FoldResult, reckoned: Estimate, console: Console) -> None:
    copied = result.bytes - result.folded_bytes
    seconds = f"{reckoned.seconds:.1f} s" if reckoned.seconds < 60 else f"{reckoned.seconds / 60:.0f} min"
    console.print(
        Text(
            f"{_bytes(result.folded_bytes)} folded, {_bytes(copied)} copied: about {seconds} (longer where the disk is "
            f"slower than memory, or with verification) and {_bytes(reckoned.memory)} of memory"
        )
    )


def print_attached(result: AttachResult, console: Console) -> None:
    """The adapters, the sites, the verdict and where the output is."""
    table = Table(title=f"{result.mode}: {counted(len(result.adapters), 'adapter')}", title_justify="left", box=None)
    for column in result.adapters[0] if result.adapters else ():
        table.add_column(column, justify="left" if column in ("name", "file") else "right", overflow="fold")
    for row in result.adapters[:_SHOWN]:
        table.add_row(*(str(value) for value in row.values()))
    if len(result.adapters) > _SHOWN:
        table.add_row(f"... and {len(result.adapters) - _SHOWN} more (--json lists all)")
    console.print(table)
    print_fold(result, console)
    off = result.verification.to_json().get("off") if result.verification is not None else None
    if off is not None:
        said = off["reason"] or "the base's outputs, bit for bit"
        console.print(Text(f"without an adapter: {off['verdict']}: {said}"))


def print_verification(verification: Verification, console: Console) -> None:
    """One row a check: verdict, evidence, and what would have flipped it."""
    body = verification.to_json()
    table = Table(title="verification", title_justify="left", box=None, pad_edge=False)
    for column in ("check", "verdict", "evidence", "what would flip it"):
        table.add_column(column, overflow="fold")
    for name in ("numbers", "structure", "latency"):
        check = body.get(name)
        if check is None:
            continue
        verdict = check["verdict"]
        flip = (check.get("threshold") or {}).get("text", "")
        table.add_row(name, Text(verdict, style=_STYLE.get(verdict, "")), Text(_evidence(name, check)), Text(flip))
    console.print(table)
    for site in (body["numbers"].get("end_to_end") or {}).get("sites", []):
        console.print(Text(f"after {site['site']}: error {_number(site['error'])}"))
    for model, scores in ((body["numbers"].get("end_to_end") or {}).get("task") or {}).items():
        console.print(Text(f"{model:8} " + ", ".join(f"{name} {value:.5g}" for name, value in scores.items())))
    unmeasured = " (latency was not measured: --latency)" if body["latency"]["verdict"] == "skipped" else ""
    console.print(Text.assemble("verdict: ", (body["verdict"], _STYLE.get(body["verdict"], "")), unmeasured))


def _evidence(name: str, check: dict[str, Any]) -> str:
    if check.get("reason"):
        return str(check["reason"])
    if name == "numbers" and check.get("max_relative_error") is not None:
        measured = f"max relative error {_number(check['max_relative_error'])}, tolerance {_number(check['tolerance'])}"
        return f"{measured} ({check['measured_on']}); {check['summary']}"
    if name == "latency" and check.get("ratio") is not None:
        low, high = check["interval"]
        return f"ratio {check['ratio']:.4f}, 95 % interval [{low:.4f}, {high:.4f}], margin ±{check['margin']:.3g}"
    return str(check.get("summary", ""))


def print_bench(rows: list[dict[str, Any]], console: Console) -> None:
    """One row a model, against the first, in each setting."""
    settings = len({(row.get("batch"), row.get("sequence")) for row in rows}) > 1
    table = Table(box=None, pad_edge=False)
    size = ["batch", "sequence"] if settings else []
    for column in ("model", *size, "median ms", "ratio", "95 % interval", "verdict"):
        table.add_column(column, justify="left" if column in ("model", "verdict") else "right", overflow="fold")
    for row in rows:
        low, high = row["interval"]
        word = row["verdict"] if row["comparison"] == "equal" else f"{row['verdict']} ({row['comparison']})"
        table.add_row(
            row["model"], *(str(row[name]) for name in size), f"{row['median_ms']:.3f}", f"{row['ratio']:.4f}",
            f"[{low:.4f}, {high:.4f}]", Text(word, style=_STYLE.get(row["verdict"], "")),
        )  # fmt: skip
    console.print(table)
    for reason in dict.fromkeys(row["reason"] for row in rows if row["verdict"] == "inconclusive"):
        console.print(Text(reason))


def print_extraction(result: ExtractResult, console: Console) -> None:
    """What every delta leaves of the difference, what no delta holds, and where the adapter is."""
    table = Table(title=f"{len(result.sites)} deltas extracted", title_justify="left", box=None, pad_edge=False)
    for column in ("weight", "rank", "‖ΔW‖/‖W‖", "residual"):
        table.add_column(column, justify="left" if column == "weight" else "right", overflow="fold")
    for site in result.sites[:_SHOWN]:
        table.add_row(site.name, str(site.rank), _number(site.relative_norm), _number(site.residual))
    if len(result.sites) > _SHOWN:
        table.add_row(f"... and {len(result.sites) - _SHOWN} more (--json lists all)")
    console.print(table)
    for left in result.left_out[:_SHOWN]:
        what = "saved whole" if left.saved else "not in the adapter (--full saves it whole)"
        console.print(Text(f"{left.name} {left.shape} changed by {_number(left.relative_norm)}: {left.reason}; {what}"))
    if len(result.left_out) > _SHOWN:
        console.print(Text(f"... and {len(result.left_out) - _SHOWN} more parameters (--json lists all)"))
    console.print(Text(f"residual of all parameters together: {_number(result.residual)}"))
    console.print(Text(f"Wrote {result.output} ({_bytes(result.bytes)})"))


def print_unfolded(result: UnfoldResult, console: Console) -> None:
    """What has the base's value again."""
    for note in result.notes:
        console.print(Text(f"note: {note}"))
    console.print(Text(f"{counted(len(result.restored), 'weight')} restored, {result.unchanged} had the base's bytes"))
    console.print(Text(f"{result.digest}, the base's"))
    console.print(Text(f"Wrote {result.output} ({_bytes(result.bytes)})"))


def print_inspection(found: dict[str, Any], console: Console, *, sites: bool = False) -> None:
    """What a file is and what is in it."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("field", style="dim")
    table.add_column("value", overflow="fold")
    for key, value in found.items():
        if key == "lora":
            continue
        if key == "count":
            share = f" of {value['total']:,} ({100 * value['share']:.3g} %)" if "total" in value else ""
            table.add_row("trainable", f"{value['trainable']:,}{share}")
            continue
        if key in ("sites", "entries"):
            table.add_row(key, str(len(value)))
        elif key == "made_by_loracc":
            table.add_row("made by loracc", "\n".join(_origin(value)))
        elif isinstance(value, dict):
            table.add_row(key, ", ".join(f"{k}: {v}" for k, v in value.items()) or "-")
        elif isinstance(value, list):
            table.add_row(key, "\n".join(str(item) for item in value[:_SHOWN]) or "-")
        else:
            table.add_row(key, str(value))
    console.print(table)
    if "lora" in found:
        _print_lora(found["lora"], console)
    rows = found.get("entries") or (found.get("sites") if sites else None) or []
    if rows:
        listing = Table(box=None, pad_edge=False)
        for column in rows[0]:
            listing.add_column(column, overflow="fold")
        for row in rows if sites else rows[:_SHOWN]:
            listing.add_row(*("-" if value is None else str(value) for value in row.values()))
        console.print(listing)
        if not sites and len(rows) > _SHOWN:
            console.print(Text(f"... and {len(rows) - _SHOWN} more (--sites or --json lists all)"))


def _print_lora(lora: dict[str, Any], console: Console) -> None:
    """LoRA inside a graph, and what only looks like it."""
    if lora["found"]:
        places = len({row["name"] or row["initializer"] for row in lora["found"]})
        console.print(Text(f"LoRA in the graph: {counted(len(lora['found']), 'delta')} at {counted(places, 'weight')}"))
        listing = Table(box=None, pad_edge=False)
        for column in lora["found"][0]:
            listing.add_column(column, overflow="fold")
        for row in lora["found"][:_SHOWN]:
            listing.add_row(*("-" if value in (None, "") else str(value) for value in row.values()))
        console.print(listing)
        if len(lora["found"]) > _SHOWN:
            console.print(Text(f"... and {len(lora['found']) - _SHOWN} more (--json lists all)"))
    for row in lora["lookalikes"]:
        console.print(Text(f"looks like LoRA and is not: {row['where']}: {row['reason']}"))


def _origin(record: dict[str, Any]) -> list[str]:
    """From what a file was made, for a person."""
    base = record["base"]
    lines = [f"base: {base['format']}, {counted(base['tensors'], 'tensor')}, {base['digest']}"]
    for one in record["adapters"]:
        strength = "" if one["weight"] == 1.0 else f" at {one['weight']:g} of its strength"
        lines.append(f"adapter {one['name']}: {one['format']}, {one['digest']}{strength}")
    if not record["adapters"]:
        lines.append("adapter: LoRA found in the base's own graph")
    lines.append(f"folded: {counted(len(record['sites']), 'delta')} (--json lists all)")
    lines += [f"{key}: {value}" for key, value in record["options"].items()]
    return [*lines, "versions: " + ", ".join(f"{name} {number}" for name, number in record["versions"].items())]


def check_reports(paths: Sequence[str | Path], others: Sequence[Path], *, endings: Sequence[str] = (".json",)) -> None:
    """Refuse reports that cannot be written, or that would replace a part of ``others``, before any work is done.

    Raises:
        InputError: The ending is another, the folder is missing or not writable, or the path is an input or the output.
    """
    for path in map(Path, paths):
        if endings and path.suffix.lower() not in endings:
            raise InputError(f"{path}: written as {' or '.join(endings)}.", hint=f"Name it {path.stem}{endings[0]}.")
        if path.is_dir() or not os.access(path.absolute().parent, os.W_OK | os.X_OK):
            raise InputError(f"{path}: cannot be written: its folder is missing or not writable, or it is a folder.")
        here = path.resolve()
        for other in (other.resolve() for other in others):
            if here == other or other in here.parents:
                raise InputError(f"{path}: the report would replace a part of {other}.", hint="Choose another name.")


def write_report(body: dict[str, Any], path: str | Path) -> None:
    """Write a result as JSON.

    Raises:
        InputError: The file cannot be written.
    """
    write_text(Path(path), json.dumps(body, indent=2) + "\n")


def write_junit(body: dict[str, Any], path: str | Path) -> None:
    """Write a verification as JUnit XML: one test case a check.

    Raises:
        InputError: The file cannot be written.
    """
    checks = {name: body[name] for name in ("numbers", "structure", "latency") if name in body}
    counts = {
        "tests": len(checks),
        "failures": sum(check["verdict"] in ("fail", "inconclusive") for check in checks.values()),
        "skipped": sum(check["verdict"] == "skipped" for check in checks.values()),
    }
    suite = ElementTree.Element("testsuite", {"name": "loracc", **{key: str(value) for key, value in counts.items()}})
    for name, check in checks.items():
        case = ElementTree.SubElement(suite, "testcase", classname="loracc.verify", name=name)
        if check["verdict"] in ("fail", "inconclusive"):
            ElementTree.SubElement(case, "failure", message=_evidence(name, check), type=check["verdict"])
        elif check["verdict"] == "skipped":
            ElementTree.SubElement(case, "skipped", message=_evidence(name, check))
        ElementTree.SubElement(case, "system-out").text = json.dumps(check, indent=2)
    ElementTree.indent(suite)
    write_text(Path(path), ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        InputError: The file cannot be written.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}.") from error
