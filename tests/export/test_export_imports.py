"""The export stage's public names are there, and cost nothing before they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import anchorline.export


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_importing_brings_no_framework_along() -> None:
    run(
        "import sys, anchorline.export\n"
        "assert set(anchorline.export.__all__) <= set(dir(anchorline.export))\n"
        "assert not {'torch', 'torchvision', 'onnx', 'onnxruntime'} & set(sys.modules)"
    )


def test_quantising_needs_no_pytorch() -> None:
    run(
        "import sys; sys.modules['torch'] = None\n"
        "from anchorline.export import quantize_onnx\n"
        "assert callable(quantize_onnx)"
    )


@pytest.mark.parametrize("name", anchorline.export.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(anchorline.export, name).__name__ == name


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        anchorline.export.quantise  # noqa: B018
