"""``model.safetensors``: what is written comes back exactly, and nothing else is taken for a checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from anchorline.runtime.contract import CONTRACT_KEY
from anchorline.runtime.io.errors import AnchorlineError, ArtefactError, OutputError
from anchorline.runtime.model_file import DIGEST_KEY, read_safetensors
from anchorline.train import checkpoint
from anchorline.train.checkpoint import contract_of, load_checkpoint, read_header, save_checkpoint
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.pretrained import load_backbone_weights
from anchorline.train.settings import load_preset

NAMES = ("cat", "dog", "bird")
SOURCE = {"command": "anchorline train", "data": "synthetic:3"}


@pytest.fixture(scope="module")
def model(small_model: Callable[..., FasterRCNN]) -> FasterRCNN:
    return small_model("single", len(NAMES))


@pytest.fixture(scope="module")
def pristine(model: FasterRCNN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    contract = contract_of(model.settings, NAMES, (1, 7, 9), SOURCE)
    save_checkpoint(path, model.state_dict(), model.settings, contract)
    return path


def rewritten(
    pristine: Path, out: Path, header: dict[str, str] | None = None, **tensors: torch.Tensor | None
) -> Path:
    """``pristine`` with a changed header and changed (or, with None, dropped) tensors, and without digest."""
    with safe_open(pristine, framework="pt") as file:
        metadata = {key: text for key, text in file.metadata().items() if key != DIGEST_KEY}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    state.update({name: tensor for name, tensor in tensors.items() if tensor is not None})
    kept = {name: tensor for name, tensor in state.items() if tensors.get(name, tensor) is not None}
    save_file(kept, out, metadata={**metadata, **(header or {})})
    return out


def message_of(path: Path) -> str:
    """The one line that refuses the checkpoint at ``path``; it names the file."""
    with pytest.raises(ArtefactError) as caught:
        load_checkpoint(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def test_weights_settings_and_contract_come_back_exactly(model: FasterRCNN, pristine: Path) -> None:
    loaded, contract = load_checkpoint(pristine)
    assert not loaded.training
    assert loaded.settings == model.settings
    assert (contract.names, contract.category_ids, contract.source) == (NAMES, (1, 7, 9), SOURCE)
    expected = model.state_dict()
    assert list(loaded.state_dict()) == list(expected)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.dtype == expected[name].dtype
    images, sizes = torch.randint(0, 256, (1, 128, 160, 3)), torch.tensor([[128.0, 160.0]])
    with torch.no_grad():
        assert torch.equal(loaded(images, sizes).boxes, model(images, sizes).boxes)


def test_the_contract_carries_the_models_own_settings(small_settings: Callable[..., Any]) -> None:
    settings = small_settings(
        score_threshold=0.2, nms_iou=0.4, max_detections=7, rpn_nms_iou=0.6, rpn_post_nms=33
    )
    contract = contract_of(settings, NAMES)
    limits = contract.thresholds
    assert (limits.score, limits.nms_iou, limits.max_detections) == (0.2, 0.4, 7)
    assert (limits.rpn_nms_iou, limits.max_proposals) == (0.6, 33)
    assert (contract.canvas, contract.resize.within) == (None, settings.canvas)
    assert (contract.mean, contract.std) == (settings.mean, settings.std)
    assert (contract.task, contract.category_ids) == ("detections", None)


def test_channels_last_weights_are_saved_as_any_other(model: FasterRCNN, tmp_path: Path) -> None:
    state = {
        n: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t
        for n, t in model.state_dict().items()
    }
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, state, model.settings, contract_of(model.settings, NAMES))
    assert all(torch.equal(t, state[n]) for n, t in load_checkpoint(path)[0].state_dict().items())


@pytest.mark.parametrize(("source", "within"), [({}, (128, 160)), ({"library": "torchvision"}, None)])
def test_a_checkpoint_of_contract_version_1_is_freed(
    pristine: Path, tmp_path: Path, source: dict[str, str], within: tuple[int, int] | None
) -> None:
    """Those had a canvas; ours were scaled to fit it in training, imported ones not by their library."""
    with safe_open(pristine, framework="pt") as file:
        stated = json.loads(file.metadata()[CONTRACT_KEY])
    del stated["resize"]["within"], stated["resize"]["padding"]
    earlier = {**stated, "version": 1, "canvas": [128, 160], "source": source}
    path = rewritten(pristine, tmp_path / "model.safetensors", {CONTRACT_KEY: json.dumps(earlier)})
    contract = load_checkpoint(path)[1]
    assert (contract.canvas, contract.resize.within, contract.resize.padding) == (None, within, 1)
    turned = json.dumps({**earlier, "canvas": [128, 192]})
    path = rewritten(pristine, tmp_path / "turned.safetensors", {CONTRACT_KEY: turned})
    with pytest.raises(ArtefactError, match=r"canvas \(128, 160\) and the contract \(128, 192\)"):
        load_checkpoint(path)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(pristine: Path, tmp_path: Path, share: float) -> None:
    content = pristine.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(content[: int(len(content) * share)])
    assert "cut short" in message_of(path)


@pytest.mark.parametrize(
    "content", [b"not a model", b'\x08\0\0\0\0\0\0\0{"a": 1}', b"PK\x03\x04" * 50, b"\xff" * 64]
)
def test_another_kind_of_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert "not a readable safetensors file" in message_of(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "no such file" in message_of(tmp_path / "absent.safetensors")
    assert "is a folder" in message_of(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.toml"
    os.mkfifo(pipe)
    assert "is a pipe, expected a file" in message_of(pipe)
    for read in (lambda: load_preset(str(pipe)), lambda: load_backbone_weights(torch.nn.Identity(), pipe)):
        with pytest.raises(AnchorlineError, match="is a pipe, expected a file"):
            read()


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_another_programs_safetensors_are_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(3)}, path, metadata=metadata)
    assert "no anchorline contract" in message_of(path)


def test_a_contract_without_an_architecture_is_no_checkpoint(pristine: Path, tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    contract = read_header(pristine)[1].to_json()
    save_file({"weight": torch.zeros(3)}, path, metadata={CONTRACT_KEY: contract})
    assert "no architecture in its header" in message_of(path)


def test_every_damage_of_a_checkpoint_is_told(pristine: Path, tmp_path: Path) -> None:
    """A flipped bit in weights or settings would give other boxes without a word."""
    content = pristine.read_bytes()
    assert read_safetensors(pristine).digest is not None
    generator = np.random.default_rng(0)
    path = tmp_path / "damaged.safetensors"
    header = 8 + int.from_bytes(content[:8], "little")
    places = generator.integers([0] * 15 + [header] * 5, [header] * 15 + [len(content)] * 5).tolist()
    expected = load_checkpoint(pristine)[0].state_dict()
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        try:
            found = load_checkpoint(path)
        except ArtefactError:
            continue
        # What is left: other programs' metadata, and the key of the digest itself.
        assert place < header
        assert found[1] == read_header(pristine)[1]
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found[0].state_dict().items())


def test_another_tool_may_add_metadata_of_its_own(pristine: Path, tmp_path: Path) -> None:
    with safe_open(pristine, framework="pt") as file:
        metadata = {**file.metadata(), "note": "mine"}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    save_file(state, tmp_path / "noted.safetensors", metadata=metadata)
    load_checkpoint(tmp_path / "noted.safetensors")
    state["rpn.head.cls_logits.bias"] += 1
    save_file(state, tmp_path / "other.safetensors", metadata=metadata)
    assert "another SHA-256 than its anchorline.digest" in message_of(tmp_path / "other.safetensors")


def test_a_newer_contract_asks_for_an_upgrade(pristine: Path, tmp_path: Path) -> None:
    raw = json.loads(read_header(pristine)[1].to_json())
    path = rewritten(
        pristine, tmp_path / "new.safetensors", {CONTRACT_KEY: json.dumps({**raw, "version": 99})}
    )
    text = message_of(path)
    assert "version 99" in text
    assert "upgrade" in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (CONTRACT_KEY, "{"),
        (CONTRACT_KEY, "[]"),
        (CONTRACT_KEY, '{"version": 1}'),
        (checkpoint.MODEL_KEY, "{"),
        (checkpoint.MODEL_KEY, "[]"),
        (checkpoint.MODEL_KEY, "null"),
        (checkpoint.MODEL_KEY, '{"neck": "pan"}'),
        (checkpoint.MODEL_KEY, '{"wings": 2}'),
    ],
)
def test_a_damaged_header_is_refused(pristine: Path, tmp_path: Path, key: str, value: str) -> None:
    message_of(rewritten(pristine, tmp_path / "damaged.safetensors", {key: value}))


def test_a_backbone_this_version_does_not_know_is_refused(pristine: Path, tmp_path: Path) -> None:
    raw = json.loads(read_header(pristine)[0].to_json())
    header = {checkpoint.MODEL_KEY: json.dumps({**raw, "backbone": "resnet9000"})}
    assert "'resnet9000'" in message_of(rewritten(pristine, tmp_path / "x.safetensors", header))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("rpn.head.cls_logits.bias", torch.zeros(99)),
        ("rpn.head.cls_logits.bias", None),
        ("roi_heads.mask_head.weight", torch.zeros(1)),
    ],
)
def test_weights_of_another_architecture_are_refused(
    pristine: Path, tmp_path: Path, name: str, tensor: torch.Tensor | None
) -> None:
    path = rewritten(pristine, tmp_path / "other.safetensors", **{name: tensor})
    text = message_of(path)
    assert "do not fit" in text
    assert name in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused(pristine: Path, tmp_path: Path, value: float) -> None:
    bias = torch.zeros(6)
    bias[3] = value
    path = rewritten(pristine, tmp_path / "nan.safetensors", **{"rpn.head.cls_logits.bias": bias})
    text = message_of(path)
    assert "'rpn.head.cls_logits.bias'" in text
    assert "not finite" in text


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"representation": 900_000}, "expected [900000, "),
        ({"fpn_channels": 10**12}, "fpn_channels is 1000000000000; expected a whole number from 1 to 1000"),
        ({"rpn_convs": 10**9}, "rpn_convs is 1000000000; expected a whole number from 0 to 100"),
        ({"roi_size": -1}, "roi_size is -1"),
        ({"representation": True}, "representation is True"),
        ({"rpn_nms_iou": float("inf")}, "rpn_nms_iou is inf"),
        ({"mean": [float("nan")] * 3}, "mean is [nan, nan, nan]; expected a list of 3, each a number"),
        ({"max_detections": 10**400}, "expected a whole number from 1 to 1000000"),
        ({"std": [10**400] * 3}, "std is [1000"),
        ({"neck": ["fpn"]}, "neck is ['fpn']"),
        ({"canvas": [64, 64]}, "the architecture has the canvas (64, 64) and the contract"),
        ({"a\nb" * 100: 1}, "is not a setting"),
    ],
)
def test_a_header_that_claims_what_cannot_be_is_refused_before_it_takes_memory(
    pristine: Path, tmp_path: Path, change: dict[str, Any], part: str
) -> None:
    raw = json.loads(read_header(pristine)[0].to_json())
    header = {checkpoint.MODEL_KEY: json.dumps({**raw, **change})}
    path = rewritten(pristine, tmp_path / "claim.safetensors", header)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = message_of(path)
    assert part in text
    assert len(text) < 1500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "KiB"


def test_names_of_a_million_classes_are_refused_before_they_take_memory(
    pristine: Path, tmp_path: Path
) -> None:
    """Of as many as may be named, the tensors are none of this file's."""
    raw = json.loads(read_header(pristine)[1].to_json())
    for count, part in ((1_000_000, "class names"), (40_000, "expected [40001")):
        changed = {**raw, "names": [f"c{number}" for number in range(count)], "category_ids": None}
        path = rewritten(pristine, tmp_path / "many.safetensors", {CONTRACT_KEY: json.dumps(changed)})
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert part in message_of(path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000, "KiB"


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '"', "NaN", "9" * 10_000, "1e999", '{"a": ' + "9" * 5000 + "}"]
)
def test_a_header_that_is_no_json_is_refused(pristine: Path, tmp_path: Path, text: str) -> None:
    for key in (checkpoint.MODEL_KEY, CONTRACT_KEY):
        message_of(rewritten(pristine, tmp_path / "odd.safetensors", {key: text}))


@pytest.mark.parametrize("count", [50, pytest.param(5000, marks=pytest.mark.slow)])
def test_damaged_bytes_of_the_header_end_in_one_line_or_a_model(
    pristine: Path, tmp_path: Path, count: int
) -> None:
    content, draw, path = pristine.read_bytes(), random.Random(3), tmp_path / "x.safetensors"
    length = 8 + int.from_bytes(content[:8], "little")
    refused = 0
    for _ in range(count):
        changed = bytearray(content[:length])
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(changed))
            match draw.randrange(4):
                case 0:
                    changed[at] ^= 1 << draw.randrange(8)
                case 1:
                    changed[at] = draw.choice(b'0123456789-.eE"[]{},:\\nN\xff')
                case 2:  # digits in the middle of whatever stands there
                    changed[at : at + 4] = draw.choice((b"9999", b"null", b"1e99", b"-1.0", b"[[[[", b"true"))
                case _:
                    changed[:8] = draw.choice((length, 2**40, length - 9)).to_bytes(8, "little")
        path.write_bytes(bytes(changed) + content[length:])
        with contextlib.suppress(ArtefactError):
            refused += 1
            load_checkpoint(path)
            refused -= 1
    assert refused > count / 2


def test_a_pipe_is_called_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert "pipe" in message_of(tmp_path / "model.safetensors")


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Files may hold no more than 64 KiB, a quota that the kernel enforces."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(model: FasterRCNN, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"the old one")
    with pytest.raises(OutputError, match="cannot be written"):
        save_checkpoint(path, model.state_dict(), model.settings, contract_of(model.settings, NAMES))
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_nothing_half_written(
    model: FasterRCNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(
            tmp_path / "model.safetensors",
            model.state_dict(),
            model.settings,
            contract_of(model.settings, NAMES),
        )
    assert not list(tmp_path.iterdir())
