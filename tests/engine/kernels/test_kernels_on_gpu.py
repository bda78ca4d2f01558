"""The compiled kernels on a GPU, launched as the plugins launch them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision

from anchorline.runtime.tensorrt import plugins
from anchorline.runtime.tensorrt.plugins import BatchedNMS, Call, Op, RoIPool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
KINDS = ("random", "clustered", "identical", "nested", "tied overlaps", "tied scores", "row", "holes")
COUNTS = (1, 2, 63, 64, 65, 200, 256, 257, 500, 1000, 1500, 2000)


def run(op: Op, *inputs: torch.Tensor) -> torch.Tensor:
    """The op on tensors of the GPU, on PyTorch's current stream."""
    shapes = tuple(tuple(tensor.shape) for tensor in inputs)
    shape = op.output_shape(shapes, lambda a, b: a * b)
    output = torch.full(shape, 77.0, dtype=inputs[op.output_like].dtype, device="cuda")
    scratch = torch.empty(op.workspace_bytes(shapes), dtype=torch.uint8, device="cuda")
    types = tuple(str(tensor.dtype).removeprefix("torch.") for tensor in inputs)
    addresses = tuple(tensor.data_ptr() for tensor in inputs)
    call = Call(shapes, types, addresses, output.data_ptr(), scratch.data_ptr())
    plugins.launch(op.launches(call), torch.cuda.current_stream().cuda_stream)
    return output


@pytest.mark.parametrize("kind", KINDS)
def test_nms_is_the_definition_to_the_bit(kind: str, make_groups: Callable, greedy_nms: Callable) -> None:
    """A thousand random cases over the eight kinds."""
    generator = np.random.default_rng([9, KINDS.index(kind)])
    for number in range(125):
        boxes, scores = make_groups(kind, int(generator.integers(1, 9)), COUNTS[number % 12], generator)
        iou, score = float(generator.choice([0.3, 0.5, 0.6])), float(generator.choice([0.0, 0.05, 0.5]))
        op = BatchedNMS(iou_threshold=iou, score_threshold=score)
        kept = run(op, torch.from_numpy(boxes).cuda(), torch.from_numpy(scores).cuda())
        np.testing.assert_array_equal(kept.cpu().numpy(), greedy_nms(boxes, scores, iou, score))


def test_nms_of_the_largest_calls(make_groups: Callable, greedy_nms: Callable) -> None:
    for groups, count in ((1, 8192), (1, 6000), (1024, 30), (720, 300)):
        boxes, scores = make_groups("clustered", groups, count, np.random.default_rng(3))
        op = BatchedNMS(iou_threshold=0.5, score_threshold=0.05)
        kept = run(op, torch.from_numpy(boxes).cuda(), torch.from_numpy(scores).cuda())
        np.testing.assert_array_equal(kept.cpu().numpy(), greedy_nms(boxes, scores, 0.5, 0.05))


def test_nms_in_a_cuda_graph(make_groups: Callable, greedy_nms: Callable) -> None:
    boxes, scores = make_groups("clustered", 4, 800, np.random.default_rng(4))
    op = BatchedNMS(iou_threshold=0.5, score_threshold=0.05)
    on_gpu = torch.from_numpy(boxes).cuda(), torch.from_numpy(scores).cuda()
    plugins.preload(op.source, op.kernels)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run(op, *on_gpu)
    for seed in (5, 6):
        boxes, scores = make_groups("holes", 4, 800, np.random.default_rng(seed))
        on_gpu[0].copy_(torch.from_numpy(boxes))
        on_gpu[1].copy_(torch.from_numpy(scores))
        graph.replay()
        np.testing.assert_array_equal(kept.cpu().numpy(), greedy_nms(boxes, scores, 0.5, 0.05))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_roi_pool_is_torchvision_s(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 64, 38, 50, generator=generator).to(dtype).cuda()
    corner = torch.rand(2, 300, 2, generator=generator) * 700 - 50
    rois = torch.cat([corner, corner + torch.rand(2, 300, 2, generator=generator) * 400], dim=2).cuda()
    pooled = run(RoIPool(output_size=7, spatial_scale=1 / 16), features, rois)
    expected = torchvision.ops.roi_pool(features.float().cpu(), list(rois.cpu()), 7, 1 / 16)
    assert torch.equal(pooled.float().cpu(), expected)
