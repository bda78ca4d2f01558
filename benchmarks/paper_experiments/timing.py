"""Time per image of convolutions, proposals and the region-wise part (table 5)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.predict import TorchDetector

PARTS = ("conv", "rpn", "selection", "region")
WARM, REPETITIONS = 5, 50


@torch.inference_mode()
def time_parts(
    detector: TorchDetector,
    frames: Sequence[NDArray[np.uint8]],
    *,
    warm: int = WARM,
    repetitions: int = REPETITIONS,
) -> dict[str, float]:
    """Medians in milliseconds over ``repetitions`` images, one at a time, the frames in turn.

    ``conv``: normalisation and shared convolutions. ``rpn``: the RPN's own layers. ``selection``: decoding,
    ranking and NMS of the proposals. ``region``: RoI pooling, fully connected layers, softmax, final NMS.
    Decoding the file and laying it on the canvas are left out.
    """
    model = detector.model.eval()
    inputs = []
    for frame in frames:
        arrays = detector.prepare([frame])[0].values()
        images, sizes = (torch.from_numpy(array).to(detector.device) for array in arrays)
        inputs.append((images, sizes))
    times = [_one(model, *inputs[number % len(inputs)]) for number in range(warm + repetitions)][warm:]
    return {
        name: round(1000 * statistics.median(each[place] for each in times), 2)
        for place, name in enumerate(PARTS)
    }


def _one(model: FasterRCNN, images: Tensor, sizes: Tensor) -> list[float]:
    """Seconds of the four parts for one image."""
    marks = [_now(images)]
    features = model.features(images, sizes)
    marks.append(_now(images))
    scored = model.rpn.score(features)
    marks.append(_now(images))
    proposals = model.rpn.propose(scored, sizes)
    marks.append(_now(images))
    model.roi_heads(features, proposals, sizes)
    marks.append(_now(images))
    return [after - before for before, after in pairwise(marks)]


def _now(images: Tensor) -> float:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter()
