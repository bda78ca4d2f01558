"""The settings of a pipeline, checked, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from anchorline.runtime.errors import SettingsError
from anchorline.runtime.pipeline.filters import Filters
from anchorline.runtime.pipeline.following import Following
from anchorline.runtime.pipeline.frames import Result
from anchorline.runtime.pipeline.intake import Intake
from anchorline.runtime.pipeline.readers import check_decoder
from anchorline.runtime.pipeline.sinks import AnnotatedFiles, Callback, JsonLines, Sink, is_stdout
from anchorline.runtime.pipeline.source import Decoder, Source
from anchorline.runtime.sources import check_outputs
from anchorline.runtime.tracking import TrackOptions, check_tracking


@dataclass(frozen=True)
class PipelineSettings:
    """See ``VideoPipeline``. Raises ``SettingsError`` for a value that cannot be used."""

    batch: int | None = None
    max_wait: float = 0.01
    workers: int | None = None
    filters: Filters = field(default_factory=Filters)
    save: str | Path | None = None
    jsonl: str | Path | None = None
    sinks: Sequence[Sink] = ()
    callback: Callable[[Result], object] | None = None
    shown_score: float = 0.5
    decoder: Decoder = "opencv"
    stall: float = 10.0
    patience: float = 20.0
    track: bool | TrackOptions = False
    trails: bool = False

    def __post_init__(self) -> None:
        check_decoder(self.decoder)
        _check_seconds("max_wait", self.max_wait, 0.0)
        _check_seconds("stall", self.stall, 0.1)
        _check_seconds("patience", self.patience, 0.0)
        _check_score(self.shown_score)
        _check_count("batch", self.batch)
        _check_count("workers", self.workers)
        self._check_tracking()

    def _check_tracking(self) -> None:
        if not isinstance(self.track, bool | TrackOptions):
            raise SettingsError(f"track is {self.track!r}; expected True, False or TrackOptions")
        if self.track:
            check_tracking()
        elif self.trails:
            raise SettingsError("trails are those of tracks; turn tracking on as well (track=True, --track)")

    def following(self, sources: Sequence[Source]) -> Following | None:
        """What gives the detections their track ids, where that is wanted."""
        if not self.track:
            return None
        options = self.track if isinstance(self.track, TrackOptions) else TrackOptions()
        return Following(sources, options, self.trails)

    def workers_for(self, sources: Sequence[Source], detector: object) -> int:
        """How many threads call the detector: one, unless it says that more are of use."""
        if self.workers is not None:
            return self.workers
        return getattr(detector, "concurrent_calls", 1) if _all_wait(sources) else 1

    def intake_for(self, sources: Sequence[Source], detector: object, workers: int) -> Intake:
        """The queues of these sources, for batches that the detector takes."""
        largest = getattr(getattr(detector, "contract", None), "max_batch", None)
        batch = self.batch or min(len(sources), largest or len(sources))
        if largest is not None and batch > largest:
            raise SettingsError(f"batch is {batch}, but the model takes at most {largest} frames at once")
        # One batch in each worker, and one that is drawn, written and handed out each; live frames
        # that wait in between would only get older.
        under_way = batch * (workers + (3 if _all_wait(sources) else 2))
        return Intake([source.chosen_policy for source in sources], batch, self.max_wait, under_way)

    def open_sinks(self, sources: Sequence[Source]) -> list[Sink]:
        """All sinks, opened only when the pipeline starts, so that a mistake before leaves no file."""
        opened: list[Sink] = [] if self.jsonl is None else [JsonLines(self.jsonl)]
        if self.save is not None:
            opened.append(AnnotatedFiles(_targets(sources)))
        opened += self.sinks
        if self.callback is not None:
            opened.append(Callback(self.callback))
        return opened


def _all_wait(sources: Sequence[Source]) -> bool:
    return all(source.chosen_policy == "wait" for source in sources)


def _targets(sources: Sequence[Source]) -> list[Path]:
    """Where the copies of all sources go."""
    places = [source.target for source in sources]
    places += [item.target for source in sources for item in source.items]
    return [place for place in places if place is not None]


def check_outputs_of(
    sources: Sequence[Source], jsonl: str | Path | None, report: str | Path | None = None
) -> None:
    """Raise ``SettingsError`` where lines or report would overwrite a source, a copy, or each other."""
    read = [item.path for source in sources for item in source.items]
    check_files([jsonl, report], [*read, *_targets(sources)])


def check_files(outputs: Iterable[str | Path | None], kept: Iterable[str | Path]) -> None:
    """``sources.check_outputs`` where an output may be stdout."""
    check_outputs([None if is_stdout(output) else output for output in outputs], kept)


def _check_score(value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise SettingsError(f"shown_score is {value!r}; expected a number from 0 to 1")


def _check_seconds(name: str, value: float, lowest: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value < float("inf"):
        raise SettingsError(f"{name} is {value!r}; expected seconds from {lowest:g}")


def _check_count(name: str, value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise SettingsError(f"{name} is {value!r}; expected a whole number of at least 1")
