"""A folder with a tiny model and what the real verbs write of it, once for all; its names are hostile."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest

from anchorline import cli
from anchorline.runtime.contract import Contract

NAMES = ("<script>alert(1)</script>", "a \"b\" & 'c'", "größe")


@pytest.fixture(scope="session")
def measured(
    once: Callable[[str, Callable[[Path], None]], Path],
    one_box_model: Callable[[Contract], onnx.ModelProto],
) -> Path:
    """``model.onnx``, its record, another one, ``evaluation.json``, ``evaluation/``, ``bench.json``."""

    def make(folder: Path) -> None:
        contract = Contract(
            "detections", NAMES, (32, 64), (0.0,) * 3, (1.0,) * 3, source={"command": "</style><b>bold"}
        )
        model, reference = folder / "model.onnx", folder / "reference.onnx"
        onnx.save(one_box_model(contract), model)
        other = one_box_model(contract)
        other.producer_name = "another exporter"
        onnx.save(other, reference)
        images = folder / "images"
        images.mkdir()
        objects = []
        for number, label in enumerate((0, 1, 2), 1):  # the box is that of class 0
            assert cv2.imwrite(str(images / f"<i>{number}.png"), np.full((32, 64, 3), 60 * number, np.uint8))
            objects.append({"id": number, "image_id": number, "category_id": label + 1, "bbox": [0, 0, 8, 8]})
        described = {
            "images": [{"id": n, "file_name": f"<i>{n}.png", "width": 64, "height": 32} for n in (1, 2, 3)],
            "categories": [{"id": n, "name": name} for n, name in enumerate(NAMES, 1)],
            "annotations": objects,
        }
        (images / "annotations.json").write_text(json.dumps(described), encoding="utf-8")
        spec, out = f"coco:{images},{images / 'annotations.json'}", str(folder / "evaluation.json")
        pictures = str(folder / "evaluation")
        run = ["evaluate", str(model), "--data", spec, "--json", out, "--pictures", pictures]
        assert cli.main(run) == 0
        assert cli.main(["verify", str(reference), str(model), "--json", str(folder / "verify.json")]) == 0
        bench = ["bench", str(model), "--batches", "3", "--warmup", "1", "--images", str(images / "<i>1.png")]
        assert cli.main([*bench, "--json", str(folder / "bench.json")]) == 0

    return once("report-measured", make)


@pytest.fixture
def run(measured: Path, tmp_path: Path) -> Path:
    """A copy of ``measured`` without the reference, so that it is about one model; it may be changed."""
    folder = tmp_path / "run"
    shutil.copytree(measured, folder)
    (folder / "reference.onnx").unlink()
    return folder
