"""The bodies of RoIAlign, run by onnxruntime, against the default body (ONNX RoiAlign) and torchvision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from anchorline.engine.bodies import gather_align, grid_sample_align
from anchorline.export.functions import default_functions

Floats = NDArray[np.float32]
Run = Callable[[onnx.ModelProto, Mapping[str, NDArray[np.generic]]], dict[str, NDArray[np.generic]]]
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
FORMS = {"grid-sample": grid_sample_align, "gather": gather_align}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


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


def pooled_by(
    form: str,
    run: Run,
    features: NDArray[np.floating],
    rois: Floats,
    size: int,
    sampling: int,
    free: bool = False,
) -> NDArray[np.generic]:
    """Pooled cells from a body, whose map has ``free`` sides or those of the features."""
    kind = HALF if features.dtype == np.float16 else FLOAT
    channels, height, width = features.shape[1:]
    body = FORMS[form](
        "Align",
        map_shape=(channels, None, None) if free else (channels, height, width),
        rois=rois.shape[1],
        output_size=size,
        sampling_ratio=sampling,
        kind=kind,
    )
    return run(model_of(body, {}, kind), {"features": features, "rois": rois})["pooled"]


def both(
    form: str, run: Run, features: NDArray[np.floating], rois: Floats, size: int, sampling: int
) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """Pooled cells from a body and from the default one."""
    kind = HALF if features.dtype == np.float16 else FLOAT
    (default,) = [f for f in default_functions() if f.name == "RoIAlign"]
    attributes = {
        "output_size": size,
        "sampling_ratio": sampling,
        "plugin_namespace": "anchorline",
        "plugin_version": "1",
    }
    found = pooled_by(form, run, features, rois, size, sampling)
    expected = run(model_of(default, attributes, kind), {"features": features, "rois": rois})["pooled"]
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
def test_it_equals_onnx_s_roi_align(form: str, run_onnx: Run, size: int, sampling: int) -> None:
    features, rois = features_of(2, 5, 23, 31), rois_inside(2, 9, 23, 31)
    found, expected = both(form, run_onnx, features, rois, size, sampling)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.abs(expected).max() > 0.5


def test_on_a_map_as_large_as_a_pyramid_s_canvas(form: str, run_onnx: Run) -> None:
    """Where a coordinate has the fewest digits left."""
    found, expected = both(form, run_onnx, features_of(1, 3, 306, 342), rois_inside(1, 200, 306, 342), 7, 2)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_half_a_pixel_beyond_the_map_the_edge_goes_on(form: str, run_onnx: Run) -> None:
    """Samples up to a pixel beyond the outermost pixel centres take its value, in both."""
    rois = np.array([[(-0.5, -0.5, 6, 6), (20, 10, 31.4, 23.4), (-0.5, 5, 0.5, 6)]], np.float32)
    found, expected = both(form, run_onnx, features_of(1, 4, 23, 31), rois, 7, 2)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_half_precision_features_keep_float32_coordinates(form: str, run_onnx: Run) -> None:
    features = features_of(1, 4, 200, 300).astype(np.float16)
    found, expected = both(form, run_onnx, features, rois_inside(1, 50, 200, 300), 7, 2)
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), atol=2e-3)
    exact, _ = both(form, run_onnx, features.astype(np.float32), rois_inside(1, 50, 200, 300), 7, 2)
    np.testing.assert_allclose(found.astype(np.float32), exact, atol=2e-3)


def test_each_image_is_pooled_from_its_own_map(form: str, run_onnx: Run) -> None:
    features, rois = features_of(3, 2, 16, 16), rois_inside(3, 6, 16, 16)
    together, _ = both(form, run_onnx, features, rois, 7, 2)
    for image in range(3):
        alone, _ = both(form, run_onnx, features[image : image + 1], rois[image : image + 1], 7, 2)
        np.testing.assert_allclose(together[image * 6 : image * 6 + 6], alone, atol=2e-5)
        others = np.delete(together, np.s_[image * 6 : image * 6 + 6], axis=0)
        assert np.abs(np.split(others, 2) - alone).max(axis=(1, 2, 3, 4)).min() > 0.5


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None)
@given(
    corner=st.tuples(st.floats(0, 11, width=32), st.floats(0, 8, width=32)),
    side=st.tuples(st.floats(0, 4, width=32), st.floats(0, 3, width=32)),
)
def test_any_roi_of_the_map(
    form: str, run_onnx: Run, corner: tuple[float, float], side: tuple[float, float]
) -> None:
    (x, y), (w, h) = corner, side
    rois = np.array([[(x, y, min(x + w, 12), min(y + h, 9))]], np.float32)
    found, expected = both(form, run_onnx, features_of(1, 2, 9, 12), rois, 3, 2)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_map_of_free_sides_gives_the_same(form: str, run_onnx: Run) -> None:
    for height, width in ((23, 31), (9, 64)):
        features, rois = features_of(2, 3, height, width), rois_inside(2, 7, height, width)
        free = pooled_by(form, run_onnx, features, rois, 7, 2, free=True)
        np.testing.assert_allclose(free, pooled_by(form, run_onnx, features, rois, 7, 2), atol=2e-5)


@pytest.mark.parametrize(("size", "sampling"), [(7, 2), (14, 1), (3, 3)])
def test_gather_is_torchvision_s_roi_align_beyond_the_map_as_well(
    run_onnx: Run, size: int, sampling: int
) -> None:
    features = features_of(2, 4, 23, 31)
    corner = np.random.default_rng(5).uniform(-12, 30, (2, 40, 2))
    sides = np.random.default_rng(6).uniform(0, 25, (2, 40, 2))
    rois = np.concatenate([corner, corner + sides], axis=2).astype(np.float32)
    found = pooled_by("gather", run_onnx, features, rois, size, sampling)
    expected = torchvision.ops.roi_align(
        torch.from_numpy(features), list(torch.from_numpy(rois)), size, 1.0, sampling, aligned=True
    ).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert (expected == 0).any()  # cells beyond the map


def test_gather_reads_no_pixel_for_what_is_no_number(run_onnx: Run) -> None:
    """An index made of a NaN could lie anywhere; onnxruntime refuses one outside the table."""
    rois = np.array(
        [[(np.nan, 0, 5, 5), (0, 0, np.inf, 5), (-3e38, -3e38, 3e38, 3e38), (1, 1, 6, 6)]], np.float32
    )
    features = features_of(1, 2, 8, 8)
    found = pooled_by("gather", run_onnx, features, rois, 3, 2)
    alone = pooled_by("gather", run_onnx, features, rois[:, 3:], 3, 2)
    np.testing.assert_array_equal(found[3], alone[0])
    assert (found[0] == 0).all()
