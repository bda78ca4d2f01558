"""The command ``anchorline <verb>``.

Each verb is a few lines over a Python function of the same name, and imports it inside, so that the
command starts quickly and a verb needs only the packages it uses. Progress goes to stderr, results
to stdout. Exit code 0 on success, 2 with one line on stderr for a user's mistake, 130 when
interrupted; a traceback means a bug.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from anchorline import __version__, console
from anchorline.cli.convert import build, deploy, export, import_, plugin_library, quantize
from anchorline.cli.detect import detect
from anchorline.cli.evaluate import evaluate, proposals
from anchorline.cli.examine import bench, doctor, report, verify
from anchorline.cli.options import respelled
from anchorline.cli.serve import serve
from anchorline.cli.train import demo, train
from anchorline.cli.tune import tune

app = typer.Typer(
    name="anchorline",
    help="Faster R-CNN from PyTorch training to real-time video.",
    add_completion=False,
    invoke_without_command=True,
)


@app.callback()
def _anchorline(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"anchorline {__version__}")
    elif context.invoked_subcommand is None:
        text = context.get_help()  # typer prints a help with boxes itself and returns an empty one
        if text.strip():
            print(text)
    else:
        return
    raise typer.Exit


_DATA = (detect, serve, evaluate, train, proposals)
_FILES = (import_, export, quantize, verify, build, plugin_library, deploy)
for _verb in (*_DATA, *_FILES, demo, bench, tune, report, doctor):
    app.command(_verb.__name__.rstrip("_").replace("_", "-"))(_verb)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command on ``arguments`` (default: ``sys.argv``) and return its exit code."""
    return console.run(app, respelled(sys.argv[1:] if arguments is None else arguments))
