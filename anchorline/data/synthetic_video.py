"""A generated video: objects cross one scene, turn, cover each other and keep their identity.

Frame ``i`` depends on the seed and ``i`` alone, so frames can be drawn in any order. Each slot of
the scene holds one shape at a time; when it has left, the next one enters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.data import synthetic
from anchorline.data.boxes import clip_labelled_boxes
from anchorline.data.dataset import Dataset, LabelledImage
from anchorline.data.synthetic import CLASS_NAMES, MIN_VISIBLE, NO_OBJECT, SCENE_SIZE, Image, Pose, Shape
from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.video.writer import VideoWriter

_OBJECT_SLOTS = len(CLASS_NAMES)  # each round of tracks shows every class once
_DISTRACTOR_SLOTS = 3
_SCENE_STREAM, _DECK_STREAM, _FRAME_STREAM = 2, 3, 4
_SWAY = 6.0  # pixels the camera moves each way, in an image 240 high
_NOISE, _BLUR = 4.0, 0.4
_WAY_TRIES = 6
_CROWDING_STEP = 6


@dataclass(frozen=True)
class VideoTruth:
    """The objects of one frame: boxes float32 [N, 4], labels and ids int64 [N].

    An id belongs to one object for as long as it is in the scene. ``visible`` float64 [N] is the share of
    each that shows.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    ids: NDArray[np.int64]
    visible: NDArray[np.float64]


def write_video(
    path: str | Path, seed: int, frames: int, size: tuple[int, int] = SCENE_SIZE, fps: float = 25.0
) -> None:
    """Write a generated video to ``path``; ``synthetic_video_dataset`` is its ground truth."""
    video = _video(seed, size, frames)
    with VideoWriter(path, size, fps) as writer:
        for index in range(frames):
            writer.write(video.frame(index))


def synthetic_video_dataset(seed: int, frames: int, size: tuple[int, int] = SCENE_SIZE) -> Dataset:
    """The frames of a video as labelled images, drawn when loaded.

    Objects that show less than ``MIN_VISIBLE``, as when they enter or pass behind another, are
    marked difficult: an evaluation neither asks for them nor counts them as mistakes.
    """
    video = _video(seed, size, frames)
    images = []
    for index in range(frames):
        truth, id = video.truth(index), f"video-{seed}-{index:06d}"
        difficult = truth.visible < MIN_VISIBLE
        crowd = np.zeros_like(difficult)
        load = partial(_video_pixels, seed, size, index)
        images.append(LabelledImage(id, size, truth.boxes, truth.labels, difficult, crowd, load))
    return Dataset(f"synthetic video of {frames} frames, seed {seed}", CLASS_NAMES, tuple(images))


@lru_cache(maxsize=4)
def _cached_video(seed: int, size: tuple[int, int]) -> SyntheticVideo:
    return SyntheticVideo(seed, size)


def _video(seed: int, size: tuple[int, int], frames: int) -> SyntheticVideo:
    if frames < 1:
        raise SettingsError(f"frames is {frames}; expected at least 1")
    return _cached_video(seed, size)


def _video_pixels(seed: int, size: tuple[int, int], index: int) -> NDArray[np.uint8]:
    return _cached_video(seed, size).frame(index)


@dataclass(frozen=True, eq=False)
class _Track:
    """One shape's way through the scene, from outside one edge to outside the opposite one."""

    id: int
    shape: Shape
    texture: Image
    radius: float
    entry: NDArray[np.float64]
    exit: NDArray[np.float64]
    first: float
    duration: float
    angle: float
    spin: float
    wobble: float

    @property
    def last(self) -> float:
        return self.first + self.duration

    def pose(self, index: float) -> Pose:
        done = (index - self.first) / self.duration
        x, y = self.entry + (self.exit - self.entry) * done
        swing = self.wobble * np.sin(2 * np.pi * done * 1.5)
        along_x = abs(self.exit[0] - self.entry[0]) > abs(self.exit[1] - self.entry[1])
        x, y = (x, y + swing) if along_x else (x + swing, y)
        radius = self.radius * float(1.0 + 0.08 * np.sin(2 * np.pi * done * 2))
        return Pose(float(x), float(y), radius, self.angle + self.spin * (index - self.first))

    def placed(self, index: int) -> synthetic.Placed:
        return synthetic.place(self.shape, self.pose(index))


class SyntheticVideo:
    """A moving scene; ``frame`` and ``truth`` give the picture and the objects of any frame."""

    def __init__(self, seed: int, size: tuple[int, int] = SCENE_SIZE) -> None:
        """``size`` is (height, width) in pixels, at least 64 each."""
        synthetic.check_size(size)
        self.seed, self.size = seed, size
        rng = np.random.Generator(np.random.PCG64([_SCENE_STREAM, seed]))
        self._sway = _SWAY * min(size) / 240
        self._margin = int(np.ceil(self._sway)) + 1
        height, width = (side + 2 * self._margin for side in size)
        self._background = synthetic.background(rng, (height, width))
        self._colours = synthetic.mean_colours(self._background, cells=3)
        self._light = synthetic.light_field(rng, size)
        self._shadow = (rng.uniform(-3.0, 3.0), rng.uniform(1.0, 3.0))
        self._phases = rng.uniform(0, 2 * np.pi, 2)
        self._rng = rng
        self._slots: list[list[_Track]] = [[] for _ in range(_OBJECT_SLOTS + _DISTRACTOR_SLOTS)]

    def frame(self, index: int) -> NDArray[np.uint8]:
        """The picture of frame ``index``, uint8 BGR [H, W, 3]."""
        height, width = self.size
        dx = self._margin + self._sway * np.sin(index / 23.0 + self._phases[0])
        dy = self._margin + self._sway * np.sin(index / 31.0 + self._phases[1])
        shift = np.array([[1.0, 0.0, -dx], [0.0, 1.0, -dy]])  # of the swaying camera
        image = np.asarray(cv2.warpAffine(self._background, shift, (width, height)), dtype=np.float32)
        for track in self._tracks(index):
            synthetic.paint(image, track.placed(index), track.texture, self._shadow)
        image *= self._light * np.float32(1.0 + 0.03 * np.sin(index / 9.0))
        rng = np.random.Generator(np.random.PCG64([_FRAME_STREAM, self.seed, index]))
        return synthetic.camera_image(rng, image, _BLUR, _NOISE)

    def truth(self, index: int) -> VideoTruth:
        """The objects of frame ``index`` of which at least one pixel shows."""
        tracks = self._tracks(index)
        layers = [track.placed(index) for track in tracks]
        visible = np.array(synthetic.visible_fractions(layers, self.size))
        labels = np.array([track.shape.label for track in tracks], dtype=np.int64)
        shown = (labels != NO_OBJECT) & (visible > 0)
        ids = np.array([track.id for track in tracks], dtype=np.int64)[shown]
        whole = np.array([placed.box for placed in layers], dtype=np.float64)
        boxes, kept, _ = clip_labelled_boxes(whole[shown], self.size)
        return VideoTruth(boxes, labels[shown][kept], ids[kept], visible[shown][kept])

    def _tracks(self, index: int) -> list[_Track]:
        """The tracks that are in the scene in frame ``index``, from back to front.

        Tracks are added until every slot reaches past the frame. The slot that ends first is always served
        first, so they do not depend on which frames are asked for, nor in which order.
        """
        while True:
            ends = [slot[-1].last if slot else -np.inf for slot in self._slots]
            if min(ends) > index:
                break
            slot = int(np.argmin(ends))
            self._slots[slot].append(self._next_track(slot))
        current = (next(track for track in reversed(slot) if track.first <= index) for slot in self._slots)
        # A fixed order that mixes objects and distractors.
        return sorted(current, key=lambda track: (track.id * 7919 % 101, track.id))

    def _next_track(self, slot: int) -> _Track:
        """A new shape, on the way (of several drawn) that runs into the others least."""
        rounds, label = len(self._slots[slot]), NO_OBJECT
        if slot < _OBJECT_SLOTS:  # classes are dealt like cards: every round of tracks shows each class once
            deck = np.random.Generator(np.random.PCG64([_DECK_STREAM, self.seed, rounds]))
            label = int(deck.permutation(_OBJECT_SLOTS)[slot])
        shape = synthetic.random_shape(self._rng, label)
        texture = synthetic.surface_texture(self._rng, synthetic.contrasting_colour(self._rng, self._colours))
        start = self._slots[slot][-1].last if rounds else None
        id = rounds * len(self._slots) + slot
        others = [track for tracks in self._slots for track in tracks]
        drawn = [self._random_track(id, shape, texture, start) for _ in range(_WAY_TRIES)]
        return min(drawn, key=partial(_crowding, others))

    def _random_track(self, id: int, shape: Shape, texture: Image, start: float | None) -> _Track:
        """A shape of random size on a random way across the scene, from frame ``start`` on."""
        rng, (height, width) = self._rng, self.size
        scale = min(height, width) / 240
        radius = synthetic.random_radius(rng, self.size)
        beyond = 1.3 * radius  # outside opposite edges, in either direction
        from_y, to_y = rng.uniform(0.12, 0.88, 2) * height
        from_x, to_x = rng.uniform(0.12, 0.88, 2) * width
        if rng.random() < width / (width + height):
            entry, exit = np.array([[-beyond, from_y], [width + beyond, to_y]])
        else:
            entry, exit = np.array([[from_x, -beyond], [to_x, height + beyond]])
        if rng.random() >= 0.5:
            entry, exit = exit, entry
        duration = float(np.hypot(*(exit - entry))) / (rng.uniform(1.6, 3.4) * scale)
        opening = -rng.uniform(0.15, 0.6) * duration  # the video opens with shapes already on their way
        return _Track(
            id,
            shape,
            texture,
            radius,
            entry,
            exit,
            first=opening if start is None else start,
            duration=duration,
            angle=rng.uniform(0.0, 2 * np.pi),
            spin=rng.uniform(-0.05, 0.05),
            wobble=rng.uniform(0.0, 14.0) * scale,
        )


def _crowding(others: list[_Track], track: _Track) -> float:
    """How deep and how long a track runs into others, sampled every few frames."""
    total = 0.0
    for index in np.arange(max(0.0, track.first), track.last, _CROWDING_STEP):
        here = track.pose(index)
        for other in others:
            if other.first <= index < other.last:
                there = other.pose(index)
                gap = np.hypot(here.x - there.x, here.y - there.y) / (here.radius + there.radius)
                total += max(0.0, 1.0 - float(gap)) ** 2
    return total
