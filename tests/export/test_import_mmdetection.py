"""MMDetection's checkpoints: published names, its configuration, mmengine's objects that are not built."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from anchorline.export.importers import conversion, mmdetection
from anchorline.export.importers.checkpoint_files import CheckpointFile
from anchorline.export.importers.configuration import Configuration, from_python
from anchorline.export.importers.conversion import import_checkpoint
from anchorline.export.importers.mmdetection import configuration_of, read_settings
from anchorline.runtime.contract import ResizeRule
from anchorline.runtime.io.errors import AnchorlineError, ArtefactError
from anchorline.train.checkpoint import expected_shapes, load_checkpoint

Shapes = dict[str, tuple[int, ...]]
BLOCKS = {"r50": (3, 4, 6, 3), "r101": (3, 4, 23, 3)}


def bn(name: str, channels: int) -> Shapes:
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (channels,) for part in parts}


def published(depth: str, classes: int = 80, fpn: int = 256, fc: int = 1024) -> Shapes:
    """Names and shapes of ``faster-rcnn_{r50,r101}_fpn``, from MMDetection's modules; counters left out."""
    shapes: Shapes = {"backbone.conv1.weight": (64, 3, 7, 7), **bn("backbone.bn1", 64)}
    inputs = 64
    for stage, blocks in enumerate(BLOCKS[depth], start=1):
        width = 32 * 2**stage
        for block in range(blocks):
            name = f"backbone.layer{stage}.{block}"
            for conv, shape in {
                "1": (width, inputs, 1, 1),
                "2": (width, width, 3, 3),
                "3": (4 * width, width, 1, 1),
            }.items():
                shapes[f"{name}.conv{conv}.weight"] = shape
                shapes |= bn(f"{name}.bn{conv}", shape[0])
            if inputs != 4 * width:
                shapes[f"{name}.downsample.0.weight"] = (4 * width, inputs, 1, 1)
                shapes |= bn(f"{name}.downsample.1", 4 * width)
            inputs = 4 * width
    for level, channels in enumerate((256, 512, 1024, 2048)):
        shapes[f"neck.lateral_convs.{level}.conv.weight"] = (fpn, channels, 1, 1)
        shapes[f"neck.fpn_convs.{level}.conv.weight"] = (fpn, fpn, 3, 3)
        for part in ("lateral_convs", "fpn_convs"):
            shapes[f"neck.{part}.{level}.conv.bias"] = (fpn,)
    layers = {
        "rpn_head.rpn_conv": (fpn, fpn, 3, 3),
        "rpn_head.rpn_cls": (3, fpn, 1, 1),
        "rpn_head.rpn_reg": (12, fpn, 1, 1),
        "roi_head.bbox_head.fc_cls": (classes + 1, fc),
        "roi_head.bbox_head.fc_reg": (4 * classes, fc),
        "roi_head.bbox_head.shared_fcs.0": (fc, fpn * 49),
        "roi_head.bbox_head.shared_fcs.1": (fc, fc),
    }
    for name, shape in layers.items():
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]
    return shapes


@pytest.mark.parametrize("arch", mmdetection.ARCHITECTURES)
def test_every_published_name_has_its_place(arch: str) -> None:
    settings = mmdetection.ARCHITECTURES[arch].settings
    ours = {
        mmdetection.LIBRARY.their_name(name, settings): shape
        for name, shape in expected_shapes(settings, 80).items()
        if not name.endswith("num_batches_tracked")
    }
    theirs = published(arch.split("_")[1])
    for part in ("weight", "bias"):  # four more rows for the background
        name = f"roi_head.bbox_head.fc_reg.{part}"
        theirs[name] = (theirs[name][0] + 4, *theirs[name][1:])
    assert ours == theirs


def test_the_rules_are_the_zoos() -> None:
    """``configs/_base_/models/faster-rcnn_r50_fpn.py`` and ``faster-rcnn_r50-caffe_fpn_1x_coco.py``."""
    settings = mmdetection.ARCHITECTURES["mmdet_r50_fpn"].settings
    expected = {
        "anchor_style": "unrounded",
        "anchor_sizes": ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,)),  # strides 4 to 64 times scale 8
        "aspect_ratios": (0.5, 1.0, 2.0),
        "clamp_deltas": True,
        "clamp_deltas_below": True,
        "backbone_norm_eps": 1e-5,
        "bottleneck_stride": "3x3",
        "rpn_pre_nms": 1000,
        "rpn_post_nms": 1000,
        "rpn_nms_iou": 0.7,
        "rpn_min_side": 0.0,
        "roi_size": 7,
        "roi_sampling": 0,
        "roi_aligned": True,
        "roi_level_rule": "mmdetection",
        "canonical_size": 224.0,  # finest_scale 56
        "box_weights": (10.0, 10.0, 5.0, 5.0),  # 1 / target_stds
        "score_threshold": 0.05,
        "nms_iou": 0.5,
        "max_detections": 100,
        "channel_order": "rgb",
        "mean": (123.675, 116.28, 103.53),
        "std": (58.395, 57.12, 57.375),
    }
    assert {name: getattr(settings, name) for name in expected} == expected
    assert settings.profile == "mmdetection"
    assert mmdetection.ARCHITECTURES["mmdet_r50_fpn"].resize == ResizeRule(800, 1333, "bilinear", "nearest")
    caffe = mmdetection.ARCHITECTURES["mmdet_r101_caffe_fpn"].settings
    assert (caffe.backbone, caffe.bottleneck_stride, caffe.channel_order) == ("resnet101", "1x1", "bgr")
    assert (caffe.mean, caffe.std) == ((103.53, 116.28, 123.675), (1.0, 1.0, 1.0))


# The configuration. The texts are written here in the form that mmcv's and mmengine's ``pretty_text`` have.
VERSION_3 = """
data_root = 'data/cats/'
model = dict(
    backbone=dict(depth=50, norm_cfg=dict(requires_grad=True, type='BN'), style='pytorch', type='ResNet'),
    data_preprocessor=dict(
        bgr_to_rgb=True, mean=[100.0, 110.5, 120.25], pad_size_divisor=32, std=[50.0, 51, 52.5],
        type='DetDataPreprocessor'),
    neck=dict(in_channels=[256, 512, 1024, 2048], num_outs=5, out_channels=256, type='FPN'),
    roi_head=dict(
        bbox_head=dict(
            bbox_coder=dict(
                target_means=[0.0, 0.0, 0.0, 0.0], target_stds=[0.05, 0.1, 0.2, 0.25],
                type='DeltaXYWHBBoxCoder'),
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False), num_classes=2,
            type='Shared2FCBBoxHead'),
        bbox_roi_extractor=dict(
            featmap_strides=[4, 8, 16, 32], finest_scale=28, out_channels=256,
            roi_layer=dict(output_size=7, sampling_ratio=2, type='RoIAlign'), type='SingleRoIExtractor'),
        type='StandardRoIHead'),
    rpn_head=dict(
        anchor_generator=dict(
            ratios=[0.5, 1.0], scales=[4, 6.0], strides=[4, 8, 16, 32, 64], type='AnchorGenerator'),
        bbox_coder=dict(
            target_means=[-0.0, 0.0, 0.0, 0.0], target_stds=[1.0, 1.0, 1.0, 1.0], type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True), type='RPNHead'),
    test_cfg=dict(
        rcnn=dict(max_per_img=50, nms=dict(iou_threshold=0.4, type='nms'), score_thr=0.3),
        rpn=dict(max_per_img=300, min_bbox_size=2, nms=dict(iou_threshold=0.6, type='nms'), nms_pre=500)),
    type='FasterRCNN')
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(keep_ratio=True, scale=(1000, 600), type='Resize'),
    dict(meta_keys=('img_id', ), type='PackDetInputs'),
]
work_dir = './work_dirs/' + data_root
"""
VERSION_2 = """
img_norm_cfg = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)
model = dict(
    type='FasterRCNN',
    backbone=dict(type='ResNet', depth=50, style='caffe'),
    rpn_head=dict(type='RPNHead', anchor_scales=[8], anchor_ratios=[0.5, 1.0, 2.0],
        anchor_strides=[4, 8, 16, 32, 64], target_means=[0, 0, 0, 0], target_stds=[1, 1, 1, 1]),
    roi_head=dict(type='StandardRoIHead', bbox_head=dict(target_stds=[0.1, 0.1, 0.2, 0.2])))
test_cfg = dict(
    rpn=dict(nms_across_levels=False, nms_pre=2000, nms_post=1000, max_num=900, nms_thr=0.8, min_bbox_size=0),
    rcnn=dict(score_thr=0.01, nms=dict(type='nms', iou_thr=0.45), max_per_img=200))
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='MultiScaleFlipAug', img_scale=(1333, 640), flip=False,
         transforms=[dict(type='Resize', keep_ratio=True), dict(type='Normalize', **img_norm_cfg)])
]
"""


def kept(text: object, key: str = "cfg") -> Configuration | None:
    return configuration_of(CheckpointFile("model.pth", {}, "", {key: text}))


def read(text: object, key: str = "cfg") -> tuple[dict[str, object], tuple[int, ...]]:
    """Settings and sides of the configuration that a checkpoint keeps."""
    found = kept(text, key)
    assert found is not None
    settings, sides, _ = read_settings(found)
    return settings, tuple(sides.values())


def test_a_configuration_of_version_3() -> None:
    settings, sides = read(VERSION_3)
    assert sides == (600, 1000)
    assert settings == {
        "mean": (100.0, 110.5, 120.25),
        "std": (50.0, 51.0, 52.5),
        "channel_order": "rgb",
        "box_weights": (20.0, 10.0, 5.0, 4.0),
        "canonical_size": 112.0,
        "roi_sampling": 2,
        "aspect_ratios": (0.5, 1.0),
        "anchor_sizes": ((16.0, 24.0), (32.0, 48.0), (64.0, 96.0), (128.0, 192.0), (256.0, 384.0)),
        "score_threshold": 0.3,
        "nms_iou": 0.4,
        "max_detections": 50,
        "rpn_pre_nms": 500,
        "rpn_post_nms": 300,
        "rpn_nms_iou": 0.6,
        "rpn_min_side": 2.0,
    }


def test_a_configuration_of_version_2() -> None:
    settings, sides = read(VERSION_2, "config")
    assert sides == (640, 1333)
    assert settings == {
        "mean": (103.53, 116.28, 123.675),
        "std": (1.0, 1.0, 1.0),
        "channel_order": "bgr",
        "box_weights": (10.0, 10.0, 5.0, 5.0),
        "aspect_ratios": (0.5, 1.0, 2.0),
        "anchor_sizes": ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,)),
        "score_threshold": 0.01,
        "nms_iou": 0.45,
        "max_detections": 200,
        "rpn_pre_nms": 2000,
        "rpn_post_nms": 900,
        "rpn_nms_iou": 0.8,
        "rpn_min_side": 0.0,
    }


def test_a_new_name_wins_wherever_it_stands() -> None:
    """Of one name that under ``model`` does, as in version 3."""
    text = "model = dict(type='FasterRCNN', test_cfg=dict(rpn=dict(max_num=900, nms_pre=700)))\n"
    text += "test_cfg = dict(rpn=dict(max_per_img=300, nms_pre=2000))"
    assert read(text)[0] == {"rpn_post_nms": 300, "rpn_pre_nms": 700}


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("type='FasterRCNN'", "type='CascadeRCNN'", "model.type is 'CascadeRCNN'"),
        ("type='nms'), score_thr", "type='soft_nms'), score_thr", "rcnn.nms.type is 'soft_nms'"),
        ("use_sigmoid=False", "use_sigmoid=True", "bbox_head.loss_cls.use_sigmoid is True"),
        ("target_stds=[1.0, ", "target_stds=[0.5, ", "rpn_head.bbox_coder.target_stds"),
        ("ratios=[0.5, 1.0], ", "ratios=[0.5, 1.0], scale_major=False, ", "scale_major is False"),
        ("ratios=[0.5, 1.0], ", "ratios=[0.5, 1.0], center_offset=0.5, ", "center_offset is 0.5"),
        ("ratios=[0.5, 1.0], ", "ratios=[0.5, 1.0], base_sizes=[3, 4], ", "base_sizes is [3, 4]"),
        ("strides=[4, 8, 16, 32, 64]", "strides=[8, 16, 32, 64, 128]", "strides is [8, 16, 32, 64, 128]"),
        ("depth=50, ", "depth=50, dcn=dict(type='DCNv2'), ", "model.backbone.dcn is {'type': 'DCNv2'}"),
        ("depth=50, ", "depth=50, avg_down=True, ", "model.backbone.avg_down is True"),
        ("type='BN'", "type='GN', num_groups=32", "norm_cfg.type is 'GN'; can be imported with 'BN' or"),
        ("type='FPN'", "type='PAFPN'", "neck.type is 'PAFPN'"),
        ("num_outs=5", "num_outs=5, norm_cfg=dict(type='GN')", "neck.norm_cfg is {'type': 'GN'}"),
        ("type='RoIAlign'", "type='RoIPool'", "roi_layer.type is 'RoIPool'"),
        ("type='CrossEntropyLoss', use_sigmoid=False", "type='SeesawLoss'", "loss_cls.type is 'SeesawLoss'"),
        ("score_thr=0.3", "score_thr='high'", "score_thr is 'high'; can be imported with a finite number"),
        ("score_thr=0.3", "score_thr=float('nan')", "score_thr is an expression"),
        ("score_thr=0.3", "score_thr=1e999", "score_thr is inf"),
        ("0.2, 0.25]", "0.2, 0]", "target_stds is [0.05, 0.1, 0.2, 0]"),
        ("scales=[4, 6.0]", "scales=['a']", "a list of scales in its anchor_generator"),
        ("pad_size_divisor=32, ", "", "pad_size_divisor is 1; can be imported with 32"),
        ("keep_ratio=True, ", "", "keep_ratio of the pipeline's Resize is False"),
        ("keep_ratio=True", "keep_ratio=True, interpolation='area'", "Resize is 'area'"),
    ],
)
def test_a_model_that_has_no_form_here_is_refused(old: str, new: str, part: str) -> None:
    assert VERSION_3.count(old) == 1
    with pytest.raises(ArtefactError) as caught:
        read(VERSION_3.replace(old, new))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_type_may_have_its_module() -> None:
    text = VERSION_3.replace("type='FasterRCNN'", "type='mmdet.models.FasterRCNN'")
    assert read(text) == read(VERSION_3)


def test_what_version_3_leaves_out_is_what_it_takes_then() -> None:
    """``DetDataPreprocessor`` without statistics normalises and swaps nothing; the coder's stds are 1."""
    text = VERSION_3.replace("bgr_to_rgb=True, mean=[100.0, 110.5, 120.25], ", "")
    text = text.replace("std=[50.0, 51, 52.5],", "").replace(", target_stds=[0.05, 0.1, 0.2, 0.25]", "")
    settings, _ = read(text)
    assert (settings["mean"], settings["std"]) == ((0, 0, 0), (1, 1, 1))
    assert settings["channel_order"] == "bgr"
    assert settings["box_weights"] == (1, 1, 1, 1)


def test_the_pipeline_counts_and_not_the_name_it_usually_comes_from() -> None:
    """A changed ``Normalize`` of version 2, and a changed pipeline of version 3's loader."""
    text = VERSION_2.replace("**img_norm_cfg", "mean=[1, 2, 3], std=[4, 5, 6]")
    settings, _ = read(text, "config")
    assert (settings["mean"], settings["std"], settings["channel_order"]) == ((1, 2, 3), (4, 5, 6), "rgb")
    loader = "test_dataloader = dict(dataset=dict(pipeline=[dict(type='Resize', scale=(900, 500), "
    assert read(f"{VERSION_3}\n{loader}keep_ratio=True)]))")[1] == (500, 900)


def test_a_configuration_as_a_dictionary() -> None:
    """Numbers in tuples, as mmengine holds them."""
    model = {
        "type": "FasterRCNN",
        "data_preprocessor": {"mean": (1.0, 2.0, 3.0), "std": (4.0, 5.0, 6.0), "pad_size_divisor": 32},
    }
    settings, _ = read({"model": model})
    assert settings == {"mean": (1, 2, 3), "std": (4, 5, 6), "channel_order": "bgr"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model = (",
        "/data/x/config.py\nmodel = dict(type='FasterRCNN')",  # as version 2.0 wrote it
        "model = " + "[" * 5000,
        "model = " + "-" * 20_000 + "1",
        "model = " + "9" * 10_000,
        "model = dict(" * 90 + ")" * 90,
        "x = 1\n" * 100_000,
        "\0",
    ],
)
def test_texts_that_are_no_configuration_are_none(text: str) -> None:
    assert kept(text) is None


def test_a_configuration_is_never_run(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    text = f"import os\nos.system('touch {witness}')\nmodel = __import__('os').system('touch {witness}')\n"
    with pytest.raises(ArtefactError, match=r"model\.type is an expression"):
        read(text)
    assert from_python(f"a = dict(b=open('{witness}', 'w'), c=3)\nd = [f'{{1}}', 2]")["a"]["c"] == 3
    assert not witness.exists()


# Whole files, with a narrow pyramid and head.


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Different numbers in half precision, with the counters that live batch norms have."""
    found = {
        name: torch.arange(int(np.prod(shape))).remainder(997 - len(name)).half().reshape(shape)
        for name, shape in published("r50", classes=2, fpn=4, fc=8).items()
    }
    return {**found, "backbone.bn1.num_batches_tracked": torch.tensor(7)}


class HistoryBuffer:
    """Stands for mmengine's class of that name, whose pickles hold arrays and methods."""

    def __init__(self) -> None:
        self.log = np.array([0.5, 0.25])

    def mean(self) -> float:
        return float(self.log.mean())

    def __getstate__(self) -> dict[str, object]:
        return {"log": self.log, "statistics_methods": {"mean": HistoryBuffer.mean}}

    def __setstate__(self, state: dict[str, object]) -> None:
        raise AssertionError("code of the checkpoint's classes was run")


class ConfigDict(dict):  # type: ignore[type-arg]
    """Stands for mmengine's class of that name."""

    def __reduce_ex__(self, protocol: object) -> tuple[type, tuple[dict[str, object]]]:
        return ConfigDict, (dict(self),)


@pytest.fixture
def mmengine() -> Iterator[None]:
    """Modules with mmengine's names while a checkpoint is written; the reader has none."""
    places = {"mmengine.logging.history_buffer": HistoryBuffer, "mmengine.config.config": ConfigDict}
    for name, kind in places.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(name))
        setattr(sys.modules[name], kind.__name__, kind)
        kind.__module__ = name
    yield
    forget_mmengine()


def forget_mmengine() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "mmengine"]:
        del sys.modules[name]


def test_a_checkpoint_of_version_3_becomes_a_model(
    state: dict[str, Tensor], mmengine: None, tmp_path: Path
) -> None:
    """Its own configuration, class names and logs; anchors two by two, so that the order shows."""
    six = {
        **state,
        "rpn_head.rpn_cls.weight": torch.arange(16.0).reshape(4, 4, 1, 1),
        "rpn_head.rpn_cls.bias": torch.arange(4.0),
        "rpn_head.rpn_reg.weight": torch.arange(64.0).reshape(16, 4, 1, 1),
        "rpn_head.rpn_reg.bias": torch.arange(16.0),
    }
    content = {
        "meta": {
            "cfg": VERSION_3,
            "dataset_meta": ConfigDict(classes=("cat", "dog"), palette=[(1, 2, 3)]),
            "seed": np.int64(5),
            "mmengine_version": "0.10.4",
        },
        "state_dict": OrderedDict(six),
        "message_hub": {"log_scalars": OrderedDict(loss=HistoryBuffer()), "runtime_info": {"epoch": 1}},
        "optimizer": {"state": {}, "param_groups": []},
        "param_schedulers": [{"last_step": 4}],
    }
    path, out = tmp_path / "epoch_12.pth", tmp_path / "model.safetensors"
    torch.save(content, path)
    forget_mmengine()
    result = import_checkpoint(path, out)
    saved = load_file(out)

    def same(ours: str, theirs: str) -> None:
        assert torch.equal(saved[ours], six[theirs].float()), ours

    same("backbone.body.conv1.weight", "backbone.conv1.weight")
    same("backbone.body.layer4.0.downsample.1.running_var", "backbone.layer4.0.downsample.1.running_var")
    same("backbone.fpn.inner_blocks.2.0.weight", "neck.lateral_convs.2.conv.weight")
    same("backbone.fpn.layer_blocks.3.0.bias", "neck.fpn_convs.3.conv.bias")
    same("rpn.head.conv.0.0.bias", "rpn_head.rpn_conv.bias")
    same("rpn.head.cls_logits.weight", "rpn_head.rpn_cls.weight")  # ratio by ratio, as ours
    same("rpn.head.bbox_pred.bias", "rpn_head.rpn_reg.bias")
    same("roi_heads.box_head.fc6.weight", "roi_head.bbox_head.shared_fcs.0.weight")
    same("roi_heads.box_head.fc7.weight", "roi_head.bbox_head.shared_fcs.1.weight")
    logits = six["roi_head.bbox_head.fc_cls.bias"].tolist()
    assert saved["roi_heads.box_predictor.cls_score.bias"].tolist() == [logits[2], logits[0], logits[1]]
    deltas = six["roi_head.bbox_head.fc_reg.weight"].float()
    assert torch.equal(saved["roi_heads.box_predictor.bbox_pred.weight"][4:], deltas)
    assert not saved["roi_heads.box_predictor.bbox_pred.weight"][:4].any()

    model, contract = load_checkpoint(out)
    assert contract.names == ("cat", "dog")
    assert contract.profile == "mmdetection"
    assert contract.resize == ResizeRule(600, 1000, "bilinear", "nearest")
    assert (contract.canvas, contract.input_dtype) == (None, "uint8")
    assert contract.thresholds.score == 0.3
    assert model.settings.anchor_sizes[0] == (16.0, 24.0)
    assert model.backbone.body.get_submodule("layer2.0.conv2").stride == (2, 2), "pytorch's style"
    assert contract.source["arch"] == "mmdet_r50_fpn"
    assert contract.source["configuration"] == "epoch_12.pth: its configuration"
    assert contract.source["settings"]["anchor_sizes"][0] == [16, 24]
    assert contract.source["settings"]["resize"] == [600, 1000]
    assert contract.source["assumed"] == []
    assert result.warnings[1:] == ("the settings are those of epoch_12.pth: its configuration",)


def test_a_checkpoint_of_version_2_in_caffes_style(state: dict[str, Tensor], tmp_path: Path) -> None:
    meta = {"config": VERSION_2, "CLASSES": ("cat", "dog"), "epoch": 12, "mmdet_version": "2.28.0"}
    path, out = tmp_path / "epoch_12.pth", tmp_path / "model.safetensors"
    torch.save({"meta": meta, "state_dict": state}, path, _use_new_zipfile_serialization=False)
    result = import_checkpoint(path, out)
    assert result.contract.source["arch"] == "mmdet_r50_caffe_fpn"
    assert (result.settings.bottleneck_stride, result.settings.channel_order) == ("1x1", "bgr")
    assert result.settings.rpn_pre_nms == 2000
    with pytest.raises(AnchorlineError, match=r"style='caffe'.* give --arch mmdet_r50_caffe_fpn"):
        import_checkpoint(path, out, arch="mmdet_r50_fpn")


def test_the_configuration_beside_a_checkpoint_and_one_that_is_given(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    """The one Python file beside it that describes a model; one with a base is not the whole one."""
    text = VERSION_3.replace("ratios=[0.5, 1.0]", "ratios=[0.5, 1.0, 3.0]").replace(
        "scales=[4, 6.0]", "scales=[6]"
    )
    source = CheckpointFile("epoch_1.pth", state, "", folder=tmp_path)

    def described(source: CheckpointFile = source) -> mmdetection.Architecture:
        return mmdetection.LIBRARY.describe(source, state, "mmdet_r50_fpn")

    assert described().configuration is None
    (tmp_path / "tools.py").write_text("import os\n", encoding="utf-8")
    (tmp_path / "train.py").write_text("import torch\nmodel = torch.nn.Module()\n", encoding="utf-8")
    assert described().configuration is None
    (tmp_path / "own.py").write_text("_base_ = 'x.py'\nmodel = dict(type='FasterRCNN')", encoding="utf-8")
    whole = tmp_path / "faster-rcnn.py"
    whole.write_text(text, encoding="utf-8")
    assert described().configuration == str(whole)
    assert described().settings.anchor_sizes[0] == (24.0,)
    (tmp_path / "second.py").write_text(text, encoding="utf-8")
    assert described().configuration is None, "which of two, nobody knows"
    given = dataclasses.replace(source, config=whole)
    assert described(given).settings.anchor_sizes[0] == (24.0,)
    kept = dataclasses.replace(given, meta={"cfg": text.replace("scales=[6]", "scales=[8]")})
    assert described(kept).settings.anchor_sizes[0] == (24.0,), "what is given counts"
    for name, part in (
        ("own.py", "is built on x.py; expected the whole one"),
        ("tools.py", "has no model with a"),
    ):
        with pytest.raises(ArtefactError, match=part):
            described(dataclasses.replace(source, config=tmp_path / name))


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        (
            "num_classes=2",
            "num_classes=80",
            "gives 80 classes, and the checkpoint has 2; if it is not this model's",
        ),
        ("scales=[6]", "scales=[6, 7]", "gives 6 anchors at each place, and the checkpoint has 3"),
        ("depth=50", "depth=101", "model.backbone.depth gives 101 layers, and the checkpoint has 50"),
        ("iou_threshold=0.4", "iou_threshold=4", "model.nms_iou is 4.0; expected a number from 0 to 1"),
    ],
)
def test_a_configuration_of_another_model_is_told_by_the_tensors(
    state: dict[str, Tensor], old: str, new: str, part: str
) -> None:
    text = VERSION_3.replace("ratios=[0.5, 1.0]", "ratios=[0.5, 1.0, 3.0]").replace(
        "scales=[4, 6.0]", "scales=[6]"
    )
    source = CheckpointFile("epoch_1.pth", state, "", {"cfg": text.replace(old, new)})
    with pytest.raises(ArtefactError) as caught:
        mmdetection.LIBRARY.describe(source, state, "mmdet_r50_fpn")
    assert part in str(caught.value)


@pytest.mark.parametrize(
    "later",
    [
        "model.update(dict(test_cfg=dict()))",
        "model['test_cfg']['rcnn']['score_thr'] = 0.9",
        "if True:\n    model = dict(type='CascadeRCNN')",
        "del model",
        "model |= dict(type='CascadeRCNN')",
    ],
)
def test_a_model_that_later_lines_change_is_not_taken_as_it_was(later: str) -> None:
    text = f"'A note.'\nimport os\n{VERSION_3}"
    assert read(text) == read(VERSION_3)
    with pytest.raises(ArtefactError, match=r"model\.type is changed by a later statement; can be imported"):
        read(f"{text}\n{later}\n")


def test_steps_of_the_pipeline_that_are_not_repeated_are_told() -> None:
    more = VERSION_3.replace("test_pipeline = [", "test_pipeline = [\n    dict(type='CLAHE'),")
    configuration = kept(more)
    assert configuration is not None
    assert read_settings(configuration)[2] == (
        "model.pth: its configuration: its pipeline's CLAHE is not repeated here",
    )
    assert read(VERSION_3.replace("type='Resize'", "type='mmdet.Resize'")) == read(VERSION_3)


def test_a_damaged_configuration_is_read_or_refused() -> None:
    draw = random.Random(5)
    for _ in range(300):
        text = draw.choice((VERSION_2, VERSION_3))
        for _ in range(draw.randint(1, 4)):
            at, cut = draw.randrange(len(text)), draw.choice((0, 1, 20))
            odd = ("9" * 400, "dict(**", "lambda: ", "None", "[[", "x", *"0123.-:,()[]{}*'=\n ")
            text = text[:at] + draw.choice(odd) + text[at + cut :]
        source = CheckpointFile("model.pth", {}, "", {"cfg": text})
        with contextlib.suppress(AnchorlineError):
            mmdetection.LIBRARY.describe(source, {}, "mmdet_r50_fpn")


def test_a_teachers_configuration_is_that_of_its_detector() -> None:
    text = f"{VERSION_3}\nmodel = dict(type='SoftTeacher', detector=model)"
    assert read(text) == read(VERSION_3)


def test_class_names_of_the_configuration_where_there_are_no_others(state: dict[str, Tensor]) -> None:
    text = VERSION_3.replace("ratios=[0.5, 1.0]", "ratios=[0.5, 1.0, 3.0]").replace(
        "scales=[4, 6.0]", "scales=[6]"
    )
    text += "test_dataloader = dict(dataset=dict(metainfo=dict(classes=('ox', 'ass'))))\n"
    source = CheckpointFile("epoch_1.pth", state, "", {"cfg": text})
    assert mmdetection.LIBRARY.describe(source, state, "mmdet_r50_fpn").names == ("ox", "ass")


def test_without_a_configuration_the_usual_settings_are_named(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    path, out = tmp_path / "model.pth", tmp_path / "model.safetensors"
    classes = tmp_path / "classes.json"
    classes.write_text('["a", "b"]', encoding="utf-8")
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    result = import_checkpoint(path, out, classes=classes, overrides=["score_threshold=0.2"])
    assert result.settings.score_threshold == 0.2
    start = (
        "the configuration of the training is not known: assumed mmdet_r50_fpn's usual --resize 800x1333, "
    )
    assumed = result.warnings[1]
    assert assumed.startswith(start)
    assert "anchor_sizes=[[32], [64], [128], [256], [512]], aspect_ratios=[0.5, 1, 2], " in assumed
    assert "box_weights=[10, 10, 5, 5], mean=[123.675, 116.28, 103.53], " in assumed
    assert "channel_order=rgb" in assumed
    assert "score_threshold" not in assumed, "the user has given it"
    source = result.contract.source
    assert "score_threshold" not in source["assumed"]
    assert "anchor_sizes" in source["assumed"]
    assert source["settings"]["score_threshold"] == 0.2
    assert source["configuration"] is None


class Runs:
    """An object whose unpickling would run a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def test_code_beside_mmengines_objects_is_refused(
    state: dict[str, Tensor], mmengine: None, tmp_path: Path
) -> None:
    """What is replaced by an empty object opens no way for the rest."""
    witness = tmp_path / "witness"
    path = tmp_path / "model.pth"
    torch.save({"state_dict": state, "message_hub": [HistoryBuffer(), Runs(f"touch {witness}")]}, path)
    with pytest.raises(ArtefactError, match="could run code; refused") as caught:
        import_checkpoint(path, tmp_path / "out.safetensors")
    assert "system" in str(caught.value)
    assert not witness.exists()


def test_what_does_not_fit_is_listed_by_mmdetections_names(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, meta = tmp_path / "model.pth", {"CLASSES": ("a", "b")}

    def refusal(changed: dict[str, Tensor], **options: str) -> str:
        source = CheckpointFile(path.name, changed, "", meta)
        monkeypatch.setattr(conversion, "read_checkpoint_file", lambda path, _: source)
        with pytest.raises(AnchorlineError) as caught:
            import_checkpoint(path, tmp_path / "out.safetensors", **options)  # type: ignore[arg-type]
        text = str(caught.value)
        assert "\n" not in text
        assert not (tmp_path / "out.safetensors").exists()
        return text

    missing = {name: tensor for name, tensor in state.items() if "neck.fpn_convs.2" not in name}
    assert "2 missing (neck.fpn_convs.2.conv.bias, neck.fpn_convs.2.conv.weight)" in refusal(missing)
    text = refusal({**state, "roi_head.mask_head.convs.0.conv.weight": torch.zeros(1)})
    assert "1 unknown (roi_head.mask_head.convs.0.conv.weight)" in text
    assert "a Mask R-CNN" in text
    text = refusal({**state, "rpn_head.rpn_cls.bias": torch.zeros(6)})
    assert "rpn_head.rpn_cls.bias is [6], expected [3]" in text
    assert "predicts 6 anchors at each place" in text
    assert "MMDetection's mmdet_r50_fpn" in refusal(state, arch="detectron2_r50_fpn")
    meta["CLASSES"] = ("a", "b", "c")
    assert "names 3 classes (a, b, c)" in refusal(state)
