"""What is tried and what is kept, with figures that follow from the settings: no clock, no model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from anchorline.runtime.io.errors import SettingsError
from anchorline.tune.search import (
    FINALISTS,
    FIRST_IMAGES,
    PROPOSALS,
    SCALES,
    Candidate,
    Figures,
    Goal,
    Way,
    better_half,
    candidates,
    choose,
    frontier,
    halving,
    is_dominated,
    parse_budget,
)

WAY = Way("cpu", "fp32", 2)
PARENT = Candidate(1.0, 1000, 1000, WAY)


def figures(share: float, map50: float, images: int = 100, objects: int = 100) -> Figures:
    return Figures(images, (objects,), map50, share, 100.0 * share)


def by_formula(candidate: Candidate, images: int) -> Figures:
    """Two thirds of the time go with the area, the rest with the proposals; each step of the scale loses five
    points of mAP50, fewer than 150 proposals ten."""
    share = 0.5 * candidate.scale**2 + 0.25 * (candidate.proposals + candidate.pre_nms) / 2000
    lost = 0.05 * SCALES.index(candidate.scale) + (0.1 if candidate.proposals < 150 else 0.0)
    return figures(share / 0.75, 0.8 - lost, images, 40 * images)


def test_the_grid_goes_down_from_the_parent() -> None:
    pool = candidates(PARENT, WAY, free=True)
    assert {each.scale for each in pool} == {*SCALES}
    assert {each.proposals for each in pool} == {*PROPOSALS}
    assert PARENT in pool
    assert len({*pool}) == len(pool)
    assert all(each.pre_nms in (1000, each.proposals) for each in pool)
    small = candidates(Candidate(1.0, 120, 80, WAY), WAY, free=False)
    assert {each.scale for each in small} == {1.0}
    assert {each.proposals for each in small} == {120, 100, 50}
    assert {each.pre_nms for each in small} == {80, 50}


@pytest.mark.parametrize(
    ("goal", "best"),
    [
        # Nothing but the scale and fewer than 150 proposals costs accuracy.
        (Goal(max_drop=0.005), (1.0, 150, 150)),
        (Goal(max_drop=0.06), (0.85, 150, 150)),
        (Goal(max_drop=0.0), (1.0, 150, 150)),
        (Goal(budget_ms=72.0), (1.0, 150, 150)),
        (Goal(budget_ms=54.0), (0.85, 150, 150)),
    ],
)
def test_halving_ends_with_the_best_of_the_whole_grid(goal: Goal, best: tuple[float, int, int]) -> None:
    calls: list[tuple[Candidate, int]] = []

    def measure(candidate: Candidate, images: int) -> Figures:
        calls.append((candidate, images))
        return by_formula(candidate, images)

    pool = candidates(PARENT, WAY, free=True)
    rounds = list(halving(pool, PARENT, 200, goal, measure))
    found = rounds[-1][1]
    chosen = choose(found, PARENT, goal)
    assert chosen == Candidate(*best, WAY)
    everything = {each: by_formula(each, 200) for each in pool}
    assert chosen == choose(everything, PARENT, goal)
    # The last round is on all images, the first on few, each candidate at most once in each.
    assert rounds[0][0] == FIRST_IMAGES
    assert rounds[-1][0] == 200
    assert all(PARENT in found for _, found in rounds)
    assert len({*calls}) == len(calls)
    assert sum(images for _, images in calls) < 0.35 * 200 * len(pool)


def test_a_round_keeps_half_and_what_may_reach_the_goal() -> None:
    way, goal = WAY, Goal(max_drop=0.01)
    pool = [Candidate(1.0, number, 50, way) for number in range(1, 21)]
    # The more proposals, the slower; under 9 they lose far more than anything that chance may explain.
    found = {each: figures(each.proposals / 20, 0.3 if each.proposals < 9 else 0.8) for each in pool}
    parent = figures(1.0, 0.8)
    assert [each.proposals for each in better_half(pool, found, parent, goal)] == [*range(9, 19)]
    # Where the rest misses the goal for certain only the finalists stay.
    worse = {each: figures(each.proposals / 20, 0.8 if each.proposals == 20 else 0.2) for each in pool}
    kept = better_half(pool, worse, parent, goal)
    assert len(kept) == FINALISTS
    assert kept[-1].proposals == 20


def test_on_few_objects_a_small_loss_is_no_reason_to_go() -> None:
    pool = [Candidate(1.0, number, 50, WAY) for number in range(1, 11)]
    parent = figures(1.0, 0.8, objects=25)  # known to 10 points
    found = {each: figures(0.1 * each.proposals, 0.72, objects=25) for each in pool}
    assert [each.proposals for each in better_half(pool, found, parent, Goal(0.005))] == [1, 2, 3, 4, 5]
    sure = dataclasses.replace(parent, objects=(1_000_000,))
    assert len(better_half(pool, found, sure, Goal(0.005))) == FINALISTS


def test_rare_classes_make_the_mean_over_classes_uncertain() -> None:
    objects = (9, 8, 95, 0)  # of a class without objects no precision is known
    shares = [np.random.default_rng(count).binomial(count, 0.5, 20_000) / count for count in objects if count]
    spread = np.std(np.mean(shares, axis=0))
    assert Figures(8, objects, 0.9, 1.0, 30.0).uncertainty == pytest.approx(spread, rel=0.03)
    assert Figures(8, (112,), 0.9, 1.0, 30.0).uncertainty < 0.6 * spread


def test_the_frontier_has_what_nothing_beats_in_both() -> None:
    a, b, c, d = (Candidate(1.0, number, 50, WAY) for number in (1, 2, 3, 4))
    found = {a: figures(0.5, 0.7), b: figures(0.8, 0.6), c: figures(0.9, 0.9), d: figures(0.4, 0.5)}
    assert frontier(found) == [d, a, c]
    assert is_dominated(found[b], [*found.values()])
    assert not is_dominated(found[b], [*found.values()], doubt=0.2)
    assert not is_dominated(found[c], [found[c], figures(0.9, 0.9)])


def test_what_does_not_reach_the_goal_is_not_chosen() -> None:
    slow = Candidate(0.5, 50, 50, WAY)
    found = {PARENT: figures(1.0, 0.8), slow: figures(0.7, 0.5)}
    assert choose(found, PARENT, Goal(budget_ms=50.0)) is None
    assert choose(found, PARENT, Goal(budget_ms=80.0)) == slow
    assert choose(found, PARENT, Goal(max_drop=0.1)) == PARENT
    assert choose(found, PARENT, Goal(max_drop=0.4)) == slow


@pytest.mark.parametrize(
    ("text", "expected"), [("33ms", 33.0), (" 33 ", 33.0), ("0.05s", 50.0), ("5 MS", 5.0)]
)
def test_a_budget_is_a_time(text: str, expected: float) -> None:
    assert parse_budget(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "fast", "-3ms", "0", "nan", "inf", "1e9s"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="expected a time for a frame, such as 33ms"):
        parse_budget(text)
