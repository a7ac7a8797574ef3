"""A retrieval data set out of the standard library: what a docstring says → the name it documents.

The first sentence of a docstring is the query ("Decode a JSON document from a string ..."), the qualified
name is what has to be found ("json.JSONDecoder.raw_decode"). Sources are parsed, never imported.

1. Whole top-level modules are held out, chosen by a hash of their name: no module is in two parts, and no other
   Python version moves one to another part.
2. A sentence that documents two names identifies neither, and is dropped; so are names that differ only in case,
   which an uncased model cannot tell apart: their rank would be decided by rounding.
3. The standard library changes between versions, a score must not: the held-out part is a committed file, and only
   the training part is read from the interpreter that runs this.

`python -m samples.minilm.dataset` writes the held-out file anew.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

Part = Literal["train", "dev", "test"]

HELD_OUT_FILE = Path(__file__).with_name("heldout.tsv")
# Tests, programs, jokes, and what Python 3.12 removed: no documentation of today's library.
EXCLUDED = frozenset(
    {
        "antigravity",
        "distutils",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "test",
        "this",
        "turtledemo",
    }
)
MIN_WORDS, MAX_WORDS = 4, 40
# No module of hundreds of functions may decide the score alone.
HELD_OUT_PER_MODULE = 60
# A full stop ends a sentence unless it belongs to an abbreviation or a number.
SENTENCE = re.compile(r".+?(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)[.!?](?=\s|$)")
SIGNATURE = re.compile(r"^[\w.]+\([^)]*\)")


class Pair(NamedTuple):
    """A name, and the query that it alone answers."""

    name: str
    query: str

    @property
    def module(self) -> str:
        """The top-level module: the unit that is held out."""
        return self.name.partition(".")[0]


def part_of(module: str) -> Part:
    """Where a top-level module belongs, whatever the Python version (rule 1)."""
    bucket = hashlib.sha256(module.encode()).digest()[0] % 10
    return "test" if bucket < 2 else "dev" if bucket == 2 else "train"


def stdlib_pairs(root: Path | None = None) -> list[Pair]:
    """Every (first sentence, qualified name) of the standard library under `root`, sorted by name."""
    root = root or Path(sysconfig.get_path("stdlib"))
    found: dict[str, str] = {}
    for module, path in sorted(_public_modules(root)):
        tree = ast.parse(path.read_bytes())
        for name, docstring in _documented(tree, module):
            sentence = first_sentence(docstring)
            if sentence is not None:
                found.setdefault(name, sentence)
    exported = _reexports(root)
    pairs = {_public_name(name, exported): query for name, query in found.items()}
    uses = Counter(text.casefold() for pair in pairs.items() for text in pair)
    return sorted(Pair(*pair) for pair in pairs.items() if all(uses[text.casefold()] == 1 for text in pair))


def training_pairs(part: Part = "train") -> list[Pair]:
    """One part of this interpreter's own library, without any sentence of the held-out file."""
    forbidden = {pair.query.casefold() for pair in held_out_pairs()}
    return [p for p in stdlib_pairs() if part_of(p.module) == part and p.query.casefold() not in forbidden]


def held_out_pairs(path: Path = HELD_OUT_FILE) -> list[Pair]:
    """The committed evaluation set: the queries, and as candidates all its names."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Pair(*line.split("\t")) for line in lines if not line.startswith("#")]


def first_sentence(docstring: str) -> str | None:
    """The docstring's first sentence on one line, or None where it is no usable description.

    >>> first_sentence("Return the name,\\n  e.g. a path.  More follows.")
    'Return the name, e.g. a path.'
    >>> first_sentence("Internal.") is None
    True
    """
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    match = SENTENCE.match(paragraph)
    sentence = match.group() if match else paragraph
    if SIGNATURE.match(sentence) or not sentence.isascii():
        return None
    return sentence if MIN_WORDS <= len(sentence.split()) <= MAX_WORDS else None


def _public_modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Dotted name and file of every module that is part of the documented library.

    `_pydecimal` is where the source of `decimal` lives, and `_pydatetime` that of `datetime` since 3.12; a private
    module inside a package (`pathlib._local`) is an implementation detail of the package.
    """
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        top = re.sub(r"^_py_?", "", parts[0])
        inner = [part for part in parts[1:] if not part.startswith("_")]
        if _is_public(top) and "tests" not in inner:
            yield ".".join([top, *inner]), path


def _is_public(top: str) -> bool:
    return top in sys.stdlib_module_names and top not in EXCLUDED and not top.startswith("_")


def _documented(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    """Qualified name and docstring of every public class and function below `node`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try | ast.With):
            yield from _documented(child, prefix)
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and child.name[0] != "_":
            name = f"{prefix}.{child.name}"
            docstring = ast.get_docstring(child)
            if docstring:
                yield name, docstring
            if isinstance(child, ast.ClassDef):
                yield from _documented(child, name)


def _reexports(root: Path) -> dict[str, str]:
    """`json.decoder.JSONDecoder` → `json.JSONDecoder`, for what a package's `__init__` imports from its modules."""
    renamed: dict[str, str] = {}
    for init in sorted(root.glob("*/__init__.py")):
        package = init.parent.name
        if not _is_public(package):
            continue
        for node in ast.parse(init.read_bytes()).body:
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 1:
                for item in node.names:
                    renamed[f"{package}.{node.module}.{item.name}"] = f"{package}.{item.asname or item.name}"
    return renamed


def _public_name(name: str, exported: dict[str, str]) -> str:
    """The name a user would import, where the package offers a shorter one."""
    parts = name.split(".")
    for length in range(len(parts), 1, -1):
        short = exported.get(".".join(parts[:length]))
        if short:
            return ".".join([short, *parts[length:]])
    return name


def _capped(pairs: list[Pair], limit: int) -> list[Pair]:
    """At most `limit` pairs of each module, picked by a hash so that no prefix is favoured."""
    picked: Counter[str] = Counter()
    kept = []
    for pair in sorted(pairs, key=lambda pair: hashlib.sha256(pair.name.encode()).digest()):
        picked[pair.module] += 1
        if picked[pair.module] <= limit:
            kept.append(pair)
    return sorted(kept)


def main() -> None:
    """Write the held-out file from the library of the running interpreter."""
    pairs = _capped([pair for pair in stdlib_pairs() if part_of(pair.module) == "test"], HELD_OUT_PER_MODULE)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    head = f"# What docstrings of CPython {version}'s standard library (PSF-2.0) document, and their first sentences."
    lines = [head, *("\t".join(pair) for pair in pairs)]
    HELD_OUT_FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{HELD_OUT_FILE.name}: {len(pairs)} pairs of {len({p.module for p in pairs})} modules")


if __name__ == "__main__":
    main()
