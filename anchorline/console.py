"""How the command speaks: results, progress, and errors as one line with an exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import typer

from anchorline.runtime.io.addresses import without_secrets
from anchorline.runtime.io.errors import AnchorlineError

if TYPE_CHECKING:
    from rich.table import Table

USER_ERROR = 2
INTERRUPTED = 130  # as a shell reports a process that Ctrl-C ended
_OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT}

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
    from rich.console import Console

    try:
        if json is not None:
            from anchorline.runtime.io.files import write_json  # here, so that doctor works without OpenCV

            write_json(json, report.to_json())
    finally:
        Console(stderr=to_stderr).print(report.render())


def warn(lines: Iterable[str]) -> None:
    """Print each line on stderr as a warning."""
    for line in lines:
        print(f"anchorline: warning: {without_secrets(line)}", file=sys.stderr)


@contextlib.contextmanager
def progress_bar(description: str) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr, where that is a terminal; yields ``update(done, total, description=...)``."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total, text=None: bar.update(task, completed=done, total=total, description=text)


def run(app: typer.Typer, arguments: Sequence[str]) -> int:
    """Run ``app`` on ``arguments`` and return its exit code."""

    def fail(message: str, code: int = USER_ERROR) -> int:
        line = " ".join(filter(None, map(str.strip, message.splitlines())))
        print("anchorline:", without_secrets(line, arguments), file=sys.stderr)
        return code

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
        if error.errno not in _OUT_OF_SPACE:
            raise
        _abandon_stdout()
        where = error.filename or "output"
        return fail(f"{where}: {error.strerror}; free some space and run the command again")


def _abandon_stdout() -> None:
    """Point stdout at nothing, so that Python's own flush at exit does not fail a second time."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
