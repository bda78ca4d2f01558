"""The float resize beside PyTorch's, whatever the sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from anchorline.runtime.resize import resize_float


def by_torch(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float()
    found = torch.nn.functional.interpolate(
        pixels, size=(height, width), mode="bilinear", align_corners=False
    )
    return found[0].permute(1, 2, 0).numpy()


def tolerance(source: tuple[int, int]) -> float:
    """Of grey levels: OpenCV's weights, and a place in single precision may be rounded to its neighbour."""
    return 0.02 + 2 * 255 * float(np.spacing(np.float32(max(source))))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((1080, 1920), (288, 512)),
        ((600, 800), (301, 402)),
        ((600, 800), (299, 398)),  # less than half the height: only the rows that are sampled
        ((60, 80), (100, 133)),
        ((7, 9), (33, 5)),
        ((9, 7), (3, 50)),
        ((1, 1), (3, 100)),
        ((64, 64), (32, 32)),
        ((50, 3), (31, 40000)),
        ((5, 40000), (4, 77)),
        ((40000, 3), (65, 7)),
    ],
)
def test_as_pytorch(source, target):
    frame = np.random.default_rng(0).integers(0, 256, (*source, 3), dtype=np.uint8)
    canvas = np.full((target[0] + 3, target[1] + 2, 3), np.nan, np.float32)
    resize_float(frame, canvas[: target[0], : target[1]])
    np.testing.assert_allclose(
        canvas[: target[0], : target[1]], by_torch(frame, *target), rtol=0, atol=tolerance(source)
    )
    assert np.isnan(canvas[target[0] :]).all()
    assert np.isnan(canvas[: target[0], target[1] :]).all()


@pytest.mark.parametrize("target", [(21, 33), (11, 70)])
def test_a_view_of_a_larger_frame(target):
    frame = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)[3:33, 5:50]
    out = np.empty((*target, 3), np.float32)
    resize_float(frame, out)
    np.testing.assert_allclose(out, by_torch(frame, *target), rtol=0, atol=0.02)
