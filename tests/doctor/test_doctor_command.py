"""``anchorline doctor``: the report, its exit codes, and that it works where the runtime does not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from anchorline import cli
from anchorline.doctor import diagnosis
from anchorline.doctor.diagnosis import DoctorReport, doctor
from anchorline.doctor.machine import GpuState, Imported, Machine
from anchorline.runtime.contract import CONTRACT_KEY, Contract
from anchorline.runtime.io.errors import ArtefactError

Make = Callable[..., Machine]
CONTRACT = Contract("detections", ("[bold]cat", "dog"), (64, 96), mean=(0.0,) * 3, std=(1.0,) * 3)
TORCH = {"torch": "2.15.0", "torchvision": "0.29.2", "safetensors": "0.8.0"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"w": np.zeros(3, np.float32)}, path, metadata={CONTRACT_KEY: CONTRACT.to_json()})
    return path


@pytest.fixture
def use_machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Machine], None]:
    """``use_machine(machine)``: what the command will find."""
    return lambda machine: monkeypatch.setattr(diagnosis, "examine_machine", lambda: machine)


def shown(report: DoctorReport) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(report.render())
    return capture.get()


def test_a_healthy_machine(make_machine: Make, gpu_state: Callable[..., GpuState]) -> None:
    report = doctor(machine=make_machine({"cuda-bindings": "13.5.0", "cuda-core": "1.2.2"}, gpu=gpu_state()))
    assert report.healthy
    text = shown(report)
    for part in (
        "Linux 6.1, x86_64",
        "3.12.1 (CPython)",
        "Some CPU, 4 cores, avx2, amx_bf16",
        "NVIDIA Test (sm_86, 24 GiB)",
        "580.95, runs CUDA up to 13.0",
        "1.32.0: CPUExecutionProvider",
        "cuda-bindings 13.5.0, cuda-core 1.2.2",
    ):
        assert part in text


def test_findings_stand_in_the_table_with_their_remedy(make_machine: Make) -> None:
    report = doctor(machine=make_machine({"onnxruntime-gpu": "1.32.0"}))
    assert not report.healthy
    text = shown(report)
    assert "problem" in text
    assert "-> pip uninstall -y onnxruntime onnxruntime-gpu, then pip install onnxruntime" in text


def test_brackets_are_shown_as_they_are(checkpoint: Path, make_machine: Make) -> None:
    text = shown(doctor(checkpoint, make_machine({"torch": None})))
    assert "[bold]cat, dog" in text
    assert "pip install 'anchorline[train]'" in text


def test_a_checkpoint_that_was_never_verified_is_healthy(checkpoint: Path, make_machine: Make) -> None:
    report = doctor(checkpoint, make_machine(TORCH))
    assert report.findings == []
    assert "not verified" in shown(report)


def test_the_exit_code_and_the_json(
    checkpoint: Path,
    tmp_path: Path,
    make_machine: Make,
    use_machine: Callable[[Machine], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_machine(make_machine(TORCH))
    figures = tmp_path / "doctor.json"
    assert cli.main(["doctor", str(checkpoint), "--json", str(figures)]) == 0
    found = json.loads(figures.read_text(encoding="utf-8"))
    assert (found["healthy"], found["findings"]) == (True, [])
    assert found["artefact"]["contract"]["task"] == "detections"
    assert found["artefact"]["verification"]["state"] == "missing"
    assert [runtime["runs"] for runtime in found["artefact"]["runtimes"]] == [True]
    assert found["machine"]["packages"]["torch"] == "2.15.0"
    assert "detections" in capsys.readouterr().out

    use_machine(make_machine())  # without PyTorch
    assert cli.main(["doctor", str(checkpoint), "--json", str(figures)]) == 1
    (finding,) = json.loads(figures.read_text(encoding="utf-8"))["findings"]
    assert finding["level"] == "problem"
    assert cli.main(["doctor"]) == 0
    capsys.readouterr()


def test_a_note_alone_leaves_the_exit_code_0(
    make_machine: Make, use_machine: Callable[[Machine], None], capsys: pytest.CaptureFixture[str]
) -> None:
    use_machine(make_machine(gpu=GpuState(fault="cuInit gives error 803")))
    assert cli.main(["doctor"]) == 0
    assert "cuInit gives error 803" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content"), [("missing.onnx", None), ("notes.txt", b"x"), ("bad.safetensors", b"x")]
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    name: str, content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert cli.main(["doctor", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"anchorline: {path}: ")
    assert captured.err.count("\n") == 1


def test_a_broken_artefact_is_an_error_in_scripts(tmp_path: Path, make_machine: Make) -> None:
    with pytest.raises(ArtefactError):
        doctor(tmp_path / "missing.engine", make_machine())


@pytest.mark.parametrize("package", ["cv2", "numpy"])
def test_it_works_where_the_runtime_cannot_be_imported(package: str, checkpoint: Path) -> None:
    program = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from anchorline import cli\n"
        f"sys.exit(cli.main(['doctor', {str(checkpoint)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    text = " ".join(done.stdout.replace("│", " ").split())
    assert f"{package} cannot be imported" in text
    assert "was not examined" in text


def test_broken_opencv_is_said_in_the_report(checkpoint: Path, make_machine: Make) -> None:
    report = doctor(checkpoint, make_machine(opencv=Imported(error="libGL.so.1")))
    assert [each.level for each in report.findings] == ["problem", "problem"]
    assert report.artefact is None
    assert "OpenCV" in shown(report)
