"""From one artefact to the next, and to other servers: ``import``, ``export``, ``quantize``, ``build``,
``plugin-library`` and ``deploy``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from anchorline.cli.options import ImagesOption, JsonOption, size, spelled_out
from anchorline.console import progress_bar, say, show_report, warn
from anchorline.engine.options import BuildOptions
from anchorline.runtime.io.errors import SettingsError

CanvasOption = Annotated[
    str | None, typer.Option(metavar="HxW", help="Another network input size, multiples of 32.")
]


def import_(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A checkpoint of torchvision, Detectron2 (.pth, .pkl), MMDetection or py-faster-rcnn "
            "(.caffemodel), or the name of torchvision's weights.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The model.safetensors to write.")],
    arch: Annotated[
        str | None,
        typer.Option(
            help="fasterrcnn_resnet50_fpn, detectron2_r50_c4, mmdet_r50_fpn, py_faster_rcnn_vgg16, ... "
            "(default: what the tensors show; torchvision's do not)."
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Class names without the background (default: the checkpoint's, or COCO's).",
        ),
    ] = None,
    classes_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The same, one a line or a JSON list.")
    ] = None,
    canvas: CanvasOption = None,
    resize: Annotated[
        str | None, typer.Option(metavar="MINxMAX", help="The model's min_size and max_size, as 800x1333.")
    ] = None,
    batch_norm_eps: Annotated[
        float | None, typer.Option(help="Eps of the backbone's batch norms, where it is not the usual one.")
    ] = None,
    fast_resize: Annotated[
        bool, typer.Option("--fast-resize", help="OpenCV's resize in whole grey levels: faster, not exact.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting that was not the default when trained."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The configuration of the training, Detectron2's config.yaml or MMDetection's .py "
            "(default: that in the checkpoint or beside it).",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="Which state dict, where the file has several (default: averaged ones)."
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            help="Compare with torchvision's own detector before publishing; the other libraries have none "
            "here."
        ),
    ] = True,
) -> None:
    """Turn another library's checkpoint into a model.safetensors with the same detections."""
    from anchorline.export import import_checkpoint
    from anchorline.runtime.contract import ResizeRule

    if classes is not None and classes_file is not None:
        raise SettingsError("both --classes and --classes-file are given; expected one of them")
    sides = size(resize, "--resize", "MINxMAX")
    result = import_checkpoint(
        checkpoint,
        out,
        arch=arch,
        classes=classes_file if classes is None else tuple(map(str.strip, classes.split(","))),
        canvas=size(canvas, "--canvas", "HEIGHTxWIDTH"),
        resize=sides and ResizeRule(*sides),
        batch_norm_eps=batch_norm_eps,
        fast_resize=fast_resize,
        overrides=set_ or (),
        config=config,
        weights=weights,
        verify=verify,
        warn=warn,
    )
    say(
        f"{result.path}: {result.contract.source['arch']}, {len(result.contract.names)} classes, "
        f"{result.contract.frame_sizes}, batch-norm eps {result.settings.backbone_norm_eps:g}, "
        f"{result.verification}"
    )


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A model.safetensors.")],
    out: Annotated[Path, typer.Option(help="The ONNX file to write.")],
    task: Annotated[
        Literal["detections", "proposals"] | None,
        typer.Option(help="The whole model, or the RPN alone (default: what the checkpoint holds)."),
    ] = None,
    canvas: CanvasOption = None,
    frame: Annotated[
        str | None, typer.Option(metavar="WxH", help="Trim the canvas to what a camera's frames fill.")
    ] = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help="Largest batch the runtime will use.")] = None,
    winograd: Annotated[
        bool,
        typer.Option("--winograd", help="For fp32 on processors: 3x3 convolutions in fewer multiplications."),
    ] = False,
    verify: Annotated[bool, typer.Option(help="Compare with PyTorch before the file is published.")] = True,
) -> None:
    """Write a checkpoint as one ONNX file, and prove that onnxruntime gives PyTorch's detections."""
    from anchorline.export import export_onnx

    frame_size = size(frame, "--frame", "WIDTHxHEIGHT")
    result = export_onnx(
        checkpoint,
        out,
        task=task,
        canvas=size(canvas, "--canvas", "HEIGHTxWIDTH"),
        frame_size=frame_size and frame_size[::-1],
        max_batch=max_batch,
        winograd=winograd,
        verify=verify,
    )
    if winograd:
        say(f"{result.contract.source['winograd']} convolutions in Winograd's form")
    verdict = "not verified" if result.verification is None else result.verification.describe()
    say(f"{result.path}: {result.contract.task}, {result.contract.frame_sizes}, {verdict}")


def quantize(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An exported model.onnx in float32.")],
    out: Annotated[Path, typer.Option(help="The ONNX file to write, such as model.int8.onnx.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC", help="Labelled images to calibrate on, as for evaluate; may be repeated."
        ),
    ] = None,
    images: ImagesOption = None,
    target: Annotated[
        Literal["cpu", "tensorrt"],
        typer.Option("--for", help="cpu: onnxruntime's integer kernels; tensorrt: Q/DQ nodes for build."),
    ] = "cpu",
    max_drop: Annotated[
        float, typer.Option(min=0, max=1, help="What may be lost: mAP50, or agreement without labels.")
    ] = 0.01,
    limit: Annotated[int | None, typer.Option(min=1, help="Use N images, spread over the data.")] = None,
    verify: Annotated[bool, typer.Option(help="Compare with the float file before publishing.")] = True,
    json: JsonOption = None,
) -> None:
    """Turn an exported model's layers into 8-bit integers, as far as its accuracy holds."""
    from anchorline.export import quantize_onnx

    if not data and not images:
        raise SettingsError("nothing to calibrate on; expected --data SPEC or --images SOURCE")
    with progress_bar("quantising") as progress:
        result = quantize_onnx(
            model,
            out,
            [*(data or ()), *(images or ())],
            target=target,
            max_drop=max_drop,
            limit=limit,
            verify=verify,
            progress=progress,
            warn=warn,
        )
    show_report(result, json)
    say(f"{result.path}: {result.describe()}")


@spelled_out
def build(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An exported model.onnx.")],
    *,
    out: Annotated[Path, typer.Option(help="The .engine file to write; its manifest goes beside it.")],
    options: BuildOptions,
    timing_cache: Annotated[
        Path | None, typer.Option(help="A folder that keeps TensorRT's timings for the next build.")
    ] = None,
    images: ImagesOption = None,
    force: Annotated[bool, typer.Option("--force", help="Build even what has been built before.")] = False,
    verify: Annotated[
        bool,
        typer.Option(help="Compare the engine with the ONNX file before publishing, where it can run here."),
    ] = True,
) -> None:
    """Compile an exported model into a TensorRT engine."""
    from anchorline.engine.build import build_engine
    from anchorline.engine.fp16_range import sample_inputs

    samples = sample_inputs(model, images) if images else ()
    with progress_bar("building") as progress:
        result = build_engine(
            *(model, out, options),
            samples=samples,
            timing_cache=timing_cache,
            force=force,
            verify=verify,
            progress=progress,
            warn=warn,
        )
    for line in result.notes:
        say(line, to_stderr=True)
    say(f"{result.path}: {result.describe()}")


def plugin_library(
    *,
    out: Annotated[Path, typer.Option(help="The .so file to write.")],
    compiler: Annotated[
        str | None,
        typer.Option(help="A C++17 compiler for the machine that will run it (default: $CXX, c++)."),
    ] = None,
    register_on_load: Annotated[
        bool,
        typer.Option(
            "--register-on-load", help="For Triton, which only opens it; trtexec refuses such a one."
        ),
    ] = False,
) -> None:
    """Compile our TensorRT plugins for programs without Python."""
    from anchorline.engine.plugin_library import build_plugin_library

    library = build_plugin_library(out, compiler=compiler, register_on_load=register_on_load)
    say(f"{library}: BatchedNMS and RoIPool for TensorRT 10, 11 and TensorRT for RTX")


def deploy(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An exported model.onnx, or an engine.")],
    *,
    target: Annotated[
        Literal["triton", "deepstream"], typer.Option("--for", help="The server that is to run it.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    backend: Annotated[
        Literal["onnxruntime", "openvino", "tensorrt"] | None,
        typer.Option(help="Triton's for the network (default: onnxruntime, or tensorrt for an engine)."),
    ] = None,
    frame: Annotated[
        str | None, typer.Option(metavar="WxH", help="DeepStream's: the size of the frames it is given.")
    ] = None,
    nms: Annotated[
        Literal["plugin", "fixed-point"] | None,
        typer.Option(help="DeepStream's: our plugin (default), or a graph that needs none."),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Largest batch that is formed (default: Triton the model's or 8, else 1)."),
    ] = None,
    compiler: Annotated[
        str | None,
        typer.Option(help="A C++17 compiler, for the plugin library (default: $CXX, c++)."),
    ] = None,
) -> None:
    """Write a folder with all that Triton or DeepStream needs to run a model."""
    frame_size = size(frame, "--frame", "WIDTHxHEIGHT")
    if target == "triton":
        if frame_size or nms:
            raise SettingsError("--frame and --nms are for --for deepstream; leave them out")
        from anchorline.deploy import deploy_triton

        written = deploy_triton(model, out, backend=backend, max_batch=max_batch, compiler=compiler)
    else:
        if backend:
            raise SettingsError("--backend is for --for triton; leave it out")
        if frame_size is None:
            raise SettingsError("DeepStream needs the size of the frames; give it, as --frame 1920x1080")
        from anchorline.deploy import deploy_deepstream

        written = deploy_deepstream(
            *(model, out, frame_size[::-1]), nms=nms or "plugin", max_batch=max_batch, compiler=compiler
        )
    say(f"{written}: ready for {target}; see {written / 'README.md'}")
