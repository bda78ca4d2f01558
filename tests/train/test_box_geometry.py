"""IoU, clipping and size tests of boxes against torchvision's ``ops.boxes``."""

from __future__ import annotations

import torch
from torchvision.ops import boxes as box_ops

from anchorline.train.model.boxes import at_least, box_area, clip_to_images, pairwise_iou


def random_boxes(*shape: int) -> torch.Tensor:
    corners = torch.rand(*shape, 2, 2) * 120 - 10
    return torch.cat((corners.amin(dim=-2), corners.amax(dim=-2)), dim=-1)


def test_iou_equals_torchvisions_for_each_image_of_a_batch() -> None:
    a, b = random_boxes(3, 40), random_boxes(3, 7)
    b[0, 0] = a[0, 0]
    expected = torch.stack([box_ops.box_iou(x, y) for x, y in zip(a, b, strict=True)])
    assert torch.equal(pairwise_iou(a, b), expected)
    assert pairwise_iou(a, b)[0, 0, 0] == 1.0


def test_one_set_of_boxes_serves_a_whole_batch() -> None:
    anchors, b = random_boxes(40), random_boxes(3, 7)
    expected = torch.stack([box_ops.box_iou(anchors, y) for y in b])
    assert torch.equal(pairwise_iou(anchors[None], b), expected)


def test_boxes_without_area_have_iou_0_and_never_nan() -> None:
    points = torch.tensor([[[5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 0.0], [5.0, 0.0, 5.0, 9.0]]])
    assert pairwise_iou(points, points).tolist() == [[[0.0] * 3] * 3]


def test_clipping_equals_torchvisions_with_each_images_own_size() -> None:
    sizes = torch.tensor([[80.0, 100.0], [33.0, 17.0], [1.0, 100.0]])
    boxes = random_boxes(3, 5, 20) * 2 - 30
    for image, (height, width) in enumerate(sizes.tolist()):
        expected = box_ops.clip_boxes_to_image(boxes[image].reshape(-1, 4), (int(height), int(width)))
        assert torch.equal(clip_to_images(boxes, sizes)[image].reshape(-1, 4), expected)


def test_at_least_equals_torchvisions_remove_small_boxes() -> None:
    boxes = torch.tensor(
        [
            [0, 0, 1e-3, 5],
            [0, 0, 0.99e-3, 5],
            [1, 1, 1, 1],
            [3, 3, 1, 9],
            [0, 0, 8, 1e-3],
            [0, 0, torch.nan, 5],
        ]
    )
    expected = box_ops.remove_small_boxes(boxes, 1e-3)
    assert torch.nonzero(at_least(boxes, 1e-3)).flatten().tolist() == expected.tolist() == [0, 4]


def test_areas() -> None:
    boxes = random_boxes(50)
    assert torch.equal(box_area(boxes), box_ops.box_area(boxes))
