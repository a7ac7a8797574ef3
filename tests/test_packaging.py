"""The wheel's exact top level, and what importing the package costs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "onnxruntime", "transformers", "tensorrt", "peft")


def test_wheel_has_one_top_level_name(tmp_path: Path) -> None:
    # From a copy: setuptools would pack deleted modules again out of a stale build folder.
    tree = tmp_path / "tree"
    skip = shutil.ignore_patterns(".*", "*.so", "build", "tests", "samples", "docs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=skip)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(tree)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"loracc"}
    in_tree = {
        str(Path("loracc") / path.relative_to(ROOT if folder != "loracc" else ROOT / "loracc"))
        for folder in ("loracc", "passes", "targets")
        for path in (ROOT / folder).rglob("*.py")
        if path.relative_to(ROOT).parts[:2] not in (("loracc", "passes"), ("loracc", "targets"))
    }
    assert {name for name in names if name.endswith(".py")} == in_tree
    assert "loracc/py.typed" in names
    assert "loracc/_kernels.pyi" in names
    compiler = shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    built = [name for name in names if name.startswith("loracc/_kernels.") and not name.endswith(".pyi")]
    assert bool(built) == bool(compiler and header.is_file()), "the kernel is built where it can be, and only there"


def test_installs_without_a_compiler(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    skip = shutil.ignore_patterns(".*", "*.so", "build", "tests", "samples", "docs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=skip)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(tree)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "CC": "false"})
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "loracc/kernel.py" in names
    assert not [name for name in names if name.endswith((".so", ".pyd"))]


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys; from loracc.cli import run; code = run(['--help']); "
        f"loaded = [m for m in {HEAVY!r} + ('onnx_ir', 'numpy') if m in sys.modules]; print(loaded); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_import_loads_nothing_heavy() -> None:
    program = f"import sys, loracc; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
