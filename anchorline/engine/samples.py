"""Sample frames as network inputs, on which the range of half precision is checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anchorline.engine.model_file import check_exported, read_model
from anchorline.evaluation.verify.material import images_or_video
from anchorline.runtime.contract import Contract
from anchorline.runtime.preprocess import Preprocessor, check_frame

# Each costs two passes of the network on the CPU.
SAMPLES = 4


def network_inputs(
    frames: Iterable[NDArray[np.uint8]], contract: Contract
) -> list[dict[str, NDArray[np.generic]]]:
    """Each frame (BGR uint8 [H, W, 3], any size) laid onto the canvas, as a batch of one by input name."""
    preprocess = Preprocessor(contract)
    samples = []
    for frame in frames:
        images, image_sizes, _ = preprocess([check_frame(frame)])
        # The preprocessor uses its batch again.
        samples.append(dict(zip(contract.inputs, (images.copy(), image_sizes), strict=True)))
    return samples


def sample_inputs(
    model: Path, sources: Sequence[str | Path], count: int = SAMPLES
) -> list[dict[str, NDArray[np.generic]]]:
    """``count`` images at even distances out of ``sources`` (images, folders, a video), for ``model``."""
    contract = check_exported(read_model(model), str(model))
    images = images_or_video(sources, contract.names).images
    chosen = images[:: max(1, len(images) // count)][:count]
    return network_inputs((image.load() for image in chosen), contract)
