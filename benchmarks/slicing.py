"""Slices against plain detection, and against SAHI over torchvision with the same weights and slices.

    python benchmarks/slicing.py shapes.safetensors cells.safetensors [--scenes 3] [--only WORDS]
    PYTHONPATH=folder python benchmarks/slicing.py shapes.safetensors --sahi 2 --only none

Scenes of 3840x2160, for a checkpoint of the demo generated ones with objects of 12 to 40 pixels, for one of
BCCD (in the folder that ``ANCHORLINE_SHARED`` names) six images of its test split at 0.4 of their size, which
makes platelets of 10 to 40 pixels, or with ``--crowded`` as many as there is room for. Plain detection is on
the checkpoint's own canvas, which the slices fill as well, and on larger ones. Every way has a process of its
own, whose memory is measured. The export for any frame size is looked for, or else left, beside the
checkpoint.

With ``--sahi N`` SAHI's own code (``pip install --target folder sahi shapely --no-deps``) works on N scenes
by turns with this project's: a box is alike where the other side has one of its class with an IoU of 0.9.
Rows go to ``results/slicing.csv`` and ``slicing_sahi.csv``; wall times want a quiet machine, and processor
times ``--threads 1``, for threads that wait for each other count as well.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from record import append_row

from anchorline.data.boxes import iou_matrix
from anchorline.data.dataset import Dataset, LabelledImage, load_dataset
from anchorline.data.synthetic import (
    CLASS_NAMES,
    Placed,
    Pose,
    background,
    camera_image,
    contrasting_colour,
    mean_colours,
    paint,
    place,
    random_shape,
    surface_texture,
)
from anchorline.evaluation.evaluation import report_detections
from anchorline.runtime import Detections, Detector, SliceOptions
from anchorline.runtime.backends.cpu_options import usable_cores
from anchorline.runtime.contract import ResizeRule
from anchorline.runtime.slices import Slicer

SIZE = (2160, 3840)
SIDES = (12.0, 40.0)  # pixels of an object's longer side
OBJECTS = 60
CELL_NAMES = ("Platelets", "RBC", "WBC")
CELL_IMAGE = (192, 256)  # of 480x640
CELL_IMAGES = 6  # so that there are fewer than the 100 objects that COCO's figures count
SCALE = 4 / 3  # at which both models see their objects as in training: that of a slice on the canvas
SHOWN_SCORE = 0.5
ALIKE = 0.9  # IoU


@dataclass(frozen=True)
class Way:
    """How frames are looked at: the detector's ``resize``, and in which slices, merged in other ways too."""

    name: str
    within: tuple[int, int] | None = None
    slices: SliceOptions | None = None
    merges: tuple[dict[str, str], ...] = ()

    def detector(self, model: Path, threads: int | None) -> Detector:
        """Without the slices."""
        resize = None if self.within is None else ResizeRule(within=self.within)
        return Detector(model, "cpu", threads=threads, resize=resize)


@dataclass(frozen=True)
class Looked:
    """By the name of the way and of each other merging what was found; seconds a frame, memory in MB."""

    found: dict[str, list[Detections]]
    views: int
    processor: float
    wall: float
    memory: float


def main() -> None:
    """Measure, print and keep the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--scenes", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[""], metavar="WORDS", help="ways whose name holds them")
    parser.add_argument("--crowded", action="store_true", help="as many images of cells as there is room for")
    parser.add_argument("--sahi", type=int, default=0, metavar="N")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    for checkpoint in options.checkpoints:
        with tempfile.TemporaryDirectory() as folder:
            measure(checkpoint, Path(folder), options)


def measure(checkpoint: Path, folder: Path, options: argparse.Namespace) -> None:
    """All that is asked for of one checkpoint."""
    model = checkpoint.with_suffix(".onnx")
    if not model.is_file():
        from anchorline.export import export_onnx  # not in the processes whose memory is measured

        export_onnx(checkpoint, model, verify=False)
    with Detector(model, "cpu") as detector:
        contract = detector.contract
    shapes = contract.names == CLASS_NAMES
    if not shapes and contract.names != CELL_NAMES:
        raise SystemExit(f"{checkpoint} knows {contract.names}; expected a model of the demo or of BCCD")
    data = shapes_of(options.scenes) if shapes else cells_of(options.scenes, options.crowded)
    frames = []
    for number, image in enumerate(data):
        frames.append(folder / f"{number}.npy")
        np.save(frames[-1], image.load())
    canvas = contract.resize.within
    threads = "" if options.threads is None else f" --threads {options.threads}"
    command = f"python benchmarks/slicing.py {checkpoint.name}{threads}"
    ways = [each for each in ways_of(canvas) if any(words in each.name for words in options.only)]
    wanted = f"{command} --scenes {options.scenes}" + " --crowded" * options.crowded
    against_plain(model, ways, frames, data, options, wanted)
    if options.sahi and shapes:
        for scale in (1, 2):
            sides = tuple(round(side / SCALE) * scale for side in canvas)
            beside_sahi(checkpoint, model, sides, options, f"{command} --sahi {options.sahi}")


def ways_of(canvas: tuple[int, int]) -> list[Way]:
    """Plain detection at several sizes, and slices, for a model of this canvas."""
    sides = [round(side / SCALE) for side in canvas]
    larger = [3 * side for side in sides]
    full, scaled = SIZE, tuple(round(side * SCALE) for side in SIZE)
    small = SliceOptions(*sides)
    large = SliceOptions(*larger, overlap=0.1, full=False)
    return [
        Way("plain on the model's canvas"),
        Way("plain, 2160x3840", full),
        Way("plain, 2880x5120", scaled),
        Way("plain, 3600x6400", tuple(round(side * 5 / 3) for side in SIZE)),
        Way("small slices", None, small, ({"merge_by": "iou"}, {"merge": "weighted"})),
        Way("large slices", tuple(3 * side for side in canvas), large),
        Way("large slices at 0.8 of the scale", tuple(round(2.4 * side) for side in canvas), large),
        Way("slices without overlap", None, replace(small, overlap=0.0)),
    ]


def small_scene(seed: int) -> tuple[NDArray[np.uint8], list[Placed]]:
    """The image uint8 BGR [H, W, 3], and its objects, apart from each other, with tight boxes."""
    rng = np.random.default_rng(seed)
    image = background(rng, SIZE)
    cell = int(1.5 * SIDES[1])
    rows, columns = (side // cell for side in SIZE)
    objects = []
    for place_ in rng.choice(rows * columns, OBJECTS, replace=False).tolist():
        row, column = divmod(place_, columns)
        shape = random_shape(rng, int(rng.integers(len(CLASS_NAMES))))
        pose = Pose((column + 0.5) * cell, (row + 0.5) * cell, 1.0, rng.uniform(0, 2 * np.pi))
        x1, y1, x2, y2 = place(shape, pose).box
        radius = rng.uniform(*SIDES) / max(x2 - x1, y2 - y1)
        placed = place(shape, Pose(pose.x, pose.y, radius, pose.angle))
        x1, y1, x2, y2 = np.rint(placed.box).astype(int)
        under = mean_colours(image[y1:y2, x1:x2], cells=1)
        paint(image, placed, surface_texture(rng, contrasting_colour(rng, under)), shadow=(0.5, 1.0))
        objects.append(placed)
    return camera_image(rng, image, blur=0.4, noise=4.0), objects


def shapes_of(count: int) -> Dataset:
    """Generated scenes in memory, as a data set."""
    images = []
    for seed in range(count):
        pixels, objects = small_scene(seed)
        boxes = np.array([each.box for each in objects], np.float32)
        labels = np.array([each.label for each in objects])
        images.append(labelled(f"{seed}", pixels, boxes, labels))
    return Dataset("shapes", CLASS_NAMES, tuple(images))


def cells_of(count: int, crowded: bool) -> Dataset:
    """Large pictures in which images of BCCD's test split lie, small, on a ground of their colour."""
    spec = f"voc:{Path(os.environ['ANCHORLINE_SHARED']) / 'data' / 'bccd'}@test"
    images = [each for each in load_dataset(spec, CELL_NAMES) if crowded or 0 in each.labels]
    rows, columns = (side // own for side, own in zip(SIZE, CELL_IMAGE, strict=True))
    scenes = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        places = rng.choice(rows * columns, rows * columns if crowded else CELL_IMAGES, replace=False)
        pixels = rng.normal((190, 190, 200), 2.0, (*SIZE, 3)).clip(0, 255).astype(np.uint8)
        boxes, labels = [], []
        for number, place_ in enumerate(places.tolist()):
            if number % len(images) == 0:
                order = rng.permutation(len(images))
            image = images[order[number % len(images)]]
            top, left = (
                index * side for index, side in zip(divmod(place_, columns), CELL_IMAGE, strict=True)
            )
            small = cv2.resize(image.load(), CELL_IMAGE[::-1], interpolation=cv2.INTER_AREA)
            pixels[top : top + CELL_IMAGE[0], left : left + CELL_IMAGE[1]] = small
            scale = CELL_IMAGE[1] / image.size[1]
            boxes.append(image.boxes * scale + np.array([left, top, left, top], np.float32))
            labels.append(image.labels)
        scenes.append(labelled(f"{seed}", pixels, np.concatenate(boxes), np.concatenate(labels)))
    return Dataset("crowded cells" if crowded else "cells", CELL_NAMES, tuple(scenes))


def labelled(
    id: str, pixels: NDArray[np.uint8], boxes: NDArray[np.float32], labels: NDArray[np.int64]
) -> LabelledImage:
    """A picture in memory, all of whose objects are to be found."""
    none = np.zeros(len(boxes), bool)
    return LabelledImage(id, SIZE, boxes, labels, none, none, partial(np.copy, pixels))


def look(model: Path, way: Way, frames: list[Path], threads: int | None) -> Looked:
    """Every frame once; the seconds are the median's."""
    before = peak_mb()
    with way.detector(model, threads) as detector:
        looks: list[list[Detections]] = []

        def detect(views: list[Any]) -> list[Detections]:
            looks.append(detector.batch(views))
            return looks[-1]

        slicer = None if way.slices is None else Slicer(way.slices, detector.contract)
        detector(np.load(frames[0])[:256, :384])
        names = [way.name, *(f"{way.name}, {','.join(each.values())}" for each in way.merges)]
        found: dict[str, list[Detections]] = {name: [] for name in names}
        spent = []
        for path in frames:
            frame = np.load(path)
            looks.clear()
            start, begun = time.process_time(), time.perf_counter()
            result = detector(frame) if slicer is None else slicer.batch([frame], detect)[0]
            spent.append((time.process_time() - start, time.perf_counter() - begun))
            found[way.name].append(result)
            for name, merge in zip(names[1:], way.merges, strict=True):
                seen = iter(looks)
                other = Slicer(replace(way.slices, **merge), detector.contract)
                found[name] += other.batch([frame], lambda views, seen=seen: next(seen))
        views = 1 if slicer is None else len(slicer.views(SIZE))
        processor, wall = np.median(spent, axis=0).tolist()
        return Looked(found, views, processor, wall, peak_mb() - before)


def peak_mb() -> float:
    """The most memory that this process has had, without what its parent had, which getrusage counts."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def alone(task: Callable[..., Looked], *arguments: Any) -> Looked:
    """The result of a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(task, arguments)


def against_plain(
    model: Path, ways: list[Way], frames: list[Path], data: Dataset, options: argparse.Namespace, command: str
) -> None:
    """Accuracy, memory, and time."""
    pictures = []
    for way in ways:
        looked = alone(look, model, way, frames, options.threads)
        for name, found in looked.found.items():
            report = report_detections(found, data, "cpu")
            row = {
                "scenes": data.spec,
                "images": len(data),
                "objects": sum(len(image.boxes) for image in data),
                "way": name,
                "views": looked.views,
                "map50": f"{report.map50:.3f}",
                "map": f"{report.map:.3f}",
                "ap_small": f"{report.per_size['small'].map:.3f}",
                "ap50_of_classes": "; ".join(f"{n} {each.ap50:.3f}" for n, each in report.per_class.items()),
                "threads": options.threads or usable_cores(),
                "processor_s": f"{looked.processor:.3f}",
                "wall_s": f"{looked.wall:.3f}",
                "memory_mb": f"{looked.memory:.0f}",
            }
            print(row, flush=True)
            append_row("slicing", command, row)
        if way.name in ("plain, 2160x3840", "small slices"):
            pictures.append(crop(np.load(frames[0]), looked.found[way.name][0]))
    if options.picture is not None and len(pictures) == 2:
        cv2.imwrite(str(options.picture), np.hstack(pictures), [cv2.IMWRITE_JPEG_QUALITY, 85])


def crop(frame: NDArray[np.uint8], found: Detections) -> NDArray[np.uint8]:
    """A part of the picture with boxes around what was found in it."""
    shown = frame.copy()
    for x1, y1, x2, y2 in np.rint(strong(found).boxes).astype(int).tolist():
        cv2.rectangle(shown, (x1 - 4, y1 - 4), (x2 + 4, y2 + 4), (255, 255, 255), 3)
    return shown[700:1420, 1200:2100].copy()


def beside_sahi(
    checkpoint: Path, model: Path, sides: tuple[int, int], options: argparse.Namespace, command: str
) -> None:
    """The same weights in torchvision's detector under SAHI, and exported here, on the same slices."""
    import torch
    from sahi.models.torchvision import TorchVisionDetectionModel
    from sahi.predict import get_sliced_prediction

    from anchorline.export.importers.torchvision import TorchvisionDetector
    from anchorline.train.checkpoint import load_checkpoint

    torch.set_num_threads(options.threads or usable_cores())
    network, contract = load_checkpoint(checkpoint)
    theirs = TorchvisionDetector.of(network, contract)
    wrapped = TorchVisionDetectionModel(
        model=theirs.model,
        confidence_threshold=contract.thresholds.score,
        category_mapping={str(n): name for n, name in enumerate(("background", *contract.names))},
        device="cpu",
    )

    def sahi(frame: NDArray[np.uint8]) -> Detections:
        result = get_sliced_prediction(
            np.ascontiguousarray(frame[:, :, ::-1]),
            wrapped,
            slice_height=sides[0],
            slice_width=sides[1],
            postprocess_type="NMS",
            verbose=0,
        )
        found = result.object_prediction_list
        return Detections(
            [each.bbox.to_xyxy() for each in found],
            [each.score.value for each in found],
            [each.category.id - 1 for each in found],
        )

    with Detector(model, "cpu", threads=options.threads, slices=SliceOptions(*sides)) as ours:
        for seed in range(options.sahi):
            frame, objects = small_scene(seed)
            found, processor, wall = {}, {}, {}
            order = [("ours", ours), ("sahi", sahi)]
            for name, detect in order[:: -1 if seed % 2 else 1]:
                detect(frame[: 2 * sides[0], : 2 * sides[1]])
                start, begun = time.process_time(), time.perf_counter()
                found[name] = detect(frame)
                processor[name], wall[name] = time.process_time() - start, time.perf_counter() - begun
            row = {
                "scene": seed,
                "slice": f"{sides[0]}x{sides[1]}",
                "views": ours.views(SIZE),
                "threads": torch.get_num_threads(),
                "objects": len(objects),
                "sahi_boxes": len(strong(found["sahi"])),
                "boxes": len(strong(found["ours"])),
                "sahi_boxes_alike": share_alike(found["sahi"], found["ours"]),
                "boxes_alike": share_alike(found["ours"], found["sahi"]),
                "sahi_processor_s": f"{processor['sahi']:.2f}",
                "processor_s": f"{processor['ours']:.2f}",
                "sahi_processor_time_over_ours": f"{processor['sahi'] / processor['ours']:.2f}",
                "sahi_wall_s": f"{wall['sahi']:.2f}",
                "wall_s": f"{wall['ours']:.2f}",
                "sahi_wall_time_over_ours": f"{wall['sahi'] / wall['ours']:.2f}",
            }
            print(row, flush=True)
            append_row("slicing_sahi", command, row)


def strong(found: Detections) -> Detections:
    """Those that a user sees."""
    return found[found.scores >= SHOWN_SCORE]


def share_alike(found: Detections, other: Detections) -> str:
    """How many of the strong ones the other side has as well, at any score."""
    ours = strong(found)
    overlaps = iou_matrix(ours.boxes, other.boxes) * (ours.labels[:, None] == other.labels[None])
    return f"{float((overlaps.max(axis=1, initial=0.0) >= ALIKE).mean()):.3f}"


if __name__ == "__main__":
    main()
