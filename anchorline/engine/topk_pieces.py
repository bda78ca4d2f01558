"""TopK with more than TensorRT's 3840 entries, taken exactly, in pieces."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from anchorline.engine.graph_tools import constants, fresh_name, replace_nodes, tensor_names
from anchorline.runtime.errors import ArtefactError

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
