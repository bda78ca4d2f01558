"""Track ids: given, kept, carried along, and never given twice."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorline.runtime import Detections, ObjectTracker, SettingsError, TrackOptions

pytest.importorskip("trackers", reason="needs the package trackers; pip install --no-deps trackers")

NAMES = ("cat", "dog")


def found(centres, scores=None, labels=None, side=20):
    boxes = [[x - side / 2, y - side / 2, x + side / 2, y + side / 2] for x, y in centres]
    count = len(centres)
    return Detections(boxes, scores or [0.9] * count, labels or [0] * count, NAMES, size=(200, 300))


def ids_of(tracker, centres, **more):
    return tracker.update(found(centres, **more)).track_ids.tolist()


def test_an_object_has_its_id_from_its_second_frame_on():
    tracker = ObjectTracker()
    assert [ids_of(tracker, [(20 + 3 * i, 50)]) for i in range(5)] == [[-1], [1], [1], [1], [1]]


def test_order_scores_and_everything_else_stay():
    tracker = ObjectTracker()
    given = found([(200, 50), (20, 50), (100, 120)], scores=[0.2, 0.9, 0.7], labels=[1, 0, 1])
    for _ in range(3):
        tracked = tracker.update(given)
    np.testing.assert_array_equal(tracked.boxes, given.boxes)
    np.testing.assert_array_equal(tracked.scores, given.scores)
    assert (tracked.names, tracked.size) == (given.names, given.size)
    assert tracked.track_ids[0] == -1  # too weak to begin a track
    assert sorted(tracked.track_ids[1:].tolist()) == [1, 2]
    assert given.track_ids is None


def test_two_objects_that_cross_keep_their_ids():
    tracker = ObjectTracker()
    last = [ids_of(tracker, [(20 + 4 * i, 50), (180 - 4 * i, 58)]) for i in range(40)]
    assert all(each == last[1] for each in last[1:])
    assert sorted(last[1]) == [1, 2]


@pytest.mark.parametrize(("hidden", "same"), [(1, True), (20, True), (80, False)])
def test_an_object_that_was_hidden_is_known_again_for_two_seconds(hidden, same):
    tracker = ObjectTracker(fps=25.0)
    for i in range(10):
        ids_of(tracker, [(20 + 2 * i, 50)])
    for _ in range(hidden):
        assert ids_of(tracker, []) == []
    where = 20 + 2 * (10 + hidden)
    again = [ids_of(tracker, [(where + 2 * i, 50)]) for i in range(2)]
    assert again == ([[1], [1]] if same else [[-1], [2]])


def test_dropped_frames_are_told():
    """A fast object: without its five lost frames, it is beyond where it is expected."""
    told, untold = ObjectTracker(), ObjectTracker()
    for i in range(10):
        for tracker in (told, untold):
            tracker.update(found([(20 + 8 * i, 50)]))
    later = found([(20 + 8 * 15, 50)])
    assert told.update(later, frames=6).track_ids.tolist() == [1]
    assert untold.update(later).track_ids.tolist() == [-1]


def test_a_slow_model_s_frames_lie_seconds_apart_and_its_tracks_go_on():
    tracker = ObjectTracker(fps=25.0)
    assert [tracker.update(found([(50, 50)]), frames=100).track_ids.tolist() for _ in range(4)][-1] == [1]
    tracker.update(found([]), frames=100)
    assert tracker.update(found([(50, 50)]), frames=100).track_ids.tolist() == [1]


def test_a_weak_detection_goes_on_with_a_track_and_begins_none():
    tracker = ObjectTracker()
    for _ in range(3):
        ids_of(tracker, [(50, 50)])
    assert ids_of(tracker, [(50, 50), (150, 50)], scores=[0.2, 0.2]) == [1, -1]
    assert ids_of(tracker, [(50, 50), (150, 50)], scores=[0.05, 0.2]) == [-1, -1]


@pytest.mark.parametrize(("by_class", "ids"), [(True, [-1]), (False, [1])])
def test_another_class_in_the_same_place(by_class, ids):
    tracker = ObjectTracker(options=TrackOptions(by_class=by_class))
    for _ in range(3):
        ids_of(tracker, [(50, 50)], labels=[0])
    assert ids_of(tracker, [(50, 50)], labels=[1]) == ids


def test_classes_share_no_id():
    tracker = ObjectTracker()
    for _ in range(3):
        last = ids_of(tracker, [(50, 50), (150, 50)], labels=[0, 1])
    assert sorted(last) == [1, 2]


def test_no_id_is_given_twice_and_trackers_know_nothing_of_each_other():
    tracker, other = ObjectTracker(), ObjectTracker()
    for _ in range(3):
        ids_of(tracker, [(50, 50), (100, 50)])
    tracker.reset(10.0)
    assert [ids_of(tracker, [(50, 50)]) for _ in range(2)] == [[-1], [3]]
    assert [ids_of(other, [(50, 50)]) for _ in range(2)] == [[-1], [1]]


def test_a_long_run_holds_no_more_than_the_tracks_of_late():
    tracker = ObjectTracker(fps=25.0)
    for number in range(60):
        for _ in range(2):
            ids_of(tracker, [(10 + 100 * (number % 3), 10 + 60 * (number % 2))])
        tracker.update(found([]), frames=25)
        tracker.update(found([]), frames=25)
        tracker.update(found([]), frames=25)
    assert tracker._given >= 20
    assert len(tracker._numbers) < 10


def test_nothing_found_at_all():
    tracker = ObjectTracker()
    for _ in range(3):
        tracked = tracker.update(Detections.empty(NAMES, size=(9, 9)))
        assert tracked.track_ids.shape == (0,)
        assert tracked.track_ids.dtype == np.int64


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"new_score": 1.5}, "new_score is 1.5; expected a number from 0 to 1"),
        ({"low_score": "a"}, "low_score is 'a'; expected a number"),
        ({"min_iou": float("nan")}, "min_iou is nan"),
        ({"min_iou": True}, "min_iou is True"),
        ({"lost_seconds": 0}, "lost_seconds is 0; expected seconds above 0"),
        ({"lost_seconds": float("inf")}, "lost_seconds is inf"),
    ],
)
def test_options_that_cannot_be(wrong, message):
    with pytest.raises(SettingsError, match=message):
        TrackOptions(**wrong)


@pytest.mark.parametrize("fps", [0, -1.0, float("nan"), float("inf"), "25"])
def test_a_rate_that_cannot_be(fps):
    with pytest.raises(SettingsError, match="expected frames a second above 0"):
        ObjectTracker(fps=fps)


@pytest.mark.parametrize("frames", [0, -3, float("nan")])
def test_a_step_that_cannot_be(frames):
    with pytest.raises(SettingsError, match="expected the step from the frame before"):
        ObjectTracker().update(found([]), frames=frames)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(SettingsError, match=r"needs the package trackers.*pip install 'anchorline\[track\]'"):
        ObjectTracker()


def test_a_package_that_knows_no_gaps_is_too_old(monkeypatch):
    class Old:
        def update(self, detections):
            return detections

    monkeypatch.setitem(sys.modules, "trackers", types.SimpleNamespace(ByteTrackTracker=Old))
    with pytest.raises(SettingsError, match=r"too old.*trackers>=2.6"):
        ObjectTracker()


corner = st.one_of(st.floats(-1e4, 1e4, width=32), st.sampled_from([0.0, 5.0, 1e6]))
side = st.one_of(st.just(0.0), st.floats(0, 1e4, width=32))
one_box = st.tuples(corner, corner, side, side, st.floats(0, 1, width=32), st.integers(0, 1))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.lists(one_box, max_size=6), st.floats(0.01, 1e4)), max_size=6), st.booleans())
def test_any_boxes_in_any_order_give_one_id_each(frames, by_class):
    """Boxes without area, far away, piled up; nothing fails and no two in a frame share an id."""
    tracker = ObjectTracker(options=TrackOptions(by_class=by_class, min_iou=0.0))
    for boxes, step in frames:
        drawn = Detections(
            [[x, y, x + w, y + h] for x, y, w, h, _, _ in boxes],
            [score for *_, score, _ in boxes],
            [label for *_, label in boxes],
        )
        numbers = tracker.update(drawn, frames=step).track_ids
        assert numbers.shape == (len(boxes),)
        given_ids = numbers[numbers >= 0].tolist()
        assert len(set(given_ids)) == len(given_ids)
        assert 0 not in given_ids
