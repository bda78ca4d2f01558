"""``anchorline detect``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from anchorline.cli.live import ServeNamesOption, ServeOption, ServeTokenOption, live_view
from anchorline.cli.on_ray import detect_on_ray, uses_ray
from anchorline.cli.options import CpuPrecisionOption, JsonOption, Policy, ProviderOption
from anchorline.console import show_report, tell, warn

if TYPE_CHECKING:
    from anchorline.cluster import ClusterSummary
    from anchorline.runtime.video.summary import DetectSummary


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
    track: Annotated[
        bool, typer.Option("--track", help="Give each object an id that it keeps from frame to frame.")
    ] = False,
    trails: Annotated[
        bool, typer.Option("--trails", help="Draw where tracked objects have been; with --track.")
    ] = False,
    decoder: Annotated[
        Literal["opencv", "pyav"], typer.Option(help="What reads videos and streams.")
    ] = "opencv",
    stall: Annotated[
        float, typer.Option(min=0.1, help="Open a live source again that delivers nothing for N seconds.")
    ] = 10.0,
    report: Annotated[
        Path | None, typer.Option(help="Draw the age of results over time and the stages to this .png.")
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
    serve: ServeOption = None,
    serve_token: ServeTokenOption = None,
    serve_names: ServeNamesOption = None,
    json: JsonOption = None,
) -> None:
    """Detect objects in images, videos, cameras and streams."""
    from anchorline.runtime import Detector
    from anchorline.runtime import detect as detect_sources
    from anchorline.runtime.video.options import check_files, parse_filters

    check_files((jsonl, report, json), (model, *sources))
    filters = parse_filters(classes, min_score, region, max_detections)
    not_with_ray = {
        "--policy latest": policy == "latest",
        "--report": report,
        "--serve": serve,
        "--track": track,
        "--trails": trails,
    }
    if uses_ray(ray, ray_workers, not_with_ray):
        detect_on_ray(
            sources,
            model,
            lambda summary: _tell_detected(summary, jsonl, json),
            address=ray,
            save=save,
            jsonl=jsonl,
            workers=ray_workers,
            provider=provider,
            score_threshold=score_threshold,
            threads=threads,
            cpu_precision=cpu_precision,
            shown_score=shown_score,
            stride=stride,
            batch=batch,
            max_wait=max_wait,
            filters=filters,
            decoder=decoder,
        )
        return
    with (
        live_view(serve, serve_token, serve_names) as live,  # first: a port in use is told of at once
        Detector(
            *(model, provider, score_threshold, threads),
            cpu_precision=cpu_precision,
            tuning=_tuning(sources, policy),
        ) as detector,
    ):
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
            track=track,
            trails=trails,
            report=report,
            live=live,
            conclude=lambda summary: _tell_detected(summary, jsonl, json),
        )


def _tuning(sources: list[str], policy: Policy | None) -> Literal["latency", "throughput"]:
    """Files are to be done soon as a whole; of a live source each frame is."""
    from anchorline.runtime.video.source import parse_source

    wait = policy != "latest" and all(parse_source(each).chosen_policy == "wait" for each in sources)
    return "throughput" if wait else "latency"


def _tell_detected(summary: DetectSummary | ClusterSummary, jsonl: Path | None, json: Path | None) -> None:
    """The figures go to stdout, or to stderr where that takes the JSON lines."""
    from anchorline.runtime.io.files import write_json
    from anchorline.runtime.video.sinks import is_stdout

    warn(summary.warnings)
    if not is_stdout(jsonl):
        show_report(summary, json)
        return
    tell(summary)
    if json is not None:
        write_json(json, summary.to_json())
