"""Where frames wait for the detector: a queue for each source, filled by its policy.

Filling and taking are apart. Under ``wait`` a full queue holds its reader up, so every frame is
answered, in order. Under ``latest`` there is room for one frame, and a newer one takes its place: the
older one is dropped and counted. The intake also bounds how many frames are under way behind it, so
that a slow consumer holds up the taking, and no stale frames pile up in between.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence

from anchorline.runtime.video.frames import Frame
from anchorline.runtime.video.options import Policy

_DEPTH = 4  # frames that a waiting source may be ahead, or a batch where that is more


class SourceQueue:
    """The frames of one source that wait for the detector. The intake's lock guards it."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.frames: deque[Frame] = deque()
        self.dropped = 0
        self.ended = False


class Intake:
    """The queues of all sources, and the one place where the pipeline waits for frames."""

    def __init__(self, policies: Sequence[Policy], batch: int, max_wait: float, limit: int) -> None:
        """``batch`` frames at most are taken at once, after at most ``max_wait`` seconds of waiting for
        company; ``limit`` bounds the frames that are taken and not yet ``done``."""
        self.queues = [SourceQueue(policy) for policy in policies]
        self._batch, self._max_wait, self._limit = batch, max_wait, max(limit, batch)
        self._depth = max(_DEPTH, batch)
        self._changed = threading.Condition()
        self._under_way = 0
        self._taken = 0  # batches so far
        self._turn = 0  # the queue that is asked first
        self._stopped = self._aborted = False

    def offer(self, queue: SourceQueue, frame: Frame) -> bool:
        """Add a frame by the queue's policy; ``False`` when the pipeline takes no more."""
        with self._changed:
            if queue.policy == "latest":
                while queue.frames and not self._stopped:
                    queue.frames.popleft()
                    queue.dropped += 1
            while len(queue.frames) >= self._depth and not self._stopped:
                self._changed.wait()
            if self._stopped:
                return False
            queue.frames.append(frame)
            self._changed.notify_all()
            return True

    def end(self, queue: SourceQueue) -> None:
        """The source delivers no more."""
        with self._changed:
            queue.ended = True
            self._changed.notify_all()

    def take(self) -> tuple[int, list[Frame]] | None:
        """The number of the batch and its frames, waited for; ``None`` when all is over."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._aborted or self._over() or self._can_take())
                if self._aborted or self._over():
                    return None
                self._wait_for_company()
                frames = self._pick()
                if frames:  # another worker may have been faster
                    break
            number = self._taken
            self._taken += 1
            self._under_way += len(frames)
            self._changed.notify_all()
            return number, frames

    def done(self, frames: int = 1) -> None:
        """This many frames have left the pipeline."""
        with self._changed:
            self._under_way -= frames
            self._changed.notify_all()

    def stop(self) -> None:
        """Accept no more frames; what waits here is still handed out."""
        with self._changed:
            self._stopped = True
            for queue in self.queues:
                queue.ended = True
            self._changed.notify_all()

    def abort(self) -> None:
        """Accept and hand out nothing more."""
        with self._changed:
            self._stopped = self._aborted = True
            for queue in self.queues:
                queue.frames.clear()
            self._changed.notify_all()

    def _can_take(self) -> bool:
        return self._under_way + self._batch <= self._limit and any(queue.frames for queue in self.queues)

    def _over(self) -> bool:
        return all(queue.ended and not queue.frames for queue in self.queues)

    def _wait_for_company(self) -> None:
        """Wait until the batch is full, nobody is left who could fill it, or the time is up."""
        until = time.monotonic() + self._max_wait
        while not self._aborted and self._can_take() and self._may_grow():
            left = until - time.monotonic()
            if left <= 0:
                return
            self._changed.wait(left)

    def _may_grow(self) -> bool:
        waiting = sum(len(queue.frames) for queue in self.queues)
        # One frame of a live source is all there is: the next would take its place, not join it.
        growing = any(
            not queue.ended and (queue.policy == "wait" or not queue.frames) for queue in self.queues
        )
        return growing and waiting < self._batch

    def _pick(self) -> list[Frame]:
        """Frames from the queues in turn, one from each at a time, so that none is left behind."""
        frames: list[Frame] = []
        count = len(self.queues)
        while len(frames) < self._batch and self._can_take():
            queue = self.queues[self._turn % count]
            self._turn += 1
            if queue.frames:
                frames.append(queue.frames.popleft())
        return frames
