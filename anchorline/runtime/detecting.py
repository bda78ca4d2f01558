"""Detection over images, folders, videos and cameras: the pipeline, with progress and files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from anchorline.runtime.pipeline.filters import Filters
from anchorline.runtime.pipeline.frame_detector import FrameDetector
from anchorline.runtime.pipeline.intake import Policy
from anchorline.runtime.pipeline.latency_plot import check_report, plot_latency
from anchorline.runtime.pipeline.live_display import run_with_display
from anchorline.runtime.pipeline.settings import check_outputs_of
from anchorline.runtime.pipeline.sinks import Sink
from anchorline.runtime.pipeline.source import Decoder, Source
from anchorline.runtime.pipeline.video_pipeline import VideoPipeline
from anchorline.runtime.summary import DetectSummary
from anchorline.runtime.tracking import TrackOptions


class Onlooker(Sink, Protocol):
    """A sink that shows the run while it goes on, such as ``LiveView``, and is told of it beforehand."""

    def watch(self, pipeline: VideoPipeline) -> None: ...


def detect(
    sources: Sequence[str | Path | int | Source],
    detector: FrameDetector,
    save: str | Path | None = None,
    jsonl: str | Path | None = None,
    progress: bool = True,
    shown_score: float = 0.5,
    *,
    policy: Policy | None = None,
    stride: int = 1,
    batch: int | None = None,
    max_wait: float = 0.01,
    filters: Filters | None = None,
    decoder: Decoder = "opencv",
    stall: float = 10.0,
    track: bool | TrackOptions = False,
    trails: bool = False,
    report: str | Path | None = None,
    live: Onlooker | None = None,
    conclude: Callable[[DetectSummary], object] | None = None,
) -> DetectSummary:
    """Detect in every frame of ``sources``: images, folders of images, videos, cameras, streams.

    ``save`` receives annotated copies (see ``sources.plan_items``; a camera's is an mp4 of its name),
    ``jsonl`` one line per frame: ``{"source", "frame", "time_s", "size": [h, w], "detections":
    [...]}``. Copies show detections with a score of at least ``shown_score``, lines hold all.
    ``progress`` shows live figures on stderr, ``live`` in a browser (``anchorline.serving.live_view``);
    ``report`` is a picture of the ages and stages. The
    other settings are ``VideoPipeline``'s. A source that cannot be read is a warning in the summary
    while others can; with none left its ``DataError`` is raised. On Ctrl-C, SIGTERM and SIGHUP the files are
    finished with the frames so far, and ``KeyboardInterrupt`` or ``SystemExit`` goes on; ``conclude``
    is called with the summary in any case, since that is how a camera's run ends.
    """
    if report is not None:
        check_report(report)
    pipeline = VideoPipeline(
        detector,
        sources,
        policy=policy,
        stride=stride,
        batch=batch,
        max_wait=max_wait,
        filters=filters,
        save=save,
        jsonl=jsonl,
        shown_score=shown_score,
        decoder=decoder,
        stall=stall,
        track=track,
        trails=trails,
        sinks=() if live is None else (live,),
    )
    if live is not None:
        live.watch(pipeline)
    check_outputs_of(pipeline.sources, jsonl, report)
    run = run_with_display if progress else VideoPipeline.run
    try:
        run(pipeline)
    except (KeyboardInterrupt, SystemExit):
        _end(pipeline, report, conclude)
        raise
    return _end(pipeline, report, conclude)


def _end(
    pipeline: VideoPipeline, report: str | Path | None, conclude: Callable[[DetectSummary], object] | None
) -> DetectSummary:
    summary = pipeline.summary()
    if report is not None:
        plot_latency(pipeline.figures, report)
    if conclude is not None:
        conclude(summary)
    return summary
