"""Tracks in the pipeline: one tracker for each source, told of gaps, in the order of the frames."""

from __future__ import annotations

import json
import sys
import time

import cv2
import numpy as np
import pytest

from anchorline import cli
from anchorline.runtime import (
    Detections,
    DetectOptions,
    Filters,
    SettingsError,
    Source,
    TrackOptions,
    VideoPipeline,
)
from anchorline.runtime.video import intake
from anchorline.runtime.video.frames import Result, Stream
from anchorline.runtime.video.tracks import Tracks

NAMES = ("thing",)


class Mover:
    """Finds a box whose place is the frame's grey level, after a time that lets later batches overtake."""

    concurrent_calls = 3

    def __init__(self):
        self.calls = 0

    def batch(self, frames):
        self.calls += 1
        time.sleep(0.003 * (self.calls % 3))
        return [boxes_at(int(frame.flat[0])) for frame in frames]


def boxes_at(*places, score=0.9):
    boxes = [[x, 10, x + 20, 40] for x in places]
    return Detections(boxes, [score] * len(boxes), [0] * len(boxes), NAMES)


@pytest.fixture
def tracked():
    """Skips where the package is missing."""
    pytest.importorskip("trackers", reason="needs the package trackers; pip install --no-deps trackers")


@pytest.fixture
def follow(tracked):
    """``follow(stream, index, time_s, *places)``: the track ids of the next frame of the source ``a``."""
    mine, live = Source(iter(()), name="b"), Source(iter(()), name="c", live=True)
    sources = [Source("a.mp4", name="a"), mine, live]
    tracks = {each.name: Tracks(each, TrackOptions(), trails=True) for each in sources}

    def step(stream, index, time_s, *places):
        frame = np.zeros((*stream.size, 3), np.uint8)
        result = Result(frame, boxes_at(*places), stream, index, time_s, 0.0)
        tracks[result.source].follow(result)
        return result.detections.track_ids.tolist()

    return step


def stream(source="a", size=(48, 200), **more):
    return Stream(source, source, size, 25.0, **more)


def settle(follow, of, first=0):
    """Four frames in which a thing moves by two pixels each from 10 on; its id."""
    ids = [follow(of, first + i, (first + i) / 25, 10 + 2 * i) for i in range(4)]
    assert ids[0] == [-1]
    assert len({tuple(each) for each in ids[1:]}) == 1
    return ids[-1]


@pytest.mark.parametrize(("workers", "batch"), [(1, 1), (1, 4), (3, 4)])
def test_each_source_has_its_own_ids_in_the_order_of_its_frames(tracked, grey, workers, batch):
    sources = [Source((grey(5 + 3 * i) for i in range(30)), name=f"s{s}") for s in range(3)]
    seen = {f"s{s}": [] for s in range(3)}
    with VideoPipeline(Mover(), sources, DetectOptions(track=True, workers=workers, batch=batch)) as pipeline:
        for result in pipeline:
            seen[result.source].append((result.index, result.detections.track_ids.tolist()))
    assert seen["s0"] == [(0, [-1])] + [(index, [1]) for index in range(1, 30)]
    assert seen["s0"] == seen["s1"] == seen["s2"]
    assert "track" in pipeline.summary().stages


def test_without_the_option_there_are_no_ids(grey):
    with VideoPipeline(Mover(), [Source(iter([grey(5)]), name="a")]) as pipeline:
        assert [result.detections.track_ids for result in pipeline] == [None]
    assert "track" not in pipeline.summary().stages


def test_lines_and_copies_carry_the_ids(tracked, grey, tmp_path):
    def run(where, **options):
        frames = (np.full((120, 200, 3), 5 + i, np.uint8) for i in range(12))
        source = Source(frames, name="a")
        options = DetectOptions(save=where / "a.mp4", jsonl=where / "a.jsonl", **options)
        VideoPipeline(Mover(), [source], options).run()
        lines = (where / "a.jsonl").read_text(encoding="utf-8").splitlines()
        capture, last = cv2.VideoCapture(str(where / "a.mp4")), None
        while (read := capture.read())[0]:
            last = read[1].astype(int)
        return [json.loads(line)["detections"][0]["track_id"] for line in lines], last

    for name in ("plain", "ids", "trails"):
        (tmp_path / name).mkdir()
    plain, picture = run(tmp_path / "plain")
    ids, with_ids = run(tmp_path / "ids", track=True)
    _, with_trails = run(tmp_path / "trails", track=True, trails=True)
    assert plain == [None] * 12
    assert ids == [None] + [1] * 11
    assert np.abs(with_ids - picture).max() > 100  # the number on the plate
    assert np.abs(with_trails - with_ids).max() > 100


def test_filters_come_after_the_tracker(tracked, grey):
    """The thing is weak for ten frames, which a filter hides and the tracker sees."""

    class Fading(Mover):
        def batch(self, frames):
            return [boxes_at(v, score=0.3 if 20 < v < 80 else 0.9) for v in (int(f.flat[0]) for f in frames)]

    source = Source((grey(5 + 5 * i) for i in range(20)), name="a")
    filters = Filters(min_scores={"": 0.5})
    with VideoPipeline(Fading(), [source], DetectOptions(track=True, filters=filters)) as pipeline:
        ids = [result.detections.track_ids.tolist() for result in pipeline]
    assert ids == [[-1], [1], [1], [1]] + [[]] * 11 + [[1]] * 5


def test_dropped_frames_do_not_end_a_track(follow):
    """The thing moves by four pixels a frame; frames 4 to 11 were dropped."""
    one = stream()
    for i in (0, 1, 2, 3):
        ids = follow(one, i, i / 25, 10 + 4 * i)
    assert follow(one, 12, 12 / 25, 10 + 4 * 12) == ids == [1]


def test_a_stride_is_no_gap(tracked, grey):
    source = Source((grey(5 + 2 * i) for i in range(40)), name="a", stride=5)
    with VideoPipeline(Mover(), [source], DetectOptions(track=True)) as pipeline:
        ids = [result.detections.track_ids.tolist() for result in pipeline]
    assert ids == [[-1]] + [[1]] * 7


@pytest.mark.parametrize(
    ("change", "index", "time_s"),
    [
        ("nothing", 4, 0.16),
        ("a slow model", 5, 0.2),
        ("a seek back", 2, 0.08),
        ("the same frame again", 3, 0.12),
        ("a gap of time", 4, 5.0),
        ("a new connection", 4, 0.16),
        ("another size", 4, 0.16),
    ],
)
def test_what_ends_the_tracks_and_what_does_not(follow, change, index, time_s):
    one = stream()
    assert settle(follow, one) == [1]
    other = {"a new connection": stream(), "another size": stream(size=(96, 200))}.get(change, one)
    now = follow(other, index, time_s, 18)
    assert now == ([1] if change in ("nothing", "a slow model") else [-1])
    if now == [-1]:
        assert follow(other, index + 1, time_s + 0.04, 20) == [2]  # a new id, never one of before


def test_frames_that_lie_evenly_far_apart_are_a_slow_model(follow):
    one = stream(is_live=True)
    ids = [follow(one, 100 * i, 4.0 * i, 10 + i) for i in range(6)]
    assert ids == [[-1]] + [[1]] * 5


def test_frames_of_the_caller_s_own_code_are_not_timed(follow):
    """How long the caller took between two frames says nothing about what they show."""
    mine, live = stream("b"), stream("c", is_live=True)
    assert settle(follow, mine) == settle(follow, live) == [1]
    assert follow(mine, 4, 60.0, 18) == [1]
    assert follow(live, 4, 60.0, 18) == [-1]  # this one is: it comes as it happens


def test_sources_know_nothing_of_each_other(follow):
    a, b = stream("a"), stream("b")
    assert settle(follow, a) == settle(follow, b) == [1]
    assert follow(a, 4, 0.16, 18) == [1]


def test_empty_frames_and_an_object_that_comes_back(follow):
    one = stream()
    settle(follow, one)
    assert [follow(one, i, i / 25) for i in range(4, 10)] == [[]] * 6
    assert follow(one, 10, 0.4, 30) == [1]


def test_the_pictures_of_a_folder_are_one_scene(tracked, tmp_path, grey):
    for index in range(6):
        size = (48, 64) if index < 5 else (48, 80)  # the last one is another scene
        cv2.imwrite(str(tmp_path / f"{index}.png"), np.full((*size, 3), 5 + 2 * index, np.uint8))
    with VideoPipeline(Mover(), [tmp_path], DetectOptions(track=True)) as pipeline:
        assert [result.detections.track_ids.tolist() for result in pipeline] == [[-1]] + [[1]] * 4 + [[-1]]


def test_two_files_one_after_the_other_share_no_id(tracked, tmp_path, moving_frames, write_raw_video):
    clips = [write_raw_video(tmp_path / f"{name}.mp4", moving_frames[:10], fps=25.0) for name in "ab"]

    class Still(Mover):
        def batch(self, frames):
            return [boxes_at(10) for _ in frames]

    with VideoPipeline(Still(), clips, DetectOptions(track=True)) as pipeline:
        ids = [result.detections.track_ids.tolist() for result in pipeline]
    assert ids == ([[-1]] + [[1]] * 9) + ([[-1]] + [[2]] * 9)


def test_the_size_of_the_picture_changes_midway(tracked, grey):
    frames = [grey(5 + i) for i in range(5)] + [np.full((96, 128, 3), 10 + i, np.uint8) for i in range(5)]
    with VideoPipeline(
        Mover(), [Source(iter(frames), name="a")], DetectOptions(track=True, trails=True)
    ) as pipeline:
        results = list(pipeline)
    assert [result.detections.track_ids.tolist() for result in results] == [[-1]] + [[1]] * 4 + [[-1]] + [
        [2]
    ] * 4
    assert results[-1].trails[2].shape == (4, 2)  # none of it of the other size


def test_a_camera_that_comes_back_has_new_ids(tracked, camera, monkeypatch):
    monkeypatch.setattr(intake, "FIRST_PAUSE", 0.05)

    class Still(Mover):
        def batch(self, frames):
            return [boxes_at(10) for _ in frames]

    pipeline, seen = VideoPipeline(Still(), [f"cam={camera.url}"], DetectOptions(track=True, stall=5.0)), []
    end = time.monotonic() + 60.0
    with pipeline:
        for result in pipeline:
            seen += result.detections.track_ids.tolist()
            if len(seen) == 5:
                camera.mode = "die"
            if 2 in seen or time.monotonic() > end:
                break
    assert sorted(set(seen)) == [-1, 1, 2]


def test_trails_are_where_the_centres_have_been(tracked, grey):
    source = Source((grey(10 + 2 * i) for i in range(60)), name="a")
    with VideoPipeline(Mover(), [source], DetectOptions(track=True, trails=True)) as pipeline:
        results = list(pipeline)
    assert results[0].trails == {}  # no track yet
    np.testing.assert_array_equal(results[3].trails[1], [[22, 25], [24, 25], [26, 25]])
    last = results[-1].trails[1]
    assert last[-1].tolist() == [10 + 2 * 59 + 10, 25]
    assert 49 <= len(last) <= 51  # two seconds at 25 frames a second
    assert results[3].draw().any()


def test_without_trails_none_are_kept(tracked, grey):
    source = Source((grey(10 + i) for i in range(4)), name="a")
    with VideoPipeline(Mover(), [source], DetectOptions(track=True)) as pipeline:
        assert [result.trails for result in pipeline] == [{}] * 4


def test_settings_that_cannot_be(grey):
    with pytest.raises(SettingsError, match="trails are those of tracks"):
        VideoPipeline(Mover(), [Source(iter(()), name="a")], DetectOptions(trails=True))
    with pytest.raises(SettingsError, match="track is 'yes'; expected bool or TrackOptions"):
        VideoPipeline(Mover(), [Source(iter(()), name="a")], DetectOptions(track="yes"))


def test_without_the_package_one_line_names_the_extra(grey, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(SettingsError, match=r"pip install 'anchorline\[track\]'") as caught:
        VideoPipeline(
            Mover(), [Source(iter(()), name="a")], DetectOptions(track=True, jsonl=tmp_path / "a.jsonl")
        )
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def run_command(capsys, *options):
    """The command's exit code and its lines on stderr."""
    code = cli.main(["detect", *map(str, options)])
    return code, capsys.readouterr().err.splitlines()


def test_the_command_writes_ids(tracked, tmp_path, model_path, write_raw_video, capsys):
    pytest.importorskip("onnxruntime")
    frames = [np.full((48, 64, 3), 230, np.uint8)] * 6
    clip = write_raw_video(tmp_path / "clip.mp4", frames, fps=25.0)
    lines, figures = tmp_path / "out.jsonl", tmp_path / "figures.json"
    options = ("--track", "--trails", "--min-score", "0.6", "--jsonl", lines, "--json", figures)
    assert run_command(capsys, clip, "--model", model_path, *options)[0] == 0
    found = [json.loads(line)["detections"] for line in lines.read_text(encoding="utf-8").splitlines()]
    assert [[each["track_id"] for each in frame] for frame in found] == [[None]] + [[1]] * 5
    assert "track" in json.loads(figures.read_text(encoding="utf-8"))["stages"]


def test_the_command_without_the_package(tmp_path, model_path, write_raw_video, capsys, monkeypatch):
    pytest.importorskip("onnxruntime")
    clip = write_raw_video(tmp_path / "clip.mp4", [np.full((48, 64, 3), 230, np.uint8)] * 2, fps=25.0)
    monkeypatch.setitem(sys.modules, "trackers", None)
    lines = tmp_path / "out.jsonl"
    code, errors = run_command(capsys, clip, "--model", model_path, "--track", "--jsonl", lines)
    assert code == 2
    assert len(errors) == 1
    assert "anchorline[track]" in errors[0]
    code, errors = run_command(capsys, clip, "--model", model_path, "--trails", "--jsonl", lines)
    assert code == 2
    assert "--track" in errors[0]
    assert not lines.exists()
