"""The verb verify: two files in, a verdict, an exit code and a record out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from anchorline.artefacts import _open_both
from anchorline.cli import main
from anchorline.data.synthetic import CLASS_NAMES, generate_scene, scenes
from anchorline.export import onnx_export as exporting
from anchorline.runtime.contract import CONTRACT_KEY, Contract
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import OutputError, SettingsError
from anchorline.train.checkpoint import contract_of, save_checkpoint
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.verify import verify
from anchorline.verify.verification import record_path, verify_subjects

TRAPS = 13


@pytest.fixture(scope="module")
def artefacts(
    model_without_ties: FasterRCNN,
    onnx_of: Callable[[FasterRCNN, Contract], onnx.ModelProto],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path, Path]:
    """A checkpoint, its ONNX file, and one with a fault: a class score that is off."""
    folder = tmp_path_factory.mktemp("artefacts")
    model = model_without_ties
    contract = contract_of(model.settings, CLASS_NAMES, source={"command": "test"})
    checkpoint, sound, faulty = (folder / name for name in ("model.safetensors", "sound.onnx", "faulty.onnx"))
    save_checkpoint(checkpoint, model.state_dict(), model.settings, contract)
    proto = onnx_of(model, contract)
    onnx.save(proto, sound)
    (bias,) = [t for t in proto.graph.initializer if t.name.endswith("cls_score.bias")]
    values = numpy_helper.to_array(bias).copy()
    values[1] += 0.5
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    onnx.save(proto, faulty)
    return checkpoint, sound, faulty


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    cv2.imwrite(str(path), generate_scene(3, (120, 200), 0)[0])
    return path


def test_two_that_agree(
    artefacts: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, sound, _ = artefacts
    figures = tmp_path / "verify.json"
    data = ["--data", "synthetic:2"]
    assert main(["verify", str(checkpoint), str(sound), *data, "--json", str(figures)]) == 0
    assert "the numbers held" in capsys.readouterr().out
    report = json.loads(figures.read_text(encoding="utf-8"))
    assert report["passed"] is True
    assert report["first_divergence"] is None
    assert [stage["passed"] for stage in report["stages"]] == [True] * 10
    assert report["detections"]["matched"] > 0
    assert report["detections"]["accuracy"]["mean"]["ap50"]["delta"] == pytest.approx(0.0, abs=1e-3)
    assert set(report["detections"]["accuracy"]) == {"mean", *CLASS_NAMES}
    assert len(report["traps"]) == TRAPS
    assert all(trap["passed"] for trap in report["traps"])

    record = json.loads(record_path(sound).read_text(encoding="utf-8"))
    assert record["artefact"]["sha256"] == hashlib.sha256(sound.read_bytes()).hexdigest()
    assert record["reference"]["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert record["passed"] is True
    assert record["date"].startswith("20")


def test_two_that_differ(
    artefacts: tuple[Path, Path, Path], picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is 1, the layer at fault is named, the images are shown side by side."""
    _, sound, faulty = artefacts
    worst = tmp_path / "worst.png"
    command = [
        "verify",
        str(sound),
        str(faulty),
        "--images",
        str(picture),
        "--bisect",
        "--pictures",
        str(worst),
    ]
    assert main(command) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "they differ; class_logits" in shown
    assert "roi_heads.box_predictor.cls_score" in shown
    assert cv2.imread(str(worst)).shape[1] > 300
    assert json.loads(record_path(faulty).read_text(encoding="utf-8"))["passed"] is False


def test_a_detector_equals_itself(artefacts: tuple[Path, Path, Path], picture: Path, tmp_path: Path) -> None:
    checkpoint = artefacts[0]
    worst = tmp_path / "worst.png"
    assert (
        main(["verify", str(checkpoint), str(checkpoint), "--images", str(picture), "--pictures", str(worst)])
        == 0
    )
    assert not worst.exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["missing.safetensors", "{sound}"], "missing.safetensors: no such file"),
        (["{sound}", "missing.onnx"], "missing.onnx: no such file"),
        (["{sound}", "{picture}"], "scene.png"),
        (["{sound}", "{sound}", "--data", "synthetic:2", "--images", "{picture}"], "expected one of them"),
        (["{sound}", "{sound}", "--images", "nowhere"], "nowhere: no such file or folder"),
        (["{sound}", "{sound}", "--data", "voc:nowhere@test"], "nowhere"),
        (["{sound}", "{sound}", "--pictures", "worst.jpg"], "expected a .png"),
    ],
)
def test_what_cannot_be_compared(
    artefacts: tuple[Path, Path, Path],
    picture: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    named: str,
) -> None:
    places = {"sound": artefacts[1], "picture": picture}
    assert main(["verify", *(argument.format(**places) for argument in arguments)]) == 2
    error = capsys.readouterr().err.strip()
    assert named in error
    assert len(error.splitlines()) == 1


def test_torchvision_as_the_reference_is_for_checkpoints(
    artefacts: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, sound, _ = artefacts
    assert main(["verify", str(sound), str(sound), "--reference", "torchvision"]) == 2
    assert "is for a model.safetensors" in capsys.readouterr().err


def test_a_checkpoint_takes_task_and_canvas_from_the_other_side_whichever_it_is(
    artefacts: tuple[Path, Path, Path],
    onnx_of: Callable[[FasterRCNN, Contract], onnx.ModelProto],
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = artefacts[0]
    out = tmp_path / "proposals.onnx"
    monkeypatch.setattr(exporting, "to_onnx", onnx_of)
    exporting.export_onnx(checkpoint, out, task="proposals", canvas=(96, 64), verify=False)
    for sides in ((out, checkpoint), (checkpoint, out)):
        report = verify(*sides, images=[str(picture)])
        assert report.passed, report.reason
        assert report.detections.summary.total.matched > 0
        record_path(sides[1]).unlink()
    assert main(["verify", str(artefacts[1]), str(out)]) == 2  # two ONNX files keep their tasks
    assert "expected one task" in capsys.readouterr().err


def test_a_free_file_is_opened_on_the_canvas_of_the_other_side(
    artefacts: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Whichever it is: padded to its own canvas it would differ in the preprocessing."""
    free, fixed = artefacts[1], tmp_path / "fixed.onnx"
    proto = onnx.load(free)
    sides = next(v for v in proto.graph.input if v.name == "images").type.tensor_type.shape.dim
    sides[1].dim_value, sides[2].dim_value = 96, 64
    (entry,) = [each for each in proto.metadata_props if each.key == CONTRACT_KEY]
    entry.value = dataclasses.replace(Contract.from_json(entry.value), canvas=(96, 64)).to_json()
    onnx.save(proto, fixed)
    for pair in ((fixed, free), (free, fixed)):
        reference, candidate = _open_both(*pair)
        with reference, candidate:
            report = verify_subjects(reference, candidate, scenes(CLASS_NAMES, 2), which_traps=())
        assert report.passed, report.reason
        assert report.detections.summary.total.matched > 0


def test_two_architectures_differ_and_nothing_breaks(
    artefacts: tuple[Path, Path, Path],
    small_model: Callable[..., FasterRCNN],
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stages of other shapes cannot be fed; what only one side has is said."""
    canvas = Detector(artefacts[1], "cpu").contract.resize.within
    model = small_model("fpn", len(CLASS_NAMES), canvas=canvas)
    checkpoint = tmp_path / "model.safetensors"
    save_checkpoint(checkpoint, model.state_dict(), model.settings, contract_of(model.settings, CLASS_NAMES))
    for other in artefacts[:2]:
        assert main(["verify", str(other), str(checkpoint), "--images", str(picture), "--bisect"]) == 1
        shown = " ".join(capsys.readouterr().out.split())
        assert "they differ; backbone: backbone.0 has the shape" in shown
        assert "only the candidate has fpn.0" in shown


def test_an_engine_is_not_vouched_for_by_its_onnx_file(
    artefacts: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = tmp_path / "model.engine"
    engine.write_bytes(b"an engine")
    assert main(["verify", str(artefacts[1]), str(engine), "--provider", "cpu"]) == 2
    assert "expected auto or tensorrt or tensorrt-rtx" in capsys.readouterr().err
    assert not record_path(engine).exists()


def test_the_provider_is_the_candidate_s(
    artefacts: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same provider on both sides a fault of it would be in both."""
    opened = []

    def note(path: Path, provider: str, canvas: object) -> SimpleNamespace:
        opened.append((path.name, provider))
        if path == artefacts[1]:
            raise SettingsError("seen enough")
        return SimpleNamespace(detector=SimpleNamespace(contract=None))

    monkeypatch.setattr("anchorline.artefacts.onnx_subject", note)
    with pytest.raises(SettingsError, match="seen enough"):
        verify(artefacts[1], artefacts[2], provider="cuda")
    assert opened == [("faulty.onnx", "cuda"), ("sound.onnx", "cpu")]


def test_a_record_that_cannot_be_written_takes_nothing_from_the_verdict(
    artefacts: tuple[Path, Path, Path], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OutputError("model.verify.json: cannot be written (read-only)")

    monkeypatch.setattr("anchorline.artefacts.write_record", refused)
    report = verify(artefacts[1], artefacts[1], images=[str(picture)])
    assert report.passed
    assert "not recorded: model.verify.json: cannot be written" in report.notes[0]


def test_a_video_is_sampled_over_its_whole_length(tmp_path: Path) -> None:
    from anchorline.data.dataset import VIDEO_FRAMES, images_or_video

    path = tmp_path / "long.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 25, (64, 48))
    for index in range(3 * VIDEO_FRAMES):
        writer.write(np.full((48, 64, 3), index, np.uint8))
    writer.release()
    dataset = images_or_video([path], ("object",))
    assert VIDEO_FRAMES // 2 <= len(dataset) <= VIDEO_FRAMES
    shades = [float(image.load().mean()) for image in dataset]
    assert shades == sorted(shades)
    assert shades[0] < 3
    assert shades[-1] > 2.7 * VIDEO_FRAMES
