from __future__ import annotations

import numpy as np
import pytest

from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.timing import HISTOGRAM_BOUNDS, Durations, StageTimes


def test_percentiles_are_numpys_in_milliseconds_and_in_the_stages_order():
    times = StageTimes()
    seconds = np.random.default_rng(0).random(100)
    for value in seconds:
        times.add({"network": value, "decode": 2 * value})
    found = times.percentiles()
    assert list(found) == ["decode", "network"]
    assert found["network"] == pytest.approx(
        {f"p{p}": 1000 * np.percentile(seconds, p) for p in (50, 95, 99)}
    )


def test_an_unknown_stage_is_refused():
    with pytest.raises(SettingsError, match=r"unknown stage 'nap'; expected one of decode, .*write"):
        StageTimes().add({"nap": 1.0})


def test_histograms_count_every_duration_also_beyond_those_that_are_kept():
    seconds = np.concatenate(
        [np.random.default_rng(1).lognormal(-4, 2, 20_000), HISTOGRAM_BOUNDS, [0.0, 99.0]]
    )
    durations = Durations()
    for value in seconds:
        durations.add(value)
    histogram = durations.histogram()
    assert list(histogram.at_most) == [(seconds <= bound).sum() for bound in (*HISTOGRAM_BOUNDS, np.inf)]
    assert histogram.seconds == pytest.approx(seconds.sum())


def test_histograms_are_of_the_stages_that_were_seen():
    times = StageTimes()
    times.add({"draw": 0.002})
    assert list(times.histograms()) == ["draw"]
    assert times.histograms()["draw"].at_most[:3] == (0, 1, 1)
