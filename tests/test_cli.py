"""The command: exit codes, one-line errors, what goes to stdout and what to stderr."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import typer

from anchorline import __version__, cli
from anchorline.cli.options import respelled
from anchorline.runtime.io.errors import DataError

COMMAND = [sys.executable, "-m", "anchorline"]


@pytest.fixture
def verb_raising() -> Iterator[Callable[[BaseException], None]]:
    """Adds a verb ``fail`` that raises the exception given; it is taken away after the test."""
    before = list(cli.app.registered_commands)

    def add(error: BaseException) -> None:
        @cli.app.command("fail")
        def fail() -> NoReturn:
            raise error

    yield add
    cli.app.registered_commands[:] = before


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What was written to stderr, which must be one line; stdout must be empty."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("anchorline: ")
    return captured.err.removeprefix("anchorline: ").rstrip("\n")


def test_version_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr() == (f"anchorline {__version__}\n", "")


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_names_the_verbs(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    assert "detect" in captured.out
    assert "evaluate" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fly"], "'fly'"),
        (["--speed"], "--speed"),
        (["detect", "x.png"], "--model"),
        (["detect", "--model", "model.onnx"], "SOURCE"),
        (["detect", "x.png", "--model", "model.onnx", "--provider", "abacus"], "'abacus'"),
        (["detect", "x.png", "--model", "model.onnx", "--threads", "two"], "--threads"),
        (["evaluate"], "MODEL"),
        (["evaluate", "model.onnx"], "--data"),
        (["evaluate", "model.onnx", "--data", "voc:x@test", "--batch", "0"], "--batch"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    line = error_line(capsys)
    assert expected in line
    assert line.endswith("--help)")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("a.xml: broken\n  at line 3"), 2, "a.xml: broken at line 3"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out.mp4"),
            2,
            "out.mp4: No space left on device; free some space and run the command again",
        ),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            2,
            "torch is not installed, and this needs it: pip install 'anchorline[train]'",
        ),
    ],
)
def test_a_user_s_trouble_is_one_line(
    error: BaseException,
    code: int,
    line: str,
    verb_raising: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    verb_raising(error)
    assert cli.main(["fail"]) == code
    assert error_line(capsys) == line


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        OSError(errno.EBADF, "Bad file descriptor"),
        ModuleNotFoundError("No module named 'anchorline.misspelt'", name="anchorline.misspelt"),
    ],
)
def test_a_bug_keeps_its_traceback(error: Exception, verb_raising: Callable[[BaseException], None]) -> None:
    verb_raising(error)
    with pytest.raises(type(error)) as caught:
        cli.main(["fail"])
    assert caught.value is error


def test_a_verb_can_choose_its_exit_code(verb_raising: Callable[[BaseException], None]) -> None:
    verb_raising(typer.Exit(1))
    assert cli.main(["fail"]) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full")
@pytest.mark.parametrize("option", ["--version", "--help"])
def test_a_full_disk_behind_stdout_is_one_line(option: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, option], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("anchorline: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="needs a pipe that breaks")
def test_a_reader_that_goes_away_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*COMMAND, "--version"], stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("given", "taken", "told"),
    [
        (
            "build m --target tensorrt-rtx",
            "build m --for tensorrt-rtx",
            "--target is now spelled --for",
        ),
        ("build m --target=tensorrt", "build m --for=tensorrt", "--target is now spelled --for"),
        ("export m --for 1920x1080", "export m --frame 1920x1080", "--for is now spelled --frame"),
        ("quantize m --calibrate voc:d", "quantize m --data voc:d", "--calibrate is now spelled --data"),
        (
            "quantize m --calibrate photos",
            "quantize m --images photos",
            "--calibrate is now spelled --images",
        ),
        ("evaluate m --plots there", "evaluate m --pictures there", "--plots is now spelled --pictures"),
        ("bench m --source a.mp4", "bench m --images a.mp4", "--source is now spelled --images"),
        (
            "detect a.mp4 --report r.png",
            "detect a.mp4 --pictures r.png",
            "--report is now spelled --pictures",
        ),
        ("verify a b --worst w.png", "verify a b --pictures w.png", "--worst is now spelled --pictures"),
    ],
)
def test_a_former_spelling_still_works_with_a_word_on_the_new_one(
    given: str, taken: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert respelled(given.split()) == taken.split()
    assert error_line(capsys) == f"{given.split()[0]} {told}"


def test_the_command_takes_a_former_spelling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(tmp_path / "none.safetensors"), "--out", "m.onnx", "--for", "64"]) == 2
    told, error = capsys.readouterr().err.splitlines()
    assert told == "anchorline: export --for is now spelled --frame"
    assert error.startswith("anchorline: --frame is '64'; expected WIDTHxHEIGHT")


@pytest.mark.parametrize(
    "arguments",
    ["quantize m --for cpu", "detect a.mp4 --classes a", "import m --classes a,b", "", "-h"],
)
def test_today_s_spelling_is_taken_as_it_is(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert respelled(arguments.split()) == arguments.split()
    assert capsys.readouterr().err == ""


def test_a_file_of_class_names_was_once_given_as_classes(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("cat\n", encoding="utf-8")
    assert respelled(["import", "m", "--classes", str(names)])[2] == "--classes-file"


def test_quantize_wants_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["quantize", "m.onnx", "--out", "m.int8.onnx"]) == 2
    assert "--data" in error_line(capsys)
