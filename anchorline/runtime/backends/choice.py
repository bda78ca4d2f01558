"""Which of the ways to run a model on a processor is the quickest here: tried once, then remembered.

A way is a provider and a number of threads. They meet two by two, frame by frame in turns, so that what else
goes on in the machine slows both; the winner stays open and meets the next. What came of it lies in the
cache, one file for each question (``facts_of``): an upgrade or another processor never meets an old answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Generic, Protocol, TypeVar

import cv2
import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from anchorline.runtime.backends.base import Lane
from anchorline.runtime.backends.cpu_options import MOST_THREADS, CpuOptions, cpu_facts, thread_counts
from anchorline.runtime.canvas import USUAL_FRAME, usual_canvas
from anchorline.runtime.contract import Contract
from anchorline.runtime.io.errors import (
    AnchorlineError,
    ArtefactError,
    FrameError,
    GpuError,
    SettingsError,
    one_line,
    shown,
)
from anchorline.runtime.io.files import cache_folder, write_json
from anchorline.runtime.model_file import ModelFile

MEASURE_VARIABLE = "ANCHORLINE_MEASURE"
SECONDS = 1.5  # of turns for a pair, at least one turn each
SLOWEST = 3.0  # seconds of a first run: a way that takes longer is not tried further
MARGIN = 0.05  # by how much a way has to be quicker than one that stands before it
STEADY = 0.25  # how much the median turn may be above the quickest, for the answer to be kept for good
LEAST_TURNS = 3  # the same
DOUBTED_SECONDS = 86_400.0  # how long another answer is kept
MANY_CORES = 8  # from here on half of the threads are tried, and half of those
_PATIENCE = 30.0  # seconds to wait for another process that measures
_REST = 0.02  # seconds before a turn: the threads of the one before may still be spinning
_PATCH = 32  # pixels of a side
_FORMAT = "1"

log = logging.getLogger("anchorline.runtime")
_said: set[Path] = set()  # damaged answers that were logged already


class Clock(Protocol):
    """What is used of the module ``time``."""

    def perf_counter(self) -> float: ...
    def time(self) -> float: ...
    def sleep(self, seconds: float, /) -> None: ...


class Runnable(Protocol):
    """What is used of a backend."""

    @property
    def precision(self) -> str: ...
    def create_lane(self) -> Lane: ...
    def close(self) -> None: ...


_Backend = TypeVar("_Backend", bound=Runnable)


@dataclass(frozen=True)
class Way:
    """A provider, and the threads of its network; None: one for each core."""

    provider: str
    threads: int | None


@dataclass(frozen=True)
class Figure:
    """How a way ran: the ``seconds`` of its quickest turn a frame, and by what share the median is above."""

    provider: str
    threads: Annotated[int, Meta(ge=1, le=MOST_THREADS)]
    precision: str
    turns: int
    seconds: float
    spread: float

    def describe(self) -> str:
        """In words, such as ``cpu, fp32, 2 threads: 38.2 ms``."""
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        milliseconds = 1000 * self.seconds
        time = f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
        return f"{self.provider}, {self.precision}, {threads}: {time} ms"


@dataclass(frozen=True)
class Choice:
    """The answer: a way, the ``figures`` of all that ran with its own first, and why others did not run.

    ``measured`` is in seconds since 1970, ``took`` how long that was. One that is ``doubtful``, because the
    turns were few or unlike each other, is looked into again after ``DOUBTED_SECONDS``.
    """

    facts: dict[str, str]
    provider: str
    threads: Annotated[int, Meta(ge=1, le=MOST_THREADS)]
    figures: tuple[Figure, ...]
    refused: dict[str, str]
    doubtful: bool
    measured: float
    took: float

    @property
    def way(self) -> Way:
        return Way(self.provider, self.threads)

    def describe(self) -> str:
        """What was chosen and what it was compared with, in one line."""
        first, *others = (figure.describe() for figure in self.figures)
        beside = f" ({'; '.join(others)})" if others else ""
        again = ", to be measured again after a day: times were few or unsteady" * self.doubtful
        return f"{first} a frame{beside} on the canvas {self.facts.get('canvas')}{again}"


def measuring(wanted: bool | None) -> bool:
    """Whether ``auto`` measures: as ``wanted``, or else as ``$ANCHORLINE_MEASURE`` says, by default yes."""
    if wanted is None:
        stated = os.environ.get(MEASURE_VARIABLE) or "1"
        if stated not in ("0", "1"):
            raise SettingsError(f"{MEASURE_VARIABLE} is {shown(stated)}; expected 1 or 0")
        return stated == "1"
    if not isinstance(wanted, bool):
        raise SettingsError(f"measure is {shown(wanted)}; expected True, False or None")
    return wanted


def facts_of(
    model: ModelFile, contract: Contract, cpu: CpuOptions, providers: Sequence[str]
) -> dict[str, str]:
    """All that an answer depends on; ``contract`` is that of the run, ``providers`` in their assumed order.

    Raises ``FrameError`` where the model's usual canvas has more pixels than may be.
    """
    return {
        **_machine(),
        "model": model.digest or model.check(),  # one that is stated wrongly is found when the file is opened
        "canvas": "{}x{}".format(*usual_canvas(contract)),
        "providers": ", ".join(providers),
        "threads": ", ".join(map(str, _counts(cpu))),
        "precision": cpu.precision,
        "tuning": cpu.tuning,
    }


def _machine() -> dict[str, str]:
    described = cpu_facts()
    instructions = described.get("flags") or described.get("Features") or ""
    versions = {}
    for name in ("anchorline", "onnxruntime", "onnxruntime-gpu", "openvino"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "format": _FORMAT,
        "processor": described.get("model name") or platform.processor() or platform.machine(),
        "instructions": hashlib.sha256(" ".join(sorted(instructions.split())).encode()).hexdigest()[:16],
        **versions,
    }


def _counts(cpu: CpuOptions) -> tuple[int, ...]:
    return thread_counts() if cpu.threads is None else (cpu.threads,)


def choices_of(model: ModelFile) -> list[Choice]:
    """The answers that this machine's cache holds on a model, the latest first; damaged ones are left out."""
    machine, digest = _machine().items(), model.digest or model.check()
    found = []
    for path in _folder().glob(f"{digest[:16]}-*.json"):
        with contextlib.suppress(ArtefactError):
            choice = _read(path)
            if choice is not None and machine <= choice.facts.items():
                found.append(choice)
    return sorted(found, key=lambda choice: -choice.measured)


def recall(facts: Mapping[str, str], now: float) -> Choice | None:
    """The answer to this very question, if there is one that holds. A damaged one is told of once."""
    path = _path(facts)
    try:
        choice = _read(path)
    except ArtefactError as error:
        if path not in _said:
            _said.add(path)
            log.warning("%s: what was measured is damaged (%s); measured again", path, error)
        return None
    if choice is None or choice.facts != facts:
        return None
    holds = not choice.doubtful or choice.measured <= now < choice.measured + DOUBTED_SECONDS
    return choice if holds else None


def _folder() -> Path:
    return cache_folder() / "choices"


def _path(facts: Mapping[str, str]) -> Path:
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return _folder() / f"{facts['model'][:16]}-{key[:24]}.json"


def _read(path: Path) -> Choice | None:
    """What a file holds, None where there is none; ``ArtefactError`` where it cannot be used."""
    try:
        choice = msgspec.json.decode(path.read_bytes(), type=Choice)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        raise ArtefactError(one_line(error)[:200]) from None
    if not choice.figures or choice.provider not in choice.facts.get("providers", "").split(", "):
        raise ArtefactError("it names no provider that was tried")
    return choice


@contextlib.contextmanager
def _alone(clock: Clock) -> Iterator[bool]:
    """Whether this process may measure: where the answer can be kept, and while no other one does.

    It waits for those that open models at the same time, which may be answering the same question; two
    that measure at once disturb each other. Where the system has no ``flock`` nobody waits.
    """
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written to")
        descriptor = os.open(folder, os.O_RDONLY) if sys.platform != "win32" else -1
    except OSError as error:
        log.info("provider auto measures nothing, for the answer cannot be kept: %s", error)
        yield False
        return
    if sys.platform == "win32":
        yield True
        return
    import fcntl

    try:
        until, free = clock.perf_counter() + _PATIENCE, False
        while not free and clock.perf_counter() < until:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = True
            except BlockingIOError:
                clock.sleep(0.05)
            except OSError:  # a file system without locks
                free = True
        yield free
    finally:
        with contextlib.suppress(OSError):  # in words, since a process forked meanwhile holds it as well
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def open_first(ways: Iterable[Way], open_way: Callable[[Way], _Backend]) -> tuple[_Backend, dict[str, str]]:
    """The first way that opens, and why those before did not, by provider; else the last one's error."""
    refused: dict[str, str] = {}
    failure: AnchorlineError | None = None
    for way in ways:
        try:
            return open_way(way), refused
        except (GpuError, ArtefactError) as error:
            refused[way.provider] = str(error)
            failure = error
    assert failure is not None, "no way at all"
    raise failure


def open_quickest(
    model: ModelFile,
    contract: Contract,
    cpu: CpuOptions,
    providers: Sequence[str],
    open_way: Callable[[Way], _Backend],
    clock: Clock = time,
) -> tuple[_Backend, dict[str, str]]:
    """The quickest way to run ``model`` under ``contract``: the remembered one or, the first time, by trial.

    Without an answer, because none can be kept or another process is at it for long, the first of the
    ``providers`` that opens, as ``open_first``; so it is where there is nothing to choose.
    """
    assumed = [Way(name, cpu.threads) for name in providers]
    counts = _counts(cpu)
    if len(assumed) * len(counts) == 1 and (cpu.threads is not None or counts[0] < MANY_CORES):
        return open_first(assumed, open_way)
    try:
        facts = facts_of(model, contract, cpu, providers)
    except FrameError:
        return open_first(assumed, open_way)
    choice = recall(facts, clock.time())
    if choice is None:
        with _alone(clock) as allowed:
            choice = recall(facts, clock.time())
            if choice is None and allowed:
                frame, in_flight = _frame(contract), 2 if cpu.tuning == "throughput" else 1
                backend, choice = compare(facts, cpu, providers, open_way, frame, in_flight, clock)
                _remember(model.path, choice)
                return backend, choice.refused
    if choice is None:
        return open_first(assumed, open_way)
    backend, refused = open_first([choice.way, *assumed], open_way)
    return backend, {**choice.refused, **refused}


def _remember(model: Path, choice: Choice) -> None:
    path = _path(choice.facts)
    try:
        write_json(path, choice)
        kept = f"kept in {path}"
    except AnchorlineError as error:
        kept = f"not kept: {error}"
    told = f"provider auto takes {choice.describe()}; measured once, in {choice.took:.1f} s"
    compared = len(choice.figures) > 1
    log.log(logging.WARNING if compared else logging.INFO, "%s: %s, %s", model, told, kept)


def _frame(contract: Contract) -> NDArray[np.uint8]:
    """uint8 [H, W, 3]: patches of colour with soft edges, the same each time, that fill the usual canvas.

    What is on it hardly matters: black, noise, scenes and photographs take the same time within 2 %. Of
    these, patches of this size have as many objects as photographs, for models that drop unlikely proposals.
    """
    height, width = contract.canvas or USUAL_FRAME
    shape = (-(-height // _PATCH), -(-width // _PATCH), 3)
    patches = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return cv2.resize(patches, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.uint8)


def compare(
    facts: dict[str, str],
    cpu: CpuOptions,
    providers: Sequence[str],
    open_way: Callable[[Way], _Backend],
    frame: NDArray[np.uint8],
    in_flight: int,
    clock: Clock,
) -> tuple[_Backend, Choice]:
    """The quickest way, opened, and the answer to be kept.

    First the providers, in their assumed order, with the first number of threads; then the best one with the
    other numbers; then, from ``MANY_CORES`` on, with half of its threads as long as that is quicker. Raises
    the last one's error where none runs.
    """
    begun, counts = clock.perf_counter(), _counts(cpu)
    contest = _Contest(open_way, frame, in_flight, clock)
    try:
        for name in providers:
            contest.meet(Way(name, counts[0]))
        for count in counts[1:]:
            contest.meet(Way(contest.best.provider, count))
        while cpu.threads is None and contest.best.threads >= MANY_CORES:
            half = contest.best.threads // 2
            if half in counts or not contest.meet(Way(contest.best.provider, half)):
                break
        return contest.result(facts, begun)
    except BaseException:
        contest.close()
        raise


class _Runner(Generic[_Backend]):
    """A way that is open. ``first`` and ``turns`` are its seconds a frame: at first, and against the last."""

    def __init__(
        self, way: Way, backend: _Backend, frame: NDArray[np.uint8], in_flight: int, clock: Clock
    ) -> None:
        self.provider, self.threads, self.backend = way.provider, way.threads or 1, backend
        self._frame, self._clock = frame, clock
        self._lanes: list[Lane] = []
        self.turns: list[float] = []
        try:
            self._lanes += [backend.create_lane() for _ in range(in_flight)]
            self.first = self.turn()
        except BaseException:
            self.close()
            raise

    def turn(self) -> float:
        start = self._clock.perf_counter()
        for lane in self._lanes:
            lane.submit([self._frame])
        for lane in self._lanes:
            lane.collect()
        return (self._clock.perf_counter() - start) / len(self._lanes)

    def figure(self) -> Figure:
        turns = self.turns or [self.first]
        spread = float(np.median(turns)) / max(min(turns), 1e-9) - 1
        precision = self.backend.precision
        return Figure(self.provider, self.threads, precision, len(self.turns), min(turns), spread)

    def release(self) -> _Backend:
        """The backend, without what was needed to try it."""
        for lane in self._lanes:
            lane.close()
        self._lanes = []
        return self.backend

    def close(self) -> None:
        self.release().close()


class _Contest(Generic[_Backend]):
    """Ways that meet one after the other; two networks at most are open at a time."""

    def __init__(
        self, open_way: Callable[[Way], _Backend], frame: NDArray[np.uint8], in_flight: int, clock: Clock
    ) -> None:
        self._open, self._frame, self._in_flight, self._clock = open_way, frame, in_flight, clock
        self._best: _Runner[_Backend] | None = None
        self._lost: list[Figure] = []
        self._refused: dict[str, str] = {}
        self._failure: AnchorlineError | None = None

    @property
    def best(self) -> _Runner[_Backend]:
        """The one that won; where none runs, the last one's error."""
        if self._best is None:
            assert self._failure is not None, "no way at all"
            raise self._failure
        return self._best

    def meet(self, way: Way) -> bool:
        """Whether ``way`` is the best one so far. A first run beyond ``SLOWEST`` ends the contest."""
        if self._best is not None and self._best.first > SLOWEST:
            return False
        try:
            backend = self._open(way)
            runner = _Runner(way, backend, self._frame, self._in_flight, self._clock)
        except (GpuError, ArtefactError) as error:
            if self._best is None or self._best.provider != way.provider:
                self._refused[way.provider] = str(error)
            self._failure = error
            return False
        if self._best is None:
            self._best = runner
            return True
        try:
            wins = runner.first <= SLOWEST and self._is_quicker(runner, self._best)
        except BaseException:
            runner.close()
            raise
        loser, self._best = (self._best, runner) if wins else (runner, self._best)
        self._lost.append(loser.figure())
        loser.close()
        return wins

    def _is_quicker(self, new: _Runner[_Backend], old: _Runner[_Backend]) -> bool:
        """Whether ``new`` is quicker by more than ``MARGIN`` at its best, and in the median: what else runs
        in the machine only makes turns slower, but may spare one way for a moment."""
        new.turns, old.turns = [], []
        pair, begun = [old, new], self._clock.perf_counter()
        while not new.turns or self._clock.perf_counter() - begun < SECONDS:
            for runner in pair:
                self._clock.sleep(_REST)
                runner.turns.append(runner.turn())
            pair.reverse()
        quicker = min(new.turns) * (1 + MARGIN) < min(old.turns)
        return quicker and bool(np.median(new.turns) < np.median(old.turns))

    def result(self, facts: dict[str, str], begun: float) -> tuple[_Backend, Choice]:
        best = self.best.figure()
        figures = (best, *sorted(self._lost, key=lambda figure: figure.seconds))
        rivals = [figure for figure in figures if figure.seconds < 2 * best.seconds]
        doubtful = bool(self._refused) or any(
            each.turns < LEAST_TURNS or each.spread > STEADY for each in rivals
        )
        took = self._clock.perf_counter() - begun
        choice = Choice(
            facts, best.provider, best.threads, figures, self._refused, doubtful, self._clock.time(), took
        )
        return self.best.release(), choice

    def close(self) -> None:
        if self._best is not None:
            self._best.close()
            self._best = None
