"""Comparing results detection by detection: what agrees, what is excused, what is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import SettingsError
from anchorline.verify.compare import compare_all, compare_detections

NAMES = ("cat", "dog")


def _random(seed: int, count: int) -> Detections:
    """Detections as after NMS: boxes far from each other, scores well above the threshold."""
    rng = np.random.default_rng(seed)
    cells = rng.permutation(100)[:count]
    corner = np.stack([cells % 10, cells // 10], axis=1) * 40 + rng.uniform(0, 10, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(10, 30, (count, 2))], axis=1)
    return Detections(boxes, rng.uniform(0.1, 1, count), rng.integers(0, 2, count), NAMES)


def _changed(base: Detections, **changes: Any) -> Detections:
    values = {"boxes": base.boxes, "scores": base.scores, "labels": base.labels, **changes}
    return Detections(values["boxes"], values["scores"], values["labels"], base.class_names)


@given(seed=st.integers(0, 10_000), count=st.integers(0, 30))
def test_order_does_not_matter(seed: int, count: int) -> None:
    base = _random(seed, count)
    shuffled = base[np.random.default_rng(seed + 1).permutation(count)]
    result = compare_detections(base, shuffled)
    assert result.agrees
    assert (result.matched, result.missed, result.extra, result.max_box_error) == (count, 0, 0, 0.0)


@given(seed=st.integers(0, 10_000), count=st.integers(1, 30), data=st.data())
def test_one_dropped_is_one_missed_and_one_added_is_one_extra(
    seed: int, count: int, data: st.DataObject
) -> None:
    base = _random(seed, count)
    gone = data.draw(st.integers(0, count - 1))
    fewer = base[np.arange(count) != gone]
    missed, extra = compare_detections(base, fewer), compare_detections(fewer, base)
    assert (missed.matched, missed.missed, missed.extra) == (count - 1, 1, 0)
    assert (extra.matched, extra.missed, extra.extra) == (count - 1, 0, 1)
    assert missed.first_disagreement is not None
    assert missed.first_disagreement.startswith(f"missed {base.names[gone]} {base.scores[gone]:.5f} at [")
    assert str(extra.first_disagreement).startswith("extra ")


@given(seed=st.integers(0, 10_000), count=st.integers(1, 30))
def test_rounding_agrees_and_its_size_is_reported(seed: int, count: int) -> None:
    base = _random(seed, count)
    rng = np.random.default_rng(seed)
    near = _changed(
        base,
        boxes=base.boxes + rng.uniform(-0.04, 0.04, (count, 4)).astype(np.float32),
        scores=base.scores + rng.uniform(-5e-5, 5e-5, count).astype(np.float32),
    )
    result = compare_detections(base, near[rng.permutation(count)])
    assert result.agrees
    assert 0 < result.mean_box_error <= result.max_box_error <= 0.0401
    assert result.max_score_error <= 5.1e-5


@pytest.mark.parametrize(
    ("box_shift", "score_shift", "differing"), [(0.2, 0, 1), (0, 1e-3, 1), (0.04, 0, 0), (0, 9e-5, 0)]
)
def test_errors_beyond_the_tolerance_disagree(box_shift: float, score_shift: float, differing: int) -> None:
    base = _random(1, 5)
    boxes, scores = base.boxes.copy(), base.scores.copy()
    boxes[2] += box_shift
    scores[2] -= score_shift
    result = compare_detections(base, _changed(base, boxes=boxes, scores=scores))
    assert (result.matched, result.differing, result.agrees) == (5, differing, not differing)
    if differing:
        assert " became " in str(result.first_disagreement)


def test_another_class_is_missed_and_extra() -> None:
    base = _random(2, 4)
    labels = base.labels.copy()
    labels[0] = 1 - labels[0]
    result = compare_detections(base, _changed(base, labels=labels))
    assert (result.matched, result.missed, result.extra) == (3, 1, 1)


def test_classes_meet_by_name() -> None:
    base = _random(3, 6)
    other = Detections(base.boxes, base.scores, 2 - base.labels, ("bird", "dog", "cat"))
    assert compare_detections(base, other).agrees


def test_overlapping_pairs_are_matched_to_the_nearer() -> None:
    # Two boxes of one class that overlap by 0.6, in swapped slots and with near-equal scores.
    boxes = np.array([[0, 0, 100, 100], [25, 0, 125, 100]], np.float32)
    base = Detections(boxes, [0.90001, 0.9], [0, 0])
    other = Detections(boxes[::-1] + np.float32(0.01), [0.90001, 0.9], [0, 0])
    result = compare_detections(base, other)
    assert result.agrees
    assert result.max_box_error < 0.011


def test_coinciding_boxes_pair_up_by_score() -> None:
    base = Detections([[5, 5, 25, 25]] * 3, [0.9, 0.5, 0.2], [0, 0, 0])
    assert compare_detections(base, base[[2, 0, 1]]).agrees
    flat = Detections([[5, 5, 5, 25]], [0.9], [0])  # no area, hence no IoU
    assert compare_detections(flat, flat).matched == 1


@pytest.mark.parametrize(("score", "excused"), [(0.05005, True), (0.0502, False)])
def test_scores_at_the_threshold_are_excused(score: float, excused: bool) -> None:
    both = Detections([[0, 0, 10, 10], [50, 50, 60, 60]], [0.9, score], [0, 0])
    for result in (compare_detections(both, both[[0]]), compare_detections(both[[0]], both)):
        assert result.agrees is excused
        assert result.borderline == int(excused)
        assert result.missed + result.extra == int(not excused)


@pytest.mark.parametrize(("side", "excused"), [(50.0, True), (60.0, False)])
def test_overlaps_at_the_nms_threshold_are_excused(side: float, excused: bool) -> None:
    # The second box covers side % of the first: an IoU of 0.5 is decided either way.
    both = Detections([[0, 0, 100, 100], [0, 0, 100, side]], [0.9, 0.8], [0, 0])
    result = compare_detections(both, both[[0]], nms_iou=0.5)
    assert (result.agrees, result.nms_ties) == (excused, int(excused))
    assert not compare_detections(both, both[[0]]).agrees
    assert not compare_detections(both, both[[1]], nms_iou=0.5).agrees  # the stronger one is not excused


def test_the_last_places_of_a_full_result_are_excused() -> None:
    base = _random(4, 6)
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.50001, 0.5], np.float32)
    base = _changed(base, scores=scores)
    one, other = base[[0, 1, 2, 3, 4]], base[[0, 1, 2, 3, 5]]
    assert not compare_detections(one, other).agrees
    result = compare_detections(one, other, max_detections=5)
    assert result.agrees
    assert result.borderline == 2
    assert not compare_detections(base[[0, 1, 2, 3, 4]], base[[1, 2, 3, 4, 5]], max_detections=5).agrees


def test_the_summary_adds_up_and_names_the_image() -> None:
    references = [_random(5, 4), _random(6, 3), Detections.empty(NAMES)]
    candidates = [references[0], references[1][[0, 1]], references[2]]
    summary = compare_all(references, candidates)
    assert not summary.agrees
    assert (summary.images, summary.disagreeing_images) == (3, 1)
    assert (summary.total.matched, summary.total.missed) == (6, 1)
    assert str(summary.first_disagreement).startswith("image 2: missed ")
    named = compare_all(references, candidates, image_names=["a", "b", "c"])
    assert named.to_json()["first_disagreement"].startswith("b: missed ")
    assert compare_all(references, references).describe() == (
        "agrees on 3 images: 7 detections matched, 0 missed, 0 extra, 0 excused as ties, "
        "boxes within 0 px, scores within 0"
    )
    assert summary.describe().startswith("differs on 3 images: 6 detections matched, 1 missed")
    with pytest.raises(SettingsError, match="2 results to compare with 3"):
        compare_all(references, candidates[:2])


def test_the_alignment_tells_which_detections_are_meant() -> None:
    boxes = np.array([[x, 0, x + 30, 30] for x in (0, 100, 200, 300)], np.float32)
    base = Detections(boxes, [0.9, 0.8, 0.7, 0.0500], [0, 0, 0, 0], NAMES)
    moved = boxes[1] + np.float32(2)
    other = Detections([moved, boxes[0], [400, 0, 430, 30]], [0.8, 0.9, 0.6], [0, 0, 0], NAMES)
    result = compare_detections(base, other)
    found = result.alignment
    assert found is not None
    assert found.pairs.tolist() == [[0, 1], [1, 0]]
    assert found.differing.tolist() == [False, True]
    assert found.box_errors.tolist() == [0.0, 2.0]
    assert found.score_errors.tolist() == [0.0, 0.0]
    assert (found.missed.tolist(), found.extra.tolist()) == ([2], [2])  # the fourth is at the threshold
    summary = compare_all([base], [other])
    assert summary.total.alignment is None
    assert "alignment" not in summary.to_json()
