"""``anchorline detect``: on this machine, in a browser beside it, or on a Ray cluster."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anchorline.cli.options import JsonOption, NameOption, TokenOption, picture_file, spelled_out
from anchorline.console import progress_bar, say, show_report, warn
from anchorline.runtime.io.errors import DataError, SettingsError
from anchorline.runtime.video.options import DetectOptions

if TYPE_CHECKING:
    from anchorline.cluster import ClusterSummary
    from anchorline.runtime import DetectSummary


@spelled_out
def detect(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Images, folders, videos, webcam numbers, rtsp:// or http:// streams; NAME=... names it.",
        ),
    ],
    *,
    model: Annotated[Path, typer.Option(help="An exported model.onnx.")],
    options: DetectOptions,
    classes_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep the classes in this file, one a line.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="auto|local|HOST:PORT",
            help="Work on a Ray cluster: the one of this machine, one started here, or the one there.",
        ),
    ] = None,
    ray_workers: Annotated[
        int | None, typer.Option(min=1, help="Workers at most (default: as many as the cluster holds).")
    ] = None,
    serve: Annotated[
        str | None,
        typer.Option(
            metavar="[HOST:]PORT",
            help="Show the run in a browser at this address; a port alone is for this machine only.",
        ),
    ] = None,
    serve_token: TokenOption = None,
    serve_name: NameOption = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER|FILE.png",
            help="Draw the age of results over time and the stages into this folder, or one picture.",
        ),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Detect objects in images, videos, cameras and streams."""
    from anchorline.runtime import detect as detect_sources
    from anchorline.runtime.io.files import input_errors
    from anchorline.runtime.video.source import check_outputs, is_stdout, waits

    options = replace(options, report=picture_file(pictures, "latency.png"))
    check_outputs((options.jsonl, options.report, json), (model, *sources))
    if classes_file is not None:
        with input_errors(classes_file, "expected a class name a line", DataError):
            lines = classes_file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        classes = (*options.filters.classes, *filter(None, map(str.strip, lines)))
        options = replace(options, filters=replace(options.filters, classes=classes))

    def conclude(summary: DetectSummary | ClusterSummary) -> None:
        warn(summary.warnings)
        # Where stdout takes the JSON lines, the figures go to stderr.
        show_report(summary, json, to_stderr=is_stdout(options.jsonl))

    if ray is not None:
        if serve is not None:
            raise SettingsError("--serve does not go with --ray, which answers files; leave out one of them")
        _detect_on_ray(sources, model, options, ray, ray_workers, conclude)
        return
    if ray_workers is not None:
        raise SettingsError(
            f"--ray-workers is {ray_workers}, but without --ray nothing is shared out; add --ray auto"
        )
    # Files are to be done soon as a whole; of a live source each frame is.
    tuning = "throughput" if waits(sources, options.policy) else "latency"
    with contextlib.ExitStack() as stack:
        live = None
        if serve is not None:  # first: a port in use is told of at once
            from anchorline.serving.live_view import LiveView

            live = stack.enter_context(LiveView(serve, token=serve_token, names=serve_name or ()))
            warn(live.warnings)
            shown = live.url if serve_token is None else f"{live.url}?token=... (with the token)"
            say(f"anchorline: live view at {shown}", to_stderr=True)
        detector = stack.enter_context(options.open_detector(model, tuning))
        progress = sys.stderr.isatty()
        detect_sources(sources, detector, options, progress=progress, live=live, conclude=conclude)


def _detect_on_ray(
    sources: Sequence[str],
    model: Path,
    options: DetectOptions,
    address: str,
    workers: int | None,
    conclude: Callable[[ClusterSummary], None],
) -> None:
    """With progress, and the summary after an interrupt as well; exit code 1 where files were given up."""
    from anchorline import cluster

    summaries: list[ClusterSummary] = []
    try:
        with progress_bar("starting the cluster") as update:  # told after it: the bar takes over stdout
            cluster.detect_on_cluster(
                *(sources, model, options),
                address=address,
                workers=workers,
                progress=lambda now: update(now.answered + now.failed, now.files, now.describe()),
                conclude=summaries.append,
            )
    finally:
        for summary in summaries:
            conclude(summary)
            for line in summary.failed:
                say(f"anchorline: failed: {line}", to_stderr=True)
    if any(summary.failed for summary in summaries):
        raise typer.Exit(1)
