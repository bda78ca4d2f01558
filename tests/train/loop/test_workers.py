"""Workers that load images: little shared memory, and whatever may end one of them."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from anchorline.data.dataset import Dataset
from anchorline.runtime.contract import ResizeRule
from anchorline.runtime.io.errors import TrainingError
from anchorline.train.data import dataset as loading
from anchorline.train.data.dataset import (
    Batch,
    CanvasDataset,
    build_loader,
    read_batches,
    single_threaded_opencv,
)
from anchorline.train.loop.train import train
from anchorline.train.settings import Settings, TrainingSettings

MakeSettings = Callable[..., Settings]
DEATH = r"has died \(.*%s.*\).*training.workers.*--shm-size"
SETTINGS = Path(__file__).parents[2] / "tiny.toml"


class NoSharing:
    """In the place of ``ForkingPickler``, as PyTorch fails where the memory fills up after a look at it."""

    @staticmethod
    def dumps(_: object) -> NoReturn:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")


def batches_of(data: Dataset, workers: int) -> list[Batch]:
    settings = TrainingSettings(batch=4, workers=workers, flip=0.5)
    loader, _ = build_loader(CanvasDataset(data, (64, 96), ResizeRule(), settings), settings)
    with single_threaded_opencv():
        return list(read_batches(loader))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``free(size)``: shared memory of ``size`` bytes, as far as a look at it tells."""

    def set_free(size: int) -> None:
        status = SimpleNamespace(f_bavail=size, f_frsize=1)
        monkeypatch.setattr(loading.os, "statvfs", lambda _: status)
        monkeypatch.setattr(loading.sys, "platform", "linux")
        monkeypatch.setattr(loading.mmap, "PAGESIZE", 4096)
        loading._tell_of_no_room.cache_clear()

    return set_free


@pytest.mark.parametrize("kind", ["little", "less than PyTorch needs", "none"])
def test_batches_are_the_same_without_shared_memory(
    kind: str,
    scenes: Dataset,
    free: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # Each worker's four images of 64 x 96 x 3 bytes are 0.074 MB; locks are thought to take 0.098 MB.
    free({"little": 120_000, "none": 4096}.get(kind, 2**30))
    if kind == "less than PyTorch needs":
        monkeypatch.setattr(loading, "ForkingPickler", NoSharing)
    pairs = list(zip(batches_of(scenes, 2), batches_of(scenes, 0), strict=True))
    assert len(pairs) == 2
    for one, other in pairs:
        assert one.ids == other.ids
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets.boxes, other.targets.boxes)
    said = capfd.readouterr().err
    expected = "the training loads them itself" if kind == "none" else "0.074 MB from each worker"
    assert said.count("/dev/shm") == said.count(expected) == said.count("--shm-size") == 1


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (
            lambda: os.kill(os.getpid(), signal.SIGKILL),
            DEATH % "(Killed|exited)",
        ),
        (
            lambda: os.kill(os.getpid(), signal.SIGBUS),
            DEATH % "(Bus error|exited)",
        ),
        (lambda: torch.zeros(3)[5], r"failed in a worker \(IndexError: .*5.*\); training.workers=0"),
        (lambda: bytearray(2**62), r"failed in a worker \(MemoryError: .*\); training.workers=0"),
    ],
    ids=["SIGKILL", "SIGBUS", "IndexError", "MemoryError"],
)
def test_whatever_ends_a_worker_ends_the_training_with_one_line(
    fault: Callable[[], Any], expected: str, tiny: MakeSettings, scenes: Dataset, tmp_path: Path
) -> None:
    trainer = os.getpid()
    last = scenes.images[-1]

    def load() -> Any:
        if os.getpid() != trainer:
            fault()
        return last.load()

    data = dataclasses.replace(scenes, images=(*scenes.images[:-1], dataclasses.replace(last, load=load)))
    with pytest.raises(TrainingError, match=expected) as caught:
        train(tiny(workers=2), data, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_container_s_shared_memory(tmp_path: Path) -> None:
    """As in a container: /dev/shm with room for the workers' locks and no batch."""
    mount = "mount -t tmpfs -o size=256k tmpfs /dev/shm"
    apart = [shutil.which("unshare") or "unshare", "-m", "sh", "-c"]
    try:
        allowed = subprocess.run([*apart, mount], capture_output=True).returncode == 0
    except OSError:
        allowed = False
    if not allowed:
        pytest.skip("needs unshare -m and the right to mount")
    command = f"{mount} && exec {sys.executable} -m anchorline train --preset {SETTINGS} --data synthetic:16"
    more = f"--out {tmp_path}/run --device cpu --set training.workers=2 --set training.epochs=1"
    done = subprocess.run([*apart, f"{command} {more}"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "batches come through slower pipes" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "model.safetensors").exists()
