"""The runs: what is trained and measured, in which order, and on whose models it builds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

EXPERIMENTS = (
    "joint",
    "alternating",
    "one-stage",
    "selective-search",
    "proposals",
    "anchors",
    "lambda",
    "timing",
)
TRAINED = frozenset({"joint", "alternating", "one-stage", "selective-search", "anchors", "lambda"})
SWEEPS = frozenset({"anchors", "lambda"})

# (scales, ratios) of table 8; with all three of both it is the run ``joint``.
ANCHORS = {"1 scale, 1 ratio": (1, 1), "1 scale, 3 ratios": (1, 3), "3 scales, 1 ratio": (3, 1)}
# lambda of table 9; 10 is the run ``joint``.
LAMBDAS = ("0.1", "1", "100")
BASE_LAMBDA = 10

TEST_PROPOSALS = 300
COUNTS = (50, 100, 300, 1000)
WITHOUT_NMS = 6000  # the paper's row of all proposals, NMS switched off
SELECTIVE_SEARCH = 2000


@dataclass(frozen=True)
class Run:
    """One training with what is measured on it, or measurements on the models of the runs in ``needs``."""

    experiment: str
    seed: int
    variant: str = ""
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its folder, such as ``anchors-1-scale-3-ratios-seed0``."""
        words = f"{self.experiment} {self.variant} seed{self.seed}".replace(",", "").split()
        return "-".join(words)

    @property
    def trains(self) -> bool:
        return self.experiment in TRAINED


def runs_of(
    seeds: Sequence[int], sweep_seeds: Sequence[int], only: Sequence[str] = EXPERIMENTS
) -> tuple[Run, ...]:
    """All runs, seed by seed, so that what a short budget leaves out are repetitions.

    Anchors and lambda have ``sweep_seeds``; the times are those of the first seed. What a chosen experiment
    builds on is there too.
    """
    wanted = set(only) | _needed_by(only)
    found = [
        run
        for seed in seeds
        for run in _runs_of_seed(seed, sweeps=seed in sweep_seeds, first=seed == seeds[0])
        if run.experiment in wanted
    ]
    names = {run.name for run in found}
    return tuple(run for run in found if set(run.needs) <= names)


def _needed_by(only: Sequence[str]) -> set[str]:
    # Selective search is no more than wished for: the proposals' ablation does without where it is missing.
    builds_on = {"proposals": {"joint", "alternating", "selective-search"}, "timing": {"joint"}}
    return {needed for each in only for needed in builds_on.get(each, ())}


def _runs_of_seed(seed: int, *, sweeps: bool, first: bool) -> list[Run]:
    joint, alternating = Run("joint", seed), Run("alternating", seed)
    search = Run("selective-search", seed)
    found = [joint, alternating, Run("one-stage", seed), search]
    found.append(Run("proposals", seed, needs=(joint.name, alternating.name, search.name)))
    if sweeps:
        found += [Run("anchors", seed, variant) for variant in ANCHORS]
        found += [Run("lambda", seed, variant) for variant in LAMBDAS]
    if first:
        found.append(Run("timing", seed, needs=(joint.name,)))
    return found
