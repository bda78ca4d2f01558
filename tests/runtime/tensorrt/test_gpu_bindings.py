"""The CUDA layer through the real cuda-bindings, with a driver library made for the test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the stub of libcuda is for Linux")
def test_cuda_bindings_accept_every_call(tmp_path: Path) -> None:
    """Types, counts and order of the arguments are those of the real package; nothing is left behind."""
    pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs gcc to build a stub of libcuda")
    library = tmp_path / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror"]
    subprocess.run(
        [compiler, *options, str(HERE / "libcuda_stub.c"), "-o", str(library), "-ldl"],
        check=True,
        timeout=120,
    )
    done = subprocess.run(
        [sys.executable, str(HERE / "on_stub.py"), str(library)],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "all calls accepted", done.stderr
