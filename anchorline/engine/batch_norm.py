"""Folding batch norm into the convolution before it, in full precision.

A folded layer is one layer instead of two, and what is rounded to half precision later are the
weights that are really used, not a variance of 1e-6 beside them.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from anchorline.engine.graph_tools import (
    constants,
    consumers,
    drop_unused_constants,
    fresh_name,
    replace_nodes,
    tensor_names,
)

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
