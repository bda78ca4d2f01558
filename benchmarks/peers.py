"""Frame to boxes on a processor: ours beside torchvision's own ways, same weights, same images, one run.

    python benchmarks/peers.py --photos DIR --videos A.mp4 B.mp4 [--models NAME ...] [--folder DIR]

The weights are drawn (``drawn_weights.py``), so that each image has tens of detections, and imported. The
images are crops of one aspect ratio, which torchvision pads to our canvas. Each repetition times every side
on all images, side by side and in turning order; a ratio is the median over the repetitions of the
reference's time by the side's. Torchvision's ONNX file contains its resizing and NMS, and gets the frame as
its users give it: RGB, float32, 0 to 1, channels first. That conversion is inside both sides' time.

``auto`` measures anew, in a cache of this run's own, before anything is timed; printed beside the rows is its
time by that of the quicker one of the ways it chose among, in the same repetitions.

Drawn weights give every anchor a high objectness, so where a model has a threshold on it, as torchvision's
MobileNetV3, all proposals pass; ``--proposals`` makes that as few as a trained model has.

With ``--folder`` the files are kept there, and ``NAME.int8.onnx`` beside them is measured as well (made by
``anchorline quantize NAME.onnx``; the weights are the same in every run). Rows go to ``results/peers.csv``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torchvision
from drawn_weights import as_tensor, draw_weights
from import_torchvision import compare, crops
from numpy.typing import NDArray
from record import append_row

from anchorline.export import import_checkpoint
from anchorline.export.importers.torchvision import TorchvisionDetector
from anchorline.export.onnx_export import export_onnx
from anchorline.runtime import Detections, Detector
from anchorline.runtime.backends.cpu_options import has_native_bf16, usable_cores
from anchorline.runtime.backends.openvino import has_openvino
from anchorline.runtime.canvas import frame_canvas
from anchorline.runtime.contract import Contract
from anchorline.runtime.model_file import read_onnx

MODELS = ("fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_resnet50_fpn")
ASPECT = "4:3"  # 800x1088 at 800/1333
TOLERANCE = (16.0, 0.25)  # pixels, score: wide enough for int8, to see that the side finds the same objects
EAGER, PEER = "torchvision eager", "torchvision ONNX, onnxruntime CPU"
OURS, AUTO = "anchorline, onnxruntime CPU", "anchorline, auto"
WINOGRAD = ".winograd.onnx"
PAUSE = 0.05  # seconds; threads of the side before may still be spinning

Frame = NDArray[np.uint8]
Detect = Callable[[Frame], Detections]


@dataclass(frozen=True)
class Side:
    """One way from frame to boxes."""

    name: str
    provider: str
    precision: str
    detect: Detect


def main() -> None:
    """Measure the models one after the other."""
    options = parse()
    torch.set_num_threads(options.threads)
    group = crops(options.photos, options.videos)[ASPECT][: options.images]
    for name in options.models:
        with tempfile.TemporaryDirectory() as temporary:
            os.environ["XDG_CACHE_HOME"] = temporary
            rows = measure_model(name, group, options.folder or Path(temporary), options)
        for row in rows:
            print(row)
            if not options.dry_run:
                append_row("peers", shlex.join(["python", *sys.argv]), row)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--videos", type=Path, nargs="+", required=True)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--folder", type=Path, help="keep the files here")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument(
        "--proposals",
        type=int,
        help="lower the objectness until an image has about so many above a threshold",
    )
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--dry-run", action="store_true", help="print the rows and write none")
    return parser.parse_args()


def measure_model(
    name: str, frames: Sequence[Frame], folder: Path, options: argparse.Namespace
) -> list[dict[str, object]]:
    """A row for each side."""
    folder.mkdir(parents=True, exist_ok=True)
    builder = getattr(torchvision.models.detection, name)
    model = builder(weights=None, weights_backbone=None).eval()
    draw_weights(model, frames[:3], seed=0)
    if options.proposals:
        lower_objectness(model, frames[:3], options.proposals)
    ours = folder / f"{name}.onnx"
    canvas = make_ours(name, model, frames, ours)
    detectors = open_ours(ours, options.threads)
    contract = detectors[0][1].contract
    sides = peers(model, frames[0], folder / f"{name}.torchvision.onnx", contract, options.threads)
    if not options.no_compile:
        sides += compiled(model, frames[0], contract)
    sides += [Side(label, d.provider, d.precision, d) for label, d in detectors]
    expected = [sides[0].detect(frame) for frame in frames]
    shares = [matched_share(expected, [side.detect(frame) for frame in frames]) for side in sides]
    seconds = interleaved(sides, frames, options.repetitions)
    for _, detector in detectors:
        detector.close()
    few = f", {options.proposals} proposals an image" if options.proposals else ""
    facts = {
        "model": f"{name}{few}",
        "canvas": f"{canvas[0]}x{canvas[1]}",
        "threads": options.threads,
        "images": len(frames),
        "repetitions": options.repetitions,
        "detections": sum(map(len, expected)),
    }
    places = {side.name: index for index, side in enumerate(sides)}
    for place, (side, openvino) in enumerate(itertools.pairwise(sides)):
        if side.name.startswith(AUTO):  # the other way it had is onnxruntime's, the first of ours
            best = np.minimum(seconds[:, place + 1], seconds[:, places[OURS]])
            times = f"{np.median(seconds[:, place] / best):.3f} of the time of the quicker one"
            print(f"{name}: {side.name} took {side.provider}: {times} of {OURS} and {openvino.name}")
    return [
        {
            **facts,
            "side": side.name,
            "provider": side.provider,
            "precision": side.precision,
            "matched": f"{shares[index]:.3f}",
            "ms_per_frame": f"{1000 * np.median(seconds[:, index]) / len(frames):.2f}",
            "faster_than_torchvision_onnx": ratio(seconds, places.get(PEER), index),
            "faster_than_torchvision_eager": ratio(seconds, places[EAGER], index),
        }
        for index, side in enumerate(sides)
    ]


def make_ours(name: str, model: torch.nn.Module, frames: Sequence[Frame], target: Path) -> tuple[int, int]:
    """Import the weights and export them for the canvas that torchvision pads these frames to."""
    checkpoint, imported = target.with_suffix(".pth"), target.with_suffix(".safetensors")
    torch.save(model.state_dict(), checkpoint)
    result = import_checkpoint(checkpoint, imported, arch=name, verify=False)
    canvases = {frame_canvas(frame.shape[:2], result.contract) for frame in frames}
    assert len(canvases) == 1, canvases
    (canvas,) = canvases
    export_onnx(imported, target, canvas=canvas, verify=False)
    export_onnx(imported, target.with_suffix(WINOGRAD), canvas=canvas, winograd=True, verify=False)
    return canvas


@torch.no_grad()
def lower_objectness(model: torch.nn.Module, frames: Sequence[Frame], wanted: int) -> None:
    """Bisect the bias of the objectness, which drawn weights have high everywhere."""
    images, _ = model.transform([as_tensor(frame) for frame in frames])
    features = model.backbone(images.tensors)
    bias = model.rpn.head.cls_logits.bias
    high = bias.clone()
    low_shift, high_shift = -20.0, 0.0
    for _ in range(16):
        shift = (low_shift + high_shift) / 2
        bias.copy_(high + shift)
        proposals, _ = model.rpn(images, features)
        count = sum(map(len, proposals)) / len(proposals)
        low_shift, high_shift = (low_shift, shift) if count > wanted else (shift, high_shift)
    print(f"{count:.0f} proposals an image")


def open_ours(path: Path, threads: int) -> list[tuple[str, Detector]]:
    """Our runtime's ways to run the model, as far as they are here."""
    found = [(OURS, Detector(path, "cpu", threads=threads))]
    if has_openvino():
        for precision in ("auto", "fp32") if has_native_bf16() else ("auto",):
            auto = Detector(path, threads=threads, cpu_precision=precision, measure=True)
            openvino = Detector(path, "openvino", threads=threads, cpu_precision=precision)
            asked = ", fp32" * (precision == "fp32")
            found += [(f"{AUTO}{asked}", auto), (f"anchorline, OpenVINO {openvino.precision}", openvino)]
    else:
        print("OpenVINO is not installed: left out", file=sys.stderr)
    winograd = path.with_suffix(WINOGRAD)
    if read_onnx(winograd).contract.winograd:
        found.append((f"{OURS}, Winograd", Detector(winograd, "cpu", threads=threads)))
        if has_openvino():
            found.append(
                ("anchorline, OpenVINO fp32, Winograd", Detector(winograd, "openvino", threads=threads))
            )
    int8 = path.with_suffix(".int8.onnx")
    if int8.is_file():
        found.append(("anchorline, onnxruntime CPU, int8", Detector(int8, "cpu", threads=threads)))
        if has_openvino():
            found.append(("anchorline, OpenVINO, int8", Detector(int8, "openvino", threads=threads)))
    return found


def peers(model: torch.nn.Module, frame: Frame, path: Path, contract: Contract, threads: int) -> list[Side]:
    """Torchvision's own ways: eager, and its ONNX file if that works, which resizes as torchvision does.

    The eager one may come to resize by ``contract``'s rule, in Python and so in no trace.
    """
    own = copy.deepcopy(model)
    found = [Side(EAGER, "torch", "fp32", TorchvisionDetector(model, contract))]
    try:
        found.append(Side(PEER, "cpu", "fp32", exported_by_torchvision(own, frame, path, contract, threads)))
    except Exception as error:
        tell_missing(PEER, error)
    return found


def compiled(model: torch.nn.Module, frame: Frame, contract: Contract) -> list[Side]:
    """The model compiled as a whole or, where that does not work, its backbone, which is most of it."""
    partly = copy.deepcopy(model)
    partly.backbone = torch.compile(partly.backbone)
    found = []
    for name, candidate in (("", torch.compile(model)), (" of the backbone", partly)):
        name = f"torchvision, torch.compile{name}"
        try:
            detector = TorchvisionDetector(candidate, contract)
            detector.batch([frame])
        except Exception as error:
            tell_missing(name, error)
            continue
        found.append(Side(name, "torch", "fp32", detector))
        break
    return found


def exported_by_torchvision(
    model: torch.nn.Module, frame: Frame, path: Path, contract: Contract, threads: int
) -> Detect:
    """The TorchScript exporter's file on onnxruntime's CPU provider, fed as its users do."""
    sizes = {1: "height", 2: "width"}
    torch.onnx.export(
        model,
        ([as_tensor(frame)],),
        str(path),
        dynamo=False,
        opset_version=17,
        input_names=["image"],
        output_names=["boxes", "labels", "scores"],
        dynamic_axes={"image": sizes, "boxes": {0: "n"}, "labels": {0: "n"}, "scores": {0: "n"}},
    )
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])

    def detect(frame: Frame) -> Detections:
        image = np.ascontiguousarray(frame[:, :, ::-1].transpose(2, 0, 1)).astype(np.float32) / np.float32(
            255
        )
        boxes, labels, scores = session.run(["boxes", "labels", "scores"], {"image": image})
        return to_detections(boxes, labels, scores, frame, contract)

    return detect


def to_detections(
    boxes: NDArray, labels: NDArray, scores: NDArray, frame: Frame, contract: Contract
) -> Detections:
    """Torchvision's outputs, whose classes start with the background."""
    limits = np.array([frame.shape[1], frame.shape[0]] * 2, np.float32)
    kept = ((boxes[:, 2:] > boxes[:, :2]).all(axis=1)) & (labels > 0)
    return Detections(
        boxes=np.clip(boxes[kept], 0, limits),
        scores=scores[kept],
        labels=labels[kept] - 1,
        class_names=contract.names,
        size=(frame.shape[0], frame.shape[1]),
    )


def interleaved(sides: Sequence[Side], frames: Sequence[Frame], repetitions: int) -> NDArray[np.float64]:
    """Seconds [repetitions, sides] for all frames; each repetition begins with another side."""
    seconds = np.zeros((repetitions, len(sides)))
    for repetition in range(repetitions):
        for place in range(len(sides)):
            index = (place + repetition) % len(sides)
            time.sleep(PAUSE)
            start = time.perf_counter()
            for frame in frames:
                sides[index].detect(frame)
            seconds[repetition, index] = time.perf_counter() - start
    return seconds


def ratio(seconds: NDArray[np.float64], reference: int | None, index: int) -> str:
    """How many times as fast as the reference, the median over the repetitions."""
    return "" if reference is None else f"{np.median(seconds[:, reference] / seconds[:, index]):.2f}"


def matched_share(expected: Sequence[Detections], found: Sequence[Detections]) -> float:
    """The share of torchvision's detections that the side finds as well."""
    return compare(expected, found, TOLERANCE).total.matched / max(1, sum(map(len, expected)))


def tell_missing(side: str, error: Exception) -> None:
    reason = " ".join(str(error).split())[:300]
    print(f"{side} does not work here: {type(error).__name__}: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
