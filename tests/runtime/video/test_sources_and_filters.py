"""How sources are named and laid out, and which detections are kept."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import AnchorlineError, DataError, OutputError, SettingsError
from anchorline.runtime.video.options import DetectOptions, Filters, parse_min_scores, parse_region
from anchorline.runtime.video.source import Source, parse_source, plan


@pytest.mark.parametrize(
    ("text", "name", "where", "live", "policy"),
    [
        ("0", "", 0, True, "latest"),
        ("cam2=1", "cam2", 1, True, "latest"),
        ("rtsp://host:554/a?b=c", "", "rtsp://host:554/a?b=c", True, "latest"),
        ("door=rtsp://user:pw@host/a", "door", "rtsp://user:pw@host/a", True, "latest"),
        ("http://host/video", "", "http://host/video", True, "latest"),
        ("http://host/clip.mp4?x=1", "", "http://host/clip.mp4?x=1", False, "wait"),
        ("clip.mp4", "", "clip.mp4", False, "wait"),
        ("a=clip.mp4", "a", "clip.mp4", False, "wait"),
        ("/dev/video3", "", 3, True, "latest"),
        ("a=/dev/video0", "a", 0, True, "latest"),
        ("./a=b.mp4", "", "./a=b.mp4", False, "wait"),
    ],
)
def test_naming_a_source(text, name, where, live, policy):
    source = parse_source(text)
    assert (source.name, source.where, source.live, source.policy) == (name, where, live, policy)


def test_a_file_that_looks_like_something_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("0", "a=b.mp4"):
        Path(name).touch()
        assert parse_source(name).where == name
        assert not parse_source(name).live


@given(st.text(st.characters(exclude_characters="\0", codec="utf-8")))
@example("x" * 5000)
@example("a=" + "x/" * 5000)
def test_any_text_is_a_source_or_an_error_of_ours(text):
    with contextlib.suppress(AnchorlineError):
        plan([text])


def test_files_are_read_one_after_the_other_and_named_ones_side_by_side(tmp_path):
    for name in ("a.mp4", "b.mp4", "c.mp4", "in/1.png", "in/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    sources = plan(
        [tmp_path / "a.mp4", f"x={tmp_path / 'b.mp4'}", "7", tmp_path / "in", "http://host:80/live"],
        tmp_path / "out",
    )
    assert [source.name for source in sources] == ["files", "x", "camera7", "host"]
    assert [item.path.name for item in sources[0].items] == ["a.mp4", "1.png", "2.png"]
    assert [item.target.name for item in sources[0].items] == ["a.mp4", "1.png", "2.png"]
    assert [item.target.name for item in sources[1].items] == ["b.mp4"]
    assert [source.target.name for source in sources[2:]] == ["camera7.mp4", "host.mp4"]
    assert [source.policy for source in sources] == ["wait", "wait", "latest", "latest"]
    assert {source.policy for source in plan([tmp_path / "a.mp4", "0"], policy="latest")} == {"latest"}
    assert plan(["0"], tmp_path / "one.mp4")[0].target == tmp_path / "one.mp4"
    assert [source.name for source in plan(["rtsp://h/1", "rtsp://h/2"])] == ["h", "h-2"]
    order = plan(["b=1", f"x={tmp_path / 'b.mp4'}", "a=0", tmp_path / "a.mp4"])
    assert [source.name for source in order] == ["b", "x", "a", str(tmp_path / "a.mp4")]


@pytest.mark.parametrize(
    ("sources", "save", "kind", "message"),
    [
        ([], None, SettingsError, "no sources given"),
        (["a=0", "a=1"], None, SettingsError, "two sources are called 'a'"),
        (["0", "1"], "out.mp4", SettingsError, "several results need a folder"),
        (["0"], "out.png", SettingsError, "a video is saved as .mp4"),
        (["0", "none.mp4"], None, DataError, "no such file"),
        (["ftp"], None, DataError, "no such file"),
        (["0", "1"], "file", OutputError, "is a file"),
    ],
)
def test_plans_that_cannot_be(tmp_path, monkeypatch, sources, save, kind, message):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(kind, match=message):
        plan(sources, save)


@pytest.mark.parametrize("options", [{"stride": 0}, {"stride": 1.5}, {"policy": "x"}, {"where": -1}])
def test_sources_that_cannot_be(options):
    with pytest.raises(SettingsError, match="expected"):
        Source(**{"where": 0, **options})


# Filters


FOUND = Detections(
    boxes=[[0, 0, 10, 10], [40, 0, 60, 20], [80, 80, 100, 100], [45, 45, 55, 55]],
    scores=[0.9, 0.4, 0.6, 0.8],
    labels=[0, 1, 0, 1],
    class_names=("cat", "dog"),
)
SIZE = (100, 100)


def kept(**settings):
    return [round(score, 3) for score in Filters(**settings)(FOUND, SIZE).scores.tolist()]


@pytest.mark.parametrize(
    ("settings", "scores"),
    [
        ({}, [0.9, 0.4, 0.6, 0.8]),
        ({"classes": ("dog",)}, [0.4, 0.8]),
        ({"classes": ("dog", "cat")}, [0.9, 0.4, 0.6, 0.8]),
        ({"min_scores": {"": 0.7}}, [0.9, 0.8]),
        ({"min_scores": {"cat": 0.7}}, [0.9, 0.4, 0.8]),
        ({"min_scores": {"": 0.7, "dog": 0.3}}, [0.9, 0.4, 0.8]),
        ({"max_detections": 2}, [0.9, 0.8]),
        ({"max_detections": 1, "classes": ("dog",)}, [0.8]),
        ({"regions": (parse_region("0,0,0.5,0.5"),)}, [0.9, 0.4, 0.8]),  # centres at the edge are inside
        ({"regions": (parse_region("0.7,0.7 1,0.7 1,1 0.7,1"),)}, [0.6]),
        ({"regions": (parse_region("0,0,0.2,0.2"), parse_region("0.8,0.8,1,1"))}, [0.9, 0.6]),
        ({"regions": (parse_region("0,0 0.3,0 0,0.3"),), "min_scores": {"cat": 0.95}}, []),
    ],
)
def test_filters(settings, scores):
    assert kept(**settings) == scores


def test_filters_of_nothing_and_regions_scale_with_the_frame():
    everything = Filters(("cat",), {"": 0.1}, (parse_region("0,0,1,1"),), 3)
    assert len(everything(Detections.empty(("cat",)), SIZE)) == 0
    corner = Filters(regions=(parse_region("0,0,0.5,0.5"),))
    assert len(corner(FOUND, (1000, 1000))) == 4
    assert len(corner(FOUND, (50, 100))) == 2


@given(st.integers(1, 6), st.floats(0, 1), st.integers(0, 20))
def test_filters_keep_the_order_and_the_best(limit, lowest, count):
    generator = np.random.default_rng(count)
    scores = generator.random(count).astype(np.float32)
    found = Detections(np.tile([0, 0, 5, 5], (count, 1)), scores, np.zeros(count, int), ("a",))
    left = Filters(min_scores={"": lowest}, max_detections=limit)(found, SIZE).scores
    expected = np.sort(scores[scores >= np.float32(lowest)])[::-1][:limit]
    np.testing.assert_array_equal(np.sort(left)[::-1], expected)
    positions = [scores.tolist().index(score) for score in left.tolist()]
    assert positions == sorted(positions)


@pytest.mark.parametrize("text", ["", "1,2", "a,b,c,d", "0,0 1,1", "0,0 1,1 nan,0", "0,0,1", "0,0,1,2,3"])
def test_regions_that_cannot_be_read(text):
    with pytest.raises(SettingsError, match="region"):
        parse_region(text)


@pytest.mark.parametrize("text", ["", "cat=", "cat", "cat=x", "=nan"])
def test_scores_that_cannot_be_read(text):
    with pytest.raises(SettingsError, match="lowest score"):
        parse_min_scores([text])


@pytest.mark.parametrize(
    "settings",
    [
        {"min_scores": {"cat": 1.5}},
        {"regions": (((0.0, 0.0), (1.0, 1.0)),)},
        {"regions": (parse_region("0,0,200,200"),)},
        {"max_detections": 0},
        {"classes": "cat"},
        {"classes": (1,)},
        {"min_scores": {"cat": "x"}},
        {"min_scores": [0.5]},
        {"regions": ((0, 0, 1, 1),)},
        {"regions": "0,0,1,1"},
    ],
)
def test_filters_that_cannot_be(settings):
    with pytest.raises(SettingsError, match="expected"):
        Filters(**settings)
    assert parse_min_scores(["0.3", "a=b=0.6"]) == {"": 0.3, "a=b": 0.6}


@pytest.mark.parametrize(
    "name", ["save", "jsonl", "report", "provider", "filters", "track", "trails", "score_threshold"]
)
@pytest.mark.parametrize("value", [b"x", {"a": 1}, np.array([1, 2]), [["x" * 500]]])
def test_options_of_another_type(name, value):
    with pytest.raises(SettingsError, match=f"^{name} is .*; expected ") as caught:
        DetectOptions(**{name: value})
    assert len(str(caught.value)) < 500
