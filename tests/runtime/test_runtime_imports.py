"""The runtime's promise: a fast import, and nothing heavy comes along."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROBE = """
import json, sys, time
start = time.process_time()
import cv2, numpy
middle = time.process_time()
import anchorline.runtime
own = (time.process_time() - middle) / (middle - start)
print(json.dumps({"own": own, "modules": sorted({m.partition(".")[0] for m in sys.modules})}))
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
    """Little more than what it needs, OpenCV and NumPy: 0.3 s where these take 0.12 s.

    Processors differ and may be busy, so it is their time that is compared; the first try may read the disk.
    """
    assert any(probe()["own"] < 1.5 for _ in range(5))


@pytest.mark.parametrize("blocked", ["torch", "onnx", "onnxruntime", "rich"])
def test_the_detector_needs_only_onnxruntime(blocked, model_path, tmp_path):
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
    nothing_kept = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}  # OpenVINO runs a network that is
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=nothing_kept
    )
    if blocked == "onnxruntime":
        assert "pip install 'anchorline[cpu]'" in done.stdout
    else:
        assert done.stdout.strip() == "2"


@pytest.mark.parametrize(
    "code",
    [
        "from anchorline.runtime import Detector; Detector({!r}, 'cpu')",
        "from anchorline.doctor.machine import examine_machine; examine_machine()",
    ],
    ids=["running", "doctor"],
)
def test_anchorline_tells_nobody(code, model_path, tmp_path):
    """onnxruntime's packages report over the network, under an identifier that they keep beside their queue.

    In CI they are quiet by themselves, so its variables are hidden.
    """
    quiet = {"CI", "GITHUB_ACTIONS", "TF_BUILD", "ORT_DISABLE_TELEMETRY"}
    environment = {name: value for name, value in os.environ.items() if name not in quiet}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code.format(str(model_path))], env=environment, check=True)
    assert not [path for path in tmp_path.rglob("*") if path.name in ("deviceid", "onnxruntime.db")]
