"""The ONNX bodies of the custom ops, run by onnxruntime, against the ops in eager PyTorch.

``tests/train/test_custom_ops.py`` holds the eager ops against a reference written out in NumPy.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from anchorline.export.functions import OPSET, attach_functions, default_functions
from anchorline.runtime.contract import BANDS_OP, DOMAIN
from anchorline.train.model import ops

Floats = NDArray[np.float32]
PLUGIN = {"plugin_namespace": "anchorline", "plugin_version": "1"}
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
ALIGN = ("RoIAlign", BANDS_OP)


def model_of(
    op: str,
    inputs: dict[str, tuple[int, list[str | int]]],
    attributes: dict[str, Any],
    output: tuple[int, list[str]],
) -> onnx.ModelProto:
    """A model of one custom node with every dimension left open."""
    plugin = PLUGIN if attributes else {}
    node = helper.make_node(op, list(inputs), ["out"], domain=DOMAIN, **attributes, **plugin)
    graph = helper.make_graph(
        [node],
        "one_op",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info("out", *output)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    attach_functions(model)
    onnx.checker.check_model(model)
    return model


def session_of(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@functools.lru_cache
def nms_session(iou_threshold: float, score_threshold: float) -> onnxruntime.InferenceSession:
    inputs = {"boxes": (FLOAT, ["G", "N", 4]), "scores": (FLOAT, ["G", "N"])}
    attributes = {"iou_threshold": iou_threshold, "score_threshold": score_threshold}
    return session_of(model_of("BatchedNMS", inputs, attributes, (FLOAT, ["G", "N"])))


@functools.lru_cache
def align_session(op: str, size: int, sampling: int, kind: int = FLOAT) -> onnxruntime.InferenceSession:
    inputs = {"features": (kind, ["B", "C", "H", "W"]), "rois": (FLOAT, ["B", "R", 4])}
    attributes = {"output_size": size, "sampling_ratio": sampling}
    return session_of(model_of(op, inputs, attributes, (kind, ["K", "C", "S", "S"])))


def check_nms(
    boxes: Floats, scores: Floats, iou_threshold: float = 0.5, score_threshold: float = 0.0
) -> Floats:
    """onnxruntime and PyTorch suppress the very same entries; returns the result [G, N]."""
    expected = ops.batched_nms(
        torch.from_numpy(boxes),
        torch.from_numpy(scores),
        iou_threshold=iou_threshold,
        score_threshold=score_threshold,
    )
    (found,) = nms_session(iou_threshold, score_threshold).run(None, {"boxes": boxes, "scores": scores})
    np.testing.assert_array_equal(found, expected.numpy())
    return found


def falling_scores(groups: int, count: int, seed: int = 0) -> Floats:
    drawn = np.random.default_rng(seed).uniform(0, 1, (groups, count)).astype(np.float32)
    return np.ascontiguousarray(-np.sort(-drawn, axis=1))


def scattered_boxes(groups: int, count: int, spread: float, seed: int = 0) -> Floats:
    random = np.random.default_rng(seed)
    centre = random.uniform(0, spread, (groups, count, 2))
    half = random.uniform(2, 30, (groups, count, 2))
    return np.concatenate((centre - half, centre + half), axis=2).astype(np.float32)


@pytest.mark.parametrize("spread", [0.0, 20.0, 300.0])
@pytest.mark.parametrize(("iou", "score"), [(0.5, 0.05), (0.7, -1.0), (0.3, 0.5), (0.6, 0.0)])
def test_nms_of_random_and_clustered_boxes(spread: float, iou: float, score: float) -> None:
    found = check_nms(scattered_boxes(3, 200, spread), falling_scores(3, 200), iou, score)
    assert 0 < (found > 0).sum() < found.size


def test_nms_of_identical_nested_and_tied_boxes() -> None:
    same = np.tile(np.array([3, 4, 30, 40], np.float32), (40, 1))
    inset = np.arange(40, dtype=np.float32)[:, None] * 0.4
    nested = np.concatenate((inset, inset, 40 - inset, 40 - inset), axis=1)
    tied = scattered_boxes(1, 40, 40)[0]
    boxes = np.stack((same, nested, tied, tied))
    scores = falling_scores(4, 40)
    scores[2] = 0.7
    scores[3] = np.repeat(np.float32([0.9, 0.5, 0.5, 0.1]), 10)
    for iou in (0.5, 0.7):
        found = check_nms(boxes, scores, iou)
        assert (found[0] > 0).sum() == 1


def test_nms_skips_what_does_not_count_wherever_it_stands() -> None:
    nan, inf = np.nan, np.inf
    boxes, scores = scattered_boxes(2, 60, 60), falling_scores(2, 60)
    bad = [(nan, 0, 9, 9), (0, 0, 9, nan), (-inf, -inf, inf, inf), (0, 0, inf, 9), (9, 9, 0, 0), (9, 0, 0, 9)]
    bad += [(4, 4, 4, 4), (0, 0, 3e38, 3e38), (inf,) * 4, (nan,) * 4]
    boxes[:, 5:55:5] = bad
    scores[0, 7:60:7], scores[1, 3:60:3], scores[1, 1] = -1.0, nan, nan
    found = check_nms(boxes, scores)
    assert (found[:, 5:55:5] == -1).all()
    assert (found > 0).any(axis=1).all()


@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (1, 50), (3, 2)])
def test_nms_of_awkward_shapes_and_of_nothing_valid(shape: tuple[int, int]) -> None:
    boxes = scattered_boxes(*shape, 10)
    check_nms(boxes, falling_scores(*shape))
    for worthless in (-1.0, 0.0, np.nan):
        assert (check_nms(boxes, np.full(shape, worthless, np.float32)) == -1).all()
    assert (check_nms(np.zeros_like(boxes), falling_scores(*shape)) == -1).all()


coordinate = st.integers(0, 12)
box = st.tuples(coordinate, coordinate, coordinate, coordinate)


@settings(max_examples=150, deadline=None)
@given(
    entries=st.lists(
        st.tuples(box, st.sampled_from([0.0, 0.05, 0.3, 0.9]), st.booleans()), min_size=1, max_size=14
    ),
    iou_threshold=st.sampled_from([0.0, 0.3, 0.5, 0.6, 0.7, 1.0]),
    score_threshold=st.sampled_from([-1.0, 0.0, 0.05]),
)
def test_nms_decides_exact_ties_as_pytorch_does(
    entries: list[tuple[tuple[int, ...], float, bool]], iou_threshold: float, score_threshold: float
) -> None:
    """Whole-numbered boxes often have an IoU of exactly the threshold; many scores are equal."""
    ordered = sorted(entries, key=lambda e: -e[1])
    boxes = np.array([[b for b, _, _ in ordered]], np.float32)
    scores = np.array([[-1.0 if absent else score for _, score, absent in ordered]], np.float32)
    check_nms(boxes, scores, iou_threshold, score_threshold)


def check_align(features: torch.Tensor, rois: torch.Tensor, size: int, sampling: int) -> None:
    expected = ops.roi_align(features, rois, output_size=size, sampling_ratio=sampling)
    inputs = {"features": features.numpy(), "rois": rois.numpy()}
    for op in ALIGN:
        (found,) = align_session(op, size, sampling).run(None, inputs)
        assert found.shape == (rois.shape[0] * rois.shape[1], features.shape[1], size, size)
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5, err_msg=op)


def rois_on(height: int, width: int, images: int, count: int) -> torch.Tensor:
    """RoIs of all sizes, some reaching over the map and some without area."""
    corner = torch.rand(images, count, 2) * torch.tensor([width, height]) * 1.1 - 1
    rois = torch.cat((corner, corner + torch.rand(images, count, 2) ** 3 * 20), dim=2)
    rois[:, ::5, 2:] = rois[:, ::5, :2]
    return rois


@pytest.mark.parametrize(("size", "sampling"), [(7, 2), (14, 1), (1, 3)])
@pytest.mark.parametrize(("images", "count"), [(1, 1), (1, 30), (3, 13)])
def test_roi_align_body_equals_pytorch(size: int, sampling: int, images: int, count: int) -> None:
    torch.manual_seed(0)
    check_align(torch.randn(images, 4, 18, 25), rois_on(18, 25, images, count), size, sampling)


def test_each_roi_reads_its_own_image() -> None:
    features = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 2, 8, 8).contiguous()
    rois = torch.tensor([1.0, 1.0, 6.0, 6.0]).expand(4, 3, 4).contiguous()
    for op in ALIGN:
        (found,) = align_session(op, 2, 2).run(None, {"features": features.numpy(), "rois": rois.numpy()})
        assert found[:, 0, 0, 0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    check_align(features, rois, 2, 2)


@settings(max_examples=60, deadline=None)
@given(
    roi=st.tuples(*[st.floats(-3, 30, width=32)] * 2, *[st.floats(0, 40, width=32)] * 2),
    seed=st.integers(0, 99),
)
def test_roi_align_body_at_any_place(roi: tuple[float, float, float, float], seed: int) -> None:
    x, y, width, height = roi
    features = torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, (1, 2, 12, 17)).astype(np.float32))
    check_align(features, torch.tensor([[[x, y, x + width, y + height]]]), 7, 2)


@pytest.mark.parametrize("op", ALIGN)
def test_half_precision_features_are_pooled_in_float32(op: str) -> None:
    torch.manual_seed(0)
    features, rois = torch.randn(2, 3, 150, 200).half(), rois_on(150, 200, 2, 20)
    (found,) = align_session(op, 7, 2, HALF).run(None, {"features": features.numpy(), "rois": rois.numpy()})
    expected = ops.roi_align(features.float(), rois, output_size=7, sampling_ratio=2)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("counts", [(0, 0), (0, 1), (3, 1), (4, 5), (5, 0)])
def test_the_slots_of_the_fullest_image_are_occupied(counts: tuple[int, int]) -> None:
    boxes = np.random.default_rng(0).random((2, 5, 4), dtype=np.float32)
    scores = np.where(np.arange(5) < np.array(counts)[:, None], 0.5, ops.SUPPRESSED).astype(np.float32)
    inputs = {"boxes": (FLOAT, ["B", "P", 4]), "scores": (FLOAT, ["B", "P"])}
    session = session_of(model_of("Occupied", inputs, {}, (FLOAT, ["B", "S", 4])))
    (used,) = session.run(None, {"boxes": boxes, "scores": scores})
    assert np.array_equal(used, boxes[:, : max(1, *counts)])
    assert np.array_equal(used, ops.occupied(torch.from_numpy(boxes), torch.from_numpy(scores)).numpy())


def test_functions_declare_the_attributes_that_name_a_plugin() -> None:
    """TensorRT hands a node to a plugin only when node and function carry namespace and version."""
    functions = {function.name: function for function in default_functions()}
    assert {name: set(function.attribute) for name, function in functions.items()} == {
        "BatchedNMS": {"iou_threshold", "score_threshold", "plugin_namespace", "plugin_version"},
        "RoIAlign": {"output_size", "sampling_ratio", "plugin_namespace", "plugin_version"},
        BANDS_OP: {"output_size", "sampling_ratio", "plugin_namespace", "plugin_version"},
        "Occupied": set(),  # taken out for TensorRT
    }
    for function in functions.values():
        assert function.domain == DOMAIN
        assert [(o.domain, o.version) for o in function.opset_import] == [("", OPSET)]
    assert ops.PLUGIN_ATTRIBUTES == PLUGIN


def test_only_the_functions_in_use_are_attached() -> None:
    inputs = {"boxes": (FLOAT, ["G", "N", 4]), "scores": (FLOAT, ["G", "N"])}
    model = model_of(
        "BatchedNMS", inputs, {"iou_threshold": 0.5, "score_threshold": 0.0}, (FLOAT, ["G", "N"])
    )
    assert [function.name for function in model.functions] == ["BatchedNMS"]
    assert {o.domain: o.version for o in model.opset_import} == {"": OPSET, DOMAIN: 1}
