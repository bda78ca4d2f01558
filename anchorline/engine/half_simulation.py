"""A float32 graph that shows what half precision does: every weight and activation is really rounded.

onnxruntime's CPU provider computes a float16 graph in float32, so running the mixed graph there hides
rounding between fused layers and overflow. Here each half-precision value passes through float16 and
back (onnxruntime keeps such pairs of casts), sums run in float32 as in tensor cores.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from anchorline.engine.graph_tools import (
    FLOAT,
    HALF,
    copy_of,
    element_types,
    fresh_name,
    replace_nodes,
    tensor_names,
)


def simulate_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The float32 graph whose numbers are those of the mixed graph ``model`` (from ``to_precision``).

    Inputs, outputs and tensor names stay. A value beyond float16's range becomes infinite, as it would
    in the engine.
    """
    simulated = copy_of(model)
    graph, types = simulated.graph, element_types(model)
    used = tensor_names(graph)
    for tensor in graph.initializer:
        if tensor.data_type == HALF:
            tensor.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
            )
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        for place, name in enumerate(node.output):
            if types.get(name) != HALF:
                continue
            exact, rounded = fresh_name(f"{name}_exact", used), fresh_name(f"{name}_rounded", used)
            if node.op_type == "Cast":
                _cast_to_float(node)
            node.output[place] = exact
            nodes.append(helper.make_node("Cast", [exact], [rounded], to=HALF))
            nodes.append(helper.make_node("Cast", [rounded], [name], to=FLOAT))
    replace_nodes(graph, nodes)
    notes = [value for value in graph.value_info if types.get(value.name) != HALF]
    del graph.value_info[:]
    graph.value_info.extend(notes)
    return simulated


def _cast_to_float(node: onnx.NodeProto) -> None:
    """Let a cast to half precision be one to float32: the rounding follows as a node of its own."""
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("to", FLOAT))
