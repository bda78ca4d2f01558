"""Time of the BatchedNMS kernel beside torchvision's NMS on the same boxes, on a GPU.

    python benchmarks/nms_kernel.py

For each (G, N): ours is the sort that precedes the op in the graph and the op itself; torchvision's is
``batched_nms`` over all G * N boxes (``nms`` for one group), which sorts inside. Both keep the same boxes,
or the script stops. Medians of CUDA-event times after a warm-up; one row each goes to
``results/nms_kernel.csv``. Needs a GPU and PyTorch with CUDA.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch
import torchvision
from record import append_row

from anchorline.runtime.tensorrt import plugins
from anchorline.runtime.tensorrt.plugins import BatchedNMS, Call

CASES = ((5, 1000), (90, 1000), (40, 1000), (1, 6000))
IOU, SCORE = 0.5, 0.0
WARM_UP, REPEATS = 20, 200


def main() -> None:
    """Measure each case, print it and append its row."""
    if not torch.cuda.is_available():
        sys.exit("nms_kernel.py: no NVIDIA GPU here; run it on a machine with one")
    for groups, count in CASES:
        boxes, scores = clustered(groups, count)
        op = BatchedNMS(iou_threshold=IOU, score_threshold=SCORE)
        kept, ours = prepared(op, boxes, scores)
        theirs = torchvision_nms(boxes, scores)
        ours()
        if int((kept > SCORE).sum()) != len(theirs()):
            sys.exit(
                f"({groups}, {count}): {int((kept > SCORE).sum())} boxes kept, torchvision {len(theirs())}"
            )
        figures = {"ours_us": median_us(ours), "torchvision_us": median_us(theirs)}
        figures["ratio"] = figures["torchvision_us"] / figures["ours_us"]
        print(f"({groups}, {count}): " + ", ".join(f"{name} {value:.1f}" for name, value in figures.items()))
        append_row(
            "nms_kernel",
            "python benchmarks/nms_kernel.py",
            {
                "gpu": torch.cuda.get_device_name(),
                "groups": groups,
                "boxes": count,
                "kept": int((kept > SCORE).sum()),
                **{name: f"{value:.1f}" for name, value in figures.items()},
            },
        )


def clustered(groups: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes [G, N, 4] around a few objects, as a detector gives them, and unsorted scores [G, N]."""
    torch.manual_seed(0)
    corner = torch.rand(groups, count // 20, 2) * 800
    objects = torch.cat([corner, corner + 40 + torch.rand(groups, count // 20, 2) * 300], dim=2)
    chosen = torch.randint(count // 20, (groups, count, 1)).expand(-1, -1, 4)
    boxes = torch.gather(objects, 1, chosen) + torch.randn(groups, count, 4) * 6
    return boxes.cuda(), torch.rand(groups, count).clamp_min(1e-6).cuda()


def prepared(
    op: BatchedNMS, boxes: torch.Tensor, scores: torch.Tensor
) -> tuple[torch.Tensor, Callable[[], None]]:
    """The output and a function that fills it: sort, gather, kernel; memory is allocated once."""
    shapes = (tuple(boxes.shape), tuple(scores.shape))
    kept = torch.empty_like(scores)
    scratch = torch.empty(op.workspace_bytes(shapes), dtype=torch.uint8, device="cuda")

    def run() -> None:
        ranked, order = scores.sort(dim=1, descending=True)
        sorted_boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
        call = Call(
            shapes,
            ("float32", "float32"),
            (sorted_boxes.data_ptr(), ranked.data_ptr()),
            kept.data_ptr(),
            scratch.data_ptr(),
        )
        plugins.launch(op.launches(call), torch.cuda.current_stream().cuda_stream)

    return kept, run


def torchvision_nms(boxes: torch.Tensor, scores: torch.Tensor) -> Callable[[], torch.Tensor]:
    """torchvision's way for the same groups."""
    flat_boxes, flat_scores = boxes.reshape(-1, 4), scores.reshape(-1)
    groups = torch.arange(len(boxes), device="cuda").repeat_interleave(boxes.shape[1])
    if len(boxes) == 1:
        return lambda: torchvision.ops.nms(flat_boxes, flat_scores, IOU)
    return lambda: torchvision.ops.batched_nms(flat_boxes, flat_scores, groups, IOU)


def median_us(work: Callable[[], object]) -> float:
    """Median time of a call in microseconds, by CUDA events around each."""
    for _ in range(WARM_UP):
        work()
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return statistics.median(times)


if __name__ == "__main__":
    main()
