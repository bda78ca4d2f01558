"""The figures of the run for Prometheus, read when it asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily as Counter
from prometheus_client.core import GaugeMetricFamily as Gauge
from prometheus_client.core import HistogramMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from anchorline import __version__
from anchorline.runtime.timing import HISTOGRAM_BOUNDS, Histogram

if TYPE_CHECKING:
    from anchorline.runtime.video.figures import SourceFigures
    from anchorline.serving.live_state import LiveState

_MOST_CLASSES = 100  # with a series of their own, for each source; further ones are counted together
_OTHERS = "(others)"
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = (*(f"{bound:g}" for bound in HISTOGRAM_BOUNDS), "+Inf")
_OF_SOURCES: dict[str, tuple[type[Counter | Gauge], str, Callable[[SourceFigures], float]]] = {
    "frames_read": (Counter, "Frames that the source delivered.", attrgetter("frames_in")),
    "frames_answered": (Counter, "Frames whose result left the pipeline.", attrgetter("frames_out")),
    "frames_dropped": (Counter, "Frames that made way for newer ones.", attrgetter("dropped")),
    "reconnects": (Counter, "Times that a lost source came back.", attrgetter("reconnects")),
    "stalls": (Counter, "Times that a source delivered nothing for the stall time.", attrgetter("stalls")),
    "source_playing": (Gauge, "Whether frames come.", lambda each: each.state == "playing"),
    "queue_frames": (
        Gauge,
        "Frames that wait for the detector.",
        lambda each: len(each.queue.frames) if each.queue else 0,
    ),
}


class RunCollector(Collector):
    """Reads the run's own figures. Labels are the sources' names, the stages and the model's classes."""

    def __init__(self, live: LiveState) -> None:
        self._live = live

    def collect(self) -> Iterator[Metric]:
        """All families; those of the sources once the run is known."""
        live, pipeline = self._live, self._live.pipeline
        detector = getattr(pipeline, "detector", None)
        about = {name: str(getattr(detector, name, "unknown")) for name in ("provider", "precision")}
        yield InfoMetricFamily("anchorline_run", "What runs.", value={"version": __version__, **about})
        healthy = float(not live.problems())
        yield Gauge("anchorline_healthy", "As /healthz says: 1 or 0.", value=healthy)
        yield Gauge("anchorline_viewers", "Who watches just now.", value=len(live.viewers))
        yield Counter("anchorline_viewers_dropped", "Viewers that read too slowly.", value=live.dropped)
        count = live.painter.count
        yield Counter("anchorline_pictures_encoded", "JPEGs made, once for all viewers.", value=count)
        if pipeline is None:
            return
        for name, (kind, text, read) in _OF_SOURCES.items():
            family = kind(f"anchorline_{name}", text, labels=["source"])
            for source, each in live.sources.items():
                family.add_metric([source], float(read(each)))
            yield family
        name, text = "anchorline_newest_frame_age_seconds", "Since the newest result's capture."
        newest = Gauge(name, text, labels=["source"])
        for source, captured in dict(live.newest).items():
            newest.add_metric([source], time.monotonic() - captured)
        yield newest
        yield self._detections()
        stages = [((stage,), each) for stage, each in pipeline.figures.stages.histograms().items()]
        yield histograms("stage", "Time of each stage, over all sources.", ["stage"], stages)
        ages = [((source,), each.age.histogram()) for source, each in live.sources.items()]
        yield histograms("result_age", "From capture to the caller.", ["source"], ages)

    def _detections(self) -> Metric:
        labels = ["source", "class"]
        family = Counter("anchorline_detections", "Detections after the filters.", labels=labels)
        for source, counts in self._live.class_counts().items():
            named = list(counts.items())
            for name, count in named[:_MOST_CLASSES]:
                family.add_metric([source, name], count)
            if named[_MOST_CLASSES:]:
                family.add_metric([source, _OTHERS], sum(count for _, count in named[_MOST_CLASSES:]))
        return family


def metrics_answer(collector: Collector) -> Response:
    """What Prometheus is answered."""
    # Not prometheus-client's own application: a header that is no UTF-8 is an error to it.
    return Response(generate_latest(collector), headers={"Content-Type": _METRICS_TYPE})


def histograms(
    name: str, text: str, labels: Sequence[str], found: Iterable[tuple[Sequence[str], Histogram]]
) -> Metric:
    """Durations by the values of ``labels``."""
    family = HistogramMetricFamily(f"anchorline_{name}_seconds", text, labels=labels)
    for values, histogram in found:
        buckets = list(zip(_BOUNDS, map(float, histogram.at_most), strict=True))
        family.add_metric(values, buckets, histogram.seconds)
    return family
