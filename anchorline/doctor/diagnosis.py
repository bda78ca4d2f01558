"""The doctor itself: facts and findings about the machine and, if one is given, about an artefact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorline.doctor.conflicts import Finding, find_conflicts
from anchorline.doctor.machine import Machine, examine_machine

if TYPE_CHECKING:
    from rich.table import Table

    from anchorline.doctor.artefact import Artefact, Verification
    from anchorline.doctor.runtimes import Runtime
    from anchorline.runtime.backends.choice import Choice

# What is shown of the installed packages; the JSON has these as well as everything that conflicts.
SHOWN_PACKAGES = {
    "PyTorch": ("torch", "torchvision"),
    "TensorRT": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "TensorRT for RTX": (
        "tensorrt-rtx",
        "tensorrt-rtx-cu13",
        "tensorrt-rtx-cu12",
        "onnxruntime-ep-nv-tensorrt-rtx-cu13",
        "onnxruntime-ep-nv-tensorrt-rtx-cu12",
    ),
    "CUDA for Python": ("cuda-bindings", "cuda-core", "pycuda"),
    "OpenVINO": ("openvino", "onnxruntime-ep-openvino"),
}


@dataclass(frozen=True)
class DoctorReport:
    """All facts and findings; of an artefact that was given also what runs it, which of that was measured to
    be the quickest here (of an ONNX file), and whether it was verified."""

    machine: Machine
    findings: list[Finding]
    artefact: Artefact | None = None
    runtimes: Sequence[Runtime] = ()
    choices: Sequence[Choice] = ()
    verification: Verification | None = None

    @property
    def healthy(self) -> bool:
        """Whether there is no problem: notes do not count."""
        return all(finding.level != "problem" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``files.write_json``."""
        artefact, machine = None, asdict(self.machine)
        del machine["requirers"]
        if self.artefact is not None and self.verification is not None:
            runtimes = [asdict(runtime) for runtime in self.runtimes]
            verification = asdict(self.verification)
            measured = [asdict(choice) for choice in self.choices]
            artefact = {**self.artefact.to_json(), "runtimes": runtimes, "measured": measured}
            artefact["verification"] = verification
        findings = [asdict(finding) for finding in self.findings]
        return {"healthy": self.healthy, "findings": findings, "artefact": artefact, "machine": machine}

    def render(self) -> Table:
        """One table: the artefact, what runs it, the machine, the findings with their remedies."""
        from rich.table import Table
        from rich.text import Text

        table = Table(show_header=False, title="healthy" if self.healthy else "problems found")
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        rows: list[tuple[str, str]] = []
        if self.artefact is not None and self.verification is not None:
            rows = [*self.artefact.rows().items(), ("verified", self.verification.text)]
        runs = [(each.name, f"{'runs it' if each.runs else 'no'}: {each.reason}") for each in self.runtimes]
        runs += [("auto takes", _measured(each)) for each in self.choices]
        findings = [(each.level, f"{each.text}\n-> {each.remedy}") for each in self.findings]
        for section in (rows, runs, _machine_rows(self.machine), findings):
            for name, value in section:
                table.add_row(Text(name), Text(value))
            table.add_section()
        return table


def doctor(artefact: Path | None = None, machine: Machine | None = None) -> DoctorReport:
    """Examine this machine (or judge the facts in ``machine``) and, where given, an artefact.

    Raises ``ArtefactError`` for an artefact that is missing, damaged or foreign. On a machine whose
    NumPy or OpenCV is broken only the machine is examined, since the contract cannot be read there.
    """
    machine = machine or examine_machine()
    findings = find_conflicts(machine)
    if artefact is None:
        return DoctorReport(machine, findings)
    if machine.numpy.version is None or machine.opencv.version is None:
        text = f"{artefact} was not examined, because that needs NumPy and OpenCV"
        findings.append(Finding("problem", text, "mend these first, then run anchorline doctor again"))
        return DoctorReport(machine, findings)
    # Here and not above: these need the runtime, and that needs NumPy and OpenCV.
    from anchorline.doctor.artefact import read_artefact, read_verification
    from anchorline.doctor.runtimes import runtime_findings, runtimes_for
    from anchorline.runtime.backends.choice import choices_of
    from anchorline.runtime.model_file import read_onnx

    found = read_artefact(artefact)
    runtimes, verification = runtimes_for(found, machine), read_verification(artefact)
    choices = choices_of(read_onnx(artefact)) if found.kind == "onnx" else []
    more = runtime_findings(found, runtimes)
    if found.kind != "checkpoint" or verification.state != "missing":  # others are compared with it
        more += verification.findings(artefact)
    findings = sorted([*more, *findings], key=lambda each: each.level != "problem")
    return DoctorReport(machine, findings, found, runtimes, choices, verification)


def _measured(choice: Choice) -> str:
    facts, day = choice.facts, datetime.fromtimestamp(choice.measured, timezone.utc).date()
    asked = ", ".join(f"{name} {facts[name]}" for name in ("tuning", "threads", "precision") if name in facts)
    return f"{choice.describe()}; measured on {day} for {asked}"


def _machine_rows(machine: Machine) -> Iterator[tuple[str, str]]:
    cpu, gpu, packages = machine.cpu, machine.gpu, machine.packages
    gpus = [
        f"{each.name} (sm_{each.compute_capability}"
        + (f", {each.memory_mib / 1024:.0f} GiB)" if each.memory_mib else ")")
        for each in gpu.gpus
    ]
    driver = gpu.driver or ("of unknown version" if gpu.cuda else "none")
    runs_cuda = f", runs CUDA up to {gpu.cuda[0]}.{gpu.cuda[1]}" if gpu.cuda else ""
    runtime = machine.onnxruntime.version
    yield "system", machine.system
    yield "Python", machine.python
    yield "CPU", ", ".join((cpu.name, f"{cpu.cores} cores", *cpu.features))
    yield "GPU", ", ".join(gpus) or "none"
    yield "NVIDIA driver", f"{driver}{runs_cuda}"
    yield "NumPy", machine.numpy.version or "missing"
    yield "OpenCV", machine.opencv.version or "missing"
    linked = machine.onnxruntime_tensorrt
    tensorrt = f"; its TensorRT provider is linked to TensorRT {linked}" if linked else ""
    yield (
        "onnxruntime",
        f"{runtime}: {', '.join(machine.providers)}{tensorrt}" if runtime else "not installed",
    )
    for title, names in SHOWN_PACKAGES.items():
        there = [f"{name} {packages[name]}" for name in names if name in packages]
        yield title, ", ".join(there) or "not installed"
