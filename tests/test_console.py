"""What reaches the terminal: lines and tables in which names of files cannot steer it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from anchorline import cli
from anchorline.console import say, show

HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202e\ud800[bold]"
ESCAPED = r"\x1b]0;owned\x07\x1b[2J\u202e\ud800[bold]"


def test_a_line_is_escaped_and_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"{HOSTILE}: 3 boxes")
    assert capsys.readouterr().out == f"{ESCAPED}: 3 boxes\n"
    say(f"{'x' * 5000}: expected a shorter name", to_stderr=True)
    line = capsys.readouterr().err
    assert len(line) < 2100
    assert line.endswith(": expected a shorter name\n")


def test_a_table_is_escaped_where_its_cells_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("name", title="\x1b[2J")
    table.add_row("cat\x1b[31m\u202e")
    table.add_row("two\nlines")
    show(table)
    shown = capsys.readouterr().out
    assert not set("\x1b\u202e") & set(shown)
    assert r"cat\x1b[31m\u202e" in shown
    assert "two" in shown
    assert r"\n" not in shown


@pytest.mark.parametrize("verb", [["doctor"], ["export", "--out", "x.onnx"], ["detect", "a.jpg", "--model"]])
def test_names_that_no_file_system_takes_are_one_line(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = str(tmp_path / f"{'x' * 5000}\x1b[2J.onnx")
    arguments = [*verb, name] if verb[0] != "export" else [verb[0], name, *verb[1:]]
    assert cli.main(arguments) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.rstrip("\n").isprintable()
    assert len(line) < 2100


def test_warnings_of_libraries_are_escaped() -> None:
    program = (
        "import logging, sys\n"
        "from anchorline import cli\n"
        "cli.main(['--version'])\n"
        "logging.getLogger('anchorline.runtime').warning('%s: odd', 'a\\x1b[2J.onnx')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "a\\x1b[2J.onnx: odd\n"
