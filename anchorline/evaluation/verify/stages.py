"""The stages of a detector, and how one stage's values are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorline.evaluation.verify.tolerances import Tolerance

# From pixels to detections. ``preprocess`` (frame to canvas) is outside the graph, ``detections`` are
# its outputs; a stage of several levels numbers its values (``fpn.0``).
ORDER = (
    "preprocess",
    "pixels",
    "backbone",
    "fpn",
    "objectness",
    "bbox_deltas",
    "proposals",
    "roi_features",
    "class_logits",
    "box_regression",
    "detections",
)
_IN_GRAPH = {*ORDER, "proposal_scores"} - {"preprocess", "detections"}


def is_stage(value: str) -> bool:
    """Whether a value of the graph has a stage's name, with the number of its level where it has levels."""
    stage, _, level = value.partition(".")
    return stage in _IN_GRAPH and (not level or level.isdecimal())


def stage_of(value: str) -> str:
    """The stage a value belongs to: ``fpn`` for ``fpn.2``, ``proposals`` for ``proposal_scores``."""
    return "proposals" if value == "proposal_scores" else value.partition(".")[0]


@dataclass(frozen=True)
class TensorError:
    """How far two tensors are apart, relative to the reference: the root mean square of the difference
    by that of the reference, and the largest difference by the largest magnitude. ``reason`` says in
    words what no number says (another shape, values that are not finite)."""

    value: str
    rms: float
    peak: float
    reason: str | None = None

    def share_of(self, tolerance: Tolerance) -> float:
        """How much of the tolerance is used up: above 1 the tensors differ."""
        return max(self.rms / tolerance.stage_rms, self.peak / tolerance.stage_peak)

    def describe(self) -> str:
        return self.reason or f"rms {self.rms:.2g}, peak {self.peak:.2g} ({self.value})"


def tensor_error(value: str, reference: NDArray[Any], candidate: NDArray[Any], images: int) -> TensorError:
    """Compare two tensors of the same name; the worst of the ``images`` in the batch counts."""
    if reference.shape != candidate.shape:
        return _apart(
            value, f"{value} has the shape {list(candidate.shape)}, expected {list(reference.shape)}"
        )
    worst = TensorError(value, 0.0, 0.0)
    for ours, theirs in zip(reference.reshape(images, -1), candidate.reshape(images, -1), strict=True):
        one = _array_error(value, ours.astype(np.float32), theirs.astype(np.float32))
        if one.reason is not None:
            return one
        worst = TensorError(value, max(worst.rms, one.rms), max(worst.peak, one.peak))
    return worst


def worst_of(errors: Mapping[str, TensorError], tolerance: Tolerance) -> dict[str, TensorError]:
    """The worst error of each stage, by stage."""
    worst: dict[str, TensorError] = {}
    for value, error in errors.items():
        stage = stage_of(value)
        if stage not in worst or error.share_of(tolerance) > worst[stage].share_of(tolerance):
            worst[stage] = error
    return worst


def _array_error(value: str, reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> TensorError:
    for side, values in (("the reference's ", reference), ("", candidate)):
        broken = values.size - int(np.isfinite(values).sum())
        if broken:
            return _apart(value, f"{side}{value} has {broken} values that are not finite (an overflow)")
    difference = candidate - reference
    scale, largest = _rms(reference), float(np.abs(reference).max(initial=0.0))
    rms, peak = _rms(difference), float(np.abs(difference).max(initial=0.0))
    # Where the reference is all zero (a black image) nothing is there to be relative to.
    return TensorError(value, rms / (scale or 1.0), peak / (largest or 1.0))


def _rms(values: NDArray[np.float32]) -> float:
    """In float64, in which the squares of large values do not overflow; 0 for no values."""
    return float(np.sqrt(np.square(values, dtype=np.float64).mean())) if values.size else 0.0


def _apart(value: str, reason: str) -> TensorError:
    return TensorError(value, float("inf"), float("inf"), reason)
