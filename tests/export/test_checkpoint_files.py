"""Checkpoints as trainings save them: which weights are meant, what lies beside them, and what is none."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import pathlib
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from anchorline.export.importers.array_pickle import Refused
from anchorline.export.importers.checkpoint_files import choose_state, read_checkpoint_file
from anchorline.runtime.contract import CONTRACT_KEY
from anchorline.runtime.io.errors import ArtefactError

PLAIN, MEAN = 1.0, 2.0


def state(value: float, prefix: str = "", names: int = 4) -> dict[str, Tensor]:
    return {f"{prefix}layer{number}.weight": torch.full((2,), value) for number in range(names)}


NESTED: dict[str, tuple[object, float, str]] = {  # content, the weights that are meant, what is said of them
    "alone": (state(PLAIN), PLAIN, ""),
    "model": ({"model": state(PLAIN), "epoch": 3}, PLAIN, ""),
    "net": ({"net": state(PLAIN), "acc": 0.5}, PLAIN, ""),
    "params": ({"params": state(PLAIN)}, PLAIN, ""),
    "any other key": ({"student_weights_v2": state(PLAIN), "epoch": 1}, PLAIN, ""),
    "one level further": ({"checkpoint": {"model": state(PLAIN)}, "lr": 0.1}, PLAIN, ""),
    "an average": (
        {"model": state(PLAIN), "model_ema": {**state(MEAN, "module."), "n_averaged": torch.tensor(7)}},
        MEAN,
        "those under 'model_ema', the averaged ones, which such trainings evaluate with; there are others "
        "too: --weights model",
    ),
    "an average of timm's name": (
        {"state_dict": state(PLAIN), "state_dict_ema": state(MEAN)},
        MEAN,
        "under 'state_dict_ema', the averaged ones",
    ),
    "an average that lacks the buffers": (
        {"model": state(PLAIN), "ema": state(MEAN, names=3)},
        PLAIN,
        "the weights are those under 'model'; there are others too: --weights ema",
    ),
    "what mmengine swaps": (
        {
            "message_hub": {},
            "state_dict": state(MEAN),
            "ema_state_dict": {**state(PLAIN, "module."), "steps": torch.tensor(7)},
        },
        MEAN,
        "under 'state_dict', the averaged ones, which such trainings evaluate with",
    ),
    "teacher and student": (
        {"student": state(PLAIN), "teacher": state(MEAN)},
        MEAN,
        "under 'teacher', the averaged ones, which such trainings evaluate with; there are others too: "
        "--weights student",
    ),
    "teacher and student as parts": (
        {"state_dict": {**state(PLAIN, "student."), **state(MEAN, "teacher.")}},
        MEAN,
        "under 'state_dict.teacher', the averaged ones",
    ),
    "Unbiased Teacher's names": (
        {"model": {**state(PLAIN, "modelStudent."), **state(MEAN, "modelTeacher.")}},
        MEAN,
        "under 'model.modelTeacher'",
    ),
    "an optimiser and counters beside": (
        {"scaler": {"scale": torch.tensor(1.0)}, "model": state(PLAIN), "optimizer": {"state": {0: {}}}},
        PLAIN,
        "",
    ),
}


@pytest.mark.parametrize("form", NESTED)
def test_which_weights_are_meant(form: str) -> None:
    content, value, said = NESTED[form]
    chosen, notes = choose_state(content)
    assert {name: tensor.tolist() for name, tensor in chosen.items()} == {
        f"layer{number}.weight": [value, value] for number in range(4)
    }
    assert said in " ".join(notes)
    assert bool(notes) == bool(said)


def test_other_weights_can_be_named() -> None:
    content = {"model": state(PLAIN), "model_ema": state(MEAN)}
    chosen, notes = choose_state(content, "model")
    assert chosen["layer0.weight"].tolist() == [PLAIN, PLAIN]
    assert notes == ()
    with pytest.raises(Refused, match="--weights is 'net'; expected one of model, model_ema"):
        choose_state(content, "net")


@pytest.mark.parametrize(
    "wrapped", ["module.a.b", "_orig_mod.a.b", "module._orig_mod.a.b", "a._orig_mod.b", "a.module.b"]
)
def test_what_wrappers_put_into_names_is_dropped(wrapped: str) -> None:
    assert list(choose_state({wrapped: torch.zeros(1)})[0]) == ["a.b"]


def test_names_that_would_become_one_stay() -> None:
    names = {"module.a": torch.zeros(1), "a": torch.zeros(1)}
    assert set(choose_state(names)[0]) == set(names)


# What lies beside the weights.


class CfgNode(dict):  # type: ignore[type-arg]
    """Stands for yacs's class, a dictionary with attributes."""


class Meter:
    """Stands for a class of the training's own."""

    def __init__(self) -> None:
        self.values = [1, 2]

    def __setstate__(self, state: object) -> None:
        raise AssertionError("code of the checkpoint's classes was run")


class Names(list):  # type: ignore[type-arg]
    """A list with a class of its own."""


BESIDE: dict[str, object] = {
    "arguments": argparse.Namespace(out=pathlib.PosixPath("/runs/1"), lr=0.1),
    "a default dictionary": defaultdict(list, {"loss": [1.0]}),
    "a default dictionary of such": defaultdict(functools.partial(defaultdict, float), {"a": {"b": 1.0}}),
    "a queue": deque([1.0, 2.0], maxlen=5),
    "a counter": Counter("abca"),
    "yacs": CfgNode(MODEL=CfgNode(NAME="x")),
    "a class of the training's": Meter(),
    "a list of its own class": Names([1, 2]),
    "NumPy": [np.float64(0.5), np.int64(3), np.array([1.0]), np.dtype("f4")],
    "types": [int, torch.float32, torch.Size([1]), torch.device("cpu")],
    "a set and a range": [{1, 2}, frozenset((3,)), range(3), slice(1, 2)],
    "torch's version": torch.torch_version.TorchVersion("2.0"),
}


@pytest.mark.parametrize("kind", BESIDE)
@pytest.mark.parametrize("modern", [True, False])
def test_what_lies_beside_the_weights_is_no_hindrance(tmp_path: Path, kind: str, modern: bool) -> None:
    path = tmp_path / "model.pth"
    torch.save({"x": BESIDE[kind], "model": state(PLAIN)}, path, _use_new_zipfile_serialization=modern)
    found = read_checkpoint_file(path)
    assert {name: tensor.tolist() for name, tensor in found.state.items()} == {
        f"layer{number}.weight": [PLAIN, PLAIN] for number in range(4)
    }


class Runs:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    "call",
    [
        (os.system, "touch {}"),
        (subprocess.check_output, ["touch", "{}"]),
        (eval, "open('{}', 'w')"),
    ],
    ids=["system", "subprocess", "eval"],
)
def test_what_would_run_code_is_refused_by_its_name(tmp_path: Path, call: tuple[Any, ...]) -> None:
    witness, path = tmp_path / "witness", tmp_path / "model.pth"
    filled = [str(part).format(witness) if isinstance(part, str) else part for part in call[1:]]
    torch.save({"model": state(PLAIN), "x": Runs(call[0], *filled)}, path)
    assert "could run code; refused" in refusal(path)
    assert not witness.exists()


def refusal(path: Path) -> str:
    with pytest.raises(ArtefactError) as caught:
        read_checkpoint_file(path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{path}: ")
    assert len(text) < 500
    return text


# What is no checkpoint.


def archive(**parts: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in parts.items():
            file.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def with_pickle(operations: bytes) -> bytes:
    """What ``torch.save`` wrote, with another pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(state(PLAIN)))) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.infolist():
            content = (
                b"\x80\x02" + operations + b"." if entry.filename.endswith("data.pkl") else old.read(entry)
            )
            new.writestr(entry.filename, content)
    return buffer.getvalue()


def scripted() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.zeros(1)), buffer)
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        entry = tarfile.TarInfo("model.pth")
        entry.size = 4
        file.addfile(entry, io.BytesIO(b"abcd"))
    return buffer.getvalue()


OTHER_FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "Git LFS": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 167502836\n",
        "is a Git LFS pointer, which stands for the file; fetch it: git lfs pull",
    ),
    "a web page": (
        lambda: b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>",
        "is a web page, not the file",
    ),
    "nothing": (lambda: b"", "the file is empty"),
    "JSON": (lambda: b'{"message": "Not Found"}', "is JSON or another text"),
    "tar": (tar, "is a tar archive; unpack it, and give the checkpoint in it"),
    "gzip": (lambda: b"\x1f\x8b\x08\0" + bytes(60), "is compressed; unpack it first"),
    "zeros": (lambda: bytes(4096), "is zeros where it begins"),
    "a cut zip": (lambda: saved(state(PLAIN))[:-200], "is a zip that was cut short or damaged"),
    "another zip": (lambda: archive(weights__model=b"x"), "is a zip that torch.save did not write"),
    "a bomb": (
        lambda: archive(**{"archive__data.pkl": bytes(50_000_000)}),
        "its parts claim 0.05 GB in a file of",
    ),
    "a program": (scripted, "is a TorchScript archive, which holds a program; save model.state_dict()"),
    "a whole model": (
        lambda: saved(torch.nn.Linear(2, 2)),
        "holds a whole object (torch.nn.modules.linear.Linear)",
    ),
    "a whole model in it": (
        lambda: saved({"model": torch.nn.Linear(2, 2), "epoch": 3}),
        "holds no state dict, only model (torch.nn.modules.linear.Linear), epoch (int)",
    ),
    "tuples as a key": (
        lambda: with_pickle(b"}()" + b"\x85" * 300_000 + b"K\x01u"),
        "1000 tuples within each other",
    ),
    "a bytearray of 2 GB": (
        lambda: with_pickle(b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R"),
        "a bytearray of up to 2147483647 bytes",
    ),
    "sparse": (lambda: saved({"a": torch.zeros(2, 2).to_sparse()}), "holds no state dict, only a (Tensor)"),
    "on no device": (
        lambda: saved({"a": torch.zeros(2, device="meta")}),
        "holds no state dict, only a (Tensor)",
    ),
    "another thing": (lambda: b"#!/bin/sh\necho", "is no checkpoint of a kind that is read"),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path: Path, kind: str) -> None:
    make, part = OTHER_FILES[kind]
    path = tmp_path / "model.pth"
    path.write_bytes(make())
    assert part in refusal(path)


def test_a_folder_and_a_pipe_are_called_so(tmp_path: Path) -> None:
    pipe = tmp_path / "model.pth"
    os.mkfifo(pipe)
    assert "is a pipe" in refusal(pipe).replace("named pipe", "pipe")
    assert "is a folder" in refusal(tmp_path)


def test_safetensors_under_the_wrong_name_are_read_and_our_own_called_so(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    save_file(state(PLAIN), path)
    assert set(read_checkpoint_file(path).state) == set(state(PLAIN))
    save_file(state(PLAIN), path, metadata={CONTRACT_KEY: "{}"})
    assert "is a model of Anchorline already" in refusal(path)
    wrong = tmp_path / "model.safetensors"
    torch.save(state(PLAIN), wrong)
    assert "is no safetensors file; if torch.save wrote it, name it .pth" in refusal(wrong)


# Damage. Whatever bytes are wrong, it ends in tensors or in one line, in bounded memory.


def checkpoints() -> list[bytes]:
    """One small file of each format and each kind of object."""
    content = {
        "model": state(PLAIN),
        "ema": OrderedDict(state(MEAN, "module.")),
        "meta": {"cfg": "model = dict(type='FasterRCNN')", "seed": np.int64(5)},
        "args": argparse.Namespace(a=deque([1]), b=defaultdict(list, x=[2])),
    }
    old = io.BytesIO()
    torch.save(content, old, _use_new_zipfile_serialization=False)
    arrays = pickle.dumps({"model": {name: tensor.numpy() for name, tensor in state(PLAIN).items()}})
    return [saved(content), old.getvalue(), arrays, save(state(PLAIN))]


def mutated(content: bytes, draw: random.Random) -> bytes:
    """``content`` with bits turned, bytes cut out, doubled or overwritten with large numbers."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(changed))
        match draw.randrange(5):
            case 0:
                changed[at] ^= 1 << draw.randrange(8)
            case 1:
                del changed[at : at + draw.randint(1, 40)]
            case 2:
                changed[at:at] = changed[at : at + draw.randint(1, 40)]
            case 3:
                changed[at : at + 4] = struct.pack("<I", draw.choice((0, 2**31 - 1, 2**32 - 1, 10**9)))
            case _:
                changed[at] = draw.choice(b"\x85\x86\x87(.}]R\x81bcX\x8aQ0")
        if not changed:
            return b""
    return bytes(changed)


def survives(path: Path, seed: int, count: int) -> int:
    """How many of ``count`` mutations are read; any error but ``ArtefactError`` comes out."""
    draw, originals, read = random.Random(seed), checkpoints(), 0
    for number in range(count):
        path.write_bytes(mutated(originals[number % len(originals)], draw))
        with contextlib.suppress(ArtefactError):
            read_checkpoint_file(path)
            read += 1
    return read


FUZZING = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_checkpoint_files as tests
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read = tests.survives(Path({path!r}), {seed}, {count})
print(read, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_damaged_checkpoints_are_read_or_refused(tmp_path: Path) -> None:
    assert 0 < survives(tmp_path / "x.pth", 7, 60) < 60, "some damage does not matter, some does"


@pytest.mark.slow
def test_thousands_of_damaged_checkpoints_take_no_memory(tmp_path: Path) -> None:
    """In a process of its own, whose end by a signal would be seen, and which takes 500 MB more at most."""
    tests, count = str(Path(__file__).parent), 5000
    script = FUZZING.format(tests=tests, path=str(tmp_path / "x.pth"), seed=7, count=count)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    read, megabytes = map(int, done.stdout.split())
    assert 0 < read < count
    assert megabytes < 500
