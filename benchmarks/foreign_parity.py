"""Detectron2's and MMDetection's own predictors against what Anchorline makes of their checkpoints.

    python benchmarks/foreign_parity.py --detectron2 CHECKOUT --mmdetection --mmcv CHECKOUT --images DIR

For each case the library builds the model from its own configuration. It gets random weights, calibrated so
that a frame has tens of detections of differing scores, and the library saves it as its trainer does. Its
predictor runs on photographs and on frames of many shapes, and so do the imported checkpoint in PyTorch, on
each frame's own canvas, and ONNX files exported for some of the canvases. Rows go to
``results/foreign_parity.csv``; the exit code is 1 when detections differ that should not.

Detectron2 runs from its sources, without its compiled part, which these models do not call. MMDetection 3.3
comes from its package. mmcv 2.1 has none for a new PyTorch: ``--mmcv`` takes its sources and compiles the two
operations that these models call.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from drawn_weights import (
    DELTA_SPREAD,
    LOGIT_SPREAD,
    OBJECTNESS_SPREAD,
    SHIFT,
    norms,
    spread,
    statistics_of_inputs,
)
from numpy.typing import NDArray
from record import append_row
from torch import Tensor, nn

from anchorline.data.synthetic import generate_scene
from anchorline.export import import_checkpoint
from anchorline.export.onnx_export import export_onnx
from anchorline.runtime import Detections, Detector
from anchorline.runtime.canvas import frame_canvas, place
from anchorline.train.checkpoint import read_header
from anchorline.train.predict import TorchDetector
from anchorline.verify.compare import TOLERANCES, Comparison, compare_outputs, summarise

Frame = NDArray[np.uint8]

PHOTOGRAPHS = 3
# Height and width that photographs are stretched to: one that the usual resizing brings to multiples of 32,
# then portrait, small, large, and narrow.
SHAPES = ((480, 576), (640, 480), (97, 97), (1080, 1920), (200, 3000), (700, 90))
MULTIPLES, OTHERS = "multiples of 32", "others, unpadded there"
PASSING = 150  # pairs of a RoI and a class above the score threshold, before NMS, in the calibration's frame


@dataclass(frozen=True)
class Case:
    """A configuration of the library's, what is changed in it, and class names where they are not COCO's.

    ``unpadded``: the library shows the network the resized image as it is, where ours pads it.
    """

    config: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    unpadded: bool = False


class Foreign(Protocol):
    """A library's model: its network, the layers to calibrate, its own predictor, and its way to save."""

    version: str
    model: nn.Module
    rpn: tuple[nn.Module, nn.Module]  # objectness, deltas
    head: tuple[nn.Module, nn.Module]  # logits, of which the background's is the last; deltas
    score_threshold: float

    def save(self, folder: Path) -> Path: ...

    def load(self, checkpoint: Path) -> None: ...

    def detect(self, frame: Frame) -> Detections: ...


CUPS = ("cup", "plate", "spoon")
RATIOS = [0.3, 0.5, 1.0, 2.0, 3.5]
_R50, _BOX = "faster_rcnn_R_50_FPN_1x.yaml", "MODEL.ROI_BOX_HEAD"
DETECTRON2 = {
    "r50-fpn": Case(_R50),
    "r101-fpn": Case("faster_rcnn_R_101_FPN_3x.yaml"),
    "x101-fpn": Case("faster_rcnn_X_101_32x8d_FPN_3x.yaml"),
    # Fewer proposals, since each goes through the backbone's last stage.
    "r50-c4": Case("faster_rcnn_R_50_C4_1x.yaml", {"MODEL.RPN.POST_NMS_TOPK_TEST": 100}, unpadded=True),
    "r50-dc5": Case("faster_rcnn_R_50_DC5_1x.yaml", unpadded=True),
    "classes-anchors-sampling": Case(
        _R50,
        {
            "MODEL.ROI_HEADS.NUM_CLASSES": 3,
            "MODEL.ANCHOR_GENERATOR.SIZES": [[24, 36], [48, 70], [100, 140], [200, 290], [400, 600]],
            f"{_BOX}.POOLER_SAMPLING_RATIO": 2,
        },
        CUPS,
    ),
    "ratios-agnostic": Case(
        _R50, {"MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [RATIOS], f"{_BOX}.CLS_AGNOSTIC_BBOX_REG": True}
    ),
    "settings": Case(
        _R50,
        {
            "INPUT.FORMAT": "RGB",
            "INPUT.MIN_SIZE_TEST": 600,
            "INPUT.MAX_SIZE_TEST": 1000,
            "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
            "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
            "MODEL.RESNETS.STRIDE_IN_1X1": False,
            "MODEL.RPN.PRE_NMS_TOPK_TEST": 700,
            "MODEL.RPN.POST_NMS_TOPK_TEST": 500,
            "MODEL.RPN.NMS_THRESH": 0.65,
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.1,
            "MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.45,
            f"{_BOX}.BBOX_REG_WEIGHTS": [8.0, 8.0, 4.0, 4.0],
            "TEST.DETECTIONS_PER_IMAGE": 60,
        },
    ),
}

_PYTORCH, _HEAD, _ANCHORS = "r50_fpn_1x", "model.roi_head.bbox_head", "model.rpn_head.anchor_generator"
MMDETECTION = {
    "r50-fpn": Case(_PYTORCH),
    "r101-fpn": Case("r101_fpn_1x"),
    "r50-caffe-fpn": Case("r50-caffe_fpn_1x"),
    "classes-anchors-sampling": Case(
        _PYTORCH,
        {
            f"{_HEAD}.num_classes": 3,
            f"{_ANCHORS}.scales": [6, 9],
            "model.roi_head.bbox_roi_extractor.roi_layer.sampling_ratio": 2,
        },
        CUPS,
    ),
    "ratios-agnostic": Case(_PYTORCH, {f"{_ANCHORS}.ratios": RATIOS, f"{_HEAD}.reg_class_agnostic": True}),
    "settings": Case(
        _PYTORCH,
        {
            "test_pipeline.1.scale": (1000, 600),
            "model.data_preprocessor.mean": [120.0, 115.0, 105.0],
            "model.test_cfg.rpn.nms_pre": 700,
            "model.test_cfg.rpn.max_per_img": 500,
            "model.test_cfg.rpn.nms.iou_threshold": 0.65,
            "model.test_cfg.rcnn.score_thr": 0.1,
            "model.test_cfg.rcnn.nms.iou_threshold": 0.45,
            "model.test_cfg.rcnn.max_per_img": 60,
            f"{_HEAD}.bbox_coder.target_stds": [0.125, 0.125, 0.25, 0.25],
        },
    ),
}


class Detectron2:
    """A model of ``detectron2``, which has to be importable, and its ``DefaultPredictor``."""

    def __init__(self, case: Case, sides: tuple[int, int] | None, checkout: Path) -> None:
        import detectron2
        from detectron2.config import get_cfg

        at = commit_of(checkout)
        self.version = f"detectron2 {detectron2.__version__} {at}, pillow {version('pillow')}"
        self.cfg = get_cfg()
        self.cfg.merge_from_file(str(checkout / "configs" / "COCO-Detection" / case.config))
        self.cfg.merge_from_list([part for change in case.changes.items() for part in change])
        if sides is not None:
            self.cfg.INPUT.MIN_SIZE_TEST, self.cfg.INPUT.MAX_SIZE_TEST = sides
        self.cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "DATASETS.TEST", ()])
        self.score_threshold = self.cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST
        self._build()
        rpn, box = self.model.proposal_generator.rpn_head, self.model.roi_heads.box_predictor
        self.rpn, self.head = (rpn.objectness_logits, rpn.anchor_deltas), (box.cls_score, box.bbox_pred)

    def _build(self) -> None:
        from detectron2.engine import DefaultPredictor

        self.predictor = DefaultPredictor(self.cfg)
        self.model: Any = self.predictor.model

    def save(self, folder: Path) -> Path:
        """``model_final.pth`` and, beside it, ``config.yaml``, as ``DefaultTrainer`` leaves them."""
        from detectron2.checkpoint import DetectionCheckpointer

        DetectionCheckpointer(self.model, str(folder)).save("model_final", iteration=89999)
        (folder / "config.yaml").write_text(self.cfg.dump(), encoding="utf-8")
        return folder / "model_final.pth"

    def load(self, checkpoint: Path) -> None:
        self.cfg.MODEL.WEIGHTS = str(checkpoint)
        self._build()

    def detect(self, frame: Frame) -> Detections:
        found = self.predictor(frame)["instances"]
        return Detections(
            found.pred_boxes.tensor.numpy(),
            found.scores.numpy(),
            found.pred_classes.numpy(),
            size=frame.shape[:2],
        )


class MMDetection:
    """A model of ``mmdet``, which has to be importable, and its ``inference_detector``."""

    def __init__(self, case: Case, sides: tuple[int, int] | None, checkout: Path | None = None) -> None:
        import mmcv
        import mmdet
        from mmengine.config import Config

        self.version = f"mmdet {mmdet.__version__}, mmcv {mmcv.__version__}"
        configs = Path(mmdet.__file__).parent / ".mim" / "configs" / "faster_rcnn"
        self.cfg = Config.fromfile(configs / f"faster-rcnn_{case.config}_coco.py")
        self.cfg.merge_from_dict({**case.changes, "model.backbone.init_cfg": None})
        if sides is not None:
            self.cfg.test_pipeline[1].scale = sides[::-1]
        self.cfg.test_dataloader.dataset.pipeline = self.cfg.test_pipeline
        self.score_threshold = self.cfg.model.test_cfg.rcnn.score_thr
        self.classes = case.classes
        self._build(None)
        rpn, box = self.model.rpn_head, self.model.roi_head.bbox_head
        self.rpn, self.head = (rpn.rpn_cls, rpn.rpn_reg), (box.fc_cls, box.fc_reg)

    def _build(self, checkpoint: str | None) -> None:
        from mmdet.apis import init_detector

        self.model: Any = init_detector(self.cfg, checkpoint, device="cpu")

    def save(self, folder: Path) -> Path:
        """``epoch_12.pth``, as mmengine's ``Runner`` saves it."""
        from mmdet.datasets import CocoDataset
        from mmengine.runner import Runner
        from torch.utils.data import DataLoader

        metainfo = {"classes": self.classes} if self.classes else None
        data: Any = CocoDataset(metainfo=metainfo, lazy_init=True)
        runner = Runner(
            self.model,
            str(folder),
            train_dataloader=DataLoader(data, batch_sampler=[[0]]),
            train_cfg={"by_epoch": True, "max_epochs": 12},
            optim_wrapper=self.cfg.optim_wrapper,
            default_scope="mmdet",
            log_level="ERROR",
            cfg=self.cfg,
        )
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        runner.save_checkpoint(str(folder), "epoch_12.pth")
        return folder / "epoch_12.pth"

    def load(self, checkpoint: Path) -> None:
        self._build(str(checkpoint))

    def detect(self, frame: Frame) -> Detections:
        from mmdet.apis import inference_detector

        found = inference_detector(self.model, frame).pred_instances
        return Detections(
            found.bboxes.numpy(), found.scores.numpy(), found.labels.numpy(), size=frame.shape[:2]
        )


def main() -> None:
    """Try the cases one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--detectron2", type=Path, metavar="CHECKOUT", help="Detectron2's sources")
    parser.add_argument("--mmdetection", action="store_true", help="the installed mmdet")
    parser.add_argument(
        "--mmcv", type=Path, metavar="CHECKOUT", help="mmcv's sources, where it is not compiled"
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="photographs; default: generated scenes")
    parser.add_argument("--cases", help="names of --list with commas between; default: all")
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    parser.add_argument(
        "--exports", type=int, default=3, metavar="N", help="canvases to export ONNX files for"
    )
    parser.add_argument(
        "--sides",
        type=int,
        nargs=2,
        metavar=("SHORTER", "LONGER"),
        help="sides of a resized image; default: the case's",
    )
    arguments = parser.parse_args()
    if arguments.list:
        print("Detectron2: " + ", ".join(DETECTRON2) + "\nMMDetection: " + ", ".join(MMDETECTION))
        return
    chosen = arguments.cases.split(",") if arguments.cases else [*DETECTRON2, *MMDETECTION]
    if unknown := [name for name in chosen if name not in DETECTRON2 and name not in MMDETECTION]:
        sys.exit(f"--cases: no case {unknown[0]!r}; --list shows them")
    frames = frames_of_many_shapes(arguments.images)
    libraries: list[tuple[Callable[[Case, Any, Any], Foreign], Mapping[str, Case]]] = []
    if arguments.detectron2:
        prepare_detectron2(arguments.detectron2)
        libraries.append((Detectron2, DETECTRON2))
    if arguments.mmdetection:
        prepare_mmdetection(arguments.mmcv)
        libraries.append((MMDetection, MMDETECTION))
    if not libraries:
        sys.exit("give --detectron2 CHECKOUT, --mmdetection, or both")
    sides = tuple(arguments.sides) if arguments.sides else None
    exact = True
    for library, cases in libraries:
        for name in (name for name in cases if name in chosen):
            with tempfile.TemporaryDirectory() as folder:
                foreign = library(cases[name], sides, arguments.detectron2)
                exact &= try_case(foreign, name, cases[name], frames, Path(folder), arguments.exports)
            del foreign
            gc.collect()
    sys.exit(0 if exact else 1)


def prepare_detectron2(checkout: Path) -> None:
    """Make ``detectron2`` importable from its sources, with an empty module for its compiled part."""
    sys.path.insert(0, str(checkout))
    sys.modules["detectron2._C"] = types.ModuleType("detectron2._C")
    try:
        import detectron2.engine  # noqa: F401
    except ImportError as error:
        sys.exit(
            f"--detectron2 {checkout}: cannot be imported ({error}); expected a checkout of Detectron2, and "
            "fvcore, iopath, omegaconf, hydra-core, yacs, pycocotools, cloudpickle and tabulate installed"
        )


def prepare_mmdetection(sources: Path | None) -> None:
    """Make ``mmdet`` importable; with ``sources`` of mmcv, from those, and compile nms and roi_align."""
    try:
        if sources is not None:
            sys.path.insert(0, str(sources))
            sys.modules["mmcv._ext"] = _Operations(sources / "mmcv" / "ops" / "csrc")
        import mmdet.apis  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        sys.exit(
            f"--mmdetection: cannot be imported ({error}); expected mmdet 3.3 and mmengine installed, and "
            "mmcv 2.1 with its operations, or its sources as --mmcv and a C++ compiler"
        )


class _Operations(types.ModuleType):
    """mmcv's compiled module with two of its operations on the CPU; the others fail when they are called."""

    def __init__(self, sources: Path) -> None:
        from torch.utils.cpp_extension import load_inline

        super().__init__("mmcv._ext")
        self.__spec__ = ModuleSpec("mmcv._ext", None)
        files = (
            "pytorch/nms.cpp",
            "pytorch/cpu/nms.cpp",
            "pytorch/roi_align.cpp",
            "pytorch/cpu/roi_align.cpp",
        )
        self.__compiled = load_inline(
            "mmcv_nms_roi_align",
            "".join(f'#include "{file}"\n' for file in files),
            functions=["nms", "roi_align_forward"],
            extra_include_paths=[str(sources.resolve()), str(sources.resolve() / "common")],
        )

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        # mmcv names the last arguments, in the order of the signature.
        return lambda *values, **named: getattr(self.__compiled, name)(*values, *named.values())


def commit_of(checkout: Path) -> str:
    done = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()


def frames_of_many_shapes(folder: Path | None) -> list[Frame]:
    """Photographs evenly from ``folder`` (else generated scenes), stretched to ``SHAPES`` and as they are."""
    if folder is None:
        photographs = [generate_scene(0, (480, 640), number)[0] for number in range(PHOTOGRAPHS)]
    else:
        read = (cv2.imread(str(path)) for path in sorted(folder.iterdir()))
        found = [image for image in read if image is not None]
        if not found:
            sys.exit(f"--images {folder}: no image that can be read")
        photographs = found[:: max(1, len(found) // PHOTOGRAPHS)][:PHOTOGRAPHS]
    stretched = (
        cv2.resize(photographs[number % len(photographs)], (width, height))
        for number, (height, width) in enumerate(SHAPES)
    )
    return [*stretched, *photographs]


def try_case(
    foreign: Foreign, name: str, case: Case, frames: Sequence[Frame], folder: Path, exports: int
) -> bool:
    """Compare one model in PyTorch and through onnxruntime, append the rows, and say whether it agrees."""
    calibrate(foreign, frames)
    checkpoint, imported = foreign.save(folder), folder / "model.safetensors"
    import_checkpoint(checkpoint, imported, classes=case.classes)
    foreign.load(checkpoint)
    expected = [foreign.detect(frame) for frame in frames]
    contract = read_header(imported)[1]
    canvases: dict[tuple[int, int], list[int]] = {}
    for number, frame in enumerate(frames):
        canvases.setdefault(frame_canvas(frame.shape[:2], contract), []).append(number)
    groups: dict[tuple[str, str], list[tuple[int, Comparison]]] = {}
    for index, (canvas, numbers) in enumerate(canvases.items()):
        ours = TorchDetector.load(imported, canvas=canvas)
        detectors: dict[str, Any] = {"pytorch": ours}
        if index < exports:
            export_onnx(imported, folder / "model.onnx", canvas=canvas, verify=False)
            detectors["onnxruntime"] = Detector(
                folder / "model.onnx", provider="cpu", threads=torch.get_num_threads()
            )
        for (form, detector), number in itertools.product(detectors.items(), numbers):
            placed = place(frames[number].shape[:2], canvas, contract.resize)
            sizes = "all" if not case.unpadded else MULTIPLES if placed.valid == canvas else OTHERS
            theirs = expected[number]
            (compared,) = compare_outputs(
                [theirs], [detector(frames[number])], ours.contract, TOLERANCES["fp32"]
            )
            groups.setdefault((form, sizes), []).append((len(theirs), compared))
    resize = f"{contract.resize.shorter_side}/{contract.resize.longer_side}"
    agreeing = [record(foreign.version, name, resize, *kind, group) for kind, group in groups.items()]
    return all(agreeing)


def record(
    library: str, name: str, resize: str, form: str, sizes: str, group: Sequence[tuple[int, Comparison]]
) -> bool:
    """Append a row for ``group``, of each frame the library's number of detections and the comparison.

    Returns whether the two agree, or cannot be expected to.
    """
    summary = summarise([compared for _, compared in group])
    total = summary.total
    print(f"{library}, {name}, {resize}, {form}, sizes: {sizes}: {summary.describe()}")
    if total.first_disagreement:
        print(f"    {total.first_disagreement}")
    append_row(
        "foreign_parity",
        "python benchmarks/foreign_parity.py --detectron2 DIR --mmdetection --mmcv DIR --images DIR",
        {
            "library": library,
            "case": name,
            "resize": resize,
            "form": form,
            "resized_sizes": sizes,
            "images": summary.images,
            "detections": sum(count for count, _ in group),
            "equal": total.matched - total.differing,
            "differing": total.differing,
            "missed": total.missed,
            "extra": total.extra,
            "ties": total.borderline + total.nms_ties,
            "max_box_px": f"{total.max_box_error:.2g}",
            "max_score": f"{total.max_score_error:.2g}",
        },
    )
    return summary.agrees or sizes == OTHERS


@torch.no_grad()
def calibrate(foreign: Foreign, frames: Sequence[Frame]) -> None:
    """Random weights with which the detector finds tens of objects in a frame made of four of ``frames``."""
    torch.manual_seed(0)
    quarters = [cv2.resize(frame, (384, 288)) for frame in frames[:4]]
    frame = cv2.vconcat([cv2.hconcat(quarters[:2]), cv2.hconcat(quarters[2:])])
    for parameter in foreign.model.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter)
    for norm in norms(foreign.model):
        norm.bias.fill_(SHIFT)
    with statistics_of_inputs(foreign.model):
        hidden = inputs_of(foreign.rpn[0], foreign, frame)
        spread(foreign.rpn[0], hidden, OBJECTNESS_SPREAD)
        spread(foreign.rpn[1], hidden, DELTA_SPREAD)
        rois = inputs_of(foreign.head[0], foreign, frame)
    logits, deltas = foreign.head
    spread(logits, rois, LOGIT_SPREAD * np.log(logits.out_features))
    spread(deltas, rois, 3 * DELTA_SPREAD)
    outputs, low, high = logits(rois[0]), -10.0, 20.0
    shift = torch.zeros_like(outputs[0])
    for _ in range(20):
        shift[-1] = (low + high) / 2
        passing = ((outputs + shift).softmax(dim=1)[:, :-1] > foreign.score_threshold).sum().item()
        low, high = (shift[-1].item(), high) if passing > PASSING else (low, shift[-1].item())
    logits.bias.add_(shift)


def inputs_of(layer: nn.Module, foreign: Foreign, frame: Frame) -> list[Tensor]:
    """What ``layer`` is called with while the detector runs on ``frame``."""
    kept: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    foreign.detect(frame)
    hook.remove()
    return kept


if __name__ == "__main__":
    main()
