"""``deploy_deepstream``: a model for the element nvinfer of NVIDIA's DeepStream.

nvinfer feeds one tensor, float planes [B, 3, H, W], and knows nothing of a valid size. So the graph is made
for one size of frames: nvinfer scales a frame to exactly the size that it has on the canvas, and the graph
lays it there and states its size. One output comes back, a row a detection.

    input       float32 [B, 3, h, w]   BGR planes, 0 to 255
    detections  float32 [B, D, 6]      x1, y1, x2, y2 in pixels of the input, score, label; else zero

Keys and their meaning: Gst-nvinfer in NVIDIA's DeepStream documentation.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from anchorline.deploy.source import (
    Source,
    batch_limit,
    hashes,
    new_folder,
    open_source,
    origin,
    template,
)
from anchorline.engine.graph import (
    cast_node,
    check_exported,
    drop_unused_constants,
    fresh_name,
    read_model,
    refill,
    tensor_names,
)
from anchorline.engine.lowering import fix_canvas, lower
from anchorline.runtime.canvas import PROPOSAL_NAMES, Placement, frame_canvas, place
from anchorline.runtime.contract import Contract
from anchorline.runtime.io.errors import ArtefactError, SettingsError

INPUT, OUTPUT = "input", "detections"
PARSER = "NvDsInferParseCustomAnchorline"
_LIBRARY = "libnvdsinfer_anchorline.so"
_PLUGINS = "libanchorline_plugins.so"


def deploy_deepstream(
    model: str | Path,
    out: str | Path,
    frame: tuple[int, int],
    *,
    nms: str = "plugin",
    max_batch: int | None = None,
    compiler: str | None = None,
) -> Path:
    """Write the folder ``out``: an ONNX file for nvinfer, its configuration, the parser in C++, a README.

    ``frame`` is the (height, width) of the frames that reach nvinfer. ``nms`` is ``"plugin"``, whose library
    is compiled for Linux by ``compiler``, or ``"fixed-point"``, which needs none. ``max_batch`` is nvinfer's
    batch (default 1). Raises ``ArtefactError``, ``SettingsError`` and ``OutputError``.
    """
    source = open_source(model)
    if source.manifest is not None:
        raise ArtefactError(
            f"{source.path}: is an engine with two inputs, and nvinfer feeds one; give the ONNX file that it "
            "was built from"
        )
    if nms not in ("plugin", "fixed-point"):
        raise SettingsError(f"nms is {nms!r}; expected 'plugin' or 'fixed-point'")
    most = batch_limit(source, max_batch or 1, 1)
    graph, placement = nvinfer_graph(read_model(source.path), frame, nms=nms)
    with new_folder(out) as folder:
        onnx.save(graph, folder / f"{source.name}.onnx")
        if any(node.domain for node in graph.graph.node):
            from anchorline.engine.plugin_library import build_plugin_library

            build_plugin_library(folder / _PLUGINS, compiler=compiler, register_on_load=True)
        plugins = (folder / _PLUGINS).is_file()
        link = f"-Wl,--no-as-needed -L. -l:{_PLUGINS} -Wl,-rpath,'$$ORIGIN'" if plugins else ""
        for name, text in {
            "config_infer_primary.txt": configuration(source, placement, most),
            "labels.txt": labels(source.contract),
            "nvdsinfer_anchorline.cpp": template("nvdsinfer_anchorline.cpp"),
            "Makefile": template("Makefile").replace("@LINK@", link),
        }.items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(_readme(source, placement, most, nms, folder), encoding="utf-8")
    return Path(out)


def nvinfer_graph(
    model: onnx.ModelProto, frame: tuple[int, int], target: str = "tensorrt", nms: str = "plugin"
) -> tuple[onnx.ModelProto, Placement]:
    """``model`` lowered for ``target``, with the one input and the one output of above; and where a frame of
    ``frame`` (height, width) lies on its canvas. Raises ``ArtefactError`` and ``SettingsError``."""
    contract = check_exported(model)
    canvas = contract.canvas or frame_canvas(frame, contract)
    placement = place(frame, contract.canvas, contract.resize)
    model = copy.deepcopy(model)
    if contract.canvas is None:
        fix_canvas(model, canvas)
    lowered = lower(model, target, nms)
    _take_planes(lowered.graph, contract, canvas, placement.valid)
    _give_rows(lowered.graph, contract)
    drop_unused_constants(lowered.graph)
    del lowered.metadata_props[:]  # of a file with other tensors
    onnx.checker.check_model(lowered)
    return lowered, placement


def _take_planes(
    graph: onnx.GraphProto, contract: Contract, canvas: tuple[int, int], valid: tuple[int, int]
) -> None:
    """Let ``INPUT`` be what the images and their sizes are made of, in place."""
    used = tensor_names(graph)
    pixels, canvases = fresh_name("pixels", used), fresh_name("canvases", used)
    images, sizes = contract.inputs
    for node in graph.node:
        refill(node.input, [canvases if name == images else name for name in node.input])
    pads = [0, 0, 0, 0, 0, canvas[0] - valid[0], canvas[1] - valid[1], 0]
    values = {
        "canvas_pads": np.array(pads),
        "valid_size": np.array([valid], np.float32),
        "two": np.array([2]),
    }
    constants = {name: fresh_name(name, used) for name in values}
    batch, shape = fresh_name("batch", used), fresh_name("sizes_shape", used)
    made = [
        helper.make_node("Transpose", [INPUT], [pixels], perm=[0, 2, 3, 1]),
        helper.make_node("Pad", [pixels, constants["canvas_pads"]], [canvases]),
        helper.make_node("Shape", [INPUT], [batch], start=0, end=1),
        helper.make_node("Concat", [batch, constants["two"]], [shape], axis=0),
        helper.make_node("Expand", [constants["valid_size"], shape], [sizes]),
    ]
    graph.initializer.extend(numpy_helper.from_array(values[name], own) for name, own in constants.items())
    refill(graph.node, [*made, *graph.node])
    planes = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", 3, *valid])
    refill(graph.input, [planes])


def _give_rows(graph: onnx.GraphProto, contract: Contract) -> None:
    """Let ``OUTPUT`` be the only output, in place: what nvinfer takes for the batch has no other axis in the
    counts, and none at all in ``nms_converged``."""
    used = tensor_names(graph)
    boxes, scores, *rest = contract.outputs
    slots = next(v for v in graph.output if v.name == scores).type.tensor_type.shape.dim[1].dim_value
    axis, parts = fresh_name("last_axis", used), [boxes]
    graph.initializer.append(numpy_helper.from_array(np.array([2]), axis))
    columns = [scores]
    if contract.task == "detections":
        columns.append(fresh_name("labels_f32", used))
        graph.node.append(cast_node(rest[0], columns[-1], TensorProto.FLOAT))
    for name in columns:
        parts.append(fresh_name(f"{name}_column", used))
        graph.node.append(helper.make_node("Unsqueeze", [name, axis], [parts[-1]]))
    graph.node.append(helper.make_node("Concat", parts, [OUTPUT], axis=2))
    shape = ["batch", slots, 3 + len(parts)]
    refill(graph.output, [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, shape)])


def labels(contract: Contract) -> str:
    """The class names, one a line; nvinfer takes a semicolon for the next label."""
    names = contract.names if contract.task == "detections" else PROPOSAL_NAMES
    return "".join(f"{name.replace(';', ',')}\n" for name in names)


def configuration(source: Source, placement: Placement, batch: int) -> str:
    """nvinfer's configuration file."""
    height, width = placement.valid
    contract, file = source.contract, f"{source.name}.onnx"
    properties = {
        "gpu-id": 0,
        "gie-unique-id": 1,
        "process-mode": 1,  # whole frames
        "network-type": 0,  # a detector
        "onnx-file": file,
        "model-engine-file": f"{file}_b{batch}_gpu0_fp32.engine",  # as nvinfer calls what it builds
        "network-mode": 0,  # float32
        "batch-size": batch,
        "infer-dims": f"3;{height};{width}",
        "network-input-order": 0,  # planes
        "model-color-format": 1,  # BGR
        "net-scale-factor": 1.0,  # mean and std are in the graph
        "maintain-aspect-ratio": 0,  # the size of the input has the frame's already
        "scaling-filter": 1,  # bilinear
        "labelfile-path": "labels.txt",
        "num-detected-classes": len(labels(contract).splitlines()),
        "cluster-mode": 4,  # none: the graph has its NMS
        "parse-bbox-func-name": PARSER,
        "custom-lib-path": _LIBRARY,
    }
    score = contract.thresholds.score if contract.task == "detections" else 0.0
    found = {"pre-cluster-threshold": score}
    return "".join(
        f"[{group}]\n" + "".join(f"{key}={value}\n" for key, value in entries.items()) + "\n"
        for group, entries in (("property", properties), ("class-attrs-all", found))
    )


def _readme(source: Source, placement: Placement, batch: int, nms: str, folder: Path) -> str:
    height, width = placement.source
    scaled = ""
    if source.contract.input_dtype == "float32":
        scaled = (
            " The model expects frames that are scaled without rounding; nvinfer gives whole grey levels."
        )
    if placement.interpolation == "antialiased":
        scaled = " The model expects frames that are scaled with Pillow's filter, which nvinfer has not."
    suppression = {
        "plugin": f"`{_PLUGINS}` holds the NMS as a plugin. The parser's library is linked to it, so nvinfer "
        "loads both, and it registers itself.",
        "fixed-point": "The NMS is a fixed number of matrix products and needs no plugin. In crowded scenes "
        "with long rows of overlapping boxes duplicates may be left, and nothing tells.",
    }[nms]
    return (
        template("deepstream.md")
        .replace("@NAME@", source.name)
        .replace("@ORIGIN@", origin(source))
        .replace("@WIDTH@", str(width))
        .replace("@HEIGHT@", str(height))
        .replace("@INPUT@", "{}x{}".format(*placement.valid[::-1]))
        .replace("@BATCH@", str(batch))
        .replace("@SCALED@", scaled)
        .replace("@NMS@", suppression)
        .replace("@HASHES@", hashes(folder))
    )
