"""Imports point one way (DESIGN.md 7): each module may import only modules of its own layer or of a lower one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: Lowest first. A module belongs to the first layer that has a pattern for it.
LAYERS = (
    ("errors", "interrupts", "json_file", "quiet", "deferred", "devices", "combine_methods", "tasks", "random_nodes"),
    ("dtypes", "algebra.*", "blas", "rows", "kernel", "_kernels"),
    ("adapter", "deltas", "kinds.*"),
    ("sites", "tensors", "fused", "concatenated"),
    ("encodings.*",),
    ("folded", "requantized", "calibrated", "calibrated_codes", "facts"),
    ("model", "progress", "manifest", "slot_layout"),
    ("passes.*",),
    ("sources.*", "formats.*", "streaming", "file_space", "parallel", "staging"),
    ("targets.*",),
    ("runners.*", "timing.*", "provenance", "decoder_inputs", "sample_inputs"),
    ("proof.verdict.*", "proof.coverage"),
    ("tokenizing",),
    ("task_data",),
    ("proof.*", "bench_grid"),
    ("calibration.*", "rounding_spec"),
    ("reports.*", "bench_files", "inspection", "counting"),
    ("lower", "job", "estimate", "packed_factors", "manifest_check"),
    ("content",),
    ("binding", "loading", "fold_result", "save_raised", "combine", "recorded", "lowered"),
    ("pipeline", "proving", "engines.*", "runtime.*", "benching", "unfolding", "convert", "extract"),
    ("switching.*",),
    ("commands.*",),
    ("cli", "pytest_plugin"),
    ("__init__", "__main__"),
)
#: The Python API's doorway loads everything lazily, and may be imported by nobody inside.
HEAVY = {"torch", "transformers", "onnxruntime", "peft", "tensorrt", "tensorrt_rtx", "matplotlib", "tensorrt_bindings"}


def modules() -> dict[str, Path]:
    found = {}
    for folder in ("loracc", "passes", "targets"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] in (("loracc", "passes"), ("loracc", "targets")):
                continue  # the symlinks
            name = ".".join(parts[1:] if parts[0] == "loracc" else parts)
            found[name.removesuffix(".__init__")] = path
    return found


def layer_of(name: str) -> int:
    for index, patterns in enumerate(LAYERS):
        if any(re.fullmatch(pattern.replace(".*", r"([._].*)?"), name) for pattern in patterns):
            return index
    raise AssertionError(f"module {name} has no layer: add it to LAYERS")


def imported(path: Path, *, top_level: bool) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = _top_level(tree.body) if top_level else ast.walk(tree)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            if node.module in ("loracc", "loracc.commands"):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _top_level(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements that run at import: a TYPE_CHECKING block does not."""
    return [node for node in body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))]


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_down(name: str) -> None:
    here = layer_of(name)
    known = modules()
    for target in imported(modules()[name], top_level=True):
        if not target.startswith("loracc."):
            continue
        other = target.removeprefix("loracc.")
        while other and other not in known:
            other = other.rpartition(".")[0]
        if other and not other.startswith("commands") and layer_of(other) > here:
            raise AssertionError(f"{name} imports {other}, which is above it")


@pytest.mark.parametrize("name", sorted(modules()))
def test_heavy_libraries_are_imported_where_they_are_needed(name: str) -> None:
    roots = {target.partition(".")[0] for target in imported(modules()[name], top_level=True)}
    assert not roots & HEAVY


def test_the_tree_is_found() -> None:
    assert {"errors", "folded", "passes", "targets", "cli", "pipeline"} <= set(modules())
