"""The RoIPool kernel's source, run on the CPU, against torchvision's roi_pool and ONNX's MaxRoiPool."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx.parser
import onnxruntime
import pytest
import torch
import torchvision
from numpy.typing import NDArray

from anchorline.runtime.io.errors import ArtefactError
from anchorline.runtime.tensorrt.kernels import Launch
from anchorline.runtime.tensorrt.plugins import Call, RoIPool

Pool = Callable[..., NDArray[np.floating]]


@pytest.fixture
def pool(run_on_host: Callable[[Launch, int], None]) -> Pool:
    """``pool(features, rois, size, scale)``: pooled [B * R, C, S, S] in the features' type."""

    def run(
        features: NDArray[np.floating], rois: NDArray[np.float32], size: int, scale: float
    ) -> NDArray[np.floating]:
        op = RoIPool(output_size=size, spatial_scale=scale)
        shape = op.output_shape([features.shape, rois.shape], lambda a, b: a * b)
        pooled = np.full(shape, 77, features.dtype)
        addresses = (features.ctypes.data, rois.ctypes.data)
        types = (features.dtype.name, "float32")
        for launch in op.launches(Call((features.shape, rois.shape), types, addresses, pooled.ctypes.data)):
            run_on_host(launch, 0)
        return pooled

    return run


def case(seed: int, images: int = 2, rois: int = 40) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features [B, 5, 13, 17] and RoIs on an image of 272x208, some partly or wholly beyond it."""
    generator = np.random.default_rng(seed)
    features = generator.normal(0, 10, (images, 5, 13, 17)).astype(np.float32)
    corner = generator.uniform(-60, 260, (images, rois, 2))
    boxes = np.concatenate([corner, corner + generator.uniform(0, 150, (images, rois, 2))], axis=2)
    boxes[:, :8] = np.round(boxes[:, :8] / 8) * 8  # halves after scaling, which round away from zero
    boxes[:, 8] = boxes[:, 8, [2, 3, 0, 1]]  # reversed: one pixel
    boxes[:, 9] = (400, 400, 500, 500)  # beyond the map: zeros
    return features, boxes.astype(np.float32)


def reference(features: NDArray, rois: NDArray[np.float32], size: int, scale: float) -> NDArray[np.float32]:
    boxes = [torch.from_numpy(of_image) for of_image in rois]
    pooled = torchvision.ops.roi_pool(torch.from_numpy(features.astype(np.float32)), boxes, size, scale)
    return pooled.numpy()


@pytest.mark.parametrize("size", [1, 2, 7, 14])
@pytest.mark.parametrize("scale", [1 / 16, 1.0])
def test_the_kernel_is_torchvision_s_roi_pool(size: int, scale: float, pool: Pool) -> None:
    features, rois = case(size)
    rois = rois if scale < 1 else rois / 16
    np.testing.assert_array_equal(pool(features, rois, size, scale), reference(features, rois, size, scale))


def test_half_precision_pools_the_same_values(pool: Pool) -> None:
    features = case(3)[0].astype(np.float16)
    features.flat[::7] = -0.0
    features.flat[5::11] = 6e-8  # subnormal
    rois = case(3)[1]
    pooled = pool(features, rois, 7, 1 / 16)
    assert pooled.dtype == np.float16
    np.testing.assert_array_equal(pooled.astype(np.float32), reference(features, rois, 7, 1 / 16))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_nan_features_are_passed_over(dtype: type, pool: Pool) -> None:
    features, rois = case(4)
    features = features.astype(dtype)
    features[0, 2, ::3] = np.nan
    pooled = pool(features, rois, 3, 1 / 16)
    assert np.isfinite(pooled).all()
    np.testing.assert_array_equal(pooled[:, :2], pool(features[:, :2].copy(), rois, 3, 1 / 16))


def test_rois_that_are_not_finite_are_harmless(pool: Pool) -> None:
    features, rois = case(5)
    rois[0, 0], rois[0, 1] = np.nan, (-np.inf, -3e38, np.inf, 3e38)
    pooled = pool(features, rois, 7, 1 / 16)
    assert np.isfinite(pooled).all()
    np.testing.assert_array_equal(pooled[2:], reference(features, rois, 7, 1 / 16)[2:])


def test_the_kernel_is_onnx_s_max_roi_pool(pool: Pool) -> None:
    features, rois = case(6)
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 18]>
        pooling (float[2, 5, 13, 17] features, float[80, 5] rois) => (float[80, 5, 7, 7] pooled) {
            pooled = MaxRoiPool <pooled_shape = [7, 7], spatial_scale = 0.0625> (features, rois)
        }"""
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    index = np.repeat(np.arange(2, dtype=np.float32), 40)[:, None]
    (expected,) = session.run(
        None, {"features": features, "rois": np.concatenate([index, rois.reshape(-1, 4)], axis=1)}
    )
    np.testing.assert_array_equal(pool(features, rois, 7, 1 / 16), expected)


@pytest.mark.parametrize(("size", "scale"), [(0, 1.0), (7, 0.0), (7, float("nan"))])
def test_absurd_attributes_are_refused(size: int, scale: float) -> None:
    with pytest.raises(ArtefactError, match="RoIPool"):
        RoIPool(output_size=size, spatial_scale=scale)
