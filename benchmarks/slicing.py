"""Slices against plain detection, and against SAHI over torchvision with the same weights and slices.

    python benchmarks/slicing.py model.safetensors [--scenes 6] [--slice 144x192] [--picture FILE.jpg]
    PYTHONPATH=folder python benchmarks/slicing.py model.safetensors --sahi 1

Generated scenes of 3840x2160 with objects of 12 to 40 pixels of the demo's classes, for a checkpoint of the
demo. Plain detection is on the model's own canvas, which is the slices' as well, and on larger ones, up to
the slices' scale. With ``--sahi N`` SAHI's own code (``pip install --target folder sahi shapely --no-deps``)
works on N scenes, by turns with this project's and on one thread each: a box is alike where the other side
has one of its class with an IoU of 0.9. Rows go to ``results/slicing.csv`` and ``slicing_sahi.csv``. Times
are the processor's, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from record import append_row

from anchorline.data.boxes import iou_matrix
from anchorline.data.dataset import Dataset, LabelledImage
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
from anchorline.export import export_onnx
from anchorline.runtime import Detections, Detector, SliceOptions
from anchorline.runtime.contract import ResizeRule

SIZE = (2160, 3840)
SIDES = (12.0, 40.0)  # pixels of an object's longer side
OBJECTS = 60
SHOWN_SCORE = 0.5
ALIKE = 0.9  # IoU


def main() -> None:
    """Measure, print and keep the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--onnx", type=Path, metavar="FILE", help="the checkpoint's export, where there is one"
    )
    parser.add_argument("--scenes", type=int, default=6)
    parser.add_argument("--slice", default="144x192", metavar="HxW")
    parser.add_argument("--sahi", type=int, default=0, metavar="N")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    sides = tuple(map(int, options.slice.split("x")))
    command = f"python benchmarks/slicing.py {options.checkpoint.name} --slice {options.slice}"
    with tempfile.TemporaryDirectory() as folder:
        model = options.onnx or Path(folder) / "model.onnx"
        if options.onnx is None:
            export_onnx(options.checkpoint, model, verify=False)
        if options.sahi:
            beside_sahi(options, model, sides, f"{command} --sahi {options.sahi}")
        else:
            against_plain(options, model, sides, f"{command} --scenes {options.scenes}")


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


def data_of(count: int) -> Dataset:
    """Scenes in memory, as a data set."""
    images = []
    for seed in range(count):
        pixels, objects = small_scene(seed)
        none = np.zeros(len(objects), bool)
        boxes = np.array([each.box for each in objects], np.float32)
        labels = np.array([each.label for each in objects])
        images.append(LabelledImage(f"{seed}", SIZE, boxes, labels, none, none, partial(np.copy, pixels)))
    return Dataset("small objects", CLASS_NAMES, tuple(images))


def against_plain(options: argparse.Namespace, model: Path, sides: tuple[int, int], command: str) -> None:
    """Accuracy, and the time beside that of plain detection on the model's canvas."""
    data = data_of(options.scenes)
    frames = [image.load() for image in data]
    scale = 192 / sides[0]  # of the slices on the demo's canvas
    larger = [(round(SIZE[0] * each), round(SIZE[1] * each)) for each in (0.5, 1.0, scale)]
    ways: dict[str, dict[str, object]] = {"plain, own canvas": {}}
    ways |= {"plain, {}x{}".format(*within): {"resize": ResizeRule(within=within)} for within in larger}
    ways["slices"] = {"slices": SliceOptions(*sides)}
    ways["slices, weighted"] = {"slices": SliceOptions(*sides, merge="weighted")}
    base, pictures = 0.0, []
    for name, arguments in ways.items():
        with Detector(model, "cpu", **arguments) as detector:  # type: ignore[arg-type]
            detector(frames[0][: 2 * sides[0], : 2 * sides[1]])
            found, spent = [], []
            for frame in frames:
                start = time.process_time()
                found.append(detector(frame))
                spent.append(time.process_time() - start)
            views = detector.views(SIZE)
        seconds = float(np.median(spent))
        base = base or seconds
        report = report_detections(found, data, "cpu")
        row = {
            "way": name,
            "views": views,
            "scenes": len(data),
            "objects": sum(len(image.boxes) for image in data),
            "map50": f"{report.map50:.3f}",
            "map": f"{report.map:.3f}",
            "ap_small": f"{report.per_size['small'].map:.3f}",
            "processor_time_over_plain": f"{seconds / base:.1f}",
        }
        print(row, flush=True)
        append_row("slicing", command, row)
        if name in ("plain, 2160x3840", "slices"):
            pictures.append(crop(frames[0], found[0]))
    if options.picture is not None:
        cv2.imwrite(str(options.picture), np.hstack(pictures), [cv2.IMWRITE_JPEG_QUALITY, 85])


def crop(frame: NDArray[np.uint8], found: Detections) -> NDArray[np.uint8]:
    """A part of the picture with boxes around what was found in it."""
    shown = frame.copy()
    for x1, y1, x2, y2 in np.rint(strong(found).boxes).astype(int).tolist():
        cv2.rectangle(shown, (x1 - 4, y1 - 4), (x2 + 4, y2 + 4), (255, 255, 255), 3)
    return shown[700:1420, 1200:2100].copy()


def beside_sahi(options: argparse.Namespace, model: Path, sides: tuple[int, int], command: str) -> None:
    """The same weights in torchvision's detector under SAHI, and exported here, on the same slices."""
    import torch
    from sahi.models.torchvision import TorchVisionDetectionModel
    from sahi.predict import get_sliced_prediction

    from anchorline.export.importers.torchvision import TorchvisionDetector
    from anchorline.train.checkpoint import load_checkpoint

    torch.set_num_threads(1)  # threads that wait for each other would count as processor time
    network, contract = load_checkpoint(options.checkpoint)
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

    with Detector(model, "cpu", threads=1, slices=SliceOptions(*sides)) as ours:
        for seed in range(options.sahi):
            frame = small_scene(seed)[0]
            found, spent = {}, {}
            order = [("ours", ours), ("sahi", sahi)]
            for name, detect in order[:: -1 if seed % 2 else 1]:
                start = time.process_time()
                found[name] = detect(frame)
                spent[name] = time.process_time() - start
            row = {
                "scene": seed,
                "views": ours.views(SIZE),
                "sahi_boxes": len(strong(found["sahi"])),
                "boxes": len(strong(found["ours"])),
                "sahi_boxes_alike": share_alike(found["sahi"], found["ours"]),
                "boxes_alike": share_alike(found["ours"], found["sahi"]),
                "sahi_processor_s": f"{spent['sahi']:.1f}",
                "processor_s": f"{spent['ours']:.1f}",
                "sahi_processor_time_over_ours": f"{spent['sahi'] / spent['ours']:.2f}",
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
