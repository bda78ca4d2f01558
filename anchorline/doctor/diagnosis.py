"""The doctor itself: facts and findings about the machine and, if one is given, about an artefact."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorline.doctor.conflicts import Finding, find_conflicts
from anchorline.doctor.machine import Machine, examine_machine

if TYPE_CHECKING:
    from rich.table import Table

    from anchorline.doctor.artefact import Artefact, Verification
    from anchorline.doctor.runtimes import Runtime

# What is shown of the installed packages; the JSON has these as well as everything that conflicts.
SHOWN_PACKAGES = {
    "PyTorch": ("torch", "torchvision"),
    "TensorRT": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "TensorRT for RTX": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    "CUDA for Python": ("cuda-bindings", "cuda-core", "pycuda"),
    "OpenVINO": ("openvino", "onnxruntime-ep-openvino"),
}


@dataclass(frozen=True)
class ArtefactReport:
    """An artefact with what can run it here and whether it was verified."""

    artefact: Artefact
    runtimes: list[Runtime]
    verification: Verification

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``files.write_json``."""
        return {
            **self.artefact.to_json(),
            "runtimes": [runtime.to_json() for runtime in self.runtimes],
            "verification": asdict(self.verification),
        }


@dataclass(frozen=True)
class DoctorReport:
    """All facts and findings; ``artefact`` is None where none was given."""

    machine: Machine
    artefact: ArtefactReport | None
    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        """Whether there is no problem: notes do not count."""
        return all(finding.level != "problem" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``files.write_json``."""
        machine = asdict(self.machine)
        del machine["requirers"]
        return {
            "healthy": self.healthy,
            "findings": [finding.to_json() for finding in self.findings],
            "artefact": None if self.artefact is None else self.artefact.to_json(),
            "machine": machine,
        }

    def render(self) -> Table:
        """One table: the artefact, what runs it, the machine, the findings with their remedies."""
        from rich.table import Table
        from rich.text import Text

        table = Table(show_header=False, title="healthy" if self.healthy else "problems found")
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for section in self._sections():
            for name, value in section:
                table.add_row(Text(name), Text(value))
            table.add_section()
        return table

    def _sections(self) -> list[list[tuple[str, str]]]:
        sections = [list(_machine_rows(self.machine).items())]
        if self.artefact is not None:
            runs = [
                (runtime.name, f"{'runs it' if runtime.runs else 'no'}: {runtime.reason}")
                for runtime in self.artefact.runtimes
            ]
            rows = {**self.artefact.artefact.rows(), "verified": self.artefact.verification.text}
            sections = [list(rows.items()), runs, *sections]
        findings = [(str(each.level), f"{each.text}\n-> {each.remedy}") for each in self.findings]
        return [*sections, findings] if findings else sections


def doctor(artefact: Path | None = None, machine: Machine | None = None) -> DoctorReport:
    """Examine this machine (or judge the facts in ``machine``) and, where given, an artefact.

    Raises ``ArtefactError`` for an artefact that is missing, damaged or foreign. On a machine whose
    NumPy or OpenCV is broken only the machine is examined, since the contract cannot be read there.
    """
    machine = machine or examine_machine()
    findings = find_conflicts(machine)
    report = None
    if artefact is not None and machine.numpy.version is not None and machine.opencv.version is not None:
        report, more = _examine_artefact(artefact, machine)
        findings = sorted([*more, *findings], key=lambda each: each.level != "problem")
    elif artefact is not None:
        text = f"{artefact} was not examined, because that needs NumPy and OpenCV"
        findings.append(Finding("problem", text, "mend these first, then run anchorline doctor again"))
    return DoctorReport(machine, report, findings)


def _examine_artefact(path: Path, machine: Machine) -> tuple[ArtefactReport, list[Finding]]:
    # Here and not above: these need the runtime, and that needs NumPy and OpenCV.
    from anchorline.doctor.artefact import read_artefact, read_verification
    from anchorline.doctor.runtimes import runtime_findings, runtimes_for

    artefact = read_artefact(path)
    runtimes = runtimes_for(artefact, machine)
    verification = read_verification(path)
    findings = runtime_findings(artefact, runtimes)
    if artefact.kind != "checkpoint" or verification.state != "missing":  # others are compared with it
        findings += verification.findings(path)
    return ArtefactReport(artefact, runtimes, verification), findings


def _machine_rows(machine: Machine) -> dict[str, str]:
    cpu, gpu = machine.cpu, machine.gpu
    gpus = [f"{each.name} (sm_{each.compute_capability}{_memory(each.memory_mib)})" for each in gpu.gpus]
    driver = gpu.driver or ("of unknown version" if gpu.cuda else "none")
    runs_cuda = f", runs CUDA up to {gpu.cuda[0]}.{gpu.cuda[1]}" if gpu.cuda else ""
    runtime = machine.onnxruntime.version
    providers = ", ".join(machine.providers)
    return {
        "system": machine.system,
        "Python": machine.python,
        "CPU": f"{cpu.name}, {cpu.cores} cores{', ' if cpu.features else ''}{', '.join(cpu.features)}",
        "GPU": ", ".join(gpus) or "none",
        "NVIDIA driver": f"{driver}{runs_cuda}",
        "NumPy": machine.numpy.version or "missing",
        "OpenCV": machine.opencv.version or "missing",
        "onnxruntime": f"{runtime}: {providers}" if runtime else "not installed",
        **{title: _versions(machine, names) for title, names in SHOWN_PACKAGES.items()},
    }


def _versions(machine: Machine, names: tuple[str, ...]) -> str:
    there = [f"{name} {machine.packages[name]}" for name in names if name in machine.packages]
    return ", ".join(there) or "not installed"


def _memory(mib: int) -> str:
    return f", {mib / 1024:.0f} GiB" if mib else ""
