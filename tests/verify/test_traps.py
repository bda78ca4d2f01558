"""The traps on made-up detectors, each broken in one way that the traps have to find."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import ArtefactError, FrameError, SettingsError
from anchorline.runtime.io.files import plain
from anchorline.verify.compare import compare_all
from anchorline.verify.traps import (
    LARGEST_BATCH,
    Trap,
    TrapResult,
    largest_batch,
    once_each,
    run_traps,
    traps,
)

Frame = NDArray[np.uint8]
ROWS = (
    "empty image",
    "one object",
    "crowd",
    "batch of 1",
    "repeated calls",
    "smallest image",
    "largest image",
    "very thin image",
    "all 0",
    "all 255",
    "noise",
    "mixed sizes in a batch",
    "largest batch",
)
compare = partial(compare_all, box_tolerance_px=0.05, score_tolerance=1e-4)


class Honest:
    """One box over the middle of each frame, with a score that tells how bright the frame is."""

    contract = Contract("detections", ("thing",), (480, 640), (0.0,) * 3, (1.0,) * 3)

    def __init__(self) -> None:
        self.batches: list[int] = []

    def batch(self, frames: Sequence[Frame]) -> list[Detections]:
        self.batches.append(len(frames))
        return [self.detect(self.score(frames, index), frame) for index, frame in enumerate(frames)]

    def score(self, frames: Sequence[Frame], index: int) -> float:
        return float(0.3 + 0.5 * frames[index][::7, ::7].mean() / 255)

    def detect(self, score: float, frame: Frame) -> Detections:
        height, width = frame.shape[:2]
        box = [0.2 * width, 0.2 * height, 0.8 * width, 0.8 * height]
        return Detections([box], [score], [0], ("thing",), size=(height, width))


class Leaking(Honest):
    """A batch item sees a little of the one before it."""

    def score(self, frames: Sequence[Frame], index: int) -> float:
        own = super().score(frames, index)
        return own if index == 0 else 0.99 * own + 0.01 * super().score(frames, index - 1)


class FirstSizeForAll(Honest):
    """Boxes are scaled back with the size of the first image of the batch."""

    def batch(self, frames: Sequence[Frame]) -> list[Detections]:
        return [self.detect(self.score(frames, index), frames[0]) for index in range(len(frames))]


class Restless(Honest):
    """Sums in another order at each call: far within the tolerance, but never the same bits."""

    def score(self, frames: Sequence[Frame], index: int) -> float:
        return super().score(frames, index) + 1e-6 * (len(self.batches) % 5)


class Remembering(Honest):
    """A buffer that still holds something of the call before."""

    kept = 0.0

    def score(self, frames: Sequence[Frame], index: int) -> float:
        score = super().score(frames, index) + 1e-5 * self.kept
        self.kept = score
        return score


class Sometimes(Honest):
    """Loses everything in every second call."""

    def batch(self, frames: Sequence[Frame]) -> list[Detections]:
        found = super().batch(frames)
        return found if len(self.batches) % 2 else [Detections.empty(("thing",)) for _ in frames]


class Failing(Honest):
    """Raises for frames that ``fails`` says yes to."""

    def __init__(self, fails: object) -> None:
        super().__init__()
        self.fails = fails

    def batch(self, frames: Sequence[Frame]) -> list[Detections]:
        if any(self.fails(frame) for frame in frames):  # type: ignore[operator]
            raise FrameError("this frame cannot be detected in")
        return super().batch(frames)


class BoundedTo(Honest):
    """Wants batches of at most ``limit``, as an engine without its runtime's splitting does."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def batch(self, frames: Sequence[Frame]) -> list[Detections]:
        if len(frames) > self.limit:
            raise ArtefactError(f"a batch of {len(frames)} is above the profile's {self.limit}")
        return super().batch(frames)


class Blinded(Honest):
    """Finds something where there is nothing: white on white overflows."""

    def score(self, frames: Sequence[Frame], index: int) -> float:
        return 0.31 if frames[index].min() == 255 else super().score(frames, index)


class Dropping(Honest):
    """Forgets the last result of a batch."""

    def batch(self, frames: Sequence[Frame]) -> list[Detections]:
        return super().batch(frames)[: max(1, len(frames) - 1)]


@pytest.fixture(scope="module")
def all_traps() -> list[Trap]:
    return traps()


def run_trap(trap: Trap, reference: Honest, candidate: Honest) -> TrapResult:
    (result,) = run_traps([trap], reference, candidate, compare)
    return result


def failed(all_traps: list[Trap], candidate: Honest, reference: Honest | None = None) -> dict[str, str]:
    """The details of the traps that the candidate falls into, by name."""
    results = run_traps(all_traps, reference or Honest(), candidate, compare)
    assert [each.name for each in results] == list(ROWS)
    return {each.name: each.detail for each in results if not each.passed}


def test_every_case_has_its_row(all_traps: list[Trap]) -> None:
    assert tuple(trap.name for trap in all_traps) == ROWS
    by_name = {trap.name: trap for trap in all_traps}
    shapes = {name: [frame.shape[:2] for frame in trap.frames] for name, trap in by_name.items()}
    assert shapes["smallest image"] == [(1, 1)]
    assert shapes["largest image"] == [(3000, 4000)]
    assert shapes["very thin image"] == [(8, 2000), (2000, 8)]
    assert len(set(shapes["mixed sizes in a batch"])) == 3
    assert [len(batch) for batch in by_name["largest batch"].batches] == [LARGEST_BATCH]
    assert [len(batch) for batch in by_name["batch of 1"].batches] == [1]
    assert by_name["repeated calls"].repeated
    assert by_name["all 0"].frames[0].max() == 0
    assert by_name["all 255"].frames[0].min() == 255
    assert by_name["noise"].frames[0].std() > 70
    for trap in all_traps:
        assert all(frame.dtype == np.uint8 and frame.flags.c_contiguous for frame in trap.frames)


def test_neighbours_in_a_batch_are_different_images(all_traps: list[Trap]) -> None:
    (full,) = next(trap for trap in all_traps if trap.name == "largest batch").batches
    assert all(one.shape != other.shape for one, other in itertools.pairwise(full))


def test_the_seed_decides_the_images() -> None:
    def pixels(seed: int) -> list[bytes]:
        return [frame.tobytes() for trap in traps(1, seed) for frame in trap.frames]

    first = pixels(3)
    assert first == pixels(3)
    assert first != pixels(4)


@pytest.mark.parametrize("size", [1, 2, 20])
def test_the_largest_batch_is_the_contracts(size: int) -> None:
    (full,) = next(trap for trap in traps(size) if trap.name == "largest batch").batches
    assert len(full) == size


@pytest.mark.parametrize(
    ("canvas", "bound", "images"),
    [
        ((480, 640), None, LARGEST_BATCH),
        ((800, 1088), None, 3),
        ((2400, 3200), None, 2),
        ((2400, 3200), 16, 16),
        ((480, 640), 1, 1),
    ],
)
def test_without_a_bound_a_large_canvas_gets_a_smaller_batch(
    canvas: tuple[int, int], bound: int | None, images: int
) -> None:
    contract = Contract("detections", ("a",), canvas, (0.0,) * 3, (1.0,) * 3, max_batch=bound)
    assert largest_batch(contract) == images


@pytest.mark.parametrize("same", [True, False])
def test_a_difference_is_settled_by_the_stages(same: bool, all_traps: list[Trap]) -> None:
    asked = []

    def settle(frame: Frame) -> bool:
        asked.append(frame)
        return same

    results = run_traps(all_traps, Honest(), Blinded(), compare, settle=settle)
    assert [frame.min() for frame in asked] == [255]
    (white,) = (each for each in results if each.name == "all 255")
    assert white.passed is same
    assert ("every stage agrees" in white.detail) is same
    assert all(each.passed for each in results if each is not white)


@pytest.mark.parametrize("candidate", [Leaking, Restless, Dropping])
def test_no_stage_excuses_a_leak_or_other_bits(candidate: type[Honest], all_traps: list[Trap]) -> None:
    results = run_traps(all_traps, Honest(), candidate(), compare, settle=lambda frame: True)
    assert {each.name for each in results if not each.passed} == set(failed(all_traps, candidate()))


@pytest.mark.parametrize("size", [0, -4])
def test_no_batch_is_a_mistake(size: int) -> None:
    with pytest.raises(SettingsError, match=f"max batch is {size}"):
        traps(size)


def test_a_correct_detector_passes_them_all_at_the_promised_cost(all_traps: list[Trap]) -> None:
    reference, candidate = Honest(), Honest()
    steps: list[tuple[int, int]] = []
    results = run_traps(
        all_traps, reference, candidate, compare, lambda done, total: steps.append((done, total))
    )
    assert all(each.passed for each in results)
    assert all(each.detail.startswith(f"agrees on {each.images} images") for each in results)
    assert reference.batches == [1] * 13
    assert (len(candidate.batches), sum(candidate.batches)) == (17, 26)
    assert steps[-1] == (13, 13)


def test_frames_that_are_padded_together_are_so_on_both_sides(
    all_traps: list[Trap], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the canvas is free a mixed batch has one that its frames have not alone."""
    monkeypatch.setattr(Honest, "contract", dataclasses.replace(Honest.contract, canvas=None))
    reference = Honest()
    assert all(each.passed for each in run_traps(all_traps, reference, Honest(), compare))
    assert sorted(reference.batches) == [1] * 11 + [3, 8]
    assert set(failed(all_traps, Leaking())) == {"mixed sizes in a batch", "largest batch"}


def test_a_leak_between_batch_items_is_named(all_traps: list[Trap]) -> None:
    faults = failed(all_traps, Leaking())
    assert set(faults) == {"mixed sizes in a batch", "largest batch"}
    assert all(
        detail.startswith("the batch changes a result that the frame has alone: image 2: ")
        for detail in faults.values()
    )


def test_a_leak_is_found_when_the_reference_leaks_as_well(all_traps: list[Trap]) -> None:
    assert set(failed(all_traps, Leaking(), Leaking())) == {"mixed sizes in a batch", "largest batch"}


def test_one_size_for_the_whole_batch_is_found(all_traps: list[Trap]) -> None:
    assert set(failed(all_traps, FirstSizeForAll())) == {"mixed sizes in a batch", "largest batch"}


@pytest.mark.parametrize("candidate", [Restless, Remembering])
def test_unstable_bits_are_found_within_the_tolerance(candidate: type[Honest], all_traps: list[Trap]) -> None:
    faults = failed(all_traps, candidate())
    assert set(faults) == {"repeated calls"}
    assert "scores differ by up to" in faults["repeated calls"]
    assert "when called again" in faults["repeated calls"]


def test_another_number_of_detections_when_called_again_is_told() -> None:
    frame = np.full((20, 20, 3), 90, np.uint8)
    result = run_trap(Trap("repeated", ((frame,),), repeated=True), Honest(), Sometimes())
    assert (result.passed, result.detail) == (False, "image 1: 1 detections, and 0 when called again")


def test_a_crash_of_the_candidate_is_a_failed_row(all_traps: list[Trap]) -> None:
    faults = failed(all_traps, Failing(lambda frame: frame.shape[:2] == (1, 1)))
    assert faults == {"smallest image": "the candidate failed: this frame cannot be detected in"}


def test_a_crash_of_the_reference_is_named_as_such(all_traps: list[Trap]) -> None:
    faults = failed(all_traps, Honest(), Failing(lambda frame: min(frame.shape[:2]) == 8))
    assert faults == {"very thin image": "the reference failed: this frame cannot be detected in"}


def test_a_bug_is_not_hidden(all_traps: list[Trap]) -> None:
    def fails(frame: Frame) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_trap(all_traps[0], Honest(), Failing(fails))


def test_a_batch_beyond_the_profile_is_a_failed_row(all_traps: list[Trap]) -> None:
    faults = failed(all_traps, BoundedTo(4))
    assert faults == {"largest batch": "the candidate failed: a batch of 8 is above the profile's 4"}
    assert failed(traps(4), BoundedTo(4)) == {}


def test_a_wrong_answer_on_white_is_found(all_traps: list[Trap]) -> None:
    faults = failed(all_traps, Blinded())
    assert set(faults) == {"all 255"}
    assert "became thing 0.31" in faults["all 255"]


def test_a_missing_result_is_a_failed_row(all_traps: list[Trap]) -> None:
    faults = failed(all_traps, Dropping())
    assert faults["largest batch"] == ("the candidate failed: 7 results for 8 frames; expected one each")
    assert set(faults) == {"mixed sizes in a batch", "largest batch"}


def test_a_result_is_plain_json(all_traps: list[Trap]) -> None:
    good = plain(run_trap(all_traps[0], Honest(), Honest()))
    assert (good["name"], good["passed"], good["images"]) == ("empty image", True, 1)
    assert good["comparison"]["matched"] == 1
    bad = plain(run_trap(all_traps[0], Honest(), Failing(lambda frame: True)))
    assert (bad["passed"], bad["comparison"]) == (False, None)


def test_frames_are_remembered_by_identity() -> None:
    detector = Honest()
    once = once_each(detector)
    black = np.zeros((8, 8, 3), np.uint8)
    first = [once([frame])[0] for frame in (black, black, black.copy())]
    assert detector.batches == [1, 1]
    assert first[0] is first[1]
    assert once([black])[0] is first[0]
