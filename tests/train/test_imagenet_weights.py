"""Backbone weights as torchvision publishes them: from a file, its cache, or its server; no network here."""

from __future__ import annotations

import hashlib
import http.client
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d

from anchorline import cli
from anchorline.runtime.io.errors import ArtefactError, SettingsError
from anchorline.train import pretrained as backbone_weights
from anchorline.train.model.backbones import BACKBONES, Body, build_backbone
from anchorline.train.model.settings import ModelSettings
from anchorline.train.pretrained import load_backbone_weights, load_imagenet_weights

Settings = Callable[..., ModelSettings]
States = dict[str, dict[str, Tensor]]
TINY = Path(__file__).parents[1] / "tiny.toml"
WITHOUT = {"resnet10", "mobilenet_v2_050", "zf"}
# What torchvision's detectors tap at strides 4 to 32; of MobileNets the same layers as ours.
TAPS = {
    "resnet18": ("layer1", "layer2", "layer3", "layer4"),
    "resnet50": ("layer1", "layer2", "layer3", "layer4"),
    "mobilenet_v2": ("3", "6", "13", "17"),
    "mobilenet_v3_large": ("3", "6", "12", "15"),
}


@pytest.fixture(scope="module")
def states() -> States:
    """State dicts of torchvision's classifiers, with random weights and statistics."""
    torch.manual_seed(5)
    found = {}
    for name in TAPS:
        network = torchvision.models.get_model(name, weights=None)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.1, 0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        found[name] = network.state_dict()
    return found


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which PyTorch keeps downloads; there is no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(
        torch.hub, "urlopen", raiser(urllib.error.URLError(socket.gaierror(-2, "no such name")))
    )
    return tmp_path / "home" / "hub" / "checkpoints"


def raiser(error: Exception) -> Callable[..., object]:
    def fail(*_: object, **__: object) -> object:
        raise error

    return fail


def weights_entry(name: str) -> object:
    return torchvision.models.get_model_weights(name).IMAGENET1K_V1


def put(state: object, cache: Path, name: str) -> Path:
    """Save ``state`` where PyTorch looks for the download."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / Path(weights_entry(name).url).name  # type: ignore[attr-defined]
    torch.save(state, path)
    return path


def body_of(settings: Settings, name: str) -> Body:
    return build_backbone(settings(backbone=name)).eval().body


def message_of(settings: Settings, name: str, kind: type[Exception]) -> str:
    """The one line that refuses the weights; the body stays as it was."""
    body = body_of(settings, name)
    before = {key: tensor.clone() for key, tensor in body.state_dict().items()}
    with pytest.raises(kind) as caught:
        load_imagenet_weights(body, name)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in body.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize("name", TAPS)
def test_maps_equal_torchvisions_with_its_whole_checkpoint(
    small_settings: Settings, states: States, cache: Path, name: str
) -> None:
    """The file has the classifier's keys too; norms are frozen as torchvision's detectors have them.

    From the cache come the same weights as from the file.
    """
    path = put(states[name], cache, name)
    assert any(key.startswith(("fc.", "classifier.")) for key in states[name])
    body, cached = body_of(small_settings, name), body_of(small_settings, name)
    load_backbone_weights(body, path)
    load_imagenet_weights(cached, name)
    path.unlink()  # 100 MB
    own, its = body.state_dict(), cached.state_dict()
    assert own.keys() == its.keys()
    assert [key for key in own if not torch.equal(own[key], its[key])] == []
    network = torchvision.models.get_model(name, weights=None, norm_layer=FrozenBatchNorm2d).eval()
    network.load_state_dict(states[name])
    layers = network if name.startswith("resnet") else network.features
    tapped = IntermediateLayerGetter(layers, {layer: layer for layer in TAPS[name]})
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, found = tapped(images), body(images)
    for mine, layer, stride in zip(found, TAPS[name], (4, 8, 16, 32), strict=True):
        assert mine.shape[2:] == (64 // stride, 96 // stride)
        assert mine.std() > 1e-6
        scale = float(expected[layer].abs().max())
        torch.testing.assert_close(mine / scale, expected[layer] / scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(BACKBONES) - WITHOUT))
def test_the_weights_are_the_backbone_s_first_version_and_carry_their_hash(name: str) -> None:
    entry = backbone_weights._torchvision_weights(name)
    assert entry is weights_entry(name)
    assert torch.hub.HASH_REGEX.search(Path(entry.url).name)


@pytest.mark.parametrize("name", sorted(WITHOUT - {"zf"}))  # ZF: test_vgg_weights.py
def test_a_backbone_that_torchvision_has_no_weights_of_says_so(
    small_settings: Settings, cache: Path, name: str
) -> None:
    text = message_of(small_settings, name, SettingsError)
    assert (
        f"no ImageNet weights of {name}; expected one of mobilenet_v2, mobilenet_v3_large, resnet18" in text
    )
    assert not cache.exists()


def served(state: dict[str, Tensor], folder: Path, hash_of: str | None = None) -> Path:
    """A file on a server: its name carries the beginning of its SHA-256, or ``hash_of`` in its place."""
    folder.mkdir()
    torch.save(state, folder / "new.pth")
    digest = hashlib.sha256((folder / "new.pth").read_bytes()).hexdigest()[:8]
    return (folder / "new.pth").rename(folder / f"resnet18-{hash_of or digest}.pth")


def serve(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_entry("resnet18").value, "url", path.as_uri())  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.hub, "urlopen", urllib.request.urlopen)  # which opens file: as well


def test_a_download_is_checked_kept_and_not_repeated(
    small_settings: Settings,
    states: States,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = served(states["resnet18"], tmp_path / "server")
    serve(path, monkeypatch)
    for _ in range(2):
        body = body_of(small_settings, "resnet18")
        load_imagenet_weights(body, "resnet18")
        assert torch.equal(body.state_dict()["conv1.weight"], states["resnet18"]["conv1.weight"])
        assert [each.name for each in cache.iterdir()] == [path.name]
        path.unlink(missing_ok=True)
    captured = capsys.readouterr()
    assert captured.out == "", "progress belongs on stderr"
    assert captured.err.count("Downloading") == 1


def test_a_download_of_another_hash_is_refused_and_not_kept(
    small_settings: Settings, states: States, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(served(states["resnet18"], tmp_path / "server", hash_of="0badc0de"), monkeypatch)
    text = message_of(small_settings, "resnet18", ArtefactError)
    assert "invalid hash value" in text
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError(socket.gaierror(-2, "Name or service not known")),
        urllib.error.HTTPError("https://there", 503, "Service Unavailable", None, None),  # type: ignore[arg-type]
        ConnectionResetError(104, "Connection reset by peer"),
        TimeoutError("timed out"),
        http.client.IncompleteRead(b"abc"),
        ValueError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_without_a_network_the_error_says_what_to_do(
    small_settings: Settings, cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(torch.hub, "urlopen", raiser(error))
    text = message_of(small_settings, "resnet18", ArtefactError)
    assert text.startswith(
        "https://download.pytorch.org/models/resnet18-f37072fd.pth: cannot be downloaded ("
    )
    assert (str(error) or "ValueError") in text
    assert text.endswith("give the file: --backbone-weights resnet18-f37072fd.pth")
    assert not list(cache.iterdir()), "nothing half-written stays"


def test_a_cache_that_cannot_be_written_is_one_line(
    small_settings: Settings, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "home").write_text("not a folder")
    assert "cannot be downloaded" in message_of(small_settings, "resnet18", ArtefactError)


@pytest.mark.parametrize("content", [b"", b"no weights\n", "cut", "pickle", [1, 2], {"a": torch.ones(1)}])
def test_a_damaged_file_in_the_cache_is_one_line_that_names_it(
    small_settings: Settings, states: States, cache: Path, tmp_path: Path, content: object
) -> None:
    path = put(states["resnet18"] if isinstance(content, str) else content, cache, "resnet18")
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-2000])
    elif content == "pickle":
        path.write_bytes(f"cos\nmkdir\n(V{tmp_path / 'was-here'}\ntR.".encode())  # os.mkdir(...)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    text = message_of(small_settings, "resnet18", ArtefactError)
    assert text.startswith(f"{path}: ")
    assert not (tmp_path / "was-here").exists()


def train_arguments(out: Path, weights: str, *overrides: str) -> list[str]:
    settings = ["model.backbone=resnet18", "training.epochs=1", *overrides]
    options = [text for setting in settings for text in ("--set", setting)]
    arguments = ["train", "--preset", str(TINY), "--data", "synthetic:3", "--out", str(out)]
    return [*arguments, "--backbone-weights", weights, *options]


def test_the_command_takes_the_word_imagenet(
    states: States, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    put(states["resnet18"], cache, "resnet18")
    out = tmp_path / "run"
    frozen = ("training.frozen_stages=5", "model.backbone_norm=frozen")
    assert cli.main(train_arguments(out, "imagenet", *frozen)) == 0
    found = load_file(out / "model.safetensors")
    for name in ("conv1.weight", "layer3.1.bn2.running_var"):
        assert torch.equal(found[f"backbone.body.{name}"], states["resnet18"][name])
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ((), "resnet18-f37072fd.pth: cannot be downloaded"),
        (("model.backbone=resnet10",), "torchvision has no ImageNet weights of resnet10"),
    ],
)
def test_the_command_fails_with_one_line_and_writes_nothing(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...], named: str
) -> None:
    assert cli.main(train_arguments(tmp_path / "run", "imagenet", *overrides)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    errors = [line for line in captured.err.splitlines() if not line.startswith("Downloading: ")]
    assert len(errors) == 1
    assert errors[0].startswith("anchorline: ")
    assert named in errors[0]
    assert not (tmp_path / "run").exists()


def test_a_file_called_imagenet_is_given_with_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "imagenet"
    path.write_text("no weights")
    assert cli.main(train_arguments(tmp_path / "run", str(path))) == 2
    assert f"{path}: cannot be read as weights" in capsys.readouterr().err
