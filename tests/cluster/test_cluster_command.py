"""``anchorline detect --ray`` as far as it goes without a cluster."""

from __future__ import annotations

import json

import pytest

from anchorline import cli, cluster
from anchorline.cluster import ClusterSummary
from anchorline.runtime.video.figures import DetectSummary
from anchorline.runtime.video.options import Filters


@pytest.fixture
def ran(monkeypatch):
    """What ``detect_on_cluster`` was called with, instead of a cluster; it ends as ``ran["error"]`` says."""
    seen = {"error": None, "failed": ()}

    def detect_on_cluster(sources, model, options, *, progress, conclude, **settings):
        seen.update(sources=sources, model=model, options=options, settings=settings)
        figures = DetectSummary(3, 1.5, {}, 4, "cpu", "fp32", warnings=("a.png: damaged",))
        conclude(ClusterSummary(figures, files=5, answered=4, failed=seen["failed"]))
        if seen["error"] is not None:
            raise seen["error"]

    monkeypatch.setattr(cluster, "detect_on_cluster", detect_on_cluster)
    return seen


def run(*arguments):
    return cli.main(["detect", "a.png", "--model", "m.onnx", *map(str, arguments)])


def test_options_reach_the_cluster(ran, capsys, tmp_path):
    figures = tmp_path / "figures.json"
    options = ["--ray-workers", 3, "--classes", "cat", "--stride", 2, "--threads", 5, "--jsonl", "out.jsonl"]
    assert run("--ray", "host:1", "--json", figures, *options) == 0
    assert ran["sources"] == ["a.png"]
    settings, asked = ran["settings"], ran["options"]
    assert (settings["address"], settings["workers"], asked.stride) == ("host:1", 3, 2)
    assert (asked.threads, asked.filters) == (5, Filters(classes=("cat",)))
    captured = capsys.readouterr()
    assert "4 of 5 files answered" in captured.out
    assert captured.err == "anchorline: warning: a.png: damaged\n"
    assert json.loads(figures.read_text())["answered"] == 4


def test_classes_by_name_and_from_a_file(ran, tmp_path, capsys):
    file = tmp_path / "names.txt"
    file.write_text("\ufeffcar, red\n\n bus \n", encoding="utf-8")
    assert run("--ray", "local", "--classes", "cat, dog", "--classes", "bird", "--classes-file", file) == 0
    assert ran["options"].filters.classes == ("cat", "dog", "bird", "car, red", "bus")
    assert run("--ray", "local", "--classes-file", tmp_path / "none.txt") == 2
    assert "none.txt: no such file" in capsys.readouterr().err


def test_with_lines_on_stdout_the_tables_go_to_stderr(ran, capsys):
    assert run("--ray", "local", "--jsonl", "-") == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "4 of 5 files answered" in captured.err


def test_files_that_were_given_up_end_with_code_1(ran, capsys):
    ran["failed"] = ("b.png: given up after 3 tries",)
    assert run("--ray", "local") == 1
    captured = capsys.readouterr()
    assert "anchorline: failed: b.png: given up after 3 tries\n" in captured.err
    assert "1 failed" in captured.out


def test_an_interrupted_run_tells_its_figures(ran, capsys):
    ran["error"] = KeyboardInterrupt()
    assert run("--ray", "local") == 130
    captured = capsys.readouterr()
    assert "4 of 5 files answered" in captured.out
    assert captured.err.endswith("anchorline: interrupted\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ray-workers", 2], "--ray-workers is 2, but without --ray nothing is shared out; add --ray auto"),
        (["--ray", "auto", "--policy", "latest"], "--policy latest does not go with --ray"),
        (["--ray", "auto", "--pictures", "r.png"], "--pictures does not go with --ray"),
        (["--ray", "auto", "--track"], "--track does not go with --ray"),
        (["--ray", "auto", "--serve", "8000"], "--serve does not go with --ray"),
    ],
)
def test_options_that_make_no_sense(options, message, capsys):
    """Told before anything is looked at: there is no ``a.png``, and no cluster."""
    assert run(*options) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
