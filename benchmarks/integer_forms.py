"""The forms that 8-bit products can have in a file for processors: what each costs and keeps, in one run.

    python benchmarks/integer_forms.py model.onnx --calibrate voc:DIR@train --data voc:DIR@val

Every layer that can be is in integers, none goes back to float, but in the file of ``--quantised``. mAP50 is
on ``--data``; the time is that of the process on one thread (so that other work on the machine counts
little), the median over frames which all forms take in turns. Whether this processor adds products in 16
bits, which saturate, is tried out. Rows go to ``results/integer_forms.csv``.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, qdq_quantizer
from record import append_row

from anchorline.data.dataset import load_datasets
from anchorline.evaluation.evaluation import evaluate
from anchorline.export.calibration import measure_ranges
from anchorline.export.integer_graph import find_layers, observed_tensors, quantized
from anchorline.export.quantization import evenly, read_float_model
from anchorline.runtime import Detector
from anchorline.runtime.backends import onnxruntime as backend
from anchorline.runtime.contract import CONTRACT_KEY

# By name: the weights' type, whether they have 7 bits, whether the rounded values are multiplied in float.
FORMS = {
    "float32": None,
    "u8 x s8, 8 bits": (QuantType.QInt8, False, False),
    "u8 x s8, 8 bits, in float32": (QuantType.QInt8, False, True),
    "u8 x s8, 7 bits": (QuantType.QInt8, True, False),
    "u8 x u8, 8 bits": (QuantType.QUInt8, False, False),
}


def main() -> None:
    """Write, evaluate and time every form."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibrate", required=True, metavar="SPEC")
    parser.add_argument("--data", required=True, metavar="SPEC")
    parser.add_argument("--quantised", type=Path, help="what anchorline quantize made of the model, as a row")
    parser.add_argument("--images", type=int, default=60, help="to calibrate on")
    parser.add_argument("--frames", type=int, default=15, help="to time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = write_forms(options.model, options.calibrate, options.images, Path(folder))
        if options.quantised is not None:
            paths["as quantised"] = options.quantised
        detectors = {name: open_form(path) for name, path in paths.items()}
        data = load_datasets([options.data], detectors["float32"].contract.names)
        accuracy = {n: evaluate(each.batch, data, provider="cpu").map50 for n, each in detectors.items()}
        frames = [image.load() for image in evenly(data.images, options.frames)]
        times: dict[str, list[float]] = {name: [] for name in detectors}
        for frame in frames:
            for name, detector in detectors.items():
                start = time.process_time()
                detector(frame)
                times[name].append(time.process_time() - start)
    medians = {name: float(np.median(each)) for name, each in times.items()}
    for name, seconds in medians.items():
        row = {
            "canvas": detectors[name].contract.frame_sizes,
            "adds_in": f"{16 if saturates() else 32} bits",
            "form": name,
            "data": Path(options.data).name,
            "images": len(data),
            "map50": f"{accuracy[name]:.4f}",
            "cpu_ms_per_frame": f"{seconds * 1e3:.1f}",
            "faster_than_float": f"{medians['float32'] / seconds:.2f}",
        }
        print(row)
        append_row("integer_forms", shlex.join(["python", *sys.argv]), row)


def write_forms(path: Path, spec: str, count: int, folder: Path) -> dict[str, Path]:
    """The model in every form, calibrated on the same images."""
    with Detector(path, "cpu", threads=1) as detector:
        contract = detector.contract
        model = read_float_model(path, contract)
        layers = [layer for layer in find_layers(model.graph) if not layer.last]
        images = evenly(load_datasets([spec], contract.names).images, count)
        inputs = (detector.prepare([image.load()])[0] for image in images)
        ranges = measure_ranges(model, observed_tensors(model, layers), inputs, len(images), "mse")
    written = {"float32": path}
    for name, form in FORMS.items():
        if form is None:
            continue
        weights, reduced, in_float = form
        with mock.patch.object(qdq_quantizer, "QDQQuantizer", forced(weights, reduced)):
            made = quantized(model, layers, ranges, "cpu")
        source = {"quantised": {"for": "cpu", "weight_bits": 8 if in_float else 7}}  # obeyed by `open_form`
        told = dataclasses.replace(contract, precision="int8", source=source)
        del made.metadata_props[:]
        helper.set_model_props(made, {CONTRACT_KEY: told.to_json()})
        written[name] = folder / f"{len(written)}.onnx"
        onnx.save(made, written[name])
    return written


def forced(weights: QuantType, reduced: bool) -> Callable[..., qdq_quantizer.QDQQuantizer]:
    """onnxruntime's quantiser with another form of weights than it is asked for."""
    quantizer = qdq_quantizer.QDQQuantizer

    def make(*arguments: object, **named: object) -> qdq_quantizer.QDQQuantizer:
        return quantizer(*arguments, **{**named, "weight_qType": weights, "reduce_range": reduced})

    return make


def open_form(path: Path) -> Detector:
    """As the runtime opens it on a processor without VNNI where the form wants that."""
    with mock.patch.object(backend, "adds_in_16_bits", return_value=True):
        return Detector(path, "cpu", threads=1)


def saturates() -> bool:
    """Whether onnxruntime's sum of 32 products 255 x 127 is wrong here."""
    product = helper.make_graph(
        [helper.make_node("MatMulInteger", ["rows", "weights"], ["sums"])],
        "product",
        [helper.make_tensor_value_info("rows", TensorProto.UINT8, [1, 32])],
        [helper.make_tensor_value_info("sums", TensorProto.INT32, [1, 1])],
        [numpy_helper.from_array(np.full((32, 1), 127, np.int8), "weights")],
    )
    model = helper.make_model(product, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = backend.open_for_checks(model.SerializeToString())
    return bool(session.run(None, {"rows": np.full((1, 32), 255, np.uint8)})[0][0, 0] != 32 * 255 * 127)


if __name__ == "__main__":
    main()
