"""The examples do what they say."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from anchorline.evaluation.synthetic_shapes import CLASS_NAMES
from anchorline.evaluation.synthetic_video import generate_video
from anchorline.runtime import Detections, Source

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


def test_crossings_worked_out_by_hand(example):
    """A cat to the right, a dog to the left, a cat that turns back before the line, a weak one."""
    answers = []
    for index in range(30):
        x, back = 10 + 3 * index, 30 + 15 * np.sin(index / 5)
        centres = [(x, 20), (95 - 3 * index, 60), (back, 90), (x, 120)]
        boxes = [[cx - 4, cy - 4, cx + 4, cy + 4] for cx, cy in centres]
        answers.append(Detections(boxes, [0.9, 0.8, 0.7, 0.4], [0, 1, 0, 1], class_names=("cat", "dog")))
    del answers[12]  # a frame in which nothing was taken: the objects are found again
    frames = (np.zeros((140, 100, 3), np.uint8) for _ in answers)
    counts = example.count_crossings(Perfect(answers), Source(frames, name="a"))
    assert counts == {("cat", "right"): 1, ("dog", "left"): 1}


def test_crossings_of_the_demo_s_scene(example):
    """Against the identities that the generated video knows."""
    video = list(generate_video(0, FRAMES))
    width = video[0].frame.shape[1]
    last, expected = {}, Counter()
    for each in video:
        for box, label, number in zip(each.boxes, each.labels, each.ids, strict=True):
            right = (box[0] + box[2]) / 2 >= width / 2
            if number in last and last[number] != right:
                expected[CLASS_NAMES[label], "right" if right else "left"] += 1
            last[number] = right
    answers = [
        Detections(each.boxes, np.full(len(each.boxes), 0.9), each.labels, class_names=CLASS_NAMES)
        for each in video
    ]
    found = example.count_crossings(Perfect(answers), Source((each.frame for each in video), name="a"))
    assert sum(expected.values()) >= 5
    assert found == expected
