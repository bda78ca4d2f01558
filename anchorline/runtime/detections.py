"""What a detector found in one frame, as a validated NumPy dataclass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from anchorline.runtime.io.errors import DataError, SettingsError

if TYPE_CHECKING:
    import supervision

NO_TRACK = -1  # the track id of a detection that belongs to no track
_BOX_DECIMALS = 2  # a hundredth of a pixel
_SCORE_DECIMALS = 5


@dataclass(frozen=True, eq=False)
class Detections:
    """The objects found in one frame.

    ``boxes`` float32 [N, 4] are xyxy in pixels of the source frame with continuous edges (a box
    that covers the first pixel only is 0, 0, 1, 1); ``scores`` float32 [N]; ``labels`` int64 [N]
    index ``class_names``. ``category_ids`` are the COCO ids of ``class_names`` where known, and
    ``size`` is the (height, width) of the frame. ``track_ids`` int64 [N], where objects were tracked,
    say which of them are one object through a video; -1 is none. Lists are converted; anything that
    does not fit raises ``DataError``.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...] = ()
    category_ids: tuple[int, ...] | None = None
    size: tuple[int, int] | None = None
    track_ids: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        boxes = _as_array("boxes", self.boxes, np.float32)
        if boxes.size == 0 and boxes.ndim <= 2:
            boxes = boxes.reshape(0, 4)
        converted = {
            "boxes": boxes,
            "scores": _as_array("scores", self.scores, np.float32),
            "labels": _as_array("labels", self.labels, np.int64),
            "class_names": tuple(self.class_names),
            "category_ids": None if self.category_ids is None else tuple(self.category_ids),
            "track_ids": None if self.track_ids is None else _as_array("track_ids", self.track_ids, np.int64),
        }
        for name, value in converted.items():
            object.__setattr__(self, name, value)
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise DataError(f"Expected boxes of shape [N, 4], got {list(boxes.shape)}")
        reversed_boxes = (boxes[:, 2:] < boxes[:, :2]).any(axis=1)
        if reversed_boxes.any():
            index = int(reversed_boxes.argmax())
            raise DataError(
                f"Expected boxes as x1, y1, x2, y2 with x2 >= x1 and y2 >= y1, "
                f"got {boxes[index].tolist()} at index {index}"
            )
        for name, lowest in (("scores", -np.inf), ("labels", 0), ("track_ids", NO_TRACK)):
            values = getattr(self, name)
            if values is not None and values.shape != (len(self),):
                raise DataError(
                    f"Expected {name} of shape [{len(self)}], one for each box, got {list(values.shape)}"
                )
            if values is not None and len(values) and values.min() < lowest:
                raise DataError(f"Expected {name} of at least {lowest}, got {int(values.min())}")
        names, ids = self.class_names, self.category_ids
        if names and len(self) and self.labels.max() >= len(names):
            raise DataError(
                f"Expected labels below {len(names)}, the number of class names, got {int(self.labels.max())}"
            )
        if ids is not None and len(ids) != len(names):
            raise DataError(f"Expected {len(names)} category ids, one for each class name, got {len(ids)}")

    @classmethod
    def empty(
        cls,
        class_names: tuple[str, ...] = (),
        category_ids: tuple[int, ...] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Detections:
        """No detections at all."""
        none = np.zeros(0, np.float32)
        return cls(none, none, none.astype(np.int64), class_names, category_ids, size)

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Any) -> Detections:
        """The detections at ``index``: a boolean mask [N], indices, a slice or one number."""
        rows = [index] if isinstance(index, int | np.integer) else index
        if not isinstance(rows, slice):
            rows = np.asarray(rows)
            if rows.dtype == bool and rows.shape != (len(self),):
                raise DataError(f"Expected a mask of shape [{len(self)}], got {list(rows.shape)}")
            if rows.size == 0:
                rows = rows.astype(np.int64)
        return replace(
            self,
            boxes=self.boxes[rows],
            scores=self.scores[rows],
            labels=self.labels[rows],
            track_ids=None if self.track_ids is None else self.track_ids[rows],
        )

    @property
    def names(self) -> list[str]:
        """The class name of each detection; its label as text where the class names are not known."""
        names = self.class_names
        return [names[label] if names else str(label) for label in self.labels.tolist()]

    def to_supervision(self) -> supervision.Detections:
        """The same as ``supervision.Detections``: the class names are ``data["class_name"]``, the track ids
        ``tracker_id``."""
        try:
            import supervision
        except ImportError as error:
            raise SettingsError(
                f"to_supervision() needs the package supervision ({error}); pip install supervision"
            ) from error
        return supervision.Detections(
            xyxy=self.boxes.copy(),
            confidence=self.scores.copy(),
            class_id=self.labels.copy(),
            tracker_id=None if self.track_ids is None else self.track_ids.copy(),
            data={"class_name": np.array(self.names, dtype=np.str_)},
        )

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """COCO result records: ``bbox`` is x, y, width, height; ``category_id`` is label + 1 if unknown."""
        ids = self.category_ids
        return [
            {
                "image_id": image_id,
                "category_id": label + 1 if ids is None else ids[label],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
            }
            for (x1, y1, x2, y2), score, label in self._rows()
        ]

    def to_records(self) -> list[dict[str, Any]]:
        """One plain dict for each detection, as in a line of the detections JSON lines."""
        tracks = [NO_TRACK] * len(self) if self.track_ids is None else self.track_ids.tolist()
        return [
            {
                "box": [round(edge, _BOX_DECIMALS) for edge in box],
                "score": round(score, _SCORE_DECIMALS),
                "label": label,
                "name": name,
                "track_id": None if track == NO_TRACK else track,
            }
            for (box, score, label), name, track in zip(self._rows(), self.names, tracks, strict=True)
        ]

    def _rows(self) -> list[tuple[list[float], float, int]]:
        return list(zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), strict=True))


def _as_array(name: str, values: ArrayLike, dtype: type[np.generic]) -> NDArray[Any]:
    """float32 without NaN and infinities, or int64 of whole numbers only."""
    whole = dtype is np.int64
    try:
        given = np.asarray(values) if whole else np.asarray(values, dtype)
        array = given.astype(dtype, copy=whole)
    except (TypeError, ValueError):
        text = repr(values)
        got = text if len(text) <= 60 else f"a {type(values).__name__}"
        expected = "whole numbers" if whole else "numbers"
        raise DataError(f"Expected {name} as an array of {expected}, got {got}") from None
    if whole and not np.array_equal(array, given):
        raise DataError(f"Expected {name} as whole numbers, got {given[array != given].flat[0]}")
    if not whole and not np.isfinite(array).all():
        raise DataError(f"Expected finite {name}, got {array[~np.isfinite(array)].flat[0]}")
    return array
