"""The rates of the last second, by a clock that the test sets."""

from __future__ import annotations

import pytest

from anchorline.runtime.video import figures as rates
from anchorline.runtime.video.figures import Figures


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(rates.time, "monotonic", lambda: Clock.now)
    return Clock


def test_rates_are_those_of_the_time_since_they_were_asked_for_last(clock):
    figures = Figures({"a": True, "b": True})
    recent = rates.RecentRates(figures)
    source = figures.sources["a"]
    source.frames_in, source.frames_out = 30, 20
    clock.now += 0.9
    assert recent.now() == {"a": (0.0, 0.0), "b": (0.0, 0.0)}  # too soon to say
    clock.now += 0.6
    assert recent.now() == {"a": (20.0, pytest.approx(20 / 1.5)), "b": (0.0, 0.0)}
    source.frames_in = 31
    clock.now += 0.5
    assert recent.now()["a"][0] == 20.0  # those of before
    clock.now += 0.5
    assert recent.now()["a"] == (1.0, 0.0)
