"""The images on which two detectors differ most, as a contact sheet: reference left, candidate right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anchorline.evaluation.compare import Comparison
from anchorline.evaluation.panels import Pixels, fit_panel, outline, pair, pair_sheet, to_panel
from anchorline.runtime.detections import Detections
from anchorline.runtime.drawing import draw
from anchorline.runtime.errors import SettingsError

MAX_ROWS = 12

# Okabe and Ito's, as BGR: told apart by colour-blind readers, in the words of the titles.
MISSED_COLOUR = (0, 94, 213)  # vermilion
EXTRA_COLOUR = (233, 180, 86)  # sky blue
DIFFERING_COLOUR = (66, 228, 240)  # yellow

_NAME_LENGTH = 40


@dataclass(frozen=True, eq=False)
class SideBySide:
    """An image (uint8 BGR [H, W, 3]) with both results and the ``compare_detections`` of the two."""

    name: str
    frame: NDArray[np.uint8]
    reference: Detections
    candidate: Detections
    comparison: Comparison


def severity(comparison: Comparison) -> tuple[int, int, float, float]:
    """A key to sort by, larger where two results differ more: detections that have no partner count
    first, then those that moved, then by how much."""
    unmatched = comparison.missed + comparison.extra
    return unmatched, comparison.differing, comparison.max_box_error, comparison.max_score_error


def write_side_by_side(
    path: str | Path, rows: Sequence[SideBySide], max_rows: int = MAX_ROWS
) -> list[SideBySide]:
    """Write the ``max_rows`` rows that differ most, the worst first; returns them.

    Missed boxes are vermilion (left), extra ones sky blue (right), those beyond the tolerances yellow
    (on both sides); what agrees or is excused is thin and grey. Raises ``SettingsError`` without rows
    and for a comparison without alignment, which is one of several images.
    """
    if not rows or max_rows < 1:
        raise SettingsError(f"{len(rows)} images for {max_rows} rows side by side; expected at least 1 each")
    worst = sorted(rows, key=lambda row: severity(row.comparison), reverse=True)[:max_rows]
    pair_sheet([_picture(row) for row in worst], [_title(row) for row in worst], path, columns=1)
    return worst


def _picture(row: SideBySide) -> Pixels:
    alignment = row.comparison.alignment
    if alignment is None:
        raise SettingsError(
            f"{row.name}: its comparison is a sum over images; give what compare_detections returns"
        )
    small, scale = fit_panel(row.frame)
    differing = alignment.pairs[alignment.differing]
    left = _panel(small, scale, row.reference, differing[:, 0], alignment.missed, MISSED_COLOUR)
    right = _panel(small, scale, row.candidate, differing[:, 1], alignment.extra, EXTRA_COLOUR)
    return pair(left, right)


def _panel(
    small: Pixels,
    scale: float,
    detections: Detections,
    differing: NDArray[np.int64],
    alone: NDArray[np.int64],
    colour: tuple[int, int, int],
) -> Pixels:
    """The image with one side's detections; those without a partner on top."""
    picture = small.copy()
    quiet = np.setdiff1d(np.arange(len(detections)), np.concatenate([differing, alone]))
    outline(picture, detections.boxes[quiet], scale)
    for rows, shade in ((differing, DIFFERING_COLOUR), (alone, colour)):
        outline(picture, detections.boxes[rows], scale, shade, thickness=2)
        picture = draw(picture, to_panel(detections[rows], scale), colour=shade)
    return picture


def _title(row: SideBySide) -> str:
    figures = row.comparison
    name = row.name if len(row.name) <= _NAME_LENGTH else f"...{row.name[3 - _NAME_LENGTH :]}"
    return (
        f"{name}: {figures.missed} missed (vermilion), {figures.extra} extra (blue), {figures.differing} "
        f"differ (yellow); boxes to {figures.max_box_error:.2g} px, scores to {figures.max_score_error:.2g}"
    )
