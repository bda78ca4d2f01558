"""Writing a mixed graph: chosen nodes in half precision, the others untouched, casts where they meet."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import helper, numpy_helper

from anchorline.engine.graph_tools import (
    FLOAT,
    HALF,
    constants,
    drop_unused_constants,
    fresh_name,
    replace_nodes,
    tensor_names,
)
from anchorline.engine.half_region import half_outputs, half_places

# They read a shape, whatever the type.
_TYPELESS = ("Shape", "Size")


def write_half(model: onnx.ModelProto, half: Collection[str], types: dict[str, int]) -> dict[str, str]:
    """Turn the nodes whose first output is in ``half`` to half precision, in place.

    Tensors keep their names; of one that exists in both types the float32 form keeps it, and the other
    is ``x_half``. Returns the name of each tensor's half-precision form. The graph is strongly typed:
    every node's inputs have the types ONNX prescribes, nothing is left to the runtime's choice.
    """
    writer = _Writer(model.graph, types)
    for node in list(model.graph.node):
        if node.output[0] in half:
            writer.half_node(node)
        else:
            writer.float_node(node)
    renamed = writer.names_to_give_back()
    for node in writer.nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    replace_nodes(model.graph, writer.nodes)
    notes = [value for value in model.graph.value_info if value.name not in renamed.values()]
    del model.graph.value_info[:]
    model.graph.value_info.extend(notes)
    drop_unused_constants(model.graph)
    return {name: renamed.get(half_name, half_name) for name, half_name in writer.half_names.items()}


class _Writer:
    """The nodes written so far, and the half-precision name of every tensor that has one."""

    def __init__(self, graph: onnx.GraphProto, types: dict[str, int]) -> None:
        self.graph = graph
        self.types = types
        self.constants = constants(graph)
        self.outputs = {value.name for value in graph.output}
        self.used = tensor_names(graph)
        self.nodes: list[onnx.NodeProto] = []
        self.half_names: dict[str, str] = {}
        self.made_half: set[str] = set()  # tensors that a half node produces: no float32 form by itself
        self.made_float: set[str] = set()  # those of them for which a cast back stands already

    def names_to_give_back(self) -> dict[str, str]:
        """The half-precision tensors that have no float32 form, to whose names they are entitled."""
        alone = self.made_half - self.made_float
        return {self.half_names[name]: name for name in alone}

    def half_node(self, node: onnx.NodeProto) -> None:
        places = half_places(node, self.types)
        produced = set(half_outputs(node, self.types))
        written = onnx.NodeProto.FromString(node.SerializeToString())
        for place, name in enumerate(node.input):
            if place in places:
                written.input[place] = self._half(name)
            else:
                self._want_float(name)
        for place, name in enumerate(node.output):
            if name in produced:
                self.half_names[name] = written.output[place] = fresh_name(f"{name}_half", self.used)
                self.made_half.add(name)
        self.nodes.append(written)
        for name in produced & self.outputs:
            self._want_float(name)

    def float_node(self, node: onnx.NodeProto) -> None:
        if node.op_type in _TYPELESS and node.input[0] in self.made_half:
            node = onnx.NodeProto.FromString(node.SerializeToString())
            node.input[0] = self.half_names[node.input[0]]
        else:
            for name in node.input:
                self._want_float(name)
        self.nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))

    def _want_float(self, name: str) -> None:
        """Make sure that ``name`` exists in float32."""
        if name in self.made_half and name not in self.made_float:
            self.nodes.append(_cast(self.half_names[name], name, FLOAT))
            self.made_float.add(name)

    def _half(self, name: str) -> str:
        """The half-precision name of ``name``: a rounded constant, or made by a cast."""
        if name not in self.half_names:
            half = self.half_names[name] = fresh_name(f"{name}_half", self.used)
            if name in self.constants:
                rounded = self.constants[name].astype(np.float16)
                self.graph.initializer.append(numpy_helper.from_array(rounded, half))
            else:
                self.nodes.append(_cast(name, half, HALF))
        return self.half_names[name]


def _cast(source: str, result: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [result], name=f"cast_{result}", to=kind)
