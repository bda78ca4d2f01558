"""How the command speaks: results, progress, and errors as one line with an exit code.

Names of files, classes and machines, and what libraries say of files, reach the terminal through ``say`` and
``show`` only, where nothing in them can steer it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import typer

from anchorline.runtime.io.addresses import without_secrets
from anchorline.runtime.io.errors import AnchorlineError, printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment
    from rich.table import Table

USER_ERROR = 2
INTERRUPTED = 130  # as a shell reports a process that Ctrl-C ended
_OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT}
_LONGEST_LINE = 2000  # characters; of a longer one the middle is left out

# Which extra brings a package that some verb needs and the base does not.
EXTRAS = {
    "av": "video",
    "faster_coco_eval": "evaluate",
    "matplotlib": "evaluate",
    "onnx": "train",
    "onnxruntime": "cpu",
    "onnxscript": "train",
    "openvino": "openvino",
    "prometheus_client": "serve",
    "safetensors": "train",
    "starlette": "serve",
    "tensorboard": "tensorboard",
    "torch": "train",
    "torchvision": "train",
    "uvicorn": "serve",
}


class Report(Protocol):
    """Figures that can be shown and written."""

    def to_json(self) -> dict[str, Any]: ...

    def render(self) -> Table: ...


def show_report(report: Report, json: Path | None = None, *, to_stderr: bool = False) -> None:
    """Show the figures and, if asked, write them to a file; each also where the other fails."""
    try:
        if json is not None:
            from anchorline.runtime.io.files import write_json  # here, so that doctor works without OpenCV

            write_json(json, report.to_json())
    finally:
        show(report.render(), to_stderr=to_stderr)


def show(renderable: RenderableType, *, to_stderr: bool = False) -> None:
    """Print what ``rich`` renders, its text ``printable``."""
    from rich.console import Console

    Console(stderr=to_stderr).print(_Printable(renderable))


def say(line: str, *, to_stderr: bool = False) -> None:
    """Print one line of text, ``printable`` and of bounded length."""
    line = printable(line)
    if len(line) > _LONGEST_LINE:
        line = f"{line[: _LONGEST_LINE // 2]} ... {line[-_LONGEST_LINE // 2 :]}"
    print(line, file=sys.stderr if to_stderr else sys.stdout)


def warn(lines: Iterable[str]) -> None:
    """Print each line on stderr as a warning."""
    for line in lines:
        say(f"anchorline: warning: {without_secrets(line)}", to_stderr=True)


class _Printable:
    """A renderable of ``rich`` with ``printable`` text; its styles become escapes later, and stay."""

    def __init__(self, inner: RenderableType) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self._inner, options):
            text = "\n".join(map(printable, segment.text.split("\n")))
            yield segment if segment.control else segment._replace(text=text)


class _PrintableLog(logging.Formatter):
    """Of a log that nobody set up otherwise: warnings quote names of files."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


@contextlib.contextmanager
def progress_bar(description: str) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr, where that is a terminal; yields ``update(done, total, description=...)``."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)

        def update(done: int, total: int | None, text: str | None = None) -> None:
            shown = None if text is None else escape(printable(text))
            bar.update(task, completed=done, total=total, description=shown)

        yield update


def run(app: typer.Typer, arguments: Sequence[str]) -> int:
    """Run ``app`` on ``arguments`` and return its exit code."""

    def fail(message: str, code: int = USER_ERROR) -> int:
        line = " ".join(filter(None, map(str.strip, message.splitlines())))
        say(f"anchorline: {without_secrets(line, arguments)}", to_stderr=True)
        return code

    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_PrintableLog())
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="anchorline", standalone_mode=False)
        if code == INTERRUPTED:  # typer's way to hand on a KeyboardInterrupt
            raise KeyboardInterrupt
        sys.stdout.flush()  # here, where a full disk or a closed pipe can still be reported
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        return fail(f"{error.format_message()}{hint}")
    except BrokenPipeError:  # the reader of our output has gone, as in `anchorline ... | head`
        _abandon_stdout()
        return 1
    except AnchorlineError as error:
        return fail(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        extra = f"anchorline[{EXTRAS[package]}]"
        return fail(f"{package} is not installed, and this needs it: pip install '{extra}'")
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return fail(f"{error.filename}: {error.strerror}; give a name that the file system takes")
        if error.errno not in _OUT_OF_SPACE:
            raise
        _abandon_stdout()
        where = error.filename or "output"
        return fail(f"{where}: {error.strerror}; free some space and run the command again")


def _abandon_stdout() -> None:
    """Point stdout at nothing, so that Python's own flush at exit does not fail a second time."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
