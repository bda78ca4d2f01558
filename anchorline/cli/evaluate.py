"""``anchorline evaluate`` and ``anchorline proposals``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer

from anchorline.cli.options import (
    CpuPrecisionOption,
    DataOption,
    JsonOption,
    PicturesOption,
    ProviderOption,
    spelled_out,
    tell_dropped,
)
from anchorline.console import progress_bar, say, show_report
from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.video.options import Slices


@spelled_out
def evaluate(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A model.onnx, a model.safetensors or stored proposals.jsonl."),
    ],
    *,
    data: DataOption,
    provider: ProviderOption = "auto",
    proposals: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Detect on these stored proposals instead of the model's own."),
    ] = None,
    cpu_precision: CpuPrecisionOption = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Images a batch; the figures do not depend on it.")] = 1,
    slices: Slices = None,
    pictures: PicturesOption = None,
    shown_score: Annotated[
        float,
        typer.Option(min=0, max=1, help="Confusion and worst images count detections from this score on."),
    ] = 0.5,
    json: JsonOption = None,
) -> None:
    """Measure a model's accuracy on labelled images: VOC and COCO AP per class, or proposal recall."""
    from anchorline.data.dataset import load_datasets
    from anchorline.evaluation.evaluation import evaluate as evaluate_detector
    from anchorline.evaluation.evaluation import evaluate_proposals, evaluate_stored

    if model.suffix == ".jsonl":
        dataset = load_datasets(data)
        tell_dropped(dataset)
        show_report(evaluate_stored(model, dataset), json)
        return
    from anchorline.artefacts import open_detector
    from anchorline.runtime.canvas import unmixed
    from anchorline.runtime.io.files import sha256_of
    from anchorline.runtime.slices import in_slices

    if proposals is not None and slices is not None:
        raise SettingsError(
            "--slice and --proposals are given, which are of whole images; leave out one of them"
        )
    detector = open_detector(model, provider, cpu_precision=cpu_precision, proposals=proposals, data=data)
    for_recall = detector.contract.task == "proposals"
    dataset = load_datasets(data, names=None if for_recall else detector.contract.names)
    tell_dropped(dataset)
    measure = evaluate_proposals if for_recall else evaluate_detector
    with progress_bar("evaluating") as progress:
        report = measure(
            in_slices(unmixed(detector), slices, detector.contract),
            dataset,
            batch,
            progress,
            provider=detector.provider,
            precision=detector.precision,
        )
    identity = {"name": model.name, "sha256": sha256_of(model)}
    report = dataclasses.replace(report, model=identity, slices=slices)
    show_report(report, json)
    if pictures is not None:
        from anchorline.evaluation.pictures import write_report_files

        write_report_files(report, dataset, pictures, shown_score)


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
    from anchorline.artefacts import store_proposals

    with progress_bar("proposing") as progress:
        boxes = store_proposals(
            data, out, model=model, method=method, count=count, provider=provider, progress=progress
        )
    say(f"{out}: {boxes} proposals")
