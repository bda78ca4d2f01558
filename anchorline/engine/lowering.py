"""Lowering: a copy of the exported graph made fit for one target, its custom ops resolved.

| target | BatchedNMS | RoIAlign |
|---|---|---|
| tensorrt | plugin | the file's own function: TensorRT imports RoiAlign, adaptive sampling included |
| tensorrt-rtx | plugin | ``engine/bodies.py``, either form: no adaptive sampling (``deviations``) |
| either TensorRT with ``nms="fixed-point"`` | ``engine/bodies.py`` | as above |

Everything that is not a plugin is inlined, and then no node of our domain remains that a registered
plugin could take. Works on graphs of either precision.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import onnx
import onnx.inliner
from onnx import TensorProto, helper

from anchorline.engine.bodies import (
    BODY_DOMAIN,
    IN_PLACE_OF_ADAPTIVE,
    fixed_point_nms,
    gather_align,
    grid_sample_align,
    topk_in_pieces,
)
from anchorline.engine.graph import (
    cast_node,
    check_exported,
    constants,
    drop_unused_constants,
    element_types,
    forget,
    fresh_name,
    insert_after,
    known_values,
    refill,
    state_opset,
    tensor_names,
)
from anchorline.runtime.contract import CONTRACT_KEY, DOMAIN, NMS_CONVERGED, OP_VERSION
from anchorline.runtime.io.errors import ArtefactError

MOST = 3840  # entries that TensorRT's TopK takes
ROUNDS = 16  # of the fixed-point NMS; typical images need 6 to 13
LIMIT = 512  # entries of a class in the head, which bounds the overlap matrix; the RPN's are all needed

_ROI_ALIGN = {"grid-sample": grid_sample_align, "gather": gather_align}
_PLUGIN_OPS = ("BatchedNMS", "RoIPool")
_KNOWN_OPS = (*_PLUGIN_OPS, "RoIAlign")
# Parsed, and then nothing runs them ("no runners").
_DATA_DEPENDENT = ("NonMaxSuppression", "NonZero")
# TensorRT for RTX cannot parse RoiAlign without a driver.
_NOT_ON = {"tensorrt": _DATA_DEPENDENT, "tensorrt-rtx": (*_DATA_DEPENDENT, "RoiAlign")}


def fix_canvas(model: onnx.ModelProto, canvas: tuple[int, int]) -> None:
    """Let ``model``, exported for any frame size, take the one ``canvas`` (height, width), in place.

    What its shapes are computed from is then constant, and the builder folds it.
    """
    contract = check_exported(model)
    images = next(value for value in model.graph.input if value.name == contract.inputs[0])
    for side, size in zip(images.type.tensor_type.shape.dim[1:3], canvas, strict=True):
        side.dim_value = size
    stated = dataclasses.replace(contract, canvas=canvas).to_json()
    next(entry for entry in model.metadata_props if entry.key == CONTRACT_KEY).value = stated


def lower(
    model: onnx.ModelProto,
    target: str,
    nms: str = "plugin",
    roi_align: str = "grid-sample",
    *,
    fixed_point_rounds: int = ROUNDS,
    fixed_point_limit: int | None = LIMIT,
) -> onnx.ModelProto:
    """A copy of ``model`` (exported, possibly after ``to_precision``) for ``target``.

    ``nms`` "plugin" keeps ``BatchedNMS`` a node for the plugin, "fixed-point" needs none: T =
    ``fixed_point_rounds`` (even) rounds over at most the best ``fixed_point_limit`` entries of each
    group that has a score threshold (None: all). It adds the output ``nms_converged`` bool [1], false
    when that was not enough. Raises ``ArtefactError``.
    """
    check_exported(model)
    _check_custom_ops(model)
    lowered = copy.deepcopy(model)
    plugins = set(_PLUGIN_OPS) if nms == "plugin" else set()
    unsettled = _resolve(lowered, target, plugins, roi_align, fixed_point_rounds, fixed_point_limit)
    if unsettled:
        _report_convergence(lowered.graph, unsettled)
    split_large_topk(lowered)
    lowered = _inlined(lowered)
    cast_bytes_first(lowered)
    bake_casts(lowered)
    drop_unused_constants(lowered.graph)
    check_rules(lowered, target, plugins)
    onnx.checker.check_model(lowered)
    return lowered


def deviations(model: onnx.ModelProto, target: str) -> tuple[str, ...]:
    """What ``lower`` makes of the exported ``model`` for ``target`` that is not the same, a line each."""
    adaptive = any(
        node.domain == DOMAIN and node.op_type == "RoIAlign" and _attributes(node)["sampling_ratio"] == 0
        for node in model.graph.node
    )
    if not adaptive or target != "tensorrt-rtx":
        return ()
    points = IN_PLACE_OF_ADAPTIVE
    return (
        f"the model samples RoIs adaptively, which TensorRT for RTX cannot: this engine takes {points} x "
        f"{points} points in each cell, so scores and boxes differ a little from the ONNX file's",
    )


def _check_custom_ops(model: onnx.ModelProto) -> None:
    """Every custom node must be known and have its function in the file."""
    used = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    functions = {function.name for function in model.functions if function.domain == DOMAIN}
    if "BatchedNMS" not in used:
        raise ArtefactError(
            "the graph has no anchorline::BatchedNMS node, so nothing can be chosen for a target; "
            "give the file that anchorline export wrote"
        )
    for name in sorted(used):
        if name not in _KNOWN_OPS:
            raise ArtefactError(
                f"the graph has the node anchorline::{name}, which is not known here; upgrade anchorline"
            )
        if name not in functions:
            raise ArtefactError(
                f"the file lacks the function anchorline::{name}; give the file that anchorline export wrote"
            )


def _resolve(
    model: onnx.ModelProto, target: str, plugins: set[str], roi_align: str, rounds: int, limit: int | None
) -> list[str]:
    """Give every custom node its plugin's attributes or a body, in place; returns what tells whether each
    fixed-point NMS has settled."""
    values, used = known_values(model), tensor_names(model.graph)
    unsettled = []
    for number, node in enumerate(model.graph.node):
        if node.domain != DOMAIN:
            continue
        name, attributes = f"{node.op_type}_{number}", _attributes(node)
        if node.op_type in plugins:
            # TensorRT >= 10.15 prefers a plugin only where the node names its namespace and version.
            attributes |= {"plugin_namespace": DOMAIN, "plugin_version": str(OP_VERSION)}
            refill(node.attribute, (helper.make_attribute(key, value) for key, value in attributes.items()))
        elif node.op_type == "BatchedNMS":
            body = fixed_point_nms(
                name,
                count=_size(values, node.input[1], 1),
                iou_threshold=attributes["iou_threshold"],
                score_threshold=attributes["score_threshold"],
                rounds=rounds,
                # Without a score threshold every entry is valid (RPN), and a limit would drop what counts.
                limit=limit if attributes["score_threshold"] >= 0 else None,
            )
            _use_body(model, node, body)
            unsettled.append(fresh_name(f"{node.output[0]}_unsettled", used))
            node.output.append(unsettled[-1])
        elif node.op_type == "RoIAlign" and target == "tensorrt-rtx":
            features, rois = node.input
            body = _ROI_ALIGN[roi_align](
                name,
                map_shape=(
                    _size(values, features, 1),
                    _known_size(values, features, 2),
                    _known_size(values, features, 3),
                ),
                rois=_size(values, rois, 1),
                output_size=attributes["output_size"],
                sampling_ratio=attributes["sampling_ratio"],
                kind=values[features].elem_type,
            )
            _use_body(model, node, body)
        elif node.op_type == "RoIPool":
            raise ArtefactError("RoIPool runs as a plugin only in TensorRT; build with the plugins")
    refill(model.functions, (f for f in model.functions if f.domain != DOMAIN or f.name not in plugins))
    return unsettled


def _use_body(model: onnx.ModelProto, node: onnx.NodeProto, body: onnx.FunctionProto) -> None:
    """Let ``node`` call ``body``, whose constants are baked in, under a name that no plugin has."""
    model.functions.append(body)
    node.domain, node.op_type = body.domain, body.name
    del node.attribute[:]
    if BODY_DOMAIN not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(BODY_DOMAIN, 1))


def _size(values: dict[str, onnx.TypeProto.Tensor], name: str, axis: int) -> int:
    """A size that has to be fixed."""
    size = _known_size(values, name, axis)
    if size is None:
        raise ArtefactError(f"{name}: size of axis {axis} is not fixed; expected one, export the model again")
    return size


def _known_size(values: dict[str, onnx.TypeProto.Tensor], name: str, axis: int) -> int | None:
    dims = values[name].shape.dim if name in values else []
    size = dims[axis].dim_value if axis < len(dims) else 0
    return int(size) if size >= 1 else None


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _report_convergence(graph: onnx.GraphProto, unsettled: list[str]) -> None:
    """The output ``nms_converged`` bool [1]: no NMS of the graph was left unsettled."""
    used = tensor_names(graph)
    most, half = fresh_name("nms_unsettled", used), fresh_name("nms_settled", used)
    graph.initializer.append(helper.make_tensor(half, TensorProto.FLOAT, [1], [0.5]))
    graph.node.append(helper.make_node("Max", unsettled, [most]))
    graph.node.append(helper.make_node("Less", [most, half], [NMS_CONVERGED]))
    graph.output.append(helper.make_tensor_value_info(NMS_CONVERGED, TensorProto.BOOL, [1]))


def split_large_topk(model: onnx.ModelProto, most: int = MOST) -> int:
    """Let every sorted ``TopK`` of float32 with K above ``most`` call a body of several, in place.

    The results are exactly the same. Returns how many there were.
    """
    values, count = constants(model.graph), 0
    for number, node in enumerate(model.graph.node):
        if node.op_type != "TopK":
            continue
        where = node.name or node.output[0]
        if node.input[1] not in values:
            raise ArtefactError(f"{where}: the K of this TopK is computed; expected a constant")
        k = int(values[node.input[1]].reshape(-1)[0])
        if k <= most:
            continue
        attributes = _attributes(node)
        if not attributes.get("largest", 1) or not attributes.get("sorted", 1):
            raise ArtefactError(f"{where}: expected a TopK of the largest, in order")
        body = topk_in_pieces(f"TopK_{number}", k=k, most=most, axis=attributes.get("axis", -1))
        _use_body(model, node, body)
        del node.input[1:]
        count += 1
    return count


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """All functions inlined, and no domain imported that is no longer used."""
    version = next(opset.version for opset in model.opset_import if not opset.domain)
    state_opset(model, version)  # bodies are written for the exported file's
    inlined = onnx.inliner.inline_local_functions(model)
    used = {node.domain for node in inlined.graph.node} | {""}
    refill(inlined.opset_import, (opset for opset in inlined.opset_import if opset.domain in used))
    assert {o.domain: o.version for o in inlined.opset_import}[""] == version
    return inlined


def cast_bytes_first(model: onnx.ModelProto) -> None:
    """Cast every uint8 input to float32 at once, in place: TensorRT moves no uint8 about."""
    graph = model.graph
    used, casts = tensor_names(graph), {}
    for value in graph.input:
        if value.type.tensor_type.elem_type != TensorProto.UINT8:
            continue
        name = fresh_name(f"{value.name}_f32", used)
        casts[value.name] = [cast_node(value.name, name, TensorProto.FLOAT)]
        readers = [node for node in graph.node if value.name in node.input]
        for node in readers:
            if node.op_type not in ("Transpose", "Cast", "Shape"):
                raise ArtefactError(
                    f"input {value.name} is uint8 and read by {node.op_type}; expected a Transpose or a Cast"
                )
            node.input[0] = name
        forget(graph, {output for node in readers for output in node.output})
    insert_after(graph, casts)


def bake_casts(model: onnx.ModelProto) -> None:
    """Turn every ``CastLike`` into a ``Cast`` to the type it stands for, in place."""
    types = element_types(model)
    for node in model.graph.node:
        if node.op_type == "CastLike":
            node.op_type = "Cast"
            node.attribute.append(helper.make_attribute("to", types[node.input[1]]))
            del node.input[1:]


def check_rules(model: onnx.ModelProto, target: str, plugins: set[str]) -> None:
    """Raise ``ArtefactError`` naming the first node that ``target`` would refuse."""
    for node in model.graph.node:
        where = f"node {node.name or node.output[0]} ({node.op_type})"
        if node.domain and node.op_type not in plugins:
            raise ArtefactError(f"{where}: {target} does not know the domain {node.domain!r}; export again")
        if node.op_type in _NOT_ON[target]:
            raise ArtefactError(f"{where}: {target} cannot run this op; export the model again")
        if node.op_type == "Resize" and any(a.name == "antialias" and a.i for a in node.attribute):
            raise ArtefactError(f"{where}: {target} has no antialiased resizing; export without it")
