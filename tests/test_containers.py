"""The Dockerfile and .dockerignore, held against the package: what a build would only find out too late.

No container engine runs here: what they make was tried by hand (docs/containers.md).
"""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

from anchorline import cli

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PAGE = ROOT / "docs" / "containers.md"
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
TARGETS = ("detect", "serve")


class Stage(NamedTuple):
    """One FROM: its name, what it begins with, and its instructions in order."""

    name: str
    base: str
    lines: list[tuple[str, str]]


def instructions() -> Iterator[tuple[str, str]]:
    """Each instruction and its words, continued lines joined, without comments."""
    kept = "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#"))
    for line in re.sub(r"\\\n\s*", "", kept).splitlines():
        if line.strip():
            word, _, rest = line.partition(" ")
            yield word, rest.strip()


def stages() -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    for word, rest in instructions():
        if word == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\w+)", rest).groups()  # type: ignore[union-attr]
            found[name] = Stage(name, base, [])
        elif found:
            [*found.values()][-1].lines.append((word, rest))
    return found


def inherited(name: str) -> list[tuple[str, str]]:
    """The instructions of a stage after those of the stages that it begins with."""
    stage = stages()[name]
    return (inherited(stage.base) if stage.base in stages() else []) + stage.lines


def arguments() -> dict[str, str]:
    return dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG" and "=" in rest)


def words(target: str, instruction: str) -> list[str]:
    """What the last such instruction of a target says in its JSON form."""
    (*_, text) = [rest for word, rest in inherited(target) if word == instruction]
    return json.loads(text[text.index("[") :])


@pytest.mark.parametrize("name", ["Dockerfile", "docs/containers.md"])
def test_the_extras_are_the_package_s_and_only_one_brings_onnxruntime(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    declared = set(
        re.findall(r"^(\w+) = \[", PROJECT.partition("[project.optional-dependencies]")[2], re.MULTILINE)
    )
    named = re.findall(r"EXTRAS=([\w,]+)", text)
    assert named
    for each in named:
        extras = set(each.split(","))
        assert extras <= declared
        assert (
            len(extras & {"cpu", "gpu", "train", "dev"}) == 1
        )  # two would overwrite each other's onnxruntime
        assert {"serve", "video"} <= extras


def test_the_python_is_one_that_the_package_takes_and_its_pins_were_made_for() -> None:
    least = re.search(r'requires-python = ">=3\.(\d+)"', PROJECT)
    major, minor = arguments()["PYTHON"].split(".")
    assert least is not None
    assert major == "3"
    assert int(minor) >= int(least.group(1))
    bases = {stage.base for stage in stages().values()} - set(stages())
    assert bases == {"python:${PYTHON}-slim"}  # one: the folder of packages is copied between them
    assert any("-c constraints.txt" in rest for word, rest in stages()["build"].lines if word == "RUN")


def test_what_the_build_copies_is_there_let_through_and_all_that_the_package_needs() -> None:
    copied = [
        source for word, rest in stages()["build"].lines if word == "COPY" for source in rest.split()[:-1]
    ]
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored[0] == "*"
    let_through = {line[1:] for line in ignored if line.startswith("!")}
    assert set(copied) == let_through
    assert all((ROOT / name).exists() for name in copied)
    needed = {"pyproject.toml", "anchorline", re.search(r'^readme = "(.+)"', PROJECT, re.MULTILINE).group(1)}  # type: ignore[union-attr]
    needed |= set(json.loads(re.search(r"^license-files = (.+)", PROJECT, re.MULTILINE).group(1)))  # type: ignore[union-attr]
    assert needed <= set(copied)
    rest = [line.removeprefix("**/") for line in ignored[1:] if not line.startswith("!")]
    package = [path.name for path in (ROOT / "anchorline").rglob("*") if "__pycache__" not in path.parts]
    assert not [name for name in package for pattern in rest if fnmatch.fnmatch(name, pattern)]


@pytest.mark.parametrize("target", TARGETS)
def test_nobody_is_root_and_the_cache_is_a_folder_of_the_user(target: str) -> None:
    lines = inherited(target)
    (*_, user) = [rest for word, rest in lines if word == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)  # a number, which Kubernetes can check
    made = " ".join(rest for word, rest in lines if word == "RUN")
    assert f"--uid {user.partition(':')[0]} " in made
    environment = dict(re.findall(r"(\w+)=(\S+)", " ".join(rest for word, rest in lines if word == "ENV")))
    owned = re.search(r"install --directory --owner=\w+ --group=\w+ (.+)", made)
    assert owned is not None
    (*_, folder) = [rest for word, rest in lines if word == "WORKDIR"]
    assert {environment["XDG_CACHE_HOME"], folder} <= set(owned.group(1).split())


@pytest.mark.parametrize("target", TARGETS)
def test_the_entry_point_is_a_verb_with_these_options(target: str) -> None:
    program, verb, *options = words(target, "ENTRYPOINT")
    assert re.search(rf'^{program} = "anchorline\.cli:main"', PROJECT, re.MULTILINE)
    assert verb == target
    command = typer.main.get_command(cli.app).commands[verb]  # type: ignore[attr-defined]
    known = {name for each in command.params for name in each.opts}
    assert {option for option in options if option.startswith("--")} <= known
    assert list(stages())[-1] == "serve"  # what a build without --target makes
    path = next(rest for word, rest in inherited(target) if word == "ENV" and rest.startswith("PATH="))
    assert path.startswith("PATH=/opt/anchorline/bin:")


def health_check(port: int) -> list[str]:
    (*_, line) = [rest for word, rest in inherited("serve") if word == "HEALTHCHECK"]
    name, *rest = json.loads(line[line.index("[") :])
    assert name == "python"
    options = words("serve", "ENTRYPOINT")
    stated = options[options.index("--port") + 1]
    assert ("EXPOSE", stated) in inherited("serve")
    assert f":{stated}/v2/health/ready" in rest[-1]
    return [sys.executable, *(each.replace(f":{stated}/", f":{port}/") for each in rest)]


@contextmanager
def answering(code: int) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code if self.path == "/v2/health/ready" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.mark.parametrize(("code", "healthy"), [(200, True), (503, False), (404, False)])
def test_the_health_check_tells_a_ready_server_and_asks_no_proxy(
    code: int, healthy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody answers
    with answering(code) as port:
        done = subprocess.run(health_check(port), capture_output=True, timeout=60, check=False)
    assert (done.returncode == 0) == healthy


def test_the_page_names_targets_and_paths_that_there_are() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"--target (\w+)", text)) <= set(stages())
    for word in ("10001", "/cache", "/data", "not built"):
        assert word in text
