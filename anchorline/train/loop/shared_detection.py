"""A detector over a data set, its batches dealt out among the processes of a training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TypeVar

from anchorline.data.dataset import Dataset
from anchorline.evaluation.evaluate import Detect, report_detections, run_detector, to_dataset_labels
from anchorline.runtime.detections import Detections
from anchorline.train.loop.distributed import from_main, gather, process_count, rank

_Item = TypeVar("_Item")


def own_share(items: Sequence[_Item], batch: int) -> list[_Item]:
    """What stands in every ``process_count``-th batch of ``items``, beginning with this process's."""
    starts = range(0, len(items), batch)[rank() :: process_count()]
    return [item for start in starts for item in items[start : start + batch]]


def run_shared(detect: Detect, data: Dataset, batch: int) -> Iterator[Detections]:
    """The results for every image, in order and in all processes; each computes its ``own_share``.

    The batches are those of ``run_detector``: a result does not depend on the number of processes. All
    have to read to the end.
    """
    if process_count() == 1:
        yield from run_detector(detect, data, batch)
        return
    mine = own_share(data.images, batch)
    batches = -(-len(data) // batch)
    for turn in range(-(-batches // process_count())):
        images = tuple(mine[turn * batch : (turn + 1) * batch])
        found = list(run_detector(detect, dataclasses.replace(data, images=images), batch)) if images else []
        for part in gather(found):
            yield from part


def shared_map50(detect: Detect, data: Dataset, batch: int, provider: str) -> float:
    """The mAP50 of ``evaluate``, from detections that all processes share in."""
    found = [to_dataset_labels(each, data) for each in run_shared(detect, data, batch)]
    return from_main(lambda: report_detections(found, data, provider).map50)
