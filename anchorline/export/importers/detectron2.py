"""Detectron2's Faster R-CNN models of its model zoo: their settings, their names and the order of their rows.

The files that each rule comes from stand in ``docs/import.md``.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor

from anchorline.export.importers.checkpoint_files import CheckpointFile
from anchorline.export.importers.configuration import (
    REMEDY,
    Configuration,
    Fields,
    Unfit,
    choice,
    flag,
    from_yaml,
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
    listed,
    side_of,
    with_configuration,
)
from anchorline.runtime.contract import ResizeRule
from anchorline.runtime.io.errors import ArtefactError
from anchorline.train.model.anchors import unrounded_base_anchors
from anchorline.train.model.settings import ModelSettings

_RPN_HEAD, _PREDICTOR = "proposal_generator.rpn_head.", "roi_heads.box_predictor"
_FPN, _C4 = "backbone.fpn_lateral2.weight", "roi_heads.res5.0.conv1.weight"
_ALL_SIZES = ((32.0, 64.0, 128.0, 256.0, 512.0),)
_ANCHORS = "proposal_generator.anchor_generator.cell_anchors."


def _architectures() -> dict[str, Architecture]:
    fpn = dataclasses.replace(RESNET_FPN, roi_level_rule="detectron2", **MSRA)
    one_map = dataclasses.replace(fpn, neck="dc5", anchor_sizes=_ALL_SIZES, rpn_pre_nms=6000)
    c4 = dataclasses.replace(one_map, neck="single", box_head="res5", roi_size=14)
    x101 = dataclasses.replace(
        fpn, backbone="resnext101_32x8d", bottleneck_stride="3x3", std=(57.375, 57.12, 58.395)
    )
    found = {"x101_fpn": x101}
    for depth in ("50", "101"):
        for kind, settings in (("fpn", fpn), ("c4", c4), ("dc5", one_map)):
            found[f"r{depth}_{kind}"] = dataclasses.replace(settings, backbone=f"resnet{depth}")
    resize = ResizeRule(800, 1333, interpolation="antialiased", rounding="nearest")
    return {f"detectron2_{name}": Architecture(settings, resize) for name, settings in sorted(found.items())}


ARCHITECTURES = _architectures()
"""The architectures of ``configs/COCO-Detection/faster_rcnn_*.yaml``."""


def recognise(source: CheckpointFile, state: State) -> str | None:
    """The architecture by the parts that are there, the blocks of ``res4`` and the groups."""
    if f"{_RPN_HEAD}objectness_logits.weight" not in state:
        return None
    kind = "fpn" if _FPN in state else "c4" if _C4 in state else "dc5"
    blocks = {name.partition("res4.")[2].partition(".")[0] for name in state if "res4." in name}
    depth = {6: "r50", 23: "r101"}.get(len(blocks))
    if depth == "r101" and side_of(state, "backbone.bottom_up.res2.0.conv2.weight", 1) == 8:
        depth = "x101"
    arch = f"detectron2_{depth}_{kind}"
    return arch if arch in ARCHITECTURES else None


# What ``config.yaml`` says of our settings, and what else it may say (``config/defaults.py``).
def _fields(levels: int) -> Fields:
    """With anchors for as many maps."""
    return {
        "anchor_sizes": ("MODEL.ANCHOR_GENERATOR.SIZES", lambda value: tuple(_per_level(value, levels))),
        "aspect_ratios": ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", lambda value: _ratios(value, levels)),
        "channel_order": ("INPUT.FORMAT", choice(BGR="bgr", RGB="rgb")),
        "mean": ("MODEL.PIXEL_MEAN", numbers),
        "std": ("MODEL.PIXEL_STD", numbers),
        "bottleneck_stride": ("MODEL.RESNETS.STRIDE_IN_1X1", lambda value: "1x1" if flag(value) else "3x3"),
        "rpn_channels": ("MODEL.RPN.CONV_DIMS", _rpn_channels),
        "rpn_pre_nms": ("MODEL.RPN.PRE_NMS_TOPK_TEST", whole),
        "rpn_post_nms": ("MODEL.RPN.POST_NMS_TOPK_TEST", whole),
        "rpn_nms_iou": ("MODEL.RPN.NMS_THRESH", number),
        "rpn_min_side": ("MODEL.PROPOSAL_GENERATOR.MIN_SIZE", number),
        "roi_size": ("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", whole),
        "roi_sampling": ("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", whole),
        "roi_aligned": ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", choice(ROIAlignV2=True, ROIAlign=False)),
        "box_weights": ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", numbers),
        "score_threshold": ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", number),
        "nms_iou": ("MODEL.ROI_HEADS.NMS_THRESH_TEST", number),
        "max_detections": ("TEST.DETECTIONS_PER_IMAGE", whole),
    }


_SIDES = {"shorter_side": ("INPUT.MIN_SIZE_TEST", whole), "longer_side": ("INPUT.MAX_SIZE_TEST", whole)}
_EXPECTED: dict[str, tuple[object, ...]] = {
    "VERSION": (2,),
    "MODEL.META_ARCHITECTURE": ("GeneralizedRCNN",),
    "MODEL.LOAD_PROPOSALS": (False,),
    "MODEL.RESNETS.NORM": ("FrozenBN", "BN", "SyncBN", "naiveSyncBN"),
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": ([False, False, False, False],),
    "MODEL.FPN.NORM": ("",),
    "MODEL.FPN.FUSE_TYPE": ("sum",),
    "MODEL.PROPOSAL_GENERATOR.NAME": ("RPN",),
    "MODEL.ANCHOR_GENERATOR.NAME": ("DefaultAnchorGenerator",),
    "MODEL.ANCHOR_GENERATOR.OFFSET": (0,),
    "MODEL.RPN.HEAD_NAME": ("StandardRPNHead",),
    "MODEL.RPN.BBOX_REG_WEIGHTS": ([1, 1, 1, 1],),
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": (False,),
}
_LEVELS = ["p2", "p3", "p4", "p5", "p6"]
_ANY = object()
_EXPECTED_BY_KIND: dict[str, dict[str, object]] = {
    path: dict(zip(("fpn", "c4", "dc5"), allowed, strict=True))
    for path, allowed in (
        ("MODEL.BACKBONE.NAME", ("build_resnet_fpn_backbone", *["build_resnet_backbone"] * 2)),
        ("MODEL.RESNETS.RES5_DILATION", (1, 1, 2)),
        ("MODEL.FPN.IN_FEATURES", (["res2", "res3", "res4", "res5"], _ANY, _ANY)),
        ("MODEL.RPN.IN_FEATURES", (_LEVELS, ["res4"], ["res5"])),
        ("MODEL.ROI_HEADS.IN_FEATURES", (_LEVELS[:4], ["res4"], ["res5"])),
        ("MODEL.ROI_HEADS.NAME", ("StandardROIHeads", "Res5ROIHeads", "StandardROIHeads")),
        ("MODEL.ROI_BOX_HEAD.NUM_CONV", (0, _ANY, 0)),
        ("MODEL.ROI_BOX_HEAD.NUM_FC", (2, _ANY, 2)),
    )
}


def _rpn_channels(dims: Any) -> int:
    if not isinstance(dims, list) or len(dims) != 1 or dims[0] == 0 or whole(dims[0]) < -1:
        raise Unfit("one convolution, as [-1]")
    return max(0, dims[0])  # -1: as many as the maps have


def _per_level(value: Any, levels: int) -> list[tuple[float, ...]]:
    """Numbers for each level, of which one list stands for all levels."""
    groups = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    groups = list(map(numbers, groups))
    if len(groups) not in (1, levels):
        raise Unfit(f"a list for each of {levels} levels, or one for all")
    return groups * (levels // len(groups))


def _ratios(value: Any, levels: int) -> tuple[float, ...]:
    groups = _per_level(value, levels)
    if len(set(groups)) > 1:
        raise Unfit("the same ratios for all levels")
    return groups[0]


def configuration_of(source: CheckpointFile) -> Configuration | None:
    """The configuration that the user gives, or ``config.yaml`` beside the checkpoint; ``None`` without one.

    Raises ``ArtefactError`` for one that is none of the default configuration's (yacs) form.
    """
    path = source.config or (source.folder / "config.yaml" if source.folder else None)
    if path is None or (source.config is None and not path.is_file()):
        return None
    values = _decoded(from_yaml(text_of(path), str(path)))
    found = Configuration(values, str(path))
    if isinstance(found.get("model"), dict) and found.get("model._target_") is not None:
        raise ArtefactError(
            f"{path}: is a LazyConfig, which is not read; expected the yacs form, with MODEL and INPUT. "
            "Import from a folder without it, with --set for what it changes"
        )
    if not isinstance(found.get("MODEL"), dict):
        if source.config is None:  # another program's
            return None
        raise ArtefactError(
            f"{path}: has no MODEL; expected the config.yaml that Detectron2 wrote in training"
        )
    if "_BASE_" in values:
        raise ArtefactError(
            f"{path}: is built on {str(values['_BASE_'])[:80]!r}; expected the whole one, which Detectron2 "
            "wrote to its OUTPUT_DIR as config.yaml"
        )
    return found


def _decoded(value: Any) -> Any:
    """``value`` with texts that are literals of Python as what they say, as yacs reads them: "(1, 2)"."""
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return list(map(_decoded, value))
    if isinstance(value, str):
        odd = (ValueError, SyntaxError, RecursionError, MemoryError, TypeError)
        with contextlib.suppress(*odd), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return plain(ast.literal_eval(value))
    return value


def describe(source: CheckpointFile, state: State, arch: str) -> Architecture:
    """The zoo's settings with what the configuration says, and ``state`` holds of pixels and anchors."""
    usual, resize = ARCHITECTURES[arch].settings, ARCHITECTURES[arch].resize
    held = {**_pixel_statistics(state, source.name), **_anchors(state, usual, source.name)}
    configuration = configuration_of(source)
    if configuration is None:
        found = dataclasses.replace(usual, **held)
        return Architecture(found, resize, warnings=_hints(found, usual), known=frozenset(held))
    _, depth, kind = arch.split("_")
    by_kind = {path: (allowed[kind],) for path, allowed in _EXPECTED_BY_KIND.items() if allowed[kind] != _ANY}
    configuration.check({**_EXPECTED, **by_kind})
    configuration.agree("MODEL.RESNETS.DEPTH", int(depth[1:]), "layers")
    said = configuration.settings(_fields(len(usual.anchor_sizes)))
    for name, value in held.items():
        if not _close(value, said.setdefault(name, value)):
            raise ArtefactError(
                f"{configuration.name}: gives {name} as {listed(said[name])}, and the checkpoint holds "
                f"{listed(value)}; {REMEDY}"
            )
    return with_configuration(
        ARCHITECTURES[arch],
        configuration,
        said,
        configuration.settings(_SIDES),
        ("MODEL.ANCHOR_GENERATOR", side_of(state, f"{_RPN_HEAD}objectness_logits.weight", 0)),
        ("MODEL.ROI_HEADS.NUM_CLASSES", side_of(state, f"{_PREDICTOR}.cls_score.weight", 0)),
    )


def _close(one: Any, other: Any) -> bool:
    """Whether nested tuples hold the same numbers, up to the rounding of buffers in float32."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_close, one, other))
    return bool(abs(one - other) <= 1e-4 * max(1.0, abs(other)))


def _hints(found: ModelSettings, usual: ModelSettings) -> tuple[str, ...]:
    """What the tensors leave open where their statistics are not the zoo's."""
    hints = []
    if found.mean[0] > found.mean[2]:
        hints.append(
            f"pixel_mean is {list(found.mean)}, the order of RGB; if the model was trained with INPUT.FORMAT "
            '"RGB", import again with --set channel_order=rgb'
        )
    if max(found.std) > 1 and usual.bottleneck_stride == "1x1":
        hints.append(
            f"pixel_std is {list(found.std)}, so the backbone is not MSRA's; if it was trained with "
            "STRIDE_IN_1X1: False, import again with --set bottleneck_stride=3x3"
        )
    return tuple(hints)


def _pixel_statistics(state: State, where: str) -> dict[str, Any]:
    """Mean and standard deviation where the checkpoint has them, as those of before version 0.5."""
    found = {}
    for field in ("mean", "std"):
        tensor = state.get(f"pixel_{field}")
        if tensor is None:
            continue
        if tensor.numel() != 3 or not torch.isfinite(tensor.float()).all():
            raise ArtefactError(
                f"{where}: pixel_{field} is {list(tensor.shape)}, expected 3 finite numbers, one a channel"
            )
        # Written as float32 and shown so: 103.53, not 103.52999877929688.
        found[field] = tuple(round(float(value), 4) for value in tensor.flatten())
    return found


def _anchors(state: State, usual: ModelSettings, where: str) -> dict[str, Any]:
    """Anchor sizes and ratios where the checkpoint holds the anchors, as those of before version 0.5."""
    held = [state.get(f"{_ANCHORS}{level}") for level in range(len(usual.anchor_sizes))]
    found = [_sizes_and_ratios(each) for each in held if each is not None]
    if not found:
        return {}
    ratios = {each[1] for each in found if each is not None}
    if None in found or len(found) != len(held) or len(ratios) != 1:
        raise ArtefactError(
            f"{where}: its {_ANCHORS}* are no anchors for {len(held)} map{'s' * (len(held) > 1)}; expected "
            "every size with every ratio, centred at 0, which are the anchors that can be imported"
        )
    return {"anchor_sizes": tuple(each[0] for each in found if each), "aspect_ratios": ratios.pop()}


def _sizes_and_ratios(anchors: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Sizes and ratios that give ``anchors`` [A, 4], size by size; ``None`` where none do."""
    if anchors.dim() != 2 or anchors.shape[1] != 4 or not len(anchors):
        return None
    width, height = (anchors[:, 2:] - anchors[:, :2]).double().unbind(1)
    # Rounded, since the buffers are float32: 22.627416 x 45.254833 is 32 at a ratio of 2.
    sizes, ratios = (
        tuple(dict.fromkeys(round(value, decimals) for value in values.tolist()))
        for values, decimals in (((width * height).sqrt(), 3), (height / width, 5))
    )
    if not all(value > 0 for value in (*sizes, *ratios)):  # NaN as well
        return None
    rebuilt = unrounded_base_anchors(sizes, ratios).unflatten(0, (len(ratios), len(sizes))).transpose(0, 1)
    same = rebuilt.numel() == anchors.numel() and torch.allclose(
        rebuilt.reshape(-1, 4), anchors.float(), rtol=1e-4, atol=1e-2
    )
    return (sizes, ratios) if same else None


LIBRARY = Library(
    name="Detectron2",
    architectures=ARCHITECTURES,
    known_names=", ".join(ARCHITECTURES),
    recognise=recognise,
    describe=describe,
    open_settings=("resize", *_fields(1)),
    names=(
        (r"^backbone\.body\.(conv1|bn1)\.", r"backbone.body.stem.\1."),
        (r"^roi_heads\.box_head\.layer4\.", "roi_heads.res5."),
        *((rf"\.layer{number}\.", f".res{number + 1}.") for number in range(1, 5)),
        (r"\.bn(\d)\.", r".conv\1.norm."),
        (r"\.downsample\.0\.", ".shortcut."),
        (r"\.downsample\.1\.", ".shortcut.norm."),
        *(
            (rf"^backbone\.fpn\.{ours}_blocks\.{level}\.0\.", f"backbone.fpn_{theirs}{level + 2}.")
            for ours, theirs in (("inner", "lateral"), ("layer", "output"))
            for level in range(4)
        ),
        (r"^rpn\.head\.conv\.0\.0\.", f"{_RPN_HEAD}conv."),
        (r"^rpn\.head\.cls_logits\.", f"{_RPN_HEAD}objectness_logits."),
        (r"^rpn\.head\.bbox_pred\.", f"{_RPN_HEAD}anchor_deltas."),
        (r"^roi_heads\.box_head\.fc6\.", "roi_heads.box_head.fc1."),
        (r"^roi_heads\.box_head\.fc7\.", "roi_heads.box_head.fc2."),
    ),
    body={"fpn": "backbone.bottom_up.", "single": "backbone.", "dc5": "backbone."},
    ignored=("pixel_mean", "pixel_std", "proposal_generator.anchor_generator."),
    background_last=True,
    size_by_size=True,
    marks=(
        (r"^roi_heads\.mask_head\.", "a Mask R-CNN"),
        (r"^roi_heads\.keypoint_head\.", "a Keypoint R-CNN"),
        (r"^roi_heads\.box_(head|predictor)\.0\.", "a Cascade R-CNN"),
        (r"^head\.cls_subnet\.", "a RetinaNet"),
        (r"^roi_heads\.box_head\.conv1\.", "a model with convolutions in its box head"),
    ),
)
