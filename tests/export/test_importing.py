"""Imported torchvision detectors: the same detections as torchvision's own; one line for bad files."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN

from anchorline.data.synthetic import generate_scene
from anchorline.export.importers import torchvision as importer
from anchorline.export.importers.conversion import import_checkpoint
from anchorline.export.importers.library import coco_90
from anchorline.export.importers.torchvision import ARCHITECTURES, TorchvisionDetector
from anchorline.export.onnx_export import export_onnx
from anchorline.runtime.canvas import frame_canvas
from anchorline.runtime.contract import NAMES_VARIABLE, ResizeRule
from anchorline.runtime.detections import Detections
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import AnchorlineError, ParityError
from anchorline.runtime.io.files import sha256_of
from anchorline.train.checkpoint import expected_shapes, load_checkpoint
from anchorline.train.model.faster_rcnn import run_task
from anchorline.train.predict import TorchDetector
from anchorline.verify.compare import compare_all
from anchorline.verify.verification import record_path

SMALLEST = "fasterrcnn_mobilenet_v3_large_320_fpn"
LARGE = ("fasterrcnn_mobilenet_v3_large_fpn", "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2")
DRAWING = Path(__file__).parents[2] / "benchmarks" / "drawn_weights.py"

Frame = NDArray[np.uint8]


class Source(NamedTuple):
    """torchvision's own detector, and a state dict of it on disk."""

    model: TorchvisionFasterRCNN
    path: Path


@pytest.fixture(scope="session")
def drawing() -> ModuleType:
    """The benchmarks' module that draws weights."""
    if not DRAWING.is_file():
        pytest.skip("benchmarks/ is not part of this copy of the tests")
    spec = importlib.util.spec_from_file_location("drawn_weights", DRAWING)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def frames() -> list[Frame]:
    """Generated scenes of several sizes; the first three are padded to one size by torchvision."""
    sizes = ((240, 320), (480, 640), (96, 128), (320, 240))
    return [generate_scene(11, size, index)[0] for index, size in enumerate(sizes)]


@pytest.fixture(scope="session")
def smallest(drawing: ModuleType, frames: list[Frame], tmp_path_factory: pytest.TempPathFactory) -> Source:
    return drawn(SMALLEST, drawing, frames, tmp_path_factory.mktemp("smallest"))


def drawn(name: str, drawing: ModuleType, frames: Sequence[Frame], folder: Path, **options: object) -> Source:
    """torchvision's model ``name`` with drawn weights, saved as its training reference saves it."""
    torch.manual_seed(0)
    builder = getattr(torchvision.models.detection, name)
    model = builder(weights=None, weights_backbone=None, **{"num_classes": 91, **options})
    drawing.draw_weights(model, frames, seed=0)
    path = folder / "checkpoint.pth"
    training = {"optimizer": {"step": 3}, "epoch": 1, "args": argparse.Namespace(lr=0.02, data="x")}
    torch.save({"model": model.state_dict(), **training}, path)
    return Source(model, path)


def check_same(expected: Sequence[Detections], found: Sequence[Detections], box: float, score: float) -> None:
    summary = compare_all(
        expected, found, box_tolerance_px=box, score_tolerance=score, nms_iou=0.5, max_detections=100
    )
    assert summary.agrees, summary.first_disagreement
    assert summary.total.matched >= 10 * len(expected), "too few detections to compare anything"
    excused = summary.total.borderline + summary.total.nms_ties
    assert excused <= 0.005 * summary.total.matched + 1


def check_import(
    source: Source,
    arch: str,
    frames: Sequence[Frame],
    folder: Path,
    score: float = 2e-5,
    **options: object,
) -> None:
    """Import ``source`` and compare in PyTorch, each frame by itself and all in one batch."""
    out = folder / "model.safetensors"
    options["verify"] = False
    contract = import_checkpoint(source.path, out, arch=arch, **options).contract  # type: ignore[arg-type]
    reference, ours = TorchvisionDetector(source.model, contract), TorchDetector.load(out)
    check_same([reference(f) for f in frames], [ours(f) for f in frames], box=0.02, score=score)
    check_same(reference.batch(frames), ours.batch(frames), box=0.02, score=score)


def test_what_is_torchvisions_is_published_with_its_record(smallest: Source, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    assert "matched" in import_checkpoint(smallest.path, out, arch=SMALLEST).verification
    record = json.loads(record_path(out).read_text(encoding="utf-8"))
    assert record["passed"] is True
    assert record["artefact"] == record["artefact"] | {"name": "model.safetensors", "sha256": sha256_of(out)}
    assert record["reference"]["provider"] == "torchvision"
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "model.safetensors.verify.json"]


def test_what_is_not_leaves_the_earlier_file_and_its_record(
    smallest: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = TorchvisionDetector.batch

    def shifted(self: TorchvisionDetector, frames: list[Frame]) -> list[Detections]:
        return [dataclasses.replace(each, boxes=each.boxes * 0.99) for each in batch(self, frames)]

    monkeypatch.setattr(TorchvisionDetector, "batch", shifted)
    out = tmp_path / "model.safetensors"
    before = {out: b"an earlier model", record_path(out): b"its record"}
    for path, content in before.items():
        path.write_bytes(content)
    told: list[str] = []
    with pytest.raises(ParityError, match="torchvision disagree in detections") as caught:
        import_checkpoint(smallest.path, out, arch=SMALLEST, warn=told.extend)
    assert str(caught.value).startswith(f"{out}: ")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert any("assumed" in line for line in told), "what may explain it is said before"
    result = import_checkpoint(smallest.path, out, arch=SMALLEST, verify=False)
    assert result.verification == "not verified"
    assert "--no-verify" in json.loads(record_path(out).read_text(encoding="utf-8"))["not_executed"]
    assert load_checkpoint(out)[1].names == result.contract.names


def check_in_double(source: Source, imported: Path, frame: Frame, patch: pytest.MonkeyPatch) -> None:
    """The same two networks on the same pixels in double precision: what remains is not rounding."""
    contract = TorchDetector.load(imported).contract
    ours = TorchDetector.load(imported)
    inputs, placements = ours.prepare([frame])
    height, width = placements[0].valid
    resized = inputs["images"][0, :height, :width]
    nms = torchvision.ops.nms
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    patch.setattr(torchvision.ops, "nms", lambda boxes, ranks, iou: nms(boxes, ranks.to(boxes.dtype), iou))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            rgb = torch.from_numpy(np.ascontiguousarray(resized[:, :, ::-1])).permute(2, 0, 1).double() / 255
            expected = source.model.double()([rgb])[0]
            tensors = [torch.from_numpy(inputs[name]).double() for name in contract.inputs]
            found = run_task(ours.model.double(), "detections", *tensors)
    finally:
        torch.set_default_dtype(torch.float32)
        patch.undo()
    count = int(found["num_detections"][0])
    sides = [
        Detections(boxes.float().numpy(), scores.float().numpy(), labels.long().numpy(), contract.names)
        for boxes, scores, labels in (
            (expected["boxes"], expected["scores"], expected["labels"] - 1),
            (found["boxes"][0, :count], found["scores"][0, :count], found["labels"][0, :count]),
        )
    ]
    check_same(sides[:1], sides[1:], box=1e-3, score=5e-6)


def test_detections_are_torchvisions(smallest: Source, frames: list[Frame], tmp_path: Path) -> None:
    check_import(smallest, SMALLEST, frames, tmp_path)


@pytest.mark.slow
def test_detections_through_onnxruntime_are_torchvisions(
    smallest: Source, frames: list[Frame], tmp_path: Path
) -> None:
    """One file for all frames, also held to the canvas that the rule gives those of a camera.

    tests/export/test_any_frame_size.py does the same with a small model of ours.
    """
    imported, onnx = tmp_path / "model.safetensors", tmp_path / "model.onnx"
    import_checkpoint(smallest.path, imported, arch=SMALLEST, verify=False)
    contract = export_onnx(imported, onnx, verify=False).contract
    assert (contract.canvas, contract.input_dtype) == (None, "float32")
    assert frame_canvas((240, 320), contract) == (320, 448)
    expected = TorchvisionDetector(smallest.model, contract).batch(frames[:3])
    for canvas in (None, (320, 448)):
        with Detector(onnx, provider="cpu", canvas=canvas) as detector:
            check_same(expected, detector.batch(frames[:3]), box=0.05, score=1e-4)


def test_a_model_held_to_a_canvas_is_not_compared(smallest: Source, tmp_path: Path) -> None:
    imported = tmp_path / "model.safetensors"
    result = import_checkpoint(smallest.path, imported, arch=SMALLEST, canvas=(64, 64))
    assert "torchvision scales no frame to fit a canvas" in result.verification


@pytest.mark.slow
@pytest.mark.parametrize("arch", LARGE)
def test_detections_of_the_large_models_are_torchvisions(
    drawing: ModuleType, frames: list[Frame], tmp_path: Path, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In single precision deep networks of drawn weights enlarge rounding to more than 2e-5 in a score now
    and then, as torchvision's does against itself in another memory layout; so double precision decides.
    """
    source = drawn(arch, drawing, frames, tmp_path)
    check_import(source, arch, frames, tmp_path, score=2e-4)
    check_in_double(source, tmp_path / "model.safetensors", frames[0], monkeypatch)


@pytest.mark.parametrize("live", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_users_resnet_with_settings_of_its_own(
    drawing: ModuleType, frames: list[Frame], tmp_path: Path, live: bool
) -> None:
    """Another ResNet, another number of classes, other anchors, sizes and thresholds."""
    detection = torchvision.models.detection
    norm = torch.nn.BatchNorm2d if live else torchvision.ops.FrozenBatchNorm2d
    sizes, ratios = ((16, 24), (32, 48), (64, 96), (128, 192), (256, 384)), (0.7, 1.3)
    model = TorchvisionFasterRCNN(
        detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=norm),
        num_classes=5,
        min_size=200,
        max_size=300,
        rpn_anchor_generator=detection.anchor_utils.AnchorGenerator(sizes, (ratios,) * 5),
        rpn_post_nms_top_n_test=200,
        box_score_thresh=0.15,
    )
    drawing.draw_weights(model, frames[:2], seed=0)
    path, classes = tmp_path / "checkpoint.pth", tmp_path / "classes.json"
    torch.save(model.state_dict(), path)
    classes.write_text(json.dumps(["__background__", "a", "b", "c", "d"]), encoding="utf-8")
    check_import(
        Source(model, path),
        "fasterrcnn_resnet18_fpn",
        frames[:2],
        tmp_path,
        classes=classes,
        resize=ResizeRule(200, 300),
        overrides=[
            f"anchor_sizes={[list(group) for group in sizes]}",
            f"aspect_ratios={list(ratios)}",
            "rpn_post_nms=200",
            "score_threshold=0.15",
        ],
    )


# From here on: a checkpoint of few bytes, with the smallest model's names.


@pytest.fixture(scope="session")
def state() -> dict[str, Tensor]:
    """A state dict for three classes with a narrow pyramid and head."""
    import dataclasses

    narrow = dataclasses.replace(ARCHITECTURES[SMALLEST].settings, fpn_channels=4, representation=8)
    torch.manual_seed(2)
    return {
        name: torch.rand(shape)
        for name, shape in expected_shapes(narrow, 3).items()
        if not name.endswith("num_batches_tracked")
    }


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    path = tmp_path / "classes.txt"
    path.write_text("\ufeffcat\r\ndog\n\nbird\n", encoding="utf-8")
    return path


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of before torchvision 0.13."""
    renamed = {}
    for name, tensor in state.items():
        name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        for block in ("inner_blocks", "layer_blocks"):
            for level in "01":
                name = name.replace(f"fpn.{block}.{level}.0.", f"fpn.{block}.{level}.")
        renamed[name] = tensor
    return renamed


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


FORMS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "state dict": lambda s: s,
    "training checkpoint": lambda s: {"model": s, "epoch": 2, "args": argparse.Namespace(a=1)},
    "lightning": lambda s: {"state_dict": prefixed(s, "model.")},
    "data parallel": lambda s: prefixed(s, "module."),
    "old names": old_names,
    "double": lambda s: {name: tensor.double() for name, tensor in s.items()},
    "transposed in memory": lambda s: {
        name: tensor.transpose(0, -1).contiguous().transpose(0, -1) for name, tensor in s.items()
    },
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "an average": lambda s: {"model": {n: t + 1 for n, t in s.items()}, "ema": prefixed(s, "module.")},
    "step counters": lambda s: {**s, "backbone.body.0.1.num_batches_tracked": torch.tensor(7)},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".pth", ".old.pth", ".safetensors"])
def test_every_form_of_a_checkpoint_gives_the_same_tensors(
    state: dict[str, Tensor], classes: Path, tmp_path: Path, form: str, suffix: str
) -> None:
    content, path = FORMS[form](state), tmp_path / f"checkpoint{suffix}"
    if suffix == ".safetensors":
        if form in ("training checkpoint", "lightning", "an average"):
            pytest.skip("safetensors holds tensors only")
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)  # type: ignore[attr-defined]
    else:
        torch.save(content, path, _use_new_zipfile_serialization=suffix == ".pth")
    out = tmp_path / "model.safetensors"
    result = import_checkpoint(path, out, arch=SMALLEST, classes=classes, verify=False)
    saved = load_file(out)
    for name, tensor in state.items():
        assert torch.equal(saved[name], tensor), name
    assert result.contract.names == ("cat", "dog", "bird")
    assert result.contract.category_ids is None
    assert load_checkpoint(out)[1] == result.contract


def test_the_contract_says_what_the_model_is(state: dict[str, Tensor], classes: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save(state, path)
    out = tmp_path / "model.safetensors"
    contract = import_checkpoint(path, out, arch=SMALLEST, classes=classes).contract
    assert contract.profile == "torchvision"
    assert contract.resize == ResizeRule(320, 640)
    assert (contract.canvas, contract.resize.within) == (None, None)
    assert contract.input_dtype == "float32"
    assert contract.thresholds.max_proposals == 150
    assert contract.source["imported_from"] == "checkpoint.pth"
    assert contract.source["arch"] == SMALLEST
    assert len(contract.source["sha256"]) == 64
    (assumed,) = import_checkpoint(
        path, out, arch=SMALLEST, classes=classes, overrides=["nms_iou=0.4"]
    ).warnings
    start = f"the checkpoint holds no settings: assumed {SMALLEST}'s usual --resize 320x640, anchor_sizes="
    assert assumed.startswith(start)
    assert assumed.endswith("with others every box is wrong: give those with --set NAME=VALUE")
    assert "rpn_post_nms=150" in assumed
    assert "nms_iou=0.4" not in assumed
    fast = import_checkpoint(path, out, arch=SMALLEST, classes=classes, fast_resize=True, canvas=(96, 64))
    assert fast.contract.input_dtype == "uint8"
    assert fast.contract.resize.within == load_checkpoint(out)[0].settings.canvas == (96, 64)


def test_cocos_classes_keep_torchvisions_labels() -> None:
    names = coco_90().names
    assert len(names) == len(set(names)) == 90
    assert (names[0], names[11], names[12], names[89]) == ("person", "N/A 12", "stop sign", "toothbrush")
    assert sum(name.startswith("N/A") for name in names) == 10


def test_batch_norm_eps_is_0_for_the_official_weights_only(
    state: dict[str, Tensor], classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "checkpoint.pth", tmp_path / "model.safetensors"
    torch.save(state, path)

    def eps(path: Path = path, **options: float) -> float:
        result = import_checkpoint(path, out, arch=SMALLEST, classes=classes, verify=False, **options)  # type: ignore[arg-type]
        first = load_checkpoint(out)[0].backbone.body.get_submodule("0.1")
        assert first.eps == result.settings.backbone_norm_eps
        return result.settings.backbone_norm_eps

    assert eps() == 1e-5
    assert eps(batch_norm_eps=1e-3) == 1e-3
    named = tmp_path / "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth"
    named.write_bytes(path.read_bytes())
    assert eps(named) == 0
    assert eps(named, batch_norm_eps=1e-5) == 1e-5
    result = import_checkpoint(path, out, arch=SMALLEST, classes=classes, verify=False)
    sha256 = result.contract.source["sha256"]
    monkeypatch.setattr(importer, "_EPS_0_SHA256", sha256[:8])
    assert eps() == 0


def refusal(path: str | Path, out: Path, **options: object) -> str:
    """The one line that refuses a checkpoint; nothing is written."""
    with pytest.raises(AnchorlineError) as caught:
        import_checkpoint(path, out, **{"arch": SMALLEST, **options})  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 700
    assert not out.exists()
    return text


def without(state: dict[str, Tensor], *parts: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not any(part in name for part in parts)}


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], tuple[str, ...]]] = {
    "missing": (lambda s: without(s, "rpn.head.bbox_pred"), ("2 missing (rpn.head.bbox_pred.bias, rpn",)),
    "unknown": (lambda s: {**s, "extra.weight": torch.zeros(1)}, ("1 unknown (extra.weight)",)),
    "another shape": (
        lambda s: {**s, "rpn.head.bbox_pred.bias": torch.zeros(7)},
        ("1 of another shape (rpn.head.bbox_pred.bias is [7], expected [60])",),
    ),
    "mask": (lambda s: {**s, "roi_heads.mask_head.0.0.weight": torch.zeros(1)}, ("a Mask R-CNN",)),
    "keypoints": (lambda s: {**s, "roi_heads.keypoint_head.0.weight": torch.zeros(1)}, ("a Keypoint R-CNN",)),
    "retina": (
        lambda s: {**without(s, "rpn", "roi"), "head.classification_head.conv.weight": torch.zeros(1)},
        ("a RetinaNet",),
    ),
    "classifier": (
        lambda s: {"fc.weight": torch.zeros(9, 9), "fc.bias": torch.zeros(9)},
        ("the weights of a classifier",),
    ),
    "anchors": (
        lambda s: {
            **s,
            "rpn.head.cls_logits.weight": torch.zeros(9, 4, 1, 1),
            "rpn.head.cls_logits.bias": torch.zeros(9),
            "rpn.head.bbox_pred.weight": torch.zeros(36, 4, 1, 1),
            "rpn.head.bbox_pred.bias": torch.zeros(36),
        },
        (
            "predicts 9 anchors at each place",
            '--set "anchor_sizes=[[32, 40, 51], [32, 40, 51], [32, 40, 51]]" --set "aspect_ratios=[0.5, 1, 2',
        ),
    ),
    "NaN": (
        lambda s: {**s, "rpn.head.cls_logits.bias": torch.full((15,), float("nan"))},
        ("checkpoint.pth: tensor 'rpn.head.cls_logits.bias' holds values", "the training diverged"),
    ),
    **{
        f"weights of {kind}": (
            lambda s, kind=kind: {**s, "rpn.head.cls_logits.bias": torch.zeros(15).to(getattr(torch, kind))},
            (f"tensor 'rpn.head.cls_logits.bias' is of {kind}; expected floating point of 16 to 64 bits",),
        )
        for kind in ("int8", "bool", "float8_e4m3fn", "complex64")
    },
    "variances": (
        lambda s: {**s, "backbone.body.0.1.running_var": torch.full((16,), -0.5)},
        ("tensor 'backbone.body.0.1.running_var' holds variances below 0",),
    ),
    "no tensors": (
        lambda s: {"model": "resnet", "epoch": 3},
        ("holds no state dict", "model (str), epoch (int)"),
    ),
    "a list": (lambda s: [1, 2], ("holds a list",)),
    "scalar classifier": (
        lambda s: {**s, "roi_heads.box_predictor.cls_score.weight": torch.tensor(1.0)},
        ("of another shape",),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    state: dict[str, Tensor], classes: Path, tmp_path: Path, fault: str
) -> None:
    change, expected = FAULTS[fault]
    path = tmp_path / "checkpoint.pth"
    torch.save(change(state), path)
    text = refusal(path, tmp_path / "out.safetensors", classes=classes)
    for part in expected:
        assert part in text


def test_the_wrong_architecture_is_answered_with_the_right_one(
    state: dict[str, Tensor], classes: Path, tmp_path: Path
) -> None:
    path, out = tmp_path / "checkpoint.pth", tmp_path / "out.safetensors"
    torch.save(state, path)
    text = refusal(path, out, classes=classes, arch="fasterrcnn_resnet50_fpn")
    assert "give --arch fasterrcnn_mobilenet_v3_large_fpn" in text
    name = "rpn.head.cls_logits.bias"
    torch.save({**state, name: torch.full_like(state[name], float("nan"))}, path)
    assert text == refusal(path, out, classes=classes, arch="fasterrcnn_resnet50_fpn")
    assert "give --arch" not in refusal(path, out, classes=classes)
    torch.save(state, path)
    assert "expected for torchvision fasterrcnn_mobilenet" in refusal(path, out, arch="yolo")
    assert "give --arch" in refusal(path, out, arch=None)


class Runs:
    """An object whose unpickling would run a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def test_a_pickle_that_would_run_code_is_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    path, witness = tmp_path / "checkpoint.pth", tmp_path / "witness"
    for content in (Runs(f"touch {witness}"), {"model": state, "x": Runs(f"touch {witness}")}):
        for modern in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=modern)
            text = refusal(path, tmp_path / "out.safetensors")
            assert "could run code; refused" in text
            assert "system" in text
    assert not witness.exists()


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save(torch.nn.Linear(2, 2), path)
    assert "torch.save(model.state_dict(), path)" in refusal(path, tmp_path / "out.safetensors")


@pytest.mark.parametrize("share", [0.0, 1e-5, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("suffix", [".pth", ".old.pth", ".safetensors"])
def test_a_file_that_was_cut_short_is_refused(
    state: dict[str, Tensor], tmp_path: Path, suffix: str, share: float
) -> None:
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"checkpoint{suffix}"
    if suffix == ".safetensors":
        save_file(state, whole)
    else:
        torch.save(state, whole, _use_new_zipfile_serialization=suffix == ".pth")
    content = whole.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    text = refusal(path, tmp_path / "out.safetensors")
    assert str(path) in text
    assert ("the file is empty" in text) == (share == 0)


def claims(kind: str, path: Path) -> None:
    """A small file at ``path`` that says it holds 10 GB or more."""
    huge = {"a": {"dtype": "F32", "shape": [2_500_000_000], "data_offsets": [0, 10_000_000_000]}}
    header = json.dumps(huge).encode()
    if kind == "header":
        path.write_bytes(struct.pack("<Q", 10_000_000_000) + b"{" + b"x" * 100)
    elif kind == "tensor":
        path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    else:
        torch.save({"a": torch.zeros(1).expand(2_500_000_000)}, path)


@pytest.mark.parametrize("kind", ["header", "tensor", "stride 0"])
def test_a_claim_of_10_gb_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "checkpoint.bin"
    claims(kind, path)
    text = refusal(path, tmp_path / "out.safetensors")
    assert "hostile" in text


@pytest.mark.parametrize("content", [b"not a checkpoint", b"\x80\x02}q\x00.", b"PK\x03\x04", b"\0" * 4096])
def test_files_of_other_kinds_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(content)
    assert str(path) in refusal(path, tmp_path / "out.safetensors")


def test_missing_files_and_unknown_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.safetensors"
    assert "no such file" in refusal(tmp_path / "absent.pth", out)
    assert "is a folder" in refusal(tmp_path, out)
    os.mkfifo(tmp_path / "pipe.pth")
    assert "is a pipe, expected a file" in refusal(tmp_path / "pipe.pth", out)
    assert "not weights of a Faster R-CNN" in refusal("ResNet50_Weights.IMAGENET1K_V1", out, arch=None)
    name = "FasterRCNN_ResNet50_FPN_Weights.COCO_V1"
    assert "leave --arch out" in refusal(name, out)
    assert "torchvision writes no configuration that is" in refusal(
        name, out, arch=None, config=tmp_path / "c"
    )
    assert "--weights is 'ema'; FasterRCNN_" in refusal(name, out, arch=None, weights="ema")
    assert "not the name of torchvision weights" in refusal(name + "0", out, arch=None)

    def no_network(*_: object, **__: object) -> None:
        raise OSError("<urlopen error no route>")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    assert "cannot be downloaded" in refusal(name, out, arch=None)


def test_weights_by_name_know_their_architecture(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    name = "FasterRCNN_MobileNet_V3_Large_320_FPN_Weights.COCO_V1"
    classes = tmp_path / "classes.txt"
    classes.write_text("a\nb\nc", encoding="utf-8")
    result = import_checkpoint(name, tmp_path / "out.safetensors", classes=classes)
    assert result.contract.source["arch"] == SMALLEST
    assert result.contract.source["imported_from"] == name


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "3 classes with --classes A,B,... or --classes-file FILE"),
        ("a\nb", "names 2 classes (a, b)"),
        ("a\nb\nc\nd", "names 4 classes"),
        ("a\nb\na", "each once"),
        ("", "expected class names"),
        ("[1, 2, 3]", "expected class names"),
        ('["a", "b"', "cannot be read as class names"),
        ("[" * 100_000, "cannot be read as class names"),
    ],
)
def test_class_names_have_to_fit(
    state: dict[str, Tensor], tmp_path: Path, content: str | None, part: str
) -> None:
    path, names = tmp_path / "checkpoint.pth", tmp_path / "names.txt"
    torch.save(state, path)
    if content is not None:
        names.write_text(content, encoding="utf-8")
    out = tmp_path / "out.safetensors"
    assert part in refusal(path, out, classes=None if content is None else names)


def test_more_classes_than_are_usual_are_asked_about(
    state: dict[str, Tensor], classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "checkpoint.pth", tmp_path / "out.safetensors"
    torch.save(state, path)
    monkeypatch.setenv(NAMES_VARIABLE, "2")
    text = refusal(path, out, classes=classes)
    assert "has 3 classes; expected at most 2 (the environment variable ANCHORLINE_MOST_CLASSES sets" in text
    monkeypatch.setenv(NAMES_VARIABLE, "3")
    assert (
        import_checkpoint(path, out, arch=SMALLEST, classes=classes, verify=False).contract.names[2] == "bird"
    )


def test_settings_that_cannot_be_are_refused(state: dict[str, Tensor], classes: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "checkpoint.pth", tmp_path / "out.safetensors"
    torch.save(state, path)
    assert "not a setting" in refusal(path, out, classes=classes, overrides=["model.nonsense=1"])
    assert "of the model" in refusal(path, out, classes=classes, overrides=["training.epochs=1"])
    assert "multiples of 32" in refusal(path, out, classes=classes, canvas=(100, 100))
    assert "shorter and a longer" in refusal(path, out, classes=classes, resize=ResizeRule(800, 320))
    assert "eps" in refusal(path, out, classes=classes, batch_norm_eps=-1.0)
    assert "ends in .safetensors" in refusal(path, tmp_path / "out.onnx", classes=classes)
