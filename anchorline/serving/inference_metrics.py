"""The figures of the served models for Prometheus, read when it asks."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from prometheus_client.core import CounterMetricFamily as Counter
from prometheus_client.core import GaugeMetricFamily as Gauge
from prometheus_client.core import HistogramMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from anchorline import __version__
from anchorline.runtime.timing import Durations
from anchorline.serving.batching import Batcher
from anchorline.serving.intake import Room
from anchorline.serving.metrics import histograms

_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)  # of batches, inclusive


class ServedModel(Protocol):
    """What is read of a model."""

    @property
    def batcher(self) -> Batcher: ...

    @property
    def answers(self) -> Answers: ...


@dataclass
class Answers:
    """The answers to requests for one model: how many by path and code, and how long those of 200 took."""

    counts: Counts[tuple[str, int]] = field(default_factory=Counts)
    seconds: Durations = field(default_factory=Durations)


class ServerCollector(Collector):
    """Reads the models' own figures. Labels are the models' names, the paths, codes and stages."""

    def __init__(self, models: Mapping[str, ServedModel], room: Room) -> None:
        self._models, self._room = models, room

    def collect(self) -> Iterator[Metric]:
        """All families."""
        batchers = {name: each.batcher for name, each in self._models.items()}
        yield InfoMetricFamily("anchorline_server", "What serves.", value={"version": __version__})
        about = InfoMetricFamily("anchorline_model", "What runs each model.", labels=["model"])
        for name, each in batchers.items():
            found = {key: str(getattr(each.detector, key, "unknown")) for key in ("provider", "precision")}
            about.add_metric([name], found)
        yield about
        name, text = "anchorline_held_bytes", "Bytes of bodies and frames in memory."
        yield Gauge(name, text, value=self._room.held)
        answers = Counter("anchorline_requests", "Answers.", labels=["model", "path", "code"])
        for name, model in self._models.items():
            for (path, code), count in sorted(model.answers.counts.items()):
                answers.add_metric([name, path, str(code)], count)
        yield answers
        in_hand = Gauge("anchorline_requests_in_hand", "From the body to the answer.", labels=["model"])
        waiting = Gauge("anchorline_queue_frames", "Frames in no batch yet.", labels=["model"])
        dropped = Counter("anchorline_dropped", "Requests without a result.", labels=["model", "reason"])
        for name, each in batchers.items():
            in_hand.add_metric([name], each.in_hand)
            waiting.add_metric([name], each.waiting)
            for reason in ("refused", "late", "gone"):
                dropped.add_metric([name, reason], getattr(each.figures, reason))
        yield from (in_hand, waiting, dropped, self._batches(batchers))
        taken = [((name,), each.answers.seconds.histogram()) for name, each in self._models.items()]
        text = "From a request's head to its answer, of those with 200."
        yield histograms("request", text, ["model"], taken)
        waits = [((name,), each.figures.waits.histogram()) for name, each in batchers.items()]
        yield histograms("queue", "Time of a frame until its batch began.", ["model"], waits)
        stages = [
            ((name, stage), histogram)
            for name, each in batchers.items()
            for stage, histogram in each.figures.stages.histograms().items()
        ]
        yield histograms("stage", "Time of each stage of a batch.", ["model", "stage"], stages)

    def _batches(self, batchers: Mapping[str, Batcher]) -> Metric:
        family = HistogramMetricFamily("anchorline_batch_frames", "Frames of a batch.", labels=["model"])
        for name, each in batchers.items():
            counts = Counts(each.figures.frames_by_batch)
            at_most = [sum(n for size, n in counts.items() if size <= bound) for bound in _SIZES]
            bounds = [(str(bound), float(n)) for bound, n in zip(_SIZES, at_most, strict=True)]
            buckets = [*bounds, ("+Inf", float(sum(counts.values())))]
            family.add_metric([name], buckets, sum(size * n for size, n in counts.items()))
        return family
