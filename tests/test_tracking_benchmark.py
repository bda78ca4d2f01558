"""What ``benchmarks/tracking.py`` measures, against tables worked out by hand, and that tracking is good."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from anchorline.data.synthetic import SCENE_SIZE
from anchorline.data.synthetic_video import SyntheticVideo, VideoTruth
from anchorline.runtime import Detections

pytest.importorskip("trackers", reason="needs the package trackers; pip install --no-deps trackers")

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
PLACES = {"A": [0, 0, 10, 10], "B": [50, 0, 60, 10], "C": [0, 50, 10, 60]}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("tracking_benchmark", BENCHMARKS / "tracking.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def truth(objects, visible=None):
    boxes = np.array([PLACES[name] for name in objects], np.float32)
    ids = np.array([ord(name) for name in objects])
    return VideoTruth(boxes, np.zeros(len(ids), np.int64), ids, np.array(visible or [1.0] * len(ids)))


def found(**tracks):
    """``A=1``: a box at A's place that belongs to track 1."""
    return Detections(
        [PLACES[name] for name in tracks],
        [0.9] * len(tracks),
        [0] * len(tracks),
        track_ids=list(tracks.values()),
    )


def test_two_that_swap_their_ids_halfway(benchmark):
    """Either way of pairing two objects with two tracks explains 4 of 8 boxes."""
    figures = benchmark.identity_figures(
        [truth("AB")] * 4, [found(A=1, B=2), found(A=1, B=2), found(A=2, B=1), found(A=2, B=1)]
    )
    assert figures["idf1"] == figures["idp"] == figures["idr"] == 0.5
    assert (figures["objects"], figures["tracks"], figures["id_switches"]) == (2, 2, 2)
    assert figures["detection_f1"] == 1.0


def test_a_miss_and_a_false_track(benchmark):
    """7 of 8 boxes found, one false: 7 / (7 + 1/2 + 1/2). A box without a track counts as not found."""
    figures = benchmark.identity_figures(
        [truth("AB")] * 4, [found(A=1, B=2), found(A=1, B=2, C=9), found(A=1, B=2), found(A=1, B=-1)]
    )
    assert figures["idf1"] == figures["idp"] == figures["idr"] == 0.875
    assert (figures["tracks"], figures["id_switches"]) == (3, 0)


def test_what_is_hidden_is_neither_asked_for_nor_a_mistake(benchmark):
    hidden = truth("AB", visible=[1.0, 0.1])
    assert benchmark.identity_figures([hidden] * 3, [found(A=1, B=2), found(A=1), found(A=1)])["idf1"] == 1.0


def test_in_a_crowd_the_nearer_one_covers_the_other(benchmark):
    both = benchmark.crowd([truth("AB"), truth("A")])
    assert len(set(both.ids.tolist())) == 3
    assert sorted(both.visible.tolist()) == [0.0, 1.0, 1.0]
    assert both.visible[1] == 1.0  # B lies apart


@pytest.fixture(scope="module")
def scene():
    video = SyntheticVideo(3, SCENE_SIZE)
    return {index: video.truth(index) for index in range(100)}


@pytest.mark.parametrize("dropped", [(), range(5, 100, 4)])
def test_tracking_keeps_the_identities_of_a_generated_video(benchmark, scene, dropped):
    """IDF1 of at least 0.9 with a tenth of the boxes missed, which alone makes 0.95 the most there is."""
    truths = {index: truth for index, truth in scene.items() if index not in dropped}
    row = benchmark.case("test", truths, benchmark.detector_of_truth(3, SCENE_SIZE))
    assert row["objects"] >= 5
    assert row["idf1"] >= 0.9
    assert row["id_switches"] == 0
