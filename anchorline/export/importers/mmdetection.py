"""MMDetection 2.x and 3.x: Faster R-CNN on ResNets with a pyramid; settings, names and order of the rows.

The files that each rule comes from stand in ``docs/import.md``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from anchorline.export.importers.checkpoint_files import CheckpointFile
from anchorline.export.importers.configuration import (
    Configuration,
    Fields,
    Unfit,
    flag,
    from_python,
    number,
    numbers,
    plain,
    text_of,
    whole,
)
from anchorline.export.importers.library import (
    MSRA,
    RESNET_FPN,
    Architecture,
    Library,
    State,
    are_class_names,
    side_of,
    with_configuration,
)
from anchorline.runtime.contract import ResizeRule
from anchorline.runtime.io.errors import ArtefactError, SettingsError


def configuration_of(source: CheckpointFile) -> Configuration | None:
    """The configuration that the user gives, else the checkpoint's, else the one Python file's beside it.

    Version 2 keeps it under ``meta["config"]``, version 3 under ``meta["cfg"]``, as the text of a Python file
    or a dictionary. ``None`` where there is none that can be read.
    """
    if source.config is not None:
        values = from_python(text_of(source.config))
        if "_base_" in values:
            raise ArtefactError(
                f"{source.config}: is built on {str(values['_base_'])[:80]}; expected the whole one, which "
                "MMDetection writes to its work_dir, or tools/misc/print_config.py prints"
            )
        found = Configuration(values, str(source.config))
        if found.get("model.type") is None:
            raise ArtefactError(
                f"{source.config}: has no model with a type; expected one of MMDetection, in literals"
            )
        return found
    kept = source.meta.get("cfg", source.meta.get("config"))
    if isinstance(kept, str):
        values = from_python(kept)
    else:
        try:
            values = plain(kept) if isinstance(kept, Mapping) else {}
        except ValueError:
            values = {}
    model = values.get("model")
    if isinstance(model, dict) and isinstance(model.get("detector"), dict):  # a teacher's and a student's
        values = {**values, "model": model["detector"]}
    if model is not None:
        found = Configuration(values, f"{source.name}: its configuration")
        return found if found.get("model.type") is not None else None
    beside = []
    for path in sorted(source.folder.glob("*.py"))[:_MOST_BESIDE] if source.folder else ():
        try:
            found = Configuration(from_python(text_of(path)), str(path))
        except ArtefactError:
            continue
        if isinstance(found.get("model.type"), str) and found.get("_base_") is None:  # no program
            beside.append(found)
    return beside[0] if len(beside) == 1 else None


_RPN, _ROI = "model.rpn_head", "model.roi_head"
_HEAD = f"{_ROI}.bbox_head"
_ROI_LAYER = f"{_ROI}.bbox_roi_extractor.roi_layer"
_SCORES, _CLASSIFIER = "rpn_head.rpn_cls", "roi_head.bbox_head.fc_cls"
_STRIDES = [4, 8, 16, 32, 64]
_NAMES = ("test_dataloader.dataset.metainfo.classes", "data.test.classes")
_MOST_BESIDE = 20  # Python files beside a checkpoint

# What a field may be where the configuration has it; other models have other parts than ours.
_EXPECTED: dict[str, tuple[object, ...]] = {
    "model.type": ("FasterRCNN",),
    "model.backbone.type": ("ResNet",),
    "model.backbone.style": ("pytorch", "caffe"),
    "model.backbone.num_stages": (4,),
    "model.backbone.strides": ([1, 2, 2, 2],),
    "model.backbone.dilations": ([1, 1, 1, 1],),
    "model.backbone.out_indices": ([0, 1, 2, 3],),
    "model.backbone.deep_stem": (False,),
    "model.backbone.avg_down": (False,),
    "model.backbone.conv_cfg": (),
    "model.backbone.dcn": (),
    "model.backbone.plugins": (),
    "model.backbone.norm_cfg.type": ("BN", "SyncBN", "MMSyncBN", "NaiveSyncBN"),
    "model.neck.type": ("FPN",),
    "model.neck.num_outs": (5,),
    "model.neck.start_level": (0,),
    "model.neck.end_level": (-1,),
    "model.neck.add_extra_convs": (False,),
    "model.neck.conv_cfg": (),
    "model.neck.norm_cfg": (),
    "model.neck.act_cfg": (),
    "model.neck.upsample_cfg.mode": ("nearest",),
    f"{_RPN}.type": ("RPNHead",),
    f"{_RPN}.num_convs": (1,),
    f"{_RPN}.loss_cls.use_sigmoid": (True,),
    f"{_RPN}.anchor_generator.type": ("AnchorGenerator",),
    f"{_RPN}.anchor_generator.strides": (_STRIDES,),
    f"{_RPN}.anchor_generator.scale_major": (True,),
    f"{_RPN}.anchor_generator.center_offset": (0,),
    f"{_RPN}.anchor_generator.octave_base_scale": (),
    f"{_RPN}.anchor_generator.base_sizes": (),
    f"{_RPN}.anchor_generator.centers": (),
    f"{_RPN}.anchor_strides": (_STRIDES,),
    f"{_RPN}.anchor_base_sizes": (),
    **{
        f"{place}.{name}": (allowed,)
        for place in (f"{_RPN}.bbox_coder", f"{_HEAD}.bbox_coder")
        for name, allowed in (
            ("type", "DeltaXYWHBBoxCoder"),
            ("target_means", [0, 0, 0, 0]),
            ("clip_border", True),
            ("add_ctr_clamp", False),
        )
    },
    f"{_RPN}.bbox_coder.target_stds": ([1, 1, 1, 1],),
    f"{_RPN}.target_means": ([0, 0, 0, 0],),
    f"{_RPN}.target_stds": ([1, 1, 1, 1],),
    f"{_ROI}.type": ("StandardRoIHead",),
    f"{_ROI}.shared_head": (),
    f"{_ROI}.bbox_roi_extractor.type": ("SingleRoIExtractor",),
    f"{_ROI}.bbox_roi_extractor.featmap_strides": (_STRIDES[:4],),
    f"{_ROI_LAYER}.type": ("RoIAlign",),
    f"{_ROI_LAYER}.pool_mode": ("avg",),
    f"{_HEAD}.type": ("Shared2FCBBoxHead", "ConvFCBBoxHead"),
    f"{_HEAD}.with_avg_pool": (False,),
    f"{_HEAD}.cls_predictor_cfg.type": ("Linear",),
    f"{_HEAD}.reg_predictor_cfg.type": ("Linear",),
    f"{_HEAD}.loss_cls.type": ("CrossEntropyLoss",),
    f"{_HEAD}.loss_cls.use_sigmoid": (False,),
    f"{_HEAD}.target_means": ([0, 0, 0, 0],),
    **{
        f"{top}.{part}.nms.{name}": (allowed,)
        for top in ("model.test_cfg", "test_cfg")
        for part in ("rpn", "rcnn")
        for name, allowed in (("type", "nms"), ("class_agnostic", False), ("offset", 0), ("max_num", -1))
    },
    "test_cfg.rpn.nms_across_levels": (False,),
    "model.data_preprocessor.type": ("DetDataPreprocessor",),
    "model.data_preprocessor.rgb_to_bgr": (False,),
    "model.data_preprocessor.pad_value": (0,),
    "model.data_preprocessor.pad_size_divisor": (32,),
}

# What is taken where a part of the configuration leaves one of its fields out, and the zoo's is another.
_LEFT_OUT: dict[str, object] = {
    "model.data_preprocessor.mean": [0, 0, 0],
    "model.data_preprocessor.std": [1, 1, 1],
    "model.data_preprocessor.bgr_to_rgb": False,
    "model.data_preprocessor.pad_size_divisor": 1,
    f"{_HEAD}.bbox_coder.target_stds": [1, 1, 1, 1],
    "normalize.to_rgb": True,
}
# Those whose usual values are the library's own, so that a configuration without them says them; the stride
# is the architecture's.
_SAME_LEFT_OUT = frozenset(
    ("bottleneck_stride", "roi_sampling", "roi_aligned", "canonical_size", "backbone_norm_eps")
)


def _anchor_sizes(rpn_head: Any) -> tuple[tuple[float, ...], ...]:
    """Stride x scale for each level."""
    given = rpn_head.get("anchor_generator", rpn_head) if isinstance(rpn_head, dict) else {}
    scales = given.get("scales", given.get("anchor_scales")) if isinstance(given, dict) else None
    try:
        return tuple(tuple(stride * scale for scale in numbers(scales)) for stride in _STRIDES)
    except Unfit:
        raise Unfit("a list of scales in its anchor_generator") from None


def _weights(stds: Any) -> tuple[float, ...]:
    if 0 in numbers(stds):
        raise Unfit("numbers above 0")
    return tuple(1.0 / std for std in numbers(stds))


# The value may stand alone or under ``model``, as ``test_cfg`` does in version 3. ``normalize`` is the step
# of the pipeline (version 2), which is what counts; ``img_norm_cfg`` is a name that it usually comes from.
_FIELDS: Fields = {
    "rpn_pre_nms": ("test_cfg.rpn.nms_pre", whole),
    "rpn_post_nms": ("test_cfg.rpn.max_per_img test_cfg.rpn.max_num", whole),
    "rpn_nms_iou": ("test_cfg.rpn.nms.iou_threshold test_cfg.rpn.nms_thr", number),
    # Below 0 nothing is dropped; boxes without area never come through here.
    "rpn_min_side": ("test_cfg.rpn.min_bbox_size", lambda side: max(0.0, number(side))),
    "score_threshold": ("test_cfg.rcnn.score_thr", number),
    "nms_iou": ("test_cfg.rcnn.nms.iou_threshold test_cfg.rcnn.nms.iou_thr", number),
    "max_detections": ("test_cfg.rcnn.max_per_img", whole),
    "anchor_sizes": (_RPN, _anchor_sizes),
    "aspect_ratios": (f"{_RPN}.anchor_generator.ratios {_RPN}.anchor_ratios", numbers),
    "roi_sampling": (f"{_ROI_LAYER}.sampling_ratio {_ROI_LAYER}.sample_num", whole),
    "roi_aligned": (f"{_ROI_LAYER}.aligned", flag),
    # finest_scale is twice the smallest side of the second level; ours is that of the third.
    "canonical_size": (f"{_ROI}.bbox_roi_extractor.finest_scale", lambda finest: 4.0 * number(finest)),
    "box_weights": (f"{_HEAD}.bbox_coder.target_stds {_HEAD}.target_stds", _weights),
    "mean": ("model.data_preprocessor.mean normalize.mean img_norm_cfg.mean", numbers),
    "std": ("model.data_preprocessor.std normalize.std img_norm_cfg.std", numbers),
    "channel_order": (
        "model.data_preprocessor.bgr_to_rgb normalize.to_rgb img_norm_cfg.to_rgb",
        lambda to_rgb: "rgb" if flag(to_rgb) else "bgr",
    ),
    "backbone_norm_eps": ("model.backbone.norm_cfg.eps", number),
}
# The steps of a pipeline that are repeated here, or change no pixel.
_STEPS = {
    "LoadImageFromFile", "LoadImageFromNDArray", "LoadImageFromWebcam", "LoadAnnotations", "RandomFlip",
    "MultiScaleFlipAug", "Resize", "Normalize", "Pad", "DefaultFormatBundle", "ImageToTensor", "Collect",
    "PackDetInputs",
}  # fmt: skip


def _steps(configuration: Configuration) -> dict[str, dict[str, Any]]:
    """The steps of the pipeline of test images by type, those within ``MultiScaleFlipAug`` included."""
    pipelines = ("test_dataloader.dataset.pipeline", "data.test.pipeline", "test_pipeline")
    found = (configuration.get(path) for path in pipelines)
    steps: dict[str, dict[str, Any]] = {}

    def add(pipeline: object, given: Mapping[str, Any]) -> None:
        for step in pipeline if isinstance(pipeline, list) else ():
            if isinstance(step, dict) and isinstance(step.get("type"), str):
                kind = step["type"].rpartition(".")[2]  # it may stand with its module
                steps[kind] = {**given, **step}
                if kind == "MultiScaleFlipAug":
                    add(step.get("transforms"), {"img_scale": step.get("img_scale", step.get("scale"))})

    add(next((each for each in found if isinstance(each, list)), []), {})
    return steps


def read_settings(
    configuration: Configuration,
) -> tuple[dict[str, Any], dict[str, int], tuple[str, ...]]:
    """Fields of ``ModelSettings`` and the sides of ``ResizeRule`` that it sets, and warnings.

    Raises ``ArtefactError`` where it describes a model that has no form here.
    """
    steps = _steps(configuration)
    values = {**configuration.values, **({"normalize": steps["Normalize"]} if "Normalize" in steps else {})}
    for path, value in _LEFT_OUT.items():
        part, _, name = path.rpartition(".")
        holder = Configuration(values, "").get(part)
        if isinstance(holder, dict) and holder.get(name) is None:
            values = _with(values, path, value)
    filled = Configuration(values, configuration.name)
    filled.check(_EXPECTED)
    fields = {
        name: (" ".join(f"model.{path} {path}" for path in paths.split()), read)
        for name, (paths, read) in _FIELDS.items()
    }
    head = filled.get(_RPN)
    if isinstance(head, dict) and not {"anchor_generator", "anchor_scales"} & head.keys():
        del fields["anchor_sizes"]
    others = ", ".join(sorted(steps.keys() - _STEPS))
    warnings = (f"{filled.name}: its pipeline's {others} is not repeated here",) if others else ()
    return filled.settings(fields), _sides(filled, steps), warnings


def _with(values: Mapping[str, Any], path: str, value: object) -> dict[str, Any]:
    """``values`` with ``value`` at ``path``; nothing of the old ones is changed."""
    name, _, rest = path.partition(".")
    return {**values, name: _with(values[name], rest, value) if rest else value}


def _sides(configuration: Configuration, steps: Mapping[str, dict[str, Any]]) -> dict[str, int]:
    """The shorter and the longer side that test images are resized to, where one size is given."""
    pad = steps.get("Pad", {})
    for name, allowed in (("size_divisor", 32), ("size", None), ("pad_to_square", False)):
        if pad.get(name) not in (None, allowed):
            raise configuration.refuse(
                f"{name} of the pipeline's Pad", pad[name], "with a size_divisor of 32 alone"
            )
    resize = steps.get("Resize")
    if resize is None:
        return {}
    old = "img_scale" in resize  # version 2, which keeps the ratio unless it is told not to
    for name, usual, default in (
        ("keep_ratio", True, old),
        ("interpolation", "bilinear", "bilinear"),
        ("backend", "cv2", "cv2"),
    ):
        if (found := resize.get(name, default)) != usual:
            raise configuration.refuse(f"{name} of the pipeline's Resize", found, f"with {usual!r}")
    scale = resize.get("scale", resize.get("img_scale"))
    if isinstance(scale, list) and len(scale) == 1:
        scale = scale[0]
    if isinstance(scale, list) and len(scale) == 2 and all(type(side) is int and side > 0 for side in scale):
        return {"shorter_side": min(scale), "longer_side": max(scale)}
    return {}


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
    if f"{_SCORES}.weight" not in state:
        return None
    blocks = {name.split(".")[2] for name in state if name.startswith("backbone.layer3.")}
    depth = {6: "50", 23: "101"}.get(len(blocks))
    if depth is None:
        return None
    configuration = configuration_of(source)
    style = "_caffe" if configuration and configuration.get("model.backbone.style") == "caffe" else ""
    return f"mmdet_r{depth}{style}_fpn"


def describe(source: CheckpointFile, state: State, arch: str) -> Architecture:
    """The zoo's settings, changed as the checkpoint's configuration says."""
    configuration = configuration_of(source)
    names = _class_names(source.meta, configuration)
    usual = dataclasses.replace(ARCHITECTURES[arch], names=names)
    if configuration is None:
        return usual
    said, sides, others = read_settings(configuration)
    usual = dataclasses.replace(usual, known=_SAME_LEFT_OUT, warnings=others)
    style, caffe = configuration.get("model.backbone.style") or "pytorch", "_caffe_" in arch
    if (style == "caffe") != caffe:
        right = arch.replace("_caffe_fpn", "_fpn") if caffe else arch.replace("_fpn", "_caffe_fpn")
        raise SettingsError(
            f"{configuration.name} says style={style!r}, and arch is {arch!r}; give --arch {right}"
        )
    configuration.agree("model.backbone.depth", int(arch.split("_")[1][1:]), "layers")
    return with_configuration(
        usual,
        configuration,
        said,
        sides,
        (f"{_RPN}.anchor_generator", side_of(state, f"{_SCORES}.weight", 0)),
        (f"{_HEAD}.num_classes", side_of(state, f"{_CLASSIFIER}.weight", 0)),
    )


def _class_names(meta: Mapping[str, object], configuration: Configuration | None) -> tuple[str, ...] | None:
    """``CLASSES`` of version 2, or ``dataset_meta``'s of version 3, or those that the configuration names."""
    dataset = meta.get("dataset_meta")
    places = (meta, dataset if isinstance(dataset, Mapping) else {})
    found = [place.get(key) for place in places for key in ("CLASSES", "classes")]
    found += [configuration.get(path) for path in _NAMES] if configuration else []
    for names in found:
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
    open_settings=("resize", "bottleneck_stride", *_FIELDS),
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
    ignored=("data_preprocessor.", "ema_"),  # the latter: what version 2 averages over
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
