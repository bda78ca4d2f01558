"""Detectron2's checkpoints: published names and shapes, known numbers, a result worked out by hand."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from anchorline.export.importers import configuration, conversion, detectron2, torchvision
from anchorline.export.importers.checkpoint_files import CheckpointFile
from anchorline.export.importers.conversion import import_checkpoint
from anchorline.export.importers.library import (
    Architecture,
    background_first,
    choose_class_names,
    ratio_by_ratio,
)
from anchorline.runtime.contract import ResizeRule
from anchorline.runtime.io.errors import AnchorlineError, ArtefactError, SettingsError
from anchorline.train.checkpoint import expected_shapes, load_checkpoint
from anchorline.train.model.settings import ModelSettings

Shapes = dict[str, tuple[int, ...]]

BLOCKS = {"r50": (3, 4, 6, 3), "r101": (3, 4, 23, 3), "x101": (3, 4, 23, 3)}


def norm(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.norm.{part}", (channels,)


def stage(name: str, blocks: int, inputs: int, width: int, outputs: int, groups: int = 1) -> Shapes:
    """``make_stage`` of ``modeling/backbone/resnet.py``: bottlenecks, a shortcut where the width changes."""
    shapes: Shapes = {}
    for block in range(blocks):
        into = inputs if block == 0 else outputs
        convs = {
            "conv1": (width, into, 1, 1),
            "conv2": (width, width // groups, 3, 3),
            "conv3": (outputs, width, 1, 1),
        }
        if into != outputs:
            convs["shortcut"] = (outputs, into, 1, 1)
        for conv, shape in convs.items():
            shapes[f"{name}.{block}.{conv}.weight"] = shape
            shapes.update(norm(f"{name}.{block}.{conv}", shape[0]))
    return shapes


def published(arch: str, classes: int = 80, fpn: int = 256, fc: int = 1024) -> Shapes:
    """Names and shapes of a model of the zoo, written down from Detectron2's modules."""
    depth, kind = arch.split("_")[1:]
    body = "backbone.bottom_up" if kind == "fpn" else "backbone"
    groups, first = (32, 256) if depth == "x101" else (1, 64)
    shapes: Shapes = {f"{body}.stem.conv1.weight": (64, 3, 7, 7), **dict(norm(f"{body}.stem.conv1", 64))}
    inputs = 64
    for number, blocks in zip(range(2, 6), BLOCKS[depth], strict=True):
        name = "roi_heads.res5" if kind == "c4" and number == 5 else f"{body}.res{number}"
        outputs = 64 * 2**number
        shapes.update(stage(name, blocks, inputs, first * 2 ** (number - 2), outputs, groups))
        inputs = outputs
    maps = {"fpn": fpn, "c4": 1024, "dc5": 2048}[kind]
    anchors = 3 if kind == "fpn" else 15
    if kind == "fpn":
        for number in range(2, 6):
            shapes[f"backbone.fpn_lateral{number}.weight"] = (fpn, 64 * 2**number, 1, 1)
            shapes[f"backbone.fpn_output{number}.weight"] = (fpn, fpn, 3, 3)
            shapes.update({f"backbone.fpn_{each}{number}.bias": (fpn,) for each in ("lateral", "output")})
    for name, outputs, side in (
        ("conv", maps, 3),
        ("objectness_logits", anchors, 1),
        ("anchor_deltas", 4 * anchors, 1),
    ):
        shapes[f"proposal_generator.rpn_head.{name}.weight"] = (outputs, maps, side, side)
        shapes[f"proposal_generator.rpn_head.{name}.bias"] = (outputs,)
    width = 2048
    if kind != "c4":
        width = fc
        for name, into in (("fc1", maps * 49), ("fc2", fc)):
            shapes[f"roi_heads.box_head.{name}.weight"] = (fc, into)
            shapes[f"roi_heads.box_head.{name}.bias"] = (fc,)
    for name, rows in (("cls_score", classes + 1), ("bbox_pred", 4 * classes)):
        shapes[f"roi_heads.box_predictor.{name}.weight"] = (rows, width)
        shapes[f"roi_heads.box_predictor.{name}.bias"] = (rows,)
    return shapes


@pytest.mark.parametrize("arch", detectron2.ARCHITECTURES)
def test_every_published_name_has_its_place(arch: str) -> None:
    """Nothing is allocated: names and shapes of the whole models, in full size."""
    settings = detectron2.ARCHITECTURES[arch].settings
    ours = {
        detectron2.LIBRARY.their_name(name, settings): shape
        for name, shape in expected_shapes(settings, 80).items()
        if not name.endswith("num_batches_tracked")
    }
    theirs = published(arch)
    for part in ("weight", "bias"):  # four more rows for the background
        name = f"roi_heads.box_predictor.bbox_pred.{part}"
        theirs[name] = (theirs[name][0] + 4, *theirs[name][1:])
    assert ours == theirs


@pytest.mark.parametrize("arch", detectron2.ARCHITECTURES)
def test_the_tensors_show_the_architecture(arch: str) -> None:
    state = {name: torch.empty(shape, device="meta") for name, shape in published(arch).items()}
    expected = None if arch == "detectron2_x101_c4" else arch
    assert detectron2.LIBRARY.recognise(None, state) == expected  # type: ignore[arg-type]
    assert torchvision.LIBRARY.recognise(None, state) is None  # type: ignore[arg-type]


COMMON = {
    "backbone_norm": "frozen",
    "backbone_norm_eps": 1e-5,
    "anchor_style": "unrounded",
    "aspect_ratios": (0.5, 1.0, 2.0),
    "clamp_deltas": True,
    "clamp_deltas_below": False,
    "rpn_score": "sigmoid",
    "rpn_convs": 1,
    "rpn_post_nms": 1000,
    "rpn_nms_iou": 0.7,
    "rpn_min_side": 0.0,
    "rpn_score_threshold": 0.0,
    "roi_pooling": "align",
    "roi_sampling": 0,
    "roi_aligned": True,
    "canonical_size": 224.0,
    "box_weights": (10.0, 10.0, 5.0, 5.0),
    "score_threshold": 0.05,
    "nms_iou": 0.5,
    "max_detections": 100,
    "channel_order": "bgr",
    "mean": (103.53, 116.28, 123.675),
}
SIZES = (32.0, 64.0, 128.0, 256.0, 512.0)
BY_KIND = {  # configs/Base-RCNN-{FPN,C4,DilatedC5}.yaml over config/defaults.py
    "fpn": {
        "neck": "fpn",
        "anchor_sizes": tuple((size,) for size in SIZES),
        "rpn_pre_nms": 1000,
        "roi_size": 7,
        "roi_level_rule": "detectron2",
        "box_head": "fc",
    },
    "c4": {
        "neck": "single",
        "anchor_sizes": (SIZES,),
        "rpn_pre_nms": 6000,
        "roi_size": 14,
        "box_head": "res5",
    },
    "dc5": {"neck": "dc5", "anchor_sizes": (SIZES,), "rpn_pre_nms": 6000, "roi_size": 7, "box_head": "fc"},
}


@pytest.mark.parametrize("arch", detectron2.ARCHITECTURES)
def test_the_rules_are_the_zoos(arch: str) -> None:
    depth, kind = arch.split("_")[1:]
    resnext = depth == "x101"
    expected = {
        **COMMON,
        **BY_KIND[kind],
        "backbone": {"r50": "resnet50", "r101": "resnet101", "x101": "resnext101_32x8d"}[depth],
        "bottleneck_stride": "3x3" if resnext else "1x1",
        "std": (57.375, 57.12, 58.395) if resnext else (1.0, 1.0, 1.0),
    }
    settings = detectron2.ARCHITECTURES[arch].settings
    assert {name: getattr(settings, name) for name in expected} == expected
    assert settings.profile == "detectron2"
    assert detectron2.ARCHITECTURES[arch].resize == ResizeRule(800, 1333, "antialiased", "nearest")


# Rows, worked out by hand.


def test_the_background_moves_from_the_last_row_to_the_first() -> None:
    """Two classes, 7 and 8, and the background 9; deltas 10 to 17."""
    state = {
        "roi_heads.box_predictor.cls_score.weight": torch.tensor([[7.0], [8.0], [9.0]]),
        "roi_heads.box_predictor.cls_score.bias": torch.tensor([70.0, 80.0, 90.0]),
        "roi_heads.box_predictor.bbox_pred.weight": torch.arange(10.0, 18.0)[:, None],
        "roi_heads.box_predictor.bbox_pred.bias": torch.arange(100.0, 108.0),
    }
    ours = background_first(state)
    assert ours["roi_heads.box_predictor.cls_score.weight"].tolist() == [[9], [7], [8]]
    assert ours["roi_heads.box_predictor.cls_score.bias"].tolist() == [90, 70, 80]
    rows = ours["roi_heads.box_predictor.bbox_pred.weight"].flatten().tolist()
    assert rows == [0, 0, 0, 0, 10, 11, 12, 13, 14, 15, 16, 17]
    bias = ours["roi_heads.box_predictor.bbox_pred.bias"].tolist()
    assert bias == [0, 0, 0, 0, 100, 101, 102, 103, 104, 105, 106, 107]
    assert state["roi_heads.box_predictor.cls_score.bias"].tolist() == [70, 80, 90], "the input is left alone"


def test_class_agnostic_deltas_are_repeated_for_each_class() -> None:
    state = {
        "roi_heads.box_predictor.cls_score.weight": torch.tensor([[7.0], [8.0], [9.0]]),
        "roi_heads.box_predictor.bbox_pred.weight": torch.tensor([[1.0], [2.0], [3.0], [4.0]]),
    }
    rows = background_first(state)["roi_heads.box_predictor.bbox_pred.weight"].flatten().tolist()
    assert rows == [0, 0, 0, 0, 1, 2, 3, 4, 1, 2, 3, 4]


def test_anchors_move_from_size_by_size_to_ratio_by_ratio() -> None:
    """Two sizes a and b, three ratios 1 to 3: a1 a2 a3 b1 b2 b3 becomes a1 b1 a2 b2 a3 b3."""
    settings = ModelSettings(neck="single", anchor_sizes=((32.0, 64.0),))
    a1, a2, a3, b1, b2, b3 = 0.0, 1.0, 2.0, 3.0, 4.0, 5.0
    ours = ratio_by_ratio(
        {
            "rpn.head.cls_logits.weight": torch.arange(6.0).reshape(6, 1, 1, 1),
            "rpn.head.cls_logits.bias": torch.arange(6.0),
            "rpn.head.bbox_pred.weight": torch.arange(24.0).reshape(24, 1, 1, 1),
            "rpn.head.bbox_pred.bias": torch.arange(24.0),
        },
        settings,
    )
    order = [a1, b1, a2, b2, a3, b3]
    deltas = [4 * anchor + delta for anchor in order for delta in range(4)]
    assert ours["rpn.head.cls_logits.weight"].flatten().tolist() == order
    assert ours["rpn.head.cls_logits.bias"].tolist() == order
    assert ours["rpn.head.bbox_pred.weight"].flatten().tolist() == deltas
    assert ours["rpn.head.bbox_pred.bias"].tolist() == deltas


# Whole files, with a narrow pyramid and head.


def numbered(arch: str, classes: int, **widths: int) -> dict[str, Tensor]:
    """A state dict whose tensors hold different numbers, small enough for half precision."""
    return {
        name: torch.arange(int(np.prod(shape))).remainder(997 - len(name)).half().reshape(shape)
        for name, shape in published(arch, classes, **widths).items()
    }


def cell_anchors() -> dict[str, Tensor]:
    """What ``cell_anchors`` of the FPN models holds, from the numbers that everybody knows for size 32."""
    base = torch.tensor(
        [
            [-22.627417, -11.3137085, 22.627417, 11.3137085],
            [-16.0, -16.0, 16.0, 16.0],
            [-11.3137085, -22.627417, 11.3137085, 22.627417],
        ]
    )
    name = "proposal_generator.anchor_generator.cell_anchors"
    return {f"{name}.{level}": base * 2**level for level in range(5)}


@pytest.fixture(scope="module")
def fpn_state() -> dict[str, Tensor]:
    return numbered("detectron2_r50_fpn", 2, fpn=4, fc=8)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classes") / "classes.txt"
    path.write_text("cat\ndog\n", encoding="utf-8")
    return path


def as_pkl(state: dict[str, Tensor], path: Path) -> Path:
    """The zoo's form."""
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    return path


def test_a_pkl_of_the_zoo_becomes_a_model(
    fpn_state: dict[str, Tensor], classes: Path, tmp_path: Path
) -> None:
    statistics = {
        "pixel_mean": torch.tensor([103.53, 116.28, 123.675]).reshape(3, 1, 1),
        "pixel_std": torch.tensor([57.375, 57.12, 58.395]).reshape(3, 1, 1),
    }
    path = as_pkl({**fpn_state, **statistics, **cell_anchors()}, tmp_path / "model_final.pkl")
    out = tmp_path / "model.safetensors"
    result = import_checkpoint(path, out, classes=classes)
    saved = load_file(out)

    def same(ours: str, theirs: str) -> None:
        assert torch.equal(saved[ours], fpn_state[theirs].float()), ours

    same("backbone.body.conv1.weight", "backbone.bottom_up.stem.conv1.weight")
    same("backbone.body.bn1.running_var", "backbone.bottom_up.stem.conv1.norm.running_var")
    same("backbone.body.layer1.0.downsample.0.weight", "backbone.bottom_up.res2.0.shortcut.weight")
    same("backbone.body.layer1.0.downsample.1.bias", "backbone.bottom_up.res2.0.shortcut.norm.bias")
    same("backbone.body.layer3.5.conv2.weight", "backbone.bottom_up.res4.5.conv2.weight")
    same("backbone.body.layer4.2.bn3.running_mean", "backbone.bottom_up.res5.2.conv3.norm.running_mean")
    same("backbone.fpn.inner_blocks.0.0.weight", "backbone.fpn_lateral2.weight")
    same("backbone.fpn.inner_blocks.3.0.bias", "backbone.fpn_lateral5.bias")
    same("backbone.fpn.layer_blocks.1.0.weight", "backbone.fpn_output3.weight")
    same("rpn.head.conv.0.0.weight", "proposal_generator.rpn_head.conv.weight")
    same("rpn.head.cls_logits.weight", "proposal_generator.rpn_head.objectness_logits.weight")
    same("rpn.head.bbox_pred.bias", "proposal_generator.rpn_head.anchor_deltas.bias")
    same("roi_heads.box_head.fc6.weight", "roi_heads.box_head.fc1.weight")
    same("roi_heads.box_head.fc7.bias", "roi_heads.box_head.fc2.bias")
    theirs = fpn_state["roi_heads.box_predictor.cls_score.weight"].float()
    assert torch.equal(saved["roi_heads.box_predictor.cls_score.weight"], theirs[[2, 0, 1]])
    rows = saved["roi_heads.box_predictor.bbox_pred.bias"].tolist()
    assert rows == [0, 0, 0, 0, *fpn_state["roi_heads.box_predictor.bbox_pred.bias"].tolist()]

    model, contract = load_checkpoint(out)
    assert contract == result.contract
    assert contract.names == ("cat", "dog")
    assert contract.profile == "detectron2"
    assert contract.resize == ResizeRule(800, 1333, "antialiased", "nearest")
    assert (contract.input_dtype, contract.channel_order, contract.canvas) == ("uint8", "bgr", None)
    assert contract.mean == (103.53, 116.28, 123.675)
    assert contract.std == (57.375, 57.12, 58.395)
    assert contract.source["library"] == "Detectron2"
    assert contract.source["arch"] == "detectron2_r50_fpn"
    assert model.settings.anchor_sizes == tuple((size,) for size in SIZES)
    assert model.backbone.body.get_submodule("layer2.0.conv1").stride == (2, 2), "MSRA's stride"
    taken_as, assumed, stride = result.warnings
    assert "Detectron2's, taken as detectron2_r50_fpn" in taken_as
    assert "assumed detectron2_r50_fpn's usual --resize 800x1333, channel_order=bgr, bottle" in assumed
    assert "mean=" not in assumed, "the checkpoint holds it"
    assert "anchor_sizes" not in assumed
    assert "--set bottleneck_stride=3x3" in stride


def test_a_training_checkpoint_of_c4_becomes_a_model(classes: Path, tmp_path: Path) -> None:
    """Fifteen anchors at a place and the fourth stage in the head; ``.pth`` as the trainer writes it."""
    state = numbered("detectron2_r50_c4", 2)
    path, out = tmp_path / "model_final.pth", tmp_path / "model.safetensors"
    torch.save(
        {"model": state, "optimizer": {"state": {}}, "scheduler": {"last_epoch": 9}, "iteration": 9}, path
    )
    result = import_checkpoint(path, out, classes=classes, arch="detectron2_r50_c4", fast_resize=True)
    saved = load_file(out)
    head = "roi_heads.box_head.layer4"
    assert torch.equal(saved[f"{head}.0.conv1.weight"], state["roi_heads.res5.0.conv1.weight"].float())
    assert torch.equal(saved[f"{head}.2.bn2.bias"], state["roi_heads.res5.2.conv2.norm.bias"].float())
    assert torch.equal(
        saved[f"{head}.0.downsample.1.bias"], state["roi_heads.res5.0.shortcut.norm.bias"].float()
    )
    assert not any(name.startswith("backbone.body.layer4") for name in saved)
    # Row s * 3 + r of theirs is row r * 5 + s of ours.
    logits = state["proposal_generator.rpn_head.objectness_logits.bias"].tolist()
    expected = [logits[size * 3 + ratio] for ratio in range(3) for size in range(5)]
    assert saved["rpn.head.cls_logits.bias"].tolist() == expected
    deltas = state["proposal_generator.rpn_head.anchor_deltas.bias"].reshape(15, 4).tolist()
    moved = [deltas[size * 3 + ratio] for ratio in range(3) for size in range(5)]
    assert saved["rpn.head.bbox_pred.bias"].reshape(15, 4).tolist() == moved
    assert result.settings.rpn_pre_nms == 6000
    assert result.contract.resize == ResizeRule(800, 1333, "bilinear", "nearest", padding=1)
    (assumed,) = result.warnings
    assert (
        "assumed detectron2_r50_c4's usual --resize 800x1333, anchor_sizes=[[32, 64, 128, 256, 512]], "
        in assumed
    )
    assert "roi_size=14" in assumed
    model, _ = load_checkpoint(out)
    assert model.roi_heads.box_head.get_submodule("layer4.0.conv1").stride == (2, 2)


# ``config.yaml``: those keys of the dumped configuration that are read, with the defaults of the FPN models.
CONFIG = """
INPUT: {FORMAT: BGR, MIN_SIZE_TEST: 800, MAX_SIZE_TEST: 1333}
MODEL:
  ANCHOR_GENERATOR:
    ASPECT_RATIOS:
    - - 0.5
      - 1.0
      - 2.0
    NAME: DefaultAnchorGenerator
    OFFSET: 0.0
    SIZES: [[32], [64], [128], [256], [512]]
  BACKBONE: {FREEZE_AT: 2, NAME: build_resnet_fpn_backbone}
  FPN: {FUSE_TYPE: sum, IN_FEATURES: [res2, res3, res4, res5], NORM: '', OUT_CHANNELS: 256}
  LOAD_PROPOSALS: false
  META_ARCHITECTURE: GeneralizedRCNN
  PIXEL_MEAN: [103.53, 116.28, 123.675]
  PIXEL_STD: [1.0, 1.0, 1.0]
  PROPOSAL_GENERATOR: {MIN_SIZE: 0, NAME: RPN}
  RESNETS:
    DEFORM_ON_PER_STAGE: [false, false, false, false]
    DEPTH: 50
    NORM: FrozenBN
    RES5_DILATION: 1
    STRIDE_IN_1X1: true
  ROI_BOX_HEAD:
    BBOX_REG_WEIGHTS: &id001
    - 10.0
    - 10.0
    - 5.0
    - 5.0
    NAME: FastRCNNConvFCHead
    NUM_CONV: 0
    NUM_FC: 2
    POOLER_RESOLUTION: 7
    POOLER_SAMPLING_RATIO: 0
    POOLER_TYPE: ROIAlignV2
    USE_SIGMOID_CE: false
  ROI_HEADS:
    IN_FEATURES: [p2, p3, p4, p5]
    NAME: StandardROIHeads
    NMS_THRESH_TEST: 0.5
    NUM_CLASSES: 2
    SCORE_THRESH_TEST: 0.05
  RPN:
    BBOX_REG_WEIGHTS: [1.0, 1.0, 1.0, 1.0]
    CONV_DIMS: [-1]
    HEAD_NAME: StandardRPNHead
    IN_FEATURES: [p2, p3, p4, p5, p6]
    NMS_THRESH: 0.7
    POST_NMS_TOPK_TEST: 1000
    PRE_NMS_TOPK_TEST: 1000
TEST: {DETECTIONS_PER_IMAGE: 100}
VERSION: 2
"""
TRAINED_OTHERWISE = {  # what stands in the text, what instead, and our settings for it
    "FORMAT: BGR": ("FORMAT: RGB", {"channel_order": "rgb"}),
    "SIZES: [[32], [64], [128], [256], [512]]": (
        "SIZES: [[8], [16], [32], [64], [128]]",
        {"anchor_sizes": ((8,), (16,), (32,), (64,), (128,))},
    ),
    "- - 0.5": ("- - 0.25", {"aspect_ratios": (0.25, 1.0, 2.0)}),
    "[103.53, 116.28, 123.675]": ("[1.0, 2.0, 3.5]", {"mean": (1.0, 2.0, 3.5)}),
    "PIXEL_STD: [1.0, 1.0, 1.0]": ("PIXEL_STD: (57.375, 57.12, 58.395)", {"std": (57.375, 57.12, 58.395)}),
    "STRIDE_IN_1X1: true": ("STRIDE_IN_1X1: false", {"bottleneck_stride": "3x3"}),
    "- 10.0\n    - 10.0\n    - 5.0\n    - 5.0": (
        "- 20.0\n    - 20\n    - 10\n    - 10.0",
        {"box_weights": (20.0, 20.0, 10.0, 10.0)},
    ),
    "POOLER_SAMPLING_RATIO: 0": ("POOLER_SAMPLING_RATIO: 2", {"roi_sampling": 2}),
    "POOLER_TYPE: ROIAlignV2": ("POOLER_TYPE: ROIAlign", {"roi_aligned": False}),
    "{MIN_SIZE: 0": ("{MIN_SIZE: 3", {"rpn_min_side": 3.0}),
    "NMS_THRESH: 0.7": ("NMS_THRESH: 0.6", {"rpn_nms_iou": 0.6}),
    "POST_NMS_TOPK_TEST: 1000": ("POST_NMS_TOPK_TEST: 300", {"rpn_post_nms": 300}),
    "PRE_NMS_TOPK_TEST: 1000": ("PRE_NMS_TOPK_TEST: 2000", {"rpn_pre_nms": 2000}),
    "CONV_DIMS: [-1]": ("CONV_DIMS: [64]", {"rpn_channels": 64}),
    "SCORE_THRESH_TEST: 0.05": ("SCORE_THRESH_TEST: 0.3", {"score_threshold": 0.3}),
    "NMS_THRESH_TEST: 0.5": ("NMS_THRESH_TEST: 0.4", {"nms_iou": 0.4}),
    "DETECTIONS_PER_IMAGE: 100": ("DETECTIONS_PER_IMAGE: 7", {"max_detections": 7}),
}


@pytest.fixture
def configured(tmp_path: Path) -> Callable[[str], Architecture]:
    """What a checkpoint of two classes and three anchors is described as, with this ``config.yaml``."""

    def describe(text: str, **held: Tensor) -> Architecture:
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
        state = {
            "roi_heads.box_predictor.cls_score.weight": torch.zeros(3, 8),
            "proposal_generator.rpn_head.objectness_logits.weight": torch.zeros(3, 4, 1, 1),
            **held,
        }
        source = CheckpointFile("model_final.pth", state, "", folder=tmp_path)
        return detectron2.LIBRARY.describe(source, state, "detectron2_r50_fpn")

    return describe


def test_a_configuration_of_the_zoo_changes_nothing_and_leaves_nothing_open(
    configured: Callable[..., Architecture],
) -> None:
    found, usual = configured(CONFIG), detectron2.ARCHITECTURES["detectron2_r50_fpn"]
    assert (found.settings, found.resize) == (usual.settings, usual.resize)
    assert found.known == set(detectron2.LIBRARY.open_settings)
    assert found.warnings == ()
    assert found.configuration is not None
    assert found.configuration.endswith("config.yaml")


@pytest.mark.parametrize("before", TRAINED_OTHERWISE)
def test_what_was_trained_otherwise_is_taken(before: str, configured: Callable[..., Architecture]) -> None:
    after, changes = TRAINED_OTHERWISE[before]
    assert CONFIG.count(before) == 1
    usual = detectron2.ARCHITECTURES["detectron2_r50_fpn"].settings
    assert configured(CONFIG.replace(before, after)).settings == dataclasses.replace(usual, **changes)


def test_sizes_of_images_and_one_list_for_all_levels(configured: Callable[..., Architecture]) -> None:
    text = CONFIG.replace(
        "MIN_SIZE_TEST: 800, MAX_SIZE_TEST: 1333", "MIN_SIZE_TEST: 600, MAX_SIZE_TEST: 1000"
    )
    found = configured(text.replace("[[32], [64], [128], [256], [512]]", "[[48]]"))
    assert (found.resize.shorter_side, found.resize.longer_side) == (600, 1000)
    assert found.settings.anchor_sizes == ((48.0,),) * 5


NO_FORM_HERE = {
    "NAME: StandardROIHeads": (
        "NAME: CascadeROIHeads",
        "MODEL.ROI_HEADS.NAME is 'CascadeROIHeads'; can be imp",
    ),
    "NAME: RPN}": ("NAME: RRPN}", "MODEL.PROPOSAL_GENERATOR.NAME is 'RRPN'; can be imported with 'RPN'"),
    "NAME: build_resnet_fpn_backbone": (
        "NAME: build_regnet_fpn_backbone",
        "MODEL.BACKBONE.NAME is 'build_reg",
    ),
    "DefaultAnchorGenerator": (
        "RotatedAnchorGenerator",
        "MODEL.ANCHOR_GENERATOR.NAME is 'RotatedAnchorGenerator'",
    ),
    "OFFSET: 0.0": ("OFFSET: 0.5", "MODEL.ANCHOR_GENERATOR.OFFSET is 0.5; can be imported with 0"),
    "[false, false, false, false]": (
        "[false, true, true, true]",
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE is [Fal",
    ),
    "NORM: FrozenBN": ("NORM: GN", "MODEL.RESNETS.NORM is 'GN'; can be imported with 'FrozenBN' or 'BN'"),
    "FUSE_TYPE: sum": ("FUSE_TYPE: avg", "MODEL.FPN.FUSE_TYPE is 'avg'; can be imported with 'sum'"),
    "POOLER_TYPE: ROIAlignV2": (
        "POOLER_TYPE: ROIPool",
        "POOLER_TYPE is 'ROIPool'; can be imported with ROIAlignV2",
    ),
    "NUM_CONV: 0": ("NUM_CONV: 4", "MODEL.ROI_BOX_HEAD.NUM_CONV is 4; can be imported with 0"),
    "USE_SIGMOID_CE: false": ("USE_SIGMOID_CE: true", "USE_SIGMOID_CE is True; can be imported with False"),
    "[1.0, 1.0, 1.0, 1.0]": (
        "[10.0, 10.0, 5.0, 5.0]",
        "MODEL.RPN.BBOX_REG_WEIGHTS is [10.0, 10.0, 5.0, 5.0]",
    ),
    "CONV_DIMS: [-1]": ("CONV_DIMS: [-1, -1]", "CONV_DIMS is [-1, -1]; can be imported with one convolution"),
    "FORMAT: BGR": ("FORMAT: L", "INPUT.FORMAT is 'L'; can be imported with BGR or RGB"),
    "MIN_SIZE_TEST: 800": ("MIN_SIZE_TEST: 0", "resize.shorter_side is 0; expected null or a pos"),
    "SIZES: [[32], [64]": ("SIZES: [[32, 40], [64]", "model.anchor_sizes is"),
    "[256], [512]]": (
        "[256]]",
        "SIZES is [[32], [64], [128], [256]]; can be imported with a list for each of 5",
    ),
    "NUM_CLASSES: 2": (
        "NUM_CLASSES: 80",
        "gives 80 classes, and the checkpoint has 2; if it is not this model's, give",
    ),
    "      - 2.0\n": ("", "gives 2 anchors at each place, and the checkpoint has 3"),
    "DEPTH: 50": ("DEPTH: 101", "MODEL.RESNETS.DEPTH gives 101 layers, and the checkpoint has 50"),
    "NMS_THRESH_TEST: 0.5": ("NMS_THRESH_TEST: 1.5", "model.nms_iou is 1.5; expected a number from 0 to 1"),
    "SCORE_THRESH_TEST: 0.05": (
        "SCORE_THRESH_TEST: .nan",
        "SCORE_THRESH_TEST is nan; can be imported with a f",
    ),
    "VERSION: 2": (
        "_BASE_: ../Base-RCNN-FPN.yaml",
        "is built on '../Base-RCNN-FPN.yaml'; expected the whole",
    ),
    "BBOX_REG_WEIGHTS: &id001": (
        "BBOX_REG_WEIGHTS: !!python/object/apply:eval [1]\n    OTHER:",
        "is an expression",
    ),
    "INPUT: {": ("INPUT: [", "cannot be read as YAML"),
}


@pytest.mark.parametrize("before", NO_FORM_HERE)
def test_what_has_no_form_here_is_refused_by_its_name(
    before: str, configured: Callable[..., Architecture]
) -> None:
    after, part = NO_FORM_HERE[before]
    assert CONFIG.count(before) == 1
    with pytest.raises(ArtefactError) as caught:
        configured(CONFIG.replace(before, after))
    assert part in str(caught.value)
    assert "config.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["INPUT: {", "a: " + "x" * configuration.LONGEST, "\x00: \x01", CONFIG.replace("FPN: {F", "FPN: [{F")],
)
def test_what_cannot_be_read_beside_a_checkpoint_says_what_to_give(
    text: str, configured: Callable[..., Architecture]
) -> None:
    with pytest.raises(ArtefactError, match=r"if it is not this model's, give the one that is with --config"):
        configured(text)


def test_a_configuration_of_another_model_is_told_by_what_the_checkpoint_holds(
    configured: Callable[..., Architecture],
) -> None:
    held = {"pixel_std": torch.tensor([57.375, 57.12, 58.395])}
    with pytest.raises(
        ArtefactError, match=r"gives std as \[1, 1, 1\], and the checkpoint holds \[57\.375, "
    ):
        configured(CONFIG, **held)
    same = configured(
        CONFIG.replace("PIXEL_STD: [1.0, 1.0, 1.0]", "PIXEL_STD: [57.375, 57.12, 58.395]"), **held
    )
    assert same.settings.std == (57.375, 57.12, 58.395)


def test_a_longer_side_below_the_shorter_bounds_both(configured: Callable[..., Architecture]) -> None:
    """``ResizeShortestEdge`` scales to the shorter side, and then down to the longest one that may be."""
    found = configured(CONFIG.replace("MAX_SIZE_TEST: 1333", "MAX_SIZE_TEST: 640")).resize
    assert (found.shorter_side, found.longer_side) == (640, 640)


def test_lazy_configurations_are_refused_and_other_programs_files_left_alone(
    configured: Callable[..., Architecture], tmp_path: Path
) -> None:
    lazy = "dataloader: {}\nmodel:\n  _target_: detectron2.modeling.GeneralizedRCNN\n"
    lazy += "  sizes: !!python/tuple [1, 2]\n  norm: !!python/name:torch.nn.BatchNorm2d ''\n"
    with pytest.raises(ArtefactError, match="is a LazyConfig, which is not read; expected the yacs form"):
        configured(lazy)
    other = configured("trainer: {gpus: 1}\nmodel: resnet\n")
    assert (other.configuration, other.known) == (None, frozenset())
    source = CheckpointFile("model.pth", {}, "", config=tmp_path / "config.yaml")
    with pytest.raises(ArtefactError, match=r"has no MODEL; expected the config\.yaml that Detectron2 wrote"):
        detectron2.configuration_of(source)
    with pytest.raises(ArtefactError, match="no such file"):
        detectron2.configuration_of(dataclasses.replace(source, config=tmp_path / "absent.yaml"))


def test_a_damaged_configuration_is_read_or_refused(configured: Callable[..., Architecture]) -> None:
    """Whatever is wrong in its text, no other exception comes out."""
    draw = random.Random(5)
    odd = (
        "9" * 400,
        "!!timestamp ",
        "!!python/object/apply:os.system ",
        "*id001",
        "<<: ",
        "? ",
        "!!float ",
        "0b2",
    )
    for _ in range(60):
        text = CONFIG
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(text))
            cut = draw.choice((0, 1, 20))
            text = text[:at] + draw.choice((*odd, *"0123.-:,[]{}&*!'#|>%@`\n ")) + text[at + cut :]
        with contextlib.suppress(AnchorlineError):
            configured(text)


def test_a_configuration_that_is_given_and_one_beside_the_checkpoint(
    fpn_state: dict[str, Tensor], classes: Path, tmp_path: Path
) -> None:
    """That which is given counts; each setting that it was imported with stands in the contract."""
    path, out, given = (tmp_path / name for name in ("model_final.pth", "model.safetensors", "given.yaml"))
    torch.save({"model": fpn_state}, path)
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    given.write_text(CONFIG.replace("[[32], [64], [128], [256], [512]]", "[[16], [32], [64], [128], [256]]"))
    result = import_checkpoint(path, out, classes=classes, config=given, overrides=["nms_iou=0.45"])
    assert result.warnings[1:] == (f"the settings are those of {given}",)
    source = load_checkpoint(out)[1].source
    assert source["configuration"] == "given.yaml"
    assert source["assumed"] == []
    assert source["settings"]["anchor_sizes"] == [[16], [32], [64], [128], [256]]
    assert source["settings"]["nms_iou"] == 0.45
    assert source["settings"]["resize"] == [800, 1333]
    with pytest.raises(SettingsError, match="torchvision writes no configuration that is read"):
        import_checkpoint(path, out, arch="fasterrcnn_resnet50_fpn", config=given)


def test_anchors_in_the_checkpoint_are_taken() -> None:
    """Sizes half as large, with the ratios 1/3, 1 and 3 in their order."""
    sizes, ratios = (16.0, 32.0, 64.0, 128.0, 256.0), (1 / 3, 1.0, 3.0)
    name = "proposal_generator.anchor_generator.cell_anchors"
    held = {}
    for level, size in enumerate(sizes):
        sides = [(size * (1 / ratio) ** 0.5, size * ratio**0.5) for ratio in ratios]
        held[f"{name}.{level}"] = torch.tensor([[-w / 2, -h / 2, w / 2, h / 2] for w, h in sides])

    def described(state: dict[str, Tensor]) -> ModelSettings:
        source = CheckpointFile("model.pkl", state, "")
        return detectron2.LIBRARY.describe(source, state, "detectron2_r50_fpn").settings

    settings = described(held)
    assert settings.anchor_sizes == tuple((size,) for size in sizes)
    assert settings.aspect_ratios == (0.33333, 1.0, 3.0)
    for wrong in (held[f"{name}.2"] + 8, torch.full((3, 4), float("nan")), torch.zeros(3, 4), torch.zeros(7)):
        with pytest.raises(ArtefactError, match=r"cell_anchors.\* are no anchors for 5 maps"):
            described({**held, f"{name}.2": wrong})
    with pytest.raises(ArtefactError, match="no anchors"):
        described({f"{name}.0": held[f"{name}.0"]})


@pytest.fixture
def refusal(
    fpn_state: dict[str, Tensor], classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """The one line that refuses ``fpn_state`` with some tensors changed; nothing is read or written."""

    def refuse(arch: str = "detectron2_r50_fpn", without: str = "-", **changes: Tensor) -> str:
        state = {**{n: t for n, t in fpn_state.items() if without not in n}, **changes}
        monkeypatch.setattr(
            conversion, "read_checkpoint_file", lambda path, _: CheckpointFile(path.name, state, "")
        )
        with pytest.raises(AnchorlineError) as caught:
            import_checkpoint(
                tmp_path / "model.pkl", tmp_path / "out.safetensors", arch=arch, classes=classes
            )
        text = str(caught.value)
        assert "\n" not in text
        assert len(text) < 900
        assert not (tmp_path / "out.safetensors").exists()
        return text

    return refuse


def test_what_does_not_fit_is_listed_by_detectron2s_names(refusal: Callable[..., str]) -> None:
    rpn = "proposal_generator.rpn_head"
    assert "4 missing (backbone.bottom_up.res3.1.conv2.norm.bias, " in refusal(without="res3.1.conv2.norm")
    text = refusal(**{"backbone.body.conv1.weight": torch.zeros(1)})
    assert "1 unknown (backbone.body.conv1.weight)" in text, "one of our names is none of theirs"
    text = refusal(**{"backbone.fpn_lateral3.bias": torch.zeros(7)})
    assert "1 of another shape (backbone.fpn_lateral3.bias is [7], expected [4])" in text
    text = refusal(**{f"{rpn}.conv.bias": torch.full((4,), float("inf"))})
    assert f"'{rpn}.conv.bias' holds values that are not finite" in text
    assert "a Mask R-CNN" in refusal(**{"roi_heads.mask_head.deconv.weight": torch.zeros(1)})
    assert "pixel_mean is [4], expected 3" in refusal(pixel_mean=torch.zeros(4))
    fifteen = {
        f"{rpn}.objectness_logits.weight": torch.zeros(15, 4, 1, 1),
        f"{rpn}.objectness_logits.bias": torch.zeros(15),
        f"{rpn}.anchor_deltas.weight": torch.zeros(60, 4, 1, 1),
        f"{rpn}.anchor_deltas.bias": torch.zeros(60),
    }
    assert "predicts 15 anchors at each place" in refusal(**fifteen)
    odd = {"roi_heads.box_predictor.bbox_pred.weight": torch.zeros(9, 8)}
    assert "roi_heads.box_predictor.bbox_pred.weight is [9, 8], expected [12, 8]" in refusal(**odd)


def test_the_wrong_architecture_is_answered_with_the_right_one(refusal: Callable[..., str]) -> None:
    assert "it looks like detectron2_r50_fpn" in refusal("detectron2_r101_fpn")
    assert "Detectron2's detectron2_r50_fpn: give --arch" in refusal("fasterrcnn_resnet50_fpn")


def test_cocos_80_classes_are_the_default() -> None:
    coco = detectron2.LIBRARY.coco_classes()
    assert coco.category_ids is not None
    assert len(coco.names) == len(coco.category_ids) == 80
    assert (coco.names[0], coco.names[11], coco.names[79]) == ("person", "stop sign", "toothbrush")
    assert (coco.category_ids[0], coco.category_ids[11], coco.category_ids[79]) == (1, 13, 90)
    assert choose_class_names(None, None, coco, 81, "model.pkl") == coco
    assert choose_class_names(None, coco.names, coco, 81, "model.pkl") == coco
    assert choose_class_names(None, ("a", "b"), coco, 3, "model.pkl").category_ids is None
    with pytest.raises(SettingsError, match="has 3 outputs, background included; name its 2 classes"):
        choose_class_names(None, None, coco, 3, "model.pkl")
