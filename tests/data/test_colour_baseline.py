"""The generated scenes are hard for a detector that does not look at shapes within clutter.

The baseline is an honest one: it takes what differs from the background, splits it into connected
components, and names each by its nearest neighbours among components of labelled training scenes.
On bare scenes it works well; on the generated ones it must stay under 0.3 mAP50.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pytest

from anchorline.data.boxes import iou_matrix
from anchorline.data.dataset import Dataset, LabelledImage
from anchorline.data.synthetic import (
    CLASS_NAMES,
    Pose,
    contrasting_colour,
    paint,
    place,
    random_shape,
    surface_texture,
    synthetic_dataset,
)
from anchorline.data.synthetic_video import synthetic_video_dataset
from anchorline.evaluation.evaluation import evaluate
from anchorline.runtime.detections import Detections

NEIGHBOURS = 7
NOTHING = len(CLASS_NAMES)


class ColourBaseline:
    """Distance from the background's colour, Otsu threshold, components, nearest shape descriptors."""

    def __init__(self, training: Sequence[LabelledImage]) -> None:
        descriptors, labels = [], []
        for image in training:
            boxes, described = components(image.load())
            overlaps = iou_matrix(boxes, image.boxes)
            best = overlaps.max(axis=1, initial=0.0)
            of = image.labels[overlaps.argmax(axis=1)] if len(image.boxes) else np.full(len(boxes), NOTHING)
            labels.append(np.where(best >= 0.5, of, NOTHING))
            descriptors.append(described)
        known = np.concatenate(descriptors)
        self.labels = np.concatenate(labels)
        self.mean, self.spread = known.mean(axis=0), known.std(axis=0) + 1e-6
        self.known = (known - self.mean) / self.spread

    def __call__(self, frames: list[np.ndarray]) -> list[Detections]:
        return [self.detect(frame) for frame in frames]

    def detect(self, frame: np.ndarray) -> Detections:
        boxes, described = components(frame)
        if not len(boxes):
            return Detections.empty(CLASS_NAMES)
        distance = np.linalg.norm((described - self.mean)[:, None] / self.spread - self.known[None], axis=2)
        nearest = self.labels[distance.argsort(axis=1)[:, :NEIGHBOURS]]
        votes = np.stack([(nearest == label).mean(axis=1) for label in range(NOTHING)], axis=1)
        rows, labels = np.nonzero(votes > 0)
        return Detections(boxes[rows], votes[rows, labels], labels, CLASS_NAMES)


def components(frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [N, 4] and shape descriptors [N, 11] of the connected parts unlike the background."""
    smooth = cv2.GaussianBlur(frame, (0, 0), 1.5)
    lab = cv2.cvtColor(smooth, cv2.COLOR_BGR2LAB).astype(np.float32)
    distance = np.linalg.norm(lab - np.median(lab.reshape(-1, 3), axis=0), axis=2)
    scaled = np.clip(distance * 2, 0, 255).astype(np.uint8)
    _, mask = cv2.threshold(scaled, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    boxes, described = [], []
    for contour in contours:
        x, y, width, height = cv2.boundingRect(contour)
        if max(width, height) < 18 or max(width, height) > 120 or len(contour) < 5:
            continue
        boxes.append((x, y, x + width, y + height))
        described.append(_describe(contour, mask[y : y + height, x : x + width]))
    return np.array(boxes, dtype=float).reshape(-1, 4), np.array(described, dtype=float).reshape(-1, 11)


def _describe(contour: np.ndarray, mask: np.ndarray) -> list[float]:
    area = max(cv2.contourArea(contour), 1.0)
    hull = max(cv2.contourArea(cv2.convexHull(contour)), 1.0)
    moments = cv2.HuMoments(cv2.moments(contour)).ravel()
    signed_logs = -np.sign(moments) * np.log10(np.abs(moments) + 1e-12)
    _, (long, short), _ = cv2.minAreaRect(contour)
    elongation = max(long, short) / max(min(long, short), 1.0)
    filled = np.count_nonzero(mask) / area
    round_ = 4 * np.pi * area / max(cv2.arcLength(contour, True), 1.0) ** 2
    return [*signed_logs, area / hull, elongation, filled, round_]


def bare_scenes(count: int, seed: int) -> Dataset:
    """One object at a time, plain, on plain grey, without clutter, light or noise."""
    images = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        canvas = np.full((240, 320, 3), 128, np.float32)
        label = index % len(CLASS_NAMES)
        pose = Pose(rng.uniform(100, 220), rng.uniform(90, 150), rng.uniform(16, 42), rng.uniform(0, 6.3))
        placed = place(random_shape(rng, label), pose)
        colour = contrasting_colour(rng, np.full((1, 3), 128, np.float32), least=110)
        paint(canvas, placed, surface_texture(rng, colour), (0.0, 0.0))
        images.append(_labelled(canvas, placed.box, label))
    return Dataset("bare scenes", CLASS_NAMES, tuple(images))


def _labelled(canvas: np.ndarray, box: Any, label: int) -> LabelledImage:
    pixels = np.clip(canvas, 0, 255).astype(np.uint8)
    boxes, none = np.array([box], dtype=np.float32), np.zeros(1, dtype=np.bool_)
    return LabelledImage("bare", (240, 320), boxes, np.array([label]), none, none, lambda: pixels)


def test_the_baseline_works_where_colour_suffices() -> None:
    baseline = ColourBaseline(bare_scenes(150, seed=1).images)
    assert evaluate(baseline, bare_scenes(60, seed=2), batch=4, provider="cpu").map50 > 0.8


@pytest.fixture(scope="module")
def baseline() -> ColourBaseline:
    """One that has learnt from generated scenes."""
    return ColourBaseline(synthetic_dataset(120, seed=11).images)


def test_the_baseline_fails_on_generated_scenes(baseline: ColourBaseline) -> None:
    report = evaluate(baseline, synthetic_dataset(60, seed=12), batch=4, provider="cpu")
    assert report.map50 < 0.3


def test_the_baseline_fails_on_generated_videos(baseline: ColourBaseline) -> None:
    reached = []
    for seed in range(4):
        video = synthetic_video_dataset(seed, 150)
        sampled = dataclasses.replace(video, images=video.images[::10])
        reached.append(evaluate(baseline, sampled, batch=4, provider="cpu").map50)
    assert np.mean(reached) < 0.3


def test_the_baseline_fails_on_the_demo_s_video(baseline: ColourBaseline) -> None:
    pytest.importorskip("torch", reason="the demo trains with PyTorch")
    from anchorline.demo import VIDEO_FRAMES, VIDEO_SEED

    video = synthetic_video_dataset(VIDEO_SEED, VIDEO_FRAMES)
    sampled = dataclasses.replace(video, images=video.images[::10])
    assert evaluate(baseline, sampled, batch=4, provider="cpu").map50 < 0.3
