"""The folder of an evaluation: pictures, JSON, the worst images."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from anchorline.data.dataset import Dataset
from anchorline.evaluation.evaluation import EvaluationReport, proposal_recall, report_detections
from anchorline.evaluation.pictures import (
    PANEL,
    plot_class_table,
    plot_pr_curves,
    plot_recall,
    rank_images,
    worst_images_sheet,
    write_report_files,
)
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import OutputError, SettingsError


@pytest.fixture
def evaluated(random_results: Callable[..., Any]) -> tuple[EvaluationReport, Dataset]:
    images, detections = random_results(4)
    data = Dataset("random", ("cat", "a $ and a $", "_bird"), tuple(images))
    return report_detections(detections, data, "cpu"), data


def _colours(path: Path) -> int:
    image = cv2.imread(str(path))
    return len(np.unique(image[::5, ::3].reshape(-1, 3), axis=0))


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_everything_is_written_as_picture_and_json(
    evaluated: tuple[EvaluationReport, Dataset], tmp_path: Path
) -> None:
    report, data = evaluated
    folder = tmp_path / "new" / "plots"
    write_report_files(report, data, folder, shown_score=0.4)
    names = {"confusion", "per_class", "pr_curves", "worst_images"}
    assert {path.name for path in folder.iterdir()} == {
        *(f"{name}.json" for name in names),
        *(f"{name}.{'jpg' if name == 'worst_images' else 'png'}" for name in names),
    }
    for path in folder.glob("*.[jp][pn]g"):
        assert _colours(path) > 50, path
    assert _read(folder / "per_class.json") == json.loads(json.dumps(report.to_json()))
    assert _read(folder / "confusion.json")["min_score"] == 0.4
    worst = _read(folder / "worst_images.json")
    assert worst["min_score"] == 0.4
    assert len(worst["images"]) == len(data)
    _check_that_curves_give_the_averages(_read(folder / "pr_curves.json"), report)


def _check_that_curves_give_the_averages(written: Any, report: EvaluationReport) -> None:
    assert written["iou_threshold"] == 0.5
    for name, curve in report.curves.items():
        points = written["classes"][name]
        assert points["objects"] == curve.objects
        assert len(points["recall"]) < len(curve.recall)
        recall, precision = np.array(points["recall"]), np.array(points["precision"])
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        area = float(np.sum(np.diff(recall, prepend=0.0) * envelope))
        assert area == pytest.approx(points["ap50"]) == pytest.approx(report.per_class[name].ap50)
        ends = [points[key][-1] for key in ("recall", "precision", "scores")]
        assert ends == pytest.approx([curve.recall[-1], curve.precision[-1], curve.scores[-1]])


def test_nothing_to_find_and_nothing_found(make_image: Callable[..., Any], tmp_path: Path) -> None:
    data = Dataset("blank", ("cat",), (make_image(),))
    for number, found in enumerate((Detections.empty(), Detections([[0, 0, 9, 9]], [0.9], [0]))):
        write_report_files(report_detections([found], data, "cpu"), data, tmp_path / str(number))
        assert _read(tmp_path / f"{number}/pr_curves.json")["classes"]["cat"]["recall"] == []
        assert _read(tmp_path / f"{number}/confusion.json")["counts"] == [[0, 0], [number, 0]]


def test_a_class_that_is_never_detected_stays_in_the_pictures(
    make_image: Callable[..., Any], tmp_path: Path
) -> None:
    images = (make_image([[0, 0, 20, 20], [50, 50, 90, 90]], [0, 1]),)
    found = [Detections([[0, 0, 20, 20]], [0.9], [0])]
    data = Dataset("two", ("cat", "dog"), images)
    write_report_files(report_detections(found, data, "cpu"), data, tmp_path)
    dog = _read(tmp_path / "pr_curves.json")["classes"]["dog"]
    assert (dog["objects"], dog["ap50"], dog["recall"]) == (1, 0.0, [])
    alone = dataclasses.replace(data, names=("cat",), images=(make_image([[0, 0, 20, 20]], [0]),))
    plot_pr_curves(report_detections(found, alone, "cpu"), tmp_path / "alone.png")
    both = cv2.imread(str(tmp_path / "pr_curves.png"))
    assert not np.array_equal(both, cv2.imread(str(tmp_path / "alone.png")))  # the legend names the dog


def test_unusable_calls(evaluated: tuple[EvaluationReport, Dataset], tmp_path: Path) -> None:
    report, data = evaluated
    fewer = dataclasses.replace(data, images=data.images[:3])
    with pytest.raises(SettingsError, match="detections of 12 images and random has 3"):
        write_report_files(report, fewer, tmp_path / "out")
    with pytest.raises(SettingsError, match=r"shown score is 1\.5; expected 0 to 1"):
        write_report_files(report, data, tmp_path / "out", shown_score=1.5)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_report_files(report, data, tmp_path / "file")


def test_proposal_recall_in_two_panels(random_results: Callable[..., Any], tmp_path: Path) -> None:
    images, detections = random_results(1)
    report = proposal_recall(images, detections)
    write_report_files(report, Dataset("random", ("a", "b", "c"), tuple(images)), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"recall.png", "recall.json"}
    assert list(_read(tmp_path / "recall.json")["recall"])[:3] == ["1", "3", "10"]
    picture = cv2.imread(str(tmp_path / "recall.png"))
    assert picture.shape[1] > 2 * picture.shape[0]
    few = proposal_recall(images, detections, counts=(2, 5))  # none of the usual numbers
    plot_recall(few, tmp_path / "few.png")
    assert not np.array_equal(cv2.imread(str(tmp_path / "few.png")), picture)


def test_many_classes_stay_within_a_picture(
    evaluated: tuple[EvaluationReport, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anchorline.evaluation.pictures.MOST_ROWS", 15)
    monkeypatch.setattr("anchorline.evaluation.pictures._LEGEND_OUTSIDE", 24)
    report, _ = evaluated
    names = [f"class {number}" for number in range(30)]
    cat, curve = report.per_class["cat"], report.curves["cat"]
    sizes = {
        size: dataclasses.replace(each, per_class=dict.fromkeys(names, each.per_class["cat"]))
        for size, each in report.per_size.items()
    }
    for count in (10, 30):
        many = dataclasses.replace(
            report,
            per_class=dict.fromkeys(names[:count], cat),
            per_size=sizes,
            curves=dict.fromkeys(names[:count], curve),
        )
        plot_class_table(many, tmp_path / f"table{count}.png")
        plot_pr_curves(many, tmp_path / f"curves{count}.png")
    tables = [cv2.imread(str(tmp_path / f"table{count}.png")).shape[0] for count in (10, 30)]
    assert tables[0] < tables[1] < 1.5 * tables[0]  # 10 and 15 rows
    widths = [cv2.imread(str(tmp_path / f"curves{count}.png")).shape[1] for count in (10, 30)]
    assert widths[0] > widths[1]  # a legend beside the plot, then none


@pytest.fixture
def three(make_image: Callable[..., Any]) -> tuple[Dataset, list[Detections]]:
    """A right image, one with an object of the wrong class, one with two missed objects and one false."""
    box, other = [10, 10, 40, 40], [50, 50, 90, 90]
    images = (
        make_image([box], [0], id="right"),
        make_image([box], [0], id="wrong class"),
        make_image([box, other], [0, 1], id="missed"),
    )
    found = [
        Detections([box, other], [0.9, 0.2], [0, 1]),
        Detections([box], [0.9], [1]),
        Detections([[60, 5, 80, 25]], [0.8], [1]),
    ]
    return Dataset("three", ("cat", "dog"), images), found


def test_the_worst_images_by_hand(three: tuple[Dataset, list[Detections]]) -> None:
    ranked = rank_images(*three)
    assert [(each.id, each.index, each.missed, each.false_positives) for each in ranked] == [
        ("missed", 2, 2, 1),
        ("wrong class", 1, 1, 1),
        ("right", 0, 0, 0),
    ]
    lenient = rank_images(*three, min_score=0.1)
    assert [each.false_positives for each in lenient] == [1, 1, 1]


def test_the_sheet_shows_missed_left_and_false_right(
    three: tuple[Dataset, list[Detections]], tmp_path: Path
) -> None:
    data, found = three
    shown = worst_images_sheet(data, found, tmp_path / "worst.png", count=1)
    assert [each.id for each in shown] == ["missed"]
    sheet = cv2.imread(str(tmp_path / "worst.png"))
    side = PANEL[0]  # the images are square, so the two panels are, too, with 4 pixels between
    left = (sheet.shape[1] - 2 * side - 4) // 2
    top = sheet.shape[0] - side - 6
    scale = side / 100
    panels = sheet[top : top + side, left : left + side], sheet[top : top + side, left + side + 4 :]
    orange, blue = (0, 159, 230), (233, 180, 86)  # the colours of the first two classes

    def bottom_edge(panel: np.ndarray, box: list[float]) -> tuple[int, ...]:
        middle, bottom = round((box[0] + box[2]) / 2 * scale), round(box[3] * scale) - 1
        return tuple(panel[bottom, middle].tolist())

    assert bottom_edge(panels[0], [10, 10, 40, 40]) == orange
    assert bottom_edge(panels[0], [50, 50, 90, 90]) == blue
    assert bottom_edge(panels[1], [60, 5, 80, 25]) == blue
    assert bottom_edge(panels[1], [10, 10, 40, 40]) == (128, 128, 128)  # the image itself
    worst_images_sheet(data, found, tmp_path / "all.png")
    assert cv2.imread(str(tmp_path / "all.png")).shape[0] > 1.5 * sheet.shape[0]
