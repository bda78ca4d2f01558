"""RoIAlign in TensorRT on a GPU: which form is right there, how fast it is, and what memory it takes.

    python benchmarks/roi_align_bodies.py

The forms are the bodies of ``engine/bodies.py`` and, for full TensorRT, ONNX's RoiAlign, which it has as a
plugin. Each is an engine of its own, alone and between other operators, with which TensorRT fuses it: 1000
RoIs on a map as large as a ResNet-50-FPN's, two images. What is right is torchvision's roi_align on the CPU.
Median of CUDA-event times; one row each goes to ``results/roi_align_bodies.csv``. Needs a GPU, PyTorch with
CUDA, and TensorRT or TensorRT for RTX; each that is installed and knows the GPU is measured.
"""

from __future__ import annotations

import sys
from typing import Any

import onnx
import onnx.inliner
import torch
import torchvision
from nms_kernel import median_us
from onnx import TensorProto, helper, numpy_helper
from record import append_row

from anchorline.engine.bodies import gather_align, grid_sample_align
from anchorline.engine.options import BuildOptions
from anchorline.engine.toolkit import Plan, Toolkit, load_toolkit, parse, serialise
from anchorline.runtime.io.errors import AnchorlineError
from anchorline.runtime.tensorrt.library import FLAVOURS, tensorrt_logger

BATCH, CHANNELS, HEIGHT, WIDTH, ROIS, SIZE, POINTS = 2, 256, 306, 342, 1000, 7, 2
BODIES = {"grid-sample": grid_sample_align, "gather": gather_align}
KINDS = {"fp32": (TensorProto.FLOAT, torch.float32, 1e-3), "fp16": (TensorProto.FLOAT16, torch.float16, 2e-2)}


def main() -> None:
    """Measure each form in each flavour; exit code 1 when one is wrong, 2 when nothing could be measured."""
    if not torch.cuda.is_available():
        sys.exit("roi_align_bodies.py: no NVIDIA GPU here; run it on a machine with one")
    rows = [row for flavour in FLAVOURS for row in measure_flavour(flavour)]
    if not rows:
        print("roi_align_bodies.py: nothing was measured: no TensorRT here builds for it", file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if all(row["right"] for row in rows) else 1)


def measure_flavour(flavour: str) -> list[dict[str, Any]]:
    """The rows of one flavour; none, with the reason on stderr, where it cannot build for this GPU."""
    major, minor = torch.cuda.get_device_capability()
    capabilities = (10 * major + minor,) if flavour == "tensorrt-rtx" else ()
    try:
        toolkit = load_toolkit(BuildOptions(target=flavour, compute_capabilities=capabilities))
    except AnchorlineError as error:
        print(f"{flavour}: not measured: {error}", file=sys.stderr)
        return []
    forms = [*BODIES, *(["RoiAlign"] if flavour == "tensorrt" else [])]
    rows = []
    for form in forms:
        for around in (False, True):
            for precision in KINDS:
                row = {"gpu": torch.cuda.get_device_name(), "flavour": flavour, "version": toolkit.version}
                row |= {"form": form, "around": around, "precision": precision}
                rows.append(row | measure(toolkit, form, around, precision))
                print(rows[-1])
                append_row("roi_align_bodies", "python benchmarks/roi_align_bodies.py", rows[-1])
    return rows


def measure(toolkit: Toolkit, form: str, around: bool, precision: str) -> dict[str, Any]:
    """How far one engine is from torchvision, whether that is right, its time and its memory."""
    kind, dtype, tolerance = KINDS[precision]
    features, rois = inputs(dtype)
    options = BuildOptions(
        target=toolkit.name, compute_capabilities=toolkit.capabilities * (toolkit.gpu is None)
    )
    builder = toolkit.create_builder()
    network, _ = parse(toolkit, builder, model_of(form, around, kind), (BATCH, BATCH, BATCH))
    plan = serialise(toolkit, builder, network, options, (BATCH, BATCH, BATCH))
    pooled, time_us = execute(toolkit, plan, features.cuda(), rois.cuda())
    error = float((pooled.cpu().float() - expected_of(features, rois, around)).abs().max())
    return {
        "max_error": f"{error:.2g}",
        "right": error <= tolerance,  # NaN is wrong
        "median_us": f"{time_us:.1f}",
        "activation_mb": "" if plan.activation_bytes is None else f"{plan.activation_bytes / 1e6:.1f}",
    }


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [B, C, H, W] and RoIs [B, R, 4] on the map, small and large ones."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(BATCH, CHANNELS, HEIGHT, WIDTH, generator=generator).to(dtype)
    sides = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT], dtype=torch.float32)
    corners = torch.rand(BATCH, ROIS, 2, 2, generator=generator).sort(dim=2).values
    return features, corners.reshape(BATCH, ROIS, 4) * sides


def model_of(form: str, around: bool, kind: int) -> onnx.ModelProto:
    """One RoIAlign; ``around`` it sum and ReLU before, product, ReLU and transposition behind."""
    nodes, initialisers, source, result = [], [], "features", "pooled"
    if around:
        element = helper.tensor_dtype_to_np_dtype(kind)
        initialisers = [
            numpy_helper.from_array(element.type(value).reshape(1), name)
            for name, value in (("shift", 0.25), ("scale", 0.5))
        ]
        nodes = [
            helper.make_node("Add", ["features", "shift"], ["shifted"]),
            helper.make_node("Relu", ["shifted"], ["rectified"]),
        ]
        source, result = "rectified", "cells"
    functions, opsets = [], [helper.make_opsetid("", 18)]
    if form == "RoiAlign":
        nodes += roi_align_nodes(source, result, kind)
    else:
        body = BODIES[form](
            "Align",
            map_shape=(CHANNELS, HEIGHT, WIDTH),
            rois=ROIS,
            output_size=SIZE,
            sampling_ratio=POINTS,
            kind=kind,
        )
        functions, opsets = [body], [*opsets, helper.make_opsetid(body.domain, 1)]
        nodes.append(helper.make_node(body.name, [source, "rois"], [result], domain=body.domain))
    if around:
        nodes += [
            helper.make_node("Mul", ["cells", "scale"], ["scaled"]),
            helper.make_node("Relu", ["scaled"], ["positive"]),
            helper.make_node("Transpose", ["positive"], ["pooled"], perm=[0, 2, 3, 1]),
        ]
    graph = helper.make_graph(
        nodes,
        "roi_align",
        [
            helper.make_tensor_value_info("features", kind, ["B", CHANNELS, HEIGHT, WIDTH]),
            helper.make_tensor_value_info("rois", TensorProto.FLOAT, ["B", ROIS, 4]),
        ],
        [helper.make_tensor_value_info("pooled", kind, None)],
        initialisers,
    )
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    return onnx.inliner.inline_local_functions(model)


def roi_align_nodes(source: str, result: str, kind: int) -> list[onnx.NodeProto]:
    """ONNX's RoiAlign in float32, over a list of all images' RoIs."""

    def constant(name: str, values: list[int]) -> onnx.NodeProto:
        return helper.make_node("Constant", [], [name], value_ints=values)

    images = [image for image in range(BATCH) for _ in range(ROIS)]
    align = {"mode": "avg", "output_height": SIZE, "output_width": SIZE, "sampling_ratio": POINTS}
    return [
        constant("images", images),
        constant("list", [-1, 4]),
        helper.make_node("Reshape", ["rois", "list"], ["all_rois"]),
        helper.make_node("Cast", [source], ["map"], to=TensorProto.FLOAT),
        helper.make_node("RoiAlign", ["map", "all_rois", "images"], ["means"], **align),
        helper.make_node("Cast", ["means"], [result], to=kind),
    ]


def expected_of(features: torch.Tensor, rois: torch.Tensor, around: bool) -> torch.Tensor:
    """torchvision's on the CPU, in float32 from the rounded features."""
    features = features.float()
    if around:
        features = (features + 0.25).relu()
    pooled = torchvision.ops.roi_align(features, list(rois), SIZE, 1.0, POINTS, aligned=True)
    return (pooled * 0.5).relu().permute(0, 2, 3, 1) if around else pooled


def execute(
    toolkit: Toolkit, plan: Plan, features: torch.Tensor, rois: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """The output of an engine on PyTorch's tensors, and the median time of a run in microseconds."""
    runtime = toolkit.trt.Runtime(tensorrt_logger(toolkit.name))
    engine = runtime.deserialize_cuda_engine(plan.content)
    context = engine.create_execution_context()
    pooled = torch.empty(
        tuple(context.get_tensor_shape("pooled")), dtype=features.dtype, device="cuda"
    ).fill_(torch.nan)
    for name, tensor in (("features", features), ("rois", rois), ("pooled", pooled)):
        context.set_tensor_address(name, tensor.data_ptr())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        time_us = median_us(lambda: context.execute_async_v3(stream.cuda_stream))
    stream.synchronize()
    return pooled, time_us


if __name__ == "__main__":
    main()
