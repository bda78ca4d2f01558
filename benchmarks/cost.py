"""What a detector's time on a processor depends on: canvas, batch, proposals; and where it goes.

    python benchmarks/cost.py RUN/model.safetensors [--plot benchmarks/reports/images/cost.png]

The checkpoint is exported again with other canvases and other numbers of proposals, and run on
onnxruntime's CPU provider in fp32 on generated scenes of the canvas's own size, all variants in turn. Beside
each time stands the rate of its multiplications (2 a multiply-add; convolutions and matrix products, without
pooling and resampling), to be read against that of one large matrix product of PyTorch's, measured in the
same run. ``--operators`` adds onnxruntime's own profile: milliseconds a call by operator. Rows go to
``results/cost.csv``.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from record import append_row
from torch.utils.flop_counter import FlopCounterMode

from anchorline.data.synthetic import generate_scene
from anchorline.export import export_onnx
from anchorline.runtime import Detector
from anchorline.runtime.backends.cpu_options import usable_cores
from anchorline.train.checkpoint import contract_of, load_checkpoint, save_checkpoint

SCALES = (0.5, 0.75, 1.0, 1.5, 2.0)  # of the canvas's sides
BATCHES = (1, 2, 4, 8)
PROPOSALS = (50, 100, 300, 1000)
MATRIX = 2048
PAUSE = 0.05  # seconds; threads of the variant before may still be spinning
Frame = NDArray[np.uint8]


@dataclass(frozen=True)
class Variant:
    """One point of one curve."""

    series: str
    value: float
    canvas: tuple[int, int]
    proposals: int
    batch: int = 1


def main() -> None:
    """Measure the curves, print and keep the rows, draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--series", nargs="*", default=["canvas", "batch", "proposals"])
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--operators", action="store_true", help="profile the checkpoint as it is")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="print the rows and write none")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rate = matrix_rate(options.repetitions)
    print(f"one {MATRIX} x {MATRIX} matrix product: {rate:.0f} GFLOP/s", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        variants = list(variants_of(options.checkpoint, options.series))
        rows = measure(options.checkpoint, variants, Path(folder), options, rate)
        if options.operators:
            profile(options.checkpoint, Path(folder), options)
    for row in rows:
        print(row)
        if not options.dry_run:
            append_row("cost", f"python benchmarks/cost.py {options.checkpoint.name}", row)
    if options.plot is not None:
        draw(rows, options.plot)


def variants_of(checkpoint: Path, series: Sequence[str]) -> list[Variant]:
    """The points of the curves; the checkpoint's own canvas and number of proposals elsewhere."""
    settings = load_checkpoint(checkpoint)[0].settings
    canvas, proposals = settings.canvas, settings.rpn_post_nms
    found = {
        "canvas": [
            Variant("canvas", float(np.prod(sides)), sides, proposals)
            for sides in ((_multiple(canvas[0] * s), _multiple(canvas[1] * s)) for s in SCALES)
        ],
        "batch": [Variant("batch", count, canvas, proposals, count) for count in BATCHES],
        "proposals": [Variant("proposals", count, canvas, count) for count in PROPOSALS],
    }
    return [variant for name in series for variant in found[name]] or [Variant("own", 1, canvas, proposals)]


def _multiple(side: float) -> int:
    return max(32, round(side / 32) * 32)


def measure(
    checkpoint: Path, variants: Sequence[Variant], folder: Path, options: argparse.Namespace, rate: float
) -> list[dict[str, Any]]:
    """A row for each variant; repetitions go over all variants in turn."""
    detectors = [
        Detector(exported(checkpoint, each, folder), "cpu", threads=options.threads) for each in variants
    ]
    frames = [[generate_scene(0, each.canvas, n)[0] for n in range(each.batch)] for each in variants]
    calls: list[Callable[[], object]] = [
        lambda detector=detector, group=group: detector.batch(group)
        for detector, group in zip(detectors, frames, strict=True)
    ]
    for call in calls:
        call()
    seconds = np.array([[timed(call) for call in calls] for _ in range(options.repetitions)])
    rows = []
    for variant, times in zip(variants, seconds.T, strict=True):
        flops = variant.batch * multiplications(checkpoint, variant)
        rows.append(
            {
                "series": variant.series,
                "canvas": f"{variant.canvas[0]}x{variant.canvas[1]}",
                "batch": variant.batch,
                "proposals": variant.proposals,
                "threads": options.threads,
                "ms_per_frame": f"{1000 * np.median(times) / variant.batch:.2f}",
                "gflop_per_frame": f"{flops / variant.batch / 1e9:.2f}",
                "gflop_per_s": f"{flops / np.median(times) / 1e9:.1f}",
                "matrix_gflop_per_s": f"{rate:.1f}",
            }
        )
    return rows


def exported(checkpoint: Path, variant: Variant, folder: Path) -> Path:
    """The ONNX file of a variant, made once."""
    height, width = variant.canvas
    out = folder / f"{height}x{width}-{variant.proposals}.onnx"
    if not out.exists():
        changed = folder / "changed.safetensors"
        model, contract = load_checkpoint(checkpoint)
        settings = dataclasses.replace(
            model.settings,
            canvas=variant.canvas,
            rpn_post_nms=variant.proposals,
            rpn_pre_nms=max(model.settings.rpn_pre_nms, variant.proposals),
        )
        save_checkpoint(changed, model.state_dict(), settings, contract_of(settings, contract.names))
        export_onnx(changed, out, canvas=variant.canvas, max_batch=max(BATCHES), verify=False)
    return out


def multiplications(checkpoint: Path, variant: Variant) -> float:
    """Floating-point operations of one frame's convolutions and matrix products."""
    model, _ = load_checkpoint(checkpoint)
    height, width = variant.canvas
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        features = model.backbone(torch.zeros(1, 3, height, width))
        model.rpn.head(features)
        model.roi_heads.classify(features, torch.zeros(1, variant.proposals, 4))
    return float(counter.get_total_flops())


def matrix_rate(repetitions: int) -> float:
    """GFLOP/s of one large matrix product: the median."""
    one, other = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    times = [timed(lambda: one @ other) for _ in range(repetitions + 2)][2:]
    return 2 * MATRIX**3 / float(np.median(times)) / 1e9


def timed(call: Callable[[], object]) -> float:
    time.sleep(PAUSE)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def profile(checkpoint: Path, folder: Path, options: argparse.Namespace) -> None:
    """Print the milliseconds of one call by operator, as onnxruntime's profiler sees them."""
    import onnxruntime

    settings = load_checkpoint(checkpoint)[0].settings
    own = Variant("own", 1, settings.canvas, settings.rpn_post_nms)
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = options.threads
    session_options.enable_profiling = True
    session_options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(
        exported(checkpoint, own, folder), session_options, providers=["CPUExecutionProvider"]
    )
    height, width = own.canvas
    inputs = {
        "images": generate_scene(0, own.canvas, 0)[0][None],
        "image_sizes": np.array([[height, width]], np.float32),
    }
    wanted = {each.name: each.type for each in session.get_inputs()}
    if wanted["images"] == "tensor(float)":
        inputs["images"] = inputs["images"].astype(np.float32)
    for _ in range(options.repetitions):
        session.run(None, {name: inputs[name] for name in wanted})
    spent: collections.Counter[str] = collections.Counter()
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    total = sum(spent.values())
    for operator, microseconds in spent.most_common(12):
        share = microseconds / total
        print(f"{operator:20} {microseconds / 1000 / options.repetitions:9.2f} ms {share:6.1%}")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Three curves: milliseconds a frame against canvas area, batch and proposals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    highest = 1.05 * max(float(row["ms_per_frame"]) for row in rows)
    labels = {"canvas": "canvas, megapixels", "batch": "frames in a batch", "proposals": "proposals"}
    for axes, (name, label) in zip(figure.subplots(1, 3), labels.items(), strict=True):
        points = [(place(row, name), float(row["ms_per_frame"])) for row in rows if row["series"] == name]
        axes.plot(*zip(*points, strict=True), "o-", color="#0072b2")
        axes.set_xlabel(label)
        axes.set_ylabel("ms a frame")
        axes.set_ylim(0, highest)
        axes.set_xlim(0)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def place(row: dict[str, Any], series: str) -> float:
    if series != "canvas":
        return float(row[series])
    height, width = map(int, row["canvas"].split("x"))
    return height * width / 1e6


if __name__ == "__main__":
    main()
