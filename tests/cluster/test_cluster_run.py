"""A run on workers that die, hang, refuse and lie, with a stand-in for Ray."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorline.cluster import ClusterError, Progress, WorkerState, detect_on_cluster
from anchorline.cluster import run as cluster_run
from anchorline.cluster.worker import NotHere, Piece, WorkItem
from anchorline.runtime import DetectOptions
from anchorline.runtime.io.errors import DataError, SettingsError

READY = WorkerState("machine", 1, "cpu", "fp32")


class RayError(Exception):
    """As Ray tells of dead workers."""


class RayTaskError(RayError):
    """As Ray tells of what a worker has raised."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"a page about {cause}")
        self.cause = cause


DEAD = RayError("The actor is dead because its worker process has died.")
OUT_OF_MEMORY = RayError("the node running low on memory")
HANGS = object()
Behaviour = Callable[[int, WorkItem], Sequence[Any]]


def good(worker: int, item: WorkItem) -> list[Any]:
    """Two frames of each file, in two pieces."""
    lines = bytearray("".join(f"{path}\n" for path in item.paths).encode())
    half, count = len(lines) // 2, len(item.paths)
    times = [{"decode": 0.1}] * count
    return [Piece(lines[:half], times, count), Piece(lines[half:], times, count)]


class Call:
    """What a call gives, one after the other: values, errors to raise, ``HANGS``."""

    def __init__(self, gives: Sequence[Any]) -> None:
        self.gives = list(gives)

    def __next__(self) -> Any:
        if not self.gives:
            raise StopIteration
        return Call([self.gives.pop(0)])


class Ray:
    """The part of Ray that is used, with workers that open as ``opening`` and answer as ``behave`` says.

    Calls are answered in any order.
    """

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(
        self,
        behave: Behaviour = good,
        opening: Callable[[int, int], Any] = lambda worker, contents: READY,
        seed: int = 0,
    ) -> None:
        self.behave, self.opening = behave, opening
        self.random = random.Random(seed)
        self.cores = 1
        self.started = self.most_alive = 0
        self.alive: set[int] = set()
        self.put_there: list[int] = []
        self.now = 0.0  # seconds, which pass while nothing comes

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": float(self.cores)}}]

    def check(self) -> None:
        """The cluster is there."""

    def remote(self, worker_type: type) -> Ray:
        actor = SimpleNamespace(remote=self._start)
        return SimpleNamespace(options=lambda **options: actor)  # type: ignore[return-value]

    def _start(self, job: object) -> Any:
        number = self.started
        self.started += 1
        self.alive.add(number)
        self.most_alive = max(self.most_alive, len(self.alive))
        answer = SimpleNamespace(remote=lambda item: Call(self.behave(number, item)))
        return SimpleNamespace(
            number=number,
            open=SimpleNamespace(remote=lambda *contents: Call([self.opening(number, len(contents))])),
            answer=SimpleNamespace(options=lambda **options: self._check_bounded(options) or answer),
        )

    def _check_bounded(self, options: dict[str, Any]) -> None:
        """Pieces that nobody takes stop their worker, so that they do not gather in its memory."""
        assert options == {"num_returns": "streaming", "_generator_backpressure_num_objects": 2}

    def wait(self, calls: list[Call], *, num_returns: int, timeout: float) -> tuple[list[Call], list[Call]]:
        there = [call for call in calls if HANGS not in call.gives[:1]]
        if not there:
            self.now += timeout
            return [], calls
        return [self.random.choice(there)], []

    def get(self, call: Any) -> Any:
        (given,) = call.gives
        if isinstance(given, BaseException):
            raise given
        return given

    def put(self, content: Any) -> int:
        self.put_there.append(len(content))
        return len(content)

    def kill(self, actor: Any) -> None:
        self.alive.remove(actor.number)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Forty files: their contents are not looked at here."""
    folder = tmp_path_factory.mktemp("many")
    paths = [folder / f"{index}.{'mp4' if index % 7 == 3 else 'png'}" for index in range(40)]
    for path in paths:
        path.touch()
    return paths


@pytest.fixture(scope="module")
def detected(model):
    """``detected(ray, paths, out)``: the summary, and the files in the order of the output."""

    def run(ray: Ray, paths: Sequence[Path], out: Path, workers: int = 2, group: int = 4, **settings):
        @contextlib.contextmanager
        def connected(address: str) -> Iterator[Ray]:
            ray.cores = workers
            yield ray

        options = DetectOptions(provider="cpu", threads=1, jsonl=out)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cluster_run, "check_address", lambda address: None)
            patch.setattr(cluster_run, "connected", connected)
            patch.setattr(cluster_run, "Pulse", lambda ray: SimpleNamespace(check=ray.check))
            patch.setattr(cluster_run, "time", SimpleNamespace(monotonic=lambda: ray.now))
            summary = detect_on_cluster(paths, model, options, images_per_item=group, **settings)
        return summary, [Path(line) for line in out.read_text().splitlines()]

    return run


@pytest.fixture
def run(many, detected, tmp_path):
    """``run(ray, count)``: the first of the forty files."""

    def start(ray, count=10, *arguments, **settings):
        return detected(ray, many[:count], tmp_path / "out.jsonl", *arguments, **settings)

    return start


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sets(st.integers(0, 30), max_size=5),
    st.sets(st.integers(0, 39), max_size=2),
    st.sampled_from([DEAD, RayTaskError(RuntimeError("a bug"))]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_whoever_dies_every_file_is_answered_once_or_given_up(
    many, detected, tmp_path_factory, count, workers, group, calls, poison, end, is_late, seed
):
    """``calls`` fail by themselves, once; the files ``poison`` always."""
    begun = itertools.count()
    bad = {str(many[index]) for index in poison if index < count}

    def behave(worker: int, item: WorkItem) -> list[Any]:
        if next(begun) in calls or bad & set(item.paths):
            return [*good(worker, item)[:is_late], end]
        return good(worker, item)

    ray = Ray(behave, seed=seed)
    out = tmp_path_factory.mktemp("out") / "lines"
    summary, lines = detected(ray, many[:count], out, workers, group)
    given_up = {line.split(": given up after 3 tries: ")[0] for line in summary.failed}
    assert bad <= given_up
    assert lines == [path for path in many[:count] if str(path) not in given_up]
    assert summary.answered + len(summary.failed) == summary.files == count
    assert summary.detect.frames == summary.detect.detections == 2 * len(lines)
    if not calls:
        assert bad == given_up
    assert ray.most_alive <= workers
    assert not ray.alive
    assert list(out.parent.iterdir()) == [out]


def test_an_item_that_always_kills_is_one_clear_line(run, many):
    bad = str(many[1])
    ray = Ray(lambda worker, item: [DEAD] if bad in item.paths else good(worker, item))
    summary, lines = run(ray)
    (line,) = summary.failed
    assert line == (
        f"{bad}: given up after 3 tries: the worker on machine (process 1) died: its process ended"
    )
    assert lines == [path for path in many[:10] if str(path) != bad]
    assert summary.to_json()["failed"] == [line]
    assert summary.retries == 2  # the group, and the file alone
    assert ray.started == 2 + 3


def test_what_a_worker_raises_is_told(run, many):
    ray = Ray(lambda worker, item: [RayTaskError(RuntimeError("two\nlines"))])
    with pytest.raises(
        ClusterError, match=r"RuntimeError: two lines \(the worker on machine \(process 1\)\)$"
    ):
        run(ray, 40)


def test_a_model_that_is_sent(run, model):
    ray = Ray(opening=lambda worker, contents: READY if contents else None)
    assert len(run(ray)[1]) == 10
    assert ray.put_there == [model.stat().st_size]  # once, for both


def test_a_machine_that_refuses_takes_no_part(run):
    refusal = RayTaskError(SettingsError("old: another version"))
    ray = Ray(opening=lambda worker, contents: refusal if worker == 0 else READY)
    summary, lines = run(ray)
    assert len(lines) == 10
    assert summary.warnings == ("not used: old: another version",)
    assert ray.started == 2


@pytest.mark.parametrize("error", [SettingsError, ClusterError])
def test_if_all_refuse_the_first_reason_is_the_error(run, tmp_path, error):
    with pytest.raises(error, match="old: no such provider"):
        run(Ray(opening=lambda worker, contents: RayTaskError(error("old: no such provider"))))
    assert list(tmp_path.iterdir()) == []


def test_workers_that_never_start(run):
    ray = Ray(opening=lambda worker, contents: DEAD)
    with pytest.raises(ClusterError, match="a worker cannot be started: its process ended"):
        run(ray)
    assert ray.started == 6  # two places, three tries each


def test_a_worker_that_starts_at_the_second_try(run):
    ray = Ray(opening=lambda worker, contents: DEAD if worker < 2 else READY)
    assert len(run(ray)[1]) == 10


def test_nothing_survives(run):
    ray = Ray(lambda worker, item: [OUT_OF_MEMORY])
    with pytest.raises(ClusterError, match=r"the first 12 tries have all failed, .*: out of memory"):
        run(ray, 40)
    assert not ray.alive


def test_a_machine_that_does_not_see_the_files(run, many):
    blind = RayTaskError(NotHere("a.png: not on blind"))
    summary, lines = run(Ray(lambda worker, item: [blind] if worker == 0 else good(worker, item)))
    assert lines == many[:10]
    assert summary.warnings == ("not used: a.png: not on blind",)
    assert summary.retries == 0
    with pytest.raises(DataError, match=r"a\.png: not on blind"):
        run(Ray(lambda worker, item: [blind]))


def test_a_file_that_changes_is_tried_again(detected, tmp_path):
    path = tmp_path / "growing.png"
    path.touch()

    def behave(worker: int, item: WorkItem) -> list[Any]:
        if item.sizes == (0,):
            path.write_bytes(b"more")
            return [RayTaskError(NotHere("of another size"))]
        return good(worker, item)

    summary, _ = detected(Ray(behave), [path], tmp_path / "out.jsonl", 1)
    assert (summary.answered, summary.retries, summary.warnings) == (1, 1, ())


def test_a_file_that_has_gone_is_answered_alone(detected, tmp_path):
    paths = [tmp_path / f"{index}.png" for index in range(12)]
    for path in paths:
        path.touch()
    seen: list[WorkItem] = []

    def behave(worker: int, item: WorkItem) -> list[Any]:
        paths[9].unlink(missing_ok=True)  # while others are worked on
        seen.append(item)
        return good(worker, item)

    detected(Ray(behave), paths, tmp_path / "out.jsonl", 1, 3)
    assert [item.sizes for item in seen] == [(0, 0, 0)] * 3 + [(None,), (0,), (0,)]


def test_a_worker_that_says_nothing_counts_as_dead(run, many):
    ray = Ray(lambda worker, item: [HANGS] if worker == 0 else good(worker, item))
    summary, lines = run(ray)
    assert lines == many[:10]
    assert summary.retries == 1
    assert 600 < ray.now < 601
    assert not ray.alive


def test_no_room_on_the_cluster_is_told_once(run, caplog):
    ray = Ray(opening=lambda worker, contents: HANGS)

    def progress(now: Progress) -> None:
        if ray.now > 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(ray, progress=progress)
    assert ["still no worker after 30 s" in line for line in caplog.messages] == [True]
    assert not ray.alive


def test_an_interrupt_keeps_what_was_answered(run, many, tmp_path):
    told = []

    def behave(worker: int, item: WorkItem) -> list[Any]:
        if item.first >= 6:
            raise KeyboardInterrupt
        return good(worker, item)

    ray = Ray(behave)
    with pytest.raises(KeyboardInterrupt):
        run(ray, 20, 1, 1, conclude=told.append)
    assert [Path(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == many[:6]
    (summary,) = told
    assert (summary.answered, summary.files, summary.failed) == (6, 20, ())
    assert not ray.alive
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("answered", [0, 6])
def test_a_cluster_that_is_lost_keeps_what_was_answered(run, many, tmp_path, answered, monkeypatch):
    """Ray may wait for the head with whatever it is asked to do, such as to end a worker."""
    told, begun, waited = [], [], []
    monkeypatch.setattr(cluster_run, "_PATIENCE", 0.01)
    the_head_is_back = threading.Event()

    class Lost(Ray):
        def kill(self, actor: Any) -> None:
            super().kill(actor)
            waited.append(the_head_is_back.wait(60))

        def check(self) -> None:
            if len(begun) > answered:
                raise ClusterError("the cluster is lost")

    def behave(worker: int, item: WorkItem) -> list[Any]:
        begun.append(item)
        return good(worker, item)

    ray = Lost(behave)
    kept = f"; the outputs hold {answered} of 20 files" if answered else ""
    with pytest.raises(ClusterError, match=f"^the cluster is lost{kept}$"):
        run(ray, 20, 1, 1, conclude=told.append)
    assert not waited
    the_head_is_back.set()
    assert not ray.alive
    if not answered:
        assert list(tmp_path.iterdir()) == []
        return
    assert [Path(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == many[:answered]
    assert [summary.answered for summary in told] == [answered]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_nothing_readable_is_the_error_of_the_local_run(run, tmp_path):
    def behave(worker: int, item: WorkItem) -> list[Any]:
        line = f"{item.first}: cannot be decoded"
        return [Piece(warnings=(line,), unreadable=line)]

    with pytest.raises(DataError, match=r"^0: cannot be decoded$"):
        run(Ray(behave))
    assert list(tmp_path.iterdir()) == []


def test_machines_that_compute_differently_are_told(run):
    kinds = ("cpu", "cuda")
    summary, _ = run(Ray(opening=lambda worker, _: WorkerState(f"m{worker}", worker, kinds[worker], "fp32")))
    assert "m0: cpu fp32, m1: cuda fp32" in summary.warnings[0]
    assert summary.detect.provider == "cpu, cuda"
    assert sum(node["files"] for node in summary.nodes.values()) == 10


def test_progress_and_the_closing_tables(run):
    from rich.console import Console

    seen: list[Progress] = []
    summary, _ = run(Ray(), 40, progress=seen.append)
    assert seen[-1].answered == seen[-1].files == 40
    assert [each.node for each in seen[-1].workers] == ["machine", "machine"]
    assert [each.answered for each in seen] == sorted(each.answered for each in seen)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary.render())
    assert "40 of 40 files answered, 0 failed, 0 tried again" in console.export_text()


def test_without_workers_it_waits_for_them():
    assert Progress(4, 1, 0, 3, 0, ()).describe() == "waiting for workers"
