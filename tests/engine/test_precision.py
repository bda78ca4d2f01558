"""From float32 to a mixed graph: what becomes half, what stays, and what overflow and rounding do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from anchorline.engine.fp16_range import (
    largest_activations,
    network_inputs,
    overflows,
    rounding_loss,
    simulate_half,
)
from anchorline.engine.lowering import lower
from anchorline.engine.mixed_precision import to_precision
from anchorline.runtime.contract import CONTRACT_KEY, Contract
from anchorline.runtime.io.errors import ArtefactError, FrameError, SettingsError

Outputs = dict[str, NDArray[np.generic]]
Inputs = dict[str, NDArray[np.generic]]
Export = Callable[..., onnx.ModelProto]
Run = Callable[..., Outputs]
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
FC6, FC7 = "model.roi_heads.box_head.fc6", "model.roi_heads.box_head.fc7"


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    """Element types by tensor name; shape inference checks on the way that every node accepts its own."""
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    return {**{tensor.name: tensor.data_type for tensor in graph.initializer}, **types}


def scale(model: onnx.ModelProto, name: str, factor: float) -> None:
    """Multiply the initialiser ``name`` by ``factor``."""
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    values = numpy_helper.to_array(tensor) * np.float32(factor)
    tensor.CopyFrom(numpy_helper.from_array(values, name))


def small_graph(body: str, **weights: Any) -> onnx.ModelProto:
    """A graph of our inputs and outputs around ``body``, which computes ``boxes`` from ``images``."""
    contract = Contract(
        task="proposals",
        names=("thing",),
        canvas=(1, 1),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        input_dtype="float32",
        outputs=("boxes", "scores", "num_proposals"),
    )
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 18]>
        g (float[B, 2, 4, 4] images, float[B, 2] image_sizes)
        => (float[B, C, 4, 4] boxes, float[B, 2] scores, float[B, 2] num_proposals)
        {{ {body} scores = Identity (image_sizes) num_proposals = Identity (image_sizes) }}"""
    )
    for name, values in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(values, np.float32), name))
    onnx.helper.set_model_props(model, {CONTRACT_KEY: contract.to_json()})
    return model


def inputs_of(first: float, second: float) -> Inputs:
    """Two constant planes."""
    images = np.empty((1, 2, 4, 4), np.float32)
    images[:, 0], images[:, 1] = first, second
    return {"images": images, "image_sizes": np.float32([[1, 1]])}


def test_layers_are_half_and_everything_that_decides_stays_float(exported: Export) -> None:
    mixed, report = to_precision(exported(), "fp16")
    onnx.checker.check_model(mixed, full_check=True)
    types = types_of(mixed)
    seen = set()
    for node in mixed.graph.node:
        kinds = {types[name] for name in (*node.input, *node.output) if name} & {FLOAT, HALF}
        if node.op_type in ("Conv", "Gemm", "MaxPool", "HardSwish"):
            assert kinds == {HALF}, node.op_type
        elif node.op_type in (
            "Softmax",
            "Sigmoid",
            "TopK",
            "BatchedNMS",
            "Exp",
            "Sqrt",
            "Log",
            "Floor",
            "Div",
        ):
            assert kinds == {FLOAT}, node.op_type
        elif node.op_type == "RoIAlign":
            assert [types[name] for name in (*node.input, *node.output)] == [HALF, FLOAT, HALF]
        seen.add(node.op_type)
    assert {"Conv", "Gemm", "MaxPool", "Softmax", "TopK", "BatchedNMS", "RoIAlign", "Sigmoid"} <= seen
    assert [types[v.name] for v in (*mixed.graph.input, *mixed.graph.output)] == [
        types_of(exported())[v.name] for v in (*mixed.graph.input, *mixed.graph.output)
    ]
    assert report.precision == "fp16"
    assert report.kept == ()
    assert len(report.half) > 100
    json.dumps(dataclasses.asdict(report))


def test_the_file_is_half_as_large_and_says_what_it_is(exported: Export) -> None:
    model = exported()
    mixed, _ = to_precision(model, "fp16")
    assert len(mixed.SerializeToString()) < 0.65 * len(model.SerializeToString())
    (entry,) = mixed.metadata_props
    assert Contract.from_json(entry.value).precision == "fp16"
    assert Contract.from_json(model.metadata_props[0].value).precision == "fp32"


def test_tensors_keep_their_names(exported: Export) -> None:
    """Where a tensor exists in both types the float32 one has the name, so a stage can be found by it."""
    model = exported()
    mixed, _ = to_precision(model, "fp16")
    before = {name for node in model.graph.node if node.op_type != "Constant" for name in node.output}
    after = {name for node in mixed.graph.node for name in node.output}
    assert before <= after
    assert all(name.endswith("_half") for name in after - before)
    made = {name: node for node in mixed.graph.node for name in node.output}
    types = types_of(mixed)
    assert all(types[name] == HALF for name in after - before)
    assert all(made[name].op_type != "Cast" for name in before if types[name] == HALF)


def test_no_tensor_is_cast_twice(exported: Export) -> None:
    mixed, _ = to_precision(exported(), "fp16")
    casts = [(n.input[0], n.attribute[0].i) for n in mixed.graph.node if n.op_type == "Cast"]
    assert len(casts) == len(set(casts))


@pytest.fixture
def check_most_survive(rows_of: Callable[[Outputs, int], NDArray[np.float64]]) -> Callable[..., None]:
    """``check_most_survive(found, expected)``: random weights exaggerate what rounding does, and which of
    two overlapping boxes stays differs between processors; most detections find a close partner all the same.
    """

    def check(found: Outputs, expected: Outputs) -> None:
        for image in range(3):
            ours, theirs = rows_of(found, image), rows_of(expected, image)
            pairs = (np.abs(ours[:, None] - theirs[None]) <= [2, 2, 2, 2, 0.05, 0]).all(axis=2)
            assert pairs.any(axis=1).mean() > 0.7
            assert pairs.any(axis=0).mean() > 0.7

    return check


def test_detections_survive_rounding(
    exported: Export, run_onnx: Run, scenes: Inputs, check_most_survive: Callable[..., None]
) -> None:
    model = exported()
    mixed, report = to_precision(model, "fp16", [scenes])
    expected, found = run_onnx(model, scenes), run_onnx(simulate_half(mixed), scenes)
    assert report.samples == 1
    assert report.largest is not None
    assert 1.0 < report.largest[1] < 1000.0
    check_most_survive(found, expected)


def test_the_simulation_really_rounds_every_layer(exported: Export, run_onnx: Run, scenes: Inputs) -> None:
    """onnxruntime keeps the casts: what leaves a layer is a half-precision number, and not the exact one."""
    mixed, _ = to_precision(exported(), "fp16")
    simulated = simulate_half(mixed)
    assert HALF not in [tensor.data_type for tensor in simulated.graph.initializer]
    layers = [node.output[0] for node in mixed.graph.node if node.op_type in ("Conv", "Gemm", "Add")]
    types = types_of(mixed)
    layers = [name for name in layers if types[name] == HALF]
    assert len(layers) > 60
    for name in layers:
        simulated.graph.output.append(helper.make_tensor_value_info(name, FLOAT, None))
        simulated.graph.output.append(helper.make_tensor_value_info(f"{name}_exact", FLOAT, None))
    found = run_onnx(simulated, scenes)
    for name in layers:
        values = np.asarray(found[name], np.float32)
        np.testing.assert_array_equal(values, values.astype(np.float16).astype(np.float32))
        np.testing.assert_array_equal(values, np.asarray(found[f"{name}_exact"]).astype(np.float16))
    assert any((found[name] != found[f"{name}_exact"]).any() for name in layers)


def test_weights_beyond_the_range_keep_their_layer_float(exported: Export) -> None:
    model = exported()
    scale(model, f"{FC6}.weight", 1e7)
    scale(model, f"{FC6}.bias", 1e7)
    scale(model, f"{FC7}.weight", 1e-7)
    mixed, report = to_precision(model, "fp16")
    reasons = {layer.name: (layer.reason, layer.magnitude) for layer in report.kept}
    assert reasons[FC6][0] == "overflow"
    assert reasons[FC6][1] > 65504
    assert reasons[FC7][0] == "underflow"
    assert reasons[FC7][1] < 1e-5
    lines = report.lines()
    assert any(FC6 in line and "overflow" in line for line in lines)
    assert any("weights only" in line for line in lines)
    assert types_of(mixed)[f"{FC6}.weight"] == FLOAT


def test_an_activation_beyond_the_range_is_found_on_samples_only(
    exported: Export, run_onnx: Run, scenes: Inputs, check_most_survive: Callable[..., None]
) -> None:
    """fc6 much larger and fc7 as much smaller: the same model, until it is rounded."""
    model = exported()
    factor = 75000.0
    scale(model, f"{FC6}.weight", factor)
    scale(model, f"{FC6}.bias", factor)
    weight = next(t for t in model.graph.initializer if t.name == f"{FC6}.weight")
    assert np.abs(numpy_helper.to_array(weight)).max() < 65504, "the weights must fit, or they are the reason"
    scale(model, f"{FC7}.weight", 1 / factor)

    expected = run_onnx(model, scenes)
    blind, report = to_precision(model, "fp16")
    assert FC6 not in {layer.name for layer in report.kept}
    assert np.isfinite(expected["scores"]).all()
    wrong = run_onnx(simulate_half(blind), scenes)
    assert not np.allclose(wrong["scores"], expected["scores"], atol=0.1)

    seeing, report = to_precision(model, "fp16", [scenes])
    kept = {layer.name: layer for layer in report.kept}
    assert kept[FC6].reason == "overflow"
    assert kept[FC6].magnitude > 65504
    check_most_survive(run_onnx(simulate_half(seeing), scenes), expected)
    assert types_of(seeing)[f"{FC6}.weight"] == FLOAT
    assert "activations on 1 samples" in "\n".join(report.lines())


def test_what_only_rounding_drives_beyond_the_range_is_found(run_onnx: Run) -> None:
    """20007.9 and 20008.1 round to 20000 and 20016: their difference times 10000 fits only before."""
    model = small_graph(
        "same = Conv (images, eye)  boxes = Conv (same, difference)",
        eye=np.eye(2).reshape(2, 2, 1, 1),
        difference=np.reshape([-1e4, 1e4], (1, 2, 1, 1)),
    )
    sample = inputs_of(20007.9, 20008.1)
    exact = run_onnx(model, sample)["boxes"]
    assert np.abs(exact).max() < 3000
    blind, _ = to_precision(model, "fp16")
    assert np.isinf(run_onnx(simulate_half(blind), sample)["boxes"]).all()
    mixed, report = to_precision(model, "fp16", [sample])
    (layer,) = report.kept
    assert (layer.tensor, layer.reason) == ("boxes", "overflow")
    assert np.isfinite(run_onnx(simulate_half(mixed), sample)["boxes"]).all()


@pytest.mark.parametrize(
    ("value", "kept"), [(30000.0, False), (40000.0, True), (np.nan, True), (np.inf, True)]
)
def test_activations_may_use_half_of_the_range(value: float, kept: bool) -> None:
    model = small_graph("boxes = Conv (images, w)", w=np.ones((1, 2, 1, 1)))
    _, report = to_precision(model, "fp16", [inputs_of(value, 0.0)])
    assert bool(report.kept) == kept


@pytest.mark.parametrize(("value", "largest"), [(np.nan, np.inf), (-np.inf, np.inf), (-7.0, 7.0), (0.5, 2.0)])
def test_one_value_among_many_is_not_passed_over(value: float, largest: float) -> None:
    """Wherever it stands: a maximum alone would skip NaN in most places."""
    model = small_graph("boxes = Conv (images, w)", w=np.ones((1, 2, 1, 1)))
    for place in range(16):
        sample = inputs_of(1.0, 2.0)
        sample["images"][0, 1].reshape(-1)[place] = value
        assert largest_activations(model, ["images"], [sample]) == {"images": largest}


def test_activations_that_are_all_subnormal_stay_float() -> None:
    model = small_graph("boxes = Conv (images, w)", w=np.ones((1, 2, 1, 1)))
    _, report = to_precision(model, "fp16", [inputs_of(1e-6, -2e-6)])
    (layer,) = report.kept
    assert layer.reason == "underflow"
    assert to_precision(model, "fp16", [inputs_of(0.0, 0.0)])[1].kept == ()


def test_the_worst_of_several_samples_counts() -> None:
    model = small_graph("boxes = Conv (images, w)", w=np.ones((1, 2, 1, 1)))
    samples = [inputs_of(1.0, 2.0), inputs_of(50000.0, 0.0), inputs_of(3.0, 4.0)]
    assert to_precision(model, "fp16", samples)[1].kept[0].magnitude == 50000.0
    assert to_precision(model, "fp16", samples[::2])[1].largest == ("boxes", 7.0)


def test_a_constant_used_on_both_sides_exists_in_both_types(run_onnx: Run) -> None:
    """A Clip between layers becomes half, one after the last layer stays float, with the same bound."""
    model = small_graph(
        "a = Conv (images, w)  b = Clip (a, low, high)  c = Conv (b, w)  boxes = Clip (c, low, high)",
        w=np.eye(2).reshape(2, 2, 1, 1),
        low=0.0,
        high=2049.0,
    )
    mixed, report = to_precision(model, "fp16")
    assert report.kept == ()
    types = types_of(mixed)
    assert [types[n.output[0]] for n in mixed.graph.node if n.op_type == "Clip"] == [HALF, FLOAT]
    sample = inputs_of(5000.0, 2050.0)
    assert (run_onnx(simulate_half(mixed), sample)["boxes"] == 2048.0).all()  # 2049 rounds to 2048


def test_an_average_is_taken_in_float32() -> None:
    model = small_graph(
        "a = Conv (images, w)  m = ReduceMean <keepdims = 1> (a, axes)  s = Mul (a, m)  boxes = Conv (s, w)",
        w=np.eye(2).reshape(2, 2, 1, 1),
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 3]), "axes"))
    types = types_of(to_precision(model, "fp16")[0])
    assert types["m"] == FLOAT
    assert types["s"] == HALF


def test_an_inlined_model_is_taken_too(exported: Export, run_onnx: Run, scenes: Inputs) -> None:
    inlined = onnx.inliner.inline_local_functions(exported())
    mixed, report = to_precision(inlined, "fp16", [scenes])
    onnx.checker.check_model(mixed, full_check=True)
    assert report.kept == ()
    found, expected = run_onnx(simulate_half(mixed), scenes), run_onnx(inlined, scenes)
    assert np.abs(found["num_detections"] - expected["num_detections"]).max() <= 15


def test_fp32_is_a_copy(exported: Export) -> None:
    model = exported()
    same, report = to_precision(model, "fp32")
    assert same == model
    assert same is not model
    assert report.lines() == ["precision fp32: the graph as exported"]


def test_batch_norm_is_folded_before_rounding(run_onnx: Run) -> None:
    """With a variance of 1e-9 (subnormal in half precision) the folded layer is exact all the same."""
    model = small_graph(
        "a = Conv (images, w)  boxes = BatchNormalization <epsilon = 0.0> (a, scale, shift, mean, var)",
        w=np.reshape([1.0, 2.0, 3.0, 4.0], (2, 2, 1, 1)),
        scale=[1e-4, 2e-4],
        shift=[0.5, -0.5],
        mean=[1.0, 2.0],
        var=[1e-9, 1e-8],
    )
    mixed, report = to_precision(model, "fp16")
    assert report.folded == 1
    kinds = [node.op_type for node in mixed.graph.node if node.op_type not in ("Cast", "Identity")]
    assert kinds == ["Conv"]
    sample = inputs_of(1.25, -0.5)
    expected = run_onnx(model, sample)["boxes"]
    np.testing.assert_allclose(run_onnx(simulate_half(mixed), sample)["boxes"], expected, rtol=2e-3)


def test_batch_norm_is_left_where_the_convolution_is_used_elsewhere(run_onnx: Run) -> None:
    model = small_graph(
        "a = Conv (images, w)  n = BatchNormalization (a, one, one, one, one)  boxes = Add (a, n)",
        w=np.eye(2).reshape(2, 2, 1, 1),
        one=[1.0, 1.0],
    )
    mixed, report = to_precision(model, "fp16")
    assert report.folded == 0
    sample = inputs_of(1.0, 2.0)
    np.testing.assert_allclose(
        run_onnx(simulate_half(mixed), sample)["boxes"], run_onnx(model, sample)["boxes"], rtol=2e-3
    )


@pytest.mark.parametrize(
    ("magnitude", "too_large"), [(65504.0, False), (65519.0, False), (65520.0, True), (np.inf, True)]
)
def test_where_half_precision_ends(magnitude: float, too_large: bool) -> None:
    assert overflows(magnitude) is too_large


def test_rounding_loss_of_normal_and_subnormal_numbers() -> None:
    values = np.random.default_rng(0).normal(0, 1, 1000).astype(np.float32)
    assert 1e-5 < rounding_loss(values) < 5e-4
    assert rounding_loss(values * np.float32(1e-3)) < 5e-4
    assert rounding_loss(values * np.float32(1e-7)) > 0.01
    assert rounding_loss(values * np.float32(1e-9)) == pytest.approx(1.0)
    assert rounding_loss(np.zeros(3, np.float32)) == 0.0


def other_names(sample: Inputs) -> list[Inputs]:
    return [{"pixels": sample["images"]}]


def other_shape(sample: Inputs) -> list[Inputs]:
    return [sample, {**sample, "images": sample["images"][:, :64]}]


@pytest.mark.parametrize(
    ("samples", "named"),
    [
        (other_names, "sample 0 has the tensors pixels; expected images"),
        (other_shape, "sample 1 does not fit"),
    ],
)
def test_samples_that_do_not_fit(
    exported: Export, scenes: Inputs, samples: Callable[[Inputs], Sequence[Inputs]], named: str
) -> None:
    with pytest.raises(SettingsError, match=named) as caught:
        to_precision(exported(), "fp16", samples(scenes))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_converted(exported: Export, scenes: Inputs) -> None:
    model = exported()
    for precision in ("int8", "", "FP16"):
        with pytest.raises(SettingsError, match="precision"):
            to_precision(model, precision)
    lowered = lower(model, "tensorrt")
    with pytest.raises(ArtefactError, match="exported file"):
        to_precision(lowered, "fp16", [scenes])
    del model.metadata_props[:]
    for precision in ("fp16", "fp32"):
        with pytest.raises(ArtefactError, match="contract"):
            to_precision(model, precision)


def test_frames_become_samples(exported: Export) -> None:
    contract = Contract.from_json(exported().metadata_props[0].value)
    frames = [np.full((40, 30, 3), 90, np.uint8), np.full((128, 320, 3), 7, np.uint8)]
    tall, wide = network_inputs(frames, contract)
    assert tall["images"].shape == wide["images"].shape == (1, 128, 160, 3)
    assert tall["image_sizes"].tolist() == [[128, 96]]
    assert wide["image_sizes"].tolist() == [[64, 160]]
    assert int(tall["images"].max()) == 90  # not overwritten by the next
    with pytest.raises(FrameError):
        network_inputs([np.zeros((4, 4), np.uint8)], contract)
