"""What the machines that watch the run are told: health and metrics."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import anchorline
from anchorline.serving import metrics


def samples(run):
    """``{name: {labels: value}}``; labels without their names, sorted by these."""
    code, headers, body = run.ask("/metrics")
    assert code == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(body.decode()):
        assert family.documentation
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def test_a_run_is_healthy_from_its_first_frame_to_its_end(live_run, until):
    with live_run(begins=False) as run:
        assert run.health() == (503, {"pipeline": "the model is being loaded"})
        assert run.ask("/status")[0] == run.ask("/")[0] == run.ask("/metrics")[0] == 200
        run.begin()
        until(lambda: run.health() == (200, {}))
        run.cameras["cam1"].ended.set()
        until(lambda: run.health() == (503, {"pipeline": "the run has ended"}))


def test_a_source_that_delivers_nothing_yet(live_run):
    with live_run(begins=False) as run:
        run.view.watch(run.pipeline)
        assert run.health() == (503, {"pipeline": "no source has delivered a frame yet"})


def test_a_stalled_source_is_named_and_recovers(live_run, until):
    with live_run(("good", "bad"), stall=1.0) as run:
        until(lambda: run.health() == (200, {}))
        run.cameras["bad"].playing.clear()
        until(lambda: run.health() == (503, {"bad": "delivers nothing"}))
        assert samples(run)["anchorline_source_playing"] == {("good",): 1.0, ("bad",): 0.0}
        assert samples(run)["anchorline_healthy"][()] == 0.0
        before = run.status()["sources"][0]["frames"]
        until(lambda: run.status()["sources"][0]["frames"] > before)  # the other one goes on
        run.cameras["bad"].playing.set()
        until(lambda: run.health() == (200, {}))
        assert samples(run)["anchorline_stalls_total"][("bad",)] == 1.0


def test_a_pipeline_that_dies(live_run, until):
    with live_run() as run:
        until(lambda: run.health() == (200, {}))
        run.finder.fails = True
        until(lambda: run.health() == (503, {"pipeline": "the run has failed"}))
        assert run.ask("/")[0] == 200
    assert isinstance(run.error, RuntimeError)


def test_a_pipeline_that_hangs(live_run, until):
    with live_run(stall=0.4) as run:
        until(lambda: run.health() == (200, {}))
        run.finder.free.clear()
        until(lambda: run.health()[0] == 503)
        assert "no result for" in run.health()[1]["pipeline"]
        run.finder.free.set()
        until(lambda: run.health() == (200, {}))


def test_the_metrics_are_the_run_s_figures(live_run, until):
    with live_run(("a", "b")) as run, run.opened("/feed"):
        until(lambda: all(each.frames_out > 20 for each in run.pipeline.figures.sources.values()))
        until(lambda: run.live.painter.count > 0)
        first, second = samples(run), samples(run)
        figures = run.pipeline.figures.sources
        assert first["anchorline_viewers"][()] == 1.0
        assert first["anchorline_pictures_encoded_total"][()] >= 1.0
        assert first["anchorline_healthy"][()] == 1.0
        assert first["anchorline_run_info"] == {("none", "stub", anchorline.__version__): 1.0}
        for name in ("a", "b"):
            answered = second["anchorline_frames_answered_total"][(name,)]
            assert 20 < answered <= figures[name].frames_out
            assert first["anchorline_frames_answered_total"][(name,)] <= answered
            assert second["anchorline_frames_read_total"][(name,)] >= answered
            assert second["anchorline_frames_dropped_total"][(name,)] <= figures[name].dropped
            assert second["anchorline_reconnects_total"][(name,)] == 0
            assert 0 <= second["anchorline_newest_frame_age_seconds"][(name,)] < 60
            assert second["anchorline_queue_frames"][(name,)] in (0, 1)
            for animal in ("cat", "dog"):
                assert second["anchorline_detections_total"][(animal, name)] >= answered
            counts = second["anchorline_result_age_seconds_count"][(name,)]
            assert 20 < counts <= figures[name].frames_out
            assert second["anchorline_result_age_seconds_bucket"][("+Inf", name)] == counts
    for stage in ("decode", "network"):
        buckets = [
            value for (_, own), value in first["anchorline_stage_seconds_bucket"].items() if own == stage
        ]
        assert buckets == sorted(buckets)
        assert buckets[-1] == first["anchorline_stage_seconds_count"][(stage,)] > 0
        assert first["anchorline_stage_seconds_sum"][(stage,)] > 0
        assert (
            second["anchorline_stage_seconds_sum"][(stage,)]
            >= first["anchorline_stage_seconds_sum"][(stage,)]
        )


def test_odd_names_and_many_classes(live_run, monkeypatch, grey_result):
    monkeypatch.setattr(metrics, "_MOST_CLASSES", 3)
    with live_run(begins=False) as run:
        name = 'a "quoted"\\ name\nof two lines'
        run.view.watch(run.pipeline)
        run.live._counts = {name: Counter({f"class {index}": index + 1 for index in range(10)})}
        assert samples(run)["anchorline_detections_total"] == {
            ("class 0", name): 1.0,
            ("class 1", name): 2.0,
            ("class 2", name): 3.0,
            ("(others)", name): float(sum(range(4, 11))),
        }


@pytest.mark.parametrize("count", [0, 1])
def test_classes_that_the_model_does_not_name(live_run, grey_result, count):
    """They are called by their numbers, and can be filtered by these once they were seen."""
    with live_run(begins=False) as run:
        run.view.watch(run.pipeline)
        for _ in range(count):
            result = grey_result("cam1")
            found = result.detections
            result.detections = type(found)(found.boxes, found.scores, np.array([5, 7]))
            run.view.write(result)
        classes = run.status()["classes"]
        assert classes == [{"name": name, "count": 1} for name in ("5", "7") if count]
        assert run.ask("/controls", "POST", {"hidden": ["5"]})[0] == (200 if count else 400)
