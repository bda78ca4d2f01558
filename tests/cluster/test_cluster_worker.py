"""A worker, called in this process: what it answers is what the local run writes."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from anchorline import __version__
from anchorline.cluster import WorkerState
from anchorline.cluster import worker as worker_module
from anchorline.cluster.outputs import Outputs, copies_folder
from anchorline.cluster.worker import DetectionWorker, Job, NotHere, WorkItem, find_model, model_files
from anchorline.runtime import Detector, SliceOptions, detect, write_image
from anchorline.runtime.io.errors import ArtefactError, OutputError, SettingsError
from anchorline.runtime.video.options import DetectOptions, Filters
from anchorline.runtime.video.source import Item

pytest.importorskip("onnxruntime")


@pytest.fixture
def job(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # which also brings us back from where the worker goes
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = DetectOptions(provider="cpu", jsonl="-")
    return Job(__version__, str(tmp_path), model_files(model), options)


@pytest.fixture
def opened(job):
    """``opened(**changes)``: a worker for the job that has opened its detector."""

    def start(**changes):
        worker = DetectionWorker(replace(job, **changes))
        assert isinstance(worker.open(), WorkerState)
        return worker

    return start


def item_of(*paths, is_video=False):
    return WorkItem(0, tuple(map(str, paths)), is_video).measured()


def whole_answer(worker, item):
    """All lines of an item, its frames, and the last piece."""
    pieces = list(worker.answer(item))
    return b"".join(piece.lines for piece in pieces), sum(len(piece.times) for piece in pieces), pieces[-1]


def test_what_it_says_of_itself(job):
    assert DetectionWorker(job).open() == WorkerState(platform.node(), os.getpid(), "cpu", "fp32")


@pytest.mark.parametrize(
    "options",
    [
        DetectOptions(provider="cpu", jsonl="-"),
        DetectOptions(provider="cpu", jsonl="-", stride=3, batch=2, max_wait=0.0),
    ],
)
def test_lines_and_warnings_are_those_of_the_local_run(options, opened, files, model, tmp_path):
    sources = [path.relative_to(tmp_path) for path in files]
    with Detector(model, "cpu") as detector:
        local = detect(sources, detector, replace(options, jsonl="local.jsonl"), progress=False)
    worker = opened(options=options)
    pictures = sorted(sources[0].iterdir())
    lines, warnings, frames = b"", [], 0
    for item in (
        item_of(*pictures[:3]),
        item_of(*pictures[3:]),
        item_of(sources[1], is_video=True),
        item_of(sources[2]),
        item_of(sources[3], is_video=True),
    ):
        found, count, last = whole_answer(worker, item)
        lines, warnings, frames = lines + found, warnings + list(last.warnings), frames + count
    assert lines == (tmp_path / "local.jsonl").read_bytes()
    assert tuple(warnings) == local.warnings
    assert frames == local.frames == len(lines.splitlines())
    assert last.unreadable == warnings[-1]
    assert str(sources[3]) in last.unreadable


def test_slices_are_those_of_the_local_run_and_their_cost_travels(opened, model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (100, 120, 3), dtype=np.uint8)
    picture = tmp_path / "wide.png"
    write_image(picture, pixels)
    options = DetectOptions(provider="cpu", jsonl="-", slices=SliceOptions(64))
    with options.open_detector(model) as detector:
        local = detect([picture], detector, replace(options, jsonl="local.jsonl"), progress=False)
    lines, _, last = whole_answer(opened(options=options), item_of(picture))
    assert lines == (tmp_path / "local.jsonl").read_bytes()
    assert (last.looks.frames, last.looks.views) == (1, 7)
    assert last.looks.views_a_frame == local.views == 7
    assert last.looks.ms_a_frame > 0


def test_an_answer_comes_in_pieces(opened, write_clip, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_module, "PIECE_BYTES", 400)
    item = item_of(write_clip(tmp_path / "clip.mp4", 30), is_video=True)
    worker = opened()
    pieces = list(worker.answer(item))
    assert len(pieces) > 10
    assert all(len(piece.times) == len(piece.lines.splitlines()) <= 4 for piece in pieces)
    assert sum(len(piece.times) for piece in pieces) == 30
    assert pieces[0].times[0]["decode"] > 0
    assert whole_answer(worker, item)[0] == b"".join(piece.lines for piece in pieces)


def test_no_lines_where_none_are_wanted(opened, write_clip, tmp_path):
    item = item_of(write_clip(tmp_path / "clip.mp4"), is_video=True)
    lines, frames, _ = whole_answer(opened(options=DetectOptions(provider="cpu")), item)
    assert (lines, frames) == (b"", 12)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"options": DetectOptions(score_threshold=0.001)},
            SettingsError,
            "already drops scores up to 0.01",
        ),
        (
            {"options": DetectOptions(filters=Filters(classes=("cat",)))},
            SettingsError,
            "knows no class 'cat'",
        ),
        (
            {"copies": Path("out/.hidden")},
            OutputError,
            "out: copies are saved in a folder that all",
        ),
    ],
)
def test_it_refuses_what_it_cannot_do(changes, kind, message, job):
    with pytest.raises(kind, match=rf"^{re.escape(platform.node())}: .*{message}"):
        DetectionWorker(replace(job, **changes)).open()


def test_it_refuses_another_version(job):
    message = f"anchorline {__version__} is installed there, and the command is 0.0.1"
    with pytest.raises(SettingsError, match=message):
        DetectionWorker(replace(job, version="0.0.1")).open()


def test_a_batch_that_the_model_does_not_take(job, monkeypatch):
    class Small(Detector):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.contract = replace(self.contract, max_batch=2)

    monkeypatch.setattr("anchorline.runtime.detector.Detector", Small)
    with pytest.raises(SettingsError, match="at most 2 frames"):
        DetectionWorker(replace(job, options=DetectOptions(batch=3))).open()


def test_files_that_are_not_here(opened, write_picture, tmp_path):
    worker = opened()
    item = item_of(write_picture(tmp_path / "a.png", 100))
    assert whole_answer(worker, item)[1] == 1
    message = f"not on {re.escape(platform.node())}, or another file"
    for other in (
        replace(item, sizes=(item.sizes[0] + 1,)),  # another file under this name
        replace(item, paths=("b.png",)),
    ):
        with pytest.raises(NotHere, match=message):
            whole_answer(worker, other)


def test_files_that_have_gone_everywhere(opened, write_picture, write_clip, tmp_path):
    worker = opened()
    for path in (write_picture(tmp_path / "a.png", 100), write_clip(tmp_path / "a.mp4")):
        path.unlink()
        (piece,) = worker.answer(item_of(path, is_video=path.suffix == ".mp4"))
        assert f"{path}: no such file" in piece.unreadable
        assert piece.warnings == (piece.unreadable,)


def test_what_the_computation_raises_is_no_complaint_about_the_file(
    opened, write_picture, tmp_path, monkeypatch
):
    def broken(self, frames):
        raise RuntimeError("two\nlines")

    worker = opened()
    monkeypatch.setattr(Detector, "batch", broken)
    with pytest.raises(RuntimeError, match="two\nlines"):
        whole_answer(worker, item_of(write_picture(tmp_path / "a.png", 100)))


def test_copies_wait_in_the_folder_for_them(opened, write_clip, write_picture, tmp_path):
    pictures = [write_picture(tmp_path / name / "a.png", grey) for name, grey in (("x", 50), ("y", 90))]
    clip = write_clip(tmp_path / "clip.mp4")
    targets = [tmp_path / "out" / name for name in ("a.png", "a-2.png", "clip.mp4")]
    files = [
        Item(path, path == clip, target) for path, target in zip([*pictures, clip], targets, strict=True)
    ]
    with copies_folder(files) as copies, Outputs(files, None, copies) as outputs:
        worker = opened(copies=copies)
        for item in (item_of(*pictures), replace(item_of(clip, is_video=True), first=2)):
            whole_answer(worker, item)
            assert not any(target.exists() for target in targets[item.first :])
            outputs.answered(item)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a-2.png", "a.png", "clip.mp4"]


# The model


def elsewhere(job, path="elsewhere/tiny.onnx"):
    """The job with the model at a path where it is not."""
    return replace(job, model=dict.fromkeys([str(Path(job.folder, path))], *job.model.values()))


def test_the_model_is_used_where_it_is(job, model):
    assert find_model(job.model) == model


def test_a_model_that_is_not_here_is_sent_once(job, model):
    assert DetectionWorker(elsewhere(job)).open() is None
    assert isinstance(DetectionWorker(elsewhere(job)).open(np.fromfile(model, np.uint8)), WorkerState)
    assert isinstance(DetectionWorker(elsewhere(job)).open(), WorkerState)  # from the cache


def test_another_model_under_the_same_name_is_not_used(job, tmp_path):
    (tmp_path / "tiny.onnx").write_bytes(b"another")
    assert find_model(elsewhere(job, "tiny.onnx").model) is None


def test_a_model_that_changes_on_the_way(job):
    with pytest.raises(ArtefactError, match="changed while the run began"):
        find_model(elsewhere(job).model, [np.zeros(3, np.uint8)])
