"""Each conflict among packages and driver is found, and its remedy names what to type."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from anchorline.doctor.conflicts import OLDEST_DRIVER, Finding, cuda_packages, find_conflicts
from anchorline.doctor.machine import GpuState, Imported, Machine

Make = Callable[..., Machine]


def only_finding(machine: Machine) -> Finding:
    (finding,) = find_conflicts(machine)
    return finding


def test_a_healthy_machine_has_no_findings(make_machine: Make, gpu_state: Callable[..., GpuState]) -> None:
    assert find_conflicts(make_machine()) == []
    gpu_packages = {
        "onnxruntime": None,
        "onnxruntime-gpu": "1.32.0",
        "tensorrt": "11.4.0.106",
        "tensorrt-cu13": "11.4.0.106",
        "tensorrt-cu13-libs": "11.4.0.106",
        "tensorrt-cu13-bindings": "11.4.0.106",
        "cuda-bindings": "13.5.0",
        "cuda-core": "1.2.2",
        "torch": "2.15.0",
        "nvidia-cublas": "13.4.1.3",
        "nvidia-cudnn-cu13": "9.26.0.51",
        "nvidia-cufft": "12.2.0.57",  # its own version, not CUDA's
        "supervision": "0.31.2",
    }
    assert find_conflicts(make_machine(gpu_packages, gpu=gpu_state(), onnxruntime_cuda="13.0")) == []


def test_opencv_twice(make_machine: Make) -> None:
    finding = only_finding(make_machine({"opencv-contrib-python": "4.12.0"}))
    assert finding.level == "problem"
    assert "OpenCV is installed 2 times" in finding.text
    assert "opencv-python-headless 5.0.0.93, opencv-contrib-python 4.12.0" in finding.text
    assert finding.remedy == (
        "pip uninstall -y opencv-python-headless opencv-contrib-python, "
        "then pip install opencv-python-headless"
    )


def test_who_brought_the_second_opencv_is_told(make_machine: Make) -> None:
    machine = make_machine(
        {"opencv-python": "4.11.0.86", "supervision": "0.26.1", "other": "1.0"},
        requirers={"opencv-python": ("other", "supervision"), "opencv-python-headless": ("anchorline",)},
    )
    finding = only_finding(machine)
    assert "other 1.0 requires opencv-python, supervision 0.26.1 requires opencv-python" in finding.remedy
    assert finding.remedy.endswith("pip install 'supervision>=0.30'")
    assert "anchorline" not in finding.remedy


@pytest.mark.parametrize(("with_gpu", "keep"), [(False, "onnxruntime"), (True, "onnxruntime-gpu")])
def test_onnxruntime_twice(
    with_gpu: bool, keep: str, make_machine: Make, gpu_state: Callable[..., GpuState]
) -> None:
    gpu = gpu_state() if with_gpu else GpuState()
    finding = only_finding(make_machine({"onnxruntime-gpu": "1.31.0"}, gpu=gpu))
    assert finding.level == "problem"
    assert "onnxruntime 1.32.0, onnxruntime-gpu 1.31.0" in finding.text
    assert finding.remedy == f"pip uninstall -y onnxruntime onnxruntime-gpu, then pip install {keep}"


def test_a_provider_plugin_is_no_second_onnxruntime(make_machine: Make) -> None:
    rtx = {"onnxruntime-ep-nv-tensorrt-rtx": "0.5.0", "onnxruntime-ep-nv-tensorrt-rtx-cu13": "0.5.0"}
    assert find_conflicts(make_machine({"onnxruntime-ep-openvino": "1.2.0", **rtx})) == []


def test_the_plugin_of_tensorrt_for_rtx_beside_onnxruntime_gpu(make_machine: Make) -> None:
    rtx = {"onnxruntime-ep-nv-tensorrt-rtx": "0.5.0", "onnxruntime-ep-nv-tensorrt-rtx-cu13": "0.5.0"}
    finding = only_finding(make_machine({"onnxruntime": None, "onnxruntime-gpu": "1.31.1", **rtx}))
    assert finding.level == "problem"
    assert finding.text == (
        "onnxruntime-ep-nv-tensorrt-rtx-cu13 0.5.0 is made for plain onnxruntime from 1.24 on, and "
        "onnxruntime-gpu 1.31.1 is installed in its place"
    )
    assert "pip uninstall -y onnxruntime-gpu, then" in finding.remedy
    assert finding.remedy.endswith("pip uninstall -y onnxruntime-ep-nv-tensorrt-rtx-cu13")


@pytest.mark.parametrize(
    ("packages", "cuda12", "cuda13"),
    [
        (
            {"nvidia-cublas-cu12": "12.9.3.13", "nvidia-cudnn-cu13": "9.27.0"},
            "nvidia-cublas-cu12",
            "nvidia-cudnn-cu13",
        ),
        ({"tensorrt-cu12": "10.16.1.11", "cuda-bindings": "13.5.0"}, "tensorrt-cu12", "cuda-bindings"),
        (
            {"torch": "2.9.0+cu126", "nvidia-cuda-runtime": "13.2.86"},
            "torch",
            "nvidia-cuda-runtime",
        ),
        (
            {"cuda-python": "12.9.0", "tensorrt-rtx-cu13": "1.7.1.116"},
            "cuda-python",
            "tensorrt-rtx-cu13",
        ),
    ],
)
def test_cuda_12_and_13_mixed(
    packages: dict[str, str],
    cuda12: str,
    cuda13: str,
    make_machine: Make,
    gpu_state: Callable[..., GpuState],
) -> None:
    assert cuda_packages(make_machine(packages)) == {12: [cuda12], 13: [cuda13]}
    mixed = "different CUDA versions"
    (newest,) = (f for f in find_conflicts(make_machine(packages)) if mixed in f.text)
    assert newest.level == "problem"
    assert f"CUDA 12: {cuda12} " in newest.text
    assert f"CUDA 13: {cuda13} " in newest.text
    assert newest.remedy.startswith(f"keep CUDA 13: pip uninstall -y {cuda12}, ")
    old_driver = make_machine(packages, gpu=gpu_state(cuda=(12, 4), driver="550.54"))
    (older,) = (f for f in find_conflicts(old_driver) if mixed in f.text)
    assert older.remedy.startswith(f"keep CUDA 12: pip uninstall -y {cuda13}, ")


def test_the_cuda_version_of_onnxruntime_counts(make_machine: Make) -> None:
    machine = make_machine(
        {"onnxruntime": None, "onnxruntime-gpu": "1.32.0", "nvidia-cudnn-cu12": "9.27.0"},
        onnxruntime_cuda="13.0",
    )
    assert cuda_packages(machine) == {12: ["nvidia-cudnn-cu12"], 13: ["onnxruntime-gpu"]}


def test_empty_placeholder_packages_do_not_count(make_machine: Make) -> None:
    packages = {"nvidia-cublas-cu13": "0.0.1", "nvidia-cublas-cu12": "12.9.3.13"}
    assert find_conflicts(make_machine(packages)) == []


def test_a_driver_too_old_for_the_packages(make_machine: Make, gpu_state: Callable[..., GpuState]) -> None:
    gpu = gpu_state(cuda=(12, 4), driver="550.54.15")
    finding = only_finding(make_machine({"nvidia-cudnn-cu13": "9.27.0"}, gpu=gpu))
    assert finding.level == "problem"
    assert "driver 550.54.15 runs CUDA up to 12.4" in finding.text
    assert f"a driver from {OLDEST_DRIVER[13]} on" in finding.remedy
    assert find_conflicts(make_machine({"nvidia-cudnn-cu12": "9.27.0"}, gpu=gpu_state())) == []


def test_without_a_gpu_the_packages_for_one_are_no_matter(make_machine: Make) -> None:
    assert find_conflicts(make_machine({"nvidia-cudnn-cu13": "9.27.0", "torch": "2.15.0"})) == []


def test_a_driver_that_does_not_work_is_a_note(make_machine: Make) -> None:
    finding = only_finding(make_machine(gpu=GpuState(fault="cuInit gives error 803")))
    assert (finding.level, "cuInit gives error 803" in finding.text) == ("note", True)
    assert "--gpus all" in finding.remedy


def test_parts_of_tensorrt_of_two_releases(make_machine: Make) -> None:
    packages = {"tensorrt": "11.4.0.106", "tensorrt-cu13": "11.4.0.106", "tensorrt-cu13-libs": "10.16.1.11"}
    finding = only_finding(make_machine(packages))
    assert finding.level == "problem"
    assert finding.remedy == (
        "pip uninstall -y tensorrt tensorrt-cu13 tensorrt-cu13-libs, then pip install tensorrt"
    )
    post = {"tensorrt": "10.7.0.post1", "tensorrt-cu12": "10.7.0"}
    assert find_conflicts(make_machine(post)) == []


def test_both_flavours_of_tensorrt_get_along(make_machine: Make) -> None:
    packages = {"tensorrt-cu13": "11.4.0.106", "tensorrt-rtx-cu13": "1.7.1.116", "tensorrt-llm": "1.2.1"}
    assert find_conflicts(make_machine(packages)) == []


def test_tensorrt_without_its_module(make_machine: Make) -> None:
    machine = make_machine({"tensorrt-rtx-cu13-libs": "1.7.1.116"}, importable={})
    finding = only_finding(machine)
    assert "there is no module tensorrt_rtx" in finding.text
    assert finding.remedy == "pip install tensorrt-rtx==1.7.1.116"


@pytest.mark.parametrize(
    ("there", "missing"), [("cuda-core", "cuda-bindings"), ("cuda-bindings", "cuda-core")]
)
def test_half_of_the_cuda_bindings(
    there: str, missing: str, make_machine: Make, gpu_state: Callable[..., GpuState]
) -> None:
    finding = only_finding(make_machine({there: "13.0"}, gpu=gpu_state()))
    assert (finding.level, finding.remedy) == ("note", f"pip install {missing}")


def test_pycuda_without_a_driver(make_machine: Make, gpu_state: Callable[..., GpuState]) -> None:
    finding = only_finding(make_machine({"pycuda": "2026.1"}))
    assert (finding.level, "libcuda" in finding.text) == ("note", True)
    assert find_conflicts(make_machine({"pycuda": "2026.1"}, gpu=gpu_state())) == []


def test_opencv_without_display_libraries(make_machine: Make) -> None:
    machine = make_machine(
        {"opencv-python-headless": None, "opencv-python": "4.12.0"},
        opencv=Imported(error="libGL.so.1: cannot open shared object file"),
    )
    finding = only_finding(machine)
    assert finding.text == "cv2 cannot be imported: libGL.so.1: cannot open shared object file"
    assert "pip install opencv-python-headless" in finding.remedy


@pytest.mark.parametrize(
    ("packages", "facts", "text", "remedy"),
    [
        (
            {},
            {"onnxruntime": Imported(error="its files are incomplete")},
            "onnxruntime cannot be imported: its files are incomplete",
            "pip install --force-reinstall --no-deps onnxruntime",
        ),
        (
            {},
            {"onnxruntime": Imported()},
            "onnxruntime cannot be imported: there is no such module",
            "pip install --force-reinstall --no-deps onnxruntime",
        ),
        (
            {"opencv-python-headless": None},
            {"opencv": Imported()},
            "cv2 cannot be imported: there is no such module",
            "pip install opencv-python-headless",
        ),
        (
            {},
            {"numpy": Imported(error="version mismatch")},
            "numpy cannot be imported: version mismatch",
            "pip install --force-reinstall --no-deps numpy",
        ),
    ],
)
def test_a_broken_package(
    packages: dict[str, str | None], facts: dict[str, Imported], text: str, remedy: str, make_machine: Make
) -> None:
    finding = only_finding(make_machine(packages, **facts))
    assert (finding.level, finding.text, finding.remedy) == ("problem", text, remedy)


def test_a_machine_without_onnxruntime_is_no_broken_one(make_machine: Make) -> None:
    assert find_conflicts(make_machine({"onnxruntime": None}, onnxruntime=Imported(), providers=())) == []


def test_problems_come_before_notes(make_machine: Make) -> None:
    machine = make_machine({"onnxruntime-gpu": "1.32.0"}, gpu=GpuState(fault="x"))
    assert [each.level for each in find_conflicts(machine)] == ["problem", "note"]
