"""A tiny model that finds one box in any frame."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from anchorline.runtime.contract import Contract


@pytest.fixture(scope="session")
def bench_model(
    tmp_path_factory: pytest.TempPathFactory, one_box_model: Callable[[Contract], onnx.ModelProto]
) -> Path:
    contract = Contract("detections", ("thing",), (32, 64), mean=(0.0,) * 3, std=(1.0,) * 3)
    path = tmp_path_factory.mktemp("bench") / "tiny.onnx"
    onnx.save(one_box_model(contract), path)
    return path
