"""The loop of a run on workers that die, hang, refuse and lie, without any cluster."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorline.cluster import ClusterError
from anchorline.cluster.answering import answer
from anchorline.cluster.dispatching import Progress
from anchorline.cluster.job import WorkItem
from anchorline.cluster.merging import Copies
from anchorline.cluster.planning import make_items
from anchorline.cluster.replies import (
    Absent,
    Broken,
    Chunk,
    Dead,
    Done,
    NeedsModel,
    Ready,
    Refused,
    Reply,
)
from anchorline.cluster.tally import Tally
from anchorline.cluster.work_queue import WorkQueue
from anchorline.runtime.io.errors import DataError, SettingsError
from anchorline.runtime.video.paths import Item

READY = Ready("machine", 1, "cpu", "fp32")
Behaviour = Callable[[int, WorkItem], Sequence[Reply]]


def good(worker: int, item: WorkItem) -> list[Reply]:
    """Two frames of each file, in two pieces."""
    lines = "".join(f"{path}\n" for path in item.paths).encode()
    piece = Chunk(lines[: len(lines) // 2], len(item.paths), len(item.paths), {"decode": [0.1]})
    return [piece, Done(last=Chunk(lines[len(lines) // 2 :], len(item.paths), len(item.paths)))]


class Workers:
    """A fleet whose workers open as ``opening`` and answer as ``behave`` says, in any order."""

    def __init__(
        self,
        behave: Behaviour = good,
        opening: Callable[[int], Sequence[Reply]] = lambda worker: [READY],
        seed: int = 0,
    ) -> None:
        self.behave, self.opening = behave, opening
        self.random = random.Random(seed)
        self.started = 0
        self.alive: dict[int, Iterator[Reply]] = {}
        self.most_alive = 0
        self.shipped: list[Sequence[int]] = []
        self.pending: list[tuple[int, Reply]] = []

    def _say(self, worker: int) -> None:
        assert worker in self.alive
        assert all(number != worker for number, _ in self.pending), "one call at a time"
        reply = next(self.alive[worker], None)
        if reply is not None:  # else it hangs
            self.pending.append((worker, reply))

    def start(self) -> int:
        worker = self.started
        self.started += 1
        self.alive[worker] = iter(self.opening(worker))
        self.most_alive = max(self.most_alive, len(self.alive))
        self._say(worker)
        return worker

    def ship(self, worker: int, missing: Sequence[int]) -> None:
        self.shipped.append(missing)
        self._say(worker)

    def begin(self, worker: int, item: WorkItem) -> None:
        self.alive[worker] = iter(self.behave(worker, item))
        self._say(worker)

    def more(self, worker: int) -> None:
        self._say(worker)

    def wait(self, seconds: float) -> list[tuple[int, Reply]]:
        if not self.pending:
            return []
        return [self.pending.pop(self.random.randrange(len(self.pending)))]

    def end(self, worker: int) -> None:
        self.alive.pop(worker, None)
        self.pending = [each for each in self.pending if each[0] != worker]

    def close(self) -> None:
        for worker in list(self.alive):
            self.end(worker)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Forty files: their contents are not looked at here."""
    folder = tmp_path_factory.mktemp("many")
    paths = [folder / f"{index}.{'mp4' if index % 7 == 3 else 'png'}" for index in range(40)]
    for path in paths:
        path.touch()
    return [Item(path, path.suffix == ".mp4", None) for path in paths]


def answer_with(fleet, files, out, workers=2, group=4, tries=3, **settings):
    """The summary of a run over these files, and the files in the order of the output."""
    queue = WorkQueue(make_items(files, workers, group), tries)
    with Copies(files) as copies:
        summary = answer(fleet, queue, Tally(len(files)), copies, out, workers, **settings)
    return summary, [Path(line) for line in out.read_text().splitlines()]


@pytest.fixture
def run(many, tmp_path):
    """``run(fleet, count)``: ``answer_with`` the first of the forty files."""

    def start(fleet, count=10, *arguments, **settings):
        return answer_with(fleet, many[:count], tmp_path / "out.jsonl", *arguments, **settings)

    return start


def paths_of(files):
    return [file.path for file in files]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sets(st.integers(0, 30), max_size=5),
    st.sets(st.integers(0, 39), max_size=2),
    st.sampled_from([Dead("its process ended"), Broken("a bug")]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_whoever_dies_every_file_is_answered_once_or_given_up(
    many, tmp_path_factory, count, workers, group, calls, poison, end, is_late, seed
):
    """``calls`` fail by themselves, once; the files ``poison`` always."""
    begun = 0
    bad = {str(many[index].path) for index in poison if index < count}

    def behave(worker: int, item: WorkItem) -> list[Reply]:
        nonlocal begun
        begun += 1
        if begun - 1 in calls or bad & set(item.paths):
            return [*good(worker, item)[:is_late], end]
        return good(worker, item)

    fleet = Workers(behave, seed=seed)
    out = tmp_path_factory.mktemp("out") / "lines"
    summary, lines = answer_with(fleet, many[:count], out, workers, group)
    given_up = {line.split(": given up after 3 tries: ")[0] for line in summary.failed}
    assert bad <= given_up
    assert lines == [path for path in paths_of(many[:count]) if str(path) not in given_up]
    assert summary.answered + len(summary.failed) == summary.files == count
    assert summary.detect.frames == summary.detect.detections == 2 * len(lines)
    if not calls:
        assert bad == given_up
    assert fleet.most_alive <= workers
    assert not fleet.alive
    assert list(out.parent.iterdir()) == [out]


def test_an_item_that_always_kills_is_one_clear_line(run, many):
    bad = str(many[1].path)

    def behave(worker, item):
        return [Dead("its process ended")] if bad in item.paths else good(worker, item)

    fleet = Workers(behave)
    summary, lines = run(fleet)
    (line,) = summary.failed
    assert line == (
        f"{bad}: given up after 3 tries: the worker on machine (process 1) died: its process ended"
    )
    assert lines == [path for path in paths_of(many[:10]) if str(path) != bad]
    assert summary.to_json()["failed"] == [line]
    assert summary.retries == 2  # the group, and the file alone
    assert fleet.started == 2 + 3


def test_a_model_that_is_sent(run):
    fleet = Workers(opening=lambda worker: [NeedsModel((0, 2)), READY])
    assert len(run(fleet)[1]) == 10
    assert fleet.shipped == [(0, 2), (0, 2)]


def test_a_machine_that_refuses_takes_no_part(run):
    fleet = Workers(
        opening=lambda worker: [Refused("old", "SettingsError", "another version") if worker == 0 else READY]
    )
    summary, lines = run(fleet)
    assert len(lines) == 10
    assert summary.warnings == ("not used: old: another version",)
    assert fleet.started == 2


@pytest.mark.parametrize(
    ("kind", "error"), [("SettingsError", SettingsError), ("ClusterError", ClusterError)]
)
def test_if_all_refuse_the_first_reason_is_the_error(run, tmp_path, kind, error):
    with pytest.raises(error, match="old: no such provider"):
        run(Workers(opening=lambda worker: [Refused("old", kind, "no such provider")]))
    assert list(tmp_path.iterdir()) == []


def test_workers_that_never_start(run):
    fleet = Workers(opening=lambda worker: [Dead("its process ended")])
    with pytest.raises(ClusterError, match="a worker cannot be started: its process ended"):
        run(fleet)
    assert fleet.started == 6  # two places, three tries each


def test_a_worker_that_starts_at_the_second_try(run):
    fleet = Workers(opening=lambda worker: [Dead("") if worker < 2 else READY])
    assert len(run(fleet)[1]) == 10


def test_nothing_survives(run, many):
    fleet = Workers(lambda worker, item: [Dead("out of memory")])
    with pytest.raises(ClusterError, match=r"the first 12 tries have all failed, .*: out of memory"):
        run(fleet, 40)
    assert fleet.started == 13


def test_a_machine_that_does_not_see_the_files(run, many):
    def behave(worker, item):
        return [Absent("a.png: not on blind")] if worker == 0 else good(worker, item)

    summary, lines = run(Workers(behave))
    assert lines == paths_of(many[:10])
    assert summary.warnings == ("not used: a.png: not on blind",)
    assert summary.retries == 0
    with pytest.raises(DataError, match=r"a\.png: not on blind"):
        run(Workers(lambda worker, item: [Absent("a.png: not on blind")]))


def test_a_file_that_changes_is_tried_again(run, tmp_path):
    path = tmp_path / "growing.png"
    path.touch()

    def behave(worker, item):
        if item.sizes == (0,):
            path.write_bytes(b"more")
            return [Absent("of another size")]
        return good(worker, item)

    fleet = Workers(behave)
    with Copies([]) as copies:
        queue = WorkQueue([WorkItem(0, (str(path),), False)], 3)
        summary = answer(fleet, queue, Tally(1), copies, None, 1)
    assert (summary.answered, summary.retries, summary.warnings, fleet.started) == (1, 1, (), 1)


def test_a_worker_that_says_nothing_counts_as_dead(run, many):
    fleet = Workers(lambda worker, item: [] if worker == 0 else good(worker, item))
    summary, lines = run(fleet, silence=0.05)
    assert lines == paths_of(many[:10])
    assert summary.retries == 1
    assert not fleet.alive


def test_an_interrupt_keeps_what_was_answered(run, many, tmp_path):
    told = []

    def behave(worker, item):
        if item.first >= 6:
            raise KeyboardInterrupt
        return good(worker, item)

    fleet = Workers(behave)
    with pytest.raises(KeyboardInterrupt):
        run(fleet, 20, 1, 1, conclude=told.append)
    assert [Path(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == paths_of(many[:6])
    (summary,) = told
    assert (summary.answered, summary.files, summary.failed) == (6, 20, ())
    assert not fleet.alive
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_nothing_readable_is_the_error_of_the_local_run(run, tmp_path):
    def behave(worker, item):
        line = f"{item.first}: cannot be decoded"
        return [Done(warnings=(line,), unreadable=line)]

    with pytest.raises(DataError, match=r"^0: cannot be decoded$"):
        run(Workers(behave))
    assert list(tmp_path.iterdir()) == []


def test_machines_that_compute_differently_are_told(run):
    fleet = Workers(opening=lambda worker: [Ready(f"m{worker}", worker, ("cpu", "cuda")[worker], "fp32")])
    summary, _ = run(fleet)
    assert "m0: cpu fp32, m1: cuda fp32" in summary.warnings[0]
    assert summary.detect.provider == "cpu, cuda"
    assert sum(node["files"] for node in summary.nodes.values()) == 10


def test_progress_and_the_closing_tables(run):
    from rich.console import Console

    seen: list[Progress] = []
    summary, _ = run(Workers(), 40, progress=seen.append)
    assert seen[-1].answered == seen[-1].files == 40
    assert [each.node for each in seen[-1].workers] == ["machine", "machine"]
    assert [each.answered for each in seen] == sorted(each.answered for each in seen)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary.render())
    assert "40 of 40 files answered, 0 failed, 0 tried again" in console.export_text()


def test_the_display_writes_to_stderr_only(capfd):
    from anchorline.cluster.display import _state, progress_display

    with progress_display() as show:
        show(Progress(4, 1, 0, 3, 0, ()))
    assert capfd.readouterr().out == ""
    assert _state(Progress(4, 1, 0, 3, 0, ())) == "waiting for workers"
