"""MMDetection 2.x and 3.x: Faster R-CNN on ResNets with a pyramid; settings, names and order of the rows.

The files that each rule comes from stand in ``docs/import.md``.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from anchorline.export.importers.checkpoint_files import CheckpointFile
from anchorline.export.importers.library import (
    MSRA,
    RESNET_FPN,
    Architecture,
    Library,
    State,
    are_class_names,
)
from anchorline.runtime.contract import ResizeRule
from anchorline.runtime.io.errors import ArtefactError, SettingsError

# The configuration that the checkpoints carry is a Python text, never run: assignments of literals and
# ``dict(...)`` calls, which are taken apart as a syntax tree. Whatever is not a literal there is unknown.
# Version 2 keeps it under ``meta["config"]``, version 3 under ``meta["cfg"]``.
_LONGEST = 300_000  # characters; a configuration has 10 000
_UNKNOWN = object()


@dataclass(frozen=True)
class Configuration:
    """Fields of ``ModelSettings``, the style of the backbone, and images' shorter and longer side."""

    settings: Mapping[str, Any]
    style: str | None
    sides: tuple[int, int] | None


def read_configuration(meta: Mapping[str, object], where: str) -> Configuration | None:
    """The configuration in a checkpoint's ``meta``; ``None`` where there is none that can be read.

    Raises ``ArtefactError`` where it describes a model that has no form here.
    """
    text = meta.get("cfg", meta.get("config"))
    values = parse(text) if isinstance(text, str) else {}
    if _at(values, "model.type") is None:
        return None
    for path, allowed in _EXPECTED.items():
        found = _at(values, path)
        kind = found.rpartition(".")[2] if isinstance(found, str) else found  # types may have their module
        if found is not None and kind not in allowed:
            instead = " or ".join(map(str, allowed)) or "nothing there"
            raise ArtefactError(
                f"{where}: its configuration has {path} = {str(found)[:60]}; only models with {instead} can "
                "be imported"
            )
    return Configuration(_settings(values, where), _at(values, "model.backbone.style"), _sides(values))


def parse(text: str) -> dict[str, Any]:
    """The top-level assignments of ``text`` whose values are literals; empty where it is no Python."""
    if len(text) > _LONGEST:
        return {}
    values: dict[str, Any] = {}
    try:
        for statement in ast.parse(text).body:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    values[name] = _value(value, values)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # of hostile texts too
        return {}
    return values


def _value(node: ast.expr, known: Mapping[str, Any]) -> Any:
    """The literal that ``node`` stands for, with names replaced by what was assigned to them before."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return known.get(name, _UNKNOWN)
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item, known) for item in items]
        case ast.Dict(keys=keys, values=values):
            pairs = zip(keys, values, strict=True)
            return _merged([(key and _value(key, known), _value(each, known)) for key, each in pairs])
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
            return _merged([(keyword.arg, _value(keyword.value, known)) for keyword in keywords])
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = _value(operand, known)
            return -value if isinstance(value, int | float) else _UNKNOWN
    return _UNKNOWN


def _merged(items: list[tuple[Any, Any]]) -> dict[str, Any]:
    """A dictionary of ``items``; those without a key are dictionaries to unpack."""
    found: dict[str, Any] = {}
    for key, value in items:
        if isinstance(key, str):
            found[key] = value
        elif key is None and isinstance(value, dict):
            found.update(value)
    return found


def _at(values: Any, path: str) -> Any:
    """What stands at ``path``, names with dots between; ``None`` where nothing known does."""
    for name in path.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return None if values is _UNKNOWN else values


_RPN, _ROI = "model.rpn_head", "model.roi_head"
_HEAD = f"{_ROI}.bbox_head"
_ROI_LAYER = f"{_ROI}.bbox_roi_extractor.roi_layer"

# What a field may be where the configuration has it; other models have other parts than ours.
_EXPECTED: dict[str, tuple[object, ...]] = {
    "model.type": ("FasterRCNN",),
    "model.backbone.type": ("ResNet",),
    "model.backbone.style": ("pytorch", "caffe"),
    "model.neck.type": ("FPN",),
    "model.neck.num_outs": (5,),
    "model.neck.add_extra_convs": (False,),
    f"{_RPN}.type": ("RPNHead",),
    f"{_RPN}.loss_cls.use_sigmoid": (True,),
    f"{_RPN}.anchor_generator.type": ("AnchorGenerator",),
    f"{_RPN}.anchor_generator.scale_major": (True,),
    f"{_RPN}.anchor_generator.center_offset": (0,),
    f"{_RPN}.anchor_generator.octave_base_scale": (),
    f"{_RPN}.anchor_generator.base_sizes": (),
    f"{_RPN}.anchor_generator.centers": (),
    f"{_RPN}.bbox_coder.type": ("DeltaXYWHBBoxCoder",),
    f"{_RPN}.bbox_coder.target_means": ([0, 0, 0, 0],),
    f"{_RPN}.bbox_coder.target_stds": ([1, 1, 1, 1],),
    f"{_RPN}.target_means": ([0, 0, 0, 0],),
    f"{_RPN}.target_stds": ([1, 1, 1, 1],),
    f"{_ROI}.type": ("StandardRoIHead",),
    f"{_ROI}.bbox_roi_extractor.type": ("SingleRoIExtractor",),
    f"{_ROI}.bbox_roi_extractor.featmap_strides": ([4, 8, 16, 32],),
    f"{_ROI_LAYER}.type": ("RoIAlign",),
    f"{_ROI_LAYER}.pool_mode": ("avg",),
    f"{_HEAD}.type": ("Shared2FCBBoxHead", "ConvFCBBoxHead"),
    f"{_HEAD}.loss_cls.use_sigmoid": (False,),
    f"{_HEAD}.bbox_coder.type": ("DeltaXYWHBBoxCoder",),
    f"{_HEAD}.bbox_coder.target_means": ([0, 0, 0, 0],),
    f"{_HEAD}.target_means": ([0, 0, 0, 0],),
    **{
        f"{top}.{part}.nms.{name}": (allowed,)
        for top in ("model.test_cfg", "test_cfg")
        for part in ("rpn", "rcnn")
        for name, allowed in (("type", "nms"), ("class_agnostic", False))
    },
    "test_cfg.rpn.nms_across_levels": (False,),
    "model.data_preprocessor.pad_size_divisor": (32,),
}


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _anchor_sizes(rpn_head: dict[str, Any]) -> tuple[tuple[float, ...], ...] | None:
    """Stride x scale for each level; ``None`` where the configuration does not say."""
    given = rpn_head.get("anchor_generator")
    if not isinstance(given, dict):  # older configurations
        given = {name: rpn_head.get(f"anchor_{name}") for name in ("scales", "strides")}
    scales, strides = given.get("scales"), given.get("strides")
    if not isinstance(scales, list) or not isinstance(strides, list):
        return None
    return tuple(tuple(float(stride * scale) for scale in scales) for stride in strides)


# By field of ``ModelSettings``: where the value may stand, alone or under ``model`` (as ``test_cfg`` does in
# version 3), newest name first; and how it is read.
_FIELDS: dict[str, tuple[tuple[str, ...], Callable[[Any], Any]]] = {
    "rpn_pre_nms": (("test_cfg.rpn.nms_pre",), int),
    "rpn_post_nms": (("test_cfg.rpn.max_per_img", "test_cfg.rpn.max_num"), int),
    "rpn_nms_iou": (("test_cfg.rpn.nms.iou_threshold", "test_cfg.rpn.nms_thr"), float),
    "rpn_min_side": (("test_cfg.rpn.min_bbox_size",), float),
    "score_threshold": (("test_cfg.rcnn.score_thr",), float),
    "nms_iou": (("test_cfg.rcnn.nms.iou_threshold", "test_cfg.rcnn.nms.iou_thr"), float),
    "max_detections": (("test_cfg.rcnn.max_per_img",), int),
    "aspect_ratios": ((f"{_RPN}.anchor_generator.ratios", f"{_RPN}.anchor_ratios"), _floats),
    "roi_sampling": ((f"{_ROI_LAYER}.sampling_ratio", f"{_ROI_LAYER}.sample_num"), int),
    "roi_aligned": ((f"{_ROI_LAYER}.aligned",), bool),
    # finest_scale is twice the smallest side of the second level; ours is that of the third.
    "canonical_size": ((f"{_ROI}.bbox_roi_extractor.finest_scale",), lambda finest: 4.0 * finest),
    "box_weights": (
        (f"{_HEAD}.bbox_coder.target_stds", f"{_HEAD}.target_stds"),
        lambda stds: tuple(1.0 / float(std) for std in stds),
    ),
    "mean": (("model.data_preprocessor.mean", "img_norm_cfg.mean"), _floats),
    "std": (("model.data_preprocessor.std", "img_norm_cfg.std"), _floats),
    "channel_order": (
        ("model.data_preprocessor.bgr_to_rgb", "img_norm_cfg.to_rgb"),
        lambda to_rgb: "rgb" if to_rgb else "bgr",
    ),
    "anchor_sizes": ((_RPN,), _anchor_sizes),
}


def _settings(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Fields of ``ModelSettings`` that the configuration sets."""
    found: dict[str, Any] = {}
    for name, (paths, read) in _FIELDS.items():
        places = (place for path in paths for place in (f"model.{path}", path))
        path = next((place for place in places if _at(values, place) is not None), None)
        if path is None:
            continue
        value = _at(values, path)
        try:
            found[name] = read(value)
        except (TypeError, ValueError, ZeroDivisionError, OverflowError, KeyError):
            raise ArtefactError(
                f"{where}: its configuration has {path} = {str(value)[:60]}, which cannot be read; expected "
                "what MMDetection takes there"
            ) from None
    return {name: value for name, value in found.items() if value is not None}


def _sides(values: dict[str, Any]) -> tuple[int, int] | None:
    """The shorter and the longer side that test images are resized to, where one size is given."""
    for path in ("test_pipeline", "test_dataloader.dataset.pipeline", "data.test.pipeline"):
        steps = _at(values, path)
        for step in steps if isinstance(steps, list) else ():
            if not isinstance(step, dict) or step.get("type") not in ("Resize", "MultiScaleFlipAug"):
                continue
            scale = step.get("scale", step.get("img_scale"))
            if isinstance(scale, list) and len(scale) == 1:
                scale = scale[0]
            if isinstance(scale, list) and len(scale) == 2 and all(type(side) is int for side in scale):
                return min(scale), max(scale)
    return None


_PYTORCH = dataclasses.replace(RESNET_FPN, roi_level_rule="mmdetection", clamp_deltas_below=True)
_STYLES = {"": _PYTORCH, "_caffe": dataclasses.replace(_PYTORCH, **MSRA)}

ARCHITECTURES = {
    f"mmdet_r{depth}{style}_fpn": Architecture(
        dataclasses.replace(settings, backbone=f"resnet{depth}"), ResizeRule(800, 1333, rounding="nearest")
    )
    for depth in ("50", "101")
    for style, settings in _STYLES.items()
}
"""The architectures of ``configs/faster_rcnn/faster-rcnn_r{50,101}{,-caffe}_fpn_*_coco.py``."""


def recognise(source: CheckpointFile, state: State) -> str | None:
    """The architecture by the blocks of ``layer3``, in the style of the configuration or ``pytorch``."""
    if "rpn_head.rpn_cls.weight" not in state:
        return None
    blocks = {name.split(".")[2] for name in state if name.startswith("backbone.layer3.")}
    depth = {6: "50", 23: "101"}.get(len(blocks))
    if depth is None:
        return None
    configuration = read_configuration(source.meta, source.name)
    style = "_caffe" if configuration and configuration.style == "caffe" else ""
    return f"mmdet_r{depth}{style}_fpn"


def describe(source: CheckpointFile, state: State, arch: str) -> Architecture:
    """The zoo's settings, changed as the checkpoint's configuration says."""
    settings, resize = ARCHITECTURES[arch].settings, ARCHITECTURES[arch].resize
    names = _class_names(source.meta)
    configuration = read_configuration(source.meta, source.name)
    if configuration is None:
        warning = (
            f"no configuration in the checkpoint that can be read: taken as {arch} with MMDetection's usual "
            "settings; change what was not so with --arch, --resize and --set"
        )
        return Architecture(settings, resize, names, (warning,))
    caffe = "_caffe_" in arch
    if configuration.style is not None and (configuration.style == "caffe") != caffe:
        right = arch.replace("_caffe_fpn", "_fpn") if caffe else arch.replace("_fpn", "_caffe_fpn")
        raise SettingsError(
            f"{source.name}: its configuration says style={configuration.style!r}, and arch is {arch!r}; "
            f"give --arch {right}"
        )
    if configuration.sides is not None:
        shorter, longer = configuration.sides
        resize = dataclasses.replace(resize, shorter_side=shorter, longer_side=longer)
    return Architecture(dataclasses.replace(settings, **configuration.settings), resize, names)


def _class_names(meta: Mapping[str, object]) -> tuple[str, ...] | None:
    """``CLASSES`` of version 2, or ``dataset_meta``'s of version 3."""
    dataset = meta.get("dataset_meta")
    places = (meta, dataset if isinstance(dataset, Mapping) else {})
    for names in (place.get(key) for place in places for key in ("CLASSES", "classes")):
        if isinstance(names, str) and names:
            return (names,)  # version 2 keeps the name of a single class so, where the tuple lost its comma
        if isinstance(names, list | tuple) and are_class_names(names):
            return tuple(names)
    return None


LIBRARY = Library(
    name="MMDetection",
    architectures=ARCHITECTURES,
    known_names=", ".join(ARCHITECTURES),
    recognise=recognise,
    describe=describe,
    names=(
        (r"^backbone\.body\.", "backbone."),
        (r"^backbone\.fpn\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv."),
        (r"^backbone\.fpn\.layer_blocks\.(\d)\.0\.", r"neck.fpn_convs.\1.conv."),
        (r"^rpn\.head\.conv\.0\.0\.", "rpn_head.rpn_conv."),
        (r"^rpn\.head\.cls_logits\.", "rpn_head.rpn_cls."),
        (r"^rpn\.head\.bbox_pred\.", "rpn_head.rpn_reg."),
        (r"^roi_heads\.box_head\.fc6\.", "roi_head.bbox_head.shared_fcs.0."),
        (r"^roi_heads\.box_head\.fc7\.", "roi_head.bbox_head.shared_fcs.1."),
        (r"^roi_heads\.box_predictor\.cls_score\.", "roi_head.bbox_head.fc_cls."),
        (r"^roi_heads\.box_predictor\.bbox_pred\.", "roi_head.bbox_head.fc_reg."),
    ),
    ignored=("data_preprocessor.",),
    background_last=True,
    marks=(
        (r"^roi_head\.mask_head\.", "a Mask R-CNN"),
        (r"^roi_head\.bbox_head\.0\.", "a Cascade R-CNN"),
        (r"^roi_head\.shared_head\.", "a C4 model of MMDetection"),
        (r"^bbox_head\.", "a one-stage detector, or a model of MMDetection 1.x"),
        (r"^rpn_head\.rpn_conv\.0\.", "a model with several convolutions in its RPN"),
        (r"\.conv2_offset\.|\.conv2\.conv_offset\.", "a model with deformable convolutions"),
    ),
)
