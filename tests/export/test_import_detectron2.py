"""Detectron2's checkpoints: published names and shapes, known numbers, a result worked out by hand."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from anchorline.export.importers import conversion, detectron2, torchvision
from anchorline.export.importers.checkpoint_files import CheckpointFile
from anchorline.export.importers.conversion import import_checkpoint
from anchorline.export.importers.library import (
    background_first,
    choose_class_names,
    expected_shapes,
    ratio_by_ratio,
)
from anchorline.runtime.contract import ResizeRule
from anchorline.runtime.io.errors import AnchorlineError, ArtefactError, SettingsError
from anchorline.train.checkpoint import load_checkpoint
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
    assert (contract.input_dtype, contract.channel_order, contract.canvas) == ("uint8", "bgr", (800, 1344))
    assert contract.mean == (103.53, 116.28, 123.675)
    assert contract.std == (57.375, 57.12, 58.395)
    assert contract.source["library"] == "Detectron2"
    assert contract.source["arch"] == "detectron2_r50_fpn"
    assert model.settings.anchor_sizes == tuple((size,) for size in SIZES)
    assert model.backbone.body.get_submodule("layer2.0.conv1").stride == (2, 2), "MSRA's stride"
    taken_as, stride = result.warnings
    assert "Detectron2's, taken as detectron2_r50_fpn" in taken_as
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
    assert result.contract.resize == ResizeRule(800, 1333, "bilinear", "nearest")
    assert result.warnings == ()
    model, _ = load_checkpoint(out)
    assert model.roi_heads.box_head.get_submodule("layer4.0.conv1").stride == (2, 2)


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
            conversion, "read_checkpoint_file", lambda path: CheckpointFile(path.name, state, "")
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
