"""Encoding and decoding against torchvision's ``BoxCoder``, and as inverses of each other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection import _utils

from anchorline.train.model.boxes import BoxCoder

WEIGHTS = [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)]


def random_boxes(count: int, low: float = 0.01, high: float = 800.0) -> torch.Tensor:
    corner = torch.rand(count, 2) * 1000 - 100
    side = torch.exp(torch.empty(count, 2).uniform_(math.log(low), math.log(high)))
    return torch.cat((corner, corner + side), dim=1)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_encode_equals_torchvision(weights: tuple[float, float, float, float]) -> None:
    boxes, references = random_boxes(500), random_boxes(500)
    theirs = _utils.BoxCoder(weights).encode_single(boxes, references)
    torch.testing.assert_close(BoxCoder(weights).encode(boxes, references), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 1000.0])
def test_decode_equals_torchvision(weights: tuple[float, float, float, float], scale: float) -> None:
    """With a scale of 10 and more most of the widths and heights reach the clamp."""
    references, deltas = random_boxes(500), torch.randn(500, 4) * scale
    theirs = _utils.BoxCoder(weights).decode_single(deltas, references)
    torch.testing.assert_close(BoxCoder(weights).decode(deltas, references), theirs, rtol=1e-5, atol=1e-3)


def test_decode_treats_extreme_deltas_as_torchvision_does() -> None:
    extreme = torch.tensor([0.0, -0.0, 1e-30, 88.0, 1e4, 1e30, -1e4, -1e30, math.inf, -math.inf, math.nan])
    deltas = torch.cartesian_prod(*[extreme] * 4)[::7]
    references = torch.tensor([[10.0, 20.0, 42.0, 36.0]]).expand(len(deltas), 4)
    theirs = _utils.BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(deltas, references)
    ours = BoxCoder().decode(deltas, references)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-3, equal_nan=True)


def test_every_class_of_a_box_is_decoded_from_the_same_reference() -> None:
    references, deltas = random_boxes(20), torch.randn(20, 5, 4)
    theirs = _utils.BoxCoder((10.0, 10.0, 5.0, 5.0)).decode(deltas.reshape(20, -1), [references])
    ours = BoxCoder((10.0, 10.0, 5.0, 5.0)).decode(deltas, references[:, None])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-3)


def test_deltas_by_hand() -> None:
    # A box 10 to the right of its reference and twice as wide, the reference being 20 x 10.
    reference, box = torch.tensor([0.0, 0.0, 20.0, 10.0]), torch.tensor([0.0, 0.0, 40.0, 10.0])
    expected = torch.tensor([0.5, 0.0, math.log(2), 0.0])
    torch.testing.assert_close(BoxCoder().encode(box, reference), expected)


sides = st.floats(0.5, 500.0)
corners = st.floats(-50.0, 1000.0)


@settings(max_examples=60, deadline=None)
@given(
    box=st.tuples(corners, corners, sides, sides),
    reference=st.tuples(corners, corners, sides, sides),
    weights=st.sampled_from(WEIGHTS),
)
def test_decoding_undoes_encoding(
    box: tuple[float, ...], reference: tuple[float, ...], weights: tuple[float, float, float, float]
) -> None:
    boxes, references = (
        torch.tensor([x, y, x + w, y + h], dtype=torch.float64) for x, y, w, h in (box, reference)
    )
    # A box may grow at most by 1000 / 16 of its reference: beyond, the clamp is not invertible.
    coder = BoxCoder(weights, max_log_scale=math.log(2000.0))
    again = coder.decode(coder.encode(boxes, references), references)
    torch.testing.assert_close(again, boxes, rtol=1e-9, atol=1e-6)
