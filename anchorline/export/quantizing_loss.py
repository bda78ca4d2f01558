"""What quantisation costs in the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from anchorline.evaluation.compare import compare_all
from anchorline.evaluation.dataset import Dataset
from anchorline.evaluation.evaluate import (
    Detect,
    Progress,
    report_detections,
    run_detector,
    to_dataset_labels,
)
from anchorline.evaluation.proposal_recall import PROPOSAL_COUNTS, proposal_recall
from anchorline.evaluation.verify.cuts import detection_cuts, on_canvas
from anchorline.evaluation.verify.material import has_labels
from anchorline.evaluation.verify.tolerances import TOLERANCES
from anchorline.export.quantizing_checks import CONFIDENT
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections


@dataclass(frozen=True)
class Loss:
    """``measure`` ("mAP50", "recall" or "agreement") of the float model and of the quantised one."""

    measure: str
    reference: float
    candidate: float

    @property
    def drop(self) -> float:
        """How much is lost; a gain is no loss."""
        return max(0.0, self.reference - self.candidate)

    def describe(self) -> str:
        return f"{self.measure} {self.reference:.4f} in float, {self.candidate:.4f} in int8"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "drop": self.drop}


class LossMeter:
    """Compares detectors with the float model on the same images.

    Where the images have labels: mAP50, or for proposals the recall at IoU 0.5. Else the share of the
    detections with a score of at least 0.5 that are alike in both, by the int8 row of
    ``evaluation/verify/tolerances.py``.
    """

    def __init__(
        self, dataset: Dataset, detect: Detect, contract: Contract, progress: Progress | None = None
    ) -> None:
        self._dataset, self._contract = dataset, contract
        self.reference = list(run_detector(detect, dataset, 1, progress))
        figure = self._figure(self.reference) if has_labels(dataset) else float("nan")
        self._labelled = None if np.isnan(figure) else figure

    def measure(self, detect: Detect, progress: Progress | None = None) -> Loss:
        """Run ``detect`` on every image and compare."""
        found = list(run_detector(detect, self._dataset, 1, progress))
        if self._labelled is None:
            return Loss("agreement", 1.0, self._agreement(found))
        name = "mAP50" if self._contract.task == "detections" else "recall"
        return Loss(name, self._labelled, self._figure(found))

    def _figure(self, results: Sequence[Detections]) -> float:
        if self._contract.task == "proposals":
            return proposal_recall(self._dataset.images, results).recall[max(PROPOSAL_COUNTS)][0.5]
        own = [to_dataset_labels(each, self._dataset) for each in results]
        return report_detections(own, self._dataset, "").map50

    def _agreement(self, results: Sequence[Detections]) -> float:
        cuts = detection_cuts(self._contract, TOLERANCES["int8"])
        cuts["score_threshold"] = CONFIDENT
        sides = (
            [on_canvas(each[each.scores >= CONFIDENT], self._contract) for each in side]
            for side in (self.reference, results)
        )
        total = compare_all(*sides, **cuts).total
        every = total.matched + total.missed + total.extra
        return 1.0 if not every else 1.0 - total.wrong / every
