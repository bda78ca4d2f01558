"""A picture of what the network is about to be trained on: augmented images with their boxes.

Ignore regions are shown as one more class, ``ignored``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from anchorline.evaluation.pictures import contact_sheet
from anchorline.runtime.detections import Detections
from anchorline.runtime.drawing import draw
from anchorline.train.data.dataset import CanvasDataset

SAMPLES = 12


def write_sample_sheet(dataset: CanvasDataset, path: Path, samples: int = SAMPLES) -> None:
    """Write the first epoch's views of ``samples`` images, spread over the data, as one picture."""
    chosen = np.linspace(0, len(dataset) - 1, min(samples, len(dataset))).astype(int).tolist()
    pictures = []
    for index in chosen:
        item = dataset[0, index]
        names, regions = dataset.data.names, len(item["ignored"])
        labels = np.concatenate([item["labels"].numpy(), np.full(regions, len(names))])
        boxes = Detections(
            boxes=np.concatenate([item["boxes"].numpy(), item["ignored"].numpy()]),
            scores=np.ones(len(labels), np.float32),
            labels=labels,
            class_names=(*names, "ignored"),
        )
        pictures.append(draw(item["image"].numpy(), boxes, scores=False))
    contact_sheet(pictures, path)
