"""Giving the values between the stages of a graph their stable names (see ``train/stages.py``)."""

from __future__ import annotations

import onnx

from anchorline.train.stages import MARKER


def name_stages(proto: onnx.ModelProto) -> None:
    """Take the stage markers out of ``proto``, in place; each marked value gets the marker's name.

    Where a marked value is an output of the graph, which has a name of its own, an Identity remains.
    """
    graph = proto.graph
    outputs = {value.name for value in graph.output}
    renamed: dict[str, str] = {}
    kept = []
    for node in graph.node:
        if node.op_type != MARKER:
            kept.append(node)
            continue
        stage = node.attribute[0].s.decode()
        renamed[node.input[0]] = stage
        if node.output[0] in outputs:
            kept.append(onnx.helper.make_node("Identity", [stage], [node.output[0]], name=f"stage_{stage}"))
        else:
            renamed[node.output[0]] = stage
    for node in kept:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    shapes = {renamed.get(value.name, value.name): value for value in graph.value_info}
    for name, value in shapes.items():
        value.name = name
    del graph.node[:], graph.value_info[:]
    graph.node.extend(kept)
    graph.value_info.extend(shapes.values())
