"""The contact sheet of differences: which images, in which order, and what is drawn on which side."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from anchorline.evaluation.pictures import PANEL
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import OutputError, SettingsError
from anchorline.verify.compare import compare_all, compare_detections
from anchorline.verify.detection_check import (
    DIFFERING_COLOUR,
    EXTRA_COLOUR,
    MISSED_COLOUR,
    SideBySide,
    severity,
    write_side_by_side,
)

NAMES = ("cat", "dog")
HEIGHT, WIDTH = PANEL
# One box that stays, one that moves, one that is lost, and one that appears.
STAYS, MOVES, LOST, NEW = ([x, 250, x + 80, 330] for x in (20, 140, 260, 380))
MOVED = [MOVES[0] + 6, *MOVES[1:]]


def detections(*boxes: list[int]) -> Detections:
    count = len(boxes)
    return Detections(np.array(boxes).reshape(-1, 4), [0.9] * count, [0] * count, NAMES, size=PANEL)


def row(name: str, reference: Detections, candidate: Detections) -> SideBySide:
    frame = np.full((*PANEL, 3), 255, np.uint8)
    return SideBySide(name, frame, reference, candidate, compare_detections(reference, candidate))


def panels(path: Path, index: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The two pictures of a row of the sheet, below its title."""
    sheet = cv2.imread(str(path))
    top = 6 + 22 + index * (HEIGHT + 22 + 6)
    body = sheet[top : top + HEIGHT]
    return body[:, 6 : 6 + WIDTH], body[:, 6 + WIDTH + 4 : 6 + 2 * WIDTH + 4]


def left_edge(panel: np.ndarray, box: list[int]) -> tuple[int, ...]:
    return tuple(panel[box[3] - 20, box[0]].tolist())


def has(panel: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((panel == colour).all(axis=2).any())


def test_each_kind_of_difference_has_its_colour_and_side(tmp_path: Path) -> None:
    one = row("photo", detections(STAYS, MOVES, LOST), detections(STAYS, MOVED, NEW))
    assert (one.comparison.missed, one.comparison.extra, one.comparison.differing) == (1, 1, 1)
    write_side_by_side(tmp_path / "sheet.png", [one])
    left, right = panels(tmp_path / "sheet.png")
    assert left_edge(left, LOST) == MISSED_COLOUR
    assert left_edge(right, NEW) == EXTRA_COLOUR
    assert left_edge(left, MOVES) == left_edge(right, MOVED) == DIFFERING_COLOUR
    for panel in (left, right):
        blue, green, red = left_edge(panel, STAYS)
        assert blue == green == red < 200
    assert not has(left, EXTRA_COLOUR)
    assert not has(right, MISSED_COLOUR)
    assert (right[LOST[1] : LOST[3], LOST[0] + 20 : LOST[0] + 40] == 255).all()


def test_excused_detections_are_quiet(tmp_path: Path) -> None:
    both = Detections([STAYS, LOST], [0.9, 0.05003], [0, 0], NAMES)
    one = row("threshold", both, both[[0]])
    assert one.comparison.agrees
    write_side_by_side(tmp_path / "sheet.png", [one])
    left, _ = panels(tmp_path / "sheet.png")
    assert not has(left, MISSED_COLOUR)
    blue, green, red = left_edge(left, LOST)
    assert blue == green == red < 200


def test_boxes_are_drawn_where_a_large_image_has_them(tmp_path: Path) -> None:
    frame = np.full((HEIGHT * 4, WIDTH * 4, 3), 255, np.uint8)
    large = detections([side * 4 for side in LOST])
    none = Detections.empty(NAMES)
    write_side_by_side(
        tmp_path / "sheet.png", [SideBySide("large", frame, large, none, compare_detections(large, none))]
    )
    assert left_edge(panels(tmp_path / "sheet.png")[0], LOST) == MISSED_COLOUR


def test_the_worst_come_first_and_the_rest_is_left_out(tmp_path: Path) -> None:
    same = row("same", detections(STAYS), detections(STAYS))
    moved = row("moved", detections(STAYS, MOVES), detections(STAYS, MOVED))
    lost = row("lost", detections(STAYS, LOST), detections(STAYS))
    swapped = row("swapped", detections(LOST), detections(NEW))
    shown = write_side_by_side(tmp_path / "sheet.png", [same, moved, lost, swapped], max_rows=3)
    assert [each.name for each in shown] == ["swapped", "lost", "moved"]
    assert cv2.imread(str(tmp_path / "sheet.png")).shape[0] == 6 + 3 * (HEIGHT + 22 + 6)
    assert has(panels(tmp_path / "sheet.png", 1)[0], MISSED_COLOUR)
    assert not has(panels(tmp_path / "sheet.png", 1)[1], EXTRA_COLOUR)
    assert severity(same.comparison) == (0, 0, 0.0, 0.0)


def test_among_equal_counts_the_larger_error_is_worse() -> None:
    near = compare_detections(detections(MOVES), detections(MOVED))
    far = compare_detections(detections(MOVES), detections([MOVES[0] + 12, *MOVES[1:]]))
    assert severity(far) > severity(near)


def test_any_name_and_size_gives_a_sheet(tmp_path: Path) -> None:
    frame = np.zeros((1, 3000, 3), np.uint8)
    none = Detections.empty(NAMES)
    rows = [SideBySide("ü/" * 200, frame, none, none, compare_detections(none, none))]
    write_side_by_side(tmp_path / "sheet.jpg", rows)
    assert cv2.imread(str(tmp_path / "sheet.jpg")) is not None


def test_misuse_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    one = row("photo", detections(STAYS), detections(MOVES))
    with pytest.raises(SettingsError, match="0 images for 12 rows"):
        write_side_by_side(tmp_path / "sheet.png", [])
    with pytest.raises(SettingsError, match="1 images for 0 rows"):
        write_side_by_side(tmp_path / "sheet.png", [one], max_rows=0)
    total = compare_all([one.reference], [one.candidate]).total
    with pytest.raises(SettingsError, match="photo: its comparison is a sum over images"):
        write_side_by_side(
            tmp_path / "sheet.png", [SideBySide("photo", one.frame, one.reference, one.candidate, total)]
        )
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_side_by_side(tmp_path / "file" / "sheet.png", [one])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
