"""The cases that ``verify`` always tries, because they break detectors that are right on photographs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.data.synthetic import SCENE_SIZE, SMALLEST_SIDE, Pose, generate_scene, posed_scene
from anchorline.evaluation.evaluation import Progress
from anchorline.runtime.canvas import frame_canvas, usual_canvas
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import AnchorlineError, SettingsError
from anchorline.verify.compare import ComparisonSummary
from anchorline.verify.stages import BatchDetector

# On a model whose contract sets no bound, the largest batch tried: this many images, and no more than hold
# this many canvas pixels together (a ResNet-50 takes about 2.5 GB for that).
LARGEST_BATCH = 8
_LARGEST_BATCH_PIXELS = 3_000_000
_LARGEST_SIZE = (3000, 4000)  # height and width: a 12-megapixel photograph, 36 MB
_THIN = (8, 2000)  # the short and the long side of the very thin images
_CROWD_ROWS, _CROWD_COLUMNS, _CROWD_CELL = 5, 8, 64  # pixels

Frame = NDArray[np.uint8]
Compare = Callable[[list[Detections], list[Detections]], ComparisonSummary]
Settle = Callable[[Frame], bool]
"""Whether two detectors that differ on a frame do the same at every stage, given the same inputs."""


@dataclass(frozen=True, eq=False)
class Trap:
    """Batches of frames (uint8 BGR [H, W, 3]), given to the candidate one after the other.

    ``repeated``: all of them twice, with results equal to the bit. ``alone``: each frame's result must agree
    with its result in a batch of one, where it has the same canvas there.
    """

    name: str
    batches: tuple[tuple[Frame, ...], ...]
    repeated: bool = False
    alone: bool = False

    @property
    def frames(self) -> list[Frame]:
        """The frames of all batches in turn."""
        return [frame for batch in self.batches for frame in batch]


@dataclass(frozen=True)
class TrapResult:
    """How a trap ended: ``detail`` is one line, ``comparison`` None where a detector failed before it."""

    name: str
    passed: bool
    detail: str
    images: int
    comparison: ComparisonSummary | None = None


def largest_batch(contract: Contract) -> int:
    """How many images the largest batch has: the contract's bound, else what the canvas leaves room for."""
    if contract.max_batch is not None:
        return contract.max_batch
    return max(2, min(LARGEST_BATCH, _LARGEST_BATCH_PIXELS // math.prod(usual_canvas(contract))))


def traps(max_batch: int = LARGEST_BATCH, seed: int = 0) -> list[Trap]:
    """All traps, with ``max_batch`` images in the largest batch.

    Through ``run_traps`` the candidate runs on 26 images (with the default batch), the reference on 13.
    Raises ``SettingsError`` for a batch under 1.
    """
    if max_batch < 1:
        raise SettingsError(f"max batch is {max_batch}; expected at least 1")
    height, width = SCENE_SIZE
    # Landscape, portrait and small, so that each fills another part of its canvas.
    sizes = (SCENE_SIZE, (2 * width, height), (height // 2, height // 2))
    mixed = tuple(generate_scene(seed, size, index)[0] for index, size in enumerate(sizes))
    plain, crowd = mixed[0], _crowd(seed)
    one_object = posed_scene(seed, SCENE_SIZE, [Pose(width / 2, height / 2, height / 4, angle=0.3)])
    large = cv2.resize(generate_scene(seed)[0], _LARGEST_SIZE[::-1], interpolation=cv2.INTER_LINEAR)
    top = (SMALLEST_SIDE - _THIN[0]) // 2
    lying = generate_scene(seed, (SMALLEST_SIDE, _THIN[1]))[0][top : top + _THIN[0]].copy()
    standing = np.ascontiguousarray(lying.transpose(1, 0, 2))
    full = tuple(mixed[index % len(mixed)] for index in range(max_batch))
    noise = np.random.default_rng(seed).integers(0, 256, (*SCENE_SIZE, 3), dtype=np.uint8)
    return [
        Trap("empty image", ((posed_scene(seed, SCENE_SIZE, []),),)),
        Trap("one object", ((one_object,),)),
        Trap("crowd", ((crowd,),)),
        Trap("batch of 1", ((plain,),)),
        # The second call comes after another frame than the first: what a buffer kept of it shows.
        Trap("repeated calls", ((plain,), (crowd,)), repeated=True),
        Trap("smallest image", ((np.array([[[40, 120, 200]]], np.uint8),),)),
        Trap("largest image", ((np.asarray(large, np.uint8),),)),
        Trap("very thin image", ((lying,), (standing,))),
        Trap("all 0", ((np.zeros((*SCENE_SIZE, 3), np.uint8),),)),
        Trap("all 255", ((np.full((*SCENE_SIZE, 3), 255, np.uint8),),)),
        Trap("noise", ((noise,),)),
        # The last ones, because a runtime keeps the memory that a large batch took.
        Trap("mixed sizes in a batch", (mixed,), alone=True),
        Trap("largest batch", (full,), alone=True),
    ]


def _crowd(seed: int) -> Frame:
    """Forty objects [320, 512, 3] that overlap their neighbours, so that NMS has something to decide."""
    rng = np.random.default_rng(seed)
    poses = []
    for row in range(_CROWD_ROWS):
        for column in range(_CROWD_COLUMNS):
            x, y = ((cell + rng.uniform(0.3, 0.7)) * _CROWD_CELL for cell in (column, row))
            radius = _CROWD_CELL * rng.uniform(0.4, 0.75)
            poses.append(Pose(x, y, radius, rng.uniform(0.0, 2.0 * np.pi)))
    return posed_scene(seed, (_CROWD_ROWS * _CROWD_CELL, _CROWD_COLUMNS * _CROWD_CELL), poses)


def once_each(detector: BatchDetector) -> Callable[[Sequence[Frame]], list[Detections]]:
    """The detector as a function of a batch that remembers the results of each.

    Several traps share frames, which need not run again. Frames are known by identity and must not change.
    """
    known: dict[tuple[int, ...], tuple[Sequence[Frame], list[Detections]]] = {}

    def batch(frames: Sequence[Frame]) -> list[Detections]:
        key = tuple(map(id, frames))
        if key not in known:  # the frames are kept, so that their ids stay their own
            known[key] = (frames, _detect(detector, frames))
        return known[key][1]

    return batch


def run_traps(
    each: Sequence[Trap],
    reference: BatchDetector,
    candidate: BatchDetector,
    compare: Compare,
    progress: Progress | None = None,
    settle: Settle | None = None,
) -> list[TrapResult]:
    """Give each trap's batches to the candidate and compare with the reference, frame by frame.

    The reference sees its frames one at a time, so that nothing can leak between them there, unless they are
    padded to a canvas that none of them has alone. A frame that
    several traps share goes through each detector once. An ``AnchorlineError`` of either is a failed trap;
    anything else is a bug and goes on.
    """
    ours, theirs = once_each(reference), once_each(candidate)
    results = []
    for trap in each:
        side, images = "reference", len(trap.frames)
        try:
            apart = all(_same_canvas(reference.contract, batch) for batch in trap.batches)
            batches = [[frame] for frame in trap.frames] if apart else trap.batches
            expected = [one for batch in batches for one in ours(batch)]
            side = "candidate"
            found = [one for batch in trap.batches for one in theirs(batch)]
            again = [one for batch in trap.batches if trap.repeated for one in _detect(candidate, batch)]
            alone = trap.alone and apart
            single = [theirs([frame])[0] for frame in trap.frames if alone]
        except AnchorlineError as error:
            results.append(TrapResult(trap.name, False, f"the {side} failed: {error}", images))
        else:
            summary = compare(expected, found)
            fault = _unstable(found, again) if trap.repeated else None
            if fault is None and alone:
                together = compare(single, found)
                if not together.agrees:
                    first = together.first_disagreement
                    fault = f"the batch changes a result that the frame has alone: {first}"
            settled = ""
            if fault is None and not summary.agrees:
                frames = zip(trap.frames, expected, found, strict=True)
                differing = [frame for frame, one, other in frames if not compare([one], [other]).agrees]
                # On a picture without content most scores are nearly equal; which win is any runtime's own.
                if settle is not None and differing and all(map(settle, differing)):
                    settled = "; given the same proposals every stage agrees: near-ties among them"
                else:
                    fault = summary.first_disagreement
            detail = fault or summary.describe() + settled
            results.append(TrapResult(trap.name, fault is None, detail, images, summary))
        if progress is not None:
            progress(len(results), len(each))
    return results


def _same_canvas(contract: Contract, frames: Sequence[Frame]) -> bool:
    """Whether each frame has, alone, the canvas that it has in a batch of all."""
    sizes = {(frame.shape[0], frame.shape[1]) for frame in frames}
    return contract.canvas is not None or len({frame_canvas(size, contract) for size in sizes}) == 1


def _detect(detector: BatchDetector, frames: Sequence[Frame]) -> list[Detections]:
    found = detector.batch(frames)
    if len(found) != len(frames):
        raise SettingsError(f"{len(found)} results for {len(frames)} frames; expected one each")
    return found


def _unstable(first: list[Detections], again: list[Detections]) -> str | None:
    """Where a second call did not give the same bits."""
    for number, (one, other) in enumerate(zip(first, again, strict=True), start=1):
        if len(one) != len(other):
            return f"image {number}: {len(one)} detections, and {len(other)} when called again"
        for name in ("labels", "scores", "boxes"):
            before, after = getattr(one, name), getattr(other, name)
            if before.tobytes() != after.tobytes():
                error = float(np.abs(before - after).max())
                return f"image {number}: {name} differ by up to {error:.2g} when called again"
    return None
