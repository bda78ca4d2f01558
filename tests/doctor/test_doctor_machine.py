"""Looking at a machine: packages, CPU, GPU and driver, each with what the system would answer."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anchorline.doctor import machine as gpu
from anchorline.doctor.machine import (
    Gpu,
    GpuState,
    Imported,
    examine_machine,
    find_cpu,
    find_gpus,
    import_module,
    installed_packages,
    is_importable,
    normalised,
    numbers,
)
from anchorline.runtime.backends import cpu_options

SMI = "NVIDIA GeForce RTX 3090, 8.6, 24576, 580.95.05\nNVIDIA H200, 9.0, 143771, 580.95.05\n"


class FakeDriver:
    """The calls of libcuda that are used, on made-up devices."""

    def __init__(self, devices: list[tuple[str, int, int]], code: int = 0, cuda: int = 13000) -> None:
        self.devices, self.code, self.cuda = devices, code, cuda

    def cuDriverGetVersion(self, number: Any) -> int:
        number._obj.value = self.cuda
        return 0

    def cuInit(self, flags: int) -> int:
        return self.code

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.devices)
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: ctypes.c_int) -> int:
        name.value = self.devices[device.value][0].encode()
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: ctypes.c_int) -> int:
        value._obj.value = self.devices[device.value][1 if attribute == 75 else 2]
        return 0


@pytest.fixture
def set_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., GpuState]:
    """``set_gpu(smi, driver, kernel)``: what the machine answers; returns what is made of it."""

    def find(
        smi: tuple[int, str] | None = None, driver: FakeDriver | None = None, kernel: str | None = None
    ) -> GpuState:
        monkeypatch.setattr(gpu, "query_nvidia_smi", lambda: smi)
        monkeypatch.setattr(gpu, "load_driver", lambda: driver)
        monkeypatch.setattr(gpu, "kernel_driver_version", lambda: kernel)
        return find_gpus()

    return find


def test_no_gpu_at_all(set_gpu: Callable[..., GpuState]) -> None:
    assert set_gpu() == GpuState()


def test_nvidia_smi_lists_the_gpus(set_gpu: Callable[..., GpuState]) -> None:
    state = set_gpu((0, SMI), FakeDriver([], code=1))  # libcuda is asked for its version only
    assert state.gpus == (Gpu("NVIDIA GeForce RTX 3090", 86, 24576), Gpu("NVIDIA H200", 90, 143771))
    assert (state.driver, state.cuda, state.fault) == ("580.95.05", (13, 0), None)


def test_a_name_with_a_comma_is_one_name(set_gpu: Callable[..., GpuState]) -> None:
    state = set_gpu((0, "A, B, 12.0, [N/A], 590.1"), FakeDriver([]))
    assert state.gpus == (Gpu("A, B", 120, 0),)


def test_libcuda_alone_is_enough(set_gpu: Callable[..., GpuState]) -> None:
    state = set_gpu(None, FakeDriver([("Orin", 8, 7)], cuda=12060), "540.3.0")
    assert state == GpuState((Gpu("Orin", 87),), "540.3.0", (12, 6), None)


def test_an_old_nvidia_smi_leaves_it_to_libcuda(set_gpu: Callable[..., GpuState]) -> None:
    answer = (2, 'Field "compute_cap" is not a valid field to query.')
    state = set_gpu(answer, FakeDriver([("Tesla T4", 7, 5)], cuda=11040))
    assert (state.gpus, state.fault) == ((Gpu("Tesla T4", 75),), None)


@pytest.mark.parametrize(
    ("smi", "driver", "fault"),
    [
        ((9, "NVIDIA-SMI has failed\nmore"), None, "NVIDIA-SMI has failed"),
        ((9, ""), None, "nvidia-smi ended with exit code 9"),
        (None, FakeDriver([], code=803), "cuInit gives error 803"),
        ((9, "failed"), FakeDriver([], code=999), "cuInit gives error 999"),
        ((0, SMI), None, "libcuda cannot be loaded"),
    ],
)
def test_a_broken_driver_is_told(
    smi: tuple[int, str] | None, driver: FakeDriver | None, fault: str, set_gpu: Callable[..., GpuState]
) -> None:
    assert fault in str(set_gpu(smi, driver).fault)


@pytest.mark.parametrize(
    ("smi", "driver"),
    [((6, "No devices were found"), None), (None, FakeDriver([], code=100)), (None, FakeDriver([]))],
)
def test_a_driver_without_a_gpu_is_no_fault(
    smi: tuple[int, str] | None, driver: FakeDriver | None, set_gpu: Callable[..., GpuState]
) -> None:
    state = set_gpu(smi, driver)
    assert (state.gpus, state.fault) == ((), None)


@pytest.mark.skipif(os.name != "posix", reason="writes a shell script")
@pytest.mark.parametrize(
    ("script", "answer"),
    [
        ("echo 'GPU, 8.6, 1, 580.1'", (0, "GPU, 8.6, 1, 580.1")),
        ("echo broken >&2; exit 9", (9, "broken")),
        ("printf '\\377'; exit 1", (1, "\N{REPLACEMENT CHARACTER}")),
    ],
)
def test_nvidia_smi_is_run(
    script: str, answer: tuple[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpu.query_nvidia_smi() == answer


@pytest.mark.skipif(os.name != "posix", reason="writes a shell script")
def test_an_nvidia_smi_that_hangs_or_cannot_start_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexec sleep 5\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gpu, "_QUERY_SECONDS", 0.1)
    assert gpu.query_nvidia_smi() == (1, "nvidia-smi did not answer within 0.1 s")
    program.write_text("#!/no/such/shell\n")
    answer = gpu.query_nvidia_smi()
    assert answer is not None
    assert answer[1].startswith("nvidia-smi cannot be run")


def test_without_nvidia_smi_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.query_nvidia_smi() is None


@pytest.mark.parametrize(
    ("cpuinfo", "name", "features"),
    [
        (
            "processor\t: 0\nmodel name\t: Xeon Platinum\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n",
            "Xeon Platinum",
            ("avx2", "avx512f", "avx512_bf16", "amx_bf16"),
        ),
        ("processor : 0\nFeatures : fp asimd asimddp i8mm bf16\n", None, ("asimddp", "i8mm", "bf16")),
        ("", None, ()),
    ],
)
def test_the_cpu_features_that_matter(
    cpuinfo: str, name: str | None, features: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(cpu_options, "_CPUINFO", tmp_path / "cpuinfo")
    cpu = find_cpu()
    assert cpu.features == features
    assert cpu.name == (name or platform.processor() or platform.machine())
    assert 1 <= cpu.cores <= (os.cpu_count() or 1)


def test_the_packages_are_those_of_this_interpreter() -> None:
    versions, requirers = installed_packages()
    for name in ("numpy", "onnxruntime", "rich", "opencv-python-headless"):
        assert versions[name] == importlib.metadata.version(name)
    assert "anchorline" in requirers["opencv-python-headless"]
    assert "anchorline" not in requirers.get("torch", ())  # which only an extra wants


def test_a_damaged_package_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, text in (
        ("half-1.0.dist-info", ""),
        ("Whole_Thing-2.1.dist-info", "Metadata-Version: 2.1\nName: Whole_Thing\nVersion: 2.1\n"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "METADATA").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    versions, _ = installed_packages()
    assert versions["whole-thing"] == "2.1"
    assert "half" not in versions


@pytest.mark.parametrize(
    ("version", "expected"),
    [("10.16.0.post1", (10, 16, 0)), ("2.9.0+cu126", (2, 9, 0)), ("13", (13,)), ("v1", ()), ("", ())],
)
def test_the_numbers_of_a_version(version: str, expected: tuple[int, ...]) -> None:
    assert numbers(version) == expected


def test_names_are_compared_as_pip_does() -> None:
    assert normalised("Nvidia_cuDNN..cu13") == "nvidia-cudnn-cu13"


def test_modules_are_looked_up_without_importing_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "explosive.py").write_text("raise SystemError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert is_importable("explosive")
    assert not is_importable("no_such_module")
    assert not is_importable("no_such_parent.child")
    assert import_module("explosive") == (Imported(error="imported"), None)


def test_a_missing_module_is_told_from_a_broken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import no_such_module")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert import_module("no_such_module") == (Imported(), None)
    assert "no_such_module" in str(import_module("needs_more")[0].error)
    assert import_module("numpy")[0] == Imported(np.__version__)


def test_the_folder_of_an_uninstalled_onnxruntime_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    (tmp_path / "onnxruntime" / "__init__.py").write_text("")
    state = examine_machine()
    assert "files are incomplete" in str(state.onnxruntime.error)
    assert state.providers == ()


def test_examining_is_quick_and_imports_nothing_heavy() -> None:
    program = (
        "import json, sys, time\n"
        "from anchorline.doctor.diagnosis import doctor\n"
        "report = doctor()\n"
        "names = sorted({name.partition('.')[0] for name in sys.modules})\n"
        "print(json.dumps({'cpu_seconds': time.process_time(), 'modules': names,"
        " 'providers': report.machine.providers}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    assert not {"torch", "torchvision", "tensorrt", "tensorrt_rtx", "onnx"} & set(figures["modules"])
    assert "CPUExecutionProvider" in figures["providers"]
    assert figures["cpu_seconds"] < 1.5
