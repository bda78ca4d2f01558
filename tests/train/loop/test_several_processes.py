"""Several processes train one model: as one process with the whole batch, and all end when one does.

The processes are forked from a server that has PyTorch loaded, and talk through gloo, as torchrun's do.
"""

from __future__ import annotations

import contextlib
import csv
import os
import pickle
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from anchorline.data.proposals import read_proposals
from anchorline.data.synthetic import synthetic_dataset
from anchorline.evaluation.evaluation import proposal_recall, run_detector
from anchorline.train.checkpoint import load_checkpoint
from anchorline.train.predict import load_rpn
from anchorline.train.settings import Settings

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked here")

MakeSettings = Callable[..., Settings]
ANOTHER_FAILED = "another process of the training has failed; its message says why"
PATIENCE = 240  # seconds, on a machine that is busy with other work


@dataclass(frozen=True)
class Ended:
    """What a process returned (None where it did not get there), its exit code and what it printed."""

    value: Any
    code: int | None
    stderr: str
    stdout: str


Start = Callable[..., list[Ended]]


@pytest.fixture(scope="session")
def start(fork: Callable[..., BaseProcess], tmp_path_factory: pytest.TempPathFactory) -> Start:
    """``start(3, "trained", [...])``: run a task of ``one_process.py`` in so many processes.

    ``options`` are those of each process, or of all of them.
    """

    def run(count: int, task: str, options: list[dict[str, Any]] | dict[str, Any]) -> list[Ended]:
        folder, port = tmp_path_factory.mktemp("processes"), _free_port()
        each = [options] * count if isinstance(options, dict) else options
        processes = []
        for rank in range(count):
            environment = _environment(rank, count, port) if count > 1 else {}
            processes.append(fork(task, each[rank], environment, folder / f"{rank}.pickle"))
        for process in processes:
            process.join(PATIENCE)
        late = [process for process in processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        assert not late, f"{len(late)} of {count} processes did not end"
        return [_ended(folder / f"{rank}.pickle", process.exitcode) for rank, process in enumerate(processes)]

    return run


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
    return {name: str(value) for name, value in {**values, "MASTER_PORT": port}.items()}


def _ended(result: Path, code: int | None) -> Ended:
    value = pickle.loads(result.read_bytes()) if result.is_file() else None
    texts = [result.with_suffix(suffix) for suffix in (".err", ".out")]
    return Ended(value, code, *(text.read_text() if text.is_file() else "" for text in texts))


@pytest.fixture(scope="session")
def frozen(tiny: MakeSettings) -> Callable[..., Settings]:
    """Settings whose batch norms are frozen: several processes on a CPU can train with them."""

    def settings(model: dict[str, object] | None = None, **training: object) -> Settings:
        model = {"backbone": "resnet10", "backbone_norm": "frozen", **(model or {})}
        return tiny(model, **{"zoom": (0.8, 1.2), "learning_rate": 0.02, **training})

    return settings


def values(ended: list[Ended]) -> list[Any]:
    for each in ended:
        assert each.value is not None, each.stderr
    return [each.value for each in ended]


def check_close(one: dict[str, Any], several: dict[str, Any], within: float) -> None:
    assert len(one["losses"]) == len(several["losses"]) > 0
    for step, (alone, together) in enumerate(zip(one["losses"], several["losses"], strict=True), start=1):
        for name in alone:
            assert abs(alone[name] - together[name]) < within, (step, name, alone[name], together[name])


def check_same_weights(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize(
    ("images", "changes"),
    [
        (12, {"epochs": 2, "batch": 4}),
        pytest.param(16, {"epochs": 5, "batch": 4}, marks=pytest.mark.slow),
        (
            16,
            {
                "epochs": 1,
                "batch": 4,
                "accumulate": 3,
                "rpn_normalisation": "paper",
                "rpn_samples": 6,
                "mosaic": 0.5,
                "ema": 0.9,
            },
        ),
        (5, {"epochs": 3, "batch": 5, "photometric": 0.5, "optimiser": "adamw", "learning_rate": 1e-4}),
    ],
    ids=["6 steps", "20 steps", "accumulated, paper's normalisation, few anchors, mosaics", "3 images and 2"],
)
def test_two_processes_have_the_losses_of_one_with_the_whole_batch(
    start: Start, frozen: MakeSettings, tmp_path: Path, images: int, changes: dict[str, Any]
) -> None:
    settings = frozen(**changes)
    options = {"settings": settings, "images": images, "device": "cpu"}
    (alone,) = values(start(1, "trained", {**options, "out": tmp_path / "alone"}))
    folders = [tmp_path / "first", tmp_path / "second"]
    first, second = values(start(2, "trained", [{**options, "out": folder} for folder in folders]))
    check_close(*({"losses": run["losses"][:6]} for run in (alone, first)), within=1e-3)
    # Rounding grows with the steps until it decides which proposals are drawn: weights that differ by 1e-5 of
    # themselves at the start give losses that differ by 2e-3 from the twelfth step on, and no more.
    check_close(alone, first, within=1e-2)
    # The parts of each step are those of the one process's batch, in its order.
    joined = [one + other for one, other in zip(first["images"], second["images"], strict=True)]
    if changes.get("accumulate", 1) == 1:
        assert joined == alone["images"]
    one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path / "alone", folders[0]))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-2, atol=1e-3, msg=name)


@dataclass(frozen=True)
class ThreeProcesses:
    """A run of three epochs of 10 images in batches of 6, in three processes with a folder each."""

    settings: Settings
    folders: tuple[Path, ...]
    ended: list[dict[str, Any]]


@pytest.fixture(scope="module")
def three(start: Start, frozen: MakeSettings, tmp_path_factory: pytest.TempPathFactory) -> ThreeProcesses:
    settings = frozen(epochs=3, batch=6, mosaic=0.3, validate_every=1, regime="rpn-only")
    folders = tuple(tmp_path_factory.mktemp("three") / f"of-{rank}" for rank in range(3))
    options = {"settings": settings, "images": 10, "validates": True, "device": "cpu"}
    ended = start(3, "trained", [{**options, "out": folder} for folder in folders])
    return ThreeProcesses(settings, folders, values(ended))


def test_each_epoch_has_each_image_once(three: ThreeProcesses) -> None:
    """Ten images for three processes make two batches of five, of which they have 1, 2 and 2."""
    ids = sorted(image.id for image in synthetic_dataset(10, seed=1, size=(96, 128)))
    steps = [ended["images"] for ended in three.ended]
    assert [[len(images) for images in each] for each in steps] == [[1] * 6, [2] * 6, [2] * 6]
    orders = []
    for epoch in range(3):
        shown = [image for each in steps for step in each[2 * epoch : 2 * epoch + 2] for image in step]
        orders.append([image.split(" + ")[0] for image in shown])  # the first of a mosaic
        assert sorted(orders[-1]) == ids
    assert orders[0] != orders[1]


def test_only_the_main_process_writes_and_reports(three: ThreeProcesses) -> None:
    assert {path.name for path in three.folders[0].iterdir()} == {
        *("model.safetensors", "last", "metrics.csv", "settings.json", "data.json", "samples.png")
    }
    assert not list(three.folders[0].rglob(".*")), "temporary files are left"
    assert not three.folders[1].exists()
    assert not three.folders[2].exists()
    assert [len(ended["losses"]) for ended in three.ended] == [6, 0, 0]


def test_all_processes_know_the_same_result(three: ThreeProcesses, start: Start) -> None:
    """And it is the figure that one process measures with the checkpoint."""
    results = [ended["result"][1:] for ended in three.ended]
    assert results[0] == results[1] == results[2]
    checkpoint = three.folders[0] / "model.safetensors"
    data = synthetic_dataset(7, seed=1, size=(96, 128))
    count = load_checkpoint(checkpoint)[1].thresholds.max_proposals
    found = list(run_detector(load_rpn(checkpoint).batch, data, batch=4))
    recall = proposal_recall(data.images, found, (count,)).recall[count][0.5]
    assert 0 < recall < 1
    with (three.folders[0] / "metrics.csv").open(newline="") as file:
        measured = [float(row["recall50"]) for row in csv.DictReader(file) if row["recall50"]]
    assert len(measured) == 3
    assert max(measured) == pytest.approx(recall, abs=1e-5)
    assert results[0][3] == recall


def test_shared_results_are_those_of_one_process(three: ThreeProcesses, start: Start) -> None:
    """Bit for bit, in the order of the data, in all processes: also where one has nothing to do."""
    cases = [(10, 2), (3, 2), (1, 4)]  # images, batch
    options = {"checkpoint": three.folders[0] / "model.safetensors", "cases": cases}
    for ended in values(start(3, "proposed", options)):
        for (images, _), found in zip(cases, ended, strict=True):
            assert len(found["shared"]) == len(found["alone"]) == images
            for shared, alone in zip(found["shared"], found["alone"], strict=True):
                assert len(shared[0]) > 5
                np.testing.assert_array_equal(shared[0], alone[0])
                np.testing.assert_array_equal(shared[1], alone[1])


def test_a_resumed_run_equals_an_uninterrupted_one_and_a_bug_ends_all(
    three: ThreeProcesses, start: Start, tmp_path: Path
) -> None:
    """In three processes, whose sums depend on their order; a kill in the second epoch."""
    options = {"settings": three.settings, "images": 10, "validates": True, "device": "cpu", "out": tmp_path}
    main, *others = start(3, "trained", {**options, "fault": "bug"})
    assert main.value is None
    assert main.stderr.count("one_process.Killed") == 1
    for other in others:
        assert other.value == ("OtherProcessError", ANOTHER_FAILED)
        assert "Traceback" not in other.stderr
    resumed = values(start(3, "trained", {**options, "resume": True}))[0]
    assert resumed["losses"] == three.ended[0]["losses"][2:]
    for name in ("model.safetensors", "last/model.safetensors"):
        check_same_weights(three.folders[0] / name, tmp_path / name)
    assert (tmp_path / "metrics.csv").read_text() == (three.folders[0] / "metrics.csv").read_text()


def test_going_on_with_another_number_of_processes(
    three: ThreeProcesses, start: Start, tmp_path: Path
) -> None:
    """Two have as many steps an epoch as three had; one alone, which leaves images out, has fewer."""
    copy = tmp_path / "copy"
    shutil.copytree(three.folders[0], copy)
    options = {"settings": three.settings, "images": 10, "device": "cpu", "out": copy, "resume": True}
    (alone,) = start(1, "trained", options)
    assert alone.value[0] == "ArtefactError"
    for part in ("2 steps with --nproc-per-node 3", "1 with 1; resume with --nproc-per-node 3"):
        assert part in alone.value[1]
    both = start(2, "trained", options)
    assert values(both)[0]["losses"] == []  # there was nothing left to do
    said = [ended.stderr for ended in both]
    assert "--nproc-per-node was 3 so far and is 2 now" in said[0]
    assert said[1] == ""


def test_the_four_steps_in_two_processes(start: Start, frozen: MakeSettings, tmp_path: Path) -> None:
    """Losses and stored proposals as in one process; then again from a kill within the second step."""
    settings = frozen(regime="alternating", epochs=4, batch=2, learning_rate=0.005)
    options = {"settings": settings, "images": 4, "device": "cpu"}
    (alone,) = values(start(1, "trained", {**options, "out": tmp_path / "alone"}))
    both = start(2, "trained", {**options, "out": tmp_path / "both"})
    check_close(alone, values(both)[0], within=5e-3)
    data = synthetic_dataset(4, seed=1, size=(96, 128))
    for name in ("proposals-1.jsonl", "proposals-3.jsonl"):
        one, other = (read_proposals(tmp_path / run / name, data) for run in ("alone", "both"))
        assert [each.id for each in other] == [image.id for image in data]
        for first, second in zip(one, other, strict=True):
            assert np.abs(first.scores[:5] - second.scores[:5]).max() < 1e-2
    start(2, "trained", {**options, "out": tmp_path / "killed", "fault": "bug"})
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    resumed = start(2, "trained", {**options, "out": tmp_path / "killed", "resume": True})
    assert values(resumed)[0]["losses"] == values(both)[0]["losses"][2:]
    check_same_weights(tmp_path / "both" / "model.safetensors", tmp_path / "killed" / "model.safetensors")


def command(out: Path, *more: str, workers: int = 0) -> list[str]:
    """Two epochs of three steps."""
    model = 'backbone="resnet10" neck="single" anchor_sizes=[[16.0,32.0]] canvas=[64,96] representation=32'
    training = (
        f"epochs=2 batch=2 workers={workers} rpn_pre_nms=50 rpn_post_nms=30 roi_samples=32 warmup_steps=2"
    )
    changes = [f"model.{each}" for each in model.split()] + [f"training.{each}" for each in training.split()]
    settings = [part for change in changes for part in ("--set", change)]
    data = ["--data", "synthetic:6", "--device", "cpu", "--out", str(out)]
    return ["train", "--preset", "demo", *data, *settings, *more]


def said_by(ended: list[Ended]) -> list[str]:
    """The messages of the command, of all processes."""
    assert not any("Traceback" in each.stderr for each in ended), [each.stderr for each in ended]
    return [line for each in ended for line in each.stderr.splitlines() if line.startswith("anchorline:")]


FAULTS = {
    "nan": ("loss_box nan at step 3", "lower training.learning_rate", "no epoch was finished"),
    "unreadable": ("broken.jpg: truncated; copy it again",),
    "SIGKILL": ("ended without a message", "--resume"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_process_fails_and_all_end_with_one_line(start: Start, tmp_path: Path, fault: str) -> None:
    """In the third step, the last one of the first epoch."""
    # A killed process cannot end the workers that read its images; they see to that themselves.
    arguments = command(tmp_path / "run", workers=1 if fault == "SIGKILL" else 0)
    first, second = start(2, "commanded", {"arguments": arguments, "fault": fault})
    assert first.value == 2
    assert (second.value, second.code) == ((None, -signal.SIGKILL) if fault == "SIGKILL" else (2, 0))
    (said,) = said_by([first, second])
    for part in FAULTS[fault]:
        assert part in said
    if fault == "nan":  # the images of both processes are named
        assert len(re.findall(r"scene-\d+|synthetic-\d+", said)) == 2, said
    left = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert left <= {"settings.json", "data.json", "samples.png", "metrics.csv"}
    if fault == "SIGKILL" and sys.platform == "linux":
        until = time.monotonic() + PATIENCE
        while (workers := _loaders_writing_below(tmp_path.parent)) and time.monotonic() < until:
            time.sleep(0.1)
        assert not workers


def _loaders_writing_below(folder: Path) -> list[str]:
    """The processes that load images, of those whose stderr is a file below ``folder``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            below = os.readlink(process / "fd" / "2").startswith(f"{folder}{os.sep}")
            if below and (process / "comm").read_text().startswith("pt_data"):
                found.append(process.name)
    return found


@pytest.mark.parametrize(("kind", "workers"), [("SIGTERM", 1), ("SIGINT", 0)])
def test_a_signal_to_one_process_stops_all_and_keeps_the_weights(
    start: Start, tmp_path: Path, kind: str, workers: int
) -> None:
    arguments = command(tmp_path / "run", workers=workers)
    first, second = start(2, "commanded", {"arguments": arguments, "fault": kind})
    assert sorted([first.value, second.value]) == [2, 130]
    assert said_by([first, second]) == ["anchorline: interrupted"]
    assert "2 steps" in first.stdout
    assert second.stdout == ""
    load_checkpoint(tmp_path / "run" / "model.safetensors")
    assert not list(tmp_path.rglob(".*")), "temporary files are left"


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (("--set", "training.batch=1"), ("training.batch is 1", "2 processes", "training.batch=2")),
        (("--data", "synthetic:nothing"), ("synthetic:nothing",)),
        (("--set", 'model.backbone_norm="live"'), ("live batch norms", "2 processes on cpu", "frozen")),
        (("--resume",), ("state.pt: no such file", "without --resume")),
        (("--preset", "nowhere.toml"), ("nowhere.toml",)),
    ],
    ids=["a batch of one", "data", "live norms", "nothing to resume", "preset"],
)
def test_what_all_processes_refuse_is_said_once(
    start: Start, tmp_path: Path, more: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    ended = start(2, "commanded", {"arguments": command(tmp_path / "run", *more)})
    assert [each.value for each in ended] == [2, 2]
    (said,) = said_by(ended)
    for part in parts:
        assert part in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
