"""What a detector found in one frame, as a validated NumPy dataclass."""

from __future__ import annotations

from dataclasses import dataclass
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
        boxes = _as_floats("boxes", self.boxes)
        if boxes.size == 0 and boxes.ndim <= 2:
            boxes = boxes.reshape(0, 4)
        scores = _as_floats("scores", self.scores)
        labels = _as_whole("labels", self.labels)
        object.__setattr__(self, "boxes", boxes)
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if self.category_ids is not None:
            object.__setattr__(self, "category_ids", tuple(self.category_ids))
        if self.track_ids is not None:
            object.__setattr__(self, "track_ids", _as_whole("track_ids", self.track_ids))
        self._check_boxes()
        self._check_shapes()
        self._check_names()

    def _check_boxes(self) -> None:
        if self.boxes.ndim != 2 or self.boxes.shape[1] != 4:
            raise DataError(f"Expected boxes of shape [N, 4], got {list(self.boxes.shape)}")
        reversed_boxes = (self.boxes[:, 2:] < self.boxes[:, :2]).any(axis=1)
        if reversed_boxes.any():
            index = int(reversed_boxes.argmax())
            raise DataError(
                f"Expected boxes as x1, y1, x2, y2 with x2 >= x1 and y2 >= y1, "
                f"got {self.boxes[index].tolist()} at index {index}"
            )

    def _check_shapes(self) -> None:
        count = len(self.boxes)
        for name, values in (("scores", self.scores), ("labels", self.labels), ("track_ids", self.track_ids)):
            if values is not None and values.shape != (count,):
                raise DataError(
                    f"Expected {name} of shape [{count}], one for each box, got {list(values.shape)}"
                )

    def _check_names(self) -> None:
        if len(self.labels) and self.labels.min() < 0:
            raise DataError(f"Expected labels of at least 0, got {int(self.labels.min())}")
        if self.track_ids is not None and len(self.track_ids) and self.track_ids.min() < NO_TRACK:
            raise DataError(f"Expected track_ids of at least {NO_TRACK}, got {int(self.track_ids.min())}")
        if self.class_names and len(self.labels) and self.labels.max() >= len(self.class_names):
            raise DataError(
                f"Expected labels below {len(self.class_names)}, the number of class names, "
                f"got {int(self.labels.max())}"
            )
        if self.category_ids is not None and len(self.category_ids) != len(self.class_names):
            raise DataError(
                f"Expected {len(self.class_names)} category ids, one for each class name, "
                f"got {len(self.category_ids)}"
            )

    @classmethod
    def empty(
        cls,
        class_names: tuple[str, ...] = (),
        category_ids: tuple[int, ...] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Detections:
        """No detections at all."""
        return cls(
            boxes=np.zeros((0, 4), np.float32),
            scores=np.zeros(0, np.float32),
            labels=np.zeros(0, np.int64),
            class_names=class_names,
            category_ids=category_ids,
            size=size,
        )

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
        return Detections(
            boxes=self.boxes[rows],
            scores=self.scores[rows],
            labels=self.labels[rows],
            class_names=self.class_names,
            category_ids=self.category_ids,
            size=self.size,
            track_ids=None if self.track_ids is None else self.track_ids[rows],
        )

    @property
    def names(self) -> list[str]:
        """The class name of each detection; its label as text where the class names are not known."""
        if not self.class_names:
            return [str(label) for label in self.labels.tolist()]
        return [self.class_names[label] for label in self.labels.tolist()]

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
        return [
            {
                "box": [round(edge, _BOX_DECIMALS) for edge in box],
                "score": round(score, _SCORE_DECIMALS),
                "label": label,
                "name": name,
                "track_id": track_id,
            }
            for (box, score, label), name, track_id in zip(
                self._rows(), self.names, self._track_numbers(), strict=True
            )
        ]

    def _track_numbers(self) -> list[int | None]:
        """The track of each detection, ``None`` where it has none."""
        if self.track_ids is None:
            return [None] * len(self)
        return [None if number == NO_TRACK else number for number in self.track_ids.tolist()]

    def _rows(self) -> list[tuple[list[float], float, int]]:
        return list(zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), strict=True))


def _as_floats(name: str, values: ArrayLike) -> NDArray[np.float32]:
    try:
        array = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError):
        raise DataError(f"Expected {name} as an array of numbers, got {_describe(values)}") from None
    if not np.isfinite(array).all():
        raise DataError(f"Expected finite {name}, got {array[~np.isfinite(array)].flat[0]}")
    return array


def _as_whole(name: str, values: ArrayLike) -> NDArray[np.int64]:
    try:
        array = np.asarray(values)
        whole = array.astype(np.int64)
    except (TypeError, ValueError):
        raise DataError(f"Expected {name} as an array of whole numbers, got {_describe(values)}") from None
    if not np.array_equal(whole, array):
        raise DataError(f"Expected {name} as whole numbers, got {array[whole != array].flat[0]}")
    return whole


def _describe(values: object) -> str:
    text = repr(values)
    return text if len(text) <= 60 else f"a {type(values).__name__}"
