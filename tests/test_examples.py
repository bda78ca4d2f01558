"""The examples do what they say."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from anchorline.data.synthetic import CLASS_NAMES, MIN_VISIBLE, SCENE_SIZE
from anchorline.data.synthetic_video import SyntheticVideo
from anchorline.runtime import Detections, Source

pytest.importorskip("supervision", reason="the example counts with supervision")
pytest.importorskip("trackers", reason="the example tracks; pip install --no-deps trackers")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
FRAMES = 250


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("count_crossings", EXAMPLES / "count_crossings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Perfect:
    """Answers with prepared detections, one set for each frame in turn."""

    def __init__(self, answers):
        self.answers = iter(answers)

    def batch(self, frames):
        return [next(self.answers) for _ in frames]


def watched(example, answers, frames):
    return example.watch(Perfect(answers), Source(frames, name="a")).crossings


def test_crossings_worked_out_by_hand(example):
    """A cat to the right, a dog to the left, a cat that turns back before the line, a weak one."""
    answers = []
    for index in range(30):
        x, back = 10 + 3 * index, 30 + 15 * np.sin(index / 5)
        centres = [(x, 20), (95 - 3 * index, 60), (back, 90), (x, 120)]
        boxes = [[cx - 4, cy - 4, cx + 4, cy + 4] for cx, cy in centres]
        answers.append(Detections(boxes, [0.9, 0.8, 0.7, 0.4], [0, 1, 0, 1], class_names=("cat", "dog")))
    answers[12:16] = [Detections.empty(("cat", "dog"))] * 4  # hidden as they cross
    frames = (np.zeros((140, 100, 3), np.uint8) for _ in answers)
    assert watched(example, answers, frames) == {("cat", "right"): 1, ("dog", "left"): 1}


def test_crossings_of_the_demo_s_scene(example):
    """Against the identities that the generated video knows; what it looks like is not asked for."""
    video = SyntheticVideo(0)
    height, width = SCENE_SIZE
    answers, last, expected = [], {}, Counter()
    for index in range(FRAMES):
        each = video.truth(index)
        clear = each.visible >= MIN_VISIBLE
        boxes, labels = each.boxes[clear], each.labels[clear]
        answers.append(Detections(boxes, np.full(len(boxes), 0.9), labels, class_names=CLASS_NAMES))
        for box, label, number in zip(boxes, labels, each.ids[clear], strict=True):
            right = (box[0] + box[2]) / 2 >= width / 2
            if number in last and last[number] != right:
                expected[CLASS_NAMES[label], "right" if right else "left"] += 1
            last[number] = right
    assert sum(expected.values()) >= 5
    frames = (np.zeros((height, width, 3), np.uint8) for _ in answers)
    assert watched(example, answers, frames) == expected


def test_dwell_worked_out_by_hand(example):
    """Ten frames a second. One is inside (25 to 75) from 0.3 s to 0.8 s and from 1.2 s to 1.4 s, one never,
    and one has no track yet."""
    counter = example.SceneCounter((100, 100))
    places = [10, 20, 24, 30, 40, 50, 60, 70, 74, 80, 90, 80, 70, 60, 70, 80]
    for index, x in enumerate(places):
        boxes = [[cx - 2, 48, cx + 2, 52] for cx in (x, 5, 50)]
        found = Detections(boxes, [0.9] * 3, [0] * 3, ("cat",), track_ids=[7, 8, -1])
        counter.update(found, index / 10)
    assert counter.dwell == {("cat", 7): pytest.approx(0.7)}


def test_an_object_that_was_hidden_in_the_zone_was_there(example):
    """Seen inside at 1 s and again at 3 s: two seconds."""
    counter = example.SceneCounter((100, 100))
    inside = Detections([[48, 48, 52, 52]], [0.9], [0], ("cat",), track_ids=[1])
    counter.update(inside, 1.0)
    counter.update(Detections([], [], [], ("cat",), track_ids=[]), 2.0)
    counter.update(inside, 3.0)
    assert counter.dwell == {("cat", 1): pytest.approx(2.0)}
