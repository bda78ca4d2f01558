"""The kernels on the CPU, and groups of boxes of every awkward kind."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from anchorline.runtime.tensorrt.kernels import FOLDER, Launch

HERE = Path(__file__).resolve().parent
Groups = tuple[NDArray[np.float32], NDArray[np.float32]]


@pytest.fixture(scope="session")
def run_on_host(once: Callable[[str, Callable[[Path], None]], Path]) -> Callable[[Launch, int], None]:
    """``run(launch, order)``: the kernel's own source, built by g++, in a given order of the threads."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to build the CUDA source for the CPU")
    # No contraction: each float32 operation is rounded on its own, as nvcc -fmad=false does it.
    options = ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    command = [compiler, *options, f"-I{FOLDER}", str(HERE / "host_kernels.cpp"), "-o"]

    def make(folder: Path) -> None:
        subprocess.run([*command, str(folder / "libkernels.so")], check=True, timeout=120)

    kernels = ctypes.CDLL(str(once("kernels", make) / "libkernels.so"))

    def run(launch: Launch, order: int = 0) -> None:
        grid = (ctypes.c_uint32 * 3)(*launch.grid)
        threads = ctypes.c_uint32(launch.threads)
        kernels[f"host_{launch.kernel}"](grid, threads, ctypes.c_int(order), *launch.arguments)

    return run


@pytest.fixture(scope="session")
def greedy_nms() -> Callable[..., NDArray[np.float32]]:
    """The definition, entry by entry in NumPy: ``greedy(boxes, scores, iou, score) -> kept [G, N]``."""

    def group(
        boxes: NDArray[np.float32], scores: NDArray[np.float32], iou: float, score: float
    ) -> NDArray[np.float32]:
        width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        area = width * height
        alive = (scores > np.float32(score)) & (width > 0) & (area > 0) & (area < np.inf)
        kept = np.full_like(scores, -1)
        for i in range(len(boxes)):
            if not alive[i]:
                continue
            kept[i] = scores[i]
            sides = np.minimum(boxes[i, 2:], boxes[:, 2:]) - np.maximum(boxes[i, :2], boxes[:, :2])
            inter = np.prod(np.maximum(sides, 0), axis=1, dtype=np.float32)
            alive &= ~(inter / (area[i] + area - inter) > np.float32(iou))
        return kept

    def greedy(
        boxes: NDArray[np.float32], scores: NDArray[np.float32], iou: float, score: float
    ) -> NDArray[np.float32]:
        with np.errstate(all="ignore"):
            return np.stack([group(b, s, iou, score) for b, s in zip(boxes, scores, strict=True)])

    return greedy


@pytest.fixture(scope="session")
def make_groups() -> Callable[..., Groups]:
    """``make(kind, groups, boxes, generator)``: boxes [G, N, 4] and scores [G, N] in falling order."""

    def make(kind: str, groups: int, count: int, generator: np.random.Generator) -> Groups:
        boxes = _KINDS[kind](groups, count, generator).astype(np.float32)
        scores = -np.sort(-generator.random((groups, count), np.float32), axis=1)
        if kind == "tied scores":
            scores = np.round(scores, 1)
        if kind == "holes":
            _spoil(boxes, scores, generator)
        return np.ascontiguousarray(boxes), np.ascontiguousarray(scores)

    return make


def _random(groups: int, count: int, generator: np.random.Generator) -> NDArray[np.float64]:
    corner = generator.uniform(-50, 600, (groups, count, 2))
    return np.concatenate([corner, corner + generator.uniform(1, 300, (groups, count, 2))], axis=2)


def _clustered(groups: int, count: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """A few objects, each with many boxes a few pixels apart, as a detector gives them."""
    objects = _random(groups, max(1, count // 20), generator) + np.array([0.0, 0.0, 60.0, 60.0])
    chosen = generator.integers(0, objects.shape[1], (groups, count))
    boxes = np.take_along_axis(objects, chosen[..., None], axis=1)
    return boxes + generator.normal(0, 6, boxes.shape)


def _identical(groups: int, count: int, generator: np.random.Generator) -> NDArray[np.float64]:
    return np.broadcast_to(_random(groups, 1, generator), (groups, count, 4))


def _nested(groups: int, count: int, generator: np.random.Generator) -> NDArray[np.float64]:
    inset = np.arange(count) * 150.0 / count
    box = np.stack([inset, inset, 400 - inset, 400 - inset], axis=1)
    return np.stack([generator.permutation(box) for _ in range(groups)])


def _tied(groups: int, count: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Whole coordinates from 0 to 10: overlaps of exactly 0.5, 0.3 and the like are common."""
    corner = generator.integers(0, 10, (groups, count, 2))
    return np.concatenate([corner, corner + generator.integers(1, 10, (groups, count, 2))], axis=2)


def _row(groups: int, count: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Each box overlaps its neighbours: a chain of suppression as long as the row."""
    left = np.arange(count) * 3.0
    box = np.stack([left, np.zeros(count), left + 10, np.full(count, 10.0)], axis=1)
    return np.broadcast_to(box, (groups, count, 4))


_KINDS = {
    "random": _random,
    "clustered": _clustered,
    "identical": _identical,
    "nested": _nested,
    "tied overlaps": _tied,
    "tied scores": _clustered,
    "row": _row,
    "holes": _clustered,
}


def _spoil(boxes: NDArray[np.float32], scores: NDArray[np.float32], generator: np.random.Generator) -> None:
    """Make two entries of five, wherever they stand, such that they must not count."""
    damage = generator.integers(0, 30, scores.shape)
    scores[damage == 0] = np.nan
    scores[(damage == 1) | (damage == 2)] = -1.0
    boxes[damage == 3, 0] = np.nan
    boxes[damage == 4, 3] = np.inf
    boxes[damage == 5, 2] = boxes[damage == 5, 0]
    boxes[damage == 6] = boxes[damage == 6][:, [2, 3, 0, 1]]  # both sides negative, the area positive
    boxes[damage == 7] = (-3e38, -3e38, 3e38, 3e38)
    boxes[damage == 8] = 0.0
    boxes[damage == 9] = (0.0, 0.0, 1e-30, 1e-30)  # an area that rounds to 0
    boxes[damage == 10] = (-np.inf, 0.0, np.inf, 5.0)
