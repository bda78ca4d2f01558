"""Small models of Detectron2 and MMDetection against their recipes, written down without our modules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import nms, roi_align

from anchorline.train.model.assign import Targets
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.model.roi_heads import DetectionBatch
from anchorline.train.settings import TrainingSettings

Model = Callable[..., FasterRCNN]
RATIOS = (0.5, 1.0, 2.0)
CLIP = math.log(1000 / 16)
COMMON: dict[str, Any] = {
    "anchor_style": "unrounded",
    "roi_sampling": 0,
    "roi_aligned": True,
    "rpn_min_side": 0.0,
    "box_min_side": 0.0,
    "channel_order": "bgr",
    "mean": (103.53, 116.28, 123.675),
    "std": (1.0, 1.0, 1.0),
}
MODELS: dict[str, dict[str, Any]] = {
    "c4": {
        "neck": "single",
        "box_head": "res5",
        "roi_size": 14,
        "bottleneck_stride": "1x1",
        "anchor_sizes": ((16.0, 32.0, 64.0, 96.0, 128.0),),
        "rpn_pre_nms": 6000,
        "rpn_post_nms": 40,
    },
    "dc5": {
        "neck": "dc5",
        "bottleneck_stride": "1x1",
        "anchor_sizes": ((16.0, 32.0, 64.0, 96.0, 128.0),),
        "rpn_pre_nms": 6000,
    },
    "fpn": {"neck": "fpn", "bottleneck_stride": "1x1", "roi_level_rule": "detectron2"},
    "mmdetection": {"neck": "fpn", "roi_level_rule": "mmdetection", "clamp_deltas_below": True},
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, small_model: Model, small_resnet: str) -> FasterRCNN:
    """A small model of each kind, on a canvas of 128x160, that detects things in noise."""
    built = small_model(**{"classes": 3, "backbone": small_resnet, **COMMON, **MODELS[request.param]})
    spread(built)
    return built


@torch.no_grad()
def spread(model: FasterRCNN) -> None:
    """Scale the heads until logits and deltas spread as in a trained model; wild ones enlarge rounding."""

    def scale(layer: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        wanted = {"cls_logits": 1.0, "cls_score": 1.5, "rpn": 0.3, "head": 1.0}[names[layer]]
        layer.weight.mul_(wanted / layer.forward(inputs[0]).std())

    predictor = model.roi_heads.box_predictor
    names = {
        model.rpn.head.cls_logits: "cls_logits",
        model.rpn.head.bbox_pred: "rpn",
        predictor.cls_score: "cls_score",
        predictor.bbox_pred: "head",
    }
    hooks = [layer.register_forward_pre_hook(scale) for layer in names]
    model(torch.rand(1, 128, 160, 3) * 255, torch.tensor([[128.0, 160.0]]))
    for hook in hooks:
        hook.remove()


class Reference:
    """The recipe, from a state dict, one image at a time, with shapes that depend on the data."""

    def __init__(self, model: FasterRCNN) -> None:
        self.settings, self.state = model.settings, model.state_dict()
        self.strides = model.backbone.strides

    def conv(self, name: str, x: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
        """A convolution that keeps the size, or halves it; 1x1, 3x3 or 7x7."""
        weight = self.state[f"{name}.weight"]
        padding = weight.shape[-1] // 2 * dilation
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, padding, dilation)

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias, mean, var = (
            self.state[f"{name}.{part}"][:, None, None]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def stage(self, name: str, x: Tensor, stride: int, dilation: int = 1) -> Tensor:
        """One bottleneck, with a projection for its shortcut."""
        first, second = (stride, 1) if self.settings.bottleneck_stride == "1x1" else (1, stride)
        y = F.relu(self.norm(f"{name}.0.bn1", self.conv(f"{name}.0.conv1", x, first)))
        y = F.relu(self.norm(f"{name}.0.bn2", self.conv(f"{name}.0.conv2", y, second, dilation)))
        y = self.norm(f"{name}.0.bn3", self.conv(f"{name}.0.conv3", y))
        shortcut = self.conv(f"{name}.0.downsample.0", x, stride)
        return F.relu(y + self.norm(f"{name}.0.downsample.1", shortcut))

    def features(self, images: Tensor) -> list[Tensor]:
        """Maps of the strides, from BGR grey levels [1, H, W, 3]."""
        s = self.settings
        x = (images.permute(0, 3, 1, 2) - torch.tensor(s.mean)[:, None, None]) / torch.tensor(s.std)[0]
        x = F.relu(self.norm("backbone.body.bn1", self.conv("backbone.body.conv1", x, 2)))
        x = F.max_pool2d(x, 3, 2, 1)
        stages = []
        for number, stride in enumerate((1, 2, 2), start=1):
            x = self.stage(f"backbone.body.layer{number}", x, stride)
            stages.append(x)
        if s.neck == "single":
            return [x]
        if s.neck == "dc5":
            return [self.stage("backbone.body.layer4", x, 1, dilation=2)]
        stages.append(self.stage("backbone.body.layer4", x, 2))
        inner = [self.conv(f"backbone.fpn.inner_blocks.{i}.0", each) for i, each in enumerate(stages)]
        for level in (2, 1, 0):
            inner[level] = inner[level] + inner[level + 1].repeat_interleave(2, 2).repeat_interleave(2, 3)
        maps = [self.conv(f"backbone.fpn.layer_blocks.{i}.0", each) for i, each in enumerate(inner)]
        return [*maps, maps[-1][:, :, ::2, ::2]]

    def decode(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Boxes [N, 4], clipped to the canvas."""
        low = -CLIP if self.settings.clamp_deltas_below else -math.inf
        side, centre = boxes[:, 2:] - boxes[:, :2], (boxes[:, :2] + boxes[:, 2:]) / 2
        centre = centre + deltas[:, :2] * side
        half = side * torch.exp(deltas[:, 2:].clamp(low, CLIP)) / 2
        height, width = self.settings.canvas
        limits = torch.tensor([width, height] * 2, dtype=torch.float32)
        return torch.minimum(torch.cat((centre - half, centre + half), dim=1).clamp(min=0), limits)

    def proposals(self, maps: list[Tensor]) -> Tensor:
        """The best boxes [P, 4] of all levels after NMS within each."""
        s, boxes, scores = self.settings, [], []
        for feature, sizes, stride in zip(maps, s.anchor_sizes, self.strides, strict=True):
            hidden = F.relu(self.conv("rpn.head.conv.0.0", feature))
            logits = self.conv("rpn.head.cls_logits", hidden)[0].permute(1, 2, 0).flatten()
            deltas = self.conv("rpn.head.bbox_pred", hidden)[0].permute(1, 2, 0).reshape(-1, 4)
            widths = [(size * math.sqrt(1 / ratio), ratio) for ratio in RATIOS for size in sizes]
            anchors = torch.tensor(
                [
                    (x * stride - w / 2, y * stride - r * w / 2, x * stride + w / 2, y * stride + r * w / 2)
                    for y in range(feature.shape[2])
                    for x in range(feature.shape[3])
                    for w, r in widths
                ]
            )
            best, index = logits.topk(min(s.rpn_pre_nms, len(logits)))
            decoded = self.decode(deltas[index], anchors[index])
            whole = ((decoded[:, 2:] - decoded[:, :2]) > 0).all(dim=1)
            decoded, best = decoded[whole], best[whole]
            kept = nms(decoded, best, s.rpn_nms_iou)
            boxes.append(decoded[kept])
            scores.append(best[kept])
        order = torch.cat(scores).argsort(descending=True)[: s.rpn_post_nms]
        return torch.cat(boxes)[order]

    def pooled(self, maps: list[Tensor], boxes: Tensor) -> Tensor:
        s = self.settings
        side = torch.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
        if len(maps) == 1:
            return roi_align(maps[0], [boxes], s.roi_size, 1 / 16, 0, aligned=True)
        if s.roi_level_rule == "detectron2":
            levels = torch.floor(4 + torch.log2(side / s.canonical_size + 1e-8)).clamp(2, 5) - 2
        else:
            levels = torch.floor(torch.log2(side / (s.canonical_size / 4) + 1e-6)).clamp(0, 3)
        each = [roi_align(maps[i], [boxes], 7, 1 / self.strides[i], 0, aligned=True) for i in range(4)]
        return torch.stack(each)[levels.long(), torch.arange(len(boxes))]

    def rows(self, images: Tensor) -> NDArray[np.float32]:
        """Detections as (x1, y1, x2, y2, score, label)."""
        s, maps = self.settings, self.features(images)
        boxes = self.proposals(maps)
        pooled = self.pooled(maps, boxes)
        if s.box_head == "res5":
            hidden = self.stage("roi_heads.box_head.layer4", pooled, 2).mean(dim=(2, 3))
        else:
            hidden = F.relu(self.linear("roi_heads.box_head.fc6", pooled.flatten(1)))
            hidden = F.relu(self.linear("roi_heads.box_head.fc7", hidden))
        scores = self.linear("roi_heads.box_predictor.cls_score", hidden).softmax(dim=1)
        deltas = self.linear("roi_heads.box_predictor.bbox_pred", hidden) / torch.tensor(
            [10.0, 10.0, 5.0, 5.0]
        ).repeat(scores.shape[1])
        found = []
        for label in range(scores.shape[1] - 1):
            score = scores[:, label + 1]
            decoded = self.decode(deltas[:, 4 * (label + 1) : 4 * (label + 2)], boxes)
            above = score > s.score_threshold
            decoded, score = decoded[above], score[above]
            kept = nms(decoded, score, s.nms_iou)
            columns = (decoded[kept], score[kept, None], torch.full((len(kept), 1), float(label)))
            found.append(torch.cat(columns, dim=1))
        rows = torch.cat(found)
        return rows[rows[:, 4].argsort(descending=True)][: s.max_detections].numpy()


def rows_of(found: DetectionBatch) -> NDArray[np.float32]:
    count = int(found.num_detections[0])
    columns = (found.boxes[0], found.scores[0, :, None], found.labels[0, :, None].float())
    return torch.cat(columns, dim=1)[:count].numpy()


@torch.no_grad()
def test_detections_are_the_recipe_s(model: FasterRCNN, check_same_rows: Callable[..., None]) -> None:
    height, width = model.settings.canvas
    for seed in range(2):
        torch.manual_seed(seed)
        images = torch.rand(1, height // 8, width // 8, 3).mul(255).repeat_interleave(8, 1)
        images = images.repeat_interleave(8, 2)
        expected = Reference(model).rows(images)
        found = rows_of(model(images, torch.tensor([[height, width]], dtype=torch.float32)))
        assert len(expected) > 10
        check_same_rows(found, expected)


@torch.no_grad()
def test_proposals_are_the_recipe_s(model: FasterRCNN) -> None:
    height, width = model.settings.canvas
    images = torch.rand(1, height, width, 3) * 255
    reference = Reference(model)
    maps = model.features(images, torch.tensor([[height, width]]))
    for ours, theirs in zip(maps, reference.features(images), strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    found = model.rpn(maps, torch.tensor([[height, width]]))
    expected = reference.proposals(maps)
    count = int(found.present.sum())
    assert count == len(expected)
    near = (found.boxes[0, :count, None] - expected[None]).abs().amax(dim=2).amin(dim=1)
    assert (near < 0.05).float().mean() > 0.97


@pytest.mark.parametrize("model", ["c4"], indirect=True)
def test_the_losses_train_the_last_stage(model: FasterRCNN) -> None:
    boxes, labels = torch.tensor([[20.0, 30.0, 90.0, 100.0]]), torch.tensor([1])
    images, sizes = torch.rand(1, 128, 160, 3) * 255, torch.tensor([[128.0, 160.0]])
    losses = model.train().losses(images, sizes, Targets.pad([boxes], [labels], (7,)), TrainingSettings())
    sum(losses.values()).backward()
    convolutions = [
        *model.roi_heads.box_head.named_parameters(),
        *model.backbone.body.layer3.named_parameters(),
    ]
    trained = {name: p.grad for name, p in convolutions if p.requires_grad}
    assert len(trained) == 8
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in trained.values())
