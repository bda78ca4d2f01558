"""Artefacts opened by their suffix, and two of them compared: for the command, and for ``anchorline.verify``.

A ``.safetensors`` runs in PyTorch, an ``.onnx`` or ``.engine`` in the runtime, without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from anchorline.data.dataset import images_or_video, load_datasets
from anchorline.data.proposals import SelectiveSearch, read_proposals, write_proposals
from anchorline.data.synthetic import scenes
from anchorline.evaluation.evaluation import Detect, Progress, run_detector
from anchorline.runtime.backends.selection import exact_provider
from anchorline.runtime.contract import Contract
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import GpuError, OutputError, SettingsError
from anchorline.runtime.model_file import read_onnx
from anchorline.runtime.tensorrt.manifest import read_manifest
from anchorline.verify.stages import BatchDetector, Subject, onnx_subject
from anchorline.verify.verification import VerifyReport, verify_subjects, write_not_executed, write_record

_ENGINE_PROVIDERS = ("tensorrt", "tensorrt-rtx")
_TORCHVISION_NOTE = (
    "torchvision's canvas is each image's own size in multiples of 32; on the candidate's fixed one the "
    "features near the border differ (docs/import.md)"
)


def is_checkpoint(path: Path) -> bool:
    return path.suffix.lower() == ".safetensors"


def is_engine(path: Path) -> bool:
    return path.suffix.lower() == ".engine"


def open_detector(
    model: Path,
    provider: str = "auto",
    *,
    cpu_precision: str = "auto",
    proposals: Path | None = None,
    data: Sequence[str] = (),
) -> BatchDetector:
    """A detector whose figures can be compared: never bf16 without being told.

    With ``proposals`` the detection head of a checkpoint on these stored ones, for the images of the specs
    ``data`` in their order. Raises ``AnchorlineError`` for what cannot be opened.
    """
    if proposals is not None:
        from anchorline.train.checkpoint import read_header
        from anchorline.train.predict import StoredProposalDetector

        if not is_checkpoint(model):
            raise SettingsError(f"{model}: cannot take stored proposals; expected a model.safetensors")
        dataset = load_datasets(data, names=read_header(model)[1].names)
        return StoredProposalDetector.open(model, read_proposals(proposals, dataset))
    if is_checkpoint(model):
        from anchorline.train.predict import TorchDetector

        return TorchDetector.load(model)
    wanted = provider if cpu_precision == "bf16" else exact_provider(provider)
    return Detector(model, wanted, cpu_precision=cpu_precision, measure=False)


def open_subject(path: Path, provider: str = "auto", other: Contract | None = None) -> Subject:
    """One side of a verification. An engine runs itself or not at all, never the ONNX file in its place.

    What takes frames of any size does so on the canvas of the ``other`` side's contract, where that is fixed;
    a checkpoint does the other side's task as well. Raises ``AnchorlineError`` for what cannot be opened,
    ``GpuError`` for what cannot run here.
    """
    if is_engine(path):
        if provider not in ("auto", *_ENGINE_PROVIDERS):
            raise SettingsError(
                f"{path}: on the provider {provider} not the engine would run but its ONNX file; expected "
                f"auto or {' or '.join(_ENGINE_PROVIDERS)}"
            )
        return Subject(path, Detector(path, "tensorrt" if provider == "auto" else provider))
    if is_checkpoint(path):
        from anchorline.train.predict import checkpoint_subject

        return checkpoint_subject(path, other)
    canvas = other.canvas if other is not None and read_onnx(path).contract.canvas is None else None
    return onnx_subject(path, exact_provider(provider), canvas)


def verify(
    reference: str | Path,
    candidate: str | Path,
    *,
    data: Sequence[str] = (),
    images: Sequence[str] = (),
    limit: int | None = None,
    bisect: bool = False,
    worst: Path | None = None,
    reference_by: str = "anchorline",
    provider: str = "auto",
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare ``candidate`` with ``reference`` and write the record beside the candidate.

    On the labelled ``data`` (specs), on ``images`` (files, folders, a video), or on generated scenes.
    Where one side has a fixed canvas the other is opened on that; a checkpoint does the other side's task.
    ``provider`` is for the candidate. ``worst`` is a .png for the images that differ most. With
    ``reference_by="torchvision"`` the weights of the checkpoint ``reference`` run in torchvision's own
    detector, which shows its detections only. Raises ``AnchorlineError`` for what cannot be opened.
    """
    if data and images:
        raise SettingsError("both --data and --images are given; expected one of them")
    if worst is not None and worst.suffix.lower() != ".png":
        raise SettingsError(f"the picture of the worst images is {str(worst)!r}; expected a .png file")
    reference, candidate = Path(reference), Path(candidate)
    ours, theirs = _open_both(reference, candidate, provider, reference_by)
    with ours, theirs:
        names = ours.detector.contract.names
        if data:
            dataset = load_datasets(data, names=names)
        else:
            dataset = images_or_video(images, names) if images else scenes(names)
        dataset = dataset.first(limit)
        on_other_canvas = reference_by == "torchvision" and theirs.detector.contract.canvas is not None
        # torchvision sizes its canvas by the image, so the traps' odd shapes would differ by design.
        which = () if on_other_canvas else None
        report = verify_subjects(ours, theirs, dataset, bisect=bisect, which_traps=which, progress=progress)
    notes = [*report.notes]
    if on_other_canvas:
        notes.append(_TORCHVISION_NOTE)
    if worst is not None and not report.detections.write_worst(dataset, worst):
        notes.append(f"{worst}: not written, no image differs")
    try:
        write_record(candidate, dataclasses.replace(report, notes=tuple(notes)))
    except OutputError as error:  # a folder that cannot be written to takes nothing from the verdict
        notes.append(f"not recorded: {error}")
    return dataclasses.replace(report, notes=tuple(notes))


def _open_both(
    reference: Path, candidate: Path, provider: str = "auto", reference_by: str = "anchorline"
) -> tuple[Subject, Subject]:
    """Both sides, the candidate on ``provider``. An ONNX file as the reference runs on the CPU, since a
    fault of a provider would be in both sides otherwise. A candidate that cannot run here is recorded."""
    # Of two checkpoints the reference does the candidate's task.
    other = None if is_checkpoint(reference) else _contract_of(reference)
    try:
        theirs = open_subject(candidate, provider, other)
    except GpuError as error:
        write_not_executed(candidate, _reason(candidate, error), reference if reference.is_file() else None)
        raise
    contract = theirs.detector.contract
    if reference_by == "torchvision":
        return _open_in_torchvision(reference, contract.task), theirs
    return open_subject(reference, "auto" if is_engine(reference) else "cpu", contract), theirs


def _contract_of(path: Path) -> Contract:
    return read_manifest(path).contract if is_engine(path) else read_onnx(path).contract


def _reason(path: Path, error: GpuError) -> str:
    return str(error).removeprefix(f"{path}: ")


def _open_in_torchvision(path: Path, task: str) -> Subject:
    if not is_checkpoint(path) or task != "detections":
        raise SettingsError(
            f"--reference torchvision is for a model.safetensors and detections; got {path} and the task "
            f"{task}"
        )
    from anchorline.export.importers.torchvision import TorchvisionDetector
    from anchorline.train.checkpoint import load_checkpoint

    return Subject(path, TorchvisionDetector.of(*load_checkpoint(path)))


def store_proposals(
    data: Sequence[str],
    out: Path,
    *,
    model: Path | None = None,
    method: str | None = None,
    count: int | None = None,
    provider: str = "auto",
    progress: Progress | None = None,
) -> int:
    """Write the proposals of every image of ``data`` to ``out``; returns the number of boxes.

    They are those of ``model`` (a checkpoint, or an ONNX file of the task ``proposals``) or of the
    ``method`` ``"selective-search"``, at most ``count`` an image (default: the model's own number, or
    2000). Raises ``SettingsError``, and what reading data and model raise.
    """
    if (model is None) == (method is None):
        raise SettingsError(f"model is {model}, method {method}; expected one: --model MODEL or --method")
    if method not in (None, "selective-search"):
        raise SettingsError(f"method is {method!r}; expected 'selective-search'")
    propose: Detect
    if model is None:
        propose = (SelectiveSearch() if count is None else SelectiveSearch(count)).batch
    elif is_checkpoint(model):
        from anchorline.train.predict import load_rpn

        propose = load_rpn(model, post_nms=count).batch
    else:
        detector = Detector(model, provider=provider)
        if detector.contract.task != "proposals":
            raise SettingsError(
                f"{model}: has the task {detector.contract.task!r}; expected a model exported with "
                "--task proposals, or a .safetensors"
            )
        propose = detector.batch
    dataset = load_datasets(data)
    return write_proposals(out, dataset, run_detector(propose, dataset, 1, progress), count)
