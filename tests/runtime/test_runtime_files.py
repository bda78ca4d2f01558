from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest

from anchorline.data.dataset import image_size, images_or_video, read_lines
from anchorline.data.proposals import read_proposals
from anchorline.data.synthetic import synthetic_dataset
from anchorline.doctor.artefact import read_artefact
from anchorline.runtime import Detector
from anchorline.runtime.io import files
from anchorline.runtime.io.errors import AnchorlineError, DataError, OutputError
from anchorline.runtime.io.files import (
    atomic_path,
    atomic_write_bytes,
    atomic_write_text,
    files_below,
    sha256_of,
    write_json,
)
from anchorline.runtime.io.images import read_image
from anchorline.runtime.video.reader import VideoReader
from anchorline.runtime.video.source import plan


def write_and_fail(target: Path, error: BaseException) -> None:
    with atomic_path(target) as temporary:
        temporary.write_text("half")
        raise error


def test_the_file_appears_whole_under_its_name(tmp_path):
    target = tmp_path / "deep" / "er" / "a.json"
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.suffix == ".json"
        assert temporary.name.startswith(".")
        temporary.write_text("done")
        assert not target.exists()
    assert target.read_text() == "done"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3), DataError("bad")])
def test_any_failure_leaves_what_was_there(tmp_path, error):
    target = tmp_path / "a.txt"
    target.write_text("before")
    with pytest.raises(type(error)):
        write_and_fail(target, error)
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


def test_no_space_left_is_one_line_and_leaves_nothing(tmp_path):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "temporary")
    with pytest.raises(OutputError, match=r"a\.txt: cannot be written \(No space left") as caught:
        write_and_fail(tmp_path / "a.txt", error)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_space_that_runs_out_at_the_flush(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        atomic_write_bytes(tmp_path / "a.bin", b"1234")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_real_full_device_and_it_stays_a_device():
    with pytest.raises(OutputError, match="/dev/full: cannot be written"):
        atomic_write_bytes("/dev/full", b"x" * 100_000)
    assert Path("/dev/full").is_char_device()


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="this system has no /dev/null")
def test_devices_are_written_to_and_never_replaced():
    atomic_write_text("/dev/null", "gone")
    assert Path("/dev/null").is_char_device()


def test_a_folder_or_a_file_in_the_way(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a folder"):
        atomic_write_text(tmp_path, "x")
    with pytest.raises(OutputError, match="cannot be written"):
        atomic_write_text(tmp_path / "file" / "a.txt", "x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        atomic_write_text(tmp_path / "a.txt", "x")


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(OutputError, match="No such file"), atomic_path(tmp_path / "a.txt"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_long_names_still_have_a_temporary_one(tmp_path):
    target = tmp_path / ("a" * 250 + ".txt")
    atomic_write_text(target, "x")
    assert target.read_text() == "x"


def test_text_is_utf8_and_keeps_its_line_ends(tmp_path):
    atomic_write_text(tmp_path / "a.txt", "å\r\n图\n")
    assert (tmp_path / "a.txt").read_bytes() == "å\r\n图\n".encode()


def test_write_json_takes_numpy_and_has_no_nan(tmp_path):
    value = {
        "map": np.float32(0.5),
        "per_class": {"ä": float("nan"), 3: np.inf},
        "count": np.int64(3),
        "curve": np.array([[1.0, np.nan]]),
        "path": Path("a") / "b",
        "pair": (True, None),
    }
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "ä" in text
    assert json.loads(text) == {
        "map": 0.5,
        "per_class": {"ä": None, "3": None},
        "count": 3,
        "curve": [[1.0, None]],
        "path": str(Path("a") / "b"),
        "pair": [True, None],
    }


def test_files_below_links_and_loops(tmp_path):
    """A folder with several paths is read by its own, which stands in the names of labels."""
    root, store = tmp_path / "root", tmp_path / "store"
    for folder in (root / "z", store / "deep"):
        folder.mkdir(parents=True)
    names = ("root/2.txt", "root/10.txt", "root/z/a.txt", "root/.hidden", "store/b.txt", "store/deep/c.txt")
    for name in names:
        (tmp_path / name).touch()
    (root / "1.txt").symlink_to("2.txt")
    (root / "gone").symlink_to("nothing")
    for link, target in (
        ("a", root / "z"),
        ("loop", root),
        ("m", store),
        ("n", store / "deep"),
        ("self", "self"),
    ):
        (root / link).symlink_to(target)
    (store / "up").symlink_to(root)
    (root / "z/self").symlink_to(".")
    found = [path.relative_to(root).as_posix() for path in files_below(root)]
    assert found == ["1.txt", "10.txt", "2.txt", "gone", "m/b.txt", "m/deep/c.txt", "self", "z/a.txt"]
    with pytest.raises(DataError, match="absent: no such file; expected a folder"):
        files_below(root / "absent")


def special_files(folder: Path, suffix: str) -> dict[str, Path]:
    """A pipe that nobody writes to, a socket and a device, in a folder short enough for a socket's name."""
    found = {kind: folder / f"{kind}{suffix}" for kind in ("pipe", "socket", "device")}
    os.mkfifo(found["pipe"])
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(folder):
        server.bind(found["socket"].name)
    found["device"].symlink_to("/dev/zero")
    return found


@pytest.mark.parametrize(
    ("read", "suffix"),
    [
        (sha256_of, ".bin"),
        (read_image, ".jpg"),
        (VideoReader, ".mp4"),
        (lambda path: plan([path]), ".mp4"),
        (lambda path: plan([path]), ""),
        (image_size, ".jpg"),
        (lambda path: images_or_video([path], ("a",)), ".png"),
        (Detector, ".onnx"),
        (Detector, ".engine"),
        (read_artefact, ".safetensors"),
        (lambda path: read_lines(path, "a name"), ".txt"),
        (lambda path: read_proposals(path, synthetic_dataset(1, 0)), ".jsonl"),
    ],
)
def test_what_is_no_file_is_refused_and_never_waited_for(read, suffix, tmp_path):
    for kind, path in special_files(tmp_path, suffix).items():
        if suffix == ".engine":
            path = path.rename(path.with_name(f"{kind}.engine.json")).with_name(f"{kind}.engine")
        with pytest.raises(AnchorlineError, match=rf"is a {kind}, expected a file; write what it carries"):
            read(path)
