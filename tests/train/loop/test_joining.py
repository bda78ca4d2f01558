"""What comes before several processes train together: their places, their shares, what is refused."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from anchorline.data.dataset import Dataset
from anchorline.runtime.io.errors import SettingsError
from anchorline.train.data.dataset import EpochSampler, batch_sizes
from anchorline.train.loop import distributed
from anchorline.train.loop.distributed import (
    Place,
    joined_processes,
    own_cuda_device,
    own_share,
    place,
    synchronise_norms,
)
from anchorline.train.loop.train import check_processes
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.settings import Settings

MakeSettings = Callable[..., Settings]
PATIENCE = 240  # seconds, on a machine that is busy with other work
TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def set_environment(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("values", [{}, {"WORLD_SIZE": "1"}, {"RANK": "0"}, {**TORCHRUN, "WORLD_SIZE": "1"}])
def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    set_environment(monkeypatch, values)
    assert place() == Place(0, 0, 1)
    with joined_processes("cpu"):
        assert distributed.process_count() == 1
        assert distributed.is_main()
        assert distributed.gather("own") == ["own"]
        assert distributed.mean_of({"loss": 0.25}) == {"loss": 0.25}
        assert not torch.distributed.is_initialized()


def test_a_place_is_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, TORCHRUN)
    assert place() == Place(rank=3, local_rank=1, processes=4)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"RANK": ""}, ("WORLD_SIZE is 4 and RANK is not set", "torchrun")),
        ({"LOCAL_RANK": ""}, ("LOCAL_RANK is not set", "unset WORLD_SIZE")),
        ({"MASTER_PORT": ""}, ("MASTER_PORT is not set",)),
        ({"RANK": "4"}, ("RANK is 4, WORLD_SIZE 4", "from 0 to 3")),
        ({"RANK": "-1"}, ("RANK is '-1'; expected a whole number",)),
        ({"WORLD_SIZE": "two"}, ("WORLD_SIZE is 'two'; expected a whole number",)),
    ],
)
def test_half_an_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], parts: tuple[str, ...]
) -> None:
    set_environment(monkeypatch, {**TORCHRUN, **changes})
    with pytest.raises(SettingsError) as caught:
        place()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for local_rank in (0, 1):
        assert own_cuda_device("auto", Place(2 + local_rank, local_rank, 4)) == torch.device(
            "cuda", local_rank
        )
    with pytest.raises(SettingsError, match=r"has no GPU of its own, there are 2; expected at most 2"):
        own_cuda_device("cuda", Place(2, 2, 4))
    with pytest.raises(SettingsError, match=r"device is 'cuda:1' for 4 processes; expected 'cuda'"):
        own_cuda_device("cuda:1", Place(1, 1, 4))


@hypothesis_settings(max_examples=100, deadline=None)
@given(st.integers(2, 9), st.integers(0, 60), st.integers(0, 60), st.integers(0, 5))
def test_several_processes_have_each_image_once(processes: int, more: int, larger: int, epoch: int) -> None:
    images, batch = processes + more, processes + larger
    seen: list[int] = []
    parts = []
    for rank in range(processes):
        sampler = EpochSampler(images, batch, 7, rank, processes)
        sampler.epoch = epoch
        parts.append(list(sampler))
        assert len(parts[-1]) == len(sampler) == len(batch_sizes(images, batch, processes))
        seen += [index for keys in parts[-1] for _, index in keys]
    assert sorted(seen) == list(range(images))
    sizes = [[len(keys) for keys in each] for each in parts]
    for step in zip(*sizes, strict=True):
        assert min(step) >= 1
        assert max(step) - min(step) <= 1
        assert sum(step) <= batch or max(step) <= 2
    whole = [sum(step) for step in zip(*sizes, strict=True)]
    assert max(whole) - min(whole) <= 1


def test_where_the_batch_divides_the_images_several_processes_take_the_steps_of_one() -> None:
    alone = EpochSampler(24, 6, 3)
    parts = [list(EpochSampler(24, 6, 3, rank, 4)) for rank in range(4)]
    joined = [[key for part in step for key in part] for step in zip(*parts, strict=True)]
    assert joined == list(alone)


@pytest.mark.parametrize(
    ("images", "batch", "sizes"),
    [(10, 6, (5, 5)), (7, 6, (3, 4)), (10, 3, (3, 3, 4)), (3, 8, (3,)), (9, 4, (3, 3, 3))],
)
def test_batches_of_three_processes(images: int, batch: int, sizes: tuple[int, ...]) -> None:
    assert batch_sizes(images, batch, 3) == sizes


def test_a_process_without_an_image_is_refused(scenes: Dataset) -> None:
    check_processes(scenes, 8, 8)
    check_processes(scenes, 1, 1)
    with pytest.raises(
        SettingsError, match=r"training\.batch is 2, which 3 processes share; .*training\.batch=3"
    ):
        check_processes(scenes, 2, 3)
    with pytest.raises(SettingsError, match=r"has 8 images for 9 processes; .*--nproc-per-node 8"):
        check_processes(scenes, 16, 9)


def test_live_norms_are_kept_in_step_on_cuda_alone(
    tiny: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen ones stay what they are, and the weights keep their names."""
    live = FasterRCNN(tiny({"backbone_norm": "live"}).model, 2)
    frozen = FasterRCNN(tiny({"backbone_norm": "frozen"}).model, 2)
    names = list(live.state_dict())
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    synchronise_norms(live, cpu)  # alone
    assert any(type(module) is nn.BatchNorm2d for module in live.modules())
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    with pytest.raises(
        SettingsError, match=r"live batch norms, which 2 processes on cpu cannot keep in step"
    ):
        synchronise_norms(live, cpu)
    synchronise_norms(frozen, cpu)
    synchronise_norms(frozen, cuda)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in frozen.modules())
    synchronise_norms(live, cuda)
    assert not any(type(module) is nn.BatchNorm2d for module in live.modules())
    assert list(live.state_dict()) == names


@pytest.mark.parametrize(("rank", "share"), [(0, [0, 1, 6]), (1, [2, 3]), (2, [4, 5])])
def test_whole_batches_are_dealt_out(monkeypatch: pytest.MonkeyPatch, rank: int, share: list[int]) -> None:
    monkeypatch.setattr(distributed, "process_count", lambda: 3)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    assert own_share(range(7), 2) == share


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    ("rank", "kind"), [("0", signal.SIGINT), ("1", signal.SIGINT), ("0", signal.SIGTERM)]
)
def test_a_signal_ends_a_process_that_waits_for_the_others(
    fork: Callable[..., BaseProcess], tmp_path: Path, rank: str, kind: signal.Signals
) -> None:
    """PyTorch waits in C++, for half an hour, where a handler of Python's never runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_PORT": port}
    process = fork("waiting", {}, {**TORCHRUN, **there}, tmp_path / "result.pickle")
    try:
        until = time.monotonic() + PATIENCE
        while not (tmp_path / "result.joining").exists():
            assert process.is_alive(), (tmp_path / "result.err").read_text()
            assert time.monotonic() < until
            time.sleep(0.02)
        time.sleep(0.3)  # what is left before it waits
        assert process.is_alive()
        assert process.pid is not None
        os.kill(process.pid, kind)
        process.join(PATIENCE)
        assert process.exitcode == -kind
    finally:
        process.kill()
        process.join()
