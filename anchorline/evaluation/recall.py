"""Proposal recall: how many objects a model's best proposals cover."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anchorline.data.boxes import iou_matrix
from anchorline.data.dataset import Dataset, LabelledImage
from anchorline.evaluation.evaluate import Detect, Progress, run_detector
from anchorline.runtime.detections import Detections

if TYPE_CHECKING:
    from rich.table import Table

PROPOSAL_COUNTS = (1, 3, 10, 30, 50, 100, 200, 300, 500, 1000)
IOU_THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))


@dataclass(frozen=True)
class ProposalReport:
    """Recall by number of proposals and IoU, and the average recall ``ar`` (IoU .5:.95, most proposals)."""

    recall: dict[int, dict[float, float]]
    ar: float
    objects: int
    images: int
    provider: str = ""
    precision: str = ""

    def to_json(self) -> dict[str, Any]:
        """``{"recall": {"100": {"0.5": ...}}, "ar", ...}`` and what it was measured on; None where
        there is no object."""
        recall = {
            str(count): {str(iou): _number(value) for iou, value in by_iou.items()}
            for count, by_iou in self.recall.items()
        }
        return {
            "recall": recall,
            "ar": _number(self.ar),
            "objects": self.objects,
            "images": self.images,
            "provider": self.provider,
            "precision": self.precision,
        }

    def render(self) -> Table:
        """A rich table: recall by number of proposals (rows) and IoU (columns)."""
        from rich.table import Table

        shown = (0.5, 0.6, 0.7, 0.8, 0.9)
        table = Table(
            title=f"{self.images} images, {self.objects} objects, {self.provider}, {self.precision}",
            caption=f"average recall (IoU .5:.95, {max(self.recall)} proposals) {self.ar:.3f}",
        )
        table.add_column("proposals", justify="right")
        for iou in shown:
            table.add_column(f"IoU {iou}", justify="right")
        for count, by_iou in self.recall.items():
            table.add_row(str(count), *(f"{by_iou[iou]:.3f}" for iou in shown))
        return table


def evaluate_proposals(
    propose: Detect,
    dataset: Dataset,
    batch: int = 1,
    progress: Progress | None = None,
    *,
    provider: str = "",
    precision: str = "",
) -> ProposalReport:
    """Run a model that delivers proposals over the data set and report its recall."""
    report = proposal_recall(dataset.images, list(run_detector(propose, dataset, batch, progress)))
    return dataclasses.replace(report, provider=provider, precision=precision)


def proposal_recall(
    images: Sequence[LabelledImage],
    proposals: Sequence[Detections],
    counts: Sequence[int] = PROPOSAL_COUNTS,
) -> ProposalReport:
    """The share of objects that some proposal covers, whatever its class.

    Of each image the ``count`` best-scored proposals are looked at; an object counts as covered at an
    IoU threshold when one of them reaches it (one proposal may cover several). Difficult and crowd
    objects are left out.
    """
    best = _best_overlaps(images, proposals, counts)
    recall = {
        count: {iou: _share(best[:, column] >= iou) for iou in IOU_THRESHOLDS}
        for column, count in enumerate(counts)
    }
    return ProposalReport(
        recall=recall,
        ar=float(np.mean(list(recall[max(counts)].values()))),
        objects=len(best),
        images=len(images),
    )


def _best_overlaps(
    images: Sequence[LabelledImage], proposals: Sequence[Detections], counts: Sequence[int]
) -> NDArray[np.float64]:
    """The best IoU [objects, counts] of each object with the 1, 3, ... best proposals of its image."""
    columns = np.array(counts, dtype=np.int64)
    best = [np.zeros((0, len(columns)))]
    for image, each in zip(images, proposals, strict=True):
        ranked = np.argsort(-each.scores, kind="stable")[: columns.max()]
        boxes = image.boxes[~(image.difficult | image.crowd)]
        overlaps = np.zeros((len(boxes), len(ranked) + 1))  # the first column stands for no proposal at all
        overlaps[:, 1:] = iou_matrix(boxes, each.boxes[ranked])
        best_so_far = np.maximum.accumulate(overlaps, axis=1)
        best.append(best_so_far[:, np.minimum(columns, len(ranked))])
    return np.concatenate(best)


def _share(hits: NDArray[np.bool_]) -> float:
    return float(hits.mean()) if len(hits) else float("nan")


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value
