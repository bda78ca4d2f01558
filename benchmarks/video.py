"""The video pipeline: how much of its slowest stage it reaches, how old live results get, real time.

    python benchmarks/video.py                       throughput and age with a model of fixed cost
    python benchmarks/video.py --model m.onnx        the same, and the model from file to annotated mp4

The clip is a file of your own (``--clip``) or a generated scene. Appends rows to results/video.csv.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from record import append_row

from anchorline.data.synthetic_video import write_video
from anchorline.runtime import (
    Detections,
    DetectOptions,
    Detector,
    Source,
    VideoPipeline,
    VideoReader,
    detect,
    draw,
)
from anchorline.runtime.video.writer import open_writer

Image = NDArray[np.uint8]
COLUMNS = (
    "case", "model", "frames", "size", "fps", "slowest_stage", "slowest_alone_fps", "share_of_slowest",
    "age_p50_ms", "age_p95_ms", "age_bound_ms", "dropped",
)  # fmt: skip
SLACK_MS = 20.0


class FixedCost:
    """A detector that sleeps, as one waits for a GPU, and finds two boxes."""

    provider, precision = "stub", "none"

    def __init__(self, cost: float) -> None:
        self.cost = cost

    def batch(self, frames: list[Image]) -> list[Detections]:
        time.sleep(self.cost)
        boxes = [[10, 10, 90, 90], [50, 40, 200, 160]]
        return [Detections(boxes, [0.9, 0.8], [0, 1], class_names=("one", "two")) for _ in frames]


def alone(clip: Path, folder: Path, detector: FixedCost) -> dict[str, float]:
    """Frames a second of each stage by itself, over the whole clip."""
    start = time.perf_counter()
    with VideoReader(clip) as reader:
        frames = [frame for _, _, frame in reader]
        fps = reader.fps
    rates = {"decode": len(frames) / (time.perf_counter() - start)}
    start = time.perf_counter()
    found = [detector.batch([frame])[0] for frame in frames]
    rates["network"] = len(frames) / (time.perf_counter() - start)
    start = time.perf_counter()
    drawn = [draw(frame, each) for frame, each in zip(frames, found, strict=True)]
    rates["draw"] = len(frames) / (time.perf_counter() - start)
    start = time.perf_counter()
    with open_writer(folder / "alone.mp4", drawn[0].shape[:2], fps) as writer:
        for index, frame in enumerate(drawn):
            writer.write(frame, index / fps)
    rates["write"] = len(frames) / (time.perf_counter() - start)
    return rates


def throughput(clip: Path, folder: Path, cost: float) -> dict[str, object]:
    """The pipeline from file to annotated mp4 against its slowest stage alone."""
    detector = FixedCost(cost)
    rates = alone(clip, folder, detector)
    slowest = min(rates, key=lambda stage: rates[stage])
    summary = VideoPipeline(
        detector, [clip], DetectOptions(save=folder / "out.mp4", jsonl=folder / "out.jsonl")
    ).run()
    return {
        "case": "throughput",
        "model": f"fixed {1000 * cost:g} ms",
        "frames": summary.frames,
        "fps": round(summary.fps, 2),
        "slowest_stage": slowest,
        "slowest_alone_fps": round(rates[slowest], 2),
        "share_of_slowest": round(summary.fps / rates[slowest], 3),
    }


def age(clip: Path, cost: float, seconds: float, fps: float = 100.0) -> dict[str, object]:
    """The age of results of a live source that is faster than the model."""
    with VideoReader(clip) as reader:
        picture = next(iter(reader))[2]

    def camera() -> Iterator[Image]:
        due = end = time.monotonic()
        while due < end + seconds:
            yield picture.copy()
            due += 1.0 / fps
            time.sleep(max(0.0, due - time.monotonic()))

    summary = VideoPipeline(FixedCost(cost), [Source(camera(), name="camera", live=True)]).run()
    return {
        "case": f"live, {fps:g} frames/s",
        "model": f"fixed {1000 * cost:g} ms",
        "frames": summary.frames,
        "fps": round(summary.fps, 2),
        "age_p50_ms": round(summary.age["p50"], 1),
        "age_p95_ms": round(summary.age["p95"], 1),
        "age_bound_ms": round(2000 * cost + SLACK_MS, 1),
        "dropped": summary.dropped,
    }


def real(clip: Path, folder: Path, model: Path, provider: str) -> dict[str, object]:
    """A real model from file to annotated mp4, after a first call, which allocates."""
    with Detector(model, provider=provider, tuning="throughput") as detector:  # as the command for files
        with VideoReader(clip) as reader:
            detector(next(iter(reader))[2])
        summary = detect([clip], detector, DetectOptions(save=folder / "real.mp4"), progress=False)
        canvas = detector.contract.frame_sizes
        case = f"file to mp4, {summary.provider} {summary.precision}, canvas {canvas}"
    return {
        "case": case,
        "model": model.name,
        "frames": summary.frames,
        "fps": round(summary.fps, 2),
        "dropped": summary.dropped,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clip", type=Path, help="a video file (default: a generated scene)")
    parser.add_argument("--model", type=Path, help="an exported model.onnx")
    parser.add_argument("--provider", default="auto")
    parser.add_argument("--cost", type=float, default=0.02, help="seconds of the fixed-cost model")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long the live source runs")
    parser.add_argument("--dry-run", action="store_true", help="print the rows and write none")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        clip = options.clip or folder / "scene.mp4"
        if options.clip is None:
            write_video(clip, seed=0, frames=250)
        rows = [throughput(clip, folder, options.cost), age(clip, options.cost, options.seconds)]
        if options.model:
            rows.append(real(clip, folder, options.model, options.provider))
        with VideoReader(clip) as reader:
            size = f"{reader.size[1]}x{reader.size[0]}"
    for row in rows:
        figures = {**dict.fromkeys(COLUMNS, ""), **row, "size": size}
        print(figures)
        if not options.dry_run:
            append_row("video", _command(), figures)


def _command() -> str:
    """The command without this machine's folders."""
    shown = [Path(each).name if Path(each).exists() else each for each in sys.argv[1:]]
    return shlex.join(["python", "benchmarks/video.py", *shown])


if __name__ == "__main__":
    main()
