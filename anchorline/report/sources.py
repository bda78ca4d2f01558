"""What the verbs have written about a model: found, read, and held against the model's file.

A file that says it is of other bytes than the model's is never shown: one that was named is refused, one that
was found is told of.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from anchorline.doctor.artefact import Artefact, read_artefact
from anchorline.evaluation.pictures import read_columns
from anchorline.runtime.io.errors import AnchorlineError, DataError, SettingsError, one_line
from anchorline.runtime.io.files import input_errors, sha256_of
from anchorline.runtime.io.schema import LARGEST_TEXT
from anchorline.runtime.tensorrt.manifest import name_and_sha256

_SUFFIXES = (".engine", ".onnx", ".safetensors")  # what a folder is about, the last of the chain first
_LOOKED_AT = 1000  # entries of a folder, and folders in it, among which figures are looked for
_MOST_READ = 200  # JSON files that are opened there
_MOST_TOLD = 20  # of what was found and is not shown
_ALONE = ("per_class.json", "recall.json")  # in a folder that evaluate --pictures wrote

Figure = float | None


class Side(msgspec.Struct, frozen=True):
    """A file, as figures name it."""

    name: str
    sha256: str | None = None
    provider: str = ""
    precision: str = ""


class ClassFigures(msgspec.Struct):
    ap50: Figure
    voc07: Figure
    ap: Figure
    objects: int


class SizeFigures(msgspec.Struct):
    map50: Figure
    map: Figure
    objects: int


class Evaluation(msgspec.Struct):
    """``evaluate --json`` of a model that detects."""

    map50: Figure
    voc07: Figure
    map: Figure
    per_class: dict[str, ClassFigures]
    images: int
    provider: str
    precision: str
    per_size: dict[str, SizeFigures] = {}
    data: str = ""
    model: Side | None = None
    slices: dict[str, Any] | None = None


class Recall(msgspec.Struct):
    """``evaluate --json`` of proposals."""

    recall: dict[str, dict[str, Figure]]
    ar: Figure
    objects: int
    images: int
    provider: str
    precision: str
    data: str = ""
    model: Side | None = None
    slices: dict[str, Any] | None = None


class Stage(msgspec.Struct):
    name: str
    passed: bool
    detail: str
    compared: bool = True
    tolerance_used: Figure = None


class Compared(msgspec.Struct):
    """The detections of a verification."""

    passed: bool
    images: int
    matched: int
    differing: int
    missed: int
    extra: int
    borderline: int
    nms_ties: int
    max_box_error: Figure
    max_score_error: Figure
    accuracy: dict[str, dict[str, dict[str, Figure]]] | None = None
    loss: str | None = None
    first_disagreement: str | None = None


class Verification(msgspec.Struct):
    """``verify --json``, and the record beside an artefact."""

    passed: bool | None
    artefact: Side
    reference: Side | None = None
    first_divergence: str | None = None
    data: str = ""
    stages: list[Stage] | None = None
    stages_note: str | None = None
    detections: Compared | None = None
    traps: list[Stage] = []
    notes: list[str] = []
    not_executed: str | None = None
    date: str = ""
    anchorline: str = ""


class BenchRow(msgspec.Struct):
    """A row of ``bench --json``."""

    model: str
    sha256: str
    provider: str
    precision: str
    batch: int
    threads: int
    frame_size: str
    frames: int
    fps: float
    open_s: float
    first_ms: float
    peak_mib: float
    base_mib: float
    stages: dict[str, dict[str, float]]
    views: float = 1.0
    machine: dict[str, str] = {}


class Curve(msgspec.Struct):
    objects: int
    ap50: Figure
    recall: list[float]
    precision: list[float]


class Curves(msgspec.Struct):
    """``pr_curves.json`` of ``evaluate --pictures``."""

    iou_threshold: float
    classes: dict[str, Curve]
    data: str = ""
    model: Side | None = None


class Confusion(msgspec.Struct):
    """``confusion.json``: the last row and column are the background's."""

    names: list[str]
    counts: list[list[int]]
    min_score: float
    iou_threshold: float
    data: str = ""
    model: Side | None = None


class WorstImage(msgspec.Struct):
    image: str
    missed: int
    false_positives: int


class Worst(msgspec.Struct):
    """``worst_images.json``."""

    min_score: float
    images: list[WorstImage]
    data: str = ""
    model: Side | None = None


Figures = Evaluation | Recall | Verification | list[BenchRow]

# The fields by which a JSON is known for what it is; whatever has none of these is somebody else's.
_KNOWN: tuple[tuple[frozenset[str], Any], ...] = (
    (frozenset({"map50", "per_class", "images"}), Evaluation),
    (frozenset({"recall", "ar", "images"}), Recall),
    (frozenset({"passed", "artefact"}), Verification),
)
_BENCH = frozenset({"model", "fps", "stages"})


@dataclass(frozen=True)
class Evaluated:
    """One evaluation: ``of`` names the file that was measured where that is the reference, not the model."""

    figures: Evaluation | Recall
    of: str | None = None
    curves: Curves | None = None
    confusion: Confusion | None = None
    worst: Worst | None = None
    sheet: Path | None = None


@dataclass(frozen=True)
class Training:
    """The columns of a training's ``metrics.csv``, each [2, N]: steps and values."""

    path: Path
    columns: dict[str, NDArray[np.float64]]


@dataclass
class Sources:
    """All that there is to tell of ``artefact``; ``left_out`` says what was found and not taken, and why."""

    artefact: Artefact
    sha256: str
    evaluations: list[Evaluated] = field(default_factory=list)
    verifications: list[Verification] = field(default_factory=list)
    bench: list[BenchRow] = field(default_factory=list)
    training: Training | None = None
    left_out: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.artefact.path.name

    def missing(self) -> list[tuple[str, str]]:
        """What no file tells of, and the command that would."""
        model, found = shlex.quote(str(self.artefact.path)), []
        evaluate = f"anchorline evaluate {model} --data SPEC --pictures evaluation"
        if not self.evaluations:
            found.append(("accuracy", evaluate))
        elif all(isinstance(each.figures, Evaluation) and not each.curves for each in self.evaluations):
            found.append(("curves, confusion and worst images", evaluate))
        if not self.verifications and self.artefact.kind != "checkpoint":  # others are compared with it
            found.append(("parity", f"anchorline verify REFERENCE {model}"))
        if not self.bench and self.artefact.kind != "checkpoint":  # which bench does not open
            found.append(("latency", f"anchorline bench {model} --json bench.json"))
        return found


def gather(
    target: Path,
    evaluations: Sequence[Path] = (),
    verifications: Sequence[Path] = (),
    benches: Sequence[Path] = (),
    training: Path | None = None,
) -> Sources:
    """Everything about the model ``target``, or about the one in that folder.

    Beside the files that are named those count that lie in the model's folder and in the folders in it.
    Raises ``AnchorlineError`` for a model or a named file that cannot be read or is of another model.
    """
    model = _model_in(target) if target.is_dir() else target
    artefact = read_artefact(model)
    found = Sources(artefact, sha256_of(model))
    named = [
        *((path, _read_as(path, "verify", Verification)) for path in verifications),
        *((path, _read_as(path, "bench", list)) for path in benches),
        *((path, _read_as(path, "evaluate", (Evaluation, Recall))) for path in map(_evaluation, evaluations)),
    ]
    seen = {path.resolve() for path, _ in named}
    looked = [
        (path, figures) for path, figures in _discover(model.parent, found) if path.resolve() not in seen
    ]
    # Verifications first: they say which other file's figures are the model's as well.
    order = sorted([(*each, True) for each in named] + [(*each, False) for each in looked], key=_rank)
    for path, figures, is_named in order:
        reason = _take(found, path, figures)
        if reason and is_named:
            raise DataError(f"{path}: {reason}; measure {model} itself, or leave that file out")
        if reason:
            found.left_out.append(f"{_relative(path, model)}: {reason}")
    places = [training] if training is not None else [model.parent, *_folders(model.parent)]
    for place in places:
        reason = _take_training(found, place if place.suffix == ".csv" else place / "metrics.csv")
        if reason and training is not None:
            raise DataError(f"{training}: {reason}; name the folder that the model was trained in")
        if reason and (place / "metrics.csv").is_file():
            found.left_out.append(f"{_relative(place / 'metrics.csv', model)}: {reason}")
    if (more := len(found.left_out) - _MOST_TOLD) > 0:
        found.left_out[_MOST_TOLD:] = [f"and {more} more"]
    return found


def _rank(row: tuple[Path, Figures, bool]) -> bool:
    return not isinstance(row[1], Verification)


def _model_in(folder: Path) -> Path:
    """The one model that a folder is about; raises ``SettingsError`` where there are several, or none."""
    with input_errors(folder, "expected a folder", DataError):
        paths = sorted(folder.iterdir())
    for suffix in _SUFFIXES:
        found = [path for path in paths if path.suffix.lower() == suffix and path.is_file()]
        if len(found) > 1:
            names = ", ".join(path.name for path in found[:3])
            raise SettingsError(f"{folder}: holds {len(found)} models ({names}, ...); name one of them")
        if found:
            return found[0]
    raise SettingsError(f"{folder}: holds no .engine, .onnx or .safetensors; name the model's file")


def _folders(folder: Path) -> list[Path]:
    with input_errors(folder, "expected a folder", DataError), os.scandir(folder) as entries:
        some = itertools.islice(entries, _LOOKED_AT)
        return sorted(Path(each.path) for each in some if not each.name.startswith(".") and each.is_dir())


def _discover(folder: Path, found: Sources) -> Iterator[tuple[Path, Figures]]:
    """What verbs wrote into ``folder`` and the folders in it. Of what cannot be read ``found`` is told."""
    opened = 0
    for place in (folder, *_folders(folder)):
        with os.scandir(place) as entries:
            names = sorted(each.name for each in itertools.islice(entries, _LOOKED_AT))
        for path in (place / name for name in names if name.endswith(".json") and not name.startswith(".")):
            opened += 1
            if opened > _MOST_READ:
                found.left_out.append(f"only the first {_MOST_READ} JSON files were looked at")
                return
            try:
                figures = read_figures(path)
            except AnchorlineError as error:
                text = str(error).removeprefix(f"{path}: ")
                found.left_out.append(f"{_relative(path, found.artefact.path)}: {text}")
                continue
            if figures is not None:
                yield path, figures


def _relative(path: Path, model: Path) -> str:
    return os.path.relpath(path, model.parent)


def read_figures(path: Path) -> Figures | None:
    """What evaluate, verify or bench wrote to ``path``; None for another JSON. Raises ``DataError``."""
    value = _read_json(path)
    if (
        isinstance(value, list)
        and value
        and all(isinstance(row, dict) and row.keys() >= _BENCH for row in value)
    ):
        return _convert(path, value, list[BenchRow])
    if isinstance(value, dict):
        for fields, kind in _KNOWN:
            if value.keys() >= fields:
                return _convert(path, value, kind)
    return None


def _read_json(path: Path) -> Any:
    with input_errors(path, "check the name", DataError):
        if path.is_dir():
            raise DataError(f"{path}: is a folder, expected a JSON file")
        if path.stat().st_size > LARGEST_TEXT:
            raise DataError(f"{path}: is larger than the {LARGEST_TEXT} bytes that are read")
        content = path.read_bytes()
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no JSON ({one_line(error)[:100]}); write it again") from None


def _convert(path: Path, value: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, ValueError, OverflowError, RecursionError) as error:
        reason = one_line(error)[:150]
        raise DataError(f"{path}: is damaged, or of another version ({reason}); write it again") from None


def _read_as(path: Path, verb: str, kind: Any) -> Figures:
    figures = read_figures(path)
    if figures is None or not isinstance(figures, kind):
        raise DataError(f"{path}: is not what anchorline {verb} writes; expected its --json file")
    return figures


def _evaluation(path: Path) -> Path:
    """The JSON of an evaluation: the file, or that in a folder that evaluate --pictures wrote."""
    if not path.is_dir():
        return path
    for name in _ALONE:
        if (path / name).is_file():
            return path / name
    raise DataError(f"{path}: has neither {' nor '.join(_ALONE)}; expected what evaluate --pictures writes")


def _other(side: Side | None, found: Sources) -> str | None:
    """Why figures of ``side`` are not the model's; None where they are, or say nothing of it."""
    if side is None or side.sha256 in (None, found.sha256):
        return None
    if side.name != found.name:
        return f"is of {side.name}"
    changed = f"SHA-256 {str(side.sha256)[:12]}..., the file now has {found.sha256[:12]}..."
    return f"is stale: it is of another {side.name} ({changed})"


def _take(found: Sources, path: Path, figures: Figures) -> str | None:
    """Put figures where they belong; returns why they are not taken."""
    if isinstance(figures, list):
        rows = [row for row in figures if row.sha256 == found.sha256]
        found.bench += [row for row in rows if row not in found.bench]
        return None if rows else _other(Side(figures[0].model, figures[0].sha256), found)
    if isinstance(figures, Verification):
        reason = _other(figures.artefact, found)
        if reason is None:
            _take_verification(found, figures)
        return reason
    kin = {
        each.reference.sha256: each.reference.name
        for each in found.verifications
        if each.passed and each.reference is not None and each.reference.sha256 != found.sha256
    }
    of = None if figures.model is None else kin.get(figures.model.sha256)
    reason = None if of else _other(figures.model, found)
    if reason is None:
        _take_evaluation(found, path, figures, of)
    return reason


def _take_verification(found: Sources, figures: Verification) -> None:
    """The record and ``--json`` of one verification are taken once; the record has the date."""
    if figures.reference is not None:
        name, sha256 = name_and_sha256(msgspec.structs.asdict(figures.reference))
        beside = found.artefact.path.parent / name
        if name and beside.is_file() and sha256_of(beside) != sha256:
            figures.notes.append(f"{name} beside the model is not the file that it was compared with")
    for place, other in enumerate(found.verifications):
        dated = max(other, figures, key=lambda each: each.date)
        same = msgspec.structs.replace(other, date=dated.date, anchorline=dated.anchorline)
        if same == msgspec.structs.replace(figures, date=dated.date, anchorline=dated.anchorline):
            found.verifications[place] = dated
            return
    found.verifications.append(figures)


def _take_evaluation(found: Sources, path: Path, figures: Evaluation | Recall, of: str | None) -> None:
    taken = Evaluated(figures, of)
    if isinstance(figures, Evaluation):
        parts: dict[str, Any] = {}
        for name, kind in (("curves", Curves), ("confusion", Confusion), ("worst", Worst)):
            beside = path.with_name(
                {"curves": "pr_curves", "worst": "worst_images"}.get(name, name) + ".json"
            )
            if not beside.is_file():
                continue
            try:
                part = _convert(beside, _read_json(beside), kind)
            except AnchorlineError as error:
                text = str(error).removeprefix(f"{beside}: ")
                found.left_out.append(f"{_relative(beside, found.artefact.path)}: {text}")
                continue
            if (part.model, part.data) == (figures.model, figures.data):
                parts[name] = part
            else:
                reason = f"is of another evaluation than {path.name}"
                found.left_out.append(f"{_relative(beside, found.artefact.path)}: {reason}")
        sheet = path.with_name("worst_images.jpg")
        taken = Evaluated(figures, of, sheet=sheet if "worst" in parts and sheet.is_file() else None, **parts)
    for place, other in enumerate(found.evaluations):
        if other.figures == figures:  # --json and --pictures of one evaluation
            if other.curves is None:
                found.evaluations[place] = taken
            return
    found.evaluations.append(taken)


def _take_training(found: Sources, path: Path) -> str | None:
    """The metrics of the training that the model comes from: that with its settings."""
    if not path.is_file():
        return "has no metrics.csv"
    settings = path.with_name("settings.json")
    if not settings.is_file():
        return f"has no {settings.name} beside it, which would say of which model it is"
    try:
        stated = _read_json(settings)
        columns = read_columns(path)
    except AnchorlineError as error:
        return str(error).removeprefix(f"{path}: ")
    if stated != found.artefact.contract.source.get("settings"):
        return "is of a training with other settings"
    found.training = Training(path, columns)
    return None
