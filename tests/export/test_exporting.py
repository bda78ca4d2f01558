"""Publishing an ONNX file: only what agrees with PyTorch, whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from anchorline.data.synthetic import CLASS_NAMES, scenes, synthetic_dataset
from anchorline.evaluation.evaluation import evaluate, evaluate_proposals
from anchorline.export import onnx_export as exporting
from anchorline.export.onnx_export import ExportResult, export_onnx
from anchorline.runtime.canvas import frame_canvas, place
from anchorline.runtime.contract import CONTRACT_KEY, Contract
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import (
    AnchorlineError,
    ArtefactError,
    FrameError,
    OutputError,
    ParityError,
    SettingsError,
)
from anchorline.runtime.model_file import DIGEST_KEY
from anchorline.train.checkpoint import contract_of, load_checkpoint, save_checkpoint
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.model.settings import ModelSettings
from anchorline.train.predict import TorchDetector
from anchorline.verify.stages import ORDER
from anchorline.verify.verification import record_path

CANVAS = (64, 96)
ToOnnx = Callable[[FasterRCNN, Contract], onnx.ModelProto]
SCORE_BIAS = "roi_heads.box_predictor.cls_score.bias"


class Exported(NamedTuple):
    """An untrained model on disk, and what exporting it gave."""

    checkpoint: Path
    result: ExportResult
    proto: onnx.ModelProto


@pytest.fixture(scope="module")
def exported(
    model_without_ties: FasterRCNN, onnx_of: ToOnnx, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    model = model_without_ties
    folder = tmp_path_factory.mktemp("exported")
    checkpoint = folder / "model.safetensors"
    contract = contract_of(model.settings, CLASS_NAMES, source={"command": "test"})
    save_checkpoint(checkpoint, model.state_dict(), model.settings, contract)
    made: list[onnx.ModelProto] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "to_onnx", _keeping(made, onnx_of))
        result = export_onnx(checkpoint, folder / "model.onnx")
    return Exported(checkpoint, result, made[0])


def _keeping(made: list[onnx.ModelProto], to_onnx: ToOnnx) -> ToOnnx:
    def keep(model: FasterRCNN, contract: Contract) -> onnx.ModelProto:
        made.append(to_onnx(model, contract))
        return made[-1]

    return keep


@pytest.fixture
def exporter_gives(monkeypatch: pytest.MonkeyPatch) -> Callable[[onnx.ModelProto], None]:
    """``exporter_gives(proto)``: the graph that ``export_onnx`` is about to write, at once."""
    return lambda proto: monkeypatch.setattr(exporting, "to_onnx", lambda model, contract: proto)


def copy_of(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy


def constants(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every constant of the main graph, initialiser or node."""
    yield from proto.graph.initializer
    for node in proto.graph.node:
        if node.op_type == "Constant":
            yield from (attribute.t for attribute in node.attribute if attribute.name == "value")


def change(tensor: onnx.TensorProto, value: NDArray[np.float32]) -> None:
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def one_convolution_5_percent_off(proto: onnx.ModelProto) -> None:
    tensor = next(t for t in proto.graph.initializer if list(t.dims)[2:] == [3, 3] and t.dims[1] > 1)
    change(tensor, numpy_helper.to_array(tensor) * np.float32(1.05))


def red_and_blue_swapped_in_the_mean(proto: onnx.ModelProto) -> None:
    mean = np.array(ModelSettings().mean, np.float32)
    (tensor,) = [t for t in constants(proto) if np.array_equal(numpy_helper.to_array(t).ravel(), mean)]
    change(tensor, np.ascontiguousarray(numpy_helper.to_array(tensor)[:, ::-1]))


def a_class_score_slightly_off(proto: onnx.ModelProto) -> None:
    (tensor,) = [t for t in proto.graph.initializer if t.name.endswith(SCORE_BIAS)]
    bias = numpy_helper.to_array(tensor).copy()
    bias[1] += 0.01
    change(tensor, bias)


def without_digest(model: onnx.ModelProto) -> onnx.ModelProto:
    (entry,) = (each for each in model.metadata_props if each.key == DIGEST_KEY)
    model.metadata_props.remove(entry)
    return model


def test_what_agrees_is_published(exported: Exported) -> None:
    result = exported.result
    report = result.verification
    assert report is not None
    assert report.passed
    assert [stage.name for stage in report.stages or ()] == [stage for stage in ORDER if stage != "fpn"]
    assert report.detections.summary.images == exporting.QUICK_SCENES
    assert report.detections.summary.total.matched > 300
    assert report.detections.summary.total.max_box_error < 0.05
    assert [trap.name for trap in report.traps] == list(exporting.QUICK_TRAPS)
    left = {path.name for path in result.path.parent.iterdir()}
    assert left == {"model.safetensors", "model.onnx", "model.onnx.verify.json"}
    assert without_digest(onnx.load(result.path)) == exported.proto


def test_the_file_carries_the_checkpoint_s_contract(exported: Exported) -> None:
    (entry,) = exported.proto.metadata_props
    assert entry.key == CONTRACT_KEY
    contract = Contract.from_json(entry.value)
    assert (contract.task, contract.names, contract.canvas) == ("detections", CLASS_NAMES, None)
    assert contract.resize.within == CANVAS
    assert contract.source["command"] == "test"
    assert contract.source["exported_by"].startswith("anchorline ")
    assert json.loads(exported.result.contract.to_json()) == json.loads(entry.value)


def test_the_record_beside_the_file_says_what_it_was_compared_with(exported: Exported) -> None:
    record = json.loads(record_path(exported.result.path).read_text(encoding="utf-8"))
    assert record["passed"] is True
    assert record["not_executed"] is None
    for side, path in (("artefact", exported.result.path), ("reference", exported.checkpoint)):
        assert record[side]["name"] == path.name
        assert record[side]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "plant", [one_convolution_5_percent_off, red_and_blue_swapped_in_the_mean, a_class_score_slightly_off]
)
def test_what_disagrees_is_not_published(
    exported: Exported,
    exporter_gives: Callable[[onnx.ModelProto], None],
    tmp_path: Path,
    plant: Callable[[onnx.ModelProto], None],
) -> None:
    wrong = copy_of(exported.proto)
    plant(wrong)
    assert wrong != exported.proto
    exporter_gives(wrong)
    out = tmp_path / "model.onnx"
    with pytest.raises(ParityError, match="disagree") as caught:
        export_onnx(exported.checkpoint, out)
    assert str(out) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_disagrees_does_not_touch_the_file_of_yesterday(
    exported: Exported, exporter_gives: Callable[[onnx.ModelProto], None], tmp_path: Path
) -> None:
    wrong = copy_of(exported.proto)
    a_class_score_slightly_off(wrong)
    exporter_gives(wrong)
    out = tmp_path / "model.onnx"
    out.write_bytes(b"the file of yesterday")
    with pytest.raises(ParityError):
        export_onnx(exported.checkpoint, out)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"the file of yesterday"]


def test_without_verification_it_is_published_all_the_same(
    exported: Exported, exporter_gives: Callable[[onnx.ModelProto], None], tmp_path: Path
) -> None:
    wrong = copy_of(exported.proto)
    a_class_score_slightly_off(wrong)
    exporter_gives(wrong)
    result = export_onnx(exported.checkpoint, tmp_path / "new" / "model.onnx", verify=False)
    assert result.verification is None
    record = json.loads(record_path(result.path).read_text(encoding="utf-8"))
    assert record["passed"] is None
    assert "--no-verify" in record["not_executed"]
    assert without_digest(onnx.load(result.path)) == wrong


def test_the_verification_looks_at_the_images_given(
    exported: Exported, exporter_gives: Callable[[onnx.ModelProto], None], tmp_path: Path
) -> None:
    exporter_gives(exported.proto)
    image = np.full((40, 30, 3), 90, np.uint8)
    result = export_onnx(exported.checkpoint, tmp_path / "model.onnx", images=[image])
    assert result.verification is not None
    assert result.verification.detections.summary.images == 1
    with pytest.raises(FrameError):
        export_onnx(exported.checkpoint, tmp_path / "other.onnx", images=[image.astype(np.float32)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.verify.json"]


def test_an_interrupted_verification_leaves_nothing(
    exported: Exported,
    exporter_gives: Callable[[onnx.ModelProto], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> None:
        assert len(list(tmp_path.iterdir())) == 1
        raise KeyboardInterrupt

    exporter_gives(exported.proto)
    monkeypatch.setattr(exporting, "verify_with_pytorch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(exported.checkpoint, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes; more fails as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing(
    exported: Exported, exporter_gives: Callable[[onnx.ModelProto], None], tmp_path: Path
) -> None:
    exporter_gives(exported.proto)
    with room_for(10_000), pytest.raises(OutputError, match="cannot be written"):
        export_onnx(exported.checkpoint, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("out", "options", "kind", "named"),
    [
        ("model.onnx", {"task": "masks"}, SettingsError, "'masks'"),
        ("model.onnx", {"max_batch": 0}, SettingsError, "max batch is 0"),
        ("model.onnx", {"canvas": (100, 96.5)}, SettingsError, "(100, 96.5)"),
        ("model.onnx", {"canvas": (0, 0)}, SettingsError, "multiples of 1"),
        ("model.safetensors", {}, SettingsError, ".onnx"),
        ("model", {"verify": False}, SettingsError, ".onnx"),
    ],
)
def test_what_cannot_be_asked_for(
    exported: Exported,
    tmp_path: Path,
    out: str,
    options: dict[str, object],
    kind: type[AnchorlineError],
    named: str,
) -> None:
    with pytest.raises(kind) as caught:
        export_onnx(exported.checkpoint, tmp_path / out, **options)  # type: ignore[arg-type]
    assert named in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_cannot_be_read(exported: Exported, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(exported.checkpoint.read_bytes()[:-100])
    for path in (cut, tmp_path / "missing.safetensors"):
        with pytest.raises(ArtefactError, match=path.name):
            export_onnx(path, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["cut.safetensors"]


def test_a_model_that_finds_nothing_agrees(
    exported: Exported, exporter_gives: Callable[[onnx.ModelProto], None], tmp_path: Path
) -> None:
    """Background everywhere, as after very little training: no detection, no error on the way."""
    model, contract = load_checkpoint(exported.checkpoint)
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias[0] += 1000.0
    checkpoint = tmp_path / "nothing.safetensors"
    save_checkpoint(checkpoint, model.state_dict(), model.settings, contract)
    proto = copy_of(exported.proto)
    (tensor,) = [t for t in proto.graph.initializer if t.name.endswith(SCORE_BIAS)]
    change(tensor, model.state_dict()[SCORE_BIAS].numpy())
    exporter_gives(proto)
    result = export_onnx(checkpoint, tmp_path / "nothing.onnx")
    assert result.verification is not None
    assert result.verification.passed
    assert result.verification.detections.summary.total.matched == 0

    data = synthetic_dataset(2, size=CANVAS)
    with Detector(result.path) as detector:
        for detect in (detector.batch, TorchDetector.load(checkpoint).batch):
            report = evaluate(detect, data, batch=2, provider="cpu")
            assert report.map50 == 0.0
            json.dumps(report.to_json(), allow_nan=False)


def test_checkpoint_and_onnx_evaluate_alike(exported: Exported) -> None:
    data = synthetic_dataset(4, seed=5, size=(96, 128))
    reference = evaluate(TorchDetector.load(exported.checkpoint).batch, data, batch=3, provider="pytorch")
    with Detector(exported.result.path) as detector:
        found = evaluate(detector.batch, data, batch=2, provider=detector.provider)
    for figure in ("map50", "voc07", "map"):
        assert getattr(found, figure) == pytest.approx(getattr(reference, figure), abs=0.002)
    for name, each in reference.per_class.items():
        assert found.per_class[name].ap50 == pytest.approx(each.ap50, abs=0.002)


@pytest.fixture(scope="module")
def proposing(exported: Exported, onnx_of: ToOnnx, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The RPN of the same model on a canvas of its own, for batches of at most two."""
    out = tmp_path_factory.mktemp("proposing") / "proposals.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "to_onnx", onnx_of)
        export_onnx(exported.checkpoint, out, task="proposals", canvas=(96, 64), max_batch=2)
    return out


def test_another_canvas(proposing: Path) -> None:
    with Detector(proposing) as detector:
        assert detector.contract.canvas == (96, 64)
        frame = np.zeros((192, 64, 3), np.uint8)
        assert detector(frame).boxes[:, 3].max() > 96  # in the frame's pixels, not the canvas's


def test_batches_are_no_larger_than_asked_for(proposing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [image.load() for image in scenes(("object",), 5)]
    with Detector(proposing) as detector:
        alone = [detector(image) for image in images]
        seen: list[int] = []
        infer = detector._backend.infer

        def counting(inputs: dict[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
            seen.append(len(inputs["images"]))
            return infer(inputs)

        monkeypatch.setattr(detector._backend, "infer", counting)
        together = detector.batch(images)
    assert seen == [2, 2, 1]
    for one, other in zip(alone, together, strict=True):
        assert len(one) == len(other) > 0
        assert np.abs(np.sort(one.scores) - np.sort(other.scores)).max() < 1e-4


def test_proposals_evaluate_alike(exported: Exported, proposing: Path) -> None:
    data = synthetic_dataset(4, seed=5, size=(144, 96))
    with Detector(proposing) as detector:
        found = evaluate_proposals(detector.batch, data, batch=3)
        model, _ = load_checkpoint(exported.checkpoint)
        reference = evaluate_proposals(TorchDetector(model, detector.contract).batch, data, batch=1)
    assert found.recall[50][0.5] > 0
    assert found.objects == reference.objects > 0
    for count, recall in reference.recall.items():
        assert found.recall[count] == pytest.approx(recall, abs=0.002)
    assert found.ar == pytest.approx(reference.ar, abs=0.002)


@pytest.mark.parametrize(
    ("frame_size", "canvas"),
    [
        ((1080, 1920), (288, 512)),
        ((480, 640), (384, 512)),
        ((1920, 1080), (384, 224)),
        ((10, 4000), (32, 512)),
    ],
)
def test_a_frame_canvas_holds_the_frame_at_its_scale(
    frame_size: tuple[int, int], canvas: tuple[int, int]
) -> None:
    contract = Contract("detections", ("a",), (384, 512), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert frame_canvas(frame_size, contract) == canvas
    whole = place(frame_size, contract.canvas, contract.resize)
    assert place(frame_size, canvas, contract.resize).valid == whole.valid


def test_a_frame_size_fixes_the_canvas_that_its_frames_fill(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):
        pass

    def asked(model: FasterRCNN, contract: Contract) -> None:
        raise Asked(contract.canvas)

    monkeypatch.setattr(exporting, "to_onnx", asked)
    expected = frame_canvas((30, 900), exported.result.contract)
    assert expected[0] < expected[1]
    with pytest.raises(Asked, match=re.escape(str(expected))):
        exporting.export_onnx(exported.checkpoint, tmp_path / "m.onnx", frame_size=(30, 900))


def test_a_canvas_and_a_frame_size_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="expected one"):
        exporting.export_onnx(tmp_path / "a", tmp_path / "b.onnx", canvas=(32, 32), frame_size=(32, 32))


def test_an_export_silences_the_exporters_loggers_alone(caplog: pytest.LogCaptureFixture) -> None:
    with exporting._quiet_exporter():
        logging.getLogger("torch.onnx").warning("not heard")
        logging.getLogger("user").warning("heard")
    logging.getLogger("torch.onnx").warning("heard again")
    assert caplog.messages == ["heard", "heard again"]
