"""The runtime's promise: a fast import, and nothing heavy comes along."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROBE = """
import json, sys, time
start = time.perf_counter()
import anchorline.runtime
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "modules": sorted({m.partition(".")[0] for m in sys.modules})}))
"""
HEAVY = {
    "IPython",
    "PIL",
    "anchorline.train",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "rich",
    "scipy",
    "supervision",
    "torch",
    "torchvision",
    "trackers",
    "typer",
}


def probe() -> dict:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_importing_brings_nothing_heavy_along():
    assert HEAVY.isdisjoint(probe()["modules"])


def test_importing_is_fast():
    # One quick try is enough: on a machine that does other work most of them wait for a processor.
    assert any(probe()["seconds"] < 0.3 for _ in range(15))


@pytest.mark.parametrize("blocked", ["torch", "onnx", "onnxruntime", "rich"])
def test_the_detector_needs_only_onnxruntime(blocked, model_path):
    """With a package blocked, detection goes on; without onnxruntime the error names the extra."""
    code = (
        f"import sys; sys.modules[{blocked!r}] = None\n"
        "import numpy as np\n"
        "from anchorline.runtime import ArtefactError, Detector\n"
        "try:\n"
        f"    print(len(Detector({str(model_path)!r})(np.full((9, 9, 3), 99, np.uint8))))\n"
        "except ArtefactError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if blocked == "onnxruntime":
        assert "pip install 'anchorline[cpu]'" in done.stdout
    else:
        assert done.stdout.strip() == "2"
