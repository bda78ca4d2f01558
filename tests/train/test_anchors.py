"""Anchors against torchvision's ``AnchorGenerator``, bit by bit."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from anchorline.train.model.anchors import AnchorGenerator as OurGenerator

FPN_SIZES = ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))


def fpn_grids(canvas: tuple[int, int]) -> list[tuple[int, int]]:
    """Grids of strides 4 to 32, and P6 as every second place of P5, which may round up."""
    grids = [(canvas[0] // stride, canvas[1] // stride) for stride in (4, 8, 16, 32)]
    return [*grids, (-(-grids[-1][0] // 2), -(-grids[-1][1] // 2))]


def of_torchvision(
    canvas: tuple[int, int],
    grids: list[tuple[int, int]],
    sizes: tuple[tuple[float, ...], ...],
    ratios: tuple[float, ...],
) -> torch.Tensor:
    generator = AnchorGenerator(sizes, (ratios,) * len(sizes))
    images = ImageList(torch.zeros(1, 3, *canvas), [canvas])
    return generator(images, [torch.zeros(1, 1, *grid) for grid in grids])[0]


@pytest.mark.parametrize(
    "canvas",
    # 160, 224 and 96 are no multiples of 64: there the stride of P6 is a rounded 53, 56 and 48.
    [(64, 64), (128, 160), (160, 224), (96, 352), (480, 640), (32, 32)],
)
@pytest.mark.parametrize("ratios", [(0.5, 1.0, 2.0), (1.0,), (0.3333, 0.9, 3.7)])
def test_a_pyramid_has_torchvisions_anchors(canvas: tuple[int, int], ratios: tuple[float, ...]) -> None:
    grids = fpn_grids(canvas)
    ours = OurGenerator(FPN_SIZES, ratios, "torchvision", (4, 8, 16, 32, 64), True)(grids)
    assert [len(level) for level in ours] == [len(ratios) * rows * columns for rows, columns in grids]
    assert torch.equal(
        torch.cat([level[:] for level in ours]), of_torchvision(canvas, grids, FPN_SIZES, ratios)
    )


@pytest.mark.parametrize("sizes", [(32.0, 64.0, 128.0, 256.0, 512.0), (15.0,), (7.3, 11.5, 1000.0)])
def test_several_sizes_on_one_map_run_ratio_by_ratio(sizes: tuple[float, ...]) -> None:
    canvas, grid, ratios = (96, 160), (6, 10), (0.5, 1.0, 2.0)
    ours = OurGenerator([sizes], ratios, "torchvision", (16,))([grid])[0][:]
    assert torch.equal(ours, of_torchvision(canvas, [grid], (sizes,), ratios))


def test_base_anchors_by_hand() -> None:
    # Size 16, ratio 1: half a side of 8. Ratio 4 is four times as high as wide: 8 x 32.
    anchors = OurGenerator([(16.0,)], (1.0, 4.0), "torchvision", (16,))([(1, 1)])[0][:]
    assert anchors.tolist() == [[-8, -8, 8, 8], [-4, -16, 4, 16]]


def test_places_run_row_by_row() -> None:
    anchors = OurGenerator([(4.0,)], (1.0,), "torchvision", (100,))([(2, 3)])[0][:]
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert centres.tolist() == [[0, 0], [100, 0], [200, 0], [0, 100], [100, 100], [200, 100]]


def test_levels_without_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1 feature maps; expected 2, one a level"):
        OurGenerator([(32.0,), (64.0,)], (1.0,), "torchvision", (8, 16))([(4, 4)])
