"""sympy stays away until it is needed, and is itself when it comes; each case in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "code",
    [
        # away after loracc's imports, there at the first arithmetic
        "import loracc.folded, onnx_ir as ir\nassert 'sympy' not in sys.modules\n"
        "d = ir.SymbolicDim('n') * 2 + 1\nassert d.value == '2*n + 1', d.value\nassert 'sympy' in sys.modules",
        # functions kept at import time
        "import loracc.folded, onnx_ir as ir\nd = ir.SymbolicDim('max(n, 4)') + 0\nassert d.evaluate({'n': 2}) == 4",
        # an expression of the real library is known as one
        "import loracc.folded, onnx_ir as ir, sympy\nassert ir.SymbolicDim(sympy.Symbol('k') + 1).value == 'k + 1'",
        # there already: nothing is done
        "import sympy, loracc.folded, onnx_ir as ir\nassert (ir.SymbolicDim('n') * 2).value == '2*n'",
        "import onnx_ir as ir, loracc.folded\nassert (ir.SymbolicDim('n') * 2).value == '2*n'",
        # the import system is as it was
        "before = list(sys.meta_path)\nimport loracc.folded, onnx_ir\n"
        "assert [f for f in sys.meta_path if type(f).__module__ == 'loracc.deferred'] == []\n"
        "assert type(onnx_ir.__loader__).__module__ != 'loracc.deferred'\n"
        "assert type(onnx_ir.__spec__.loader).__module__ != 'loracc.deferred'\n"
        "import importlib.resources\nassert importlib.resources.files('onnx_ir').is_dir()\n"
        "import sympy.core\nassert sympy.Symbol('x') + sympy.Symbol('x') == 2 * sympy.Symbol('x')",
        # an onnx_ir that needs the real one while it is imported
        "import loracc.deferred as d\n"
        "def refuse(self, name):\n    raise TypeError(name)\n"
        "d._StandIn.__getattr__ = refuse\n"
        "import onnx_ir as ir\nassert (ir.SymbolicDim('n') * 2).value == '2*n'\nassert 'sympy' in sys.modules",
    ],
)
def test_sympy_comes_when_it_is_needed(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import sys\n{code}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
