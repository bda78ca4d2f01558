"""Stored proposals: JSON lines, one line an image, that any text tool opens.

    {"id": "BloodImage_00000", "size": [480, 640], "boxes": [[x1, y1, x2, y2], ...], "scores": [...]}

``size`` is the image's [height, width]; boxes are in its pixels, to a hundredth, in falling order of
their scores. Recall, training on given proposals and evaluation with them read the same file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.data.dataset import Dataset
from anchorline.runtime.canvas import PROPOSAL_NAMES
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import DataError, SettingsError, reason_of
from anchorline.runtime.io.files import atomic_path, expect_regular, json_text

_BOX_DECIMALS, _SCORE_DECIMALS = 2, 5
_LEAST_SIDE = 2  # pixels of the image; OpenCV's selective search also finds single rows of pixels
_EDGE = 0.01  # pixels that rounding may move a box past the image's edge
_REMEDY = "write it again with anchorline proposals"


@dataclass(frozen=True, eq=False)
class ImageProposals:
    """The proposals of the image ``id`` of (height, width) ``size``.

    ``boxes`` float32 [P, 4] xyxy in its pixels, ``scores`` float32 [P] in falling order.
    """

    id: str
    size: tuple[int, int]
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]

    def to_detections(self) -> Detections:
        """The same as detections of the one class ``object``."""
        labels = np.zeros(len(self.boxes), np.int64)
        return Detections(self.boxes, self.scores, labels, PROPOSAL_NAMES, size=self.size)


def write_proposals(
    path: Path, data: Dataset, proposals: Iterable[Detections], count: int | None = None
) -> int:
    """Write the ``count`` best proposals (None: all) of every image of ``data``, in its order; all or
    nothing. Returns the number of boxes."""
    boxes = 0
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for image, found in zip(data, proposals, strict=True):
            order = np.argsort(-found.scores, kind="stable")[:count]
            boxes += len(order)
            record = {
                "id": image.id,
                "size": [int(side) for side in image.size],
                "boxes": [[round(v, _BOX_DECIMALS) for v in box] for box in found.boxes[order].tolist()],
                "scores": [round(score, _SCORE_DECIMALS) for score in found.scores[order].tolist()],
            }
            file.write(json_text(record, allow_nan=False) + "\n")
    return boxes


def read_proposals(path: Path, data: Dataset) -> tuple[ImageProposals, ...]:
    """The proposals of each image of ``data``, in its order; the file may hold other images too.

    Raises ``DataError`` of one line for a file that is missing or damaged, that lacks an image, holds
    one twice or has another size for it.
    """
    found = _read_lines(path)
    if [each.id for each in found] != [image.id for image in data]:
        known = {each.id: each for each in found}
        if len(known) < len(found):
            twice = next(id for id, count in Counter(each.id for each in found).items() if count > 1)
            raise DataError(
                f"{path}: holds image {twice!r} more than once; expected each image once; {_REMEDY}"
            )
        missing = [image.id for image in data if image.id not in known]
        if missing:
            raise DataError(
                f"{path}: has no line for {len(missing)} of {len(data)} images of {data.spec}, first "
                f"{missing[0]!r}; {_REMEDY} from this data"
            )
        found = [known[image.id] for image in data]
    for each, image in zip(found, data, strict=True):
        if each.size != tuple(image.size):
            raise DataError(
                f"{path}: image {each.id!r} is {each.size[0]}x{each.size[1]} there, and "
                f"{image.size[0]}x{image.size[1]} in {data.spec} (height x width); {_REMEDY} from this data"
            )
    return tuple(found)


def _read_lines(path: Path) -> list[ImageProposals]:
    expect_regular(path, DataError)
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; expected stored proposals, as anchorline proposals writes them"
        )
    found = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    found.append(_checked(json.loads(line)))
                except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
                    missing = isinstance(error, KeyError)
                    reason = f"{error.args[0]!r} is missing" if missing else reason_of(error)
                    raise DataError(
                        f"{path}: line {number} holds no proposals ({reason}); {_REMEDY}"
                    ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as stored proposals ({error}); {_REMEDY}") from None
    return found


def _checked(record: Any) -> ImageProposals:
    """One line's content; raises ``ValueError``, ``TypeError`` or ``KeyError`` where it is none."""
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}, expected an object")
    id, size = record["id"], record["size"]
    if not isinstance(id, str):
        raise ValueError(f"id is {id!r}, expected text")
    if not isinstance(size, list) or len(size) != 2 or not all(type(s) is int and s > 0 for s in size):
        raise ValueError(f"size is {size!r}, expected [height, width]")
    boxes = np.asarray(record["boxes"], np.float32).reshape(-1, 4)
    scores = np.asarray(record["scores"], np.float32)
    if scores.shape != (len(boxes),) or len(boxes) != len(record["boxes"]):
        raise ValueError(
            f"{len(record['boxes'])} boxes and {scores.size} scores, expected one each of 4 numbers"
        )
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise ValueError("numbers that are not finite")
    inside = (boxes >= -_EDGE).all() and (boxes <= np.tile(size[::-1], 2) + _EDGE).all()
    if not inside or (boxes[:, 2:] < boxes[:, :2]).any():
        raise ValueError(f"boxes that are not x1, y1, x2, y2 inside an image of {size[0]}x{size[1]}")
    order = np.argsort(-scores, kind="stable")
    return ImageProposals(id, (size[0], size[1]), boxes[order], scores[order])


class SelectiveSearch:
    """Proposals without learning (Uijlings et al., 2013), as Fast R-CNN trained on, by OpenCV.

    ``batch(frames)`` gives up to ``count`` proposals a frame, in OpenCV's order. OpenCV gives no scores:
    they fall evenly from 1, with the rank, which OpenCV draws in part at random, so that two runs differ.
    Raises ``SettingsError`` without the contrib build.
    """

    def __init__(self, count: int = 2000) -> None:
        if not hasattr(cv2, "ximgproc"):
            raise SettingsError(
                "selective search needs OpenCV's contrib build, and the installed one has no ximgproc; "
                "pip install opencv-contrib-python-headless in place of opencv-python-headless"
            )
        self.count = count

    def batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Proposals of each BGR frame [H, W, 3], boxes in its pixels."""
        results = []
        segmentation = cv2.ximgproc.segmentation  # type: ignore[attr-defined]
        for frame in frames:
            search = segmentation.createSelectiveSearchSegmentation()
            search.setBaseImage(frame)
            search.switchToSelectiveSearchFast()
            boxes = np.asarray(search.process(), np.float32).reshape(-1, 4)  # x, y, width, height
            boxes = boxes[(boxes[:, 2:] >= _LEAST_SIDE).all(axis=1)][: self.count]
            boxes[:, 2:] += boxes[:, :2]
            height, width = frame.shape[:2]
            boxes = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
            scores = (1.0 - np.arange(len(boxes)) / self.count).astype(np.float32)
            results.append(ImageProposals("", (height, width), boxes, scores).to_detections())
        return results
