"""Drawing detections: boxes and labels that stay legible at any resolution."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.canvas import check_frame
from anchorline.runtime.detections import NO_TRACK, Detections
from anchorline.runtime.io.errors import SettingsError, printable, shown

Colour = tuple[int, int, int]  # BGR

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
_TAPER = (0.5, 1.0, 1.5)  # widths of a trail's thirds against the boxes' lines, from its beginning

_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_FONT_HAS_UNICODE = int(cv2.__version__.split(".")[0]) >= 5
_TALL_AND_DEEP = "Ag"  # every plate has the height of this text, whatever letters its own has
_SCALE, _LOWEST_SCALE = 0.5, 0.4  # of the font at unit 1, and below which it cannot be read
_CUT = "..."
_MIN_LABEL_SIDE = 40  # frames thinner than this have no room for text
_LABEL_SHARE = 0.33  # of the frame that labels may cover; the least important do without

_HIDDEN = 0.2  # a plate of which more than this share lies under others cannot be read well
_CROWDED = 0.25  # a plate that would hide more than this share of its own object goes beside it
_RANK = 1.0  # square pixels of overlap that one place lower in the order is worth
_ON_SMALL = 100.0  # the same for a place on an object that it would hide


def class_colour(label: int) -> Colour:
    """The BGR colour of a class, the same in every frame and run."""
    return PALETTE[label % len(PALETTE)]


def _checked_colour(given: Colour) -> Colour:
    try:
        blue, green, red = map(operator.index, given)
    except (TypeError, ValueError):
        blue = green = red = -1
    if not 0 <= min(blue, green, red) <= max(blue, green, red) <= 255:
        raise SettingsError(f"colour is {shown(given)}; expected blue, green and red from 0 to 255")
    return blue, green, red


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
    newest last. Raises ``FrameError`` and ``SettingsError``.
    """
    if not isinstance(detections, Detections):
        raise SettingsError(f"what to draw is {shown(detections)}; expected Detections")
    if colour is not None:
        colour = _checked_colour(colour)
    canvas: NDArray[np.uint8] = check_frame(frame).copy()
    height, width = canvas.shape[:2]
    unit = float(np.sqrt(height * width)) / _REFERENCE_SIDE
    thickness = max(1, round(_LINE * unit))
    colours = [colour or class_colour(label) for label in detections.labels.tolist()]
    tracks = [NO_TRACK] * len(detections)
    if detections.track_ids is not None:
        tracks = detections.track_ids.tolist()
    for number, track_colour in zip(tracks, colours, strict=True):
        if trails and number in trails:
            _draw_trail(canvas, trails[number], track_colour, thickness)
    # The first and last pixel of each box, inside the canvas. An edge at x lies between x - 1 and x.
    edges = np.floor(detections.boxes.astype(np.float64) + 0.5)
    limits = np.array([width - 1, height - 1], np.float64)
    first = np.clip(edges[:, :2], 0, limits)
    last = np.clip(edges[:, 2:] - 1, first, limits)
    corners = np.stack((first, last), axis=1).astype(int).tolist()
    for index in np.argsort(detections.scores, kind="stable").tolist():
        start, end = corners[index]
        cv2.rectangle(canvas, start, end, colours[index], thickness)
    if labels and len(detections) and min(height, width) >= _MIN_LABEL_SIDE:
        texts = [
            str(name)
            + (f" #{track}" if ids and track != NO_TRACK else "")
            + (f" {score:.2f}" if scores else "")
            for name, track, score in zip(detections.names, tracks, detections.scores.tolist(), strict=True)
        ]
        _draw_labels(canvas, detections, texts, colours, lettering(unit), thickness)
    return canvas


def _draw_trail(
    canvas: NDArray[np.uint8], trail: NDArray[np.floating], colour: Colour, thickness: int
) -> None:
    """Draw the way of a track, thicker towards its end."""
    points = np.round(trail).astype(np.int32)
    cuts = np.linspace(0, len(points) - 1, len(_TAPER) + 1).astype(int) if len(points) else ()
    for share, start, end in zip(_TAPER, cuts, cuts[1:], strict=False):
        width = max(1, round(share * thickness))
        cv2.polylines(canvas, [points[start : end + 1]], False, colour, width, cv2.LINE_AA)


def _draw_labels(
    canvas: NDArray[np.uint8],
    detections: Detections,
    texts: list[str],
    colours: list[Colour],
    letters: Lettering,
    thickness: int,
) -> None:
    """Place the labels by importance and draw the most important one last.

    The oldest track comes first, then those without one by falling score: scores change from frame to frame,
    and labels that were placed by them would jump about in a video.
    """
    height, width = canvas.shape[:2]
    order = np.argsort(-detections.scores, kind="stable")
    if detections.track_ids is not None:
        ids = detections.track_ids
        order = np.lexsort((-detections.scores, np.where(ids == NO_TRACK, np.iinfo(np.int64).max, ids)))
    fits = [fitted(texts[index], letters, width) for index in order]
    sizes = np.array([(plate_width, letters.plate_height) for _, plate_width in fits])
    room = max(1, int((np.cumsum(sizes.prod(axis=1)) <= _LABEL_SHARE * height * width).sum()))
    boxes = np.clip(detections.boxes[order[:room]], 0, [width, height, width, height])
    outer = np.array([-1, -1, 1, 1], np.float32) * (thickness // 2)  # where the boxes' lines end
    corners, readable = place_labels(boxes + outer, sizes[:room], (height, width))
    for rank in np.flatnonzero(readable)[::-1].tolist():
        text, plate_width = fits[rank]
        x, y = corners[rank].tolist()
        colour = colours[order[rank]]
        end = (x + plate_width - 1, y + letters.plate_height - 1)
        cv2.rectangle(canvas, (x, y), end, colour, cv2.FILLED)
        origin = (x + letters.margin, y + letters.margin // 2 + letters.height)
        cv2.putText(canvas, text, origin, _FONT, letters.scale, ink(colour), letters.weight, cv2.LINE_AA)


def ink(colour: Colour) -> Colour:
    """Black or white, whichever has the higher WCAG contrast with ``colour``."""
    linear = [(c / 255.0 / 12.92 if c <= 10 else ((c / 255.0 + 0.055) / 1.055) ** 2.4) for c in colour]
    luminance = 0.0722 * linear[0] + 0.7152 * linear[1] + 0.2126 * linear[2]
    return _BLACK if (luminance + 0.05) ** 2 > 0.05 * 1.05 else _WHITE


class Lettering(NamedTuple):
    """The size of all text in a frame: OpenCV's scale and stroke, and in pixels the height of capitals, the
    margin around the text on its plate, and the plate's height, with the depth of a g below the line."""

    scale: float
    weight: int
    height: int
    margin: int
    plate_height: int


@lru_cache(maxsize=64)
def lettering(unit: float) -> Lettering:
    """The lettering of frames whose lines are ``2 * unit`` pixels wide."""
    scale = max(_LOWEST_SCALE, _SCALE * unit)
    weight = max(1, round(scale * 1.5))
    (_, height), depth = cv2.getTextSize(_TALL_AND_DEEP, _FONT, scale, weight)
    margin = max(2, round(height * 0.25))
    return Lettering(scale, weight, height, margin, height + depth + margin)


@lru_cache(maxsize=4096)  # names with the hundred scores they are shown with
def fitted(text: str, letters: Lettering, width: int) -> tuple[str, int]:
    """The text, cut where its plate would be wider than ``width`` pixels, and the plate's width."""

    def width_of(shown: str) -> int:
        return int(cv2.getTextSize(shown, _FONT, letters.scale, letters.weight)[0][0])

    text = printable(text)  # OpenCV ends the process over half a UTF-16 pair
    if not _FONT_HAS_UNICODE:  # OpenCV 4 prints other characters as one ? per byte
        text = text.encode("ascii", "replace").decode("ascii")
    room = width - 2 * letters.margin
    shown, kept = text, len(text)
    while width_of(shown) > room and kept > 1:
        kept = min(kept - 1, int(kept * room / width_of(shown)))
        shown = text[: max(1, kept)] + _CUT
    return shown, width_of(shown) + 2 * letters.margin


def place_labels(
    boxes: NDArray[np.floating], sizes: NDArray[np.integer], frame_size: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Corners (x, y) int64 [N, 2] of plates of ``sizes`` (width, height) [N, 2], and which can be read.

    ``boxes`` [N, 4] are xyxy, the most important first; ``frame_size`` is (height, width). Of the
    places at its box a plate takes the one where earlier plates cover least of it, by preference
    above the box, and always inside the frame. It counts as readable where at most a fifth is covered.
    """
    left, top, right, bottom = _places(boxes, sizes, frame_size)
    x1, y1, x2, y2 = np.round(boxes.T)[:, :, None]
    on_its_object = (left < x2) & (right > x1) & (top < y2) & (bottom > y1)
    is_small = np.prod(sizes, axis=1) > _CROWDED * np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    cost = np.where(on_its_object & is_small[:, None], _ON_SMALL, 0.0)
    # What each place costs before anything else is placed.
    preference = np.asarray(cost + np.arange(left.shape[1]) * _RANK, np.float32)
    cost = preference.copy()
    limits = (_HIDDEN * sizes.prod(axis=1)).tolist()
    corners = np.zeros((len(boxes), 2), np.int64)
    readable = np.zeros(len(boxes), bool)
    for row, limit in enumerate(limits):
        place = int(cost[row].argmin())
        corners[row] = left[row, place], top[row, place]
        readable[row] = cost[row, place] - preference[row, place] <= limit
        if readable[row]:  # the others are not drawn; it covers the places of those that follow
            wide = np.minimum(right[row + 1 :], right[row, place])
            wide -= np.maximum(left[row + 1 :], left[row, place])
            high = np.minimum(bottom[row + 1 :], bottom[row, place])
            high -= np.maximum(top[row + 1 :], top[row, place])
            cost[row + 1 :] += wide.clip(0) * high.clip(0)
    return corners, readable


def _places(
    boxes: NDArray[np.floating], sizes: NDArray[np.integer], frame_size: tuple[int, int]
) -> tuple[NDArray[np.float32], ...]:
    """The edges x1, y1, x2 and y2 of every plate at every place, float32 [N, P] each, the best first."""
    x1, y1, x2, y2 = np.round(boxes.T).astype(np.float32)
    wide, high = sizes.T.astype(np.float32)
    above, middle = y1 - high, np.floor((x1 + x2 - wide) / 2)
    corners = (
        (x1, above), (x2 - wide, above), (x1, y1), (x1, y2), (x2 - wide, y2), (x1, y2 - high),
        (x2, y1), (x1 - wide, y1), (middle, above), (middle, y2), (x2, y2 - high), (x1 - wide, y2 - high),
    )  # fmt: skip
    height, width = frame_size
    x = np.stack([corner[0] for corner in corners], axis=1)
    y = np.stack([corner[1] for corner in corners], axis=1)
    x = np.maximum(np.minimum(x, width - wide[:, None]), 0)
    y = np.maximum(np.minimum(y, height - high[:, None]), 0)
    return x, y, x + wide[:, None], y + high[:, None]
