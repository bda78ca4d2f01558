"""The examples, run as they stand on a model for the CPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def run(example: str, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / example), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_video_app(
    tmp_path: Path, model_path: Path, write_raw_video: Callable[..., Path], video_frames: list[np.ndarray]
) -> None:
    video = write_raw_video(tmp_path / "video.mp4", video_frames)
    lines = run("video_app.py", model_path, video).splitlines()
    assert [line.split()[0] for line in lines] == [str(number) for number in range(12)]
    assert len((EXAMPLES / "video_app.py").read_text().split('"""')[2].strip().splitlines()) <= 10


def test_the_threaded_app(tmp_path: Path, model_path: Path, picture: np.ndarray) -> None:
    for number in range(5):
        cv2.imwrite(str(tmp_path / f"{number}.png"), picture)
    assert run("threaded_app.py", model_path, tmp_path).splitlines() == [
        f"{number}.png: 2 found" for number in range(5)
    ]
