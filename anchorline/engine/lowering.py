"""Lowering: a copy of the exported graph made fit for one target, its custom ops resolved.

| target | BatchedNMS | RoIAlign |
|---|---|---|
| onnxruntime | the file's own function | the file's own function |
| tensorrt | plugin | the file's own function: TensorRT imports RoiAlign, adaptive sampling included |
| tensorrt-rtx | plugin | ``engine/bodies.py``: no adaptive sampling (``deviations``) |
| either TensorRT with ``nms="fixed-point"`` | ``engine/bodies.py`` | as above |

Everything that is not a plugin is inlined, and then no node of our domain remains that a registered
plugin could take. Works on graphs of either precision.
"""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from anchorline.engine.bodies import BODY_DOMAIN, IN_PLACE_OF_ADAPTIVE, fixed_point_nms, grid_sample_align
from anchorline.engine.graph import (
    check_exported,
    constants,
    consumers,
    copy_of,
    drop_unused_constants,
    element_types,
    forget,
    fresh_name,
    known_values,
    replace_nodes,
    state_opset,
    tensor_names,
)
from anchorline.engine.options import NmsForm
from anchorline.runtime.contract import DOMAIN, NMS_CONVERGED, OP_VERSION
from anchorline.runtime.io.errors import ArtefactError, SettingsError

CONVERGED = NMS_CONVERGED
MOST = 3840  # entries that TensorRT's TopK takes
ROUNDS = 16  # of the fixed-point NMS; typical images need 6 to 13
LIMIT = 512  # entries of a class in the head, which bounds the overlap matrix; the RPN's are all needed

_PLUGIN_OPS = ("BatchedNMS", "RoIPool")
_KNOWN_OPS = (*_PLUGIN_OPS, "RoIAlign")
_DEFAULT_EPSILON = 1e-5
# Parsed, and then nothing runs them ("no runners").
_DATA_DEPENDENT = ("NonMaxSuppression", "NonZero")
# TensorRT for RTX cannot parse RoiAlign without a driver.
_NOT_ON = {"tensorrt": _DATA_DEPENDENT, "tensorrt-rtx": (*_DATA_DEPENDENT, "RoiAlign")}
TARGETS = (*_NOT_ON, "onnxruntime")


def fold_batch_norm(model: onnx.ModelProto) -> int:
    """Fold every ``BatchNormalization`` that alone follows a ``Conv``, in place; returns how many.

    The exporter folds most of them itself. A folded layer is one layer instead of two, and what is rounded
    to half precision later are the weights that are really used, not a variance of 1e-6 beside them.
    Computed in float64 and rounded once to float32.
    """
    graph = model.graph
    values, readers, used = constants(graph), consumers(graph), tensor_names(graph)
    outputs = {value.name for value in graph.output}
    convolutions = {node.output[0]: node for node in graph.node if node.op_type == "Conv"}
    folded = set()
    for node in graph.node:
        conv = convolutions.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        if conv is None or len(readers[conv.output[0]]) > 1 or conv.output[0] in outputs:
            continue
        parameters = [*conv.input[1:], *node.input[1:]]
        if not all(name in values for name in parameters) or len(node.output) > 1:
            continue
        weight, bias = _folded(conv, node, values)
        names = [fresh_name(f"{conv.input[1]}_{part}", used) for part in ("folded", "folded_bias")]
        graph.initializer.extend(
            numpy_helper.from_array(a, n) for a, n in zip((weight, bias), names, strict=True)
        )
        conv.input[1:] = names
        conv.output[0] = node.output[0]
        folded.add(node.output[0])
    replace_nodes(
        graph, [n for n in graph.node if not (n.op_type == "BatchNormalization" and n.output[0] in folded)]
    )
    drop_unused_constants(graph)
    return len(folded)


def _folded(
    conv: onnx.NodeProto, norm: onnx.NodeProto, values: dict[str, NDArray[np.generic]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight and bias of ``conv`` with ``norm`` in them."""
    weight = values[conv.input[1]].astype(np.float64)
    bias = values[conv.input[2]].astype(np.float64) if len(conv.input) > 2 else np.zeros(len(weight))
    scale, shift, mean, variance = (values[name].astype(np.float64) for name in norm.input[1:5])
    epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), _DEFAULT_EPSILON)
    factor = scale / np.sqrt(variance + epsilon)
    weight = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
    return weight.astype(np.float32), ((bias - mean) * factor + shift).astype(np.float32)


def cast_bytes_first(model: onnx.ModelProto) -> None:
    """Cast every uint8 input to float32 at once, in place: TensorRT moves no uint8 about."""
    graph = model.graph
    used, readers = tensor_names(graph), consumers(graph)
    casts: list[onnx.NodeProto] = []
    moved: set[str] = set()
    for value in graph.input:
        if value.type.tensor_type.elem_type != TensorProto.UINT8:
            continue
        name = fresh_name(f"{value.name}_f32", used)
        casts.append(
            helper.make_node("Cast", [value.name], [name], name=f"cast_{name}", to=TensorProto.FLOAT)
        )
        for node in readers.get(value.name, []):
            if node.op_type not in ("Transpose", "Cast"):
                raise ArtefactError(
                    f"input {value.name} is uint8 and read by {node.op_type}; expected a Transpose or a Cast"
                )
            node.input[0] = name
            moved.update(node.output)
    forget(graph, moved)
    replace_nodes(graph, [*casts, *graph.node])


def bake_casts(model: onnx.ModelProto) -> None:
    """Turn every ``CastLike`` into a ``Cast`` to the type it stands for, in place."""
    types = element_types(model)
    for node in model.graph.node:
        if node.op_type == "CastLike":
            kind = types[node.input[1]]
            node.op_type = "Cast"
            del node.input[1:]
            node.attribute.append(helper.make_attribute("to", kind))


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


def split_large_topk(model: onnx.ModelProto, most: int = MOST) -> int:
    """Rewrite every sorted ``TopK`` of float32 with K above ``most``, in place and exactly; returns how many.

    The best ``most`` are taken and struck out, then the best of what remains, and so on. The results
    follow each other in falling order, as from one TopK, and entries of -inf come last as there.
    """
    graph = model.graph
    values, used, count = constants(graph), tensor_names(graph), 0
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "TopK":
            where = node.name or node.output[0]
            if node.input[1] not in values:
                raise ArtefactError(f"{where}: the K of this TopK is computed; expected a constant")
            wanted = int(values[node.input[1]].reshape(-1)[0])
            if wanted > most:
                attributes = _attributes(node)
                if not attributes.get("largest", 1) or not attributes.get("sorted", 1):
                    raise ArtefactError(f"{where}: expected a TopK of the largest, in order")
                nodes += _pieces(graph, node, used, wanted, most, attributes.get("axis", -1))
                count += 1
                continue
        nodes.append(node)
    replace_nodes(graph, nodes)
    return count


def _pieces(
    graph: onnx.GraphProto, node: onnx.NodeProto, used: set[str], wanted: int, most: int, axis: int
) -> list[onnx.NodeProto]:
    """The nodes that stand for a TopK of ``wanted`` entries."""
    source, (values, all_indices) = node.input[0], node.output

    def name(part: str) -> str:
        return fresh_name(f"{values}_{part}", used)

    def constant(part: str, value: NDArray[np.generic]) -> str:
        graph.initializer.append(numpy_helper.from_array(value, name(part)))
        return str(graph.initializer[-1].name)

    lowest = constant("lowest", np.array(np.finfo(np.float32).min, np.float32))
    struck_out = constant("struck_out", np.array(-np.inf, np.float32))
    # What is struck out has to rank below everything else, -inf included.
    rest, indices = name("rest"), list[str]()
    made = [helper.make_node("Max", [source, lowest], [rest])]
    for first in range(0, wanted, most):
        if indices:
            shape, gone, remaining = name("shape"), name("gone"), name("rest")
            made.append(helper.make_node("Shape", [indices[-1]], [shape]))
            made.append(helper.make_node("Expand", [struck_out, shape], [gone]))
            taken = [rest, indices[-1], gone]
            made.append(helper.make_node("ScatterElements", taken, [remaining], axis=axis))
            rest = remaining
        k = constant("k", np.array([min(most, wanted - first)], np.int64))
        indices.append(name("index"))
        made.append(helper.make_node("TopK", [rest, k], [name("best"), indices[-1]], axis=axis))
    made.append(helper.make_node("Concat", indices, [all_indices], axis=axis))
    made.append(helper.make_node("GatherElements", [source, all_indices], [values], axis=axis))
    return made


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def lower(
    model: onnx.ModelProto,
    target: str,
    nms: str = "plugin",
    *,
    fixed_point_rounds: int = ROUNDS,
    fixed_point_limit: int | None = LIMIT,
    report_convergence: bool = False,
) -> onnx.ModelProto:
    """A copy of ``model`` (exported, possibly after ``to_precision``) for ``target``.

    ``nms`` "plugin" keeps ``BatchedNMS`` a node for the plugin, "fixed-point" needs none: T =
    ``fixed_point_rounds`` (even) rounds over at most the best ``fixed_point_limit`` entries of each
    group that has a score threshold (None: all). ``report_convergence`` adds the output
    ``nms_converged`` bool [1], false when that was not enough. onnxruntime takes neither: its form is
    the file's own. Raises ``SettingsError`` and ``ArtefactError``.
    """
    _check_settings(target, nms, fixed_point_rounds, fixed_point_limit, report_convergence)
    check_exported(model)
    _check_custom_ops(model)
    lowered = copy_of(model)
    if target == "onnxruntime":
        return _inlined(lowered)
    plugins = set(_PLUGIN_OPS) if nms == "plugin" else set()
    unsettled = _resolve(lowered, target, plugins, fixed_point_rounds, fixed_point_limit, report_convergence)
    if report_convergence:
        _report_convergence(lowered, unsettled)
    lowered = _inlined(lowered)
    cast_bytes_first(lowered)
    bake_casts(lowered)
    split_large_topk(lowered)
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


def _check_settings(target: str, nms: str, rounds: int, limit: int | None, report: bool) -> None:
    if target not in TARGETS:
        raise SettingsError(f"target is {target!r}; expected one of {', '.join(TARGETS)}")
    if nms not in get_args(NmsForm):
        raise SettingsError(f"nms is {nms!r}; expected one of {', '.join(get_args(NmsForm))}")
    if target == "onnxruntime" and nms == "fixed-point":
        raise SettingsError(
            "nms is 'fixed-point', which takes seconds and gigabytes in onnxruntime; leave it out"
        )
    if rounds < 2 or rounds % 2:
        raise SettingsError(
            f"fixed-point rounds is {rounds}; expected an even number of at least 2 "
            "(an odd one drops boxes that should stay)"
        )
    if limit is not None and limit < 1:
        raise SettingsError(f"fixed-point limit is {limit}; expected at least 1, or None for all")
    if report and nms != "fixed-point":
        raise SettingsError("convergence is reported by the fixed-point NMS only; the plugin is exact")


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
    model: onnx.ModelProto, target: str, plugins: set[str], rounds: int, limit: int | None, report: bool
) -> list[str]:
    """Give every custom node its form for ``target``, in place: a plugin's attributes or a body.

    Returns the tensors that tell whether each fixed-point NMS has settled, with ``report``.
    """
    values, used = known_values(model), tensor_names(model.graph)
    unsettled = []
    for number, node in enumerate(model.graph.node):
        if node.domain != DOMAIN:
            continue
        name, attributes = f"{node.op_type}_{number}", _attributes(node)
        if node.op_type in plugins:
            # TensorRT >= 10.15 prefers a plugin only where the node names its namespace and version.
            attributes |= {"plugin_namespace": DOMAIN, "plugin_version": str(OP_VERSION)}
            del node.attribute[:]
            node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        elif node.op_type == "BatchedNMS":
            body = fixed_point_nms(
                name,
                count=_size(values, node.input[1], 1),
                iou_threshold=attributes["iou_threshold"],
                score_threshold=attributes["score_threshold"],
                rounds=rounds,
                # Without a score threshold every entry is valid (RPN), and a limit would drop what counts.
                limit=limit if attributes["score_threshold"] >= 0 else None,
                report=report,
            )
            _use_body(model, node, body)
            if report:
                unsettled.append(fresh_name(f"{node.output[0]}_unsettled", used))
                node.output.append(unsettled[-1])
        elif node.op_type == "RoIAlign" and target == "tensorrt-rtx":
            features, rois = node.input
            channels, height, width = (_size(values, features, axis) for axis in (1, 2, 3))
            body = grid_sample_align(
                name,
                map_shape=(channels, height, width),
                rois=_size(values, rois, 1),
                output_size=attributes["output_size"],
                sampling_ratio=attributes["sampling_ratio"],
                kind=values[features].elem_type,
            )
            _use_body(model, node, body)
        elif node.op_type == "RoIPool":
            raise ArtefactError("RoIPool runs as a plugin only in TensorRT; build with the plugins")
    functions = [f for f in model.functions if not (f.domain == DOMAIN and f.name in plugins)]
    del model.functions[:]
    model.functions.extend(functions)
    return unsettled


def _use_body(model: onnx.ModelProto, node: onnx.NodeProto, body: onnx.FunctionProto) -> None:
    """Let ``node`` call ``body``, whose constants are baked in, under a name that no plugin has."""
    model.functions.append(body)
    node.domain, node.op_type = body.domain, body.name
    del node.attribute[:]
    if BODY_DOMAIN not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(BODY_DOMAIN, 1))


def _size(values: dict[str, onnx.TypeProto.Tensor], name: str, axis: int) -> int:
    """A size that has to be fixed; only the batch is free."""
    dims = values[name].shape.dim if name in values else []
    size = dims[axis].dim_value if axis < len(dims) else 0
    if size < 1:
        raise ArtefactError(
            f"{name}: size of axis {axis} is not fixed; only the batch may be free, export the model again"
        )
    return int(size)


def _report_convergence(model: onnx.ModelProto, unsettled: list[str]) -> None:
    """The output ``nms_converged`` bool [1]: no NMS of the graph was left unsettled."""
    graph = model.graph
    used = tensor_names(graph)
    most, zero = fresh_name("nms_unsettled", used), fresh_name("nms_settled", used)
    graph.node.append(helper.make_node("Max", unsettled, [most]))
    graph.initializer.append(helper.make_tensor(zero, TensorProto.FLOAT, [1], [0.5]))
    graph.node.append(helper.make_node("Less", [most, zero], [CONVERGED]))
    graph.output.append(helper.make_tensor_value_info(CONVERGED, TensorProto.BOOL, [1]))


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """All functions inlined, and no domain imported that is no longer used."""
    version = next(opset.version for opset in model.opset_import if not opset.domain)
    state_opset(model, version)  # bodies are written for the exported file's
    inlined = onnx.inliner.inline_local_functions(model)
    used = {node.domain for node in inlined.graph.node} | {""}
    opsets = [opset for opset in inlined.opset_import if opset.domain in used]
    del inlined.opset_import[:]
    inlined.opset_import.extend(opsets)
    assert {o.domain: o.version for o in inlined.opset_import}[""] == version
    return inlined
