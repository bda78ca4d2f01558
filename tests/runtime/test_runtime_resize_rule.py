"""The resize rule in the contract: its choices, how sides are rounded, and artefacts of before."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchorline.runtime.canvas import place
from anchorline.runtime.contract import Contract, ResizeRule
from anchorline.runtime.io.errors import ArtefactError

DETECTRON2 = ResizeRule(800, 1333, interpolation="antialiased", rounding="nearest")


@pytest.mark.parametrize(
    ("source", "down", "nearest"),
    [
        ((480, 640), (800, 1066), (800, 1067)),
        ((427, 640), (800, 1199), (800, 1199)),
        ((1080, 1920), (749, 1333), (750, 1333)),
        ((97, 97), (799, 799), (800, 800)),
        ((1000, 2000), (666, 1333), (667, 1333)),
        ((1, 5000), (1, 1333), (1, 1333)),  # no side falls below one pixel
    ],
)
def test_rounding_by_hand(source: tuple[int, int], down: tuple[int, int], nearest: tuple[int, int]) -> None:
    for rounding, valid in (("down", down), ("nearest", nearest)):
        rule = ResizeRule(800, 1333, rounding=rounding)
        assert place(source, (1344, 1344), rule).valid == valid
        assert place(source[::-1], (1344, 1344), rule).valid == valid[::-1]


@given(st.integers(16, 3000), st.integers(16, 3000))
def test_the_size_is_mmcvs(height: int, width: int) -> None:
    """rescale_size: the larger scale that keeps both bounds, then int(side * scale + 0.5)."""
    factor = min(1333 / max(height, width), 800 / min(height, width))
    expected = (max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5)))
    assert place((height, width), (1344, 1344), DETECTRON2).valid == expected


@given(st.integers(16, 3000), st.integers(16, 3000))
def test_the_size_is_detectron2s_but_for_halves(height: int, width: int) -> None:
    """ResizeShortestEdge: the shorter side to 800, then all by 1333 / longer where that is more."""
    scale = 800 / min(height, width)
    sides = (800.0, scale * width) if height < width else (scale * height, 800.0)
    scale = min(1.0, 1333 / max(sides))
    sides = (sides[0] * scale, sides[1] * scale)
    valid = place((height, width), (1344, 1344), DETECTRON2).valid
    for side, found in zip(sides, valid, strict=True):
        assert found == max(1, int(side + 0.5)) or abs(side % 1 - 0.5) < 1e-9


def test_a_size_that_does_not_fit_fills_the_canvas() -> None:
    assert place((480, 640), (800, 1056), DETECTRON2).valid == (792, 1056)
    assert place((480, 640), (800, 1088), ResizeRule(rounding="nearest")).valid == (800, 1066)


def test_the_placement_carries_the_interpolation() -> None:
    assert place((480, 640), (800, 1344), DETECTRON2).interpolation == "antialiased"
    assert place((480, 640), (800, 1344), ResizeRule()).interpolation == "bilinear"


@pytest.mark.parametrize(
    "fault",
    [
        {"interpolation": "bicubic"},
        {"interpolation": None},
        {"rounding": "up"},
        {"rounding": 1},
        {"filter": "a"},
    ],
)
def test_choices_that_are_none(fault: dict[str, object], contract: Contract) -> None:
    raw = json.loads(contract.to_json())
    raw["resize"] |= fault
    with pytest.raises(ArtefactError, match=rf"model.onnx: damaged contract.*{next(iter(fault))}") as caught:
        Contract.from_json(json.dumps(raw), "model.onnx")
    assert "\n" not in str(caught.value)


def test_a_contract_of_before_resizes_as_before(contract: Contract) -> None:
    raw = json.loads(contract.to_json())
    for name in ("interpolation", "rounding"):
        del raw["resize"][name]
    assert Contract.from_json(json.dumps(raw)) == contract
    assert (contract.resize.interpolation, contract.resize.rounding) == ("bilinear", "down")


def test_the_choices_come_back_from_json(contract: Contract) -> None:
    promised = dataclasses.replace(contract, resize=DETECTRON2)
    assert Contract.from_json(promised.to_json()) == promised


def test_a_rule_without_bounds_keeps_the_size() -> None:
    rule = ResizeRule(interpolation="antialiased", rounding="nearest")
    assert place((480, 641), None, rule).valid == (480, 641)
    assert place((480, 640), None, dataclasses.replace(rule, within=(240, 640))).valid == (240, 320)
    assert place((480, 640), None, ResizeRule(600)).valid == (600, 800)
    assert place((480, 640), None, ResizeRule(longer_side=600)).valid == (450, 600)
