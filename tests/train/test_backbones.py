"""Backbones: feature maps and pretrained weights against torchvision's own networks."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from anchorline.runtime.io.errors import ArtefactError
from anchorline.train.model.backbones import build_backbone
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.model.settings import ModelSettings
from anchorline.train.pretrained import load_backbone_weights

Settings = Callable[..., ModelSettings]


@pytest.fixture(scope="module")
def network() -> torchvision.models.MobileNetV2:
    """A classifier with batch statistics of its own, as a pretrained one has."""
    torch.manual_seed(3)
    built = torchvision.models.mobilenet_v2().train()
    with torch.no_grad():
        built(torch.randn(4, 3, 64, 64))
    return built.eval()


@pytest.fixture(scope="module")
def weights(network: torchvision.models.MobileNetV2) -> dict[str, Tensor]:
    return network.state_dict()


def saved(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


def message_of(settings: ModelSettings, path: Path) -> str:
    """The one line that refuses the weights at ``path``; the body stays as it was."""
    body = build_backbone(settings).body
    before = {name: tensor.clone() for name, tensor in body.state_dict().items()}
    with pytest.raises(ArtefactError) as caught:
        load_backbone_weights(body, path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    assert all(torch.equal(tensor, before[name]) for name, tensor in body.state_dict().items())
    return text


@pytest.mark.parametrize("prefix", ["features.", ""])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_maps_equal_those_of_the_network_the_weights_come_from(
    small_settings: Settings,
    network: torchvision.models.MobileNetV2,
    weights: dict[str, Tensor],
    tmp_path: Path,
    prefix: str,
    suffix: str,
) -> None:
    state = {name.replace("features.", prefix, 1): tensor for name, tensor in weights.items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    body = build_backbone(small_settings()).eval().body
    load_backbone_weights(body, path)
    images = torch.randn(2, 3, 64, 96)
    expected, x = [], images
    with torch.no_grad():
        for index, stage in enumerate(network.features):
            x = stage(x)
            if index in (3, 6, 13, 17):
                expected.append(x)
        found = body(images)
    for mine, other, stride in zip(found, expected, (4, 8, 16, 32), strict=True):
        assert mine.shape[2:] == (64 // stride, 96 // stride)
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "strides"),
    [
        ({}, (4, 8, 16, 32, 64)),
        ({"finest_stride": 8, "anchor_sizes": ((16.0,), (32.0,), (64.0,), (128.0,))}, (8, 16, 32, 64)),
        ({"neck": "single"}, (16,)),
        ({"neck": "fpn32", "anchor_sizes": ((32.0,), (64.0,), (128.0,))}, (32, 32, 64)),
    ],
)
def test_maps_have_the_strides_and_channels_they_claim(
    small_settings: Settings, changes: dict[str, object], strides: tuple[int, ...]
) -> None:
    backbone = build_backbone(small_settings(**changes)).eval()
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, 128, 192))
    assert tuple(backbone.strides) == strides
    assert [m.shape for m in maps] == [(1, backbone.out_channels, 128 // s, 192 // s) for s in strides]
    assert backbone.pooled_levels == (1 if strides[0] >= 16 else len(strides) - 1)


def test_checkpoints_without_step_counters_are_taken(
    small_settings: Settings, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    old = {name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}
    body = build_backbone(small_settings()).body
    load_backbone_weights(body, saved(old, tmp_path / "old.pth"))
    assert torch.equal(body.state_dict()["0.0.weight"], weights["features.0.0.weight"])


def test_a_missing_file_is_refused(small_settings: Settings, tmp_path: Path) -> None:
    assert "no such file" in message_of(small_settings(), tmp_path / "absent.pth")
    assert "no such file" in message_of(small_settings(), tmp_path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_refused(
    small_settings: Settings, weights: dict[str, Tensor], tmp_path: Path, suffix: str, share: float
) -> None:
    path = tmp_path / f"cut{suffix}"
    torch.save(weights, path) if suffix == ".pth" else save_file(weights, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert "cannot be read as weights" in message_of(small_settings(), path)


@pytest.mark.parametrize(
    "content", [[1, 2], 3, {"model": {"a": torch.zeros(1)}}, {0: torch.zeros(1)}, {"epoch": 3}]
)
def test_a_file_without_a_state_dict_is_refused(
    small_settings: Settings, tmp_path: Path, content: object
) -> None:
    assert "holds no state dict" in message_of(small_settings(), saved(content, tmp_path / "x.pth"))


def test_another_networks_weights_are_refused(small_settings: Settings, tmp_path: Path) -> None:
    other = saved(torchvision.models.shufflenet_v2_x0_5().state_dict(), tmp_path / "other.pth")
    assert "tensors are missing" in message_of(small_settings(), other)
    narrow = saved(torchvision.models.mobilenet_v2(width_mult=0.5).state_dict(), tmp_path / "narrow.pth")
    assert "another network" in message_of(small_settings(), narrow)


def test_weights_that_are_not_numbers_are_refused(
    small_settings: Settings, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    broken = {**weights, "features.3.conv.2.weight": weights["features.3.conv.2.weight"] * torch.nan}
    assert "'3.conv.2.weight'" in message_of(small_settings(), saved(broken, tmp_path / "nan.pth"))


class _Intruder:
    """Unpickles into a call that leaves a file behind."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_code_in_a_weights_file_is_never_run(small_settings: Settings, tmp_path: Path) -> None:
    target = tmp_path / "was-here"
    for path in (tmp_path / "zip.pth", tmp_path / "plain.pth"):
        if path.stem == "zip":
            torch.save({"weight": _Intruder(target)}, path)
        else:
            path.write_bytes(pickle.dumps(_Intruder(target), protocol=2))
        assert "cannot be read as weights" in message_of(small_settings(), path)
        assert not target.exists()


def test_an_unknown_backbone_is_refused_by_name(small_settings: Settings) -> None:
    with pytest.raises(
        ArtefactError, match=r"backbone 'alexnet' is not known; expected one of .*mobilenet_v2"
    ):
        build_backbone(small_settings(backbone="alexnet"))


@pytest.mark.parametrize("norm", ["frozen", "live"])
def test_batch_norm_is_trained_only_where_asked(small_model: Callable[..., FasterRCNN], norm: str) -> None:
    model = small_model("fpn", 2, backbone_norm=norm).train()
    norms = [m for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) > 40
    live = norm == "live"
    assert all(m.training is live and m.weight.requires_grad is live for m in norms)


def test_frozen_stages_are_the_first_ones(small_model: Callable[..., FasterRCNN]) -> None:
    body = small_model("fpn", 2).backbone.body
    body.freeze(2)
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in body.children()]
    assert trained == [False] * 4 + [True] * 14


def test_the_imagenet_weights_load(small_settings: Settings) -> None:
    shared = os.environ.get("ANCHORLINE_SHARED")
    if not shared:
        pytest.skip("ANCHORLINE_SHARED is not set: no pretrained weights")
    body = build_backbone(small_settings()).body
    load_backbone_weights(body, Path(shared) / "weights" / "mobilenet_v2_imagenet_features.pth")
    assert all(torch.isfinite(tensor.float()).all() for tensor in body.state_dict().values())


def test_mobilenet_v2_s_older_flat_keys_load_as_the_same_weights(
    small_settings: Settings, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    """The layout of torchvision before 0.6: a residual's layers numbered 0, 1, (2), 3, 4, (5), 6, 7."""
    network = torchvision.models.mobilenet_v2()
    flat = {}
    for number, block in enumerate(network.features):
        if not hasattr(block, "conv"):
            prefix = f"features.{number}"
            flat |= {
                f"{prefix}.{key}": weights[f"{prefix}.{key}"] for key in block.state_dict() if number < 18
            }
            continue
        index = 0
        for place, part in enumerate(block.conv):
            layers = part if isinstance(part, torch.nn.Sequential) else [part]
            for inner, layer in enumerate(layers):
                now = f"{place}.{inner}" if isinstance(part, torch.nn.Sequential) else str(place)
                for key in layer.state_dict():
                    old = f"features.{number}.conv.{index}.{key}"
                    flat[old] = weights[f"features.{number}.conv.{now}.{key}"]
                index += 1
    assert "features.2.conv.7.running_var" in flat
    today, before = (build_backbone(small_settings()).body for _ in range(2))
    load_backbone_weights(today, saved(weights, tmp_path / "today.pth"))
    load_backbone_weights(before, saved(flat, tmp_path / "before.pth"))
    assert all(torch.equal(a, b) for a, b in zip(today.parameters(), before.parameters(), strict=True))


def test_the_neck_of_torchvisions_mobilenets_needs_one(small_settings: Settings) -> None:
    settings = small_settings(backbone="resnet18", neck="fpn32", anchor_sizes=((32.0,), (64.0,), (128.0,)))
    with pytest.raises(
        ArtefactError, match="'fpn32' does not fit backbone 'resnet18'; expected mobilenet_v2"
    ):
        build_backbone(settings)


def test_the_eps_of_the_batch_norms_is_the_settings(small_settings: Settings) -> None:
    for norm in ("frozen", "live"):
        backbone = build_backbone(small_settings(backbone_norm=norm, backbone_norm_eps=0.0))
        norms = [m for m in backbone.body.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert {m.eps for m in norms} == {0.0}
        with torch.no_grad():
            maps = backbone.eval()(torch.rand(1, 3, 64, 64))
        assert all(torch.isfinite(m).all() for m in maps)
