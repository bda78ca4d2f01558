"""What provider auto measures: who wins, what is remembered, and when nothing is measured at all.

The ways to run a model are played by doubles whose runs take as long as the test says, by a clock of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
import pytest

from anchorline.runtime.backends import choice as choosing
from anchorline.runtime.backends.choice import Way, compare, open_quickest
from anchorline.runtime.backends.cpu_options import CpuOptions, usable_cores
from anchorline.runtime.canvas import held_to
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import ArtefactError, SettingsError
from anchorline.runtime.model_file import read_onnx
from anchorline.runtime.video.options import DetectOptions

fcntl = pytest.importorskip("fcntl")  # Windows measures without waiting for others

BOTH = ("openvino", "cpu")
FRAME = np.zeros((4, 4, 3), np.uint8)
DAY = 86_400.0


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """A cache of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(choosing, "_said", set())
    return folder / "anchorline" / "choices"


class Machine:
    """A clock, and ways whose runs move it: ``seconds`` by provider, or by provider and threads.

    A number is what each run takes, of several numbers one run after the other takes each, and the last one
    all that follow; an error is raised when the way is opened.
    """

    def __init__(self, seconds: dict[object, float | Iterable[float] | Exception]) -> None:
        self.now, self.begun = 0.0, 1.8e9
        self.opened: list[Way] = []
        self.open: set[Way] = set()
        self.most_open = 0
        self.runs: dict[Way, int] = {}
        self._seconds = seconds
        self._left: dict[Way, Iterable[float]] = {}

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return self.begun + self.now

    def sleep(self, seconds: float, /) -> None:
        self.now += seconds

    def open_way(self, way: Way) -> Backend:
        self.opened.append(way)
        stated = self._seconds.get((way.provider, way.threads), self._seconds.get(way.provider))
        if isinstance(stated, Exception):
            raise stated
        listed = [stated] if isinstance(stated, float) else list(stated)
        self._left[way] = itertools.chain(listed, itertools.repeat(listed[-1]))
        self.runs[way] = 0
        self.open.add(way)
        self.most_open = max(self.most_open, len(self.open))
        return Backend(self, way)

    def run(self, way: Way) -> None:
        self.runs[way] += 1
        self.now += next(self._left[way])


class Backend:
    """A double of a backend, and of its lanes, which compute when their results are collected."""

    precision = "fp32"

    def __init__(self, machine: Machine, way: Way) -> None:
        self.machine, self.way, self.lanes = machine, way, 0

    def create_lane(self) -> Backend:
        self.lanes += 1
        return self

    def submit(self, frames: list[np.ndarray]) -> None:
        assert [frame.dtype for frame in frames] == [np.uint8]

    def collect(self) -> None:
        self.machine.run(self.way)

    def close(self) -> None:
        if self.lanes:
            self.lanes -= 1
        else:
            self.machine.open.remove(self.way)


def contest(machine: Machine, cpu: CpuOptions | None = None, providers: tuple[str, ...] = BOTH):
    cpu = cpu or CpuOptions(threads=2)
    facts = {"model": "0" * 64, "canvas": "4x4", "providers": ", ".join(providers)}
    in_flight = 2 if cpu.tuning == "throughput" else 1
    return compare(facts, cpu, providers, machine.open_way, FRAME, in_flight, machine)


@pytest.mark.parametrize(
    ("openvino", "cpu", "winner"),
    [
        (0.040, 0.030, "cpu"),
        (0.030, 0.040, "openvino"),
        (0.040, 0.039, "openvino"),  # within 5 %: the assumed order
        (0.040, 0.037, "cpu"),
        (0.0004, 0.0003, "cpu"),
        (2.0, 1.5, "cpu"),
    ],
)
def test_the_quicker_one_wins_by_more_than_five_percent(openvino, cpu, winner):
    machine = Machine({"openvino": openvino, "cpu": cpu})
    backend, choice = contest(machine)
    assert choice.way == backend.way == Way(winner, 2)
    assert {figure.provider: figure.seconds for figure in choice.figures} == pytest.approx(
        {"openvino": openvino, "cpu": cpu}
    )
    assert choice.figures[0].provider == winner
    assert machine.open == {backend.way}, "the loser is closed, the winner open"
    assert backend.lanes == 0, "nothing is left of the trial"


def test_both_run_by_turns_so_that_a_load_slows_both():
    """Half of the time everything takes three times as long; one after the other would find the wrong one."""
    order = []

    class Busy(Machine):
        def run(self, way: Way) -> None:
            order.append(way.provider)
            super().run(way)
            if self.now % 0.8 > 0.4:
                self.now += 2 * {"openvino": 0.04, "cpu": 0.03}[way.provider]

    _, choice = contest(Busy({"openvino": 0.04, "cpu": 0.03}))
    assert choice.provider == "cpu"
    turns = order[2:]
    assert len(turns) >= 10
    assert all(set(pair) == set(BOTH) for pair in zip(turns[::2], turns[1::2], strict=True))
    assert {tuple(pair) for pair in zip(turns[::2], turns[1::2], strict=True)} == {BOTH, BOTH[::-1]}


def test_a_moment_of_luck_decides_nothing():
    """The quickest turn of all is the challenger's, but usually it is the slower one."""
    _, choice = contest(Machine({"openvino": 0.04, "cpu": [0.05, 0.05, 0.03, 0.05]}))
    assert choice.provider == "openvino"
    assert choice.doubtful


@pytest.mark.parametrize(("seconds", "longest"), [(0.0001, 2.0), (0.04, 2.0), (0.7, 4.5), (1.5, 6.5)])
def test_it_takes_two_seconds_or_a_first_run_and_a_turn_each(seconds, longest):
    machine = Machine({"openvino": seconds, "cpu": seconds})
    _, choice = contest(machine)
    assert machine.now <= longest
    assert choice.took == pytest.approx(machine.now)
    assert all(figure.turns >= 1 for figure in choice.figures)


def test_a_first_run_beyond_three_seconds_ends_it():
    machine = Machine({"openvino": 3.5, "cpu": 1.0})
    _, choice = contest(machine)
    assert (choice.provider, choice.doubtful) == ("openvino", True)
    assert machine.opened == [Way("openvino", 2)]
    assert machine.now == pytest.approx(3.5)


def test_one_that_is_too_slow_falls_out_after_its_first_run():
    machine = Machine({"openvino": 0.1, "cpu": [3.5, 0.01]})
    backend, choice = contest(machine)
    assert choice.provider == "openvino"
    assert machine.runs[Way("cpu", 2)] == 1
    assert machine.open == {backend.way}


def test_what_cannot_be_opened_or_run_falls_out():
    for failing in (ArtefactError("no conversion rule"), FailingRun()):
        machine = Machine({"openvino": failing if isinstance(failing, ArtefactError) else 0.1, "cpu": 0.1})
        if isinstance(failing, FailingRun):
            machine.run = failing.of(machine)
        backend, choice = contest(machine)
        assert choice.provider == "cpu"
        assert "no conversion rule" in choice.refused["openvino"]
        assert choice.doubtful, "it may have been for memory: tried again another day"
        assert machine.open == {backend.way}


class FailingRun:
    """OpenVINO opens, and fails at the first frame."""

    def of(self, machine: Machine) -> Callable[[Way], None]:
        run = machine.run

        def failing(way: Way) -> None:
            if way.provider == "openvino":
                raise ArtefactError("no conversion rule")
            run(way)

        return failing


def test_where_none_runs_the_last_error_is_raised():
    machine = Machine({"openvino": ArtefactError("first"), "cpu": ArtefactError("second")})
    with pytest.raises(ArtefactError, match="second"):
        contest(machine)


def test_an_interrupt_leaves_nothing_open():
    class Interrupted(Machine):
        def run(self, way: Way) -> None:
            if self.now > 0.5:
                raise KeyboardInterrupt
            super().run(way)

    machine = Interrupted({"openvino": 0.04, "cpu": 0.04})
    with pytest.raises(KeyboardInterrupt):
        contest(machine)
    assert machine.open == set()


@pytest.mark.parametrize(
    ("counts", "seconds", "expected", "tried"),
    [
        ((2,), {2: 0.04}, 2, [2]),
        ((1, 2), {1: 0.04, 2: 0.03}, 2, [1, 2]),  # two hardware threads of one core
        ((4, 8), {4: 0.04, 8: 0.04}, 4, [4, 8]),
        ((16,), {16: 0.04, 8: 0.03, 4: 0.05}, 8, [16, 8, 4]),
        ((64, 128), {64: 0.04, 128: 0.05, 32: 0.05}, 64, [64, 128, 32]),
        ((64, 128), {64: 0.05, 128: 0.04}, 128, [64, 128]),
    ],
)
def test_threads_are_tried_on_the_provider_that_won(monkeypatch, counts, seconds, expected, tried):
    monkeypatch.setattr(choosing, "thread_counts", lambda: counts)
    machine = Machine(
        {"openvino": 1.0, **{("cpu", count): float(time) for count, time in seconds.items()}},
    )
    _, choice = contest(machine, CpuOptions())
    assert choice.way == Way("cpu", expected)
    assert machine.opened == [Way("openvino", counts[0]), *(Way("cpu", count) for count in tried)]
    assert machine.most_open == 2, "two networks at most are in memory at a time"


def test_threads_that_are_asked_for_are_kept(monkeypatch):
    monkeypatch.setattr(choosing, "thread_counts", lambda: (16, 32))
    machine = Machine({"openvino": 0.04, "cpu": 0.03})
    contest(machine, CpuOptions(threads=16))
    assert machine.opened == [Way("openvino", 16), Way("cpu", 16)]


def test_throughput_is_measured_with_two_batches_at_once():
    backends = []

    class Watched(Machine):
        def open_way(self, way: Way) -> Backend:
            backends.append(super().open_way(way))
            return backends[-1]

        def run(self, way: Way) -> None:
            assert [each.lanes for each in backends if each.way in self.open][-1] == 2
            super().run(way)

    _, choice = contest(Watched({"openvino": 0.04, "cpu": 0.03}), CpuOptions(threads=2, tuning="throughput"))
    assert choice.figures[0].seconds == pytest.approx(0.03), "seconds a frame, not a pair"


@pytest.mark.parametrize(
    ("seconds", "doubtful"),
    [
        ({"openvino": 0.04, "cpu": 0.03}, False),
        ({"openvino": [0.04, 0.04] + 50 * [0.06], "cpu": 0.03}, True),  # unsteady, and not far apart
        ({"openvino": [0.4] + [0.2, 0.3, 0.4] * 9, "cpu": 0.03}, False),  # far behind, however unsteady
        ({"openvino": 0.7, "cpu": 0.6}, True),  # one or two turns
    ],
)
def test_few_or_unsteady_turns_are_doubted(seconds, doubtful):
    assert contest(Machine(seconds))[1].doubtful is doubtful


def quickest(machine: Machine, path: Path, cpu: CpuOptions | None = None, canvas=None, providers=BOTH):
    model = read_onnx(path)
    contract = held_to(model.contract, canvas, None)
    return open_quickest(
        model, contract, cpu or CpuOptions(threads=2), providers, machine.open_way, clock=machine
    )


def test_the_second_opening_takes_what_the_first_has_found(model_path, cache, caplog):
    first = Machine({"openvino": 0.04, "cpu": 0.03})
    backend, _ = quickest(first, model_path)
    assert backend.way == Way("cpu", 2)
    (told,) = caplog.messages
    assert "auto takes cpu, fp32, 2 threads: 30 ms a frame (openvino, fp32, 2 threads: 40 ms)" in told
    (kept,) = cache.iterdir()
    assert str(kept) in told
    second = Machine({"openvino": 0.04, "cpu": 0.03})
    second.begun += 365 * DAY
    backend, _ = quickest(second, model_path)
    assert backend.way == Way("cpu", 2)
    assert (second.opened, second.now) == ([Way("cpu", 2)], 0.0), "neither measured nor opened twice"
    assert len(caplog.messages) == 1


def test_what_is_doubted_is_measured_again_after_a_day(model_path):
    quickest(Machine({"openvino": 0.8, "cpu": 0.7}), model_path)
    for later, measured in ((DAY / 2, False), (2 * DAY, True), (0.0, True)):  # the last: a clock set back
        machine = Machine({"openvino": 0.8, "cpu": 0.7})
        machine.begun += later
        quickest(machine, model_path)
        assert (machine.now > 0) is measured


@pytest.mark.parametrize(
    "change", ["threads", "tuning", "precision", "canvas", "processor", "version", "providers", "model"]
)
def test_another_question_has_another_answer(change, tmp_path, write_model, contract, monkeypatch):
    path = write_model(tmp_path / "a.onnx", dataclasses.replace(contract, canvas=None))
    quickest(Machine({"openvino": 0.04, "cpu": 0.03}), path)
    cpu, canvas, providers = CpuOptions(threads=2), None, BOTH
    if change in ("threads", "tuning", "precision"):
        cpu = dataclasses.replace(
            cpu, **{change: {"threads": 3, "tuning": "throughput", "precision": "fp32"}[change]}
        )
    elif change == "canvas":
        canvas = (64, 96)
    elif change == "processor":
        monkeypatch.setattr(choosing, "cpu_facts", lambda: {"model name": "another", "flags": "avx2"})
    elif change == "version":
        monkeypatch.setattr(choosing, "version", lambda name: "9.9")
    elif change == "providers":
        providers = BOTH[::-1]
    else:
        path = write_model(tmp_path / "b.onnx", dataclasses.replace(contract, canvas=None, names=("a", "b")))
    machine = Machine({"openvino": 0.04, "cpu": 0.03})
    quickest(machine, path, cpu, canvas, providers)
    assert len(machine.opened) == 2
    quickest(again := Machine({"openvino": 0.04, "cpu": 0.03}), path, cpu, canvas, providers)
    assert len(again.opened) == 1


@pytest.mark.parametrize(
    "damage", ["cut", "no json", "empty", "foreign", "other type", "no figures", "folder"]
)
def test_a_damaged_answer_is_measured_again_and_told_once(damage, model_path, cache, caplog):
    quickest(Machine({"openvino": 0.04, "cpu": 0.03}), model_path)
    (kept,) = cache.iterdir()
    stated = json.loads(kept.read_text())
    changed = {
        "cut": kept.read_text()[:-20],
        "no json": "\xff",
        "empty": "",
        "foreign": json.dumps({**stated, "provider": "cuda"}),
        "other type": json.dumps({**stated, "threads": 10**9}),
        "no figures": json.dumps({**stated, "figures": []}),
    }
    if damage == "folder":
        kept.unlink()
        kept.mkdir()
    else:
        kept.write_text(changed[damage])
    caplog.clear()
    for expected in (2, 2 if damage == "folder" else 1):
        machine = Machine({"openvino": 0.04, "cpu": 0.03})
        assert quickest(machine, model_path)[0].way == Way("cpu", 2)
        assert len(machine.opened) == expected
    assert len([message for message in caplog.messages if "is damaged" in message]) == 1


def test_what_cannot_be_kept_is_not_measured(model_path, tmp_path, monkeypatch, caplog):
    """Else each start of a program would take seconds longer, and choose anew."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    machine = Machine({"openvino": 0.04, "cpu": 0.03})
    with caplog.at_level(logging.INFO):
        assert quickest(machine, model_path)[0].way == Way("openvino", 2)
    assert machine.now == 0
    assert "measures nothing, for the answer cannot be kept" in caplog.text


def test_one_process_measures_at_a_time(model_path, cache):
    """Who waits takes the other's answer, or after half a minute the assumed order."""
    cache.mkdir(parents=True)
    other = os.open(cache, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    machine = Machine({"openvino": 0.04, "cpu": 0.03})
    assert quickest(machine, model_path)[0].way == Way("openvino", 2)
    assert 30 <= machine.now < 31
    assert machine.runs == {Way("openvino", 2): 0}

    class Waiting(Machine):
        def sleep(self, seconds: float, /) -> None:
            if self.now == 0:  # meanwhile the other one has answered
                fcntl.flock(other, fcntl.LOCK_UN)
                quickest(Machine({"openvino": 0.04, "cpu": 0.03}), model_path)
            super().sleep(seconds)

    fcntl.flock(other, fcntl.LOCK_EX)
    waiting = Waiting({"openvino": 0.04, "cpu": 0.03})
    assert quickest(waiting, model_path)[0].way == Way("cpu", 2)
    assert waiting.opened == [Way("cpu", 2)]
    os.close(other)


def test_an_answer_that_does_not_open_any_more_gives_way(model_path):
    quickest(Machine({"openvino": 0.04, "cpu": 0.03}), model_path)
    machine = Machine({"openvino": 0.04, "cpu": ArtefactError("gone")})
    backend, refused = quickest(machine, model_path)
    assert backend.way == Way("openvino", 2)
    assert refused == {"cpu": "gone"}


def test_where_there_is_nothing_to_choose_nothing_is_measured(model_path, cache):
    machine = Machine({"cpu": 0.03})
    assert quickest(machine, model_path, providers=("cpu",))[0].way == Way("cpu", 2)
    assert (machine.now, cache.exists()) == (0.0, False)


@pytest.fixture
def two_counts(monkeypatch) -> None:
    """A choice without OpenVINO: onnxruntime with one thread, or with two."""
    monkeypatch.setattr(choosing, "thread_counts", lambda: (1, 2))


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("canvas", [None, (48, 64)])
def test_a_detector_measures_when_it_is_opened_and_only_once(
    tmp_path, write_model, contract, cache, two_counts, monkeypatch, dtype, canvas
):
    promised = dataclasses.replace(contract, canvas=canvas, input_dtype=dtype)
    path = write_model(tmp_path / "a.onnx", promised)
    frame = np.full((48, 64, 3), 255, np.uint8)
    with Detector(path, "cpu") as plain, Detector(path, measure=True) as detector:
        assert detector.contract == plain.contract
        assert detector(frame).scores.tolist() == plain(frame).scores.tolist()
        found = detector.provider, detector.threads
    (kept,) = cache.iterdir()
    stated = json.loads(kept.read_text())
    assert (stated["provider"], stated["threads"]) == found
    assert {figure["threads"] for figure in stated["figures"]} == {1, 2}
    assert all(figure["turns"] >= 1 and 0 < figure["seconds"] < 10 for figure in stated["figures"])
    monkeypatch.setattr(choosing, "compare", None)
    with Detector(path, measure=True) as detector:
        assert (detector.provider, detector.threads) == found


def test_the_choice_is_that_of_the_canvas_it_runs_on(tmp_path, write_model, contract, cache, two_counts):
    path = write_model(tmp_path / "a.onnx", dataclasses.replace(contract, canvas=None))
    for canvas in (None, (96, 64)):
        with Detector(path, measure=True, canvas=canvas) as detector:
            assert detector.contract.canvas == canvas
            assert len(detector(np.full((48, 64, 3), 255, np.uint8))) == 2
    canvases = {json.loads(each.read_text())["facts"]["canvas"] for each in cache.iterdir()}
    assert canvases == {"608x800", "96x64"}


def test_it_is_off_by_argument_and_by_the_environment(model_path, cache, two_counts, monkeypatch):
    for variable, argument, measured in (("1", False, False), ("0", None, False), ("0", True, True)):
        monkeypatch.setenv("ANCHORLINE_MEASURE", variable)
        Detector(model_path, measure=argument).close()
        assert cache.exists() is measured
    monkeypatch.setattr(choosing, "compare", None)
    Detector(model_path, "cpu", measure=True).close()  # one that is named is taken


def test_it_is_an_option_of_detect_and_bench(model_path, picture, tmp_path, cache, two_counts, monkeypatch):
    from anchorline import cli
    from anchorline.bench import bench, work

    cv2.imwrite(str(tmp_path / "a.png"), picture)
    verbs = {
        "detect": ["detect", str(tmp_path / "a.png"), "--model", str(model_path)],
        "bench": ["bench", str(model_path), "--batches", "1", "--warmup", "0"],
    }
    monkeypatch.setattr(bench, "_measure", work.measure)  # in this process, where the counts are two
    for verb, arguments in verbs.items():
        for variable, option, measured in (("1", "--no-measure", False), ("0", "--measure", True)):
            monkeypatch.setenv("ANCHORLINE_MEASURE", variable)
            shutil.rmtree(cache, ignore_errors=True)
            assert cli.main([*arguments, option]) == 0
            assert cache.exists() is measured, (verb, option)


def test_an_answer_says_how_many_threads_there_are(model_path, two_counts, monkeypatch):
    """Also to whoever reports them."""
    for count in (1, 2):
        monkeypatch.setattr(choosing, "recall", lambda facts, now, count=count: answer(facts, count))
        with Detector(model_path, measure=True) as detector:
            assert detector.threads == count
    with Detector(model_path, "cpu") as detector:
        assert detector.threads == usable_cores()


def answer(facts: dict[str, str], threads: int) -> choosing.Choice:
    figure = choosing.Figure("cpu", threads, "fp32", 9, 0.01, 0.0)
    return choosing.Choice(facts, "cpu", threads, (figure,), {}, False, 0.0, 1.0)


@pytest.mark.parametrize("value", ["yes", "2", "off"])
def test_another_word_in_the_environment_is_refused(model_path, monkeypatch, value):
    monkeypatch.setenv("ANCHORLINE_MEASURE", value)
    with pytest.raises(SettingsError, match=f"ANCHORLINE_MEASURE is '{value}'; expected 1 or 0"):
        Detector(model_path)


@pytest.mark.parametrize("value", ["yes", 1, 0.0])
def test_another_kind_of_argument_is_refused(model_path, value):
    with pytest.raises(SettingsError, match="measure is"):
        Detector(model_path, measure=value)
    with pytest.raises(SettingsError, match="measure is"):
        DetectOptions(measure=value)


def test_figures_that_are_compared_never_depend_on_it(model_path, cache, two_counts, monkeypatch):
    from anchorline.artefacts import open_detector

    monkeypatch.setenv("ANCHORLINE_MEASURE", "1")
    with open_detector(model_path) as detector:
        assert (detector.provider, detector.precision) == ("cpu", "fp32")
    assert not cache.exists()
