"""The text of labels: how large it is in a frame, and how it is set."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]  # BGR

_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_FONT_HAS_UNICODE = int(cv2.__version__.split(".")[0]) >= 5
_TALL_AND_DEEP = "Ag"  # every plate has the height of this text, whatever letters its own has
_SCALE, _LOWEST_SCALE = 0.5, 0.4  # of the font at unit 1, and below which it cannot be read
_CUT = "..."


class Lettering(NamedTuple):
    """The size of all text in a frame: OpenCV's scale and stroke, and in pixels the height of capitals,
    the depth of a g below the line, and the margin around the text on its plate."""

    scale: float
    weight: int
    height: int
    depth: int
    margin: int

    @property
    def plate_height(self) -> int:
        """The height of a label's plate in pixels."""
        return self.height + self.depth + self.margin


@lru_cache(maxsize=64)
def lettering(unit: float) -> Lettering:
    """The lettering of frames whose lines are ``2 * unit`` pixels wide."""
    scale = max(_LOWEST_SCALE, _SCALE * unit)
    weight = max(1, round(scale * 1.5))
    (_, height), depth = cv2.getTextSize(_TALL_AND_DEEP, _FONT, scale, weight)
    return Lettering(scale, weight, height, depth, max(2, round(height * 0.25)))


@lru_cache(maxsize=4096)  # names with the hundred scores they are shown with
def fitted(text: str, letters: Lettering, width: int) -> tuple[str, int]:
    """The text, cut where its plate would be wider than ``width`` pixels, and the plate's width."""
    text = _printable(text)
    room = width - 2 * letters.margin
    shown, kept = text, len(text)
    while _text_width(shown, letters) > room and kept > 1:
        kept = min(kept - 1, int(kept * room / _text_width(shown, letters)))
        shown = text[: max(1, kept)] + _CUT
    return shown, _text_width(shown, letters) + 2 * letters.margin


def write_label(
    canvas: NDArray[np.uint8],
    text: str,
    corner: tuple[int, int],
    width: int,
    letters: Lettering,
    colour: Colour,
) -> None:
    """Draw a plate of ``colour`` with its top left pixel at ``corner`` (x, y), and the text on it."""
    x, y = corner
    end = (x + width - 1, y + letters.plate_height - 1)
    cv2.rectangle(canvas, corner, end, colour, cv2.FILLED)
    origin = (x + letters.margin, y + letters.margin // 2 + letters.height)
    cv2.putText(canvas, text, origin, _FONT, letters.scale, ink(colour), letters.weight, cv2.LINE_AA)


def ink(colour: Colour) -> Colour:
    """Black or white, whichever has the higher WCAG contrast with ``colour``."""
    linear = [(c / 255.0 / 12.92 if c <= 10 else ((c / 255.0 + 0.055) / 1.055) ** 2.4) for c in colour]
    luminance = 0.0722 * linear[0] + 0.7152 * linear[1] + 0.2126 * linear[2]
    return _BLACK if (luminance + 0.05) ** 2 > 0.05 * 1.05 else _WHITE


def _text_width(text: str, letters: Lettering) -> int:
    (width, _), _ = cv2.getTextSize(text, _FONT, letters.scale, letters.weight)
    return int(width)


def _printable(text: str) -> str:
    """OpenCV 4's fonts hold ASCII only and print other characters as one ``?`` per byte."""
    return text if _FONT_HAS_UNICODE else text.encode("ascii", "replace").decode("ascii")
