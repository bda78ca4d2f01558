"""Lowering: a copy of the exported graph made fit for one target, its custom ops resolved.

| target | BatchedNMS | RoIAlign |
|---|---|---|
| onnxruntime | the file's own function | the file's own function |
| tensorrt | plugin | the file's own function: TensorRT imports RoiAlign, adaptive sampling included |
| tensorrt-rtx | plugin | ``engine/bodies/grid_sample_align.py``: no adaptive sampling (``deviations``) |
| either TensorRT with ``nms="fixed-point"`` | ``engine/bodies/fixed_point_nms.py`` | as above |

Everything that is not a plugin is inlined, and then no node of our domain remains that a registered
plugin could take. Works on graphs of either precision.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from anchorline.engine.bodies.fixed_point_nms import fixed_point_nms
from anchorline.engine.bodies.grid_sample_align import IN_PLACE_OF_ADAPTIVE, grid_sample_align
from anchorline.engine.bodies.naming import BODY_DOMAIN
from anchorline.engine.graph_tools import (
    constants,
    consumers,
    copy_of,
    drop_unused_constants,
    element_types,
    fresh_name,
    known_values,
    replace_nodes,
    tensor_names,
)
from anchorline.engine.model_file import check_exported, state_opset
from anchorline.runtime.contract import DOMAIN, NMS_CONVERGED, OP_VERSION
from anchorline.runtime.io.errors import ArtefactError, SettingsError

# Folding batch norm into the convolution before it, in full precision.
#
# A folded layer is one layer instead of two, and what is rounded to half precision later are the
# weights that are really used, not a variance of 1e-6 beside them.


_DEFAULT_EPSILON = 1e-5


def fold_batch_norm(model: onnx.ModelProto) -> int:
    """Fold every ``BatchNormalization`` that alone follows a ``Conv``, in place; returns how many.

    The exporter folds most of them itself. Computed in float64 and rounded once to float32.
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


# What TensorRT's ONNX parser asks of a graph beyond ONNX itself, as rewrites and as a check.


# Parsed, and then nothing runs them ("no runners").
_DATA_DEPENDENT = ("NonMaxSuppression", "NonZero")
# TensorRT for RTX cannot parse RoiAlign without a driver.
_NOT_ON = {"tensorrt": _DATA_DEPENDENT, "tensorrt-rtx": (*_DATA_DEPENDENT, "RoiAlign")}


def cast_bytes_first(model: onnx.ModelProto) -> None:
    """Cast every uint8 input to float32 at once, in place: TensorRT moves no uint8 about."""
    graph = model.graph
    used, readers = tensor_names(graph), consumers(graph)
    casts, moved = [], set()
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
    notes = [value for value in graph.value_info if value.name not in moved]
    del graph.value_info[:]
    graph.value_info.extend(notes)
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


# TopK with more than TensorRT's 3840 entries, taken exactly, in pieces.


MOST = 3840


def split_large_topk(model: onnx.ModelProto, most: int = MOST) -> int:
    """Rewrite every sorted ``TopK`` of float32 with K above ``most``, in place; returns how many.

    The best ``most`` are taken and struck out, then the best of what remains, and so on. The results
    follow each other in falling order, as from one TopK, and entries of -inf come last as there.
    """
    graph = model.graph
    values, used, count = constants(graph), tensor_names(graph), 0
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != "TopK":
            nodes.append(node)
            continue
        if node.input[1] not in values:
            raise ArtefactError(
                f"{node.name or node.output[0]}: the K of this TopK is computed; expected a constant"
            )
        wanted = int(values[node.input[1]].reshape(-1)[0])
        if wanted <= most:
            nodes.append(node)
            continue
        nodes += _Pieces(graph, node, used).nodes(wanted, most)
        count += 1
    replace_nodes(graph, nodes)
    return count


class _Pieces:
    """The nodes that stand for one TopK."""

    def __init__(self, graph: onnx.GraphProto, node: onnx.NodeProto, used: set[str]) -> None:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if not attributes.get("largest", 1) or not attributes.get("sorted", 1):
            raise ArtefactError(f"{node.name or node.output[0]}: expected a TopK of the largest, in order")
        self.graph, self.node, self.used = graph, node, used
        self.axis = attributes.get("axis", -1)

    def nodes(self, wanted: int, most: int) -> list[onnx.NodeProto]:
        """``wanted`` entries in pieces of at most ``most``."""
        source = self.node.input[0]
        lowest = self._constant("lowest", np.array(np.finfo(np.float32).min, np.float32))
        struck_out = self._constant("struck_out", np.array(-np.inf, np.float32))
        # What is struck out has to rank below everything else, -inf included.
        rest = self._name("rest")
        made = [helper.make_node("Max", [source, lowest], [rest])]
        indices: list[str] = []
        for piece, size in enumerate(_sizes(wanted, most)):
            if piece:
                shape, gone, remaining = (self._name(part) for part in ("shape", "gone", "rest"))
                made += [
                    helper.make_node("Shape", [indices[-1]], [shape]),
                    helper.make_node("Expand", [struck_out, shape], [gone]),
                    helper.make_node(
                        "ScatterElements", [rest, indices[-1], gone], [remaining], axis=self.axis
                    ),
                ]
                rest = remaining
            k = self._constant("k", np.array([size], np.int64))
            best, index = self._name("best"), self._name("index")
            made.append(helper.make_node("TopK", [rest, k], [best, index], axis=self.axis))
            indices.append(index)
        values, all_indices = self.node.output
        made.append(helper.make_node("Concat", indices, [all_indices], axis=self.axis))
        made.append(helper.make_node("GatherElements", [source, all_indices], [values], axis=self.axis))
        return made

    def _name(self, part: str) -> str:
        return fresh_name(f"{self.node.output[0]}_{part}", self.used)

    def _constant(self, part: str, value: NDArray[np.generic]) -> str:
        name = self._name(part)
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        return name


def _sizes(wanted: int, most: int) -> list[int]:
    full, rest = divmod(wanted, most)
    return [most] * full + ([rest] if rest else [])


TARGETS = ("tensorrt", "tensorrt-rtx", "onnxruntime")
NMS_FORMS = ("plugin", "fixed-point")
CONVERGED = NMS_CONVERGED

_PLUGIN_OPS = ("BatchedNMS", "RoIPool")
_KNOWN_OPS = (*_PLUGIN_OPS, "RoIAlign")
# Typical images need 6 to 13 rounds.
ROUNDS = 16
# Entries of a class in the head, which bounds the overlap matrix; the RPN's are all needed.
LIMIT = 512


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
    _resolve(lowered, target, plugins, fixed_point_rounds, fixed_point_limit, report_convergence)
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
        node.domain == DOMAIN
        and node.op_type == "RoIAlign"
        and helper.get_node_attr_value(node, "sampling_ratio") == 0
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
    if nms not in NMS_FORMS:
        raise SettingsError(f"nms is {nms!r}; expected one of {', '.join(NMS_FORMS)}")
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
    model: onnx.ModelProto,
    target: str,
    plugins: set[str],
    rounds: int,
    limit: int | None,
    report: bool,
) -> None:
    """Give every custom node its form for ``target``, in place: a plugin's attributes or a body."""
    values = known_values(model)
    unsettled = []
    for number, node in enumerate(model.graph.node):
        if node.domain != DOMAIN:
            continue
        if node.op_type in plugins:
            _mark_for_plugin(node)
        elif node.op_type == "BatchedNMS":
            body = _nms_body(number, node, values, rounds, limit, report)
            _use_body(model, node, body)
            if report:
                unsettled.append(fresh_name(f"{node.output[0]}_unsettled", tensor_names(model.graph)))
                node.output.append(unsettled[-1])
        elif node.op_type == "RoIAlign" and target == "tensorrt-rtx":
            _use_body(model, node, _align_body(number, node, values))
        elif node.op_type == "RoIPool":
            raise ArtefactError("RoIPool runs as a plugin only in TensorRT; build with the plugins")
    if report:
        _report_convergence(model, unsettled)
    functions = [f for f in model.functions if not (f.domain == DOMAIN and f.name in plugins)]
    del model.functions[:]
    model.functions.extend(functions)


def _mark_for_plugin(node: onnx.NodeProto) -> None:
    """TensorRT >= 10.15 prefers a plugin only where the node names its namespace and version."""
    kept = [a for a in node.attribute if a.name not in ("plugin_namespace", "plugin_version")]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.append(helper.make_attribute("plugin_namespace", DOMAIN))
    node.attribute.append(helper.make_attribute("plugin_version", str(OP_VERSION)))


def _use_body(model: onnx.ModelProto, node: onnx.NodeProto, body: onnx.FunctionProto) -> None:
    """Let ``node`` call ``body``, whose constants are baked in, under a name that no plugin has."""
    model.functions.append(body)
    node.domain, node.op_type = body.domain, body.name
    del node.attribute[:]
    if BODY_DOMAIN not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(BODY_DOMAIN, 1))


def _nms_body(
    number: int,
    node: onnx.NodeProto,
    values: dict[str, onnx.TypeProto.Tensor],
    rounds: int,
    limit: int | None,
    report: bool,
) -> onnx.FunctionProto:
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    # Without a score threshold every entry is valid (RPN), and a limit would drop what counts.
    limited = limit if attributes["score_threshold"] >= 0 else None
    return fixed_point_nms(
        f"BatchedNMS_{number}",
        count=_size(values, node.input[1], 1),
        iou_threshold=attributes["iou_threshold"],
        score_threshold=attributes["score_threshold"],
        rounds=rounds,
        limit=limited,
        report=report,
    )


def _align_body(
    number: int, node: onnx.NodeProto, values: dict[str, onnx.TypeProto.Tensor]
) -> onnx.FunctionProto:
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    features, rois = node.input
    return grid_sample_align(
        f"RoIAlign_{number}",
        map_shape=(_size(values, features, 1), _size(values, features, 2), _size(values, features, 3)),
        rois=_size(values, rois, 1),
        output_size=attributes["output_size"],
        sampling_ratio=attributes["sampling_ratio"],
        kind=values[features].elem_type,
    )


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
