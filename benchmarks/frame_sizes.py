"""What it costs that one file takes frames of any size: against files exported for the very canvas.

    python benchmarks/frame_sizes.py model.safetensors... [--frames 600x800 800x600] [--folder exports/]

From frame to boxes, the free file and the fixed one by turns, on each provider that is here; medians, and
their ratio. Beside it stands the ratio of the processor time, which other programs disturb less. Then in a
process of its own for each provider: the resident memory after the first frame size, and after twenty.
``--folder`` keeps the exported files. Rows go to ``results/frame_sizes.csv`` and ``frame_sizes_memory.csv``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from record import append_row

from anchorline.bench.work import peak_memory
from anchorline.data.synthetic import generate_scene
from anchorline.export import export_onnx
from anchorline.runtime import Detector
from anchorline.runtime.backends.openvino import has_openvino
from anchorline.runtime.canvas import frame_canvas

SIZES = 20
_SEED = 3


def main() -> None:
    """Measure, print and keep the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", type=Path, nargs="*")
    parser.add_argument("--frames", nargs="+", default=["600x800", "800x600"], metavar="HxW")
    parser.add_argument("--providers", nargs="+", default=["cpu", *(["openvino"] if has_openvino() else [])])
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-of", nargs=2, metavar=("MODEL", "PROVIDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(*memory_by_sizes(*options.memory_of))
        return
    with tempfile.TemporaryDirectory() as temporary:
        for checkpoint in options.checkpoints:
            folder = (options.folder or Path(temporary)) / checkpoint.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            measure(checkpoint, folder, options)


def measure(checkpoint: Path, folder: Path, options: argparse.Namespace) -> None:
    """The rows of one checkpoint."""
    command = f"python benchmarks/frame_sizes.py {checkpoint.parent.name}/{checkpoint.name}"
    free = exported(checkpoint, folder / "free.onnx", None)
    for shape in options.frames:
        height, width = map(int, shape.split("x"))
        fixed = exported(checkpoint, folder / f"fixed-{shape}.onnx", (height, width))
        for provider in options.providers:
            row = beside(free, fixed, provider, (height, width), options.repetitions)
            row = {"model": checkpoint.parent.name, "provider": provider, **row}
            print(row, flush=True)
            append_row("frame_sizes", command, row)
    for provider in [] if options.no_memory else options.providers:
        child = [sys.executable, __file__, "--memory-of", str(free), provider]
        first, after = subprocess.run(child, check=True, capture_output=True, text=True).stdout.split()
        row = {"model": checkpoint.parent.name, "provider": provider, "sizes": SIZES}
        row |= {"mib_after_one": first, "mib_after_all": after}
        print(row, flush=True)
        append_row("frame_sizes_memory", command, row)


def exported(checkpoint: Path, path: Path, frame_size: tuple[int, int] | None) -> Path:
    """The ONNX file at ``path``, made where it is not there."""
    if not path.exists():
        export_onnx(checkpoint, path, frame_size=frame_size, verify=False)
    return path


def beside(
    free: Path, fixed: Path, provider: str, size: tuple[int, int], repetitions: int
) -> dict[str, object]:
    """Both files on one frame, by turns, each first in every second round."""
    frame = generate_scene(_SEED, size)[0]
    with Detector(free, provider) as one, Detector(fixed, provider) as other:
        canvas = frame_canvas(size, one.contract)
        assert canvas == other.contract.canvas, f"the fixed file has {other.contract.canvas}, not {canvas}"
        found = [len(detector(frame)) for detector in (one, other)]
        # In bf16 another order of sums moves scores over the threshold: of drawn weights one in twenty.
        same = found[0] == found[1] if one.precision == "fp32" else min(found) > 0.8 * max(found)
        assert same, f"the files find {found} objects"
        wall, spent = np.zeros((2, repetitions, 2))
        for number in range(repetitions):
            for index in (0, 1) if number % 2 else (1, 0):
                start, start_spent = time.perf_counter(), time.process_time()
                (one, other)[index](frame)
                wall[number, index] = time.perf_counter() - start
                spent[number, index] = time.process_time() - start_spent
        (free_s, fixed_s), (free_spent, fixed_spent) = np.median(wall, axis=0), np.median(spent, axis=0)
        return {
            "precision": one.precision,
            "canvas": "{}x{}".format(*canvas),
            "detections": found[0],
            "repetitions": repetitions,
            "fixed_ms": f"{1000 * fixed_s:.1f}",
            "free_ms": f"{1000 * free_s:.1f}",
            "ratio": f"{free_s / fixed_s:.3f}",
            "processor_time_ratio": f"{free_spent / fixed_spent:.3f}",
        }


def memory_by_sizes(model: str, provider: str) -> tuple[int, int]:
    """MiB at most resident after a frame size with the largest canvas, and after ``SIZES`` in all.

    Three frames of each, since OpenVINO keeps what it prepared for a shape.
    """
    rng = np.random.default_rng(0)
    found = []
    with Detector(model, provider) as detector:
        for height, width in [(720, 1200), *rng.integers(240, 1200, (SIZES - 1, 2)).tolist()]:
            frame = generate_scene(_SEED, (height, width))[0]
            for _ in range(3):
                detector(frame)
            found.append(round(peak_memory()))
    return found[0], found[-1]


if __name__ == "__main__":
    main()
