"""The verdict as a table, as JSON and as the record beside the artefact."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from anchorline.runtime.detections import Detections
from anchorline.runtime.io.files import sha256_of
from anchorline.verify.compare import compare_detections, summarise
from anchorline.verify.stages import LayerResult, StageResult
from anchorline.verify.traps import TrapResult
from anchorline.verify.verification import (
    Accuracy,
    DetectionCheck,
    VerifyReport,
    record_path,
    write_not_executed,
    write_record,
)

FOUND = Detections([[0, 0, 9, 9]], [0.9], [0], ("cell",))
SOUND = StageResult("pixels", True, 0.1, "rms 0.1")
BROKEN = StageResult("fpn", False, float("inf"), "fpn.0 has the shape [1, 2], expected [1, 3]")


def report(candidate: Detections = FOUND, **fields: object) -> VerifyReport:
    one = compare_detections(FOUND, candidate)
    check = DetectionCheck(
        ("image",), (one,), (FOUND,), (candidate,), summarise([one], image_names=["image"]), None, loss=None
    )
    side = {"name": "model.onnx", "sha256": "0" * 64, "provider": "cpu", "precision": "fp32"}
    made = VerifyReport(side, dict(side), "data", {}, check, stages=(SOUND,))
    return dataclasses.replace(made, **fields)  # type: ignore[arg-type]


def shown(made: VerifyReport) -> str:
    out = io.StringIO()
    Console(file=out, width=400).print(made.render())
    return out.getvalue()


def test_what_holds() -> None:
    made = report(traps=(TrapResult("noise", True, "agrees", 1),))
    assert made.passed
    assert made.reason is None
    assert made.describe().startswith("1 stages hold, 1 matched")
    assert "the numbers held" in shown(made)


@pytest.mark.parametrize(
    ("fields", "first", "said"),
    [
        ({"stages": (SOUND, BROKEN)}, "fpn", "fpn: fpn.0 has the shape"),
        ({"candidate": Detections.empty(("cell",))}, "detections", "missed cell"),
        ({"traps": (TrapResult("noise", False, "no box", 1),)}, "trap: noise", "trap: noise: no box"),
    ],
    ids=["stage", "detections", "trap"],
)
def test_the_first_divergence_is_named(fields: dict[str, object], first: str, said: str) -> None:
    made = report(**fields)  # type: ignore[arg-type]
    assert not made.passed
    assert made.first_divergence == first
    assert said in str(made.reason)
    assert "they differ" in shown(made)
    assert json.loads(json.dumps(made.to_json(), allow_nan=False))["passed"] is False


def test_the_layer_stands_in_the_reason() -> None:
    made = report(stages=(SOUND, BROKEN), layer=LayerResult("body.0", "rms 1", 3))
    assert str(made.reason).endswith("first in layer body.0")


def test_a_stage_that_was_not_compared_does_not_count_as_one_that_holds() -> None:
    alone = StageResult("fpn", True, 0.0, "only the reference has fpn.0", compared=False)
    made = report(stages=(SOUND, alone))
    assert made.describe().startswith("1 stages hold")
    (row,) = [line for line in shown(made).splitlines() if "only the reference" in line]
    assert "ok" not in row
    assert made.to_json()["stages"][1]["compared"] is False


def test_names_with_brackets_are_shown_as_they_are() -> None:
    """rich takes ``[/x]`` for markup, and fails on it."""
    odd = "[/odd].png"
    made = report(
        data=odd,
        stages=(dataclasses.replace(SOUND, detail=f"stage {odd}"),),
        traps=(TrapResult("noise", False, f"trap {odd}", 1),),
        notes=(f"note {odd}",),
    )
    named = Accuracy((1.0, 1.0), (1.0, 1.0))
    made = dataclasses.replace(
        made, detections=dataclasses.replace(made.detections, accuracy={odd: named}, loss=f"loss {odd}")
    )
    text = shown(made)
    for part in (f"on {odd}", f"stage {odd}", f"trap {odd}", f"note {odd}", f"loss {odd}"):
        assert part in text
    assert odd in shown(dataclasses.replace(made, stages=None, stages_note=odd, data="", notes=()))


def test_the_record_is_keyed_by_the_file_and_holds_no_infinity(tmp_path: Path) -> None:
    artefact = tmp_path / "model.onnx"
    artefact.write_bytes(b"model")
    path = write_record(artefact, report(stages=(BROKEN,)))
    assert path == record_path(artefact) == tmp_path / "model.onnx.verify.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["artefact"]["sha256"] == sha256_of(artefact)
    assert record["not_executed"] is None
    assert record["stages"][0]["tolerance_used"] is None
    write_not_executed(artefact, "no GPU")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert (record["passed"], record["reference"], record["not_executed"]) == (None, None, "no GPU")
