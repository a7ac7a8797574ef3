"""The verifier measured: which check catches which planted fault, and how many correct folds are called wrong.

python -m tests.benchmarks.mutations [--folds 200]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from loracc.proof.verdict import Verification
from loracc.proof.verification import VerifyOptions, verify
from tests.mutants import FAULTS, base_of, bindings_of, random_fold
from tests.verifying import write

OPTIONS = VerifyOptions(threads=1)


def caught_by(found: Verification) -> list[str]:
    """The checks that said no."""
    numbers, structure = found.numbers, found.structure
    names = {"weights": numbers.weights.verdict, "end to end": numbers.end_to_end.verdict, "graph": structure.verdict}
    return [name for name, verdict in names.items() if verdict == "fail"]


def faults() -> int:
    """The table; how many were missed."""
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        for fault in FAULTS:
            base = base_of(fault.model, fault.dtype)
            bindings = bindings_of(base, fault.model, dora=fault.dora)
            out = write(base, fault.make(base, bindings), Path(folder) / "wrong.onnx")
            found = verify(base, out, bindings, OPTIONS)
            missed += found.verdict != "fail"
            where = ", ".join(caught_by(found)) or "MISSED"
            print(f"{fault.name:38} {fault.model:10} {where:28} {found.reason[:110]}", flush=True)
    print(f"{len(FAULTS)} faults, {missed} missed")
    return missed


def folds(count: int) -> int:
    """How many correct folds were not passed."""
    wrong = 0
    kinds: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(count):
            base, path, bindings, what = random_fold(seed, Path(folder))
            found = verify(base, path, bindings, OPTIONS)
            kinds.update(binding.delta.kind for binding in bindings)
            if found.verdict != "pass":
                wrong += 1
                print(f"FALSE ALARM {seed}: {what}: {found.reason}", flush=True)
    print(
        f"{count} correct folds ({', '.join(f'{n} {kind}' for kind, n in kinds.most_common())}), {wrong} false alarms"
    )
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", type=int, default=200)
    arguments = parser.parse_args()
    return int(bool(faults() + folds(arguments.folds)))


if __name__ == "__main__":
    sys.exit(main())
