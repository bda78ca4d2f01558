"""``anchorline tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anchorline.cli.options import DataOption, JsonOption, PicturesOption, picture_file
from anchorline.console import INTERRUPTED, progress_bar, say, show
from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.video.options import parse_classes


def tune(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An exported model.onnx.")],
    data: DataOption,
    budget: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="The most accurate within this time a frame, such as 33ms."),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            metavar="POINTS",
            help="The fastest that loses at most so many points of mAP50 (0.5).",
        ),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(metavar="A,B,...", help="Keep these classes only (default: all)."),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="fp32, bf16 or int8; may be repeated (default: all that run here)."),
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(help="cpu, openvino or cuda; may be repeated (default: all that are here)."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads (default: one a core, and half as many).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use N images, drawn from the data.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the best one to this .onnx file.")] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure anew what an earlier run has measured.")
    ] = False,
    pictures: PicturesOption = None,
    json: JsonOption = None,
) -> None:
    """Find a model's fastest settings on this machine that keep its accuracy on labelled images."""
    from anchorline.tune.search import Goal, parse_budget
    from anchorline.tune.tune import PRECISIONS
    from anchorline.tune.tune import tune as search

    if budget is not None and max_drop is not None:
        raise SettingsError("both --budget and --max-drop are given; expected one of them")
    goal = Goal() if max_drop is None else Goal(max_drop / 100)
    if budget is not None:
        goal = Goal(budget_ms=parse_budget(budget))
    with progress_bar("tuning") as progress:
        report = search(
            *(model, data),
            goal=goal,
            classes=parse_classes(classes) if classes else None,
            precisions=precision or PRECISIONS,
            providers=provider,
            threads=threads,
            limit=limit,
            out=out,
            pictures=picture_file(pictures, "tuning.png"),
            json_file=json,
            fresh=fresh,
            progress=progress,
        )
    show(report.render())
    say(report.describe())
    if report.best is not None:
        say(f"run it: {report.command()}")
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)
    if report.best is None:
        raise typer.Exit(1)
