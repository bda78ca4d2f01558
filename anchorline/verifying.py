"""The verb ``verify``: two files, opened by what they are, compared and recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anchorline.data.dataset import Dataset
from anchorline.data.specs import load_datasets
from anchorline.data.synthetic import generate_scene
from anchorline.evaluation.evaluate import Progress
from anchorline.runtime.backends.selection import exact_provider
from anchorline.runtime.canvas import padded, place
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import GpuError, OutputError, ParityError, SettingsError
from anchorline.runtime.tensorrt.manifest import manifest_path
from anchorline.verify.material import first_images, from_frames, images_or_video, scenes
from anchorline.verify.report import VerifyReport, write_not_executed, write_record
from anchorline.verify.stages import Subject, onnx_subject
from anchorline.verify.tolerances import TOLERANCES
from anchorline.verify.verify import verify, write_worst_images

# torchvision computes the same in another order, and differs from itself by as much when only the memory
# layout of its tensors changes.
IMPORT_TOLERANCE = dataclasses.replace(TOLERANCES["fp32"], score=1e-3, matched=0.98, confident=0.98)

_ENGINE_PROVIDERS = ("tensorrt", "tensorrt-rtx")

_TORCHVISION_NOTE = (
    "torchvision's canvas is each image's own size in multiples of 32; on a larger one the features near the "
    "border differ (docs/import.md)"
)


def verify_files(
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
    A checkpoint on one side is opened on the canvas the other was exported for. ``provider`` is for the
    candidate. ``worst`` is a .png for the images that differ most. With ``reference_by="torchvision"``
    the weights of the checkpoint ``reference`` run in torchvision's own detector, which shows its
    detections only. Raises ``AnchorlineError`` for what cannot be opened.
    """
    if data and images:
        raise SettingsError("both --data and --images are given; expected one of them")
    if worst is not None and worst.suffix.lower() != ".png":
        raise SettingsError(f"the picture of the worst images is {str(worst)!r}; expected a .png file")
    reference, candidate = Path(reference), Path(candidate)
    ours, theirs = _open_both(reference, candidate, provider, reference_by)
    try:
        dataset = first_images(_material(data, images, ours.detector.contract.names), limit)
        # torchvision sizes its canvas by the image, so the traps' odd shapes would differ by design.
        which = () if reference_by == "torchvision" else None
        report = verify(ours, theirs, dataset, bisect=bisect, which_traps=which, progress=progress)
    finally:
        ours.close()
        theirs.close()
    if reference_by == "torchvision":
        report = dataclasses.replace(report, notes=(*report.notes, _TORCHVISION_NOTE))
    if worst is not None and not write_worst_images(report.detections, dataset, worst):
        report = dataclasses.replace(report, notes=(*report.notes, f"{worst}: not written, no image differs"))
    try:
        write_record(candidate, report)
    except OutputError as error:  # a folder that cannot be written to takes nothing from the verdict
        report = dataclasses.replace(report, notes=(*report.notes, f"not recorded: {error}"))
    return report


def verify_engine(model: Path, engine: Path, images: Sequence[NDArray[np.uint8]] = ()) -> str:
    """Compare a new ``engine`` with the ONNX ``model`` it was built from, and record it; says how it went.

    Where this machine cannot run it, that is recorded and said, and is no failure. An engine that differs
    is removed with its manifest, and ``ParityError`` raised.
    """
    try:
        theirs = _open(engine, "auto", None)
    except GpuError as error:
        reason = str(error).removeprefix(f"{engine}: ")
        write_not_executed(engine, reason, model)
        return f"not verified: {reason}"
    ours = onnx_subject(model, "cpu")
    names = ours.detector.contract.names
    dataset = from_frames("the given images", names, images) if images else scenes(names)
    try:
        report = verify(ours, theirs, dataset)
    finally:
        ours.close()
        theirs.close()
    if not report.passed:
        for path in (engine, manifest_path(engine)):
            path.unlink(missing_ok=True)
        raise ParityError(
            f"{engine}: the engine and {model.name} disagree in {report.reason}; "
            "it was removed, --no-verify keeps it all the same"
        )
    write_record(engine, report)
    return report.describe()


def verify_import(path: Path) -> str:
    """Compare an imported checkpoint with torchvision's own detector, and record it; says how it went.

    On one scene of the size for which torchvision's canvas is the model's. Where there is none, or the model
    is of a library that has no detector here, that is recorded and said. A model that differs is removed,
    and ``ParityError`` raised.
    """
    from anchorline.export.importers.importing import LIBRARY_KEY

    theirs = _open(path, "auto", None)
    contract = theirs.detector.contract
    library, reason = contract.source.get(LIBRARY_KEY, "torchvision"), None
    if library != "torchvision":
        reason = f"there is no {library} here to compare with (docs/import.md)"
    elif contract.input_dtype != "float32":
        reason = "the fast resize is not torchvision's"
    elif padded(place(contract.canvas, contract.canvas, contract.resize).valid) != contract.canvas:
        reason = "the canvas is another than torchvision's for any frame of its shape"
    if reason is not None:
        write_not_executed(path, reason)
        return f"not verified: {reason}"
    scene = generate_scene(0, contract.canvas, 0)[0]
    report = verify(
        _open_in_torchvision(path, theirs),
        theirs,
        from_frames("a generated scene", contract.names, [scene]),
        which_traps=(),
        tolerance=IMPORT_TOLERANCE,
    )
    if not report.passed:
        path.unlink(missing_ok=True)
        raise ParityError(
            f"{path}: the imported model and torchvision disagree in {report.reason}; "
            "it was removed, --no-verify keeps it all the same"
        )
    write_record(path, report)
    return report.describe()


def _open_both(reference: Path, candidate: Path, provider: str, reference_by: str) -> tuple[Subject, Subject]:
    """Both sides, the candidate on ``provider``. An ONNX file as the reference runs on the CPU, since a
    fault of a provider would be in both sides otherwise. A candidate that cannot run here is recorded."""
    reference_provider = "auto" if _is_engine(reference) else "cpu"
    # A checkpoint takes task and canvas from the other side, which is therefore opened first.
    waits = _is_checkpoint(candidate) and not _is_checkpoint(reference)
    first = _open(reference, reference_provider, None) if waits and reference_by == "anchorline" else None
    try:
        theirs = _open(candidate, provider, first)
    except GpuError as error:
        reason = str(error).removeprefix(f"{candidate}: ")
        write_not_executed(candidate, reason, reference if reference.is_file() else None)
        raise
    if reference_by == "torchvision":
        return _open_in_torchvision(reference, theirs), theirs
    return first or _open(reference, reference_provider, theirs), theirs


def _is_checkpoint(path: Path) -> bool:
    return path.suffix.lower() == ".safetensors"


def _is_engine(path: Path) -> bool:
    return path.suffix.lower() == ".engine"


def _open(path: Path, provider: str, other: Subject | None) -> Subject:
    """One side, by what the file is."""
    if _is_engine(path):  # the engine itself or nothing: not the ONNX file that would run instead
        if provider not in ("auto", *_ENGINE_PROVIDERS):
            raise SettingsError(
                f"{path}: on the provider {provider} not the engine would run but its ONNX file; expected "
                f"auto or {' or '.join(_ENGINE_PROVIDERS)}"
            )
        return Subject(path, Detector(path, "tensorrt" if provider == "auto" else provider))
    if not _is_checkpoint(path):
        return onnx_subject(path, exact_provider(provider))
    from anchorline.train.predict import checkpoint_subject

    return checkpoint_subject(path, None if other is None else other.detector.contract)


def _open_in_torchvision(path: Path, other: Subject) -> Subject:
    """The weights of a checkpoint in torchvision's own detector."""
    if not _is_checkpoint(path) or other.detector.contract.task != "detections":
        raise SettingsError(
            f"--reference torchvision is for a model.safetensors and detections; got {path} and the task "
            f"{other.detector.contract.task}"
        )
    from anchorline.export.importers.torchvision_reference import TorchvisionDetector
    from anchorline.train.checkpoint import load_checkpoint

    return Subject(path, TorchvisionDetector.of(*load_checkpoint(path)))


def _material(data: Sequence[str], images: Sequence[str], names: tuple[str, ...]) -> Dataset:
    if data:
        return load_datasets(data, names=names)
    return images_or_video(images, names) if images else scenes(names)
