"""A worker, called in this process: what it answers is what the local run writes."""

from __future__ import annotations

import os
import platform
from dataclasses import replace

import numpy as np
import pytest

from anchorline import __version__
from anchorline.cluster import worker as worker_module
from anchorline.cluster.job import Job, WorkItem
from anchorline.cluster.merging import Copies
from anchorline.cluster.model_files import find_model, model_files, receive_model
from anchorline.cluster.replies import Absent, Broken, Chunk, Done, NeedsModel, Ready, Refused
from anchorline.cluster.worker import DetectionWorker
from anchorline.runtime import Detector, detect
from anchorline.runtime.io.errors import ArtefactError
from anchorline.runtime.video.options import DetectOptions, Filters
from anchorline.runtime.video.paths import Item

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
        worker = DetectionWorker(__version__, replace(job, **changes))
        assert isinstance(worker.open(), Ready)
        return worker

    return start


def item_of(*paths, is_video=False):
    return WorkItem(0, tuple(map(str, paths)), is_video).measured()


def whole_answer(worker, item):
    """All lines of an item, and the last reply."""
    reply, lines = worker.begin(item), b""
    while isinstance(reply, Chunk):
        lines += reply.lines
        reply = worker.more()
    return (lines + reply.last.lines if isinstance(reply, Done) else lines), reply


def test_what_it_says_of_itself(job):
    reply = DetectionWorker(__version__, job).open()
    assert reply == Ready(platform.node(), os.getpid(), "cpu", "fp32")


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
        found, reply = whole_answer(worker, item)
        assert isinstance(reply, Done)
        lines, warnings, frames = lines + found, warnings + list(reply.warnings), frames + reply.last.frames
    assert lines == (tmp_path / "local.jsonl").read_bytes()
    assert tuple(warnings) == local.warnings
    assert frames == local.frames == len(lines.splitlines())
    assert reply.unreadable == warnings[-1]
    assert str(sources[3]) in reply.unreadable


def test_an_answer_comes_in_pieces(opened, write_clip, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_module, "CHUNK_BYTES", 400)
    item = item_of(write_clip(tmp_path / "clip.mp4", 30), is_video=True)
    worker = opened()
    pieces, reply = [], worker.begin(item)
    while isinstance(reply, Chunk):
        pieces.append(reply)
        reply = worker.more()
    assert len(pieces) > 10
    assert all(piece.frames == len(piece.lines.splitlines()) <= 4 for piece in pieces)
    assert sum(piece.frames for piece in [*pieces, reply.last]) == 30
    assert len(pieces[0].times["decode"]) == pieces[0].frames
    assert whole_answer(worker, item)[0] == b"".join(piece.lines for piece in [*pieces, reply.last])


def test_no_lines_where_none_are_wanted(opened, write_clip, tmp_path):
    item = item_of(write_clip(tmp_path / "clip.mp4"), is_video=True)
    lines, reply = whole_answer(opened(options=DetectOptions(provider="cpu")), item)
    assert (lines, reply.last.frames, reply.last.detections) == (b"", 12, 12)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"options": DetectOptions(provider="magic")}, "SettingsError", "provider is 'magic'"),
        (
            {"options": DetectOptions(score_threshold=0.001)},
            "SettingsError",
            "already drops scores up to 0.01",
        ),
        (
            {"options": DetectOptions(filters=Filters(classes=("cat",)))},
            "SettingsError",
            "knows no class 'cat'",
        ),
        (
            {"copies": "out/.hidden", "token": "x"},
            "OutputError",
            "out: copies are saved in a folder that all",
        ),
    ],
)
def test_it_refuses_what_it_cannot_do(changes, kind, message, job):
    reply = DetectionWorker(__version__, replace(job, **changes)).open()
    assert isinstance(reply, Refused)
    assert reply.kind == kind
    assert message in reply.text


def test_it_refuses_another_version(job):
    reply = DetectionWorker("0.0.1", job).open()
    assert isinstance(reply, Refused)
    assert f"anchorline {__version__} is installed there, and the command is 0.0.1" in reply.text


def test_a_batch_that_the_model_does_not_take(job, monkeypatch):
    class Small(Detector):
        @property
        def contract(self):
            return replace(super().contract, max_batch=2)

    monkeypatch.setattr("anchorline.runtime.detector.Detector", Small)
    reply = DetectionWorker(__version__, replace(job, options=DetectOptions(batch=3))).open()
    assert isinstance(reply, Refused)
    assert "at most 2 frames" in reply.text


def test_files_that_are_not_here(opened, write_picture, tmp_path):
    worker = opened()
    item = item_of(write_picture(tmp_path / "a.png", 100))
    assert isinstance(whole_answer(worker, item)[1], Done)
    for reply in (
        worker.begin(replace(item, sizes=(item.sizes[0] + 1,))),  # another file under this name
        worker.begin(replace(item, paths=("b.png",))),
    ):
        assert isinstance(reply, Absent)
        assert f"not on {platform.node()}, or another file" in reply.text


def test_files_that_have_gone_everywhere(opened, write_picture, write_clip, tmp_path):
    worker = opened()
    for path in (write_picture(tmp_path / "a.png", 100), write_clip(tmp_path / "a.mp4")):
        path.unlink()
        reply = worker.begin(item_of(path, is_video=path.suffix == ".mp4"))
        assert isinstance(reply, Done)
        assert f"{path}: no such file" in reply.unreadable
        assert reply.warnings == (reply.unreadable,)


def test_what_the_computation_raises_is_told(opened, write_picture, tmp_path, monkeypatch):
    def broken(self, frames):
        raise RuntimeError("two\nlines")

    worker = opened()
    monkeypatch.setattr(Detector, "batch", broken)
    item = item_of(write_picture(tmp_path / "a.png", 100))
    assert worker.begin(item) == Broken("RuntimeError: two lines")
    assert isinstance(worker.more(), Broken)  # and there is no more of it


def test_copies_wait_in_the_folder_for_them(opened, write_clip, write_picture, tmp_path):
    pictures = [write_picture(tmp_path / name / "a.png", grey) for name, grey in (("x", 50), ("y", 90))]
    clip = write_clip(tmp_path / "clip.mp4")
    targets = [tmp_path / "out" / name for name in ("a.png", "a-2.png", "clip.mp4")]
    files = [
        Item(path, path == clip, target) for path, target in zip([*pictures, clip], targets, strict=True)
    ]
    with Copies(files) as copies:
        worker = opened(copies=str(copies.folder), token=copies.token)
        for item in (item_of(*pictures), replace(item_of(clip, is_video=True), first=2)):
            reply = whole_answer(worker, item)[1]
            assert not any(target.exists() for target in targets[item.first :])
            copies.publish(item, reply.copies)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a-2.png", "a.png", "clip.mp4"]


# The model


def test_the_model_is_used_where_it_is(job, model):
    assert find_model(job.model) == (model, [])


def test_a_model_that_is_not_here_is_sent_once(job, model, tmp_path):
    moved = replace(job.model[0], path=str(tmp_path / "elsewhere" / "tiny.onnx"))
    elsewhere = replace(job, model=(moved,))
    assert DetectionWorker(__version__, elsewhere).open() == NeedsModel((0,))
    content = np.fromfile(model, np.uint8)
    assert isinstance(DetectionWorker(__version__, elsewhere).open([0], content), Ready)
    assert isinstance(DetectionWorker(__version__, elsewhere).open(), Ready)  # from the cache


def test_another_model_under_the_same_name_is_not_used(job, tmp_path):
    path = tmp_path / "tiny.onnx"
    path.write_bytes(b"another")
    assert find_model((replace(job.model[0], path=str(path)),)) == (None, [0])


def test_a_model_that_changes_on_the_way(job, tmp_path):
    moved = replace(job.model[0], path=str(tmp_path / "elsewhere" / "tiny.onnx"))
    with pytest.raises(ArtefactError, match="changed while the run began"):
        receive_model((moved,), {0: np.zeros(3, np.uint8)})
