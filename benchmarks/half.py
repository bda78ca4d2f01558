"""What half precision costs in accuracy: a model in float32 against itself with everything really rounded.

    python benchmarks/half.py RUN/model.onnx --data voc:DIR@test --name PRESET

The graph that ``anchorline build`` would compile is made (``to_precision``, activations checked on the
first images of the data), then simulated in float32 with every half-precision weight and activation
passed through float16, and evaluated by onnxruntime's CPU provider beside the exported file. One row
goes to ``results/half.csv``; the exit code is 1 when mAP50 differs by more than 0.003.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import onnx
from record import append_row

from anchorline.data.dataset import Dataset, load_dataset
from anchorline.engine.fp16_range import network_inputs, simulate_half
from anchorline.engine.graph import check_exported, read_model
from anchorline.engine.mixed_precision import PrecisionReport, to_precision
from anchorline.evaluation.evaluation import EvaluationReport, evaluate
from anchorline.runtime import Detector

TOLERANCE = 0.003


def main() -> None:
    """Convert, evaluate both, print, append the row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--name", required=True, help="what the row calls the model: preset and seed")
    parser.add_argument("--samples", type=int, default=8, help="images to check activations on")
    arguments = parser.parse_args()
    model = read_model(arguments.model)
    dataset = load_dataset(arguments.data, check_exported(model).names)
    simulated, report = rounded(model, dataset, arguments.samples)
    print("\n".join(report.lines()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "half.onnx"
        onnx.save(simulated, path)
        full, half = measure(arguments.model, dataset), measure(path, dataset)
    difference = half.map50 - full.map50
    print(f"mAP50 fp32 {full.map50:.4f}, fp16 {half.map50:.4f} ({difference:+.4f})")
    print(f"mAP   fp32 {full.map:.4f}, fp16 {half.map:.4f} ({half.map - full.map:+.4f})")
    append_row(
        "half",
        "python benchmarks/half.py model.onnx --data voc:bccd@test",
        {
            "model": arguments.name,
            "samples": report.samples,
            "half_nodes": len(report.half),
            "kept_fp32": len(report.kept),
            "largest_activation": f"{report.largest[1]:.4g}" if report.largest else "",
            "map50_fp32": f"{full.map50:.4f}",
            "map50_fp16": f"{half.map50:.4f}",
            "map_fp32": f"{full.map:.4f}",
            "map_fp16": f"{half.map:.4f}",
        },
    )
    sys.exit(0 if abs(difference) <= TOLERANCE else 1)


def rounded(
    model: onnx.ModelProto, dataset: Dataset, samples: int
) -> tuple[onnx.ModelProto, PrecisionReport]:
    """The float32 form of the half-precision graph, and the report of the conversion."""
    frames = [image.load() for image in list(dataset)[:samples]]
    mixed, report = to_precision(model, "fp16", network_inputs(frames, check_exported(model)))
    return simulate_half(mixed), report


def measure(path: Path, dataset: Dataset) -> EvaluationReport:
    """The accuracy of the file at ``path`` on onnxruntime's CPU provider."""
    with Detector(path, provider="cpu") as detector:
        return evaluate(detector.batch, dataset, batch=1, provider="cpu", precision=detector.precision)


if __name__ == "__main__":
    main()
