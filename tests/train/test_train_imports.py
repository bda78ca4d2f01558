"""``anchorline.train`` for a Python user: its names are there, and importing it brings no PyTorch."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest

from anchorline import train

PROBE = """
import json, sys
def heavy():
    return sorted({"torch", "torchvision", "safetensors"} & sys.modules.keys())
import anchorline.train
before = heavy()
listed = dir(anchorline.train)
from anchorline.train import load_preset
epochs = load_preset("resnet50-fpn", ["training.epochs=3"]).training.epochs
settings = heavy()
from anchorline.train import train
print(json.dumps({
    "before": before, "listed": listed, "epochs": epochs, "settings": settings, "after": heavy(),
    "function": [train.__module__, train.__name__, callable(anchorline.train.train)],
}))
"""


def test_pytorch_comes_with_the_first_name_that_needs_it() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["before"] == []
    assert set(train.__all__) <= set(found["listed"])
    assert found["epochs"] == 3
    assert found["settings"] == []
    assert "torch" in found["after"]
    assert found["function"] == ["anchorline.train.loop.train", "train", True]


def test_every_public_name_is_the_one_of_its_module() -> None:
    for name in train.__all__:
        found = getattr(train, name)
        module = importlib.import_module(found.__module__)
        assert getattr(module, name) is found


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = train.trian
    with pytest.raises(ImportError):
        importlib.import_module("anchorline.train.trian")
