"""Answers in any order, outputs in that of the files."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorline.cluster.outputs import Outputs, copies_folder
from anchorline.cluster.worker import WorkItem
from anchorline.runtime.io.errors import OutputError
from anchorline.runtime.video.source import Item


@st.composite
def answers(draw):
    """Items of one to four files each in some order, each with some pieces of lines, or skipped (None)."""
    items, first = [], 0
    for count in draw(st.lists(st.integers(1, 4), max_size=12)):
        items.append(WorkItem(first, tuple(f"{first + index}" for index in range(count)), False))
        first += count
    pieces = st.none() | st.lists(st.lists(st.text("aä\u2028\r", max_size=5), max_size=3), max_size=3)
    return [(item, draw(pieces)) for item in draw(st.permutations(items))]


@settings(deadline=None, max_examples=60)
@given(answers())
def test_lines_stand_in_the_order_of_the_files(tmp_path_factory, answered):
    folder = tmp_path_factory.mktemp("lines")
    expected: dict[int, str] = {}
    with Outputs([], folder / "out.jsonl") as outputs:
        for item, pieces in answered:
            outputs.add(item, b"of a try that failed\n")
            outputs.drop(item)
            for piece in pieces or ():
                text = "".join(f"{line}\n" for line in piece)
                expected[item.first] = expected.get(item.first, "") + text
                outputs.add(item, text.encode("utf-8"))
            if pieces is None:
                outputs.ended(item)
            else:
                outputs.answered(item)
    whole = "".join(expected[first] for first in sorted(expected))
    assert (folder / "out.jsonl").read_bytes().decode("utf-8") == whole
    assert [path.name for path in folder.iterdir()] == ["out.jsonl"]


def test_lines_come_as_soon_as_it_is_their_turn(capfd):
    with Outputs([], "-") as outputs:
        items = [WorkItem(0, ("a", "b"), False), WorkItem(2, ("c",), False)]
        for item in reversed(items):
            assert capfd.readouterr().out == ""
            outputs.add(item, f"{item.first}\n".encode())
            outputs.answered(item)
        assert capfd.readouterr().out == "0\n2\n"


def answer(jsonl, times=1):
    item = WorkItem(0, ("a",), False)
    with Outputs([], jsonl) as outputs:
        for _ in range(times):
            outputs.add(item, b"line\n")
            outputs.answered(item)


def test_a_reader_of_stdout_that_has_gone(capfd):
    """As in ``... --jsonl - | head``, which is nobody's mistake."""
    read, write = os.pipe()
    kept = os.dup(1)
    try:
        os.dup2(write, 1)
        os.close(read)
        with pytest.raises(BrokenPipeError):
            answer("-")
    finally:
        os.dup2(kept, 1)
        os.close(write)
        os.close(kept)


def test_a_second_answer_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="a: answered twice"):
        answer(tmp_path / "out.jsonl", 2)
    assert list(tmp_path.iterdir()) == []


def test_what_was_answered_is_kept(tmp_path):
    with Outputs([], tmp_path / "out.jsonl") as outputs:
        for first in (3, 1):
            item = WorkItem(first, ("a",), False)
            outputs.add(item, f"{first}\n".encode())
            outputs.answered(item)
        outputs.add(WorkItem(0, ("a",), False), b"of an item that is not complete\n")
    assert (tmp_path / "out.jsonl").read_text() == "1\n3\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_copies_get_their_names_when_the_item_is_answered(tmp_path):
    names = ("a.mp4", "a-2.mp4", "b.mp4")
    files = [Item(tmp_path / "x.mp4", True, tmp_path / "out" / name) for name in names]
    items = [WorkItem(place, (f"{place}.mp4",), True) for place in range(3)]
    with copies_folder(files) as copies, Outputs(files, None, copies) as outputs:
        assert copies is not None
        for item, parts in ((items[0], ("0", "0-2")), (items[1], ("1",)), (items[2], ("2",))):
            item.folder_in(copies).mkdir()
            for part in parts:
                (item.folder_in(copies) / f"{part}.mp4").write_text(part)
        outputs.answered(items[0])
        assert not (tmp_path / "out" / "a-2.mp4").exists()  # another file's place
        outputs.answered(items[2])
    found = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert found == {"a.mp4": "0", "a-3.mp4": "0-2", "b.mp4": "2"}


def test_no_copies_leave_no_folder(tmp_path):
    with copies_folder([Item(tmp_path / "x.png", False, tmp_path / "out" / "x.png")]):
        assert (tmp_path / "out").is_dir()
    assert list(tmp_path.iterdir()) == []
    with copies_folder([Item(tmp_path / "x.png", False, None)]) as none:
        assert none is None


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    files = [Item(tmp_path / "x.png", False, tmp_path / "file" / "x.png")]
    with pytest.raises(OutputError, match="file: cannot be written"), copies_folder(files):
        pass
    with pytest.raises(OutputError, match="cannot be written"):
        Outputs([], tmp_path / "file" / "out.jsonl")
