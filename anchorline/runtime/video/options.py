"""What can be asked of a detection run: each option written once, for the command, Python and a cluster.

The command reads its options from the fields before a verb runs, so nothing heavy is imported at the top.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypeGuard,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from anchorline.runtime.io.errors import SettingsError, check_choice, shown

if TYPE_CHECKING:
    from anchorline.runtime.detections import Detections
    from anchorline.runtime.detector import Detector

Provider = Literal["auto", "cpu", "openvino", "cuda", "tensorrt", "tensorrt-rtx"]
CpuPrecision = Literal["auto", "fp32", "bf16"]
Policy = Literal["wait", "latest"]
Decoder = Literal["opencv", "pyav"]
Polygon = tuple[tuple[float, float], ...]
_MIN_CORNERS = 3
LEAST_SLICE = 64  # pixels of a side


@dataclass(frozen=True)
class Option:
    """What a field means, and how the command writes it: as ``--name`` or ``flag``, where it has a ``help``.

    ``low`` and ``high`` bound a number: a whole one, one with both bounds, or else seconds. ``parse`` makes
    the field's value of the texts of an option that may be repeated.
    """

    help: str = ""
    low: float | None = None
    high: float | None = None
    flag: str | None = None
    metavar: str | None = None
    parse: Callable[..., Any] | None = None


def option_fields(kind: type) -> dict[str, tuple[Any, Option | None]]:
    """The fields of a dataclass by name: the type, and the ``Option`` that it is annotated with."""
    found = {}
    plain = get_type_hints(kind)
    for name, hint in get_type_hints(kind, include_extras=True).items():
        stated = (each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Option))
        found[name] = plain[name], next(stated, None)
    return found


def parse_classes(texts: Iterable[str]) -> tuple[str, ...]:
    """``["person,car", "dog"]`` as ``("person", "car", "dog")``."""
    return tuple(name.strip() for text in texts for name in text.split(",") if name.strip())


def parse_min_scores(texts: Iterable[str]) -> dict[str, float]:
    """``["0.3", "person=0.6"]`` as ``{"": 0.3, "person": 0.6}``; else ``SettingsError``."""
    found: dict[str, float] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        found[name.strip()] = _number(number, f"the lowest score {text!r}; expected 0.5 or CLASS=0.5")
    return found


def parse_regions(texts: Iterable[str]) -> tuple[Polygon, ...]:
    """See ``parse_region``."""
    return tuple(map(parse_region, texts))


def parse_region(text: str) -> Polygon:
    """``"0,0.5 1,0.5 1,1 0,1"`` as a polygon; four numbers ``"x1,y1,x2,y2"`` are a rectangle."""
    complaint = f"region {text!r}; expected fractions of the frame, x1,y1,x2,y2 or x,y x,y x,y ..."
    corners = [[_number(part, complaint) for part in corner.split(",")] for corner in text.split()]
    if len(corners) == 1 and len(corners[0]) == 4:
        x1, y1, x2, y2 = corners[0]
        return ((x1, y1), (x2, y1), (x2, y2), (x1, y2))
    if len(corners) < _MIN_CORNERS or any(len(corner) != 2 for corner in corners):
        raise SettingsError(complaint)
    return tuple((x, y) for x, y in corners)


def _number(text: str, complaint: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise SettingsError(complaint) from None
    if not math.isfinite(value):
        raise SettingsError(complaint)
    return value


@dataclass(frozen=True)
class Filters:
    """What to keep of a detector's results: a function of one frame's detections.

    ``classes`` are the names to keep (empty: all). ``min_scores`` maps class names to the lowest
    score; the key ``""`` is for every class that is not named. A detection is kept when the centre of
    its box lies in one of the ``regions`` (empty: anywhere), polygons of (x, y) as fractions of the
    frame's width and height from 0 to 1, so that one region fits every size of picture. Then the
    ``max_detections`` of highest score are kept.
    """

    classes: Annotated[
        tuple[str, ...],
        Option("Keep these classes; may be repeated.", metavar="A,B,...", parse=parse_classes),
    ] = ()
    min_scores: Annotated[
        Mapping[str, float],
        Option(
            "Keep scores from this on; may be repeated.",
            flag="--min-score",
            metavar="[CLASS=]SCORE",
            parse=parse_min_scores,
        ),
    ] = field(default_factory=dict)
    regions: Annotated[
        tuple[Polygon, ...],
        Option(
            "Keep boxes whose centre lies in it, in fractions of the frame; may be repeated.",
            flag="--region",
            metavar="X1,Y1,X2,Y2|X,Y X,Y X,Y",
            parse=parse_regions,
        ),
    ] = ()
    max_detections: Annotated[int | None, Option("Keep the best N of a frame.", low=1)] = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name in (*self.classes, *self.min_scores):
            if not isinstance(name, str):
                raise SettingsError(f"the class {shown(name)}; expected a name")
        for name, score in self.min_scores.items():
            if not is_share(score):
                raise SettingsError(
                    f"the lowest score{f' of {name}' if name else ''} is {shown(score)}; expected 0 to 1"
                )
        for region in self.regions:
            if not _is_polygon(region):
                raise SettingsError(
                    f"region {shown(region)}; expected at least three corners (x, y) as fractions from 0 to 1"
                )

    def check_names(self, names: Sequence[str]) -> None:
        """Raise ``SettingsError`` for a class that a model with these class names does not know."""
        for name in (*self.classes, *self.min_scores):
            if name and names and name not in names:
                raise SettingsError(f"the model knows no class {name!r}; it knows {', '.join(names)}")

    def __call__(self, detections: Detections, size: tuple[int, int]) -> Detections:
        """The detections to keep, in their order; ``size`` is the frame's (height, width)."""
        import cv2
        import numpy as np

        kept = np.ones(len(detections), bool)
        if self.classes:
            kept &= np.array([name in self.classes for name in detections.names], bool)
        if self.min_scores:
            general = self.min_scores.get("", 0.0)
            lowest = [self.min_scores.get(name, general) for name in detections.names]
            kept &= detections.scores >= np.array(lowest, np.float32)
        if self.regions:
            scale = np.array([size[1], size[0]], np.float32)
            areas = [np.array(region, np.float32) * scale for region in self.regions]
            centres = ((detections.boxes[:, :2] + detections.boxes[:, 2:]) / 2).tolist()
            inside = [any(cv2.pointPolygonTest(area, xy, False) >= 0 for area in areas) for xy in centres]
            kept &= np.array(inside, bool)
        if self.max_detections is not None and kept.sum() > self.max_detections:
            order = np.argsort(-np.where(kept, detections.scores, -np.inf), kind="stable")
            kept[order[self.max_detections :]] = False
        return detections if kept.all() else detections[kept]


@dataclass(frozen=True)
class TrackOptions:
    """How objects are followed.

    A track begins with a detection of at least ``new_score`` that is found again in the next frame,
    from when on it has its id. It goes on with detections of at least ``low_score`` that overlap the place
    where it is expected by an IoU of ``min_iou``, and ends after ``lost_seconds`` without any (but not
    before the third frame without it). ``by_class`` keeps the classes apart, so that a dog that passes
    behind a cat takes no cat's id; without it an object keeps its id when the model changes its mind
    about the class. Raises ``SettingsError``.
    """

    new_score: Annotated[float, Option(low=0, high=1)] = 0.5
    low_score: Annotated[float, Option(low=0, high=1)] = 0.1
    min_iou: Annotated[float, Option(low=0, high=1)] = 0.2
    lost_seconds: float = 2.0
    by_class: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0.0 < self.lost_seconds < math.inf:
            raise SettingsError(f"lost_seconds is {self.lost_seconds!r}; expected seconds above 0")


@dataclass(frozen=True)
class SliceOptions:
    """How large frames are looked at in slices (``runtime/slices.py``, docs/slicing.md).

    Slices have ``height`` and ``width`` in pixels of the frame; ``width`` is ``height`` where it is left out,
    and without either they are derived from the objects that the model was trained on. Objects up to
    ``overlap`` times a slice's side are whole in one of them, larger ones in the whole frame, which is looked
    at as well with ``full``. Raises ``SettingsError``.
    """

    height: Annotated[int | None, Option(low=LEAST_SLICE)] = None
    width: Annotated[int | None, Option(low=LEAST_SLICE)] = None
    overlap: Annotated[
        float, Option("Share of a slice that the next one shows again; with --slice.", low=0, high=0.9)
    ] = 0.2
    full: Annotated[
        bool,
        Option("Look at the whole frame beside its slices; with --slice.", flag="--full/--no-full"),
    ] = True
    merge: Annotated[
        Literal["nms", "weighted"],
        Option("Of one object in several slices: the best box, or their mean weighted by score."),
    ] = "nms"
    merge_by: Annotated[
        Literal["ios", "iou"],
        Option("What tells that two boxes are one object: intersection over the smaller, or over the union."),
    ] = "ios"
    merge_threshold: Annotated[float, Option("From how much of that on.", low=0, high=1)] = 0.5
    # Views of frames in one run of the network at most: what bounds its memory.
    at_once: Annotated[int, Option(low=1)] = 8

    def __post_init__(self) -> None:
        if self.height is not None and self.width is None:
            object.__setattr__(self, "width", self.height)
        check_fields(self)
        if self.height is None and self.width is not None:
            raise SettingsError(
                f"slices have a width of {self.width} and no height; expected both, or neither"
            )


def parse_slices(text: str) -> dict[str, int]:
    """``"512x640"`` as height and width, ``"640"`` as both, ``"auto"`` as neither; else ``SettingsError``."""
    if text.strip().lower() == "auto":
        return {}
    height, cross, width = text.lower().partition("x")
    sides = [height, width if cross else height]
    if not all(side.isdecimal() and len(side) < 8 for side in sides):
        raise SettingsError(f"--slice is {text!r}; expected HEIGHTxWIDTH in pixels, such as 640x640, or auto")
    return dict(zip(("height", "width"), map(int, sides), strict=True))


Slices = Annotated[
    SliceOptions | None,
    Option(
        "Detect in slices of this size, which keep small objects, and merge what they show.",
        flag="--slice",
        metavar="HEIGHTxWIDTH|auto",
        parse=parse_slices,
    ),
]


@dataclass(frozen=True)
class DetectOptions:
    """The options of ``detect``, ``VideoPipeline`` and ``detect_on_cluster``; each says at its field what
    it means. Raises ``SettingsError`` for a value that cannot be used, or that needs a package which is
    not installed.

    ``provider``, ``measure``, ``score_threshold``, ``threads``, ``cpu_precision`` and ``slices`` are
    ``Detector``'s, for ``open_detector``; a detector that the caller opened keeps its own.
    """

    save: Annotated[
        str | Path | None, Option("Write annotated copies into this folder, or a single one to this file.")
    ] = None
    jsonl: Annotated[
        str | Path | None, Option("Write one JSON line a frame to this file; - is stdout, without tables.")
    ] = None
    provider: Annotated[
        Provider, Option("What runs the model; auto: a GPU, else what is quickest on the processor.")
    ] = "auto"
    measure: Annotated[
        bool | None,
        Option(
            "Time the providers of the processor when a model is first opened here, and remember the "
            "quickest; else it is assumed (default: as ANCHORLINE_MEASURE, 1 or 0, says, or 1).",
            flag="--measure/--no-measure",
        ),
    ] = None
    score_threshold: Annotated[
        float | None, Option("Leave out detections below this score (default: the model's own).")
    ] = None
    shown_score: Annotated[
        float,
        Option("Annotated copies show detections from this score on; the lines hold all.", low=0, high=1),
    ] = 0.5
    threads: Annotated[int | None, Option("Threads of the network (default: one a core).", low=1)] = None
    cpu_precision: Annotated[
        CpuPrecision,
        Option("Arithmetic on a processor; auto: bf16 where it and the provider compute it natively."),
    ] = "auto"
    policy: Annotated[
        Policy | None, Option("wait: every frame (files); latest: drop what is late (cameras, streams).")
    ] = None
    batch: Annotated[
        int | None, Option("Frames detected together at most (default: one a source).", low=1)
    ] = None
    max_wait: Annotated[
        float, Option("Seconds that a frame waits at most for others of its batch.", low=0)
    ] = 0.01
    slices: Slices = None
    # Threads that call the detector. By default it is one, which gives live sources the lowest age; where
    # every source waits, it is as many as the detector says in `concurrent_calls`.
    workers: Annotated[int | None, Option(low=1)] = None
    filters: Filters = field(default_factory=Filters)
    stride: Annotated[int, Option("Take one frame in N.", low=1)] = 1
    # True, or TrackOptions. Tracks come before the filters: what these hide still holds its track together.
    track: Annotated[
        bool | TrackOptions, Option("Give each object an id that it keeps from frame to frame.")
    ] = False
    trails: Annotated[bool, Option("Draw where tracked objects have been; with --track.")] = False
    decoder: Annotated[Decoder, Option("What reads videos and streams.")] = "opencv"
    stall: Annotated[
        float, Option("Open a live source again that delivers nothing for N seconds.", low=0.1)
    ] = 10.0
    # Seconds to wait for a first frame, while no source has delivered any.
    patience: Annotated[float, Option(low=0)] = 20.0
    # Where the age of results over time and the stages are drawn: a .png, .svg or .pdf.
    report: str | Path | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.trails and not self.track:
            raise SettingsError("trails are those of tracks; turn tracking on as well (track=True, --track)")
        # Before the work: some options need packages that the base does not have.
        if self.decoder == "pyav":
            from anchorline.runtime.video.reader import import_pyav

            import_pyav()
        if self.track:
            from anchorline.runtime.video.tracks import import_byte_track

            import_byte_track()
        if self.report is not None:
            from anchorline.runtime.video.display import check_plot

            check_plot(self.report, "report")

    def open_detector(self, model: str | Path, tuning: str = "latency") -> Detector:
        """A ``Detector`` of these options; ``tuning`` is ``CpuOptions``'s."""
        from anchorline.runtime.detector import Detector

        return Detector(
            *(model, self.provider, self.score_threshold, self.threads),
            cpu_precision=self.cpu_precision,
            tuning=tuning,
            slices=self.slices,
            measure=self.measure,
        )


def is_number(value: object) -> TypeGuard[float]:
    """Whether this is an int or a float, which a bool is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_share(value: object) -> bool:
    """Whether this is a number from 0 to 1."""
    return is_number(value) and 0.0 <= value <= 1.0


def _is_polygon(value: object) -> bool:
    """Whether this is a sequence of corners, each a pair of shares."""
    if not isinstance(value, Sequence) or len(value) < _MIN_CORNERS:
        return False
    return all(isinstance(each, Sequence) and len(each) == 2 and all(map(is_share, each)) for each in value)


def check_fields(options: object) -> None:
    """Raise ``SettingsError`` for what is not of its field's type, or a number beyond its bounds.

    A list where a tuple is expected becomes one. What containers hold is not looked at.
    """
    for name, (hint, about) in option_fields(type(options)).items():
        value = getattr(options, name)
        kinds = get_args(hint) if isinstance(hint, UnionType) or get_origin(hint) is Union else (hint,)
        if value is None and NoneType in kinds:
            continue
        words = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), None)
        if words is not None:
            check_choice(name, value, words)
            continue
        low, high = (about.low, about.high) if about else (None, None)
        if low is None:
            classes = tuple(get_origin(kind) or kind for kind in kinds)
            if tuple in classes and isinstance(value, list):
                object.__setattr__(options, name, tuple(value))
            elif not (is_number(value) if float in classes else isinstance(value, classes)):
                known = " or ".join(each.__name__ for each in classes if each is not NoneType)
                raise SettingsError(f"{name} is {shown(value)}; expected {known}")
            continue
        if int in kinds:
            wanted = f"a whole number of at least {low}"
        elif high is not None:
            wanted = f"a number from {low:g} to {high:g}"
        else:
            high = threading.TIMEOUT_MAX
            wanted = f"seconds from {low:g} to {high:.0e}"
        fits = is_number(value) and (isinstance(value, int) or int not in kinds)
        if not fits or not low <= value <= (sys.float_info.max if high is None else high):
            raise SettingsError(f"{name} is {shown(value)}; expected {wanted}")
