"""The figures of the run for Prometheus, read when it asks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from anchorline import __version__
from anchorline.runtime.timing import HISTOGRAM_BOUNDS, Histogram
from anchorline.runtime.video.figures import SourceFigures
from anchorline.serving.live_state import LiveState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MOST_CLASSES = 100  # with a series of their own, for each source; further ones are counted together
_OTHERS = "(others)"
_COUNTERS = {
    "read": ("frames_in", "Frames that the source delivered."),
    "answered": ("frames_out", "Frames whose result left the pipeline."),
    "dropped": ("dropped", "Frames that made way for newer ones."),
}
_EVENTS = {
    "reconnects": ("reconnects", "Times that a lost source came back."),
    "stalls": ("stalls", "Times that a source delivered nothing for the stall time."),
}


class RunCollector(Collector):
    """Reads the run's own figures. Labels are the sources' names, the stages and the model's classes."""

    def __init__(self, live: LiveState) -> None:
        self._live = live

    def collect(self) -> Iterator[Metric]:
        """All families; those of the sources once the run is known."""
        yield from self._server()
        figures = self._live.run.figures
        if figures is None:
            return
        yield from self._counters(figures.sources)
        yield from self._gauges(figures.sources)
        yield self._detections()
        stages = HistogramMetricFamily(
            "anchorline_stage_seconds", "Time of each stage, over all sources.", labels=["stage"]
        )
        for stage, histogram in figures.stages.histograms().items():
            stages.add_metric([stage], _buckets(histogram), histogram.seconds)
        yield stages
        ages = HistogramMetricFamily(
            "anchorline_result_age_seconds", "From capture to the caller.", labels=["source"]
        )
        for name, source in figures.sources.items():
            histogram = source.age_histogram()
            ages.add_metric([name], _buckets(histogram), histogram.seconds)
        yield ages

    def _server(self) -> Iterable[Metric]:
        live = self._live
        detector = getattr(live.run.pipeline, "detector", None)
        about = {
            "version": __version__,
            "provider": str(getattr(detector, "provider", "unknown")),
            "precision": str(getattr(detector, "precision", "unknown")),
        }
        yield InfoMetricFamily("anchorline_run", "What runs.", value=about)
        healthy = not live.run.problems()
        yield GaugeMetricFamily("anchorline_healthy", "As /healthz says: 1 or 0.", value=float(healthy))
        yield GaugeMetricFamily("anchorline_viewers", "Who watches just now.", value=live.audience.count)
        yield CounterMetricFamily(
            "anchorline_viewers_dropped", "Viewers that read too slowly.", value=live.audience.dropped
        )
        yield CounterMetricFamily(
            "anchorline_pictures_encoded", "JPEGs made, once for all viewers.", value=live.painter.count
        )

    def _counters(self, sources: dict[str, SourceFigures]) -> Iterable[Metric]:
        for key, (attribute, text) in {**_COUNTERS, **_EVENTS}.items():
            name = f"anchorline_frames_{key}" if key in _COUNTERS else f"anchorline_{key}"
            family = CounterMetricFamily(name, text, labels=["source"])
            for source, each in sources.items():
                family.add_metric([source], getattr(each, attribute))
            yield family

    def _gauges(self, sources: dict[str, SourceFigures]) -> Iterable[Metric]:
        playing = GaugeMetricFamily("anchorline_source_playing", "Whether frames come.", labels=["source"])
        waiting = GaugeMetricFamily(
            "anchorline_queue_frames", "Frames that wait for the detector.", labels=["source"]
        )
        newest = GaugeMetricFamily(
            "anchorline_newest_frame_age_seconds", "Since the newest result's capture.", labels=["source"]
        )
        now = time.monotonic()
        for name, each in sources.items():
            playing.add_metric([name], float(each.state == "playing"))
            waiting.add_metric([name], 0 if each.queue is None else len(each.queue.frames))
            captured = self._live.run.newest.get(name)
            if captured is not None:
                newest.add_metric([name], now - captured)
        return playing, waiting, newest

    def _detections(self) -> Metric:
        family = CounterMetricFamily(
            "anchorline_detections", "Detections after the filters.", labels=["source", "class"]
        )
        for source, counts in self._live.run.class_counts().items():
            named = list(counts.items())
            for name, count in named[:_MOST_CLASSES]:
                family.add_metric([source, name], count)
            if named[_MOST_CLASSES:]:
                family.add_metric([source, _OTHERS], sum(count for _, count in named[_MOST_CLASSES:]))
        return family


class Metrics:
    """The text that Prometheus reads, from a registry of its own."""

    def __init__(self, live: LiveState) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(RunCollector(live))

    def text(self) -> bytes:
        """The figures just now."""
        return generate_latest(self._registry)


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [f"{bound:g}" for bound in HISTOGRAM_BOUNDS] + ["+Inf"]
    return list(zip(bounds, map(float, histogram.at_most), strict=True))
