"""``benchmarks/gpu_session.sh`` on a machine without a GPU, and with players of ``nvidia-smi`` and Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu_session.sh"
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("bash") is None, reason="needs Linux and bash"
)

GPU = "echo 'A GPU, 580.1, 1 MiB, 9.0'"
# Answers by what it is asked to run; nothing of ours runs in it.
PYTHON = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in
  *tests/engine/kernels*) echo '20 passed, 3 skipped in 9.00s' ;;
  *tests/runtime/tensorrt*) echo 'one failed'; echo '1 failed, 11 passed in 4.00s'; exit 1 ;;
  *nms_kernel.py*) sleep 60 ;;
  *roi_align_bodies.py*) echo 'nothing was measured: no | TensorRT' >&2; exit 2 ;;
  *tests/engine/builder*) echo '6 skipped in 1.00s' ;;
  *) echo fine ;;
esac
"""


def session(
    tmp_path: Path, gpu: str, *arguments: str, python: str = PYTHON, seconds: int = 720
) -> subprocess.CompletedProcess[str]:
    players = tmp_path / "players"
    players.mkdir()
    for name, text in (("nvidia-smi", f"#!/bin/sh\n{gpu}\n"), ("python", python)):
        (players / name).write_text(text, encoding="utf-8")
        (players / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{players}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": str(players / "python"),
        "CALLS": str(tmp_path / "calls"),
        "SECONDS_AT_MOST": str(seconds),
    }
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("gpu", ["exit 9", "true"], ids=["no driver", "no GPU"])
def test_without_a_gpu_it_says_so_and_runs_nothing(gpu: str, tmp_path: Path) -> None:
    done = session(tmp_path, gpu)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip().endswith("no NVIDIA GPU here (nvidia-smi shows none), so nothing was run")
    assert [path.name for path in tmp_path.iterdir()] == ["players"]


def test_the_report_says_of_each_step_how_it_ended(tmp_path: Path) -> None:
    done = session(tmp_path, GPU, "--out", "here", seconds=14)
    report = (tmp_path / "here" / "report.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("| ")]
    ended = {name: (verdict, last) for name, verdict, _, *rest in rows[1:] for last in [" ".join(rest)]}
    assert "A GPU, 580.1" in report
    assert ended["kernels"] == ("passed", "20 passed, 3 skipped in 9.00s")
    assert ended["cuda"] == ("failed with exit code 1", "1 failed, 11 passed in 4.00s")
    assert ended["nms"][0].startswith("cut off after ")
    for name in ("frames", "roi_align", "engines"):
        assert ended[name][0] == "not run: no time left"
    assert done.returncode == 1
    assert report in done.stdout


def test_a_model_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    done = session(tmp_path, GPU, "no.onnx")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == "gpu_session.sh: no.onnx: no such file; expected a model.onnx"


@pytest.mark.parametrize(
    ("told", "verdict", "code"),
    [("TensorRT is not installed, and this needs it", "could not run here", 0), ("no plan", "failed", 1)],
)
def test_an_engine_that_is_not_built_is_a_failure_where_tensorrt_is(
    told: str, verdict: str, code: int, tmp_path: Path
) -> None:
    (tmp_path / "a.onnx").write_bytes(b"")
    builds = f"  *anchorline?build*) echo '{told}' >&2; exit 2 ;;\n  *tests/engine/kernels*) echo passed ;;\n"
    players = PYTHON.replace("sleep 60", "echo kept").replace("exit 1", "exit 0")
    done = session(tmp_path, GPU, "a.onnx", python=players.replace("in\n", f"in\n{builds}", 1))
    report = (tmp_path / "gpu_session" / "report.md").read_text(encoding="utf-8")
    for flavour in ("tensorrt", "tensorrt-rtx"):
        assert f"| build-a-{flavour} | {verdict} |" in report
    assert done.returncode == code


def test_what_cannot_run_here_is_neither_passed_nor_failed(tmp_path: Path) -> None:
    (tmp_path / "nms.onnx").write_bytes(b"")
    players = PYTHON.replace("sleep 60", "echo kept").replace("exit 1", "exit 0")
    done = session(tmp_path, GPU, "nms.onnx", python=players)
    report = (tmp_path / "gpu_session" / "report.md").read_text(encoding="utf-8")
    assert "| roi_align | could not run here |" in report
    assert "nothing was measured: no / TensorRT |" in report
    assert "| engines | nothing ran |" in report
    calls = (tmp_path / "calls").read_text(encoding="utf-8")
    assert f"-m anchorline build {tmp_path / 'nms.onnx'} --for tensorrt-rtx --out" in calls
    assert f"-m anchorline bench {tmp_path / 'nms.onnx'} --batches 50" in calls
    assert done.returncode == 0
