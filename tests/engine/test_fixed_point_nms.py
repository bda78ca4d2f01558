"""The fixed-point NMS body, run by onnxruntime, against the default body and greedy NMS in NumPy."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from anchorline.engine.bodies import fixed_point_nms
from anchorline.export.functions import default_functions

Floats = NDArray[np.float32]
FLOAT = TensorProto.FLOAT


def session_of(
    function: onnx.FunctionProto, count: int, attributes: dict[str, Any]
) -> onnxruntime.InferenceSession:
    """One node that calls ``function`` on G groups of ``count`` boxes."""
    outputs = list(function.output)
    node = helper.make_node(function.name, ["boxes", "scores"], outputs, domain=function.domain, **attributes)
    graph = helper.make_graph(
        [node],
        "nms",
        [
            helper.make_tensor_value_info("boxes", FLOAT, ["G", count, 4]),
            helper.make_tensor_value_info("scores", FLOAT, ["G", count]),
        ],
        [
            helper.make_tensor_value_info(name, FLOAT, shape)
            for name, shape in zip(outputs, (["G", count], [1]), strict=False)
        ],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(function.domain, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@functools.lru_cache
def default_session(count: int, iou: float, score: float) -> onnxruntime.InferenceSession:
    (function,) = [f for f in default_functions() if f.name == "BatchedNMS"]
    names = {"plugin_namespace": "anchorline", "plugin_version": "1"}
    return session_of(function, count, {"iou_threshold": iou, "score_threshold": score, **names})


@functools.lru_cache
def fixed_session(
    count: int, iou: float, score: float, rounds: int, limit: int | None
) -> onnxruntime.InferenceSession:
    function = fixed_point_nms(
        "Fixed", count=count, iou_threshold=iou, score_threshold=score, rounds=rounds, limit=limit
    )
    return session_of(function, count, {})


def run_fixed(
    boxes: Floats,
    scores: Floats,
    iou: float = 0.5,
    score: float = 0.0,
    rounds: int = 16,
    limit: int | None = None,
) -> tuple[Floats, bool]:
    """Kept scores [G, N], and whether the rounds sufficed."""
    session = fixed_session(boxes.shape[1], iou, score, rounds, limit)
    kept, unsettled = session.run(None, {"boxes": boxes, "scores": scores})
    assert unsettled.shape == (1,)
    return kept, bool(unsettled[0] < 0.5)


def greedy(boxes: Floats, scores: Floats, iou: float, score: float) -> Floats:
    """The reference: one box after another, IoU = inter / union in float32 (design, section 3)."""
    kept = np.full_like(scores, -1.0)
    limit = np.float32(iou)
    with np.errstate(all="ignore"):
        side = boxes[..., 2:] - boxes[..., :2]
        area = side[..., 0] * side[..., 1]
        valid = (side[..., 0] > 0) & (area > 0) & (area < np.inf) & (scores > np.float32(score))
        for group in range(len(boxes)):
            chosen: list[int] = []
            for i in np.flatnonzero(valid[group]):
                b, others = boxes[group, i], boxes[group, chosen]
                inter_side = np.minimum(b[2:], others[:, 2:]) - np.maximum(b[:2], others[:, :2])
                inter = np.maximum(inter_side[:, 0], 0) * np.maximum(inter_side[:, 1], 0)
                union = area[group, i] + area[group, chosen] - inter
                if not (inter / union > limit).any():
                    chosen.append(int(i))
            kept[group, chosen] = scores[group, chosen]
    return kept


def check(boxes: Floats, scores: Floats, iou: float = 0.5, score: float = 0.0, rounds: int = 16) -> Floats:
    """All three agree exactly, and the rounds suffice; returns the result."""
    found, converged = run_fixed(boxes, scores, iou, score, rounds)
    (default,) = default_session(boxes.shape[1], iou, score).run(None, {"boxes": boxes, "scores": scores})
    np.testing.assert_array_equal(found, default)
    np.testing.assert_array_equal(found, greedy(boxes, scores, iou, score))
    assert converged
    return found


def falling(groups: int, count: int, seed: int = 0) -> Floats:
    drawn = np.random.default_rng(seed).uniform(0, 1, (groups, count)).astype(np.float32)
    return np.ascontiguousarray(-np.sort(-drawn, axis=1))


def scattered(groups: int, count: int, spread: float, seed: int = 0) -> Floats:
    random = np.random.default_rng(seed)
    centre, half = random.uniform(0, spread, (groups, count, 2)), random.uniform(2, 30, (groups, count, 2))
    return np.concatenate((centre - half, centre + half), axis=2).astype(np.float32)


def row(count: int) -> Floats:
    """Boxes [1, count, 4] side by side, each overlapping the next with IoU 0.6 and no other above 0.5."""
    left = np.arange(count, dtype=np.float32) * 10
    return np.stack((left, 0 * left, left + 40, 0 * left + 40), axis=1)[None].astype(np.float32)


@pytest.mark.parametrize("spread", [20.0, 300.0])
@pytest.mark.parametrize(("iou", "score"), [(0.5, 0.05), (0.7, -1.0), (0.3, 0.5), (0.6, 0.0)])
def test_random_and_clustered_boxes(spread: float, iou: float, score: float) -> None:
    found = check(scattered(3, 200, spread), falling(3, 200), iou, score, rounds=32)
    assert 0 < (found > 0).sum() < found.size


def test_identical_nested_and_tied_boxes() -> None:
    same = np.tile(np.array([3, 4, 30, 40], np.float32), (40, 1))
    inset = np.arange(40, dtype=np.float32)[:, None] * 0.4
    nested = np.concatenate((inset, inset, 40 - inset, 40 - inset), axis=1)
    tied = scattered(1, 40, 40)[0]
    boxes, scores = np.stack((same, nested, tied, tied)), falling(4, 40)
    scores[2] = 0.7
    scores[3] = np.repeat(np.float32([0.9, 0.5, 0.5, 0.1]), 10)
    for iou in (0.5, 0.7):
        assert (check(boxes, scores, iou)[0] > 0).sum() == 1


def test_an_overlap_exactly_at_the_threshold_stays() -> None:
    """Two boxes with IoU = 6 / 10 in float32: not above 0.6, and above anything smaller."""
    boxes = np.array([[[0, 0, 10, 1], [0, 0, 6, 1]]], np.float32)
    scores = np.float32([[0.9, 0.8]])
    assert (check(boxes, scores, 0.6) > 0).all()
    assert (check(boxes, scores, float(np.nextafter(np.float32(0.6), np.float32(0)))) > 0).sum() == 1


def test_what_does_not_count_is_skipped_wherever_it_stands() -> None:
    nan, inf = np.nan, np.inf
    boxes, scores = scattered(2, 60, 60), falling(2, 60)
    bad = [(nan, 0, 9, 9), (0, 0, 9, nan), (-inf, -inf, inf, inf), (0, 0, inf, 9), (9, 9, 0, 0), (9, 0, 0, 9)]
    bad += [(4, 4, 4, 4), (0, 0, 3e38, 3e38), (inf,) * 4, (nan,) * 4]
    boxes[:, 5:55:5] = bad
    scores[0, 7:60:7], scores[1, 3:60:3], scores[1, 1] = -1.0, nan, nan
    found = check(boxes, scores)
    assert (found[:, 5:55:5] == -1).all()
    assert (found > 0).any(axis=1).all()


@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (1, 50), (3, 2)])
def test_awkward_shapes_and_nothing_valid(shape: tuple[int, int]) -> None:
    boxes = scattered(*shape, 10)
    check(boxes, falling(*shape))
    for worthless in (-1.0, 0.0, np.nan):
        assert (check(boxes, np.full(shape, worthless, np.float32)) == -1).all()
    assert (check(np.zeros_like(boxes), falling(*shape)) == -1).all()


@pytest.mark.parametrize("rounds", [2, 4, 16])
def test_a_chain_as_long_as_the_rounds_is_exact_and_a_longer_one_is_reported(rounds: int) -> None:
    """In a row of boxes in falling order each link is settled one round after the one before it."""
    fits = row(rounds + 1)  # a chain of ``rounds`` suppressions
    found = check(fits, falling(1, rounds + 1), rounds=rounds)
    assert (found[0] > 0).tolist() == [i % 2 == 0 for i in range(rounds + 1)]

    for beyond in (2, 3, 10):
        boxes, scores = row(rounds + beyond), falling(1, rounds + beyond)
        kept, converged = run_fixed(boxes, scores, rounds=rounds)
        assert not converged
        expected = greedy(boxes, scores, 0.5, 0.0)
        assert (kept[expected > 0] > 0).all(), "an even number of rounds drops nothing"
        assert (kept > 0).sum() > (expected > 0).sum(), "and leaves duplicates"


def test_a_group_that_does_not_converge_is_noticed_among_those_that_do() -> None:
    boxes, scores = scattered(3, 12, 500), falling(3, 12)
    assert run_fixed(boxes, scores, rounds=4)[1]
    boxes[1] = row(12)[0]
    assert not run_fixed(boxes, scores, rounds=4)[1]


def test_the_limit_considers_the_best_and_reports_what_it_cut_off() -> None:
    boxes, scores = scattered(2, 80, 200), falling(2, 80)
    boxes[:, 10:20] = np.nan
    scores[:, 50:] = -1.0
    kept, converged = run_fixed(boxes, scores, limit=50)
    np.testing.assert_array_equal(kept, greedy(boxes, scores, 0.5, 0.0))
    assert converged

    kept, converged = run_fixed(boxes, scores, limit=30)
    np.testing.assert_array_equal(kept[:, :30], greedy(boxes[:, :30], scores[:, :30], 0.5, 0.0))
    assert (kept[:, 30:] == -1).all()
    assert not converged


def test_a_limit_beyond_the_entries_changes_nothing() -> None:
    boxes, scores = scattered(1, 20, 30), falling(1, 20)
    np.testing.assert_array_equal(run_fixed(boxes, scores, limit=20)[0], run_fixed(boxes, scores)[0])
    np.testing.assert_array_equal(run_fixed(boxes, scores, limit=500)[0], run_fixed(boxes, scores)[0])


coordinate = st.integers(0, 12)
entry = st.tuples(
    st.tuples(coordinate, coordinate, coordinate, coordinate),
    st.sampled_from([0.0, 0.05, 0.3, 0.9, -1.0, float("nan")]),
)


@settings(max_examples=150, deadline=None)
@given(
    entries=st.lists(entry, min_size=14, max_size=14),
    iou=st.sampled_from([0.0, 0.3, 0.5, 0.6, 0.7, 1.0]),
    score=st.sampled_from([-1.0, 0.0, 0.05]),
)
def test_small_integer_boxes(
    entries: list[tuple[tuple[int, int, int, int], float]], iou: float, score: float
) -> None:
    boxes = np.array([[box for box, _ in entries]], np.float32)
    # Valid entries stand in falling order; those that do not count may stand anywhere.
    drawn = np.array([[value for _, value in entries]], np.float32)
    counted = drawn > np.float32(score)
    drawn[counted] = -np.sort(-drawn[counted])
    check(boxes, drawn, iou, score)
