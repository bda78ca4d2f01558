"""The NMS kernel's source, run on the CPU, against greedy NMS in NumPy and torchvision's."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray

from anchorline.runtime.io.errors import ArtefactError
from anchorline.runtime.tensorrt.kernels import Launch
from anchorline.runtime.tensorrt.plugins import BatchedNMS, Call

KINDS = ("random", "clustered", "identical", "nested", "tied overlaps", "tied scores", "row", "holes")
GUARD = 0xA5  # what stands beyond the output and the scratch memory, and must go on standing there


@pytest.fixture
def kernel(run_on_host: Callable[[Launch, int], None]) -> Callable[..., NDArray[np.float32]]:
    """``kernel(boxes, scores, iou, score, order)``: kept [G, N]; checks that it writes nothing beyond."""

    def run(
        boxes: NDArray[np.float32], scores: NDArray[np.float32], iou: float, score: float, order: int = 0
    ) -> NDArray[np.float32]:
        op = BatchedNMS(iou_threshold=iou, score_threshold=score)
        scratch_bytes = op.workspace_bytes((boxes.shape, scores.shape))
        scratch = np.full(scratch_bytes + 64, GUARD, np.uint8)
        kept = np.full(scores.nbytes + 64, GUARD, np.uint8)
        addresses = (boxes.ctypes.data, scores.ctypes.data)
        shapes, types = (boxes.shape, scores.shape), ("float32", "float32")
        for launch in op.launches(Call(shapes, types, addresses, kept.ctypes.data, scratch.ctypes.data)):
            run_on_host(launch, order)
        assert (kept[-64:] == GUARD).all()
        assert (scratch[-64:] == GUARD).all()
        return kept[:-64].view(np.float32).reshape(scores.shape).copy()

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 65, 200, 256, 257, 450])
def test_the_kernel_is_greedy_nms_to_the_bit(
    kind: str, count: int, kernel: Callable, make_groups: Callable, greedy_nms: Callable
) -> None:
    generator = np.random.default_rng([count, KINDS.index(kind)])
    boxes, scores = make_groups(kind, 3, count, generator)
    for iou, score in ((0.3, 0.0), (0.5, 0.05)):
        expected = greedy_nms(boxes, scores, iou, score)
        np.testing.assert_array_equal(
            kernel(boxes, scores, iou, score, order=generator.integers(9)), expected
        )
    assert (expected >= 0).any() or kind == "holes" or count < 3


@pytest.mark.parametrize("iou", [0.0, 1.0])
def test_the_ends_of_the_iou_threshold(
    iou: float, kernel: Callable, make_groups: Callable, greedy_nms: Callable
) -> None:
    boxes, scores = make_groups("clustered", 2, 300, np.random.default_rng(1))
    expected = greedy_nms(boxes, scores, iou, 0.0)
    np.testing.assert_array_equal(kernel(boxes, scores, iou, 0.0), expected)
    assert ((expected > 0).sum() == scores.size) == (iou == 1.0)


@pytest.mark.parametrize("count", [200, 700])
@pytest.mark.parametrize("order", [0, 1, 7])
def test_the_order_of_the_threads_changes_nothing(
    count: int, order: int, kernel: Callable, make_groups: Callable, greedy_nms: Callable
) -> None:
    boxes, scores = make_groups("holes", 4, count, np.random.default_rng(2))
    np.testing.assert_array_equal(kernel(boxes, scores, 0.4, 0.1, order), greedy_nms(boxes, scores, 0.4, 0.1))


@pytest.mark.parametrize(("groups", "count"), [(1, 8192), (1024, 7), (5, 1000)])
def test_the_largest_calls(
    groups: int, count: int, kernel: Callable, make_groups: Callable, greedy_nms: Callable
) -> None:
    boxes, scores = make_groups("clustered", groups, count, np.random.default_rng(3))
    scores[:, 200 + count // 20 :] = -1.0
    np.testing.assert_array_equal(kernel(boxes, scores, 0.5, 0.05), greedy_nms(boxes, scores, 0.5, 0.05))


@pytest.mark.parametrize("count", [100, 600])
def test_groups_where_nothing_counts(count: int, kernel: Callable, make_groups: Callable) -> None:
    boxes, scores = make_groups("random", 3, count, np.random.default_rng(4))
    scores[1] = np.nan
    kept = kernel(boxes, scores, 1.0, 0.0)
    assert (kept[1] == -1).all()
    np.testing.assert_array_equal(kept[[0, 2]], scores[[0, 2]])


@pytest.mark.parametrize("kind", ["random", "clustered", "nested", "identical"])
@pytest.mark.parametrize("count", [150, 500])
def test_the_kernel_is_torchvision_s_nms(
    kind: str, count: int, kernel: Callable, make_groups: Callable
) -> None:
    """Away from ties: no two scores are equal, and no overlap of these boxes is exactly 0.6."""
    boxes, scores = make_groups(kind, 2, count, np.random.default_rng([5, count]))
    kept = kernel(boxes, scores, 0.6, 0.0)
    for group in range(2):
        chosen = torchvision.ops.nms(torch.from_numpy(boxes[group]), torch.from_numpy(scores[group]), 0.6)
        assert np.flatnonzero(kept[group] > 0).tolist() == sorted(chosen.tolist())


def test_the_scratch_memory_stays_below_a_bit_for_each_pair() -> None:
    op = BatchedNMS(iou_threshold=0.5, score_threshold=0.0)
    for count in range(1, 8193):
        assert op.workspace_bytes(((3, count, 4), (3, count))) <= 3 * count * count / 8


def test_a_thousand_boxes_take_two_launches_and_a_few_take_one() -> None:
    op = BatchedNMS(iou_threshold=0.5, score_threshold=0.0)

    def kernels(groups: int, count: int) -> list[str]:
        shapes = ((groups, count, 4), (groups, count))
        return [launch.kernel for launch in op.launches(Call(shapes, ("float32",) * 2, (1, 2), 3, 4))]

    assert kernels(90, 1000) == ["nms_overlaps", "nms_select"]
    assert kernels(5, 256) == ["nms_small"]
    assert kernels(0, 256) == kernels(3, 0) == []


@pytest.mark.parametrize(("groups", "count"), [(1, 8193), (65536, 4)])
def test_calls_that_are_too_large_are_refused(groups: int, count: int) -> None:
    op = BatchedNMS(iou_threshold=0.5, score_threshold=0.0)
    shapes = ((groups, count, 4), (groups, count))
    with pytest.raises(ArtefactError, match="at most 65535 of 8192"):
        op.launches(Call(shapes, ("float32",) * 2, (1, 2), 3, 4))


@pytest.mark.parametrize("iou", [-0.1, 1.5, float("nan")])
def test_a_threshold_that_is_no_overlap_is_refused(iou: float) -> None:
    with pytest.raises(ArtefactError, match="iou_threshold"):
        BatchedNMS(iou_threshold=iou, score_threshold=0.0)


def test_the_arguments_are_what_the_kernels_declare() -> None:
    """The driver takes arguments by their size: an int for a long long would read past it."""
    op = BatchedNMS(iou_threshold=0.5, score_threshold=0.25)
    shapes = ((2, 300, 4), (2, 300))
    overlaps, select = op.launches(Call(shapes, ("float32",) * 2, (1, 2), 3, 4))
    pointer = ctypes.c_void_p
    tail = [ctypes.c_int, ctypes.c_float, ctypes.c_float]
    assert [type(a) for a in overlaps.arguments] == [pointer] * 3 + tail
    assert [type(a) for a in select.arguments] == [pointer] * 4 + [ctypes.c_int, ctypes.c_float]
    assert [a.value for a in overlaps.arguments] == [1, 2, 4, 300, 0.5, 0.25]
