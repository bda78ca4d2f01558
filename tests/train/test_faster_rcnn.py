"""The whole model against torchvision's own ``FasterRCNN`` with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from anchorline.train.model.assign import Targets
from anchorline.train.model.backbones import FoldingConv, FrozenBatchNorm, fold_frozen_norms
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.model.roi_heads import DetectionBatch
from anchorline.train.model.rpn import RPN, RPNHead
from anchorline.train.model.settings import ModelSettings
from anchorline.train.settings import TrainingSettings

CLASSES = 3
NECKS = {
    "fpn": {"neck": "fpn"},
    "fpn from stride 8": {
        "neck": "fpn",
        "finest_stride": 8,
        "anchor_sizes": ((16.0,), (32.0,), (64.0,), (128.0,)),
    },
    "fpn32": {"neck": "fpn32", "anchor_sizes": ((8.0, 24.0), (32.0, 64.0), (96.0, 128.0))},
    "single": {"neck": "single"},
}
TRAINING = TrainingSettings(rpn_samples=50_000, roi_samples=500, rpn_pre_nms=200, rpn_post_nms=60)


def body() -> nn.Sequential:
    return torchvision.models.mobilenet_v2(norm_layer=FrozenBatchNorm2d).features


def torchvision_backbone(settings: ModelSettings) -> nn.Module:
    if settings.neck == "fpn32":
        return BackboneWithFPN(body(), {"14": "0", "18": "1"}, [160, 1280], settings.fpn_channels)
    if settings.neck == "fpn":
        stages = {4: ("3", 24), 8: ("6", 32), 16: ("13", 96), 32: ("17", 320)}
        tapped = [tap for stride, tap in stages.items() if stride >= settings.finest_stride]
        names = {stage: str(i) for i, (stage, _) in enumerate(tapped)}
        return BackboneWithFPN(body(), names, [width for _, width in tapped], settings.fpn_channels)
    single = nn.Sequential()
    single.body = body()[:14]
    single.out_channels = 96
    return single


def torchvision_twin(model: FasterRCNN) -> TorchvisionFasterRCNN:
    """torchvision's Faster R-CNN with the settings and the weights of ``model``."""
    s = model.settings
    levels = len(s.anchor_sizes)
    names = [str(i) for i in range(max(1, levels - 1))]  # the pyramid's coarsest map is not pooled
    twin = TorchvisionFasterRCNN(
        torchvision_backbone(s),
        min_size=min(s.canvas),
        max_size=max(s.canvas),
        image_mean=[value / 255 for value in s.mean],
        image_std=[value / 255 for value in s.std],
        rpn_anchor_generator=AnchorGenerator(s.anchor_sizes, (s.aspect_ratios,) * levels),
        rpn_pre_nms_top_n_train=TRAINING.rpn_pre_nms,
        rpn_pre_nms_top_n_test=s.rpn_pre_nms,
        rpn_post_nms_top_n_train=TRAINING.rpn_post_nms,
        rpn_post_nms_top_n_test=s.rpn_post_nms,
        rpn_batch_size_per_image=TRAINING.rpn_samples,
        box_roi_pool=MultiScaleRoIAlign(
            names, s.roi_size, s.roi_sampling, canonical_scale=int(s.canonical_size)
        ),
        box_head=torchvision.models.detection.faster_rcnn.TwoMLPHead(
            model.backbone.out_channels * s.roi_size**2, s.representation
        ),
        box_predictor=torchvision.models.detection.faster_rcnn.FastRCNNPredictor(
            s.representation, CLASSES + 1
        ),
        box_score_thresh=s.score_threshold,
        box_nms_thresh=s.nms_iou,
        box_detections_per_img=s.max_detections,
        box_batch_size_per_image=TRAINING.roi_samples,
    )
    state = {
        name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")
    }
    twin.load_state_dict(state)
    return twin.eval()


def smooth(network: nn.Module) -> int:
    """Put SiLU in the place of every ReLU6; how many there were."""
    found = [(m, key) for m in network.modules() for key, c in m.named_children() if type(c) is nn.ReLU6]
    for module, key in found:
        setattr(module, key, nn.SiLU())
    return len(found)


def as_torchvision(images: Tensor) -> list[Tensor]:
    """BGR grey levels [B, H, W, 3] as torchvision wants them: RGB [3, H, W] from 0 to 1."""
    return list(images.flip(3).permute(0, 3, 1, 2).float() / 255)


def canvases(count: int) -> tuple[Tensor, Tensor]:
    images = torch.randint(0, 256, (count, 8, 10, 3), dtype=torch.uint8)
    images = images.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)  # patches of 16 pixels
    return images, torch.tensor([[128.0, 160.0]] * count)


def rows_of(found: DetectionBatch, image: int) -> NDArray[np.float32]:
    """Detections of one image as rows (x1, y1, x2, y2, score, label); unused slots must be zero."""
    rows = torch.cat((found.boxes[image], found.scores[image, :, None], found.labels[image, :, None]), dim=1)
    count = int(found.num_detections[image])
    assert not rows[count:].any()
    return rows[:count].numpy()


@pytest.mark.parametrize("neck", NECKS)
def test_detections_equal_torchvisions(
    small_model: Callable[..., FasterRCNN], check_same_rows: Callable[..., None], neck: str
) -> None:
    model = small_model(classes=CLASSES, **NECKS[neck])
    images, sizes = canvases(3)
    with torch.no_grad():
        found = model(images, sizes)
        expected = torchvision_twin(model)(as_torchvision(images))
    for image, theirs in enumerate(expected):
        assert len(theirs["scores"]) > 20, "too few detections to compare anything"
        check_same_rows(
            rows_of(found, image),
            torch.cat(
                (theirs["boxes"], theirs["scores"][:, None], theirs["labels"][:, None] - 1), dim=1
            ).numpy(),
            box=5e-3,
        )


@pytest.mark.parametrize("neck", NECKS)
def test_training_losses_and_gradients_equal_torchvisions(
    small_model: Callable[..., FasterRCNN], neck: str
) -> None:
    """With so many samples asked for that all candidates are drawn, nothing is left to chance.

    The bodies have a smooth activation. Many values stand at the kinks of ReLU6, where rounding, which
    differs between processors' kernels, turns a slope on or off and moves whole gradients by 1e-2.
    """
    model = small_model(classes=CLASSES, **NECKS[neck])
    twin = torchvision_twin(model).train()
    for body in (model.backbone.body, twin.backbone):
        assert smooth(body) > 20
    assert all(isinstance(m, FoldingConv) for m in model.backbone.body.modules() if isinstance(m, nn.Conv2d))
    images, sizes = canvases(2)
    boxes = [torch.tensor([[20.0, 30.0, 70.0, 80.0], [90.0, 10.0, 130.0, 100.0]]), torch.zeros(0, 4)]
    labels = [torch.tensor([2, 0]), torch.zeros(0, dtype=torch.int64)]
    ours = model.train().losses(images, sizes, Targets.pad(boxes, labels), TRAINING)
    targets = [{"boxes": b, "labels": lab + 1} for b, lab in zip(boxes, labels, strict=True)]
    theirs = twin(as_torchvision(images), targets)
    for mine, other in {
        "loss_objectness": "loss_objectness",
        "loss_rpn_box": "loss_rpn_box_reg",
        "loss_classifier": "loss_classifier",
        "loss_box": "loss_box_reg",
    }.items():
        torch.testing.assert_close(ours[mine], theirs[other], rtol=1e-4, atol=1e-6)
        assert ours[mine] > 0
    sum(ours.values()).backward()
    sum(theirs.values()).backward()
    others = dict(twin.named_parameters())
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) > 50
    for name, parameter in trained:
        gradient = others[name].grad
        error = float((parameter.grad - gradient).norm() / gradient.norm())
        assert error < 1e-3, name


def test_scoring_sampled_anchors_again_changes_no_loss_and_no_gradient(
    small_model: Callable[..., FasterRCNN], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few samples the RPN's gradients come from those alone; the draws are the images' own."""
    settings = TrainingSettings(rpn_samples=32, roi_samples=40, rpn_pre_nms=200, rpn_post_nms=60)
    model = small_model(classes=CLASSES, **NECKS["fpn"]).train()
    smooth(model.backbone.body)
    images, sizes = canvases(2)
    boxes = [torch.tensor([[20.0, 30.0, 70.0, 80.0], [90.0, 10.0, 130.0, 100.0]]), torch.zeros(0, 4)]
    targets = Targets.pad(boxes, [torch.tensor([2, 0]), torch.zeros(0, dtype=torch.int64)], (5, 6))
    scored, losses, gradients = [], [], []
    at = RPNHead.at
    monkeypatch.setattr(RPNHead, "at", lambda self, *given: scored.append(1) or at(self, *given))
    for few in (True, False):
        if not few:
            monkeypatch.setattr(RPN, "_samples_few", lambda *_: False)
        losses.append(model.losses(images, sizes, targets, settings))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients.append(torch.autograd.grad(sum(losses[-1].values()), trained))
    assert scored == [1]
    for name, loss in losses[1].items():
        torch.testing.assert_close(losses[0][name], loss, rtol=1e-5, atol=1e-7)
    for a, b in zip(*gradients, strict=True):
        assert float((a - b).norm()) <= 1e-4 * float(b.norm())


@pytest.mark.parametrize("neck", NECKS)
def test_an_image_alone_equals_the_same_in_a_mixed_batch(
    small_model: Callable[..., FasterRCNN], check_same_rows: Callable[..., None], neck: str
) -> None:
    model = small_model(classes=CLASSES, **NECKS[neck])
    images, _ = canvases(4)
    sizes = torch.tensor([[128.0, 160.0], [60.0, 160.0], [128.0, 33.0], [1.0, 1.0]])
    with torch.no_grad():
        together = model(images, sizes)
        for image in range(4):
            alone = model(images[image : image + 1], sizes[image : image + 1])
            check_same_rows(rows_of(alone, 0), rows_of(together, image), box=5e-3)
    for image, (height, width) in enumerate(sizes.tolist()):
        boxes = together.boxes[image]
        assert boxes.min() >= 0
        assert boxes[:, [0, 2]].max() <= width
        assert boxes[:, [1, 3]].max() <= height


def test_what_stands_in_the_padding_does_not_matter(small_model: Callable[..., FasterRCNN]) -> None:
    model = small_model("fpn", CLASSES)
    images, _ = canvases(1)
    sizes = torch.tensor([[70.0, 101.0]])
    other = images.clone()
    other[:, 70:] = 255
    other[:, :, 101:] = 7
    with torch.no_grad():
        assert torch.equal(model.normalise(images, sizes), model.normalise(other, sizes))
        pixels = model.normalise(images, sizes)
    assert not pixels[:, :, 70:].any()
    assert not pixels[:, :, :, 101:].any()
    expected = (images[0, 69, 100].flip(0) - model.mean.flatten()) / model.std.flatten()
    torch.testing.assert_close(pixels[0, :, 69, 100], expected)


def test_float_images_mean_the_same_as_bytes(small_model: Callable[..., FasterRCNN]) -> None:
    model = small_model("single", CLASSES)
    images, sizes = canvases(1)
    with torch.no_grad():
        assert torch.equal(model(images, sizes).scores, model(images.float(), sizes).scores)


def test_no_gradient_flows_through_proposal_boxes(small_model: Callable[..., FasterRCNN]) -> None:
    """Approximate joint training: the detection losses leave the RPN's own layers alone."""
    model = small_model("fpn", CLASSES).train()
    images, sizes = canvases(1)
    targets = Targets.pad([torch.tensor([[20.0, 30.0, 70.0, 80.0]])], [torch.tensor([0])])
    found = model.losses(images, sizes, targets, TRAINING)
    (found["loss_classifier"] + found["loss_box"]).backward()
    assert all(p.grad is None for p in model.rpn.parameters())
    assert model.backbone.fpn.inner_blocks[0][0].weight.grad.abs().sum() > 0


def test_training_in_bfloat16_stays_near_float32(small_model: Callable[..., FasterRCNN]) -> None:
    model = small_model("fpn", CLASSES).train()
    images, sizes = canvases(2)
    targets = Targets.pad([torch.tensor([[20.0, 30.0, 70.0, 80.0]])] * 2, [torch.tensor([0])] * 2)
    exact = model.losses(images, sizes, targets, TRAINING)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = model.losses(images, sizes, targets, TRAINING)
    for name, loss in exact.items():
        assert coarse[name].dtype == torch.float32
        assert float(coarse[name].detach()) == pytest.approx(float(loss.detach()), rel=0.15)


def test_a_folded_norm_leaves_no_map_for_the_gradient() -> None:
    """In training a convolution and the frozen norm behind it are one: the same map, and none between."""
    layers = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), FrozenBatchNorm(6), nn.ReLU())
    with torch.no_grad():
        for values in (layers[1].weight, layers[1].bias, layers[1].running_mean, layers[1].running_var):
            values.uniform_(0.1, 1.0)
    plain = copy.deepcopy(layers).train()
    fold_frozen_norms(layers)
    images, kept = torch.randn(2, 3, 9, 9), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        found = layers.train()(images)
    assert [size for size in kept if size >= images.numel()] == [images.numel(), found.numel()]
    expected = plain(images)
    torch.testing.assert_close(found, expected)
    pairs = ((found, layers), (expected, plain))
    ours, theirs = (torch.autograd.grad(out.sum(), net[0].weight) for out, net in pairs)
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(layers.eval()(images), plain(images))
    assert layers.state_dict().keys() == plain.state_dict().keys()
    again = copy.deepcopy(layers).train()
    with torch.no_grad():
        again[1].weight.mul_(2)
        assert not torch.allclose(again(images), layers.train()(images))


def test_frozen_batch_norm_equals_torchvisions_and_never_changes() -> None:
    theirs, ours = FrozenBatchNorm2d(6), FrozenBatchNorm(6)
    values = {name: torch.rand(6) + 0.1 for name in theirs.state_dict()}
    theirs.load_state_dict(values)
    ours.load_state_dict({**values, "num_batches_tracked": torch.tensor(3)})
    ours.train()
    images = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(ours(images), theirs(images))
    assert torch.equal(ours.running_mean, values["running_mean"])
    assert not any(p.requires_grad for p in ours.parameters())
