"""What serving costs: an inference server under load, against calling ``Detector`` in a loop.

    python benchmarks/serve.py                      both parts, about two minutes
    python benchmarks/serve.py --model m.onnx       with a model of one's own in the second

First 10,000 requests of 64 clients, with one that sends a few bytes at a time and one that breaks off, to a
model whose answer is known for each frame: what is lost or mixed up, and the server's memory over the run.
Then requests a second by turns with the loop, on frames as tensors and as JPEGs (which the loop decodes as
well), with the latency that a caller sees. Server, callers and loop share the processor. Rows go to
``results/serve.csv``.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import cv2
import numpy as np
from numpy.typing import NDArray
from record import append_row

from anchorline.data.synthetic import generate_scene
from anchorline.runtime import Detections, Detector
from anchorline.runtime.contract import Contract
from anchorline.serving.inference_server import InferenceServer
from anchorline.serving.serve_options import ServeOptions

COLUMNS = (
    "case", "model", "clients", "requests", "answered", "lost", "seconds", "per_second", "per_second_loop",
    "ratio", "p50_ms", "p99_ms", "frames_a_batch", "mib_after_a_tenth", "mib_at_the_end",
)  # fmt: skip
NAMES = ("thing",)
SIZE = (480, 640)
_FEW_FRAMES = 16


class Known:
    """Finds one thing as large as the frame, whose score is the first pixel's; a run costs a millisecond."""

    provider, precision, timings = "scripted", "none", {"network": 0.001}
    contract = Contract("detections", NAMES, None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        time.sleep(0.001)
        boxes = [[[0, 0, *each.shape[1::-1]]] for each in frames]
        scores = [[each[0, 0, 0] / 255] for each in frames]
        return [Detections(*each, [0], class_names=NAMES) for each in zip(boxes, scores, strict=True)]


def be_server(model: str) -> None:
    """Serve until a signal; the first line says where."""
    detector = Known() if model == "known" else model
    server = InferenceServer({"model": detector}, ServeOptions(provider="cpu", deadline=300.0))
    print(server.address.port, flush=True)
    server.run()


class Served:
    """A server in a process of its own."""

    def __init__(self, model: str) -> None:
        command = [sys.executable, __file__, "--be-server", model]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def mebibytes(self) -> float:
        """Resident memory."""
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        assert self._process.wait(60) == 0, "the server did not end well"


class Caller:
    """One connection, kept alive."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> Caller:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._writer.close()

    async def call(self, sent: bytes, step: int = 0) -> tuple[int, bytes]:
        """Code and body of the answer; a positive ``step`` sends so many bytes at a time."""
        for first in range(0, len(sent), step or len(sent)):
            self._writer.write(sent[first : first + (step or len(sent))])
            await self._writer.drain()
            if step:
                await asyncio.sleep(0.001)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0])
        return int(head[9:12]), await self._reader.readexactly(length)


def request_of(path: str, body: bytes, header_length: int | None = None) -> bytes:
    """A request as it is sent."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    if header_length is not None:
        head += f"Inference-Header-Content-Length: {header_length}\r\n"
    return f"{head}\r\n".encode() + body


def tensor_request(frame: NDArray[np.uint8]) -> bytes:
    """The frame as a binary tensor, as Triton's client sends it."""
    pixels = frame.tobytes()
    tensor = {"name": "image", "datatype": "UINT8", "shape": frame.shape}
    tensor["parameters"] = {"binary_data_size": len(pixels)}
    stated = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return request_of("/v2/models/model/infer", stated + pixels, len(stated))


def jpeg_request(frame: NDArray[np.uint8]) -> bytes:
    """The frame as a JPEG for ``/detect``."""
    return request_of("/detect", cv2.imencode(".jpg", frame)[1].tobytes())


async def stress(served: Served, requests: int, clients: int) -> dict[str, object]:
    """All answers held against what was asked."""
    numbers = iter(range(requests))
    codes: Counter[object] = Counter()
    seconds: list[float] = []
    memory: list[float] = []

    async def steady(step: int) -> None:
        async with Caller(served.port) as caller:
            for number in numbers:
                height, width, level = 16 + number % 7, 16 + number % 11, number % 256
                frame = np.full((height, width, 3), level, np.uint8)
                begun = time.perf_counter()
                content = cv2.imencode(".png", frame)[1].tobytes()
                code, body = await caller.call(request_of("/detect", content), step)
                seconds.append(time.perf_counter() - begun)
                found = json.loads(body)
                right = code == 200 and found["size"] == [height, width]
                right = right and found["detections"][0]["score"] == round(level / 255, 5)
                codes["right" if right else (code, body)] += 1
                if number in (requests // 10, requests - 1):
                    memory.append(served.mebibytes())
                if step:
                    await asyncio.sleep(0.01)

    async def broken(ended: asyncio.Event) -> None:
        """Half a request, a whole one whose answer is not waited for, and nonsense, over and over."""
        whole = jpeg_request(np.zeros((64, 64, 3), np.uint8))
        tensor = tensor_request(np.zeros((9, 9, 3), np.uint8))
        for sent in itertools.cycle((whole[:-50], whole, b"\0\r\n\r\n", tensor[:-1])):
            if ended.is_set():
                return
            _, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(sent)
            await writer.drain()
            writer.transport.abort()
            await asyncio.sleep(0.002)

    ended = asyncio.Event()
    breaking = asyncio.create_task(broken(ended))
    begun = time.perf_counter()
    await asyncio.gather(*(steady(step=7 if number == 0 else 0) for number in range(clients - 1)))
    taken = time.perf_counter() - begun
    ended.set()
    await breaking
    right = codes.pop("right", 0)
    if codes:
        print("not right:", codes.most_common(3), file=sys.stderr)
    p50, p99 = (1000 * float(each) for each in np.percentile(seconds, (50, 99)))
    return {
        "requests": requests, "answered": right, "lost": requests - right, "seconds": round(taken, 1),
        "per_second": round(right / taken, 1), "p50_ms": round(p50, 1), "p99_ms": round(p99, 1),
        "mib_after_a_tenth": round(memory[0], 1), "mib_at_the_end": round(memory[-1], 1),
    }  # fmt: skip


async def load(port: int, sent: Sequence[bytes], clients: int, seconds: float) -> list[float]:
    """The seconds of each request, of callers that ask again as soon as they are answered."""
    end = time.perf_counter() + seconds
    taken: list[float] = []

    async def ask(number: int) -> None:
        async with Caller(port) as caller:
            for each in itertools.islice(itertools.cycle(sent), number, None):
                begun = time.perf_counter()
                if begun > end:
                    return
                code, body = await caller.call(each)
                assert code == 200, body
                taken.append(time.perf_counter() - begun)

    await asyncio.gather(*map(ask, range(clients)))
    return taken


def in_a_loop(detector: Detector, contents: Sequence[NDArray[np.uint8] | bytes], seconds: float) -> float:
    """Frames a second of calling the detector with each in turn."""
    begun = time.perf_counter()
    for count, each in enumerate(itertools.cycle(contents)):
        if time.perf_counter() - begun > seconds:
            return count / (time.perf_counter() - begun)
        frame = cv2.imdecode(np.frombuffer(each, np.uint8), 1) if isinstance(each, bytes) else each
        detector(np.asarray(frame, np.uint8))
    raise AssertionError


def batches(port: int) -> tuple[float, float]:
    """How many there were, and their frames, from the metrics."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    start = "anchorline_batch_frames_"
    rows = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(start))
    count, total = (float(rows[f'{start}{each}{{model="model"}}']) for each in ("count", "sum"))
    return count, total


def rates(model: Path, case: str, clients: int, rounds: int, seconds: float) -> dict[str, object]:
    """The server and the loop by turns."""
    frames = [generate_scene(5, SIZE, number)[0] for number in range(_FEW_FRAMES)]
    as_jpeg = case == "JPEG"
    sent = [jpeg_request(each) if as_jpeg else tensor_request(each) for each in frames]
    contents = [cv2.imencode(".jpg", each)[1].tobytes() for each in frames] if as_jpeg else frames
    with Detector(model, "cpu") as detector, Served(str(model)) as served:
        ratios, by_server, by_loop, taken = [], [], [], []
        asyncio.run(load(served.port, sent, clients, 1.0))
        in_a_loop(detector, contents, 1.0)
        before = batches(served.port)
        for _ in range(rounds):
            begun = time.perf_counter()
            round_ = asyncio.run(load(served.port, sent, clients, seconds))
            by_server.append(len(round_) / (time.perf_counter() - begun))
            by_loop.append(in_a_loop(detector, contents, seconds))
            ratios.append(by_server[-1] / by_loop[-1])
            taken += round_
            print(f"{case}: {by_server[-1]:.1f} a second, in a loop {by_loop[-1]:.1f}", file=sys.stderr)
        count, total = np.subtract(batches(served.port), before)
        memory = served.mebibytes()
    p50, p99 = (1000 * float(each) for each in np.percentile(taken, (50, 99)))
    return {
        "requests": len(taken), "answered": len(taken), "lost": 0, "seconds": rounds * seconds,
        "per_second": round(median(by_server), 2), "per_second_loop": round(median(by_loop), 2),
        "ratio": round(median(ratios), 3), "p50_ms": round(p50, 1), "p99_ms": round(p99, 1),
        "frames_a_batch": round(float(total / count), 2), "mib_at_the_end": round(memory, 1),
    }  # fmt: skip


def untrained(path: Path) -> Path:
    """A MobileNetV2-FPN of the quick preset, for frames of any size."""
    import torch

    from anchorline.export.onnx_export import save_model, to_onnx
    from anchorline.train.checkpoint import contract_of
    from anchorline.train.model.faster_rcnn import FasterRCNN
    from anchorline.train.settings import load_preset

    torch.manual_seed(0)
    model = FasterRCNN(load_preset("mobilenet-v2-fpn-quick").model, 20).eval()
    contract = contract_of(model.settings, tuple(f"class {number}" for number in range(20)))
    save_model(to_onnx(model, contract), path)
    return path


def main() -> None:
    if sys.argv[1:2] == ["--be-server"]:
        be_server(sys.argv[2])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="default: an untrained MobileNetV2-FPN")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64, help="of the first part")
    parser.add_argument("--callers", type=int, default=8, help="of the second")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each round")
    parser.add_argument("--dry-run", action="store_true", help="print the rows and write none")
    options = parser.parse_args()

    def tell(case: str, model: str, clients: int, row: dict[str, object]) -> None:
        figures = {**dict.fromkeys(COLUMNS, ""), "case": case, "model": model, "clients": clients, **row}
        print(figures, flush=True)
        if not options.dry_run:
            shown = [Path(each).name if Path(each).exists() else each for each in sys.argv[1:]]
            append_row("serve", shlex.join(["python", "benchmarks/serve.py", *shown]), figures)

    with Served("known") as served:
        row = asyncio.run(stress(served, options.requests, options.clients))
    tell("stress", "answers known", options.clients, row)
    with tempfile.TemporaryDirectory() as temporary:
        model = options.model or untrained(Path(temporary) / "untrained-mobilenet-v2-fpn.onnx")
        for case in ("tensor", "JPEG"):
            row = rates(model, case, options.callers, options.rounds, options.seconds)
            tell(case, model.name, options.callers, row)


if __name__ == "__main__":
    main()
