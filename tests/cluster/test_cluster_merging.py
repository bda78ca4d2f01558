"""Answers in any order, outputs in that of the files."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorline.cluster.job import WorkItem
from anchorline.cluster.merging import Copies, OrderedLines
from anchorline.cluster.replies import Copy
from anchorline.runtime.io.errors import OutputError
from anchorline.runtime.video.paths import Item


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
    lines = OrderedLines(folder / "out.jsonl")
    expected: dict[int, str] = {}
    for item, pieces in answered:
        if pieces is None:
            lines.skip(item)
            continue
        failed = lines.part(item)
        failed.append(b"of a try that failed\n")
        failed.discard()
        part = lines.part(item)
        for piece in pieces:
            text = "".join(f"{line}\n" for line in piece)
            expected[item.first] = expected.get(item.first, "") + text
            part.append(text.encode("utf-8"))
        lines.complete(part)
    lines.close()
    whole = "".join(expected[first] for first in sorted(expected))
    assert (folder / "out.jsonl").read_bytes().decode("utf-8") == whole
    assert [path.name for path in folder.iterdir()] == ["out.jsonl"]


def test_lines_come_as_soon_as_it_is_their_turn(tmp_path, capfd):
    lines = OrderedLines("-")
    items = [WorkItem(0, ("a", "b"), False), WorkItem(2, ("c",), False)]
    for item in reversed(items):
        assert capfd.readouterr().out == ""
        part = lines.part(item)
        part.append(f"{item.first}\n".encode())
        lines.complete(part)
    assert capfd.readouterr().out == "0\n2\n"
    lines.close()


def test_a_second_answer_is_refused(tmp_path):
    lines = OrderedLines(tmp_path / "out.jsonl")
    item = WorkItem(0, ("a",), False)
    lines.complete(lines.part(item))
    with pytest.raises(RuntimeError, match="a: answered twice"):
        lines.complete(lines.part(item))
    lines.abandon()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_keeps_what_was_answered(tmp_path):
    lines = OrderedLines(tmp_path / "out.jsonl")
    for first in (3, 1):
        part = lines.part(WorkItem(first, ("a",), False))
        part.append(f"{first}\n".encode())
        lines.complete(part)
    lines.close()
    assert (tmp_path / "out.jsonl").read_text() == "1\n3\n"


def test_copies_get_their_names_when_the_item_is_answered(tmp_path):
    files = [
        Item(tmp_path / "x.mp4", True, tmp_path / "out" / name) for name in ("a.mp4", "a-2.mp4", "b.mp4")
    ]
    with Copies(files) as copies:
        assert copies.folder is not None
        for name in ("a.mp4", "a-2.mp4", "b.mp4", "left.mp4"):
            (copies.folder / name).write_text(name)
        copies.publish(WorkItem(0, ("x",), True), [Copy(0, 1, "a.mp4"), Copy(0, 2, "a-2.mp4")])
        assert not (tmp_path / "out" / "a-2.mp4").exists()  # another file's place
        copies.publish(WorkItem(2, ("x",), True), [Copy(0, 1, "b.mp4")])
    found = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert found == {"a.mp4": "a.mp4", "a-3.mp4": "a-2.mp4", "b.mp4": "b.mp4"}


def test_no_copies_leave_no_folder(tmp_path):
    with Copies([Item(tmp_path / "x.png", False, tmp_path / "out" / "x.png")]):
        assert (tmp_path / "out").is_dir()
    assert list(tmp_path.iterdir()) == []
    with Copies([Item(tmp_path / "x.png", False, None)]) as none:
        assert none.folder is None


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file: cannot be written"):
        Copies([Item(tmp_path / "x.png", False, tmp_path / "file" / "x.png")])
    with pytest.raises(OutputError, match="cannot be written"):
        OrderedLines(tmp_path / "file" / "out.jsonl")
