"""Whole models lowered for each target: the same detections as the exported file, and what they hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnx.inliner
import pytest
from numpy.typing import NDArray

from anchorline.engine.graph import check_exported
from anchorline.engine.lowering import fix_canvas, lower
from anchorline.engine.mixed_precision import to_precision
from anchorline.export.functions import default_functions
from anchorline.runtime.contract import CONTRACT_KEY, NMS_CONVERGED
from anchorline.runtime.io.errors import AnchorlineError, ArtefactError

Outputs = dict[str, NDArray[np.generic]]
Export = Callable[..., onnx.ModelProto]
Run = Callable[..., Outputs]
Inputs = dict[str, NDArray[np.generic]]

# An export takes up to ten seconds; the two have every custom op, one map and several.
MODELS = [("fpn", "detections"), ("single", "proposals")]
NMS = ("anchorline", "BatchedNMS")


def nodes_of(model: onnx.ModelProto) -> Counter[tuple[str, str]]:
    return Counter((node.domain, node.op_type) for node in model.graph.node)


def with_nms_function(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with the default body for its plugin nodes, so that onnxruntime can stand in for TensorRT."""
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    whole.functions.extend(f for f in default_functions() if f.name == "BatchedNMS")
    return whole


@pytest.fixture
def check_same(
    run_onnx: Run,
    scenes: Inputs,
    rows_of: Callable[[Outputs, int], NDArray[np.float64]],
    check_same_rows: Callable[..., None],
) -> Callable[..., Outputs]:
    """``check_same(found, expected, **tolerances)``: two models detect the same in every scene."""

    def check(found: onnx.ModelProto, expected: onnx.ModelProto, **tolerances: float) -> Outputs:
        ours, theirs = run_onnx(found, scenes), run_onnx(expected, scenes)
        for image in range(len(scenes["images"])):
            rows = rows_of(theirs, image)
            assert len(rows) > 10, "too few to compare anything"
            check_same_rows(rows_of(ours, image), rows, **tolerances)
        return ours

    return check


@pytest.mark.parametrize(("neck", "task"), MODELS)
@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_with_the_plugin_s_nodes_it_detects_the_same(
    exported: Export, check_same: Callable[..., Outputs], neck: str, task: str, target: str
) -> None:
    model = exported(neck, task)
    lowered = lower(model, target)
    check_same(with_nms_function(lowered), model)
    count = 1 if task == "proposals" else 2
    assert nodes_of(lowered)[NMS] == count
    assert {domain for domain, _ in nodes_of(lowered)} == {"", "anchorline"}
    assert not lowered.functions
    for node in lowered.graph.node:
        if node.domain:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert attributes["plugin_namespace"] == b"anchorline"
            assert attributes["plugin_version"] == b"1"
            assert set(attributes) == {
                "iou_threshold", "score_threshold", "plugin_namespace", "plugin_version"
            }  # fmt: skip


@pytest.mark.parametrize(("neck", "task"), MODELS)
@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_without_plugins_it_detects_the_same_and_nothing_of_our_domain_remains(
    exported: Export, check_same: Callable[..., Outputs], neck: str, task: str, target: str
) -> None:
    model = exported(neck, task)
    lowered = lower(model, target, "fixed-point", fixed_point_rounds=40)
    found = check_same(lowered, model)
    assert found[NMS_CONVERGED].shape == (1,)
    assert found[NMS_CONVERGED].all()
    assert {domain for domain, _ in nodes_of(lowered)} == {""}
    assert [opset.domain for opset in lowered.opset_import] == [""]
    assert not lowered.functions
    names = {attribute.name for node in lowered.graph.node for attribute in node.attribute}
    assert not names & {"plugin_namespace", "plugin_version"}
    assert [output.name for output in lowered.graph.output] == [
        *(output.name for output in model.graph.output),
        NMS_CONVERGED,
    ]


def test_too_few_rounds_and_too_small_a_limit_are_reported(
    exported: Export, run_onnx: Run, scenes: Inputs
) -> None:
    """At a low IoU threshold even the scattered boxes of an untrained model suppress each other in chains."""
    model = exported()
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "iou_threshold":
                attribute.f = 0.1
    for rounds, limit, converges in ((2, None, False), (40, 3, False), (40, None, True)):
        lowered = lower(
            model, "tensorrt-rtx", "fixed-point", fixed_point_rounds=rounds, fixed_point_limit=limit
        )
        assert run_onnx(lowered, scenes)[NMS_CONVERGED].tolist() == [converges], (rounds, limit)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_roi_align_as_gather_detects_the_same(
    exported: Export, check_same: Callable[..., Outputs], precision: str
) -> None:
    model, _ = to_precision(exported(), precision)
    lowered = lower(model, "tensorrt-rtx", roi_align="gather")
    operators = {operator for _, operator in nodes_of(lowered)}
    assert "GatherElements" in operators
    assert not operators & {"GridSample", "RoiAlign"}
    tolerances = {} if precision == "fp32" else {"box": 0.3, "score": 5e-3}
    check_same(with_nms_function(lowered), model, **tolerances)


def inputs_on(height: int, width: int) -> dict[str, NDArray[np.generic]]:
    """An image of random patches of 8 pixels that fills a part of a canvas."""
    patches = np.random.default_rng(5).integers(0, 256, (1, height // 8, width // 8, 3), dtype=np.uint8)
    images = patches.repeat(8, axis=1).repeat(8, axis=2)
    return {"images": images, "image_sizes": np.array([(height - 20, width - 30)], np.float32)}


@pytest.mark.parametrize("form", ["grid-sample", "gather"])
def test_a_model_for_any_frame_size_detects_the_same_at_each(
    form: str,
    exported: Export,
    run_onnx: Run,
    rows_of: Callable[[Outputs, int], NDArray[np.float64]],
    check_same_rows: Callable[..., None],
) -> None:
    """The bodies of RoIAlign read the sides of their map when they run."""
    model = exported(free=True)
    assert all(side.dim_param for side in model.graph.input[0].type.tensor_type.shape.dim[1:3])
    lowered = with_nms_function(lower(model, "tensorrt-rtx", roi_align=form))
    for height, width in ((160, 128), (96, 224)):
        inputs = inputs_on(height, width)
        rows = rows_of(run_onnx(model, inputs), 0)
        assert len(rows) > 10, "too few to compare anything"
        check_same_rows(rows_of(run_onnx(lowered, inputs), 0), rows)


@pytest.mark.parametrize("canvas", [(128, 160), (96, 224)])
def test_a_canvas_that_is_fixed_before_lowering_detects_the_same(
    canvas: tuple[int, int],
    exported: Export,
    run_onnx: Run,
    rows_of: Callable[[Outputs, int], NDArray[np.float64]],
    check_same_rows: Callable[..., None],
) -> None:
    """And takes no other; with the fixed-point NMS, which has to know its sizes."""
    model, fixed = exported(free=True), exported(free=True)
    fix_canvas(fixed, canvas)
    assert check_exported(fixed).canvas == canvas
    lowered = lower(fixed, "tensorrt-rtx", "fixed-point", fixed_point_rounds=40)
    inputs = inputs_on(*canvas)
    rows = rows_of(run_onnx(model, inputs), 0)
    assert len(rows) > 10, "too few to compare anything"
    check_same_rows(rows_of(run_onnx(lowered, inputs), 0), rows)
    with pytest.raises(Exception, match="Got invalid dimensions"):
        run_onnx(lowered, {**inputs, "images": np.zeros((1, 64, 64, 3), np.uint8)})


@pytest.mark.parametrize("nms", ["plugin", "fixed-point"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_tensorrt_refuses_is_not_in_the_graph(exported: Export, precision: str, nms: str) -> None:
    model, _ = to_precision(exported(), precision)
    for target, align in (("tensorrt", "RoiAlign"), ("tensorrt-rtx", "GridSample")):
        lowered = lower(model, target, nms)
        operators = {operator for _, operator in nodes_of(lowered)}
        assert align in operators
        assert not operators & {"NonMaxSuppression", "NonZero", "CastLike"}
        assert ("RoiAlign" in operators) == (target == "tensorrt")
        # uint8 is cast before anything else touches it.
        readers = [node.op_type for node in lowered.graph.node if "images" in node.input]
        assert readers == ["Cast"]
        types = element_types_of(lowered)
        for node in lowered.graph.node:
            if node.op_type in ("GridSample", "RoiAlign"):
                assert types[node.input[0]] == types[node.input[1]] == onnx.TensorProto.FLOAT


def element_types_of(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    return {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_half_precision_before_lowering_changes_nothing_but_rounding(
    exported: Export, check_same: Callable[..., Outputs], target: str
) -> None:
    """The custom ops' bodies take half-precision features as the default bodies do."""
    mixed, _ = to_precision(exported(), "fp16")
    check_same(with_nms_function(lower(mixed, target)), mixed, box=0.3, score=5e-3)


def test_the_exported_model_is_never_changed(exported: Export) -> None:
    model = exported()
    before = model.SerializeToString()
    mixed, _ = to_precision(model, "fp16")
    half = mixed.SerializeToString()
    for target in ("tensorrt", "tensorrt-rtx"):
        lower(model, target)
        lower(mixed, target)
    lower(model, "tensorrt-rtx", "fixed-point")
    assert model.SerializeToString() == before
    assert mixed.SerializeToString() == half


def test_roi_pool_is_a_plugin_or_nothing(exported: Export) -> None:
    model = exported()
    next(f for f in model.functions if f.name == "RoIAlign").name = "RoIPool"
    next(n for n in model.graph.node if n.op_type == "RoIAlign").op_type = "RoIPool"
    assert nodes_of(lower(model, "tensorrt-rtx"))["anchorline", "RoIPool"] == 1
    with pytest.raises(ArtefactError, match="RoIPool"):
        lower(model, "tensorrt-rtx", "fixed-point")


def test_shapes_stay_fixed_but_for_the_batch(exported: Export) -> None:
    lowered = lower(exported(), "tensorrt-rtx")
    for value in (*lowered.graph.input, *lowered.graph.output):
        first, *others = value.type.tensor_type.shape.dim
        assert first.dim_param == "batch"
        assert all(dim.dim_value > 0 for dim in others)


def no_contract(model: onnx.ModelProto) -> None:
    del model.metadata_props[:]


def damaged_contract(model: onnx.ModelProto) -> None:
    model.metadata_props[0].value = "{"


def old_opset(model: onnx.ModelProto) -> None:
    next(opset for opset in model.opset_import if not opset.domain).version = 11


def no_function(model: onnx.ModelProto) -> None:
    del model.functions[:]


def no_custom_nodes(model: onnx.ModelProto) -> None:
    model.CopyFrom(onnx.inliner.inline_local_functions(model))


def foreign_node(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "RoIAlign").op_type = "RotatedAlign"


def no_graph(model: onnx.ModelProto) -> None:
    model.CopyFrom(onnx.ModelProto())


def renamed_output(model: onnx.ModelProto) -> None:
    next(output for output in model.graph.output if output.name == "labels").name = "classes"


def antialiased(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Resize")
    next(a for a in node.attribute if a.name == "antialias").i = 1


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (no_graph, "no graph"),
        (no_contract, "contract"),
        (damaged_contract, "not JSON"),
        (old_opset, "opset is 11; expected 18"),
        (no_function, "function anchorline::BatchedNMS"),
        (no_custom_nodes, "BatchedNMS"),
        (foreign_node, "RotatedAlign"),
        (renamed_output, "output labels"),
        (antialiased, "antialias"),
    ],
)
def test_a_model_that_cannot_be_lowered(
    exported: Export, damage: Callable[[onnx.ModelProto], None], named: str
) -> None:
    model = exported()
    assert CONTRACT_KEY in {entry.key for entry in model.metadata_props}
    damage(model)
    with pytest.raises(ArtefactError, match=named) as caught:
        lower(model, "tensorrt-rtx")
    assert isinstance(caught.value, AnchorlineError)
    assert "\n" not in str(caught.value)
