"""The whole way from RPN outputs to detections against py-faster-rcnn's steps, written again in NumPy.

The double has caffe's boxes, which include x2 and y2, works on the unscaled image from the proposals on, and
computes in double precision: lib/rpn/generate_anchors.py and proposal_layer.py, lib/nms/py_cpu_nms.py,
lib/fast_rcnn/bbox_transform.py and test.py. What it is given are the outputs of our networks' layers.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from anchorline.runtime.io.errors import SettingsError
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.settings import load_preset

Array = NDArray[np.float64]
LAST_PIXEL = np.array([0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
CANVAS = (96, 160)
SIZES = (16.0, 48.0, 96.0)
CLASSES = 4
MIN_SIDE, RPN_IOU, IOU, SCORE, PROPOSALS, DETECTIONS = 6.0, 0.7, 0.3, 0.05, 40, 100


def generate_anchors(ratios: tuple[float, ...], scales: list[float]) -> Array:
    """Windows of the base's area with each ratio, rounded; then each of those at each scale."""

    def around(centre: float, width: float, height: float) -> list[float]:
        half = (width - 1) / 2, (height - 1) / 2
        return [centre - half[0], centre - half[1], centre + half[0], centre + half[1]]

    found = []
    for ratio in ratios:
        width = round(np.sqrt(16 * 16 / ratio))
        height = round(width * ratio)
        found += [around(7.5, width * scale, height * scale) for scale in scales]
    return np.array(found)


def transform_inv(boxes: Array, deltas: Array) -> Array:
    """[N, 4] with [N, 4 * K] to [N, 4 * K]."""
    width, height = boxes[:, 2] - boxes[:, 0] + 1.0, boxes[:, 3] - boxes[:, 1] + 1.0
    x, y = boxes[:, 0] + 0.5 * width, boxes[:, 1] + 0.5 * height
    out = np.zeros(deltas.shape)
    for k in range(0, deltas.shape[1], 4):
        new_x, new_y = deltas[:, k] * width + x, deltas[:, k + 1] * height + y
        new_width, new_height = np.exp(deltas[:, k + 2]) * width, np.exp(deltas[:, k + 3]) * height
        out[:, k], out[:, k + 1] = new_x - 0.5 * new_width, new_y - 0.5 * new_height
        out[:, k + 2], out[:, k + 3] = new_x + 0.5 * new_width, new_y + 0.5 * new_height
    return out


def clip(boxes: Array, height: float, width: float) -> Array:
    limits = np.tile([width - 1, height - 1, width - 1, height - 1], boxes.shape[1] // 4)
    return np.maximum(np.minimum(boxes, limits), 0)


def nms(boxes: Array, scores: Array, threshold: float) -> list[int]:
    x1, y1, x2, y2 = boxes.T
    areas = (x2 - x1 + 1) * (y2 - y1 + 1)
    order, keep = np.argsort(-scores, kind="stable"), []
    while len(order):
        first, rest = order[0], order[1:]
        keep.append(int(first))
        width = np.minimum(x2[first], x2[rest]) - np.maximum(x1[first], x1[rest]) + 1
        height = np.minimum(y2[first], y2[rest]) - np.maximum(y1[first], y1[rest]) + 1
        overlap = np.maximum(width, 0) * np.maximum(height, 0)
        order = rest[overlap / (areas[first] + areas[rest] - overlap) <= threshold]
    return keep


def softmax(values: Array, axis: int) -> Array:
    grown = np.exp(values - values.max(axis=axis, keepdims=True))
    return grown / grown.sum(axis=axis, keepdims=True)


def propose(rpn_cls_score: Array, rpn_bbox_pred: Array, im_info: tuple[float, float, float]) -> Array:
    """Proposals [R, 4] on the scaled image, from the maps [2A, H, W] and [4A, H, W]."""
    anchors = generate_anchors((0.5, 1.0, 2.0), [size / 16 for size in SIZES])
    count, (rows, columns) = len(anchors), rpn_cls_score.shape[1:]
    # caffe's Reshape layers to 2 x (A H) x W and back, and the softmax between them.
    prob = softmax(rpn_cls_score.reshape(2, count * rows, columns), 0).reshape(2 * count, rows, columns)
    scores = prob[count:].transpose(1, 2, 0).reshape(-1)
    deltas = rpn_bbox_pred.transpose(1, 2, 0).reshape(-1, 4)
    places = np.array([(16 * x, 16 * y, 16 * x, 16 * y) for y in range(rows) for x in range(columns)])
    boxes = (places[:, None] + anchors[None]).reshape(-1, 4)
    boxes = clip(transform_inv(boxes, deltas), im_info[0], im_info[1])
    sides = boxes[:, 2:] - boxes[:, :2] + 1
    large = np.flatnonzero((sides >= MIN_SIDE * im_info[2]).all(axis=1))
    boxes, scores = boxes[large], scores[large]
    return boxes[nms(boxes, scores, RPN_IOU)[:PROPOSALS]]


def detect(rois: Array, cls_score: Array, bbox_pred: Array, frame: tuple[int, int], scale: float) -> Array:
    """Detections [N, 6] as x1, y1, x2, y2, score, class (1 and up), on the unscaled image."""
    boxes = clip(transform_inv(rois / scale, bbox_pred), *frame)
    scores, found = softmax(cls_score, 1), []
    for label in range(1, scores.shape[1]):
        chosen = np.flatnonzero(scores[:, label] > SCORE)
        mine, of_class = boxes[chosen, 4 * label : 4 * label + 4], scores[chosen, label]
        found += [(*mine[k], of_class[k], label) for k in nms(mine, of_class, IOU)]
    best = sorted(found, key=lambda row: -row[4])[:DETECTIONS]
    return np.array(best)


def small_model(seed: int, frame_scale: float = 1.0) -> FasterRCNN:
    """ZF with narrow layers, on images as large as the canvas, since caffe pads none."""
    torch.manual_seed(seed)
    settings = dataclasses.replace(
        load_preset("zf-paper").model,
        canvas=CANVAS,
        anchor_sizes=(SIZES,),
        representation=16,
        rpn_min_side=MIN_SIDE,
        rpn_post_nms=PROPOSALS,
        box_weights=(1.0, 1.0, 1.0, 1.0),
        frame_scale=frame_scale,
        std=(58.0, 58.0, 58.0),
    )
    model = FasterRCNN(settings, CLASSES).eval()
    with torch.no_grad():
        model.rpn.head.bbox_pred.weight.mul_(3)
        model.roi_heads.box_head.fc7.weight.mul_(20)
        model.roi_heads.box_predictor.cls_score.weight.mul_(60)
        model.roi_heads.box_predictor.bbox_pred.weight.mul_(4)
    return model


@torch.no_grad()
def both(model: FasterRCNN, frame: tuple[int, int], seed: int) -> tuple[Array, Array]:
    """Detections [N, 6] on the frame, of ours and of the double, whose edges are made continuous."""
    images = torch.randint(0, 256, (1, *CANVAS, 3), generator=torch.Generator().manual_seed(seed))
    images, sizes, scale = (
        images.to(torch.uint8),
        torch.tensor([CANVAS], dtype=torch.float32),
        CANVAS[0] / frame[0],
    )
    assert scale * frame[1] == CANVAS[1]
    found = model(images, sizes)
    count = int(found.num_detections[0])
    ours = [*found.boxes[0].div(scale).T, found.scores[0], found.labels[0] + 1]
    features = model.features(images, sizes)
    hidden, head = model.rpn.head.conv(features[0]), model.rpn.head
    maps = [layer(hidden)[0].double().numpy() for layer in (head.cls_logits, head.bbox_pred)]
    rois = propose(maps[0], maps[1], (*CANVAS, scale))
    given = torch.from_numpy(rois + LAST_PIXEL[:4]).float()[None]
    logits, deltas = (each[0].double().numpy() for each in model.roi_heads.classify(features, given))
    theirs = detect(rois, logits, deltas.reshape(len(deltas), -1), frame, scale)
    return torch.stack(ours, dim=1)[:count].double().numpy(), theirs + LAST_PIXEL


def ordered(rows: Array) -> Array:
    """By class, score and place, so that equal detections stand in equal rows."""
    return rows[np.lexsort((rows[:, 0].round(1), -rows[:, 4].round(4), rows[:, 5]))]


@pytest.mark.parametrize("frame", [(96, 160), (60, 100), (192, 320), (288, 480), (48, 80)])
@pytest.mark.parametrize("seed", [0, 1])
def test_detections_are_py_faster_rcnns(frame: tuple[int, int], seed: int) -> None:
    """On the unscaled image, with the scale of the frames in the settings."""
    ours, theirs = both(small_model(seed, CANVAS[0] / frame[0]), frame, seed)
    assert len(theirs) > 20
    assert len(set(theirs[:, 5])) > 2
    np.testing.assert_allclose(ordered(ours), ordered(theirs), rtol=0, atol=2e-3)


@pytest.mark.parametrize("frame", [(60, 100), (192, 320)])
def test_without_the_scale_boxes_are_off_by_part_of_a_pixel(frame: tuple[int, int]) -> None:
    """What ``frame_scale`` is for: the added pixel is one of the canvas, here 1 / scale of the frame's."""
    scale = CANVAS[0] / frame[0]
    model = small_model(0, 1.0)
    exact, _ = both(small_model(0, scale), frame, 0)
    model.rpn.min_side = MIN_SIDE * scale  # the same proposals
    plain, _ = both(model, frame, 0)
    best = [int(np.abs(plain[:, 4:] - row[4:]).sum(axis=1).argmin()) for row in exact]
    moved = np.abs(plain[best, :4] - exact[:, :4])[np.abs(plain[best, 4] - exact[:, 4]) < 1e-5].max()
    step = abs(1 - 1 / scale)
    assert 0.5 * step < moved < 3 * step


@pytest.mark.parametrize("seed", range(3))
def test_the_smallest_proposal_is_measured_on_the_frame(seed: int) -> None:
    scale = 2.0
    ours, theirs = both(small_model(seed, scale), (48, 80), seed)
    other, _ = both(small_model(seed, 1.0), (48, 80), seed)
    np.testing.assert_allclose(ordered(ours)[:, 4], ordered(theirs)[:, 4], rtol=0, atol=1e-4)
    assert len(other) != len(ours) or not np.allclose(ordered(other), ordered(ours), atol=1e-2)


def test_a_frame_scale_needs_inclusive_edges() -> None:
    with pytest.raises(SettingsError, match=r"model.frame_scale is 2.0.*inclusive"):
        load_preset("mobilenet-v2-fpn-quick", ["model.frame_scale=2.0"])
    with pytest.raises(SettingsError, match=r"model.frame_scale is 0.0.*above 0"):
        load_preset("zf-paper", ["model.frame_scale=0.0"])
