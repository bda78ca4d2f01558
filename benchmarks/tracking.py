"""Tracking on a generated video whose identities are known: IDF1 of the ids that ``--track`` gives.

    python benchmarks/tracking.py                          true boxes with jitter, misses, false positives
    python benchmarks/tracking.py --model demo/model.onnx  the same, and what a model finds in the pictures

IDF1 (Ristani et al., "Performance Measures and a Data Set for Multi-Target, Multi-Camera Tracking", 2016)
is the package trackers' port of TrackEval. Appends rows to results/tracking.csv.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from record import append_row

from anchorline.data.boxes import box_areas, intersection_matrix, iou_matrix
from anchorline.data.synthetic import CLASS_NAMES, MIN_VISIBLE, SCENE_SIZE
from anchorline.data.synthetic_video import SyntheticVideo, VideoTruth
from anchorline.runtime import Detections, Detector, ObjectTracker

Detect = Callable[[int, VideoTruth], Detections]
FPS = 25.0
MATCH_IOU = 0.5
MISSES, FALSE_POSITIVES = 0.1, 0.3  # the share of objects, and boxes a frame
DROPPED = 0.3  # the share of frames
SHOWN_SCORE = 0.5
JITTER = 0.03  # of the box's sides, standard deviation of each edge
HIDDEN = 0.2  # objects of which less shows are never found
VIDEO_IDS = 1_000_000
CROWD = 4  # videos whose objects share one picture
DETECTION_STREAM = 11


def crowd(truths: Sequence[VideoTruth]) -> VideoTruth:
    """The objects of several videos in one picture, where they run through and hide each other.

    An object shows as far as its box is not covered by the nearer box that covers it most.
    """
    boxes = np.concatenate([truth.boxes for truth in truths])
    ids = np.concatenate([truth.ids + number * VIDEO_IDS for number, truth in enumerate(truths)])
    depth = ids * 7919 % 1009
    share = intersection_matrix(boxes, boxes) / box_areas(boxes)[:, None]
    covered = np.max(share * (depth[None] > depth[:, None]), axis=1, initial=0.0)
    visible = np.concatenate([truth.visible for truth in truths]) * (1.0 - covered)
    return VideoTruth(boxes, np.concatenate([truth.labels for truth in truths]), ids, visible)


def detector_of_truth(seed: int, size: tuple[int, int]) -> Detect:
    """True boxes as a fair detector finds them: moved, some missed, some invented, weaker when hidden."""

    def detect(index: int, truth: VideoTruth) -> Detections:
        rng = np.random.Generator(np.random.PCG64([DETECTION_STREAM, seed, index]))
        found = (rng.random(len(truth.ids)) >= MISSES) & (truth.visible >= HIDDEN)
        boxes, visible = truth.boxes[found].astype(np.float64), truth.visible[found]
        sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        boxes = boxes + rng.normal(0, JITTER, boxes.shape) * sides
        scores = np.clip(rng.uniform(0.6, 1.0, len(boxes)) * np.sqrt(visible), 0.05, 1.0)
        count = rng.poisson(FALSE_POSITIVES)
        corners = rng.uniform(0, 0.8, (count, 2)) * (size[1], size[0])
        invented = np.concatenate([corners, corners + rng.uniform(0.05, 0.3, (count, 2)) * min(size)], axis=1)
        labels = rng.integers(0, len(CLASS_NAMES), count)
        boxes = np.sort(np.concatenate([boxes, invented]).reshape(-1, 2, 2), axis=1).reshape(-1, 4)
        return Detections(
            boxes,
            np.concatenate([scores, rng.uniform(0.1, 0.75, count)]),
            np.concatenate([truth.labels[found], labels]),
            CLASS_NAMES,
        )

    return detect


def identity_figures(truths: Sequence[VideoTruth], found: Sequence[Detections]) -> dict[str, float]:
    """IDF1 and what it is made of, from the tracked detections of each frame.

    ``detection_f1`` is that of the boxes alone, which IDF1 can reach where no identity is mistaken.

    As in a detection benchmark, hidden objects (``MIN_VISIBLE``) are neither asked for nor counted as
    mistakes: what lies on one of them, and on no clear object, is left out.
    """
    from trackers.eval import compute_clear_metrics, compute_identity_metrics

    truth_ids, found_ids, similarity = [], [], []
    for truth, detections in zip(truths, found, strict=True):
        clear = truth.visible >= MIN_VISIBLE
        tracked = detections[detections.track_ids >= 0]
        overlap = iou_matrix(truth.boxes, tracked.boxes) * (truth.labels[:, None] == tracked.labels)
        on_hidden = (overlap >= MATCH_IOU)[~clear].any(axis=0) & ~(overlap >= MATCH_IOU)[clear].any(axis=0)
        truth_ids.append(truth.ids[clear])
        found_ids.append(tracked.track_ids[~on_hidden])
        similarity.append(overlap[clear][:, ~on_hidden])
    identity = compute_identity_metrics(truth_ids, found_ids, similarity, MATCH_IOU)
    boxes = compute_clear_metrics(truth_ids, found_ids, similarity, MATCH_IOU)
    mistakes = boxes["CLR_FP"] + boxes["CLR_FN"]
    return {
        "objects": len(np.unique(np.concatenate(truth_ids))),
        "tracks": len(np.unique(np.concatenate(found_ids))),
        "idf1": round(identity["IDF1"], 4),
        "idp": round(identity["IDP"], 4),
        "idr": round(identity["IDR"], 4),
        "id_switches": int(boxes["IDSW"]),
        "detection_f1": round(2 * boxes["CLR_TP"] / (2 * boxes["CLR_TP"] + mistakes), 4),
    }


def follow(found: Iterable[tuple[int, Detections]], min_score: float) -> list[Detections]:
    """The detections of frames, tracked, from ``min_score`` on; a number that is missing was dropped."""
    tracker, last, tracked = ObjectTracker(FPS), -1, []
    for index, detections in found:
        detections = tracker.update(detections, frames=index - last)
        tracked.append(detections[detections.scores >= min_score])
        last = index
    return tracked


def case(
    name: str, truths: Mapping[int, VideoTruth], detect: Detect, min_score: float = 0.0
) -> dict[str, object]:
    """One row: detect in the frames by number, track, compare."""
    found = [(index, detect(index, truth)) for index, truth in truths.items()]
    shown = np.concatenate([truth.visible >= MIN_VISIBLE for truth in truths.values()])
    return {
        "case": name,
        "tracker": f"ByteTrack of trackers {version('trackers')}",
        "frames": len(truths),
        "objects_a_frame": round(len(shown) / len(truths), 1),
        "hidden": round(1.0 - float(shown.mean()), 3),
        **identity_figures(list(truths.values()), follow(found, min_score)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", type=Path, help="a model of the generated scenes, as `anchorline demo` trains"
    )
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--seed", type=int, default=1000, help="the video; the demo's own has 0")
    parser.add_argument("--frames", type=int, default=500)
    parser.add_argument("--size", type=int, nargs=2, default=SCENE_SIZE, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--dry-run", action="store_true", help="print the rows and write none")
    options = parser.parse_args()
    size, frames = (options.size[0], options.size[1]), options.frames
    videos = [SyntheticVideo(options.seed + number, size) for number in range(CROWD)]
    detect = detector_of_truth(options.seed, size)
    single = {index: videos[0].truth(index) for index in range(frames)}
    crowded = {index: crowd([video.truth(index) for video in videos]) for index in range(frames)}
    kept = np.flatnonzero(np.random.default_rng(options.seed).random(frames) >= DROPPED).tolist()
    found = f"true boxes, {MISSES:.0%} missed, {FALSE_POSITIVES:g} false a frame, moved by {JITTER:.0%}"
    rows = [
        case(found, single, detect),
        case(f"crowd, {found}", crowded, detect),
        case(f"crowd, {found}, {DROPPED:.0%} of frames dropped", {i: crowded[i] for i in kept}, detect),
    ]
    if options.model:
        with Detector(options.model, options.provider) as detector:
            named = f"model, {detector.provider} {detector.precision}, scores from {SHOWN_SCORE:g}"
            rows.append(case(named, single, lambda index, _: detector(videos[0].frame(index)), SHOWN_SCORE))
    for row in rows:
        print(row)
        if not options.dry_run:
            append_row("tracking", _command(), row)


def _command() -> str:
    """The command without this machine's folders."""
    shown = [Path(each).name if Path(each).exists() else each for each in sys.argv[1:]]
    return shlex.join(["python", "benchmarks/tracking.py", *shown])


if __name__ == "__main__":
    main()
