"""The network's fixed-size output slots to ``Detections`` in source pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.canvas import Placement, boxes_to_source
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.errors import ArtefactError, DataError

PROPOSAL_NAMES = ("object",)


def to_detections(
    outputs: Mapping[str, NDArray[np.generic]],
    placements: Sequence[Placement],
    contract: Contract,
    score_threshold: float = 0.0,
) -> list[Detections]:
    """Unpack a batch.

    ``outputs`` holds, by the contract's names, boxes [B, D, 4] on the canvas, scores [B, D], for the
    task ``detections`` labels [B, D], and the number of filled slots [B]. Detections with a score
    of at least ``score_threshold`` are kept, in the order of the slots. Raises ``ArtefactError``
    where the values do not fit the contract, such as a label without a name or a box that is NaN.
    """
    arrays = [outputs[name] for name in contract.outputs]
    boxes, scores, counts = arrays[0], arrays[1], arrays[-1]
    labels = arrays[2] if contract.task == "detections" else np.zeros(scores.shape, np.int64)
    names = contract.names if contract.task == "detections" else PROPOSAL_NAMES
    ids = contract.category_ids if contract.task == "detections" else None
    found = []
    for index, placement in enumerate(placements):
        kept = np.flatnonzero(scores[index, : int(counts[index])] >= np.float32(score_threshold))
        try:
            found.append(
                Detections(
                    boxes=boxes_to_source(boxes[index, kept], placement),
                    scores=scores[index, kept],
                    labels=labels[index, kept],
                    class_names=names,
                    category_ids=ids,
                    size=placement.source,
                )
            )
        except DataError as error:
            raise ArtefactError(
                f"the model's output does not fit its contract: {error}; export again"
            ) from error
    return found
