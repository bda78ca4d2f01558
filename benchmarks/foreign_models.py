"""The models of torchvision, Detectron2 and MMDetection that ``foreign_parity.py`` compares with.

Each library builds a model from its own configuration. It gets random weights, calibrated so that a frame has
tens of detections of differing scores, and is saved as the library's trainer does.

Detectron2 runs from its sources, without its compiled part, which these models do not call. MMDetection 3.3
comes from its package. mmcv 2.1 has none for a new PyTorch: its sources are taken, and the two operations
that these models call are compiled.
"""

from __future__ import annotations

import subprocess
import sys
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
import torchvision
from drawn_weights import (
    DELTA_SPREAD,
    LOGIT_SPREAD,
    OBJECTNESS_SPREAD,
    SHIFT,
    as_tensor,
    draw_weights,
    norms,
    spread,
    statistics_of_inputs,
)
from numpy.typing import NDArray
from torch import Tensor, nn

from anchorline.runtime import Detections
from anchorline.runtime.contract import ResizeRule

Frame = NDArray[np.uint8]
Sides = tuple[int, int]  # shorter and longer, of a resized image

PASSING = 150  # pairs of a RoI and a class above the score threshold, before NMS, in the calibration's frame


@dataclass(frozen=True)
class Case:
    """A configuration of the library's, what is changed in it, and class names where they are not COCO's."""

    config: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None


class Foreign(Protocol):
    """A library's model."""

    version: str
    told: dict[str, Any]
    """What the import is told besides the checkpoint and the classes."""

    def draw(self, frames: Sequence[Frame]) -> None:
        """Draw weights with which ``frames`` have tens of detections."""

    def save(self, folder: Path) -> Path:
        """The checkpoint, as the library's trainer saves it."""

    def load(self, checkpoint: Path) -> None:
        """Read it as the library's users do."""

    def detect(self, frames: Sequence[Frame]) -> list[Detections]:
        """What the library finds in one batch of BGR frames."""


TORCHVISION = {
    "mobilenet-v3-320": Case("fasterrcnn_mobilenet_v3_large_320_fpn"),
    "mobilenet-v3": Case("fasterrcnn_mobilenet_v3_large_fpn"),
    "r50": Case("fasterrcnn_resnet50_fpn"),
    "r50-v2": Case("fasterrcnn_resnet50_fpn_v2"),
}

CUPS = ("cup", "plate", "spoon")
RATIOS = [0.3, 0.5, 1.0, 2.0, 3.5]
_R50, _BOX = "faster_rcnn_R_50_FPN_1x.yaml", "MODEL.ROI_BOX_HEAD"
DETECTRON2 = {
    "r50-fpn": Case(_R50),
    "r101-fpn": Case("faster_rcnn_R_101_FPN_3x.yaml"),
    "x101-fpn": Case("faster_rcnn_X_101_32x8d_FPN_3x.yaml"),
    # Fewer proposals, since each goes through the backbone's last stage.
    "r50-c4": Case("faster_rcnn_R_50_C4_1x.yaml", {"MODEL.RPN.POST_NMS_TOPK_TEST": 100}),
    "r50-dc5": Case("faster_rcnn_R_50_DC5_1x.yaml"),
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


class Torchvision:
    """A detector of torchvision's."""

    def __init__(self, case: Case, sides: Sides | None) -> None:
        self.version, self.builder = f"torchvision {torchvision.__version__}", case.config
        self.options: dict[str, Any] = {"weights": None, "weights_backbone": None}
        self.told = {"arch": case.config, "verify": False}
        if sides is not None:
            self.options |= {"min_size": sides[0], "max_size": sides[1]}
            self.told["resize"] = ResizeRule(*sides)
        self._build()

    def _build(self) -> None:
        self.model = getattr(torchvision.models.detection, self.builder)(**self.options).eval()

    def draw(self, frames: Sequence[Frame]) -> None:
        draw_weights(self.model, frames[:2], seed=0)

    def save(self, folder: Path) -> Path:
        torch.save(self.model.state_dict(), folder / "model.pth")
        return folder / "model.pth"

    def load(self, checkpoint: Path) -> None:
        self._build()
        self.model.load_state_dict(torch.load(checkpoint))
        # From the first image that it sees it derives the scales of RoI pooling, wrongly from a narrow one.
        self.detect([np.zeros((256, 256, 3), np.uint8)])

    @torch.inference_mode()
    def detect(self, frames: Sequence[Frame]) -> list[Detections]:
        return [
            Detections(
                found["boxes"].numpy(),
                found["scores"].numpy(),
                found["labels"].numpy() - 1,
                size=frame.shape[:2],
            )
            for frame, found in zip(frames, self.model([as_tensor(frame) for frame in frames]), strict=True)
        ]


class Detectron2:
    """A model of ``detectron2``, which has to be importable, and its ``DefaultPredictor``."""

    def __init__(self, case: Case, sides: Sides | None, checkout: Path) -> None:
        import detectron2
        from detectron2.config import get_cfg

        self.told: dict[str, Any] = {}
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

    def draw(self, frames: Sequence[Frame]) -> None:
        calibrate(self, frames)

    @torch.no_grad()
    def detect(self, frames: Sequence[Frame]) -> list[Detections]:
        """One frame goes through the predictor; several as it prepares one: it takes no batch."""
        if len(frames) == 1:
            outputs = [self.predictor(frames[0])]
        else:
            rgb = self.cfg.INPUT.FORMAT == "RGB"
            inputs = []
            for frame in frames:
                image = frame[:, :, ::-1] if rgb else frame
                image = self.predictor.aug.get_transform(image).apply_image(image)
                tensor = torch.as_tensor(image.astype("float32").transpose(2, 0, 1))
                inputs.append({"image": tensor, "height": frame.shape[0], "width": frame.shape[1]})
            outputs = self.model(inputs)
        found = [output["instances"] for output in outputs]
        return [
            Detections(
                each.pred_boxes.tensor.numpy(),
                each.scores.numpy(),
                each.pred_classes.numpy(),
                size=frame.shape[:2],
            )
            for frame, each in zip(frames, found, strict=True)
        ]


class MMDetection:
    """A model of ``mmdet``, which has to be importable, and its ``inference_detector``."""

    def __init__(self, case: Case, sides: Sides | None) -> None:
        import mmcv
        import mmdet
        from mmengine.config import Config

        self.told: dict[str, Any] = {}
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

    def draw(self, frames: Sequence[Frame]) -> None:
        calibrate(self, frames)

    @torch.no_grad()
    def detect(self, frames: Sequence[Frame]) -> list[Detections]:
        """One frame goes through ``inference_detector``; several as it prepares one: it takes no batch."""
        from mmcv.transforms import Compose
        from mmdet.apis import inference_detector
        from mmdet.utils import get_test_pipeline_cfg

        if len(frames) == 1:
            samples = [inference_detector(self.model, frames[0])]
        else:
            steps = get_test_pipeline_cfg(self.model.cfg.copy())
            steps[0].type = "mmdet.LoadImageFromNDArray"
            prepare = Compose(steps)
            made = [prepare({"img": frame, "img_id": 0}) for frame in frames]
            samples = self.model.test_step({key: [each[key] for each in made] for key in made[0]})
        found = [sample.pred_instances for sample in samples]
        return [
            Detections(each.bboxes.numpy(), each.scores.numpy(), each.labels.numpy(), size=frame.shape[:2])
            for frame, each in zip(frames, found, strict=True)
        ]


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


@torch.no_grad()
def calibrate(foreign: Detectron2 | MMDetection, frames: Sequence[Frame]) -> None:
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


def inputs_of(layer: nn.Module, foreign: Detectron2 | MMDetection, frame: Frame) -> list[Tensor]:
    """What ``layer`` is called with while the detector runs on ``frame``."""
    kept: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    foreign.detect([frame])
    hook.remove()
    return kept
