"""``build_plugin_library``: the custom ops as a library in C++, for programs running engines without Python.

``plugins.cpp`` is what ``runtime/tensorrt/plugins.py`` is in Python, over the same compiled kernels. It is
compiled where it will be used, by that machine's compiler; neither TensorRT nor CUDA is needed for it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from anchorline.runtime.io.errors import AnchorlineError, SettingsError, one_line
from anchorline.runtime.io.files import atomic_path
from anchorline.runtime.tensorrt.kernels import images
from anchorline.runtime.tensorrt.plugins import PLUGINS

SOURCES = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
# Its own C++ runtime: the library goes to other machines and containers. It is never unloaded, since the
# driver and TensorRT may hold what is in it.
COMPILING = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-s")
LINKING = ("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL", "-Wl,-z,nodelete", "-ldl")
_SECONDS = 300


def build_plugin_library(
    out: str | Path, *, compiler: str | None = None, register_on_load: bool = False
) -> Path:
    """Compile the plugin library for Linux into ``out`` (``.so``); it holds the kernels of every GPU.

    ``compiler`` is a C++17 compiler for the machine that will run it, with options if need be (default:
    ``$CXX``, else the system's). With ``register_on_load`` the plugins register themselves as soon as the
    library is opened: Triton does no more than that, and other loaders refuse such a library. Raises
    ``SettingsError`` without a compiler, ``AnchorlineError`` when it fails.
    """
    out = Path(out)
    if out.suffix != ".so":
        raise SettingsError(f"output is {str(out)!r}; expected a file name that ends in .so")
    program = _find_compiler(compiler)
    asked = ["-DREGISTER_ON_LOAD"] if register_on_load else []
    with tempfile.TemporaryDirectory(prefix="anchorline-") as folder, atomic_path(out) as draft:
        _write_images(Path(folder))
        source, result = str(SOURCES / "plugins.cpp"), str(draft.absolute())
        _run([*program, *COMPILING, *asked, f"-I{folder}", source, *LINKING, "-o", result])
    return out


def _run(command: list[str]) -> None:
    plain = {**os.environ, "LC_ALL": "C"}  # whose errors are called error
    try:
        done = subprocess.run(
            command, env=plain, capture_output=True, text=True, errors="replace", timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AnchorlineError(f"{command[0]} cannot be run ({one_line(error)})") from None
    if done.returncode:
        lines = done.stderr.splitlines() or ["no reason given"]
        # The linker, of -lstdc++: the static one is a package of its own in some systems.
        told = (line for line in lines if "error" in line or "cannot find" in line)
        reason = next(told, lines[0])
        raise AnchorlineError(
            f"{command[0]} could not compile the plugin library: {one_line(reason)}; "
            "it takes a C++17 compiler for Linux with its static runtime (libstdc++-static)"
        )


def _find_compiler(asked: str | None) -> list[str]:
    wanted = asked or os.environ.get("CXX")
    for name in [wanted] if wanted else COMPILERS:
        try:
            program, *arguments = shlex.split(name) or [""]
        except ValueError as error:  # a quotation mark without its other
            reason = str(error).lower()
            raise SettingsError(f"C++ compiler is {wanted!r}, and there is {reason} in it") from None
        if shutil.which(program):
            return [program, *arguments]
    if wanted:
        raise SettingsError(
            f"C++ compiler is {wanted!r}, and there is no such program; give another with --compiler"
        )
    raise SettingsError(
        f"no C++ compiler found ({', '.join(COMPILERS)}); install one (apt install g++), or name one with "
        "--compiler"
    )


def _write_images(folder: Path) -> None:
    """The kernels' images as files, and ``images.inc``, which names them to the source."""
    lines = []
    for source in sorted({op.source for op in PLUGINS}):
        for architecture, content in images(source).items():
            file = folder / f"{source}.{architecture or 'ptx'}"
            file.write_bytes(content)
            lines.append(f'IMAGE({source}, {architecture}, "{file}")\n')
    (folder / "images.inc").write_text("".join(lines), encoding="utf-8")
