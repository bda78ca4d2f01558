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

    from anchorline.export.torchvision_keys import ARCHITECTURES, expected_shapes

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
    options = ["--classes", str(classes), "--canvas", "64x96", "--resize", "60x96", "--fast-resize"]
    options += [
        "--batch-norm-eps",
        "0.001",
        "--set",
        "score_threshold=0.2",
        "--set",
        "model.max_detections=7",
    ]
    assert cli.main(["import", str(checkpoint), "--arch", SMALLEST, "--out", str(out), *options]) == 0
    line = f"{out}: {SMALLEST}, 2 classes, canvas 64x96, batch-norm eps 0.001, not verified: the fast resize"
    assert capsys.readouterr().out.startswith(line)
    settings, contract = read_header(out)
    assert settings.backbone_norm_eps == 1e-3
    assert contract.names == ("cat", "dog")
    assert contract.canvas == settings.canvas == (64, 96)
    assert (contract.resize.shorter_side, contract.resize.longer_side) == (60, 96)
    assert contract.input_dtype == "uint8"
    assert (contract.thresholds.score, contract.thresholds.max_detections) == (0.2, 7)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "give --arch"),
        (["--arch", "resnet50"], "arch is 'resnet50'"),
        (["--arch", SMALLEST], "name its 2 classes with --classes FILE"),
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
