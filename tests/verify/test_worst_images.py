"""The contact sheet of differences: which images, in which order, and what is drawn on which side."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from anchorline.data.dataset import from_frames
from anchorline.evaluation.pictures import PANEL
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import OutputError
from anchorline.verify.compare import compare_detections, summarise
from anchorline.verify.verification import (
    DIFFERING_COLOUR,
    EXTRA_COLOUR,
    MISSED_COLOUR,
    DetectionCheck,
    severity,
)

NAMES = ("cat", "dog")
HEIGHT, WIDTH = PANEL
# One box that stays, one that moves, one that is lost, and one that appears.
STAYS, MOVES, LOST, NEW = ([x, 250, x + 80, 330] for x in (20, 140, 260, 380))
MOVED = [MOVES[0] + 6, *MOVES[1:]]
WHITE = np.full((*PANEL, 3), 255, np.uint8)


def detections(*boxes: list[int]) -> Detections:
    count = len(boxes)
    return Detections(np.array(boxes).reshape(-1, 4), [0.9] * count, [0] * count, NAMES, size=PANEL)


def write(
    path: Path,
    rows: dict[str, tuple[Detections, Detections]],
    frame: np.ndarray = WHITE,
    count: int = 8,
) -> list[str]:
    """The sheet of images with the results of reference and candidate, by name."""
    references, candidates = zip(*rows.values(), strict=True)
    each = [compare_detections(*pair) for pair in rows.values()]
    check = DetectionCheck(tuple(rows), tuple(each), references, candidates, summarise(each), None, None)
    return check.write_worst(from_frames("frames", NAMES, [frame] * len(rows)), path, count)


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
    sides = detections(STAYS, MOVES, LOST), detections(STAYS, MOVED, NEW)
    comparison = compare_detections(*sides)
    assert (comparison.missed, comparison.extra, comparison.differing) == (1, 1, 1)
    assert write(tmp_path / "sheet.png", {"photo": sides}) == ["photo"]
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
    """One at the threshold; another one that appears brings the image onto the sheet."""
    both = Detections([STAYS, LOST], [0.9, 0.05003], [0, 0], NAMES)
    assert compare_detections(both, both[[0]]).agrees
    write(tmp_path / "sheet.png", {"threshold": (both, detections(STAYS, NEW))})
    left, _ = panels(tmp_path / "sheet.png")
    assert not has(left, MISSED_COLOUR)
    blue, green, red = left_edge(left, LOST)
    assert blue == green == red < 200


def test_boxes_are_drawn_where_a_large_image_has_them(tmp_path: Path) -> None:
    frame = np.full((HEIGHT * 4, WIDTH * 4, 3), 255, np.uint8)
    large = detections([side * 4 for side in LOST])
    write(tmp_path / "sheet.png", {"large": (large, Detections.empty(NAMES))}, frame)
    assert left_edge(panels(tmp_path / "sheet.png")[0], LOST) == MISSED_COLOUR


def test_the_worst_come_first_and_the_rest_is_left_out(tmp_path: Path) -> None:
    rows = {
        "same": (detections(STAYS), detections(STAYS)),
        "moved": (detections(STAYS, MOVES), detections(STAYS, MOVED)),
        "lost": (detections(STAYS, LOST), detections(STAYS)),
        "swapped": (detections(LOST), detections(NEW)),
    }
    assert write(tmp_path / "sheet.png", rows) == ["swapped", "lost", "moved"]
    assert cv2.imread(str(tmp_path / "sheet.png")).shape[0] == 6 + 3 * (HEIGHT + 22 + 6)
    assert has(panels(tmp_path / "sheet.png", 1)[0], MISSED_COLOUR)
    assert not has(panels(tmp_path / "sheet.png", 1)[1], EXTRA_COLOUR)
    assert write(tmp_path / "short.png", rows, count=2) == ["swapped", "lost"]
    assert cv2.imread(str(tmp_path / "short.png")).shape[0] == 6 + 2 * (HEIGHT + 22 + 6)
    assert severity(compare_detections(*rows["same"])) == (0, 0, 0.0, 0.0)


def test_nothing_is_written_where_none_differ(tmp_path: Path) -> None:
    same = detections(STAYS)
    assert write(tmp_path / "sheet.png", {"same": (same, same)}) == []
    assert not list(tmp_path.iterdir())


def test_among_equal_counts_the_larger_error_is_worse() -> None:
    near = compare_detections(detections(MOVES), detections(MOVED))
    far = compare_detections(detections(MOVES), detections([MOVES[0] + 12, *MOVES[1:]]))
    assert severity(far) > severity(near)


def test_any_name_and_size_gives_a_sheet(tmp_path: Path) -> None:
    frame = np.zeros((1, 3000, 3), np.uint8)
    rows = {"ü/" * 200: (Detections.empty(NAMES), detections([0, 0, 30, 1]))}
    write(tmp_path / "sheet.jpg", rows, frame)
    assert cv2.imread(str(tmp_path / "sheet.jpg")) is not None


def test_an_unwritable_place_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write(tmp_path / "file" / "sheet.png", {"photo": (detections(STAYS), detections(MOVES))})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
