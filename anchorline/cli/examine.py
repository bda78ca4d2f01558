"""What an artefact or a machine is worth: ``verify``, ``bench``, ``report`` and ``doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from anchorline.cli.options import (
    CpuPrecisionOption,
    ImagesOption,
    JsonOption,
    MeasureOption,
    PicturesOption,
    ProviderOption,
    picture_file,
    spelled_out,
)
from anchorline.console import progress_bar, say, show, show_report
from anchorline.runtime.video.options import Slices


def verify(
    reference: Annotated[Path, typer.Argument(metavar="A", help="The reference: .safetensors or .onnx.")],
    candidate: Annotated[Path, typer.Argument(metavar="B", help="What has to give the same numbers.")],
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="Labelled images, as for evaluate; may be repeated."),
    ] = None,
    images: ImagesOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N images only.")] = None,
    bisect: Annotated[bool, typer.Option("--bisect", help="Name the first layer that differs.")] = False,
    pictures: PicturesOption = None,
    reference_by: Annotated[
        Literal["anchorline", "torchvision"],
        typer.Option("--reference", help="Whose model runs the weights of A: ours, or torchvision's own."),
    ] = "anchorline",
    provider: ProviderOption = "auto",
    json: JsonOption = None,
) -> None:
    """Compare two artefacts stage by stage and detection by detection; exit code 1 when they differ."""
    from anchorline.artefacts import verify as verify_files

    with progress_bar("verifying") as progress:
        report = verify_files(
            *(reference, candidate),
            data=data or (),
            images=images or (),
            limit=limit,
            bisect=bisect,
            worst=picture_file(pictures, "worst.png"),
            reference_by=reference_by,
            provider=provider,
            progress=progress,
        )
    show_report(report, json)
    if not report.passed:
        raise typer.Exit(1)


@spelled_out
def bench(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL", help="Exported models or engines.")],
    *,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="SOURCE",
            help="A video, an image or a folder of images (default: generated scenes, 1920x1080).",
        ),
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
    measure: MeasureOption = None,
    slices: Slices = None,
    csv: Annotated[Path | None, typer.Option(help="Write the figures to this file as CSV.")] = None,
    pictures: PicturesOption = None,
    json: JsonOption = None,
) -> None:
    """Measure how fast models run here: percentiles of each stage, throughput, peak memory."""
    from anchorline.bench.bench import bench as bench_models

    with progress_bar("measuring") as progress:
        report = bench_models(
            models,
            source=images,
            providers=provider or ("auto",),
            batch=batch,
            batches=batches,
            warmup=warmup,
            threads=threads,
            cpu_precision=cpu_precision,
            measure=measure,
            slices=slices,
            json_file=json,
            csv_file=csv,
            plot=picture_file(pictures, "bench.png"),
            progress=progress,
        )
    show(report.render())


def report(
    target: Annotated[
        Path, typer.Argument(metavar="MODEL|FOLDER", help="A model's file, or the folder that holds one.")
    ],
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE|FOLDER", help="evaluate's --json or, with curves, its --pictures; may be repeated."
        ),
    ] = None,
    verify: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="verify's --json; may be repeated.")
    ] = None,
    bench: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="bench's --json; may be repeated.")
    ] = None,
    training: Annotated[
        Path | None, typer.Option(metavar="RUN", help="The run folder of the training.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The page to write (default: report.html beside the model).")
    ] = None,
) -> None:
    """Put what evaluate, verify, bench and train wrote of a model on one offline page; measures nothing.

    Besides the files that are named it takes those beside the model that are of it.
    """
    from anchorline.report.page import report as write

    made = write(
        target,
        out,
        evaluations=evaluation or (),
        verifications=verify or (),
        benches=bench or (),
        training=training,
    )
    say(f"{made.path}: {made.bytes / 1e3:.0f} kB")
    for what, how in made.missing:
        say(f"missing: {what}; {how}", to_stderr=True)
    for reason in made.left_out:
        say(f"not shown: {reason}", to_stderr=True)


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
