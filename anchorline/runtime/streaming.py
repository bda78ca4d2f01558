"""Several batches under way at once, their results in the order of the frames."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from anchorline.runtime.backend import Lane
from anchorline.runtime.detections import Detections
from anchorline.runtime.lanes import LanePool


def stream_detections(
    frames: Iterable[Any],
    batch: int,
    in_flight: int,
    lanes: LanePool,
    check: Callable[[Sequence[Any]], list[Any]],
    finish: Callable[[Lane], list[Detections]],
) -> Iterator[Detections]:
    """See ``Detector.stream``. The lanes go back when the iterator ends, fails or is closed."""
    source = iter(frames)
    pending: deque[Lane] = deque()

    def oldest() -> list[Detections]:
        lanes.check()
        with pending[0].entered():
            found = finish(pending[0])
        lanes.give_back(pending.popleft())
        return found

    try:
        while chunk := list(itertools.islice(source, batch)):
            checked = check(chunk)
            pending.append(lanes.borrow())
            with pending[-1].entered():
                pending[-1].submit(checked)
            if len(pending) == in_flight:  # now, and not after the next frames have been waited for
                yield from oldest()
        while pending:
            yield from oldest()
    except BaseException as error:
        if not lanes.in_fork:
            lanes.note(error)
        raise
    finally:
        while pending and not lanes.in_fork:
            _abandon(pending.popleft(), lanes)


def _abandon(lane: Lane, lanes: LanePool) -> None:
    """Wait for a batch that nobody wants any more; a lane that failed is dropped."""
    try:
        lane.drain()
    except Exception as error:
        lanes.give_back(lane, error)
    else:
        lanes.give_back(lane)
