"""The lanes of whatever runs the network, and who may use them."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.canvas import Placement, Preprocessor
from anchorline.runtime.contract import Contract
from anchorline.runtime.io.errors import FrameError, GpuError, SettingsError

if TYPE_CHECKING:
    from anchorline.runtime.tensorrt.lane import TensorRTLane

Lane: TypeAlias = "HostLane | TensorRTLane"
Arrays = dict[str, NDArray[np.generic]]  # by the contract's names
LaneResult = tuple[Arrays, list[Placement], dict[str, float]]  # the outputs, and seconds by stage


class HostLane:
    """One batch's way through preprocessing and network: buffers of its own, used by one caller at a time.

    Here OpenCV lays the frames onto the canvas and the network takes arrays of the host; ``TensorRTLane`` has
    the same methods, and may be handed frames in GPU memory.
    """

    def __init__(self, contract: Contract, provider: str) -> None:
        self._contract, self._provider = contract, provider
        self._preprocess = Preprocessor(contract)
        self._pending: tuple[list[Placement], Arrays, float] | None = None

    def start(self, inputs: Arrays) -> None:
        """Hand the network its inputs, where it runs while the caller goes on."""

    def wait(self, inputs: Arrays) -> tuple[Arrays, dict[str, float]]:
        """Its outputs for these inputs, and the seconds of upload, network and download."""
        raise NotImplementedError

    def entered(self) -> contextlib.AbstractContextManager[None]:
        """What a thread has to be in while it calls the rest; entered again inside, it costs nothing."""
        return contextlib.nullcontext()

    def submit(self, frames: Sequence[Any], stream: Any = None) -> None:
        """Take a batch of checked frames. On a GPU this returns while the work goes on.

        ``stream`` is the CUDA stream that device frames become ready on.
        """
        if stream is not None:
            raise SettingsError(f"stream: the model runs on {self._provider}, which takes none")
        start = time.perf_counter()
        inputs, placements = self._preprocess(frames)
        seconds = time.perf_counter() - start
        self.start(inputs)
        self._pending = placements, inputs, seconds

    def collect(self) -> LaneResult:
        """Wait for the batch that was submitted; the outputs are no views of the lane's buffers."""
        assert self._pending is not None
        placements, inputs, seconds = self._pending
        outputs, timings = self.wait(inputs)
        return outputs, placements, {"preprocess": seconds, **timings}

    def drain(self) -> None:
        """Wait for whatever was submitted, and forget it."""
        self._pending = None

    def close(self) -> None:
        """Release the buffers, once nothing runs any more. Safe to call twice."""
        self.drain()


class LanePool:
    """The lanes of a detector, made on demand and used again. Each belongs to one caller at a time.

    At most ``workers`` calls run at once, others wait their turn. ``borrow`` does not wait, so that a
    stream that is paused with its lanes in hand cannot hold up anybody.
    """

    def __init__(self, create: Callable[[], Lane], workers: int, name: str) -> None:
        self._create, self._workers, self._name = create, workers, name
        self._permits = threading.BoundedSemaphore(workers)
        self._lock = threading.RLock()
        self._idle: list[Lane] = []
        self._all: list[Lane] = []
        self._closed = False
        self._failure: str | None = None  # not the exception: its traceback would keep buffers alive
        self._process = os.getpid()

    @contextlib.contextmanager
    def lane(self) -> Iterator[Lane]:
        """A lane for one call."""
        self.check()
        with self._permits:
            lane = self.borrow()
            try:
                yield lane
            except BaseException as error:
                self.give_back(lane, error)
                raise
            self.give_back(lane)

    def borrow(self) -> Lane:
        """A lane, to be given back."""
        self.check()  # before the lock, which a fork may have inherited locked
        with self._lock:
            self.check()
            if self._idle:
                return self._idle.pop()
            try:
                lane = self._create()
            except GpuError as error:
                self.note(error)
                raise
            self._all.append(lane)
            return lane

    def give_back(self, lane: Lane, error: BaseException | None = None) -> None:
        """After an ``error`` the lane's state is not known, so it is dropped; a refused frame or argument
        did not get that far."""
        with self._lock:
            self.note(error)
            if lane not in self._all:  # the pool was closed meanwhile
                return
            if error is None or isinstance(error, (FrameError, SettingsError)):
                self._idle.append(lane)
                return
            lane.close()  # still under the lock: closing the pool must not overtake it
            self._all.remove(lane)

    def abandon(self, lane: Lane) -> None:
        """Wait for a batch that nobody wants any more, and give its lane back; one that failed is dropped."""
        try:
            lane.drain()
        except Exception as error:
            self.give_back(lane, error)
        else:
            self.give_back(lane)

    def note(self, error: BaseException | None) -> None:
        """Remember an error that loses the GPU, after which no lane is lent any more."""
        if getattr(error, "sticky", False):
            with self._lock:
                self._failure = self._failure or str(error)

    @property
    def in_fork(self) -> bool:
        """Whether this is another process than the one that made the lanes: nothing may be touched."""
        return os.getpid() != self._process

    def check(self) -> None:
        """Raise ``SettingsError`` when closed or in a forked process, ``GpuError`` after the GPU was lost."""
        if self.in_fork:
            raise SettingsError(
                f"{self._name}: was opened in process {self._process} and is used in its fork {os.getpid()}; "
                "open it again there, or start processes with the spawn method"
            )
        if self._closed:
            raise SettingsError(f"{self._name}: the model is closed; open it again")
        if self._failure is not None:
            raise GpuError(f"{self._name}: refused after an earlier failure: {self._failure}")

    def close(self) -> bool:
        """Let running calls finish, then release the lanes; whether that was to be done.

        In a fork nothing is touched: what the lanes hold belongs to the other process, whose threads may
        have held the lock when it forked.
        """
        if self.in_fork:
            return False
        with self._lock:
            if self._closed:
                return False
            self._closed = True
        for _ in range(self._workers):
            self._permits.acquire()
        self._permits.release(self._workers)  # whoever waited learns that the pool is closed
        with self._lock:
            lanes, self._all, self._idle = self._all, [], []
        for lane in lanes:
            lane.close()
        return True
