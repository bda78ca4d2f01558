"""Stage by stage on made-up networks of NumPy, each wrong in one way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from anchorline.data.dataset import from_frames
from anchorline.runtime.canvas import Preprocessor
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import ArtefactError, DataError, SettingsError
from anchorline.verify.compare import TOLERANCES
from anchorline.verify.stages import (
    StageResult,
    Subject,
    check_stages,
    first_differing_layer,
    tensor_error,
)
from anchorline.verify.verification import verify_subjects

Arrays = dict[str, NDArray[Any]]
Change = Callable[[Arrays], None]
FP32 = TOLERANCES["fp32"]
CONTRACT = Contract(
    task="detections", names=("cell", "dust"), canvas=(64, 96), mean=(0.0,) * 3, std=(1.0,) * 3
)
FRAME = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)


class Network:
    """Pixels, one map and its sum, proposals, and one detection a proposal. ``change`` spoils the values."""

    layers = ("first", "second")
    provider, precision = "cpu", "fp32"

    def __init__(self, contract: Contract = CONTRACT, change: Change = lambda values: None) -> None:
        self.contract, self.change = contract, change
        self.preprocess = Preprocessor(contract)
        self.batches: list[int] = []

    def prepare(self, frames: Sequence[NDArray[np.uint8]]) -> tuple[Arrays, Any]:
        return self.preprocess(frames)

    def run(self, inputs: Mapping[str, NDArray[Any]], feed: Mapping[str, NDArray[Any]]) -> Arrays:
        images = inputs[self.contract.inputs[0]]
        assert images.dtype == self.contract.input_dtype
        self.batches.append(len(images))
        values: Arrays = {"pixels": images.astype(np.float32) / 255}
        values["fpn.0"] = feed.get("pixels", values["pixels"])[:, ::16, ::16]
        strength = feed.get("fpn.0", values["fpn.0"]).mean(axis=(1, 2, 3))
        values["proposals"] = np.stack([self.boxes(each) for each in strength])
        values["proposal_scores"] = np.tile(np.linspace(0.3, 0.8, 3, dtype=np.float32), (len(images), 1))
        boxes = feed.get("proposals", values["proposals"])
        filled = np.full(len(images), 3, np.int32)
        labels = np.tile(np.array([0, 1, 0], np.int32), (len(images), 1))
        outputs = (boxes, feed.get("proposal_scores", values["proposal_scores"]), labels, filled)
        values.update(zip(self.contract.outputs, outputs, strict=True))
        self.change(values)
        return values

    def boxes(self, strength: float) -> NDArray[np.float32]:
        corners = np.array([[0, 0], [20, 20], [40, 5]], np.float32)
        return np.concatenate((corners, corners + 10 + 5 * strength), axis=1).astype(np.float32)

    def run_layers(
        self, inputs: Mapping[str, NDArray[Any]], feed: Mapping[str, NDArray[Any]], layers: Sequence[str]
    ) -> Arrays:
        values = self.run(inputs, feed)
        known = {"first": values["pixels"], "second": values["fpn.0"]}
        return {layer: known[layer] for layer in layers}

    def release(self) -> None:
        pass

    def batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        return [Detections.empty(self.contract.names, size=frame.shape[:2]) for frame in frames]


def subject(change: Change = lambda values: None, **fields: Any) -> Subject:
    network = Network(dataclasses.replace(CONTRACT, **fields), change)
    return Subject(Path("network"), network, network)


def rows(reference: Subject, candidate: Subject, frame: NDArray[np.uint8] = FRAME) -> dict[str, StageResult]:
    return {each.name: each for each in check_stages(reference, candidate, [[frame]], FP32)}


def put(name: str, value: float) -> Change:
    """Put ``value`` at the first place of ``name``."""

    def change(values: Arrays) -> None:
        values[name] = values[name].copy()
        values[name].flat[0] = value

    return change


def test_two_alike_hold_in_every_stage() -> None:
    found = rows(subject(), subject())
    assert list(found) == ["preprocess", "pixels", "fpn", "proposals", "detections"]
    assert all(each.passed and each.compared for each in found.values())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_reference_that_is_not_finite_vouches_for_nothing(value: float) -> None:
    """Else one such value would make every difference relative to it vanish."""
    found = rows(
        subject(put("fpn.0", value)), subject(lambda values: values.update({"fpn.0": values["fpn.0"] + 9}))
    )
    assert not found["fpn"].passed
    assert "the reference's fpn.0 has 1 values that are not finite" in found["fpn"].detail
    both = rows(subject(put("fpn.0", value)), subject(put("fpn.0", value)))
    assert not both["fpn"].passed


def test_large_values_do_not_hide_a_difference() -> None:
    """Their squares overflow in float32."""
    ours = np.full((1, 100), 1e25, np.float32)
    theirs = ours * np.float32(1.0005)  # within the limit of the peak
    assert tensor_error("fpn.0", ours, theirs, 1)[0] == pytest.approx(5e-4, rel=0.01)


def test_the_worst_image_of_a_batch_counts() -> None:
    ours = np.stack([np.full(100, 1000.0), np.ones(100)]).astype(np.float32)
    theirs = ours.copy()
    theirs[1, 0] += 0.5
    assert tensor_error("fpn.0", ours, theirs, 2)[1] == pytest.approx(0.5)


def test_no_values_agree() -> None:
    none = np.zeros((2, 0), np.float32)
    assert tensor_error("fpn.0", none, none, 2)[:2] == (0.0, 0.0)


@pytest.mark.parametrize(
    ("spoiled", "side"), [((True, False), "candidate"), ((False, True), "reference")], ids=["more", "less"]
)
def test_a_stage_that_one_side_lacks_is_said(spoiled: tuple[bool, bool], side: str) -> None:
    sides = [
        subject((lambda values: values.pop("fpn.0")) if lacks else (lambda values: None)) for lacks in spoiled
    ]
    fpn = rows(*sides)["fpn"]
    assert fpn.detail == f"only the {side} has fpn.0"
    assert fpn.passed
    assert not fpn.compared


def test_a_level_that_one_side_lacks_is_said_beside_the_others() -> None:
    fpn = rows(subject(lambda values: values.update({"fpn.1": values["fpn.0"]})), subject())["fpn"]
    assert fpn.compared
    assert "rms 0" in fpn.detail
    assert fpn.detail.endswith("only the reference has fpn.1")


def test_proposals_without_scores_are_said_and_nothing_breaks() -> None:
    found = rows(subject(), subject(lambda values: values.pop("proposal_scores")))
    assert found["proposals"].detail == "only the reference has proposal_scores"


def test_a_float_canvas_against_whole_grey_levels() -> None:
    """A frame that is resized: both networks get whole levels, so rounding is not blamed on the pixels."""
    frame = np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    for first, second in (("float32", "uint8"), ("uint8", "float32")):
        found = rows(subject(input_dtype=first), subject(input_dtype=second), frame)
        assert 0 < found["preprocess"].tolerance_used <= 1
        assert found["pixels"].tolerance_used == 0


def test_inputs_and_outputs_of_other_names() -> None:
    other = subject(inputs=("frames", "sizes"), outputs=("b", "s", "l", "n"))
    assert all(each.passed for each in rows(subject(), other).values())
    assert all(each.passed for each in rows(other, subject()).values())
    assert first_differing_layer(subject(), other, [FRAME], FP32).layer is None


@pytest.mark.parametrize(
    ("change", "stage", "said"),
    [
        (put("proposals", np.nan), "proposals", "finite"),
        (put("boxes", np.nan), "detections", "finite"),
        (put("labels", 7), "detections", "Expected labels below 2"),
    ],
    ids=["proposal", "box", "label"],
)
def test_values_that_are_no_detections_are_a_failed_row(change: Change, stage: str, said: str) -> None:
    found = rows(subject(), subject(change))
    assert [name for name, each in found.items() if not each.passed] == [stage]
    assert said in found[stage].detail


def test_a_network_that_cannot_take_the_fed_values_is_blamed_in_the_stage_of_another_shape() -> None:
    class Strict(Network):
        def run(self, inputs: Any, feed: Any) -> Arrays:
            if "fpn.0" in feed and feed["fpn.0"].shape[-1] == 3:
                raise ArtefactError("wrong shape")
            return super().run(inputs, feed)

    strict = Strict(change=lambda values: values.update({"fpn.0": values["fpn.0"][..., :2]}))
    found = rows(subject(), Subject(Path("strict"), strict, strict))
    assert [name for name, each in found.items() if not each.passed] == ["fpn"]
    assert "has the shape [1, 4, 6, 2], expected [1, 4, 6, 3]" in found["fpn"].detail


def test_a_network_that_fails_on_what_fits_is_an_error_and_no_verdict() -> None:
    class Stubborn(Network):
        def run(self, inputs: Any, feed: Any) -> Arrays:
            if feed:
                raise ArtefactError("network: cannot run")
            return super().run(inputs, feed)

    stubborn = Stubborn()
    with pytest.raises(ArtefactError, match="network: cannot run"):
        rows(subject(), Subject(Path("stubborn"), stubborn, stubborn))


def test_boxes_are_compared_on_the_canvas() -> None:
    """0.02 px there are 1.2 px in a frame 60 times as large."""
    large = np.full((64 * 60, 96 * 60, 3), 90, np.uint8)

    def shift(values: Arrays) -> None:
        values["boxes"] = values["boxes"] + np.float32(0.02)

    assert rows(subject(), subject(shift), large)["detections"].passed


@pytest.mark.parametrize("anchors", [1, 3])
def test_a_choice_among_anchors_of_one_score_is_excused(anchors: int) -> None:
    """Several anchors have a score to the bit, and the two sides chose another of them."""

    def chosen(left: float) -> Change:
        def change(values: Arrays) -> None:
            score = np.float32(values["proposal_scores"][0, 0])
            logits = np.full((1, 50), -7.0, np.float32)
            logits[0, :anchors] = np.log(score / (1 - score))
            values["objectness.0"] = logits
            values["proposals"] = values["proposals"] + np.float32([left, 0, left, 0]) * [[[1], [0], [0]]]
            values["proposals"] = values["proposals"].astype(np.float32)

        return change

    found = rows(subject(chosen(0.0)), subject(chosen(60.0)))["proposals"]
    assert found.passed is (anchors > 1)
    assert ("excused as ties" in found.detail) is (anchors > 1)


def test_proposals_with_nearly_the_same_score_do_not_hide_those_that_differ() -> None:
    """Of 203 proposals the 200 of no score move as well; what is left to compare moves."""
    corners = np.stack(np.meshgrid(np.arange(20), np.arange(10)), axis=-1).reshape(-1, 2) * 4.0

    def many(shift: float) -> Change:
        def change(values: Arrays) -> None:
            faint = np.concatenate((corners, corners + 3.5), axis=1)[None]
            boxes = np.concatenate((values["proposals"], faint), axis=1) + shift
            values["proposals"] = boxes.astype(np.float32)
            scores = np.concatenate((values["proposal_scores"], np.full((1, 200), 5e-5)), axis=1)
            values["proposal_scores"] = scores.astype(np.float32)

        return change

    assert rows(subject(many(0.0)), subject(many(0.0)))["proposals"].passed
    moved = rows(subject(many(0.0)), subject(many(0.5)))["proposals"]
    assert not moved.passed
    assert "of 3 proposals matched" in moved.detail
    assert "200 excused" in moved.detail


def test_one_detection_of_few_may_differ_where_not_all_have_to_match() -> None:
    """As in the comparison of whole artefacts; here one of three."""
    found = {
        each.name: each
        for each in check_stages(subject(), subject(put("labels", 1)), [[FRAME]], TOLERANCES["fp16"])
    }
    assert not found["detections"].passed  # a label that changed is one missed and one extra
    scored = check_stages(subject(), subject(put("scores", 0.5)), [[FRAME]], TOLERANCES["fp16"])[-1]
    assert scored.name == "detections"
    assert scored.passed
    assert "2 of 3 detections alike" in scored.detail


def test_the_layer_is_found_and_a_failure_there_is_said() -> None:
    wrong = subject(lambda values: values.update({"fpn.0": values["fpn.0"] * 1.01}))
    assert first_differing_layer(subject(), wrong, [FRAME], FP32).layer == "second"

    def fail(values: Arrays) -> None:
        raise ArtefactError("cannot run")

    found = first_differing_layer(subject(), subject(fail), [FRAME], FP32)
    assert found.layer is None
    assert "cannot run" in found.detail


@pytest.mark.parametrize("side", [0, 1])
def test_a_model_for_single_images_gets_single_images(side: int) -> None:
    sides = [subject(max_batch=1 if index == side else None) for index in range(2)]
    assert verify_subjects(*sides, from_frames("two", CONTRACT.names, [FRAME, FRAME]), which_traps=()).passed
    for each in sides:
        assert isinstance(each.stages, Network)
        assert set(each.stages.batches) == {1}


def test_two_tasks_and_no_images_are_refused() -> None:
    proposals = subject(task="proposals", outputs=("boxes", "scores", "num_proposals"))
    with pytest.raises(SettingsError, match="gives detections, network gives proposals; expected one task"):
        verify_subjects(subject(), proposals, from_frames("one", CONTRACT.names, [FRAME]))
    with pytest.raises(DataError, match="nothing: has no images"):
        verify_subjects(subject(), subject(), from_frames("nothing", CONTRACT.names, []))


def test_progress_goes_to_the_end_once() -> None:
    seen: list[tuple[int, int]] = []
    dataset = from_frames("two", CONTRACT.names, [FRAME, FRAME])
    progress = lambda done, total: seen.append((done, total))  # noqa: E731
    verify_subjects(subject(), subject(), dataset, which_traps=("all 0", "noise"), progress=progress)
    assert seen == [(done, 6) for done in range(1, 7)]


@pytest.mark.parametrize("stage", [None, "proposals", "fpn.0"])
def test_on_a_blank_frame_choices_are_left_to_rounding_and_stages_are_not(stage: str | None) -> None:
    """The candidate finds something where the reference finds nothing, and ``stage`` differs there."""

    def spoil(values: Arrays) -> None:
        if stage is not None and set(np.unique(values["pixels"])) in ({1.0}, {0.0, 1.0}):
            values[stage] = values[stage] + 5.0

    candidate = subject(spoil)
    box = ([[3.0, 3.0, 30.0, 30.0]], [0.9], [0], CONTRACT.names)
    candidate.detector.batch = (
        lambda frames: [  # type: ignore[method-assign]
            Detections(*box, size=frame.shape[:2])
            if frame.min() == 255
            else Detections.empty(CONTRACT.names, size=frame.shape[:2])
            for frame in frames
        ]
    )
    picture = np.random.default_rng(0).integers(0, 256, FRAME.shape, dtype=np.uint8)
    data = from_frames("one", CONTRACT.names, [picture])
    report = verify_subjects(subject(), candidate, data, which_traps=("all 0", "all 255"))
    assert [(trap.name, trap.passed) for trap in report.traps] == [
        ("all 0", True),
        ("all 255", stage != "fpn.0"),
    ]


def test_stages_on_another_processor_than_the_detections_are_noted() -> None:
    candidate = subject()
    candidate.detector.provider = "cuda"  # type: ignore[misc]
    report = verify_subjects(
        subject(), candidate, from_frames("one", CONTRACT.names, [FRAME]), which_traps=()
    )
    assert report.notes == ("network: its stages ran on the CPU, its detections and traps on cuda",)
