"""Small models for every stage's tests: the real architecture with narrow layers on a small canvas.

PyTorch is imported inside the fixtures, so that the tests of the torch-free stages stay without it.

Every test, and every process that one starts, computes on one thread: the workers of pytest-xdist share the
cores, and sums then have the same order whatever the machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import signal

# Before NumPy, OpenCV and PyTorch are loaded, which read them once. `usable_cores` heeds the first, too.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["OPENCV_FOR_THREADS_NUM"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
# What runs a model is assumed and not measured, here and in the processes that tests start.
os.environ["ANCHORLINE_MEASURE"] = "0"

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import hypothesis
import numpy as np
import pytest
from filelock import FileLock
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

    from anchorline.data.dataset import LabelledImage
    from anchorline.runtime.contract import Contract
    from anchorline.train.model.faster_rcnn import FasterRCNN
    from anchorline.train.model.settings import ModelSettings

SMALL_CANVAS = (128, 160)

cv2.setNumThreads(1)

# The same examples everywhere, and no failure for being slow on a busy machine.
hypothesis.settings.register_profile(
    "suite", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")

# A shell's background jobs ignore Ctrl-C, jobs under nohup a hang-up, and the processes that tests start and
# then signal would inherit that. A handler of Python's own is not inherited.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda number, frame: None)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """``once(name, make)``: the folder that ``make(folder)`` has filled; not to be changed.

    Whichever worker of pytest-xdist comes first makes it, the others wait for it and take it as it is.
    """
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "once"
    root.mkdir(exist_ok=True)

    def get(name: str, make: Callable[[Path], None]) -> Path:
        folder, unfinished = root / name, root / f"{name}.part"
        with FileLock(root / f"{name}.lock"):
            if not folder.exists():
                shutil.rmtree(unfinished, ignore_errors=True)  # where making it failed before
                unfinished.mkdir()
                make(unfinished)
                unfinished.rename(folder)
        return folder

    return get


@pytest.fixture(scope="session")
def onnx_of(
    once: Callable[[str, Callable[[Path], None]], Path],
) -> Callable[[FasterRCNN, Contract], onnx.ModelProto]:
    """``onnx_of(model, contract)``: what ``to_onnx`` makes of them, a copy each time.

    An export takes ten seconds, so equal models are exported once for all workers; only the contract is
    written anew.
    """

    import onnx

    from anchorline.export.onnx_export import OUTPUTS, to_onnx  # here: tests put this function in its place
    from anchorline.runtime.contract import CONTRACT_KEY

    def get(model: FasterRCNN, contract: Contract) -> onnx.ModelProto:
        kind = (model.settings, contract.task, contract.canvas, contract.input_dtype)
        key = hashlib.sha256(repr(kind).encode())
        for name, tensor in model.state_dict().items():
            key.update(name.encode())
            key.update(tensor.contiguous().numpy().tobytes())
        name = f"onnx-{key.hexdigest()[:16]}"
        made = once(name, lambda folder: onnx.save(to_onnx(model, contract), folder / "model.onnx"))
        proto = onnx.load(made / "model.onnx")
        del proto.metadata_props[:]
        contract = dataclasses.replace(contract, outputs=OUTPUTS[contract.task])
        onnx.helper.set_model_props(proto, {CONTRACT_KEY: contract.to_json()})
        return proto

    return get


@pytest.fixture(scope="session")
def one_box_model() -> Callable[[Contract], onnx.ModelProto]:
    """``one_box_model(contract)``: a network without weights that finds the same box of class 0 in any frame.

    Its canvas is the contract's.
    """
    from onnx import TensorProto, helper, numpy_helper

    from anchorline.runtime.contract import CONTRACT_KEY

    constants = {
        "box": np.array([[[0, 0, 8, 8]]], np.float32),
        "score": np.array([[0.9]], np.float32),
        "label": np.array([[0]], np.int32),
        "one": np.array([1], np.int32),
        "single": np.array([1]),
    }
    nodes = [
        helper.make_node("Shape", ["image_sizes"], ["batch"], start=0, end=1),
        helper.make_node("Concat", ["batch", "single"], ["row"], axis=0),
        helper.make_node("Concat", ["batch", "single", "single"], ["plane"], axis=0),
        helper.make_node("Expand", ["box", "plane"], ["boxes"]),
        helper.make_node("Expand", ["score", "row"], ["scores"]),
        helper.make_node("Expand", ["label", "row"], ["labels"]),
        helper.make_node("Expand", ["one", "batch"], ["num_detections"]),
    ]

    def make(contract: Contract) -> onnx.ModelProto:
        assert contract.canvas is not None
        graph = helper.make_graph(
            nodes,
            "one box",
            [
                helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", *contract.canvas, 3]),
                helper.make_tensor_value_info("image_sizes", TensorProto.FLOAT, ["B", 2]),
            ],
            [
                helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["B", 1, 4]),
                helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["B", 1]),
                helper.make_tensor_value_info("labels", TensorProto.INT32, ["B", 1]),
                helper.make_tensor_value_info("num_detections", TensorProto.INT32, ["B"]),
            ],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        helper.set_model_props(model, {CONTRACT_KEY: contract.to_json()})
        return model

    return make


@pytest.fixture
def make_image() -> Callable[..., LabelledImage]:
    """A labelled image in memory, 100 x 100 grey pixels."""
    from anchorline.data.dataset import LabelledImage

    def make(
        boxes: Sequence[Sequence[float]] = (),
        labels: Sequence[int] | None = None,
        difficult: Sequence[bool] | None = None,
        crowd: Sequence[bool] | None = None,
        id: str = "image",
    ) -> LabelledImage:
        count = len(boxes)
        return LabelledImage(
            id=id,
            size=(100, 100),
            boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
            labels=np.array(labels if labels is not None else [0] * count, dtype=np.int64),
            difficult=np.array(difficult if difficult is not None else [False] * count, dtype=np.bool_),
            crowd=np.array(crowd if crowd is not None else [False] * count, dtype=np.bool_),
            load=lambda: np.full((100, 100, 3), 128, np.uint8),
        )

    return make


@pytest.fixture(scope="session")
def tiny_weights(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Weights for the backbone of ``tiny.toml``: trainings that start from them end in the same model."""

    def make(folder: Path) -> None:
        import torch

        from anchorline.train.model.faster_rcnn import FasterRCNN
        from anchorline.train.settings import load_preset

        torch.manual_seed(0)
        model = FasterRCNN(load_preset(str(Path(__file__).with_name("tiny.toml"))).model, 1)
        torch.save(model.backbone.body.state_dict(), folder / "weights.pth")

    return once("tiny-weights", make) / "weights.pth"


@pytest.fixture(scope="session")
def small_settings() -> Callable[..., ModelSettings]:
    """``small_settings(neck, **changes)``: settings of a narrow model on a canvas of 128x160."""
    from anchorline.train.model.settings import ModelSettings

    def settings(neck: str = "fpn", **changes: object) -> ModelSettings:
        sizes = ((8.0,), (16.0,), (32.0,), (64.0,), (128.0,)) if neck == "fpn" else ((16.0, 48.0),)
        fields: dict[str, object] = {
            "neck": neck,
            "canvas": SMALL_CANVAS,
            "anchor_sizes": sizes,
            "fpn_channels": 16,
            "representation": 32,
            "canonical_size": 56.0,
            "rpn_pre_nms": 200,
            "rpn_post_nms": 60,
            "max_detections": 100,
        }
        return ModelSettings(**{**fields, **changes})  # type: ignore[arg-type]

    return settings


@pytest.fixture(scope="session")
def small_model(small_settings: Callable[..., ModelSettings]) -> Callable[..., FasterRCNN]:
    """``small_model(neck, classes, **changes)``: an untrained model that detects things.

    Its batch norms hold the statistics of noise images, without which features of random weights
    fade to nothing on the way; its heads are scaled up until scores spread and boxes move.
    """
    import torch

    from anchorline.train.model.faster_rcnn import FasterRCNN

    def take_statistics(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        module.running_mean.copy_(inputs[0].mean(dim=(0, 2, 3)))
        module.running_var.copy_(inputs[0].var(dim=(0, 2, 3)))

    @torch.no_grad()
    def model(neck: str = "fpn", classes: int = 3, **changes: object) -> FasterRCNN:
        torch.manual_seed(1)
        built = FasterRCNN(small_settings(neck, **changes), classes).eval()
        norms = [module for module in built.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        hooks = [norm.register_forward_pre_hook(take_statistics) for norm in norms]
        height, width = built.settings.canvas
        built.features(torch.rand(2, height, width, 3) * 255, torch.tensor([[height, width]] * 2))
        for hook in hooks:
            hook.remove()
        built.rpn.head.cls_logits.weight.mul_(30)
        built.rpn.head.bbox_pred.weight.mul_(10)
        built.roi_heads.box_predictor.cls_score.weight.mul_(15)
        built.roi_heads.box_predictor.bbox_pred.weight.mul_(10)
        return built

    return model


@pytest.fixture(scope="session")
def model_without_ties(small_model: Callable[..., FasterRCNN]) -> FasterRCNN:
    """An untrained model for the five synthetic classes that detects alike on every processor.

    Without NMS, and with room for every proposal and every detection: among hundreds of overlapping boxes of
    random weights rounding decides some comparison; a trained model's detections stand apart.
    Only a score at a threshold is still left to rounding.
    """
    return small_model(
        "single",
        5,
        backbone="resnet18",
        canvas=(64, 96),
        anchor_sizes=((24.0,),),
        rpn_pre_nms=72,
        rpn_post_nms=72,
        rpn_nms_iou=1.0,
        nms_iou=1.0,
        max_detections=72 * 5,
    )


@pytest.fixture
def small_resnet(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a narrow ResNet, one bottleneck a stage, which is a backbone while the test runs."""
    from torch import nn
    from torchvision.models.resnet import Bottleneck, ResNet

    from anchorline.train.model.backbones import BACKBONES

    class NarrowResNet(ResNet):
        def __init__(self, norm_layer: Callable[..., nn.Module]) -> None:
            nn.Module.__init__(self)
            self._norm_layer, self.inplanes, self.dilation = norm_layer, 8, 1
            self.groups, self.base_width = 1, 64
            self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), norm_layer(8)
            self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
            for number in range(1, 5):
                stride = 1 if number == 1 else 2
                stage = self._make_layer(Bottleneck, 4 * 2 ** (number - 1), 1, stride)
                self.add_module(f"layer{number}", stage)

    maps = {4: ("layer1", 16), 8: ("layer2", 32), 16: ("layer3", 64), 32: ("layer4", 128)}
    spec = dataclasses.replace(BACKBONES["resnet50"], build=NarrowResNet, maps=maps)
    monkeypatch.setitem(BACKBONES, "small_resnet", spec)
    return "small_resnet"


@pytest.fixture
def small_detectron2(
    small_model: Callable[..., FasterRCNN], small_resnet: str
) -> Callable[[str], FasterRCNN]:
    """``small_detectron2(kind)``: a narrow model of Detectron2's kind ``c4``, ``dc5`` or ``fpn``.

    Its deltas are small, so that proposals differ and no box is wild; no overlap is too large, since rounding
    would decide ties. 20 x 22 places of 15 anchors make 6600 candidates, of which 6000 are chosen.
    """
    import torch

    one_map = {"bottleneck_stride": "1x1", "anchor_sizes": ((16.0, 32.0, 64.0, 128.0, 256.0),)}
    common: dict[str, object] = {
        "canvas": (320, 352),
        "anchor_style": "unrounded",
        "roi_sampling": 0,
        "roi_aligned": True,
        "rpn_min_side": 0.0,
        "box_min_side": 0.0,
        "rpn_pre_nms": 6000,
        "rpn_post_nms": 40,
        "rpn_nms_iou": 1.0,
        "nms_iou": 1.0,
    }
    kinds: dict[str, dict[str, object]] = {
        "c4": {"neck": "single", "box_head": "res5", "roi_size": 14, **one_map},
        "dc5": {"neck": "dc5", **one_map},
        "fpn": {
            "neck": "fpn",
            "roi_level_rule": "mmdetection",
            "clamp_deltas_below": True,
            "rpn_pre_nms": 200,
            "canvas": SMALL_CANVAS,
        },
    }

    def model(kind: str) -> FasterRCNN:
        built = small_model(**{"classes": 3, "backbone": small_resnet, **common, **kinds[kind]})
        with torch.no_grad():
            built.rpn.head.bbox_pred.weight.mul_(0.2)
            built.roi_heads.box_predictor.bbox_pred.weight.mul_(0.2)
        return built

    return model


@pytest.fixture(scope="session")
def check_same_rows() -> Callable[..., None]:
    """``check_same_rows(found, expected)`` for detections as rows (x1, y1, x2, y2, score[, label]).

    Each row needs a partner within the tolerances, in whatever slot: near-equal scores swap
    places. With random weights hundreds of overlapping boxes meet, and rounding may decide an
    overlap at the NMS threshold either way; hence 3 % of the rows may go without.
    """

    def check(
        found: NDArray[np.float64], expected: NDArray[np.float64], box: float = 0.05, score: float = 1e-4
    ) -> None:
        assert found.shape[1] == expected.shape[1]
        tolerance = np.array([box, box, box, box, score, 0.0][: expected.shape[1]])
        close = (np.abs(found[:, None] - expected[None]) <= tolerance).all(axis=2)
        for alone, rows in ((~close.any(axis=1), found), (~close.any(axis=0), expected)):
            assert alone.sum() <= 0.03 * len(alone), f"no partner for {rows[alone].round(4).tolist()}"

    return check
