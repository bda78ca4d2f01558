"""benchmarks/paper.py on a tiny VOC folder; its results go to the test's own folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import cv2
import pytest

from anchorline.data.synthetic import CLASS_NAMES, generate_scene

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = Path(__file__).resolve().parents[1] / "tiny.toml"

if BENCHMARKS.is_dir():
    sys.path.append(str(BENCHMARKS))
else:  # the source distribution has no benchmarks
    collect_ignore_glob = ["test_*.py"]


def write_voc(root: Path, splits: dict[str, int], size: tuple[int, int] = (96, 128)) -> Path:
    """A VOC folder of generated scenes, ``splits`` with so many images each."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    number = 0
    for split, count in splits.items():
        ids = [f"{split}{index}" for index in range(count)]
        (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(ids) + "\n")
        for id in ids:
            pixels, boxes, labels = generate_scene(0, size, number)[:3]
            number += 1
            (root / "JPEGImages" / f"{id}.png").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
            objects = "".join(
                f"<object><name>{CLASS_NAMES[label]}</name><bndbox><xmin>{x1 + 1:.0f}</xmin>"
                f"<ymin>{y1 + 1:.0f}</ymin><xmax>{x2:.0f}</xmax><ymax>{y2:.0f}</ymax></bndbox></object>"
                for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True)
            )
            (root / "Annotations" / f"{id}.xml").write_text(f"<annotation>{objects}</annotation>")
    return root


@pytest.fixture(scope="session")
def tiny_voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 images to train on and 4 to test; not to be changed."""
    return write_voc(tmp_path_factory.mktemp("voc") / "tiny", {"trainval": 8, "test": 4})


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for ``benchmarks/results``."""
    import record

    folder = tmp_path / "results"
    monkeypatch.setattr(record, "RESULTS", folder)
    monkeypatch.setattr(record, "commit", lambda: "0000000")  # which asks git twice a row
    return folder


@pytest.fixture
def program(results: Path) -> ModuleType:
    """The module ``paper``."""
    import paper

    return paper


@pytest.fixture
def command(tiny_voc: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """``command(...)``: arguments for the tiny data and a tiny model, in the test's state folder."""

    def arguments(*more: str) -> list[str]:
        own = ["--data", f"voc:{tiny_voc}", "--preset", str(TINY), "--backbone-weights", "none"]
        return [*own, "--device", "cpu", "--state", str(tmp_path / "state"), *more]

    return arguments
