"""``anchorline bench``: the figures are those of all calls, and each model's memory is its own."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys

import cv2
import numpy as np
import pytest

from anchorline.bench import bench as bench_module
from anchorline.bench import work as work_module
from anchorline.bench.bench import BenchError, bench
from anchorline.bench.work import (
    QUANTITIES,
    TOTAL,
    Work,
    load_frames,
    measure,
    peak_memory,
    summarise,
)
from anchorline.runtime.io.errors import AnchorlineError, ArtefactError, DataError, OutputError, SettingsError
from anchorline.runtime.timing import DETECTOR_STAGES

pytest.importorskip("onnxruntime")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), np.full((48, 80, 3), 7, np.uint8))
    return path


def task(model, **changes) -> Work:
    plain = Work(str(model), None, "cpu", batch=1, batches=5, warmup=1, threads=1, cpu_precision="auto")
    return dataclasses.replace(plain, **changes)


def test_percentiles_are_those_of_all_values():
    found = summarise([0.001] * 99 + [5.0])
    assert found == {"p50": 1.0, "p90": 1.0, "p95": 1.0, "p99": pytest.approx(50.99), "max": 5000.0}
    assert list(summarise([0.2])) == list(QUANTITIES)


def test_a_slow_call_is_not_hidden(bench_model, picture, monkeypatch):
    """The clock of the test: each call takes as long as is written here, and all of it comes out."""

    class Slow:
        provider, precision, threads = "cpu", "fp32", 1
        durations = iter([0.5, 0.25, 0.1, 0.1, 9.0, 0.1])

        def __init__(self, *arguments, **settings):
            self.timings = {}

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def views(self, size):
            return 1

        def batch(self, frames):
            seconds = next(self.durations)
            now[0] += seconds
            self.timings = {**dict.fromkeys(DETECTOR_STAGES, 0.0), "network": seconds / 2}
            return [[0] * 3 for _ in frames]

    now = [0.0]
    monkeypatch.setattr(work_module, "Detector", Slow)
    monkeypatch.setattr(work_module.time, "perf_counter", lambda: now[0])
    row = measure(task(bench_model, source=str(picture), batch=2, batches=4, warmup=2))
    assert row.first_ms == 500
    assert row.stages[TOTAL]["max"] == pytest.approx(9000)
    assert row.stages["network"]["max"] == pytest.approx(4500)
    assert row.stages[TOTAL]["p50"] == pytest.approx(100)
    assert row.fps == pytest.approx(8 / 9.3)
    assert (row.frames, row.batches, row.warmup, row.detections) == (8, 4, 2, 3)


def test_rows_files_and_picture(bench_model, picture, tmp_path):
    pytest.importorskip("matplotlib")
    files = {"json_file": tmp_path / "b.json", "csv_file": tmp_path / "b.csv", "plot": tmp_path / "b.png"}
    done = []
    report = bench(
        [bench_model, bench_model],
        source=picture,
        providers=["cpu"],
        batch=2,
        batches=3,
        threads=1,
        progress=lambda *each: done.append(each),
        **files,
    )
    assert done == [(0, 2), (1, 2)]
    rows = json.loads(files["json_file"].read_text())
    assert [row["model"] for row in rows] == ["tiny.onnx"] * 2
    for row in rows:
        assert (row["provider"], row["precision"], row["batch"], row["frames"]) == ("cpu", "fp32", 2, 6)
        assert set(row["stages"]) == {*DETECTOR_STAGES, TOTAL}
        for times in row["stages"].values():
            assert times["p50"] <= times["p90"] <= times["p95"] <= times["p99"] <= times["max"]
        assert row["peak_mib"] >= row["base_mib"] > 0
        assert row["frame_size"] == "80x48"
        assert row["detections"] == 1
        assert row["machine"]["processor"]
        assert "onnxruntime" in row["machine"]["versions"]
    with files["csv_file"].open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert float(lines[1]["total_p99_ms"]) == pytest.approx(rows[1]["stages"]["total"]["p99"], abs=1e-3)
    assert cv2.imread(str(files["plot"])).shape[1] > 600
    from rich.console import Console

    console = Console(width=100, record=True, file=open(tmp_path / "out", "w"))  # noqa: SIM115
    console.print(report.render())
    text = console.export_text()
    for wanted in (
        "tiny.onnx: cpu, fp32, batch 2, 1 threads",
        "p99 ms",
        "postprocess",
        "peak memory",
        "frames/s",
    ):
        assert wanted in text


def test_sources(tmp_path, picture, monkeypatch):
    monkeypatch.setattr(work_module, "_SCENES", 2)  # fewer: drawing them takes most of the test
    assert [frame.shape for frame in load_frames(str(picture))] == [(48, 80, 3)]
    assert [frame.shape for frame in load_frames(str(picture.parent))] == [(48, 80, 3)]
    scenes = load_frames(None)
    assert {frame.shape for frame in scenes} == {(1080, 1920, 3)}
    assert not np.array_equal(scenes[0], scenes[1])
    with pytest.raises(DataError):
        load_frames(str(tmp_path / "none.png"))


def test_memory_before_the_model_is_told_apart():
    """In a process of its own: what was freed before does not count."""
    code = (
        "import numpy as np\nfrom anchorline.bench.work import forget_peak, peak_memory\n"
        "kept = np.ones(300 << 20, np.uint8)\ndel kept\nbefore = peak_memory()\nforget_peak()\n"
        "print(before, peak_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert before > 300
    if sys.platform.startswith("linux"):
        assert after < before - 200
    assert peak_memory() > 10


@pytest.mark.parametrize(
    ("settings", "expected", "message"),
    [
        ({"batch": 0}, SettingsError, "batch is 0"),
        ({"batches": 0}, SettingsError, "batches is 0"),
        ({"warmup": -1}, SettingsError, "warmup is -1"),
        ({"providers": []}, SettingsError, "nothing to measure"),
        ({"plot": "a.txt"}, OutputError, "unknown suffix"),
        ({"source": "none.png"}, BenchError, "none.png: no such file"),
    ],
)
def test_bad_input(bench_model, settings, expected, message):
    with pytest.raises(expected, match=message):
        bench([bench_model], **{"batches": 1, "threads": 1, **settings})


def test_a_provider_that_is_not_here(bench_model, picture):
    """``test_the_verb`` has one in the process of its own."""
    with pytest.raises(AnchorlineError, match="provider is 'cuda'"):
        measure(task(bench_model, source=str(picture), provider="cuda"))


def test_a_model_that_is_none_and_a_process_that_dies(tmp_path, bench_model, picture, monkeypatch):
    with pytest.raises(SettingsError, match="nothing to measure"):
        bench([])
    with pytest.raises(BenchError, match=r"no such file|does not exist|cannot be read"):
        bench([tmp_path / "none.onnx"], source=picture, batches=1)

    def died(*arguments, **settings):
        return subprocess.CompletedProcess(arguments, -9, "", "some noise\nKilled")

    monkeypatch.setattr(bench_module.subprocess, "run", died)
    with pytest.raises(ArtefactError, match=r"ended with code -9 on auto \(Killed\)"):
        bench([bench_model])


def test_without_matplotlib_the_rest_works(bench_model, picture, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SettingsError, match=r"needs matplotlib .*anchorline\[evaluate\]"):
        bench([bench_model], plot=tmp_path / "a.png")
    assert len(bench([bench_model], source=picture, batches=1, threads=1).rows) == 1


def test_the_verb(bench_model, picture, tmp_path, capsys):
    from anchorline.cli import main

    arguments = ["bench", str(bench_model), "--images", str(picture), "--batches", "2", "--threads", "1"]
    assert main([*arguments, "--provider", "cpu", "--csv", str(tmp_path / "b.csv")]) == 0
    assert "frames/s" in capsys.readouterr().out
    assert (tmp_path / "b.csv").is_file()
    assert main([*arguments, "--provider", "fast"]) == 2
    assert "provider is 'fast'; available here: auto, cpu" in capsys.readouterr().err
