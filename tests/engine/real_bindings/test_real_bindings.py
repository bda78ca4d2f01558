"""Our plugins, builder and runtime through NVIDIA's real Python layer of TensorRT 11, over stub libraries.

``make setup`` puts the package ``tensorrt-cu13-bindings`` beside the environment, without the libraries that
it belongs to, which need a GPU. What the bindings make of a call, of a failure and of memory is NVIDIA's own
code here; what TensorRT would do with it is not.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from anchorline.engine.plugin_library import build_plugin_library

HERE = Path(__file__).resolve().parent
SCENARIOS = HERE / "on_bindings.py"
BINDINGS = Path(sys.prefix) / "tensorrt-bindings"
LIBCUDA = HERE.parents[1] / "runtime" / "tensorrt" / "libcuda_stub.c"
LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")
PLUGINS = "libanchorline_plugins.so"
META = (
    "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"  # as in NVIDIA's package
)
NAMES = [
    item.name
    for item in ast.parse(SCENARIOS.read_text(encoding="utf-8")).body
    if isinstance(item, ast.FunctionDef) and not item.args.args and not item.args.kwarg
]


@pytest.fixture(scope="session")
def stubs(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """A folder with the stub libraries and the package ``tensorrt``."""
    if not (BINDINGS / "tensorrt_bindings" / "tensorrt.so").is_file():
        pytest.skip("needs tensorrt-cu13-bindings, which `make setup` installs on Linux for x86-64")
    pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
    if not shutil.which("g++") or not shutil.which("gcc"):
        pytest.skip("needs gcc and g++ to build stubs of TensorRT's libraries")

    def make(folder: Path) -> None:
        def build(compiler: str, name: str, *sources: str) -> None:
            options = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror"]
            command = [compiler, *options, *sources, "-o", str(folder / name), f"-Wl,-soname,{name}", "-ldl"]
            subprocess.run(command, check=True, timeout=120)

        build("g++", f"{LIBRARIES[0]}.so.11", "-std=c++17", str(HERE / "stub_tensorrt.cpp"))
        for name in LIBRARIES[1:]:  # what the bindings want of these is in the first
            build("gcc", f"{name}.so.11")
        build("gcc", "libcuda.so.1", str(LIBCUDA))
        build_plugin_library(folder / PLUGINS)
        (folder / "tensorrt").mkdir()
        (folder / "tensorrt" / "__init__.py").write_text(META, encoding="utf-8")

    return once("tensorrt_stubs", make)


@pytest.mark.parametrize("name", NAMES)
def test_on_the_real_bindings(stubs: Path, name: str) -> None:
    paths = [str(stubs), str(BINDINGS), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(SCENARIOS), name, str(stubs / f"{LIBRARIES[0]}.so.11"), str(stubs / PLUGINS)],
        env={**os.environ, "LD_LIBRARY_PATH": str(stubs), "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "passed"), done.stderr
