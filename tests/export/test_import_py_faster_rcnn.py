"""Generated ``.caffemodel`` files with py-faster-rcnn's names and shapes, through import to known results."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from numpy.typing import NDArray

from anchorline import cli
from anchorline.export.importers.conversion import import_checkpoint
from anchorline.export.importers.py_faster_rcnn import VOC_CLASSES
from anchorline.runtime.contract import ResizeRule
from anchorline.runtime.io.errors import AnchorlineError
from anchorline.train.checkpoint import load_checkpoint
from anchorline.train.model.boxes import BoxCoder
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.model.rpn import Proposals

Net = dict[str, NDArray[np.float32]]
# models/pascal_voc: input channels, width and kernel of each convolution.
ZF_CONVS = {"conv1": (3, 96, 7), "conv2": (96, 256, 5), "conv3": (256, 384, 3), "conv4": (384, 384, 3)}
ZF_CONVS |= {"conv5": (384, 256, 3)}
VGG_WIDTHS = {"1": (64, 64), "2": (128, 128), "3": (256,) * 3, "4": (512,) * 3, "5": (512,) * 3}
RPN, FC = 8, 16  # instead of 256 or 512, and 4096
ARCHES = {"zf": "py_faster_rcnn_zf", "vgg16": "py_faster_rcnn_vgg16"}
SMALL = {"canvas": (96, 160)}


def vgg_convs() -> dict[str, tuple[int, int, int]]:
    found, before = {}, 3
    for stage, widths in VGG_WIDTHS.items():
        for number, width in enumerate(widths, start=1):
            found[f"conv{stage}_{number}"] = (before, width, 3)
            before = width
    return found


def net(backbone: str = "zf", outputs: int = 21, anchors: int = 9, rpn_conv: str = "rpn_conv/3x3") -> Net:
    """Zeros with the published names and shapes, but for the narrow RPN and fully connected layers."""
    convs = ZF_CONVS if backbone == "zf" else vgg_convs()
    channels, cells = (256, 6) if backbone == "zf" else (512, 7)
    shapes: dict[str, tuple[int, ...]] = {
        name: (width, inputs, kernel, kernel) for name, (inputs, width, kernel) in convs.items()
    }
    shapes |= {rpn_conv: (RPN, channels, 3, 3), "rpn_cls_score": (2 * anchors, RPN, 1, 1)}
    shapes |= {"rpn_bbox_pred": (4 * anchors, RPN, 1, 1), "fc6": (FC, channels * cells**2), "fc7": (FC, FC)}
    shapes |= {"cls_score": (outputs, FC), "bbox_pred": (4 * outputs, FC)}
    found = {}
    for name, shape in shapes.items():
        found[f"{name}.weight"] = np.zeros(shape, np.float32)
        found[f"{name}.bias"] = np.zeros(shape[0], np.float32)
    return found


def random_net(seed: int = 0, **kind: Any) -> Net:
    generator = np.random.default_rng(seed)
    return {
        name: (generator.normal(size=values.shape) * 0.5 / math.sqrt(values[0].size)).astype(np.float32)
        for name, values in net(**kind).items()
    }


def schema() -> Any:
    """An empty NetParameter; packed floats have the form of bytes (``test_caffemodel_file.py``)."""
    file = descriptor_pb2.FileDescriptorProto(name="test.proto", package="test")
    types = {"int64": 3, "bytes": 12, "string": 9}
    for message, name, number, kind, label in (
        ("BlobShape", "dim", 1, "int64", 3),
        ("BlobProto", "data", 5, "bytes", 1),
        ("BlobProto", "shape", 7, "BlobShape", 1),
        ("LayerParameter", "name", 1, "string", 1),
        ("LayerParameter", "blobs", 7, "BlobProto", 3),
        ("NetParameter", "layer", 100, "LayerParameter", 3),
    ):
        if not file.message_type or file.message_type[-1].name != message:
            file.message_type.add(name=message)
        field = file.message_type[-1].field.add(name=name, number=number, label=label)
        field.type = types.get(kind, 11)
        if kind not in types:
            field.type_name = f".test.{kind}"
        elif label == 3:
            field.options.packed = True
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("test.NetParameter"))()


def write(path: Path, tensors: Net) -> Path:
    message = schema()
    for name, values in tensors.items():
        layer, _, part = name.rpartition(".")
        if part == "weight":
            message.layer.add(name=layer)
        blob = message.layer[-1].blobs.add()
        blob.shape.dim.extend(values.shape)
        blob.data = values.tobytes()
    path.write_bytes(message.SerializeToString())
    return path


@pytest.fixture
def imported(tmp_path: Path) -> Callable[..., FasterRCNN]:
    def imported(tensors: Net, arch: str = ARCHES["zf"], **options: Any) -> FasterRCNN:
        path = write(tmp_path / "net.caffemodel", tensors)
        result = import_checkpoint(path, tmp_path / "model.safetensors", arch=arch, **{**SMALL, **options})
        return load_checkpoint(result.path)[0]

    return imported


@pytest.fixture
def refusal(imported: Callable[..., FasterRCNN]) -> Callable[..., str]:
    def refusal(tensors: Net, arch: str = ARCHES["zf"], **options: Any) -> str:
        with pytest.raises(AnchorlineError) as caught:
            imported(tensors, arch, **options)
        assert str(caught.value).isprintable()
        return str(caught.value)

    return refusal


def test_the_settings_are_py_faster_rcnns(tmp_path: Path) -> None:
    path = write(tmp_path / "ZF_faster_rcnn_final.caffemodel", net(rpn_conv="rpn_conv1"))
    result = import_checkpoint(path, tmp_path / "model.safetensors")  # the layers tell the architecture
    s, contract = result.settings, result.contract
    assert (s.rpn_pre_nms, s.rpn_post_nms, s.rpn_nms_iou, s.rpn_min_side) == (6000, 300, 0.7, 16)
    assert (s.score_threshold, s.nms_iou, s.max_detections) == (0.05, 0.3, 100)
    assert s.box_weights == (1, 1, 1, 1)  # snapshots hold the layer with its scaling undone
    assert (s.rpn_channels, s.representation, s.roi_size, s.box_dropout) == (RPN, FC, 6, 0.5)
    assert (contract.profile, contract.channel_order, contract.input_dtype) == ("caffe2015", "bgr", "float32")
    assert contract.mean == (102.9801, 115.9465, 122.7717)
    assert contract.std == (1, 1, 1)
    assert contract.resize == ResizeRule(600, 1000, rounding="nearest", padding=1)
    assert contract.canvas is None
    assert contract.names == VOC_CLASSES
    assert contract.names[14] == "person"
    assert contract.category_ids is None
    assert contract.source["arch"] == ARCHES["zf"]


@pytest.mark.parametrize("backbone", ["zf", "vgg16"])
def test_every_tensor_goes_where_it_belongs(backbone: str, imported: Callable[..., FasterRCNN]) -> None:
    """VGG-16's convolutions are counted with their ReLUs and poolings, as torchvision does."""
    given = random_net(backbone=backbone)
    state = imported(given, ARCHES[backbone]).state_dict()
    ours = {
        "conv1_1": "backbone.body.0",
        "conv3_3": "backbone.body.14",
        "conv5_3": "backbone.body.28",
        "conv1": "backbone.body.conv1",
        "conv5": "backbone.body.conv5",
        "rpn_conv/3x3": "rpn.head.conv.0.0",
        "rpn_cls_score": "rpn.head.cls_logits",
        "rpn_bbox_pred": "rpn.head.bbox_pred",
        "fc6": "roi_heads.box_head.fc6",
        "fc7": "roi_heads.box_head.fc7",
        "cls_score": "roi_heads.box_predictor.cls_score",
        "bbox_pred": "roi_heads.box_predictor.bbox_pred",
    }
    for layer, name in ours.items():
        for part in ("weight", "bias"):
            if f"{layer}.{part}" in given:
                np.testing.assert_array_equal(state[f"{name}.{part}"], given[f"{layer}.{part}"])
    own = sorted(float(values.double().sum()) for values in state.values())
    assert own == pytest.approx(sorted(float(values.astype(np.float64).sum()) for values in given.values()))


def test_both_names_of_the_rpns_window(imported: Callable[..., FasterRCNN]) -> None:
    given = random_net()
    renamed = {name.replace("rpn_conv/3x3", "rpn_conv1"): values for name, values in given.items()}
    one, other = imported(given).state_dict(), imported(renamed).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_score_pairs_anchors_and_deltas_by_hand(imported: Callable[..., FasterRCNN]) -> None:
    """Anchor 5 (ratio 1, scale 32): scores 5 and 9 + 5 of 18, deltas 20 to 23 of 36."""
    tensors = net()
    tensors["rpn_cls_score.bias"][5] = 1.0  # background
    tensors["rpn_cls_score.bias"][9 + 5] = 3.0
    tensors["rpn_bbox_pred.bias"][20:24] = 0.25, -0.5, math.log(0.5), 0.0
    model = imported(tensors)
    features = [torch.zeros(1, 256, 7, 11)]
    (objectness,), (deltas,) = model.rpn.head(features)
    scores = objectness.sigmoid().reshape(7, 11, 9)
    assert scores[3, 4].tolist() == pytest.approx([0.5] * 5 + [math.e**3 / (math.e**3 + math.e)] + [0.5] * 3)
    place = (3 * 11 + 4) * 9 + 5  # row 3, column 4: 48 pixels down, 64 across
    anchor = model.rpn.anchors([(7, 11)])[0][torch.tensor(place)]
    assert (anchor - torch.tensor([0, 0, 1, 1])).tolist() == [64 - 248, 48 - 248, 64 + 263, 48 + 263]
    # 512 wide and high around (72, 56): a quarter right, half up, half as wide.
    decoded = BoxCoder().decode(deltas[0, place], anchor).tolist()
    assert decoded == pytest.approx([72 + 128 - 128, 56 - 256 - 256, 72 + 128 + 128, 56 - 256 + 256])


def test_fc6_takes_channels_then_rows_then_columns(imported: Callable[..., FasterRCNN]) -> None:
    tensors = net()
    tensors["fc6.weight"][2, 7 * 36 + 4 * 6 + 1] = 1.0  # channel 7, row 4, column 1 of 256 x 6 x 6
    tensors["fc7.weight"][5, 2] = 2.0
    pooled = torch.zeros(1, 256, 6, 6)
    pooled[0, 7, 4, 1] = 3.0
    hidden = imported(tensors).roi_heads.box_head(pooled)
    assert hidden.nonzero().tolist() == [[0, 5]]
    assert hidden[0, 5].item() == 6.0


def test_classes_and_box_deltas_by_hand(imported: Callable[..., FasterRCNN]) -> None:
    """Class 3 of 21 is the bird; its deltas are 12 to 15 of 84, and nothing scales them."""
    tensors = net()
    tensors["cls_score.bias"][3] = 5.0
    tensors["bbox_pred.bias"][12:16] = 0.25, -0.5, math.log(0.5), math.log(2)
    model = imported(tensors)
    # (16, 16, 79, 47) for caffe: 64 x 32 around (48, 32).
    proposals = Proposals(torch.tensor([[[16.0, 16, 80, 48]]]), torch.ones(1, 1))
    found = model.roi_heads([torch.zeros(1, 256, 7, 11)], proposals, torch.tensor([[96.0, 160]]))
    assert found.num_detections.tolist() == [1]
    assert VOC_CLASSES[int(found.labels[0, 0])] == "bird"
    assert found.scores[0, 0].item() == pytest.approx(math.e**5 / (math.e**5 + 20))
    # 32 x 64 around (64, 16): caffe's (48, -16, 80, 48), clipped to (48, 0, 80, 48).
    assert found.boxes[0, 0].tolist() == pytest.approx([48, 0, 81, 49])


def test_the_scale_of_the_frames_as_an_option(imported: Callable[..., FasterRCNN]) -> None:
    """On the unscaled image: (10, 10, 49.375, 29.375) is 40.375 x 20.375 around (30.1875, 20.1875)."""
    model = imported(net(), overrides=["frame_scale=1.6"])
    proposals = Proposals(torch.tensor([[[16.0, 16, 80, 48]]]), torch.ones(1, 1))
    logits, deltas = model.roi_heads.classify([torch.zeros(1, 256, 7, 11)], proposals.boxes)
    logits[..., 3] = 5.0
    found = model.roi_heads.detect(logits, deltas, proposals, torch.tensor([[96.0, 160]]))
    x2, y2 = 30.1875 + 40.375 / 2, 20.1875 + 20.375 / 2
    assert found.boxes[0, 0].div(1.6).tolist() == pytest.approx([10, 10, x2 + 1, y2 + 1])


def test_the_coco_models_twelve_anchors_and_80_classes(imported: Callable[..., FasterRCNN]) -> None:
    model = imported(net(outputs=81, anchors=12))
    assert model.settings.anchor_sizes == ((64, 128, 256, 512),)
    assert model.roi_heads.box_predictor.cls_score.out_features == 81


def test_own_classes_and_anchors(imported: Callable[..., FasterRCNN], tmp_path: Path) -> None:
    classes = tmp_path / "names.txt"
    classes.write_text("__background__\nface\n", encoding="utf-8")
    overrides = ["anchor_sizes=[[32, 64]]", "aspect_ratios=[1.0]"]
    model = imported(net(outputs=2, anchors=2), classes=classes, overrides=overrides)
    assert model.rpn.head.cls_logits.out_channels == 4


def test_files_of_before_2015_have_four_sides_everywhere(imported: Callable[..., FasterRCNN]) -> None:
    given = random_net()
    old = {name: values.reshape((1,) * (4 - values.ndim) + values.shape) for name, values in given.items()}
    new, renewed = imported(given).state_dict(), imported(old).state_dict()
    assert all(torch.equal(new[name], renewed[name]) for name in new)


def without(*layers: str) -> Net:
    return {name: values for name, values in net().items() if name.rpartition(".")[0] not in layers}


@pytest.mark.parametrize(
    ("tensors", "arch", "message"),
    [
        (without("rpn_conv/3x3", "rpn_cls_score", "rpn_bbox_pred"), "zf", "a Fast R-CNN, which has no RPN"),
        (without("fc6", "fc7", "cls_score", "bbox_pred"), "zf", "an RPN alone"),
        (net() | {"fc8.weight": np.zeros((5, FC), np.float32)}, "zf", "1 unknown (fc8.weight)"),
        (without("fc6") | {"fc6_L.weight": np.zeros((9, 9), np.float32)}, "zf", "compressed (SVD)"),
        (net(), "vgg16", "it looks like py_faster_rcnn_zf: give --arch py_faster_rcnn_zf"),
        (net(anchors=4), "zf", "its RPN predicts 4 anchors at each place: give the ones"),
        (net() | {"norm5.weight": np.zeros(256, np.float32)}, "zf", "1 unknown (norm5.weight)"),
        (net() | {"rpn_conv1.weight": np.zeros((2, 2), np.float32)}, "zf", "1 unknown (rpn_conv1.weight)"),
        (net() | {"fc7.weight": np.full((FC, FC), np.nan, np.float32)}, "zf", "'fc7.weight' holds values"),
        (net() | {"conv3.bias": np.zeros(383, np.float32)}, "zf", "conv3.bias is [383], expected [384]"),
        (net(outputs=5), "zf", "has 5 outputs, background included; name its 4 classes with --classes"),
        (without("conv4"), "zf", "2 missing (conv4.bias, conv4.weight)"),
    ],
    ids=range(12),
)
def test_what_does_not_fit_is_named(
    tensors: Net, arch: str, message: str, refusal: Callable[..., str]
) -> None:
    assert message in refusal(tensors, ARCHES[arch])


def test_the_command_takes_it_and_refuses_damage_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write(tmp_path / "net.caffemodel", net()), tmp_path / "model.safetensors"
    arguments = ["import", str(path), "--arch", ARCHES["zf"], "--canvas", "96x160", "--out", str(out)]
    assert cli.main(arguments) == 0
    assert ARCHES["zf"] in capsys.readouterr().out
    out.unlink()
    path.write_bytes(path.read_bytes()[:-100])
    assert cli.main(arguments) == 2
    shown = capsys.readouterr().err.strip()
    assert "not a readable .caffemodel" in " ".join(shown.split())
    assert "Traceback" not in shown
    assert not out.exists()
