"""Detections and RoI samples against torchvision's ``RoIHeads``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torchvision.models.detection.roi_heads import RoIHeads

from anchorline.train.model import assign, roi_heads
from anchorline.train.model.assign import Targets
from anchorline.train.model.rpn import Proposals
from anchorline.train.model.settings import ModelSettings
from anchorline.train.settings import TrainingSettings

IMAGE_SIZES = torch.tensor([[128.0, 160.0], [90.0, 160.0], [128.0, 47.0]])
SLOTS, CLASSES = 60, 3


def torchvision_heads(settings: ModelSettings, samples: int = 64) -> RoIHeads:
    return RoIHeads(
        None,
        None,
        None,
        0.5,
        0.5,
        samples,
        0.25,
        settings.box_weights,
        settings.score_threshold,
        settings.nms_iou,
        settings.max_detections,
    ).eval()


def heads_of(settings: ModelSettings) -> roi_heads.RoIHeads:
    """Ours, to be given the outputs of their layers."""
    return roi_heads.RoIHeads(1, (4,), CLASSES, settings)


def random_proposals(counts: tuple[int, ...]) -> Proposals:
    """Proposals of which the first ``counts[i]`` slots of image i are filled."""
    boxes, scores = torch.zeros(len(counts), SLOTS, 4), torch.full((len(counts), SLOTS), -1.0)
    for image, count in enumerate(counts):
        corner = torch.rand(count, 2) * (IMAGE_SIZES[image].flip(0) - 4)
        boxes[image, :count] = torch.cat((corner, corner + 2 + torch.rand(count, 2) * 60), dim=1)
        scores[image, :count] = torch.rand(count).sort(descending=True).values
    return Proposals(boxes, scores)


def expected_detections(
    settings: ModelSettings, logits: torch.Tensor, deltas: torch.Tensor, proposals: Proposals
) -> tuple[list[torch.Tensor], ...]:
    present = proposals.present
    boxes = [b[p] for b, p in zip(proposals.boxes, present, strict=True)]
    shapes = [(int(h), int(w)) for h, w in IMAGE_SIZES.tolist()]
    return torchvision_heads(settings).postprocess_detections(
        logits[present], deltas[present].flatten(1), boxes, shapes
    )


def check_equal(found: roi_heads.DetectionBatch, expected: tuple[list[torch.Tensor], ...]) -> None:
    assert found.num_detections.tolist() == [len(scores) for scores in expected[1]]
    for image, (boxes, scores, labels) in enumerate(zip(*expected, strict=True)):
        count = len(scores)
        torch.testing.assert_close(found.scores[image, :count], scores, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.boxes[image, :count], boxes, rtol=0, atol=1e-4)
        assert (found.labels[image, :count] + 1).tolist() == labels.tolist()
        for unused in (found.boxes, found.scores, found.labels):
            assert not unused[image, count:].any()


@pytest.mark.parametrize("counts", [(60, 60, 60), (60, 7, 0), (0, 0, 0), (1, 60, 1)])
@pytest.mark.parametrize("changes", [{}, {"score_threshold": 0.3, "nms_iou": 0.3}, {"max_detections": 3}])
def test_detections_equal_torchvisions(
    small_settings: Callable[..., ModelSettings], counts: tuple[int, ...], changes: dict[str, float]
) -> None:
    settings = small_settings(**changes)
    proposals = random_proposals(counts)
    logits, deltas = torch.randn(3, SLOTS, 1 + CLASSES) * 2, torch.randn(3, SLOTS, 1 + CLASSES, 4)
    found = heads_of(settings).detect(logits, deltas, proposals, IMAGE_SIZES)
    assert found.boxes.shape == (3, settings.max_detections, 4)
    assert (found.labels.dtype, found.num_detections.dtype) == (torch.int32, torch.int32)
    check_equal(found, expected_detections(settings, logits, deltas, proposals))


def test_boxes_thrown_off_the_image_go_as_in_torchvision(
    small_settings: Callable[..., ModelSettings],
) -> None:
    settings = small_settings()
    proposals = random_proposals((60, 60, 60))
    logits, deltas = torch.randn(3, SLOTS, 1 + CLASSES), torch.randn(3, SLOTS, 1 + CLASSES, 4) * 40
    found = heads_of(settings).detect(logits, deltas, proposals, IMAGE_SIZES)
    check_equal(found, expected_detections(settings, logits, deltas, proposals))


def test_background_everywhere_gives_no_detections(small_settings: Callable[..., ModelSettings]) -> None:
    proposals = random_proposals((60, 60, 60))
    logits = torch.zeros(3, SLOTS, 1 + CLASSES)
    logits[..., 0] = 20.0
    deltas = torch.zeros(3, SLOTS, 1 + CLASSES, 4)
    found = heads_of(small_settings()).detect(logits, deltas, proposals, IMAGE_SIZES)
    check_equal(found, expected_detections(small_settings(), logits, deltas, proposals))
    assert found.num_detections.tolist() == [0, 0, 0]


def test_a_score_at_the_threshold_is_no_detection(small_settings: Callable[..., ModelSettings]) -> None:
    """Two equal logits give a score of exactly 0.5; torchvision keeps only what is above."""
    proposals = random_proposals((1, 1, 1))
    logits, deltas = torch.zeros(3, SLOTS, 2), torch.zeros(3, SLOTS, 2, 4)
    for threshold, count in ((0.5, 0), (0.49, 1)):
        settings = small_settings(score_threshold=threshold)
        found = heads_of(settings).detect(logits, deltas, proposals, IMAGE_SIZES)
        assert found.num_detections.tolist() == [count] * 3
        check_equal(found, expected_detections(settings, logits, deltas, proposals))


def test_one_class_and_more_slots_than_candidates(small_settings: Callable[..., ModelSettings]) -> None:
    settings = small_settings(max_detections=500)
    proposals = random_proposals((60, 20, 5))
    logits, deltas = torch.randn(3, SLOTS, 2), torch.randn(3, SLOTS, 2, 4)
    found = heads_of(settings).detect(logits, deltas, proposals, IMAGE_SIZES)
    check_equal(found, expected_detections(settings, logits, deltas, proposals))


def test_samples_carry_torchvisions_labels_and_targets(
    small_settings: Callable[..., ModelSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draws themselves are random: torchvision is handed ours."""
    model, training = small_settings(), TrainingSettings(roi_samples=32)
    proposals = random_proposals((60, 20, 12))
    objects = [proposals.boxes[0, :5] + 1.5, torch.zeros(0, 4), proposals.boxes[2, 3:4] - 0.7]
    labels = [torch.tensor([0, 2, 1, 1, 0]), torch.zeros(0, dtype=torch.int64), torch.tensor([2])]
    drawn: list[tuple[torch.Tensor, torch.Tensor]] = []

    def recorded(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        drawn.append(real(*arguments))
        return drawn[-1]

    real = assign.sample
    monkeypatch.setattr(assign, "sample", recorded)
    samples = heads_of(model).sample(proposals, Targets.pad(objects, labels), training)
    indices, real_slots = drawn[0]
    heads = torchvision_heads(model)
    present = [boxes[p] for boxes, p in zip(proposals.boxes, proposals.present, strict=True)]
    # Ours: 60 proposal slots, then the objects. torchvision's: the proposals there are, then the objects.
    theirs = [
        torch.where(i >= SLOTS, i - SLOTS + len(boxes), i)[slots]
        for i, slots, boxes in zip(indices, real_slots, present, strict=True)
    ]
    assert all(len(chosen) > 5 for chosen in theirs)
    monkeypatch.setattr(heads, "subsample", lambda _: theirs)
    targets = [{"boxes": b, "labels": lab + 1} for b, lab in zip(objects, labels, strict=True)]
    boxes, _, classes, deltas = heads.select_training_samples(present, targets)
    for image in range(3):
        slots = real_slots[image]
        assert torch.equal(samples.drawn[image], slots)
        assert torch.equal(samples.boxes[image, slots], boxes[image])
        assert torch.equal(samples.labels[image, slots], classes[image])
        positive = classes[image] > 0
        torch.testing.assert_close(samples.deltas[image, slots][positive], deltas[image][positive])
    assert (samples.labels > 0).sum(dim=1).tolist()[1] == 0
    assert torch.isfinite(samples.deltas).all()
    assert not samples.labels[~samples.drawn].any()


def test_ground_truth_takes_part_as_proposals(small_settings: Callable[..., ModelSettings]) -> None:
    """Without any proposal the objects themselves are the positives, with deltas of 0."""
    targets = Targets.pad([torch.tensor([[5.0, 5.0, 40.0, 30.0]])], [torch.tensor([1])])
    nothing = Proposals(torch.zeros(1, SLOTS, 4), torch.full((1, SLOTS), -1.0))
    samples = heads_of(small_settings()).sample(nothing, targets, TrainingSettings(roi_samples=8))
    assert samples.drawn.sum() == 1
    assert samples.boxes[samples.drawn].tolist() == [[5.0, 5.0, 40.0, 30.0]]
    assert samples.labels[samples.drawn].tolist() == [2]
    assert not samples.deltas[samples.drawn].any()
