"""The GridSample body of RoIAlign, run by onnxruntime, against the default body (ONNX RoiAlign)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from anchorline.engine.bodies import grid_sample_align
from anchorline.export.functions import default_functions

Floats = NDArray[np.float32]
Run = Callable[[onnx.ModelProto, Mapping[str, NDArray[np.generic]]], dict[str, NDArray[np.generic]]]
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def model_of(function: onnx.FunctionProto, attributes: dict[str, Any], kind: int) -> onnx.ModelProto:
    """One node that calls ``function``."""
    node = helper.make_node(
        function.name, ["features", "rois"], ["pooled"], domain=function.domain, **attributes
    )
    graph = helper.make_graph(
        [node],
        "align",
        [
            helper.make_tensor_value_info("features", kind, ["B", "C", "H", "W"]),
            helper.make_tensor_value_info("rois", FLOAT, ["B", "R", 4]),
        ],
        [helper.make_tensor_value_info("pooled", kind, ["K", "C", "S", "S"])],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(function.domain, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)
    onnx.checker.check_model(model)
    return model


def both(
    run: Run, features: NDArray[np.floating], rois: Floats, size: int, sampling: int
) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """Pooled cells from the GridSample body and from the default one."""
    kind = HALF if features.dtype == np.float16 else FLOAT
    body = grid_sample_align(
        "Align",
        map_shape=(features.shape[1], features.shape[2], features.shape[3]),
        rois=rois.shape[1],
        output_size=size,
        sampling_ratio=sampling,
        kind=kind,
    )
    (default,) = [f for f in default_functions() if f.name == "RoIAlign"]
    attributes = {
        "output_size": size,
        "sampling_ratio": sampling,
        "plugin_namespace": "anchorline",
        "plugin_version": "1",
    }
    inputs = {"features": features, "rois": rois}
    found = run(model_of(body, {}, kind), inputs)["pooled"]
    expected = run(model_of(default, attributes, kind), inputs)["pooled"]
    assert found.shape == expected.shape == (rois.shape[0] * rois.shape[1], features.shape[1], size, size)
    assert found.dtype == expected.dtype == features.dtype
    return found, expected


def features_of(batch: int, channels: int, height: int, width: int) -> Floats:
    return np.random.default_rng(3).normal(0, 1, (batch, channels, height, width)).astype(np.float32)


def rois_inside(batch: int, count: int, height: int, width: int, seed: int = 0) -> Floats:
    """RoIs of every size within the map, edges included."""
    random = np.random.default_rng(seed)
    x = np.sort(random.uniform(0, width, (batch, count, 2)), axis=2)
    y = np.sort(random.uniform(0, height, (batch, count, 2)), axis=2)
    rois = np.stack((x[..., 0], y[..., 0], x[..., 1], y[..., 1]), axis=2).astype(np.float32)
    rois[:, 0] = (0, 0, width, height)
    rois[:, 1] = (0, 0, 1, 1)
    rois[:, 2] = (width - 1, height - 1, width, height)
    return rois


@pytest.mark.parametrize(("size", "sampling"), [(7, 2), (7, 1), (14, 2), (5, 3), (1, 4)])
def test_it_equals_onnx_s_roi_align(run_onnx: Run, size: int, sampling: int) -> None:
    found, expected = both(run_onnx, features_of(2, 5, 23, 31), rois_inside(2, 9, 23, 31), size, sampling)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.abs(expected).max() > 0.5


def test_on_a_map_as_large_as_a_pyramid_s_canvas(run_onnx: Run) -> None:
    """Where a coordinate has the fewest digits left."""
    found, expected = both(run_onnx, features_of(1, 3, 306, 342), rois_inside(1, 200, 306, 342), 7, 2)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_half_a_pixel_beyond_the_map_the_edge_goes_on(run_onnx: Run) -> None:
    """Samples up to a pixel beyond the outermost pixel centres take its value, in both."""
    rois = np.array([[(-0.5, -0.5, 6, 6), (20, 10, 31.4, 23.4), (-0.5, 5, 0.5, 6)]], np.float32)
    found, expected = both(run_onnx, features_of(1, 4, 23, 31), rois, 7, 2)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_half_precision_features_keep_float32_coordinates(run_onnx: Run) -> None:
    features = features_of(1, 4, 200, 300).astype(np.float16)
    found, expected = both(run_onnx, features, rois_inside(1, 50, 200, 300), 7, 2)
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), atol=2e-3)
    exact, _ = both(run_onnx, features.astype(np.float32), rois_inside(1, 50, 200, 300), 7, 2)
    np.testing.assert_allclose(found.astype(np.float32), exact, atol=2e-3)


def test_each_image_is_pooled_from_its_own_map(run_onnx: Run) -> None:
    features, rois = features_of(3, 2, 16, 16), rois_inside(3, 6, 16, 16)
    together, _ = both(run_onnx, features, rois, 7, 2)
    for image in range(3):
        alone, _ = both(run_onnx, features[image : image + 1], rois[image : image + 1], 7, 2)
        np.testing.assert_allclose(together[image * 6 : image * 6 + 6], alone, atol=2e-5)
        others = np.delete(together, np.s_[image * 6 : image * 6 + 6], axis=0)
        assert np.abs(np.split(others, 2) - alone).max(axis=(1, 2, 3, 4)).min() > 0.5


@settings(max_examples=40, deadline=None)
@given(
    corner=st.tuples(st.floats(0, 11, width=32), st.floats(0, 8, width=32)),
    side=st.tuples(st.floats(0, 4, width=32), st.floats(0, 3, width=32)),
)
def test_any_roi_of_the_map(run_onnx: Run, corner: tuple[float, float], side: tuple[float, float]) -> None:
    (x, y), (w, h) = corner, side
    rois = np.array([[(x, y, min(x + w, 12), min(y + h, 9))]], np.float32)
    found, expected = both(run_onnx, features_of(1, 2, 9, 12), rois, 3, 2)
    np.testing.assert_allclose(found, expected, atol=2e-5)
