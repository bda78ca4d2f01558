"""Drawing detections: boxes and labels that stay legible at any resolution."""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.detections import NO_TRACK, Detections
from anchorline.runtime.label_placement import place_labels
from anchorline.runtime.label_text import Colour, Lettering, fitted, lettering, write_label
from anchorline.runtime.preprocess import check_frame

# Okabe and Ito's palette for colour-blind readers with a violet for their black, which dark scenes
# would hide, then lighter and darker steps of it, as BGR.
PALETTE = (
    (0, 159, 230),  # orange
    (233, 180, 86),  # sky blue
    (115, 158, 0),  # bluish green
    (66, 228, 240),  # yellow
    (178, 114, 0),  # blue
    (0, 94, 213),  # vermilion
    (167, 121, 204),  # reddish purple
    (230, 60, 130),  # violet
    (140, 207, 247),  # light orange
    (96, 60, 0),  # dark blue
    (186, 222, 128),  # light green
    (110, 60, 110),  # dark purple
)
_REFERENCE_SIDE = 800.0  # the geometric mean of a frame's sides at unit 1
_LINE = 2.3  # the boxes' line width in pixels at unit 1
_MIN_LABEL_SIDE = 40  # frames thinner than this have no room for text
_LABEL_SHARE = 0.33  # of the frame that labels may cover; the least important do without
_TAPER = (0.5, 1.0, 1.5)  # widths of a trail's thirds against the boxes' lines, from its beginning


def class_colour(label: int) -> Colour:
    """The BGR colour of a class, the same in every frame and run."""
    return PALETTE[label % len(PALETTE)]


def draw(
    frame: NDArray[np.uint8],
    detections: Detections,
    *,
    labels: bool = True,
    scores: bool = True,
    colour: Colour | None = None,
    ids: bool = True,
    trails: Mapping[int, NDArray[np.floating]] | None = None,
) -> NDArray[np.uint8]:
    """Return a copy of ``frame`` (uint8 BGR [H, W, 3]) with the detections drawn.

    Line width and text grow with the frame. Text lies on its box's colour, black or white by
    contrast, by preference above the box, inside the frame, and where no label lies yet; one of
    which others would hide more than a fifth is left out, and so are the last where all labels together
    would cover a third of the frame. The strongest detection is drawn last, on top.
    ``colour`` (BGR) replaces the colours of the classes. ``ids`` adds the track's number where there
    is one; ``trails`` maps such numbers to where the objects were, (x, y) [K, 2] in pixels, the
    newest last.
    """
    canvas: NDArray[np.uint8] = check_frame(frame).copy()
    height, width = canvas.shape[:2]
    unit = float(np.sqrt(height * width)) / _REFERENCE_SIDE
    thickness = max(1, round(_LINE * unit))
    colours = [colour or class_colour(label) for label in detections.labels.tolist()]
    if trails:
        _draw_trails(canvas, detections, trails, colours, thickness)
    for index in np.argsort(detections.scores, kind="stable"):
        cv2.rectangle(canvas, *_corners(detections.boxes[index], canvas), colours[index], thickness)
    if labels and len(detections) and min(height, width) >= _MIN_LABEL_SIDE:
        _draw_labels(canvas, detections, _texts(detections, scores, ids), colours, lettering(unit), thickness)
    return canvas


def _corners(box: NDArray[np.float32], canvas: NDArray[np.uint8]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The first and last pixel of a box, inside the canvas. An edge at x lies between x - 1 and x."""
    height, width = canvas.shape[:2]
    limits = np.array([width - 1, height - 1], np.float64)
    first = np.clip(np.floor(box[:2] + 0.5), 0, limits).astype(int)
    last = np.clip(np.floor(box[2:] + 0.5) - 1, first, limits).astype(int)
    return (int(first[0]), int(first[1])), (int(last[0]), int(last[1]))


def _texts(detections: Detections, scores: bool, ids: bool) -> list[str]:
    """What each label says: ``person #12 0.87``."""
    numbers = [NO_TRACK] * len(detections)
    if ids and detections.track_ids is not None:
        numbers = detections.track_ids.tolist()
    return [
        name + (f" #{number}" if number != NO_TRACK else "") + (f" {score:.2f}" if scores else "")
        for name, number, score in zip(detections.names, numbers, detections.scores.tolist(), strict=True)
    ]


def _draw_labels(
    canvas: NDArray[np.uint8],
    detections: Detections,
    texts: list[str],
    colours: list[Colour],
    letters: Lettering,
    thickness: int,
) -> None:
    """Place the labels by importance and draw the most important one last."""
    height, width = canvas.shape[:2]
    order = _by_importance(detections)
    fits = [fitted(texts[index], letters, width) for index in order]
    sizes = np.array([(plate_width, letters.plate_height) for _, plate_width in fits])
    room = max(1, int((np.cumsum(sizes.prod(axis=1)) <= _LABEL_SHARE * height * width).sum()))
    boxes = np.clip(detections.boxes[order[:room]], 0, [width, height, width, height])
    outer = np.array([-1, -1, 1, 1], np.float32) * (thickness // 2)  # where the boxes' lines end
    corners, readable = place_labels(boxes + outer, sizes[:room], (height, width))
    for rank in np.flatnonzero(readable)[::-1].tolist():
        text, plate_width = fits[rank]
        x, y = corners[rank].tolist()
        write_label(canvas, text, (x, y), plate_width, letters, colours[order[rank]])


def _by_importance(detections: Detections) -> NDArray[np.int64]:
    """Indices of the detections, the oldest track first, then those without one by falling score.

    Scores change from frame to frame; labels that were placed by them would jump about in a video.
    """
    track_ids = detections.track_ids
    if track_ids is None:
        return np.argsort(-detections.scores, kind="stable")
    age = np.where(track_ids == NO_TRACK, np.iinfo(np.int64).max, track_ids)
    return np.lexsort((-detections.scores, age))


def _draw_trails(
    canvas: NDArray[np.uint8],
    detections: Detections,
    trails: Mapping[int, NDArray[np.floating]],
    colours: list[Colour],
    thickness: int,
) -> None:
    """Draw the way of each track that is in the frame, thicker towards its end."""
    if detections.track_ids is None:
        return
    for number, colour in zip(detections.track_ids.tolist(), colours, strict=True):
        points = np.round(trails.get(number, np.zeros((0, 2)))).astype(np.int32)
        cuts = np.linspace(0, len(points) - 1, len(_TAPER) + 1).astype(int) if len(points) else ()
        for share, first, last in zip(_TAPER, cuts, cuts[1:], strict=False):
            width = max(1, round(share * thickness))
            cv2.polylines(canvas, [points[first : last + 1]], False, colour, width, cv2.LINE_AA)
