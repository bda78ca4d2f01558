from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from anchorline.data.dataset import image_size, images_or_video
from anchorline.data.files import read_lines
from anchorline.data.proposals import read_proposals
from anchorline.data.synthetic import synthetic_dataset
from anchorline.doctor.artefact import read_artefact
from anchorline.runtime import DetectOptions, Detector, VideoWriter, detect
from anchorline.runtime.io import files
from anchorline.runtime.io.errors import AnchorlineError, DataError, OutputError
from anchorline.runtime.io.files import (
    atomic_path,
    atomic_write_bytes,
    atomic_write_text,
    files_below,
    hidden_folder,
    json_text,
    sha256_of,
    write_json,
)
from anchorline.runtime.io.images import holds_video, read_image, write_image
from anchorline.runtime.video.reader import VideoReader
from anchorline.runtime.video.source import plan


def write_and_fail(target: Path, error: BaseException) -> None:
    with atomic_path(target) as temporary:
        temporary.write_text("half")
        raise error


def test_the_file_appears_whole_under_its_name(tmp_path):
    target = tmp_path / "deep" / "er" / "a.json"
    with atomic_path(target) as temporary:
        assert temporary.parent.parent == target.parent
        assert temporary.parent.name.startswith(".")
        assert temporary.name == "a.json"
        temporary.write_text("done")
        assert not target.exists()
    assert target.read_text() == "done"
    assert list(target.parent.iterdir()) == [target]


def test_what_is_made_beside_it_is_published_with_it_and_before_it(tmp_path, monkeypatch):
    """So that whoever finds a new file finds its record."""
    places = []
    replace = os.replace
    monkeypatch.setattr(files.os, "replace", lambda path, place: (places.append(place), replace(path, place)))
    target = tmp_path / "model.onnx"
    with atomic_path(target) as draft:
        draft.write_text("model")
        write_json(draft.with_name("model.onnx.json"), {"of": draft.name})
        places.clear()
    assert places == [tmp_path / "model.onnx.json", target]
    assert json.loads(places[0].read_text()) == {"of": "model.onnx"}
    assert sorted(tmp_path.iterdir()) == sorted(places)


def test_a_folder_in_the_place_of_what_stands_beside_it_leaves_all_as_it_was(tmp_path):
    target = tmp_path / "model.onnx"
    target.write_text("before")
    (tmp_path / "model.onnx.json").mkdir()
    with contextlib.ExitStack() as stack:
        draft = stack.enter_context(atomic_path(target))
        draft.write_text("after")
        draft.with_name("model.onnx.json").write_text("{}")
        with pytest.raises(OutputError, match=r"model\.onnx\.json: is a folder"):
            stack.close()
    assert target.read_text() == "before"


def test_an_error_in_the_draft_names_the_file_it_would_become(tmp_path):
    def fail(draft: Path) -> None:
        raise DataError(f"{draft}: half of it is missing; {draft.with_suffix('.json')} as well")

    target = tmp_path / "a.onnx"
    with pytest.raises(DataError) as caught, atomic_path(target) as draft:
        fail(draft)
    assert str(caught.value) == f"{target}: half of it is missing; {tmp_path / 'a.json'} as well"


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.parametrize("before", [None, 0o664, 0o600])
def test_permissions_are_those_that_open_gives(umask: None, tmp_path: Path, before: int | None) -> None:
    """Also for what a library writes for its user alone, as safetensors does."""
    plain, target = tmp_path / "plain", tmp_path / "a.safetensors"
    for path in (plain, target):
        if before is not None:
            path.touch()
            path.chmod(before)
    with open(plain, "w", encoding="utf-8"):
        pass
    with atomic_path(target) as draft:
        os.close(os.open(draft, os.O_WRONLY | os.O_CREAT, 0o600))
        draft.with_name("a.json").touch(0o600)
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode) == (before or 0o640)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o640


# Writes two files and says so; stays at it until it is killed.
WRITER = """
import sys, time
from pathlib import Path
from anchorline.runtime.io.files import atomic_path, hidden_folder
with atomic_path(Path(sys.argv[1], "a.jsonl")) as draft, hidden_folder(Path(sys.argv[1])) as folder:
    draft.write_text("half")
    folder.joinpath("copies").mkdir()
    folder.joinpath("copies", "b.png").write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""

linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system has no /proc")


def hidden(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith(".")}


@linux
def test_what_a_killed_process_leaves_goes_when_the_next_one_writes_there(tmp_path):
    """And nothing else: not what a living one writes, nor one elsewhere, nor what somebody made himself."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"writing\n"
        of_killed, of_living = (
            sorted(name for name in hidden(tmp_path) if f"-{writer.pid}-" in name) for writer in writers
        )
        assert len(of_killed) == len(of_living) == 2
        writers[0].kill()
        os.waitid(os.P_PID, writers[0].pid, os.WEXITED | os.WNOWAIT)  # dead, though its id is not free yet
        kernel, pid, begun, number = of_living[0].removeprefix(".anchorline-").split("-")
        dead = of_killed[0].removeprefix(f".anchorline-{kernel}-")
        kept = {f".anchorline-00000000-{dead}", ".anchorline", ".anchorline-notes", ".a-1a2b3c4d.jsonl"}
        for name in (*kept, f".anchorline-{kernel}-{pid}-1-{number}"):  # the last: one that had the same id
            (tmp_path / name).mkdir()
        (tmp_path / f"{of_killed[0]}.txt").touch()
        atomic_write_text(tmp_path / "c.json", "{}")
        assert hidden(tmp_path) == {*kept, f"{of_killed[0]}.txt", *of_living}
        assert begun != "1"
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


@linux
def test_the_process_itself_and_one_that_cannot_be_seen_are_alive(tmp_path, monkeypatch):
    with atomic_path(tmp_path / "a.txt") as draft:
        draft.write_text("x")
        files._tidied.clear()
        atomic_write_text(tmp_path / "b.txt", "x")
        monkeypatch.setattr(files, "process_state", lambda pid: None)  # /proc is hidden, as from other users
        files._tidied.clear()
        with hidden_folder(tmp_path):
            assert draft.exists()
    assert (tmp_path / "a.txt").read_text() == "x"


def test_a_folder_is_looked_through_once(tmp_path, monkeypatch):
    looked = []
    scandir = os.scandir
    monkeypatch.setattr(files.os, "scandir", lambda place: (looked.append(place), scandir(place))[1])
    for number in range(3):
        atomic_write_text(tmp_path / f"{number}.txt", "x")
        assert sum(Path(place) == tmp_path for place in looked if not isinstance(place, int)) <= 1


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


# Names whose bytes are no UTF-8 reach Python as halves of UTF-16 pairs, over which OpenCV ends the process.

LATIN = os.fsdecode(b"caf\xe9")


def test_a_picture_with_a_name_of_another_encoding_is_detected_in(tmp_path: Path, model_path: Path) -> None:
    write_image(tmp_path / f"{LATIN}.png", np.zeros((20, 30, 3), np.uint8))
    (tmp_path / f"{LATIN}.data").write_bytes(b"nothing known")
    lines = tmp_path / "lines.jsonl"
    with Detector(model_path, "cpu") as detector:
        detect([tmp_path / f"{LATIN}.png"], detector, DetectOptions(jsonl=lines))
    assert json.loads(lines.read_text(encoding="utf-8"))["source"] == str(tmp_path / f"{LATIN}.png")
    write_json(tmp_path / "figures.json", {"source": LATIN})
    assert json.loads((tmp_path / "figures.json").read_text(encoding="utf-8")) == {"source": LATIN}
    steering = "\x9b2J\x1b[2J\u202e\u2028\ufeff"
    assert json_text({steering: [steering]}).isprintable()
    assert json.loads(json_text({steering: [steering]}, indent=2)) == {steering: [steering]}
    assert holds_video(tmp_path / f"{LATIN}.png") is False
    assert holds_video(tmp_path / f"{LATIN}.data") is None


def test_a_video_with_a_name_of_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / f"{LATIN}.mp4").write_bytes(bytes(100))
    with pytest.raises(DataError, match="the name is not UTF-8"):
        VideoReader(tmp_path / f"{LATIN}.mp4")
    with pytest.raises(OutputError, match="the name is not UTF-8"):
        VideoWriter(tmp_path / f"{LATIN}.new.mp4", (20, 30), 10.0)
    assert [path.name for path in tmp_path.iterdir()] == [f"{LATIN}.mp4"]


@pytest.mark.parametrize("name", ["a\x1b[2Jb.png", f"{LATIN}.png", "new\nline.png"])
def test_a_source_is_called_by_what_can_be_shown(name: str, tmp_path: Path) -> None:
    write_image(tmp_path / name, np.zeros((20, 30, 3), np.uint8))
    (source,) = plan([tmp_path / name])
    assert source.name.isprintable()
    assert [item.path.name for item in source.items] == [name]
