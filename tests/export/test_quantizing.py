"""INT8: what becomes integers, what stays float, and what the search does with a layer that must."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from anchorline import cli
from anchorline.data.dataset import Dataset, LabelledImage, load_datasets
from anchorline.data.synthetic import generate_scene
from anchorline.evaluation.evaluation import evaluate
from anchorline.export import calibration
from anchorline.export import integer_graph as quantizing_graph
from anchorline.export import quantization as quantizing_search
from anchorline.export.calibration import measure_ranges, measure_sensitivity
from anchorline.export.functions import attach_functions
from anchorline.export.integer_graph import find_layers, observed_tensors, quantized
from anchorline.export.quantization import Loss, LossMeter, Trial, fewest_float, quantize_onnx
from anchorline.runtime.backends import onnxruntime as onnxruntime_backend
from anchorline.runtime.backends.onnxruntime import OnnxRuntimeBackend, exact_sums, open_for_checks
from anchorline.runtime.contract import CONTRACT_KEY, Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import AnchorlineError, ParityError
from anchorline.runtime.io.images import write_image
from anchorline.runtime.model_file import DIGEST_KEY
from anchorline.verify import verify
from anchorline.verify.stages import is_stage
from anchorline.verify.verification import record_path

SIDE, CELLS, CHANNELS = 64, 16, 8
PROPOSALS = DETECTIONS = CELLS * CELLS
LAST = ("rpn.cls_logits", "rpn.bbox_pred", "roi.cls_score", "roi.bbox_pred")
INTEGER = ("body.0", "body.1", "body.2", "fpn", "rpn.conv", "roi.fc6", "roi.fc7")
FC6, FC7 = "model.roi.fc6", "model.roi.fc7"
CONTRACT = Contract(
    "detections", ("cat", "dog"), (SIDE, SIDE), (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
)


class Graph:
    """A graph in the making: nodes, and weights drawn so that features neither fade nor grow."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(3)

    def add(self, op: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], f"n_{output}", domain=domain, **attributes))
        return output

    def const(self, name: str, values: Any, dtype: Any = np.float32) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def layer(
        self,
        op: str,
        value: str,
        name: str,
        shape: tuple[int, ...],
        output: str,
        gain: float = 1.4,
        **attributes: Any,
    ) -> str:
        spread = gain / np.sqrt(np.prod(shape[1:]))
        weight = self.const(f"model.{name}.weight", self._random.normal(0, spread, shape))
        bias = self.const(f"model.{name}.bias", self._random.normal(0, 0.1, shape[0]))
        return self.add(op, [value, weight, bias], output, **attributes)


def tiny_detector() -> onnx.ModelProto:
    """Faster R-CNN with a layer of each kind: a residual, FPN, RPN, RoIAlign and two fully connected.

    Every cell is proposed, every proposal has room among the detections, and NMS takes only what coincides:
    where a rounding decided which of two alike boxes stays, so would the processor's own.
    """
    g, c = Graph(), CHANNELS
    three = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    g.add("Cast", ["images"], "floats", to=TensorProto.FLOAT)
    g.add("Transpose", ["floats"], "planes", perm=[0, 3, 1, 2])
    for name, values in (("mean", CONTRACT.mean), ("std", CONTRACT.std)):
        g.const(name, np.reshape(values[::-1], (1, 3, 1, 1)))
    g.add("Div", [g.add("Sub", ["planes", "mean"], "centred"), "std"], "pixels")
    g.layer("Conv", "pixels", "body.0", (c, 3, 3, 3), "c0", strides=[2, 2], **three)
    g.layer("Conv", g.add("Relu", ["c0"], "r0"), "body.1", (c, c, 3, 3), "c1", strides=[2, 2], **three)
    g.layer("Conv", g.add("Relu", ["c1"], "r1"), "body.2", (c, c, 1, 1), "c2")
    g.add("Add", ["c2", "r1"], "backbone.0")
    g.layer("Conv", "backbone.0", "fpn", (c, c, 1, 1), "fpn.0")
    g.layer("Conv", "fpn.0", "rpn.conv", (c, c, 3, 3), "t0", **three)
    g.add("Relu", ["t0"], "t")
    g.layer("Conv", "t", "rpn.cls_logits", (1, c, 1, 1), "o0")
    g.layer("Conv", "t", "rpn.bbox_pred", (4, c, 1, 1), "d0")
    _proposals(g)
    _second_stage(g)
    return _finish(g)


def _proposals(g: Graph) -> None:
    g.add("Reshape", ["o0", g.const("flat", [0, -1], np.int64)], "objectness")
    g.add("Transpose", ["d0"], "d1", perm=[0, 2, 3, 1])
    g.add("Reshape", ["d1", g.const("rows", [0, -1, 4], np.int64)], "bbox_deltas")
    y, x = (v.reshape(-1) * 4.0 for v in np.mgrid[:CELLS, :CELLS])
    g.const("anchors", np.stack((x - 8, y - 8, x + 12, y + 12), axis=1)[None])
    g.add("Add", ["bbox_deltas", "anchors"], "all_boxes")
    g.const("most", [PROPOSALS], np.int64)
    g.nodes.append(helper.make_node("TopK", ["objectness", "most"], ["best", "index"], "n_topk"))
    g.add("Unsqueeze", ["index", g.const("last", [-1], np.int64)], "index_1")
    g.add("Expand", ["index_1", g.const("fours", [1, 1, 4], np.int64)], "index_4")
    g.add("GatherElements", ["all_boxes", "index_4"], "picked", axis=1)
    g.add("Clip", ["picked", g.const("low", 0.0), g.const("high", float(SIDE))], "proposals")
    g.add("Sigmoid", ["best"], "proposal_scores")


def _second_stage(g: Graph) -> None:
    g.add("Mul", ["proposals", g.const("quarter", 0.25)], "rois")
    plugin = {"plugin_namespace": "anchorline", "plugin_version": "1"}
    g.add(
        "RoIAlign", ["fpn.0", "rois"], "roi_features", "anchorline", output_size=3, sampling_ratio=2, **plugin
    )
    g.add("Flatten", ["roi_features"], "f0")
    g.layer("Gemm", "f0", "roi.fc6", (24, 9 * CHANNELS), "f1", transB=1)
    g.layer("Gemm", g.add("Relu", ["f1"], "f2"), "roi.fc7", (24, 24), "f3", transB=1)
    g.add("Relu", ["f3"], "f4")
    g.layer("Gemm", "f4", "roi.cls_score", (3, 24), "class_logits", gain=2.5, transB=1)
    g.layer("Gemm", "f4", "roi.bbox_pred", (4, 24), "box_regression", transB=1)
    g.add("Softmax", ["class_logits"], "softmax", axis=-1)
    shape = g.const("per_image", [-1, PROPOSALS, 3], np.int64)
    g.add("Reshape", ["softmax", shape], "classes")
    g.add(
        "Slice", ["classes", g.const("from", [1], np.int64), g.const("to", [3], np.int64), "minus"], "things"
    )
    g.const("minus", [2], np.int64)
    g.add("ReduceMax", ["things", "minus"], "score", keepdims=0)
    g.add("ArgMax", ["things"], "class", axis=2, keepdims=0)
    g.add("Reshape", ["box_regression", g.const("box_rows", [-1, PROPOSALS, 4], np.int64)], "moves")
    g.add("Add", ["proposals", "moves"], "moved")
    thresholds = {"iou_threshold": 0.95, "score_threshold": 0.05}
    g.add("BatchedNMS", ["moved", "score"], "kept", "anchorline", **thresholds, **plugin)
    g.const("most_detections", [DETECTIONS], np.int64)
    g.nodes.append(helper.make_node("TopK", ["kept", "most_detections"], ["top", "order"], "n_top"))
    g.add("Greater", ["top", g.const("threshold", 0.05)], "valid")
    g.add("Where", ["valid", "top", g.const("zero", 0.0)], "scores")
    g.add("Cast", ["valid"], "valid_1", to=TensorProto.INT32)
    g.add("ReduceSum", ["valid_1", g.const("one", [1], np.int64)], "num_detections", keepdims=0)
    g.add("GatherElements", ["class", "order"], "class_1", axis=1)
    g.add("Cast", ["class_1"], "class_2", to=TensorProto.INT32)
    g.add("Mul", ["class_2", "valid_1"], "labels")
    g.add("Unsqueeze", ["order", "last"], "order_1")
    g.add("Expand", ["order_1", "fours"], "order_4")
    g.add("GatherElements", ["moved", "order_4"], "boxes_1", axis=1)
    g.add("Unsqueeze", ["valid", "last"], "valid_3")
    g.add("Where", ["valid_3", "boxes_1", "zero"], "boxes")


def _finish(g: Graph) -> onnx.ModelProto:
    info = helper.make_tensor_value_info
    inputs = [
        info("images", TensorProto.UINT8, ["B", SIDE, SIDE, 3]),
        info("image_sizes", TensorProto.FLOAT, ["B", 2]),
    ]
    outputs = [
        info("boxes", TensorProto.FLOAT, ["B", DETECTIONS, 4]),
        info("scores", TensorProto.FLOAT, ["B", DETECTIONS]),
        info("labels", TensorProto.INT32, ["B", DETECTIONS]),
        info("num_detections", TensorProto.INT32, ["B"]),
    ]
    known = [
        info("roi_features", TensorProto.FLOAT, ["R", CHANNELS, 3, 3]),
        info("kept", TensorProto.FLOAT, ["B", PROPOSALS]),
    ]
    graph = helper.make_graph(g.nodes, "tiny", inputs, outputs, g.weights, value_info=known)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    attach_functions(model)
    helper.set_model_props(model, {CONTRACT_KEY: CONTRACT.to_json()})
    onnx.checker.check_model(model)
    return onnx.shape_inference.infer_shapes(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``tiny.onnx`` and, in ``images``, six scenes."""
    place = tmp_path_factory.mktemp("quantizing")
    onnx.save(tiny_detector(), place / "tiny.onnx")
    (place / "images").mkdir()
    for index in range(6):
        write_image(place / "images" / f"{index}.png", generate_scene(3, (SIDE, SIDE), index)[0])
    return place


@pytest.fixture(scope="module")
def made(folder: Path) -> dict[str, Path]:
    """The tiny detector, quantised for both targets."""
    paths = {}
    for target in ("cpu", "tensorrt"):
        paths[target] = folder / f"{target}.onnx"
        result = quantize_onnx(
            folder / "tiny.onnx", paths[target], [str(folder / "images")], target=target, max_drop=0.5
        )
        assert result.float_layers == ()
        assert result.last_layers == LAST
        assert [layer.name for layer in result.layers if layer.effect is None] == []
        assert sorted(layer.name for layer in result.layers) == sorted(INTEGER)
    return paths


def weights_of(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def inputs_of(folder: Path, count: int = 6) -> list[dict[str, NDArray[Any]]]:
    with Detector(folder / "tiny.onnx", "cpu") as detector:
        scenes = [generate_scene(3, (SIDE, SIDE), index)[0] for index in range(count)]
        return [{k: v.copy() for k, v in detector.prepare([scene])[0].items()} for scene in scenes]


def run(model: onnx.ModelProto, inputs: dict[str, NDArray[Any]], wanted: list[str]) -> list[NDArray[Any]]:
    """Values inside ``model``, by onnxruntime."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    session = onnxruntime.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(wanted, inputs))


def optimised(model: Path, tmp_path: Path) -> list[str]:
    """The op types of the graph that onnxruntime makes of ``model`` and runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]


def test_onnxruntime_runs_every_quantised_layer_on_integers(made: dict[str, Path], tmp_path: Path) -> None:
    ops = optimised(made["cpu"], tmp_path)
    assert ops.count("QLinearConv") == 5
    assert ops.count("QGemm") == 2
    assert ops.count("QLinearAdd") == 1
    floats = [op for op in ops if "Conv" in op and op != "QLinearConv"]
    assert len(floats) == 2, "the RPN's last two"
    assert len([op for op in ops if op in ("Gemm", "FusedGemm")]) == 2
    assert ops.count("QuantizeLinear") == 2, "the pixels, and the pooled features"


def test_as_many_values_are_looked_at_whatever_the_size_of_the_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph does not state their sizes where it takes frames of any; each channel has its share."""
    nodes = [helper.make_node("Relu", ["images"], ["map"])]
    free = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["B", "height", "width", 3])
    graph = helper.make_graph(nodes, "free", [free], [onnx.ValueInfoProto(name="map")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    sizes = ((512, 640), (320, 448), (96, 32))
    images = [{"images": np.tile(np.float32([1, 2, 3]), (1, *size, 1))} for size in sizes]
    samples = []
    monkeypatch.setattr(calibration, "_narrowed", lambda low, high, sample, method: samples.append(sample))
    measure_ranges(model, ["map"], images, 2, "mse")
    assert 2 * 16384 <= len(samples[0]) - 96 * 32 * 3 < 2.5 * 16384  # all values of the small one
    np.testing.assert_allclose(np.bincount(samples[0].astype(int))[1:] / len(samples[0]), 1 / 3, atol=1e-3)


def test_a_layer_given_back_to_float_stays_float_between_integers(folder: Path, tmp_path: Path) -> None:
    """onnxruntime would quantise it all the same, with one scale for all channels."""
    model, images = onnx.load(folder / "tiny.onnx"), inputs_of(folder, 2)
    usable = [layer for layer in find_layers(model.graph) if not layer.last]
    ranges = measure_ranges(model, observed_tensors(model, usable), images, 2, "minmax")
    kept = [layer for layer in usable if layer.name not in ("body.1", "roi.fc7")]
    mixed = quantized(model, kept, ranges, "cpu")
    onnx.checker.check_model(mixed)
    onnx.save(mixed, tmp_path / "mixed.onnx")
    ops = optimised(tmp_path / "mixed.onnx", tmp_path)
    assert ops.count("QLinearConv") == 4
    assert ops.count("QGemm") == 1
    check_float_layer(run, mixed, images)


def check_float_layer(run: Callable[..., Any], mixed: onnx.ModelProto, images: list[Any]) -> None:
    """Layer body.1 of ``mixed`` gives what PyTorch makes of its input."""
    weights = weights_of(mixed)
    (layer,) = (node for node in mixed.graph.node if node.name == "n_c1")
    for inputs in images:
        before, after = run(mixed, inputs, [layer.input[0], "r1"])
        planes = torch.from_numpy(before)
        weight, bias = (torch.tensor(weights[f"model.body.1.{part}"]) for part in ("weight", "bias"))
        exact = torch.nn.functional.conv2d(planes, weight, bias, stride=2, padding=1).relu().numpy()
        np.testing.assert_allclose(after, exact, atol=1e-4)


def test_our_sessions_leave_float_layers_alone_in_every_form(folder: Path) -> None:
    model, images = onnx.load(folder / "tiny.onnx"), inputs_of(folder, 1)
    usable = [layer for layer in find_layers(model.graph) if not layer.last]
    ranges = measure_ranges(model, observed_tensors(model, usable), images, 1, "minmax")
    kept = [layer for layer in usable if layer.name != "body.1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizing_graph, "_keep_in_float", lambda graph: None)  # as in older files
        older = quantized(model, kept, ranges, "cpu")
    for mixed in (older, quantized(model, kept, ranges, "tensorrt")):

        def run_ours(model: onnx.ModelProto, inputs: Any, wanted: list[str]) -> list[NDArray[Any]]:
            copy = onnx.ModelProto.FromString(model.SerializeToString())
            copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
            return list(open_for_checks(copy.SerializeToString()).run(wanted, inputs))

        check_float_layer(run_ours, mixed, images)


class IntegerLayer(NamedTuple):
    """A product with integers in the cpu form: its inputs as rows [N, K], its weights [K, C], its output."""

    rows: NDArray[np.uint8]
    weights: NDArray[np.int8]
    expected: NDArray[np.uint8]  # of the exact sum, by NumPy
    found: NDArray[np.uint8]  # by onnxruntime


def integer_layers(model: onnx.ModelProto, inputs: dict[str, NDArray[Any]]) -> dict[str, IntegerLayer]:
    """By the weight's name, computed anew from what onnxruntime gives as the layer's rounded input."""
    constants = weights_of(model)
    makers = {name: node for node in model.graph.node for name in node.output}
    readers = {node.input[0]: node for node in model.graph.node}
    found = {}
    for node in model.graph.node:
        maker = makers.get(node.input[1]) if node.op_type in ("Conv", "Gemm") else None
        if maker is None or maker.op_type != "DequantizeLinear":
            continue
        before, after = makers[node.input[0]], readers[node.output[0]]
        value, output = run(model, inputs, [before.input[0], after.output[0]])
        weight, bias = constants[maker.input[0]], constants[makers[node.input[2]].input[0]]
        if node.op_type == "Conv":
            kernel = weight.shape[2]
            stride = next((a.ints[0] for a in node.attribute if a.name == "strides"), 1)
            pad, zero = kernel // 2, int(constants[before.input[2]])
            padded = np.pad(value, ((0, 0), (0, 0), (pad, pad), (pad, pad)), constant_values=zero)
            windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(2, 3))
            windows = windows[:, :, ::stride, ::stride]  # [1, C, H, W, k, k]
            rows = windows.transpose(0, 2, 3, 4, 5, 1).reshape(-1, kernel * kernel * value.shape[1])
            columns = weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])
            output = output.transpose(0, 2, 3, 1).reshape(len(rows), -1)
        else:
            rows, columns = value, weight.T
        scale = float(constants[before.input[1]]) * constants[maker.input[1]].astype(np.float64)
        zero = int(constants[before.input[2]])
        total = exact_sum(rows, columns) - zero * columns.sum(axis=0, dtype=np.int64) + bias
        step, middle = float(constants[after.input[1]]), int(constants[after.input[2]])
        expected = np.clip(np.rint(total * scale / step) + middle, 0, 255).astype(np.uint8)
        name = maker.input[0].removeprefix("model.").removesuffix(".weight_quantized")
        found[name] = IntegerLayer(rows, columns, expected, output)
    return found


def exact_sum(rows: NDArray[np.uint8], weights: NDArray[np.int8]) -> NDArray[np.int64]:
    """As processors with VNNI add: 32 bits throughout."""
    return rows.astype(np.int64) @ weights.astype(np.int64)


def saturating_sum(rows: NDArray[np.uint8], weights: NDArray[np.int8]) -> NDArray[np.int64]:
    """As processors without VNNI add (``vpmaddubsw``): two neighbours in 16 bits, which saturate."""
    odd = rows.shape[1] % 2
    rows, weights = np.pad(rows, ((0, 0), (0, odd))), np.pad(weights, ((0, odd), (0, 0)))
    total = np.zeros((rows.shape[0], weights.shape[1]), np.int64)
    for k in range(0, rows.shape[1], 2):
        pair = exact_sum(rows[:, k : k + 2], weights[k : k + 2])
        total += np.clip(pair, -(2**15), 2**15 - 1)
    return total


def test_sums_are_the_same_with_and_without_vnni(made: dict[str, Path], folder: Path) -> None:
    model = onnx.load(made["cpu"])
    for inputs in inputs_of(folder, 2):
        layers = integer_layers(model, inputs)
        assert set(layers) == set(INTEGER)
        for name, layer in layers.items():
            for order in (
                np.arange(len(layer.weights)),
                np.random.default_rng(0).permutation(len(layer.weights)),
            ):
                rows, weights = layer.rows[:, order], layer.weights[order]
                np.testing.assert_array_equal(saturating_sum(rows, weights), exact_sum(rows, weights))
            # One step: the scales are multiplied in float32 there.
            difference = np.abs(layer.expected.astype(int) - layer.found)
            assert difference.max() <= 1, name
            assert (difference > 0).mean() < 0.01, name


def test_weights_of_8_bits_would_saturate(
    made: dict[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the test above can fail."""
    model, (inputs,) = with_8_bits(folder, monkeypatch), inputs_of(folder, 1)
    layers = integer_layers(model, inputs)
    differs = {
        name for name, each in layers.items() if np.any(saturating_sum(*each[:2]) != exact_sum(*each[:2]))
    }
    assert differs & {"body.0", "body.1", "body.2", "fpn", "rpn.conv"}


def with_8_bits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> onnx.ModelProto:
    """A file for CPUs as they were before weights had 7 bits."""
    model = onnx.load(folder / "tiny.onnx")
    usable = [layer for layer in find_layers(model.graph) if not layer.last]
    ranges = measure_ranges(model, observed_tensors(model, usable), inputs_of(folder), 6, "minmax")
    monkeypatch.setitem(quantizing_graph.WEIGHT_BITS, "cpu", 8)
    old = quantized(model, usable, ranges, "cpu")
    contract = dataclasses.replace(CONTRACT, precision="int8", source={"quantised": {"for": "cpu"}})
    helper.set_model_props(old, {CONTRACT_KEY: contract.to_json()})
    return old


@pytest.mark.parametrize("vnni", [True, False])
def test_an_older_file_is_exact_without_vnni_too(
    folder: Path,
    tmp_path: Path,
    vnni: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    onnx.save(with_8_bits(folder, monkeypatch), tmp_path / "old.onnx")
    monkeypatch.setattr(onnxruntime_backend, "adds_in_16_bits", lambda: not vnni)
    with contextlib.closing(OnnxRuntimeBackend(tmp_path / "old.onnx")) as backend:
        assert backend.contract.needs_vnni
        config = exact_sums(backend.contract)
    assert [record.levelname for record in caplog.records] == ([] if vnni else ["WARNING"])
    assert vnni or "need VNNI, which this processor has not; it is computed in float32" in caplog.text
    if not vnni:  # with that setting onnxruntime has no integer sums at all
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        options.log_severity_level = 3
        for key, value in config.items():
            options.add_session_config_entry(key, value)
        onnxruntime.InferenceSession(tmp_path / "old.onnx", options, providers=["CPUExecutionProvider"])
        ops = {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}
        assert not ops & {"QLinearConv", "QGemm", "QLinearAdd", "QLinearMatMul"}


def test_only_older_files_for_processors_need_vnni(made: dict[str, Path]) -> None:
    for target in ("cpu", "tensorrt"):
        contract = Contract.from_json(onnx.load(made[target]).metadata_props[0].value)
        assert contract.source["quantised"]["weight_bits"] == {"cpu": 7, "tensorrt": 8}[target]
        assert not contract.needs_vnni
        assert not exact_sums(contract)
    assert not CONTRACT.needs_vnni
    assert not dataclasses.replace(CONTRACT, precision="int8", source={"quantised": "by hand"}).needs_vnni


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_weights_are_signed_per_channel_and_the_last_layers_float(
    made: dict[str, Path], target: str, folder: Path
) -> None:
    before, after = weights_of(onnx.load(folder / "tiny.onnx")), weights_of(onnx.load(made[target]))
    for name in INTEGER:
        weight, scale = after[f"model.{name}.weight_quantized"], after[f"model.{name}.weight_scale"]
        assert weight.dtype == np.int8
        assert scale.shape == weight.shape[:1]
        assert not after[f"model.{name}.weight_zero_point"].any()
        assert np.abs(weight.astype(int)).max() <= (64 if target == "cpu" else 127)
        by_channel = scale.reshape(-1, *[1] * (weight.ndim - 1))
        assert (np.abs(weight * by_channel - before[f"model.{name}.weight"]) <= 0.51 * by_channel).all()
        assert f"model.{name}.weight" not in after
    for name in LAST:
        np.testing.assert_array_equal(after[f"model.{name}.weight"], before[f"model.{name}.weight"])


def test_activations_have_the_types_of_the_target(made: dict[str, Path]) -> None:
    """u8 with s32 biases for CPUs; for TensorRT symmetric s8, and biases as they were."""
    for target, kind in (("cpu", np.uint8), ("tensorrt", np.int8)):
        model = onnx.load(made[target])
        values = weights_of(model)
        points = [values[n.input[2]] for n in model.graph.node if n.op_type == "QuantizeLinear"]
        assert len(points) >= 6
        assert {point.dtype for point in points} == {np.dtype(kind)}
        biases = {str(values[name].dtype) for name in values if ".bias" in name and "scale" not in name}
        if target == "tensorrt":
            assert not any(point.any() for point in points)
            assert biases == {"float32"}
        else:
            assert any(point.any() for point in points)
            assert "int32" in biases


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_functions_stages_contract_and_batch_survive(
    made: dict[str, Path], target: str, folder: Path
) -> None:
    before, after = onnx.load(folder / "tiny.onnx"), onnx.load(made[target])
    onnx.checker.check_model(after)
    assert [f.SerializeToString() for f in after.functions] == [
        f.SerializeToString() for f in before.functions
    ]
    custom = [node for node in after.graph.node if node.domain == "anchorline"]
    assert sorted(node.op_type for node in custom) == ["BatchedNMS", "RoIAlign"]
    stages = [
        {name for n in model.graph.node for name in n.output if is_stage(name)} for model in (before, after)
    ]
    assert stages[0] == stages[1] > {"pixels", "backbone.0", "fpn.0", "box_regression"}
    assert [entry.key for entry in after.metadata_props] == [CONTRACT_KEY, DIGEST_KEY]
    contract = Contract.from_json(after.metadata_props[0].value)
    assert contract.precision == "int8"
    assert contract.source["quantised"]["for"] == target
    assert contract.source["quantised"]["images"] == 6
    assert contract.source["quantised"]["last_layers"] == list(LAST)
    assert contract.source["quantised"]["loss"]["measure"] == "agreement"
    assert (contract.names, contract.canvas, contract.outputs) == (
        CONTRACT.names,
        CONTRACT.canvas,
        CONTRACT.outputs,
    )
    frames = [generate_scene(3, (SIDE, SIDE), index)[0] for index in range(3)]
    with Detector(made[target], "cpu") as detector:
        alone, together = [detector(frame) for frame in frames], detector.batch(frames)
        assert detector.precision == "int8"
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)


def test_the_verdict_lies_beside_the_file_and_verify_repeats_it(made: dict[str, Path], folder: Path) -> None:
    record = json.loads(record_path(made["cpu"]).read_text())
    assert record["passed"] is True
    assert record["artefact"]["precision"] == "int8"
    report = verify(folder / "tiny.onnx", made["cpu"], images=[str(folder / "images")])
    assert report.tolerance["stage_rms"] == 0.75, "the row of int8"
    assert {stage.name for stage in report.stages or ()} >= {"backbone", "fpn", "class_logits"}
    assert report.passed, report.reason


def plant(model: onnx.ModelProto, factor: float = 3000.0) -> onnx.ModelProto:
    """One unit of fc6 larger and its weights in fc7 as much smaller: the same model in float32. Rounded in
    256 steps, the other units are lost beside it."""
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        if tensor.name == f"{FC6}.bias":
            values[0] = 1.0  # the unit is never silent
        if tensor.name in (f"{FC6}.weight", f"{FC6}.bias"):
            values[0] *= factor
        elif tensor.name == f"{FC7}.weight":
            values[:, 0] /= factor
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return model


def test_a_layer_that_costs_too_much_goes_back_to_float(folder: Path, tmp_path: Path) -> None:
    onnx.save(plant(tiny_detector()), tmp_path / "planted.onnx")
    arguments: Any = (tmp_path / "planted.onnx", tmp_path / "int8.onnx", [str(folder / "images")])
    careless = quantize_onnx(*arguments, max_drop=1.0, verify=False)
    assert careless.float_layers == ()
    assert {layer.name for layer in careless.layers[:2]} == {"roi.fc6", "roi.fc7"}
    careful = quantize_onnx(*arguments, max_drop=0.2, verify=False)
    assert set(careful.float_layers) <= {"roi.fc6", "roi.fc7"}
    assert careful.float_layers
    assert careful.loss.drop <= 0.2 < careless.loss.drop
    after = weights_of(onnx.load(tmp_path / "int8.onnx"))
    for name in careful.float_layers:
        assert after[f"model.{name}.weight"].dtype == np.float32
    contract = Contract.from_json(onnx.load(tmp_path / "int8.onnx").metadata_props[0].value)
    assert contract.source["quantised"]["float_layers"] == list(careful.float_layers)


def test_a_drop_that_cannot_be_kept_publishes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted model needs a layer in float, and here none may be."""
    monkeypatch.setattr(quantizing_search, "MOST_FLOAT", 0.0)
    model, out = tmp_path / "planted.onnx", tmp_path / "out" / "int8.onnx"
    onnx.save(plant(tiny_detector()), model)
    with pytest.raises(
        ParityError, match=r"agreement 1\.0000 in float, 0\.\d+ in int8, with the 0 most costly"
    ):
        quantize_onnx(model, out, [str(folder / "images")])
    arguments = ["quantize", str(model), "--out", str(out), "--images", str(folder / "images")]
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "was not published" in line
    assert list(out.parent.iterdir()) == []


def test_the_command_shows_the_layers_and_writes_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, figures = tmp_path / "int8.onnx", tmp_path / "figures.json"
    arguments = ["quantize", str(folder / "tiny.onnx"), "--out", str(out), "--json", str(figures)]
    arguments += ["--images", str(folder / "images"), "--limit", "3", "--max-drop", "0.9", "--no-verify"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "roi.fc6" in shown
    assert "7 layers in integers and 4 in float" in shown
    written = json.loads(figures.read_text())
    assert written["images"] == 3
    assert {layer["name"] for layer in written["layers"]} == set(INTEGER)
    assert json.loads(record_path(out).read_text())["passed"] is None


def test_ranges_are_those_of_the_values(folder: Path) -> None:
    model, images = onnx.load(folder / "tiny.onnx"), inputs_of(folder)
    tensors = observed_tensors(model, [layer for layer in find_layers(model.graph) if not layer.last])
    assert {"pixels", "c0", "r0", "backbone.0", "f4"} <= set(tensors)
    values = [run(model, inputs, tensors) for inputs in images]
    exact = {name: np.concatenate([v[i].ravel() for v in values]) for i, name in enumerate(tensors)}
    found = {m: measure_ranges(model, tensors, images, 6, m) for m in ("minmax", "percentile", "mse")}
    for name, seen in exact.items():
        low, high = min(seen.min(), 0.0), max(seen.max(), 0.0)
        np.testing.assert_allclose(found["minmax"][name], (low, high), rtol=1e-5)
        for method in ("percentile", "mse"):
            narrow = found[method][name]
            assert low - 1e-5 <= narrow[0] <= 0.0 <= narrow[1] <= high + 1e-5
            assert narrow[1] - narrow[0] >= 0.29 * (high - low)


def test_noise_is_that_of_the_layer_alone(folder: Path) -> None:
    """Against the file in which only this layer is quantised, run by onnxruntime's integer kernels."""
    model, images = onnx.load(folder / "tiny.onnx"), inputs_of(folder, 2)
    usable = [layer for layer in find_layers(model.graph) if not layer.last]
    ranges = measure_ranges(model, observed_tensors(model, usable), images, 2, "minmax")
    rows = measure_sensitivity(model, quantized(model, usable, ranges, "cpu"), usable, images)
    decibels = {row.name: row.sqnr_db for row in rows}
    effects = {row.name: row.effect for row in rows}
    for layer, value, end in (("body.2", "c2", "objectness"), ("roi.fc7", "f4", "class_logits")):
        alone = quantized(model, [each for each in usable if each.name == layer], ranges, "cpu")
        shown = next(
            n.output[0]
            for n in alone.graph.node
            if n.input and n.input[0] == f"{value}_QuantizeLinear_Output"
        )
        signal = noise = worst = 0.0
        for inputs in images:
            (exact, end_exact), (found, end_found) = (
                run(model, inputs, [value, end]),
                run(alone, inputs, [shown, end]),
            )
            signal += float(np.square(exact).sum())
            noise += float(np.square(found - exact).sum())
            worst = max(
                worst, float(np.sqrt(np.square(end_found - end_exact).mean() / np.square(end_exact).mean()))
            )
        assert decibels[layer] == pytest.approx(10 * np.log10(signal / noise), abs=1.0)
        assert effects[layer] is not None
        assert effects[layer] >= 0.8 * worst


def test_without_stage_names_the_noise_alone_ranks_the_layers(folder: Path) -> None:
    model, images = onnx.load(folder / "tiny.onnx"), inputs_of(folder, 1)
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [f"value_{name}" if is_stage(name) else name for name in names]
    for value in model.graph.value_info:
        value.name = f"value_{value.name}" if is_stage(value.name) else value.name
    usable = [layer for layer in find_layers(model.graph) if not layer.last]
    ranges = measure_ranges(model, observed_tensors(model, usable), images, 1, "minmax")
    rows = measure_sensitivity(model, quantized(model, usable, ranges, "cpu"), usable, images)
    assert {row.effect for row in rows} == {None}
    assert [row.sqnr_db for row in rows] == sorted(row.sqnr_db for row in rows)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("roi.fc6", "calibration image 1: f1 has values that are not finite"),
        (
            "body.1",
            "calibration image 1: onnxruntime cannot run the model on it .*finite",
        ),  # RoIAlign refuses
    ],
)
def test_an_overflow_in_the_model_is_named(folder: Path, tmp_path: Path, layer: str, message: str) -> None:
    model = onnx.load(folder / "tiny.onnx")
    (bias,) = [t for t in model.graph.initializer if t.name == f"model.{layer}.bias"]
    values = np.full(list(bias.dims), np.inf, np.float32)
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(AnchorlineError, match=message) as caught:
        quantize_onnx(tmp_path / "model.onnx", tmp_path / "out.onnx", [str(folder / "images")])
    assert "\n" not in str(caught.value)


def test_progress_ends_at_its_total(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    arguments: Any = (folder / "tiny.onnx", tmp_path / "out.onnx", [str(folder / "images")])
    quantize_onnx(
        *arguments, max_drop=1.0, verify=False, progress=lambda done, total: seen.append((done, total))
    )
    assert [done for done, _ in seen] == list(range(1, 6 + 6 + 7 + 6 + 1))
    assert all(done <= total for done, total in seen)
    assert seen[-1] == (25, 25)


@given(needed=st.integers(0, 40), most=st.integers(0, 30))
@settings(max_examples=200, deadline=None)
def test_the_search_finds_the_fewest_layers(needed: int, most: int) -> None:
    tried: list[int] = []

    def attempt(number: int) -> Trial:
        assert number <= most
        tried.append(number)
        return Trial(("layer",) * number, Loss("mAP50", 0.9, 0.9), None, number >= needed)

    chosen = fewest_float(most, attempt)
    assert chosen.holds == (needed <= most)
    assert len(chosen.floats) == min(needed, most)
    assert len(tried) == len(set(tried)) <= 12


def spoil(folder: Path, tmp_path: Path, what: str) -> Path:
    """A model that cannot be quantised."""
    path, model = tmp_path / "model.onnx", onnx.load(folder / "tiny.onnx")
    if what == "fp16":
        model.graph.initializer[0].CopyFrom(
            numpy_helper.from_array(np.zeros((1, 3, 1, 1), np.float16), "mean")
        )
        model.graph.node[2].input[1] = "mean_f32"
        model.graph.node.insert(0, helper.make_node("Cast", ["mean"], ["mean_f32"], to=TensorProto.FLOAT))
    onnx.save(model, path)
    if what == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    elif what == "missing":
        path.unlink()
    elif what == "checkpoint":
        path = path.rename(tmp_path / "model.safetensors")
    return path


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("fp16", "its precision is fp16, expected fp32"),
        ("cut", "cut off"),
        ("missing", "no such file"),
        ("checkpoint", "is a checkpoint; quantise the ONNX file"),
    ],
)
def test_models_that_cannot_be_quantised(folder: Path, tmp_path: Path, what: str, message: str) -> None:
    path = spoil(folder, tmp_path, what)
    with pytest.raises(AnchorlineError, match=message) as caught:
        quantize_onnx(path, tmp_path / "out.onnx", [str(folder / "images")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.onnx").exists()


def test_a_quantised_model_is_not_quantised_again(
    made: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(AnchorlineError, match="is quantised already"):
        quantize_onnx(made["cpu"], tmp_path / "out.onnx", [str(folder / "images")])


@pytest.mark.parametrize(
    ("calibrate", "changes", "message"),
    [
        ([], {}, "no calibration images given"),
        (["nowhere"], {}, "'nowhere': no such file or folder"),
        (["voc:nowhere@train"], {}, "nowhere"),
        (["synthetic:2"], {}, "class"),
        (["{}/images", "synthetic:2"], {}, "all labelled or all without"),
        (["{}"], {}, "no images in this folder"),
        (["{}/images"], {"limit": 0}, "limit is 0"),
        (["{}/images"], {"max_drop": 1.5}, r"max drop is 1\.5"),
        (["{}/images"], {"target": "npu"}, "target is 'npu'"),
        (["{}/images"], {"method": "entropy"}, "method is 'entropy'"),
    ],
)
def test_images_and_settings_that_cannot_be_used(
    folder: Path, tmp_path: Path, calibrate: list[str], changes: dict[str, Any], message: str
) -> None:
    specs = [spec.format(folder) for spec in calibrate]
    with pytest.raises(AnchorlineError, match=message) as caught:
        quantize_onnx(folder / "tiny.onnx", tmp_path / "out.onnx", specs, **changes)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_output_is_another_onnx_file(folder: Path, tmp_path: Path) -> None:
    for out, message in (
        (folder / "tiny.onnx", "is the model itself"),
        (tmp_path / "out.bin", "ends in .onnx"),
    ):
        with pytest.raises(AnchorlineError, match=message):
            quantize_onnx(folder / "tiny.onnx", out, [str(folder / "images")])


@pytest.mark.parametrize(
    ("frame", "messages"),
    [
        (np.full((SIDE, SIDE, 3), 5, np.uint8), ("mean of 5 grey levels", "contrast of 0.0")),
        (np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8), ()),
    ],
)
def test_images_unlike_the_training_data_are_warned_of(
    folder: Path, tmp_path: Path, frame: NDArray[np.uint8], messages: tuple[str, ...]
) -> None:
    (tmp_path / "images").mkdir()
    write_image(tmp_path / "images" / "0.png", frame)
    told: list[str] = []
    quantize_onnx(
        *(folder / "tiny.onnx", tmp_path / "out.onnx", [str(tmp_path / "images")]),
        max_drop=1.0,
        verify=False,
        warn=told.extend,
    )
    statistics = [line for line in told if "grey levels" in line]
    assert len(statistics) == len(messages)
    for message in messages:
        assert any(message in line for line in statistics)


def test_a_model_that_finds_nothing_is_warned_of(folder: Path, tmp_path: Path) -> None:
    model = tiny_detector()
    (bias,) = [t for t in model.graph.initializer if t.name == "model.roi.cls_score.bias"]
    bias.CopyFrom(numpy_helper.from_array(np.array([100, 0, 0], np.float32), bias.name))
    onnx.save(model, tmp_path / "blind.onnx")
    told: list[str] = []
    arguments: Any = (tmp_path / "blind.onnx", tmp_path / "out.onnx", [str(folder / "images")])
    quantize_onnx(*arguments, verify=False, warn=told.extend)
    assert any("in 6 of 6 calibration images the float model finds nothing" in line for line in told)


def test_pytorch_is_not_needed() -> None:
    code = "import sys, anchorline.export.quantization; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def result(boxes: list[list[float]], labels: list[int], scores: list[float]) -> Detections:
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(scores, np.float32),
        np.array(labels),
        CONTRACT.names,
        size=(SIDE, SIDE),
    )


def data(labelled: bool) -> Dataset:
    """Two images, with one cat and one dog where ``labelled``."""
    box = np.array([[10, 10, 30, 30]], np.float32)[: int(labelled)]
    none = np.zeros(len(box), np.bool_)
    images = tuple(
        LabelledImage(
            str(label),
            (SIDE, SIDE),
            box,
            np.array([label])[: len(box)],
            none,
            none,
            lambda: np.zeros((SIDE, SIDE, 3), np.uint8),
        )
        for label in (0, 1)
    )
    return Dataset("two images", CONTRACT.names, images)


CAT = result([[10, 10, 30, 30], [40, 40, 60, 60]], [0, 0], [0.9, 0.8])
DOG = result([[10, 10, 30, 30]], [1], [0.9])
NOTHING = result([], [], [])


@pytest.mark.parametrize(
    ("labelled", "found", "measure", "reference", "candidate"),
    [
        (True, [CAT, NOTHING], "mAP50", 1.0, 0.5),  # the dog is missed; the second cat stands after the hit
        (True, [CAT, DOG], "mAP50", 1.0, 1.0),
        (False, [CAT, NOTHING], "agreement", 1.0, 2 / 3),
        (False, [CAT[CAT.scores > 0.85], DOG], "agreement", 1.0, 2 / 3),
        (False, [CAT, DOG], "agreement", 1.0, 1.0),
    ],
)
def test_the_loss_is_accuracy_or_agreement(
    labelled: bool, found: list[Detections], measure: str, reference: float, candidate: float
) -> None:
    def detector(results: list[Detections]) -> Callable[[list[NDArray[np.uint8]]], list[Detections]]:
        waiting = list(results)
        return lambda frames: [waiting.pop(0) for _ in frames]

    meter = LossMeter(data(labelled), detector([CAT, DOG]), CONTRACT)
    loss = meter.measure(detector(found))
    assert (loss.measure, loss.reference) == (measure, reference)
    assert loss.candidate == pytest.approx(candidate, abs=1e-6)
    assert loss.drop == pytest.approx(reference - candidate, abs=1e-6)


def test_proposals_are_measured_by_their_recall() -> None:
    contract = dataclasses.replace(CONTRACT, task="proposals", outputs=("boxes", "scores", "num_proposals"))
    good, bad = ([[10.0, 10, 30, 30]], [[40.0, 40, 60, 60]])
    meter = LossMeter(data(True), lambda frames: [result(good, [0], [0.9])] * len(frames), contract)
    found = iter([result(good, [0], [0.9]), result(bad, [0], [0.9])])
    loss = meter.measure(lambda frames: [next(found) for _ in frames])
    assert (loss.measure, loss.reference, loss.candidate) == ("recall", 1.0, 0.5)


@pytest.mark.slow
def test_a_trained_model_keeps_its_accuracy_on_real_images(tmp_path: Path) -> None:
    """Blood cells, with a model named by ``$ANCHORLINE_BCCD_ONNX``; images that it was not calibrated on."""
    shared, model = os.environ.get("ANCHORLINE_SHARED"), os.environ.get("ANCHORLINE_BCCD_ONNX")
    if not shared or not model:
        pytest.skip("needs $ANCHORLINE_SHARED and $ANCHORLINE_BCCD_ONNX, a model.onnx trained on its BCCD")
    out, spec = tmp_path / "int8.onnx", f"voc:{shared}/data/bccd"
    made = quantize_onnx(Path(model), out, [f"{spec}@train"], limit=40)
    assert made.sizes[1] < 0.4 * made.sizes[0]
    accuracy = []
    for path in (Path(model), out):
        with Detector(path, "cpu") as detector:
            test = load_datasets([f"{spec}@test"], names=detector.contract.names)
            accuracy.append(evaluate(detector.batch, test, provider="cpu").map50)
    assert accuracy[1] > accuracy[0] - 0.02
