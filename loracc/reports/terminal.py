"""What a person reads: tables on a terminal. The machine-readable side is each result's ``to_json``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loracc.reports.words import CHECKS, byte_count, counted, evidence, flip, number, percent

if TYPE_CHECKING:
    from loracc.estimate import Estimate
    from loracc.extract import ExtractResult
    from loracc.pipeline import FoldResult
    from loracc.proof.verdict import Verification
    from loracc.switching.request import AttachResult
    from loracc.unfolding import UnfoldResult

__all__ = [
    "print_attached",
    "print_bench",
    "print_extraction",
    "print_fold",
    "print_inspection",
    "print_unfolded",
    "print_verification",
]

_STYLE = {"pass": "green", "fail": "bold red", "inconclusive": "yellow", "skipped": "dim"}
#: Rows of a long site table that are shown; --json has them all.
_SHOWN = 12


def print_fold(result: FoldResult, console: Console) -> None:
    """The sites, the verdict and where the output is."""
    several = len({row["adapter"] for row in result.sites}) > 1
    places = len({row["name"] for row in result.sites})
    title = f"{counted(len(result.sites), 'delta')} at {counted(places, 'site')}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    # Deltas of several adapters at one site are rounded together, so what is measured there is their sum's.
    norm = "‖ΣΔW‖/‖W‖" if several else "‖ΔW‖/‖W‖"
    left = ("site", "kind", "bound by", "adapter")
    gained = ["error"] if any("gain" in row for row in result.sites) else []
    for column in (
        "site",
        "kind",
        "rank",
        "scale",
        norm,
        "survived",
        *gained,
        "bound by",
        *(["adapter"] if several else []),
    ):
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    for row in result.sites[:_SHOWN]:
        rank = "-" if row["rank"] is None else str(row["rank"])
        numbers = [number(row["scale"]), number(row["relative_norm"]), percent(row["survived"])]
        numbers += [_gain(row.get("gain"))] if gained else []
        table.add_row(row["name"], row["kind"], rank, *numbers, row["way"], *([row["adapter"]] if several else []))
    if len(result.sites) > _SHOWN:
        table.add_row(f"... and {len(result.sites) - _SHOWN} more (--json lists all)")
    console.print(table)
    if result.calibration is not None and result.calibration["weights"]:  # else a note says why
        console.print(Text(_calibrated(result.calibration, "held-out inputs")))
    for note in result.notes:
        console.print(Text(f"note: {note}"))
    if result.verification is not None:
        print_verification(result.verification, console)
    done = "Would write" if result.dry_run else "Wrote"
    names = [*result.files[:3], *(["..."] if len(result.files) > 3 else [])]
    files = f"; {len(result.files)} files: {', '.join(names)}" if len(names) > 1 else ""
    console.print(Text(f"{done} {result.output} ({byte_count(result.bytes)}{files})"))
    if result.estimate is not None:
        _print_estimate(result, result.estimate, console)
    if result.saved_adapter is not None:
        console.print(Text(f"{done} {result.saved_adapter} (the LoRA of the graph, as a PEFT adapter)"))


def _gain(gain: dict[str, Any] | None) -> str:
    """A site's error with rounding to nearest, and with what was chosen."""
    if gain is None:
        return "-"
    return f"{gain['nearest']:.2g} → {gain['calibrated']:.2g}" if gain["used"] else f"{gain['nearest']:.2g}"


def _calibrated(found: dict[str, Any], inputs: str) -> str:
    """The outputs' error with rounding to nearest, and with what was chosen."""
    nearest, chosen = found["nearest"], found["calibrated"]
    ratio = f" ({nearest / chosen:.2f} times less)" if chosen and chosen < nearest else ""
    return f"calibrated rounding: error of the outputs on {inputs} {nearest:.3g} → {chosen:.3g}{ratio}"


def _print_estimate(result: FoldResult, reckoned: Estimate, console: Console) -> None:
    copied = result.bytes - result.folded_bytes
    seconds = f"{reckoned.seconds:.1f} s" if reckoned.seconds < 60 else f"{reckoned.seconds / 60:.0f} min"
    console.print(
        Text(
            f"{byte_count(result.folded_bytes)} folded, {byte_count(copied)} copied: about {seconds} (longer where the "
            f"disk is slower than memory, or with verification) and {byte_count(reckoned.memory)} of memory"
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
    for name in CHECKS:
        check = body.get(name)
        if check is None:
            continue
        verdict = check["verdict"]
        word = Text(verdict, style=_STYLE.get(verdict, ""))
        table.add_row(name, word, Text(evidence(name, check)), Text(flip(check)))
    console.print(table)
    rounding = (body["numbers"].get("end_to_end") or {}).get("rounding")
    if rounding:
        console.print(Text(_calibrated(rounding, body["numbers"]["end_to_end"]["draws"])))
    for site in (body["numbers"].get("end_to_end") or {}).get("sites", []):
        console.print(Text(f"after {site['site']}: error {number(site['error'])}"))
    for model, scores in ((body["numbers"].get("end_to_end") or {}).get("task") or {}).items():
        console.print(Text(f"{model:8} " + ", ".join(f"{name} {value:.5g}" for name, value in scores.items())))
    unmeasured = " (latency was not measured: --latency)" if body["latency"]["verdict"] == "skipped" else ""
    console.print(Text.assemble("verdict: ", (body["verdict"], _STYLE.get(body["verdict"], "")), unmeasured))


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
        table.add_row(site.name, str(site.rank), number(site.relative_norm), number(site.residual))
    if len(result.sites) > _SHOWN:
        table.add_row(f"... and {len(result.sites) - _SHOWN} more (--json lists all)")
    console.print(table)
    for left in result.left_out[:_SHOWN]:
        what = "saved whole" if left.saved else "not in the adapter (--full saves it whole)"
        console.print(Text(f"{left.name} {left.shape} changed by {number(left.relative_norm)}: {left.reason}; {what}"))
    if len(result.left_out) > _SHOWN:
        console.print(Text(f"... and {len(result.left_out) - _SHOWN} more parameters (--json lists all)"))
    console.print(Text(f"residual of all parameters together: {number(result.residual)}"))
    console.print(Text(f"Wrote {result.output} ({byte_count(result.bytes)})"))


def print_unfolded(result: UnfoldResult, console: Console) -> None:
    """What has the base's value again."""
    for note in result.notes:
        console.print(Text(f"note: {note}"))
    console.print(Text(f"{counted(len(result.restored), 'weight')} restored, {result.unchanged} had the base's bytes"))
    console.print(Text(f"{result.digest}, the base's"))
    console.print(Text(f"Wrote {result.output} ({byte_count(result.bytes)})"))


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
