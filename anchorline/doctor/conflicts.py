"""What is wrong with a machine's packages and driver, each with its remedy. Judges facts, gathers none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from anchorline.doctor.machine import Machine, numbers
from anchorline.runtime.backends.execution_providers import PROVIDER_PACKAGES

OPENCV = (
    "opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless",
)  # fmt: skip
ONNXRUNTIMES = (
    "onnxruntime", "onnxruntime-directml", "onnxruntime-gpu", "onnxruntime-migraphx", "onnxruntime-openvino",
    "onnxruntime-qnn", "onnxruntime-rocm", "onnxruntime-training",
)  # fmt: skip
"""Distributions that all install the module ``onnxruntime``."""
OLDEST_DRIVER = {12: "525", 13: "580"}
"""The oldest driver for a CUDA major version, from NVIDIA's table of minor version compatibility."""

_CUDA_SUFFIX = re.compile(r"-cu(1[1-9])(?:-|$)")
_CUDA_LOCAL_VERSION = re.compile(r"\+cu(1[1-9])\d")
# Packages whose name does not tell and whose version is CUDA's own.
_CUDA_VERSIONED = ("cuda-bindings", "cuda-python", "cuda-toolkit", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime")
_PLACEHOLDER = (0, 0)  # nvidia-cublas-cu13 0.0.1 and its like are empty


@dataclass(frozen=True)
class Finding:
    """``problem``: something does not work or will break; ``note``: worth knowing, nothing more."""

    level: Literal["problem", "note"]
    text: str
    remedy: str


def find_conflicts(machine: Machine) -> list[Finding]:
    """All findings about a machine, problems first."""
    checks = (
        _broken_imports, _installed_twice, _provider_packages, _cuda_versions, _tensorrt_parts, _notes,
    )  # fmt: skip
    found = [finding for check in checks for finding in check(machine)]
    return sorted(found, key=lambda each: each.level != "problem")


def _broken_imports(machine: Machine) -> Iterator[Finding]:
    for module, state, names in (
        ("numpy", machine.numpy, ("numpy",)),
        ("cv2", machine.opencv, OPENCV),
        ("onnxruntime", machine.onnxruntime, ONNXRUNTIMES),
    ):
        package = next(iter(_installed(machine, names)), None)
        if state.version is not None or (module == "onnxruntime" and not (package or state.error)):
            continue
        if package is None:
            remedy = f"pip install {'opencv-python-headless' if module == 'cv2' else module}"
        elif package == "opencv-python" and ".so" in (state.error or ""):
            remedy = (
                "it links display libraries that are not here: pip uninstall -y opencv-python, then "
                "pip install opencv-python-headless"
            )
        else:
            remedy = f"pip install --force-reinstall --no-deps {package}"
        reason = state.error or "there is no such module"
        yield Finding("problem", f"{module} cannot be imported: {reason}", remedy)


def _installed_twice(machine: Machine) -> Iterator[Finding]:
    opencv, runtimes = _installed(machine, OPENCV), _installed(machine, ONNXRUNTIMES)
    if len(opencv) > 1:
        remedy = f"pip uninstall -y {' '.join(opencv)}, then pip install opencv-python-headless"
        culprits = [
            f"{requirer} {machine.packages[requirer]} requires {name}"
            for name in opencv
            for requirer in machine.requirers.get(name, ())
            if name != "opencv-python-headless"
        ]
        if culprits:
            remedy += f"; it will come back, because {', '.join(culprits)}"
        if any(culprit.startswith("supervision ") for culprit in culprits):
            remedy += "; upgrade it first: pip install 'supervision>=0.30'"  # which no longer requires it
        there = f"OpenCV is installed {len(opencv)} times: {_listed(machine, opencv)}"
        yield Finding("problem", f"{there}; one overwrites the other", remedy)
    if len(runtimes) > 1:
        for_gpu = machine.gpu.gpus or "onnxruntime" not in runtimes
        keep = next(name for name in runtimes if name != "onnxruntime") if for_gpu else "onnxruntime"
        there = f"onnxruntime is installed {len(runtimes)} times: {_listed(machine, runtimes)}"
        yield Finding(
            "problem",
            f"{there}; they install the same files, and the later one broke the earlier",
            f"pip uninstall -y {' '.join(runtimes)}, then pip install {keep}",
        )


def _provider_packages(machine: Machine) -> Iterator[Finding]:
    """TensorRT for RTX comes for plain onnxruntime, which onnxruntime-gpu stands in the place of."""
    gpu = "onnxruntime-gpu"
    for name in provider_packages(machine, "tensorrt-rtx"):
        if gpu in machine.packages:
            yield Finding(
                "problem",
                f"{_listed(machine, [name])} is made for plain onnxruntime from 1.24 on, and "
                f"{_listed(machine, [gpu])} is installed in its place",
                f"keep one of them: for the provider tensorrt-rtx pip uninstall -y {gpu}, then pip install "
                f"--force-reinstall 'onnxruntime>=1.24'; for cuda and tensorrt pip uninstall -y {name}",
            )


def provider_packages(machine: Machine, provider: str) -> list[str]:
    """The installed packages that bring ``provider`` to plain onnxruntime, for whichever CUDA."""
    form = re.compile(rf"{PROVIDER_PACKAGES[provider].distribution}(?:-cu\d+)?")
    found = [name for name in sorted(machine.packages) if form.fullmatch(name)]
    return found[-1:]  # the one without a number installs the other


def _cuda_versions(machine: Machine) -> Iterator[Finding]:
    by_major, gpu = cuda_packages(machine), machine.gpu
    if len(by_major) > 1:
        keep = max([major for major in by_major if gpu.cuda is None or major <= gpu.cuda[0]] or by_major)
        majors = sorted(by_major.items())
        others = [name for major, names in majors if major != keep for name in names]
        shown = "; ".join(f"CUDA {major}: {_listed(machine, names, most=4)}" for major, names in majors)
        yield Finding(
            "problem",
            f"packages for different CUDA versions are installed ({shown})",
            f"keep CUDA {keep}: pip uninstall -y {' '.join(others)}, then install what needs them in its "
            f"build for CUDA {keep}",
        )
    needed = min(by_major, default=0)
    if gpu.gpus and gpu.cuda is not None and needed > gpu.cuda[0]:
        yield Finding(
            "problem",
            f"the NVIDIA driver {gpu.driver or ''} runs CUDA up to {gpu.cuda[0]}.{gpu.cuda[1]}, but these "
            f"packages are for CUDA {needed}: {_listed(machine, by_major[needed], most=4)}",
            f"install a driver from {OLDEST_DRIVER.get(needed, 'a newer release')} on, or the packages' "
            f"builds for CUDA {gpu.cuda[0]}",
        )


def cuda_packages(machine: Machine) -> dict[int, list[str]]:
    """The installed packages that belong to one CUDA major version, by that version."""
    found: dict[int, list[str]] = {}
    for name, version in sorted(machine.packages.items()):
        stated = _CUDA_SUFFIX.search(name) or _CUDA_LOCAL_VERSION.search(version)
        if numbers(version)[:2] == _PLACEHOLDER:
            continue
        if stated:
            found.setdefault(int(stated.group(1)), []).append(name)
        elif name in _CUDA_VERSIONED and numbers(version):
            found.setdefault(numbers(version)[0], []).append(name)
    built_for = numbers(machine.onnxruntime_cuda)
    if built_for and "onnxruntime-gpu" in machine.packages:
        found.setdefault(built_for[0], []).append("onnxruntime-gpu")
    return found


def _tensorrt_parts(machine: Machine) -> Iterator[Finding]:
    for flavour, module in (("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")):
        parts = tensorrt_packages(machine, flavour)
        there = _listed(machine, parts)
        if len({numbers(machine.packages[name])[:3] for name in parts}) > 1:
            remedy = f"pip uninstall -y {' '.join(parts)}, then pip install {flavour}"
            yield Finding("problem", f"the parts of {flavour} have different versions: {there}", remedy)
        if parts and not machine.importable.get(module, False):
            remedy = f"pip install {flavour}=={machine.packages[parts[0]]}"
            yield Finding("problem", f"{there} is installed, but there is no module {module}", remedy)


def tensorrt_packages(machine: Machine, flavour: str) -> list[str]:
    """The installed distributions of a flavour: the meta package, the bindings, the libraries."""
    form = re.compile(rf"{flavour}(?:-cu\d+(?:-bindings|-libs)?)?")
    return [name for name in sorted(machine.packages) if form.fullmatch(name)]


def _notes(machine: Machine) -> Iterator[Finding]:
    if machine.gpu.fault is not None:
        yield Finding(
            "note",
            f"the NVIDIA driver does not work: {machine.gpu.fault}",
            "to use the GPU, install the driver again and restart; in a container, start it with --gpus all "
            "and the driver capabilities compute and utility",
        )
    there = _installed(machine, ("cuda-bindings", "cuda-core"))
    if machine.gpu.gpus and len(there) == 1:
        missing = "cuda-core" if there == ["cuda-bindings"] else "cuda-bindings"
        text = f"{there[0]} is installed without {missing}, and running engines needs both"
        yield Finding("note", text, f"pip install {missing}")
    if "pycuda" in machine.packages and machine.gpu.cuda is None:
        yield Finding(
            "note",
            "pycuda is installed, but without the driver's libcuda it cannot be imported",
            "install the NVIDIA driver, or leave pycuda alone: Anchorline needs it for nothing else",
        )


def _installed(machine: Machine, names: Iterable[str]) -> list[str]:
    return [name for name in names if name in machine.packages]


def _listed(machine: Machine, names: list[str], most: int = 8) -> str:
    shown = [f"{name} {machine.packages[name]}" for name in names[:most]]
    return ", ".join([*shown, f"{len(names) - most} more"] if len(names) > most else shown)
