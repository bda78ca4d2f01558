"""Plots are written whole, in any of the formats, and bad input is named."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from anchorline.data.dataset import Dataset
from anchorline.evaluation.evaluation import report_detections
from anchorline.evaluation.pictures import contact_sheet, plot_loss_curve, plot_pr_curves
from anchorline.runtime.io.errors import DataError, OutputError, SettingsError

CSV = """step,epoch,lr,loss,loss_objectness,loss_box,map50
0,0,0.01,2.5,0.7,0.4,
1,0,0.01,2.0,0.5,0.3,
2,0,0.01,1.5,0.4,0.2,
2,0,,,,,0.35
"""


def _colours(path: Path) -> int:
    image = cv2.imread(str(path))
    return len(np.unique(image.reshape(-1, 3), axis=0))


def test_pr_curves(random_results: Callable[..., Any], tmp_path: Path) -> None:
    images, detections = random_results(2)
    report = report_detections(detections, Dataset("random", ("a", "b", "c"), tuple(images)), "cpu")
    plot_pr_curves(report, tmp_path / "new" / "pr.png")
    assert _colours(tmp_path / "new" / "pr.png") > 50
    plot_pr_curves(report, tmp_path / "pr.svg")
    assert "<svg" in (tmp_path / "pr.svg").read_text()


def test_pr_curves_of_nothing(make_image: Callable[..., Any], tmp_path: Path) -> None:
    from anchorline.runtime.detections import Detections

    report = report_detections([Detections.empty()], Dataset("blank", ("a",), (make_image(),)), "cpu")
    plot_pr_curves(report, tmp_path / "pr.png")
    assert (tmp_path / "pr.png").stat().st_size > 1000


def test_loss_curve(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(CSV)
    plot_loss_curve(tmp_path / "metrics.csv", tmp_path / "loss.png")
    with_map = cv2.imread(str(tmp_path / "loss.png"))
    (tmp_path / "metrics.csv").write_text("\n".join(CSV.splitlines()[:-1]))
    plot_loss_curve(tmp_path / "metrics.csv", tmp_path / "loss.png")
    assert _colours(tmp_path / "loss.png") > 50
    assert not np.array_equal(with_map, cv2.imread(str(tmp_path / "loss.png")))


@pytest.mark.parametrize("text", ["", "step,loss\n", "a,b\n1,2\n", "\0\0", None])
def test_other_files_are_no_loss_curve(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(DataError, match=r"metrics\.csv: .*expected"):
        plot_loss_curve(tmp_path / "metrics.csv", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_unwritable_places_leave_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(CSV)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        plot_loss_curve(tmp_path / "metrics.csv", tmp_path / "file" / "loss.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "metrics.csv"]


def test_contact_sheet_places_images_in_rows(tmp_path: Path) -> None:
    shades = [np.full((20, 40, 3), 20 * i + 10, np.uint8) for i in range(5)]
    contact_sheet(shades, tmp_path / "sheet.png", columns=2, cell=(20, 40))
    sheet = cv2.imread(str(tmp_path / "sheet.png"))
    assert sheet.shape == (3 * 26 + 6, 2 * 46 + 6, 3)
    for index in range(5):
        top, left = index // 2 * 26 + 6, index % 2 * 46 + 6
        assert (sheet[top : top + 20, left : left + 40] == 20 * index + 10).all()
    assert (sheet[2 * 26 + 6 :, 52:] == 255).all()


def test_contact_sheet_keeps_the_aspect_and_shows_titles(tmp_path: Path) -> None:
    images = [np.zeros((400, 100, 3), np.uint8), np.zeros((10, 90, 3), np.uint8)]
    contact_sheet(images, tmp_path / "sheet.png", titles=["tall", "a very long title that has to be cut off"])
    sheet = cv2.imread(str(tmp_path / "sheet.png"))
    body = sheet[28 : 28 + 240, 6 : 6 + 320]
    assert (body[:, :100] == 255).all()
    assert (body[:, 131:189] < 5).all()
    assert (sheet[6:28] < 200).any()


def test_contact_sheet_wants_images_and_matching_titles(tmp_path: Path) -> None:
    image = np.zeros((10, 10, 3), np.uint8)
    with pytest.raises(SettingsError, match="0 images"):
        contact_sheet([], tmp_path / "sheet.png")
    with pytest.raises(SettingsError, match="2 titles"):
        contact_sheet([image], tmp_path / "sheet.png", titles=["a", "b"])


def test_evaluation_imports_no_heavy_package() -> None:
    code = (
        "import sys, anchorline.evaluation.pictures, anchorline.data.dataset, anchorline.verify.compare,"
        " anchorline.data.synthetic_video, anchorline.evaluation.evaluation,"
        " anchorline.data.yolo, anchorline.evaluation.pictures, anchorline.data.summary,"
        " anchorline.verify.traps, anchorline.verify.verification;"
        "heavy = {'torch', 'matplotlib', 'pycocotools', 'faster_coco_eval', 'onnx', 'onnxruntime', 'yaml'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
