"""Compile the kernels for every GPU architecture and pack them: a developer's tool.

    python -m anchorline.runtime.tensorrt.kernels.compile

Needs NVRTC (PyTorch's CUDA build or nvidia-cuda-nvrtc brings it) and cuda-bindings; no GPU. Running the
plugins needs neither. ``-fmad=false`` keeps products and sums apart, as the definition of the ops has it.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from anchorline.runtime.io.files import atomic_path, write_json
from anchorline.runtime.tensorrt.kernels import FOLDER, PTX_ARCHITECTURE, SOURCES, source_hash

ARCHITECTURES = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)
OPTIONS = ("-std=c++17", "-fmad=false")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip file can state: the same bytes in each run


def compile_kernels(folder: Path = FOLDER) -> None:
    """Write ``kernels.zip`` and ``kernels.json`` into ``folder``."""
    targets = [(f"sm_{number}", "cubin") for number in ARCHITECTURES]
    targets.append((f"compute_{PTX_ARCHITECTURE}", "ptx"))
    with atomic_path(folder / "kernels.zip") as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for source in SOURCES:
            for target, suffix in targets:
                entry = zipfile.ZipInfo(f"{source}.{target}.{suffix}", _EPOCH)
                content = compile_source(source, target)
                archive.writestr(entry, content, zipfile.ZIP_DEFLATED, compresslevel=9)
    record = {
        "compiler": f"NVRTC {compiler_version()}",
        "options": list(OPTIONS),
        "architectures": list(ARCHITECTURES),
        "sources": {source: source_hash(source) for source in SOURCES},
    }
    write_json(folder / "kernels.json", record)


def compile_source(source: str, target: str) -> bytes:
    """The image of one source for ``sm_86`` (a cubin) or ``compute_75`` (PTX)."""
    from cuda.bindings import nvrtc

    text = (FOLDER / f"{source}.cu").read_bytes()
    (program,) = _checked(nvrtc.nvrtcCreateProgram(text, f"{source}.cu".encode(), 0, [], []))
    options = [option.encode() for option in (f"-arch={target}", *OPTIONS)]
    result = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(result[0]):
        (size,) = _checked(nvrtc.nvrtcGetProgramLogSize(program))
        log = bytearray(size)
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{source}.cu does not compile for {target}:\n{log.decode().rstrip(chr(0))}")
    cubin = target.startswith("sm_")
    (size,) = _checked((nvrtc.nvrtcGetCUBINSize if cubin else nvrtc.nvrtcGetPTXSize)(program))
    image = bytearray(size)
    _checked((nvrtc.nvrtcGetCUBIN if cubin else nvrtc.nvrtcGetPTX)(program, image))
    return bytes(image)


def compiler_version() -> str:
    """NVRTC's version, as in ``13.2``."""
    from cuda.bindings import nvrtc

    return ".".join(str(part) for part in _checked(nvrtc.nvrtcVersion()))


def _checked(result: tuple[Any, ...]) -> tuple[Any, ...]:
    if int(result[0]):
        raise RuntimeError(f"NVRTC failed: {result[0]}")
    return result[1:]


if __name__ == "__main__":
    compile_kernels()
