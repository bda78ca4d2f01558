"""Drawing detections: boxes and labels that stay legible at any resolution."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.detections import Detections
from anchorline.runtime.preprocess import check_frame

# Okabe and Ito's palette for colour-blind readers, then lighter and darker steps of it, as BGR.
PALETTE = (
    (0, 159, 230),  # orange
    (233, 180, 86),  # sky blue
    (115, 158, 0),  # bluish green
    (66, 228, 240),  # yellow
    (178, 114, 0),  # blue
    (0, 94, 213),  # vermilion
    (167, 121, 204),  # reddish purple
    (160, 160, 160),  # grey
    (140, 207, 247),  # light orange
    (96, 60, 0),  # dark blue
    (186, 222, 128),  # light green
    (110, 60, 110),  # dark purple
)
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_FONT_HAS_UNICODE = int(cv2.__version__.split(".")[0]) >= 5
_TALL_AND_DEEP = "Ag"  # every plate has the height of this text, whatever letters its own has
_REFERENCE_SIDE = 800.0  # the geometric mean of the sides at which lines are 2 px and the font scale 0.6
_MIN_LABEL_SIDE = 40  # frames thinner than this have no room for text


def class_colour(label: int) -> tuple[int, int, int]:
    """The BGR colour of a class, the same in every frame and run."""
    return PALETTE[label % len(PALETTE)]


def draw(
    frame: NDArray[np.uint8],
    detections: Detections,
    *,
    labels: bool = True,
    scores: bool = True,
    colour: tuple[int, int, int] | None = None,
) -> NDArray[np.uint8]:
    """Return a copy of ``frame`` (uint8 BGR [H, W, 3]) with the detections drawn.

    Line width and text grow with the frame. Text lies on its box's colour, black or white by
    contrast, above the box where there is room and always inside the frame. The strongest
    detection is drawn last, on top. ``colour`` (BGR) replaces the colours of the classes.
    """
    canvas: NDArray[np.uint8] = check_frame(frame).copy()
    height, width = canvas.shape[:2]
    unit = float(np.sqrt(height * width)) / _REFERENCE_SIDE
    thickness = max(1, round(2.0 * unit))
    order = np.argsort(detections.scores, kind="stable")
    colours = [colour or class_colour(label) for label in detections.labels.tolist()]
    for index in order:
        cv2.rectangle(canvas, *_corners(detections.boxes[index], canvas), colours[index], thickness)
    if not labels or min(height, width) < _MIN_LABEL_SIDE:
        return canvas
    names = detections.names
    for index in order:
        text = f"{names[index]} {detections.scores[index]:.2f}" if scores else names[index]
        _draw_label(canvas, _printable(text), detections.boxes[index], colours[index], max(0.4, 0.6 * unit))
    return canvas


def _corners(box: NDArray[np.float32], canvas: NDArray[np.uint8]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The first and last pixel of a box, inside the canvas. An edge at x lies between x - 1 and x."""
    height, width = canvas.shape[:2]
    limits = np.array([width - 1, height - 1], np.float64)
    first = np.clip(np.floor(box[:2] + 0.5), 0, limits).astype(int)
    last = np.clip(np.floor(box[2:] + 0.5) - 1, first, limits).astype(int)
    return (int(first[0]), int(first[1])), (int(last[0]), int(last[1]))


def _draw_label(
    canvas: NDArray[np.uint8],
    text: str,
    box: NDArray[np.float32],
    colour: tuple[int, int, int],
    scale: float,
) -> None:
    height, width = canvas.shape[:2]
    weight = max(1, round(scale * 1.5))
    (text_width, _), _ = cv2.getTextSize(text, _FONT, scale, weight)
    (_, text_height), below = cv2.getTextSize(_TALL_AND_DEEP, _FONT, scale, weight)
    margin = max(2, round(text_height * 0.25))
    plate_width, plate_height = text_width + 2 * margin, text_height + below + margin
    (left, top), _ = _corners(box, canvas)
    x = max(0, min(left, width - plate_width))
    y = top - plate_height if top >= plate_height else min(top, max(0, height - plate_height))
    cv2.rectangle(canvas, (x, y), (x + plate_width - 1, y + plate_height - 1), colour, cv2.FILLED)
    origin = (x + margin, y + margin // 2 + text_height)
    cv2.putText(canvas, text, origin, _FONT, scale, _ink(colour), weight, cv2.LINE_AA)


def _ink(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever has the higher WCAG contrast with ``colour``."""
    linear = [(c / 255.0 / 12.92 if c <= 10 else ((c / 255.0 + 0.055) / 1.055) ** 2.4) for c in colour]
    luminance = 0.0722 * linear[0] + 0.7152 * linear[1] + 0.2126 * linear[2]
    return _BLACK if (luminance + 0.05) ** 2 > 0.05 * 1.05 else _WHITE


def _printable(text: str) -> str:
    """OpenCV 4's fonts hold ASCII only and print other characters as one ``?`` per byte."""
    return text if _FONT_HAS_UNICODE else text.encode("ascii", "replace").decode("ascii")
