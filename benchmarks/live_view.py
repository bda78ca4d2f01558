"""What a live view costs the pipeline: its rate with and without viewers, run after run in turn.

    python benchmarks/live_view.py                       with a model of fixed cost, as one waits for a GPU
    python benchmarks/live_view.py --model m.onnx        with a real one, which shares the processor

Each round runs the pipeline once without a view, once with a view that nobody watches, once with ten
viewers, and once with ten and one that reads a kilobyte a second, in an order that changes from round to
round.
The viewers read in a process of their own at the lowest priority. Appends rows to results/live_view.csv.
"""

from __future__ import annotations

import argparse
import os
import selectors
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray
from record import append_row

from anchorline.data.synthetic_video import write_video
from anchorline.runtime import Detections, Detector, Source, VideoPipeline, VideoReader
from anchorline.serving.live_view import LiveView

Image = NDArray[np.uint8]
COLUMNS = (
    "case", "model", "size", "rounds", "seconds", "fps_without", "fps_with", "ratio_median", "ratio_worst",
    "pictures_a_second", "viewers_left",
)  # fmt: skip
CASES = {"no view": (None, 0), "nobody": (0, 0), "ten viewers": (10, 0), "ten and a slow one": (10, 1)}
_WARM_UP = 1.0  # seconds that are not counted
_SLOW_READ = 1024  # bytes a second


class FixedCost:
    """A detector that sleeps, as one waits for a GPU, and finds twenty boxes."""

    provider, precision = "stub", "none"

    def __init__(self, cost: float) -> None:
        self.cost = cost

    def batch(self, frames: list[Image]) -> list[Detections]:
        time.sleep(self.cost)
        boxes = [[20 * index, 10 * index, 20 * index + 90, 10 * index + 90] for index in range(20)]
        names = ("one", "two")
        return [Detections(boxes, [0.9] * 20, [0, 1] * 10, class_names=names) for _ in frames]


def viewers(port: int, fast: int, slow: int) -> None:
    """Read as this many viewers do, and throw away what comes, until the server ends."""
    os.nice(19)
    waiting = selectors.DefaultSelector()
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(fast + slow)]
    for number, opened in enumerate(held):
        opened.sendall(b"GET /feed HTTP/1.1\r\nHost: localhost\r\n\r\n")
        if number < fast:
            waiting.register(opened, selectors.EVENT_READ)
    due = time.monotonic()
    while waiting.get_map():
        for key, _ in waiting.select(0.1):
            if not key.fileobj.recv(1 << 18):  # type: ignore[union-attr]
                waiting.unregister(key.fileobj)
        if time.monotonic() > due:
            due += 1.0
            for opened in held[fast:]:
                try:
                    opened.recv(_SLOW_READ)
                except OSError:  # dropped, as it should be
                    continue


def endless(pictures: list[Image], until: float) -> Iterator[Image]:
    """The clip over and over, until that moment."""
    while True:
        for picture in pictures:
            if time.monotonic() > until:
                return
            yield picture


def one_run(detector: object, pictures: list[Image], seconds: float, fast: int | None, slow: int) -> dict:
    """Frames a second of one run, and how many pictures a second its viewers were sent."""
    if fast is None:
        return {"fps": _rate(detector, pictures, seconds, [])}
    with LiveView(0) as view:
        command = [sys.executable, __file__, "--be-viewers", str(view.address.port), str(fast), str(slow)]
        watching = subprocess.Popen(command) if fast else None
        live = view._live
        while len(live.viewers) < fast + slow:
            time.sleep(0.05)
        fps = _rate(detector, pictures, seconds, [view])
        found = {
            "fps": fps,
            "pictures": live.painter.count / (seconds + _WARM_UP),
            "left": len(live.viewers),
        }
    if watching is not None:
        watching.wait(30)
    return found


def _rate(detector: object, pictures: list[Image], seconds: float, views: list[LiveView]) -> float:
    begun = time.monotonic() + _WARM_UP
    source = Source(endless(pictures, begun + seconds), name="clip")
    pipeline = VideoPipeline(detector, [source], sinks=views)  # type: ignore[arg-type]
    for view in views:
        view.watch(pipeline)
    count = 0
    for _ in pipeline:
        count += time.monotonic() > begun
    return count / (time.monotonic() - begun)


def compare(detector: object, pictures: list[Image], rounds: int, seconds: float) -> list[dict[str, object]]:
    """A row for each case with a view, against the run without one of the same round."""
    runs: dict[str, list[dict]] = {case: [] for case in CASES}
    for number in range(rounds):
        order = list(CASES) if number % 2 == 0 else list(CASES)[::-1]
        for case in order:
            runs[case].append(one_run(detector, pictures, seconds, *CASES[case]))
            print(f"round {number + 1}, {case}: {runs[case][-1]}", file=sys.stderr)
    without = [run["fps"] for run in runs.pop("no view")]
    rows = []
    for case, found in runs.items():
        ratios = [run["fps"] / alone for run, alone in zip(found, without, strict=True)]
        rows.append(
            {
                "case": case,
                "rounds": rounds,
                "seconds": seconds,
                "fps_without": round(median(without), 2),
                "fps_with": round(median(run["fps"] for run in found), 2),
                "ratio_median": round(median(ratios), 4),
                "ratio_worst": round(min(ratios), 4),
                "pictures_a_second": round(median(run["pictures"] for run in found), 1),
                "viewers_left": found[-1]["left"],
            }
        )
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--be-viewers"]:
        viewers(*map(int, sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clip", type=Path, help="a video file (default: a generated scene)")
    parser.add_argument("--model", type=Path, help="an exported model.onnx")
    parser.add_argument("--provider", default="auto")
    parser.add_argument("--cost", type=float, default=0.02, help="seconds of the fixed-cost model")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each run")
    parser.add_argument("--dry-run", action="store_true", help="print the rows and write none")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        clip = options.clip or Path(temporary) / "scene.mp4"
        if options.clip is None:
            write_video(clip, seed=0, frames=100)
        with VideoReader(clip) as reader:
            pictures = [frame for _, _, frame in reader][:100]
    detector: object = FixedCost(options.cost)
    name = f"fixed {1000 * options.cost:g} ms"
    if options.model:
        detector = Detector(options.model, provider=options.provider)
        name = f"{options.model.name}, {detector.provider} {detector.precision}"
    height, width = pictures[0].shape[:2]
    for row in compare(detector, pictures, options.rounds, options.seconds):
        figures = {**dict.fromkeys(COLUMNS, ""), **row, "model": name, "size": f"{width}x{height}"}
        print(figures)
        if not options.dry_run:
            append_row("live_view", _command(), figures)


def _command() -> str:
    """The command without this machine's folders."""
    shown = [Path(each).name if Path(each).exists() else each for each in sys.argv[1:]]
    return shlex.join(["python", "benchmarks/live_view.py", *shown])


if __name__ == "__main__":
    main()
