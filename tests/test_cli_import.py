"""``anchorline import`` as a command: a user's checkpoint to a detector, and its wrong turns in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from anchorline import cli

SMALLEST = "fasterrcnn_mobilenet_v3_large_320_fpn"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict of torchvision's smallest model for two classes, with a narrow pyramid and head."""
    import dataclasses

    import torch

    from anchorline.export.importers.torchvision import ARCHITECTURES
    from anchorline.train.checkpoint import expected_shapes

    narrow = dataclasses.replace(ARCHITECTURES[SMALLEST].settings, fpn_channels=4, representation=8)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("import") / "checkpoint.pth"
    torch.save({"model": {n: torch.rand(s) for n, s in expected_shapes(narrow, 2).items()}}, path)
    return path


def test_a_checkpoint_becomes_a_model(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from anchorline.train.checkpoint import read_header

    classes, out = tmp_path / "classes.txt", tmp_path / "model.safetensors"
    classes.write_text("cat\ndog\n", encoding="utf-8")
    options = ["--classes-file", str(classes), "--canvas", "64x96", "--resize", "60x96", "--fast-resize"]
    options += [
        "--batch-norm-eps",
        "0.001",
        "--set",
        "score_threshold=0.2",
        "--set",
        "model.max_detections=7",
    ]
    assert cli.main(["import", str(checkpoint), "--arch", SMALLEST, "--out", str(out), *options]) == 0
    line = f"{out}: {SMALLEST}, 2 classes, any frame size, batch-norm eps 0.001, not verified: the fast"
    assert capsys.readouterr().out.startswith(line)
    settings, contract = read_header(out)
    assert settings.backbone_norm_eps == 1e-3
    assert contract.names == ("cat", "dog")
    assert contract.resize.within == settings.canvas == (64, 96)
    assert (contract.resize.shorter_side, contract.resize.longer_side) == (60, 96)
    assert contract.input_dtype == "uint8"
    assert (contract.thresholds.score, contract.thresholds.max_detections) == (0.2, 7)


def test_one_of_several_weights_is_named_or_chosen(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file

    both, out = tmp_path / "both.pth", tmp_path / "model.safetensors"
    state = torch.load(checkpoint, weights_only=True)["model"]
    torch.save({"model": state, "model_ema": {name: tensor * 2 for name, tensor in state.items()}}, both)
    arguments = [
        "import",
        str(both),
        "--arch",
        SMALLEST,
        "--out",
        str(out),
        "--classes",
        "a,b",
        "--no-verify",
    ]
    name = "rpn.head.cls_logits.bias"
    assert cli.main(arguments) == 0
    assert "the weights are those under 'model_ema', the averaged ones" in capsys.readouterr().err
    assert torch.equal(load_file(out)[name], state[name] * 2)
    assert cli.main([*arguments, "--weights", "model"]) == 0
    assert "the weights are" not in capsys.readouterr().err
    assert torch.equal(load_file(out)[name], state[name])
    assert cli.main([*arguments, "--weights", "net"]) == 2
    assert "--weights is 'net'; expected one of model, model_ema" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "give --arch"),
        (["--arch", "resnet50"], "arch is 'resnet50'"),
        (["--arch", SMALLEST], "name its 2 classes with --classes A,B,... or --classes-file FILE"),
        (["--arch", "fasterrcnn_resnet18_fpn"], "looks like fasterrcnn_mobilenet_v3_large_fpn"),
        (["--arch", SMALLEST, "--canvas", "64"], "--canvas is '64'"),
        (["--arch", SMALLEST, "--canvas", "65x64"], "multiples of 32"),
        (["--arch", SMALLEST, "--resize", "800"], "--resize is '800'"),
        (["--arch", SMALLEST, "--resize", "0x0"], "expected null or a positive number"),
        (["--arch", SMALLEST, "--set", "nonsense=1"], "nonsense is not a setting"),
    ],
)
def test_wrong_turns_end_in_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    out = tmp_path / "model.safetensors"
    assert cli.main(["import", str(checkpoint), "--out", str(out), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("anchorline: ")
    assert captured.err.count("\n") == 1
    assert part in captured.err
    assert not out.exists()


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of Detectron2's zoo for two classes, with a narrow pyramid and head, in half precision."""
    import dataclasses
    import pickle

    import numpy as np

    from anchorline.export.importers.detectron2 import ARCHITECTURES, LIBRARY
    from anchorline.train.checkpoint import expected_shapes

    narrow = dataclasses.replace(
        ARCHITECTURES["detectron2_r50_fpn"].settings, fpn_channels=4, representation=8
    )
    arrays = {}
    for name, shape in expected_shapes(narrow, 2).items():
        rows = (8, *shape[1:]) if "box_predictor.bbox_pred" in name else shape  # none for the background
        arrays[LIBRARY.their_name(name, narrow)] = np.full(rows, 0.01, np.float16)
    path = tmp_path_factory.mktemp("foreign") / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    return path


def test_a_model_of_another_library_says_what_it_was_taken_for(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    classes, out = tmp_path / "classes.txt", tmp_path / "model.safetensors"
    classes.write_text("cat\ndog\n", encoding="utf-8")
    arguments = [
        "import",
        str(foreign),
        "--out",
        str(out),
        "--classes-file",
        str(classes),
        "--canvas",
        "64x96",
    ]
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    assert "the checkpoint is Detectron2's, taken as detectron2_r50_fpn" in captured.err
    assert captured.out == (
        f"{out}: detectron2_r50_fpn, 2 classes, any frame size, batch-norm eps 1e-05, not verified: there is "
        "no Detectron2 here to compare with (docs/import.md)\n"
    )
    record = json.loads(Path(f"{out}.verify.json").read_text(encoding="utf-8"))
    assert "Detectron2" in json.dumps(record)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"\x80\x04cos\nsystem\n(X\x05\x00\x00\x00touchtR.", "could run code"),
        (b"\x80\x04}", "cut short"),
        (b"\x80\x04}.", "holds no state dict"),
        (b"", "the file is empty"),
    ],
)
def test_hostile_pickles_end_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, part: str
) -> None:
    path, out = tmp_path / "model.pkl", tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert cli.main(["import", str(path), "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("anchorline: ")
    assert captured.err.count("\n") == 1
    assert part in captured.err
    assert not out.exists()
