"""RTSP against a small server of the test's own: MPEG-4 video over RTP inside the RTSP connection."""

from __future__ import annotations

import socketserver
import struct
import threading
import time

import numpy as np
import pytest

from anchorline.runtime.video import intake
from anchorline.runtime.video.options import DetectOptions
from anchorline.runtime.video.pipeline import VideoPipeline

av = pytest.importorskip("av", reason="needs PyAV to encode what the server sends")

SIZE, FPS, PAYLOAD_TYPE, TICKS = (48, 64), 100, 96, 90_000


def encoded(count: int) -> tuple[bytes, list[bytes]]:
    """The decoder's configuration, and one packet for each of ``count`` frames."""
    codec = av.CodecContext.create("mpeg4", "w")
    codec.height, codec.width = SIZE
    codec.pix_fmt, codec.framerate, codec.gop_size = "yuv420p", FPS, 5
    codec.flags |= av.codec.context.Flags.global_header
    codec.open()
    packets = []
    for index in range(count):
        frame = av.VideoFrame.from_ndarray(np.full((*SIZE, 3), 4 * index, np.uint8), format="bgr24")
        packets += [bytes(packet) for packet in codec.encode(frame)]
    return bytes(codec.extradata), packets + [bytes(packet) for packet in codec.encode(None)]


class RtspServer(socketserver.ThreadingTCPServer):
    """One video track, interleaved TCP only (RFC 2326, RFC 3016); each connection plays from the start.

    ``play_for`` is how many frames a connection sends before it is closed.
    """

    daemon_threads, allow_reuse_address, block_on_close = True, True, False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Connection)
        self.config, self.packets = encoded(60)
        self.play_for, self.connections = 10_000, 0

    def handle_error(self, request, address) -> None:
        """A client that leaves is no error."""


class Connection(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while head := self.rfile.readline():
            fields = {}
            while (line := self.rfile.readline().strip()) != b"":
                name, _, value = line.partition(b":")
                fields[name.lower()] = value.strip()
            method = head.split()[0]
            self.answer(method, fields.get(b"cseq", b"0"))
            if method == b"PLAY":
                return self.play()
            if method == b"TEARDOWN":
                return None
        return None

    def answer(self, method: bytes, number: bytes) -> None:
        extra, body = b"", b""
        if method == b"OPTIONS":
            extra = b"Public: DESCRIBE, SETUP, PLAY, TEARDOWN\r\n"
        elif method == b"DESCRIBE":
            body = (
                "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=test\r\nt=0 0\r\n"
                f"m=video 0 RTP/AVP {PAYLOAD_TYPE}\r\na=rtpmap:{PAYLOAD_TYPE} MP4V-ES/{TICKS}\r\n"
                f"a=fmtp:{PAYLOAD_TYPE} profile-level-id=1; config={self.server.config.hex()}\r\n"
                "a=control:track\r\n"
            ).encode()
            extra = b"Content-Type: application/sdp\r\nContent-Length: %d\r\n" % len(body)
        elif method == b"SETUP":
            extra = b"Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n"
        self.wfile.write(
            b"RTSP/1.0 200 OK\r\nCSeq: " + number + b"\r\nSession: 1\r\n" + extra + b"\r\n" + body
        )

    def play(self) -> None:
        self.server.connections += 1
        for index in range(self.server.play_for):
            packet = self.server.packets[index % len(self.server.packets)]
            stamp = index * TICKS // FPS
            header = struct.pack(">BBHII", 0x80, 0x80 | PAYLOAD_TYPE, index & 0xFFFF, stamp, 1)
            self.wfile.write(struct.pack(">BBH", ord("$"), 0, 12 + len(packet)) + header + packet)
            time.sleep(1 / FPS)


@pytest.fixture
def server():
    with RtspServer() as opened:
        threading.Thread(target=opened.serve_forever, args=(0.02,), daemon=True).start()
        yield opened
        opened.shutdown()


@pytest.mark.parametrize("decoder", ["opencv", "pyav"])
def test_an_rtsp_camera_that_breaks_off_and_comes_back(stub, server, decoder, monkeypatch):
    monkeypatch.setattr(intake, "FIRST_PAUSE", 0.05)
    server.play_for = 60
    url = f"rtsp://user:secret@127.0.0.1:{server.server_address[1]}/live"
    pipeline = VideoPipeline(stub(), [f"cam={url}"], DetectOptions(decoder=decoder, stall=10.0))
    figures = pipeline.figures.sources["cam"]
    timer = threading.Timer(120.0, pipeline.stop)
    timer.start()
    indices = []
    for result in pipeline:
        assert result.frame.shape == (*SIZE, 3)
        indices.append(result.index)
        if figures.reconnects and len(indices) > 60:
            break
    timer.cancel()
    assert server.connections == 2
    assert figures.reconnects == 1
    assert indices == sorted(set(indices))
    assert all("secret" not in line for line in pipeline.summary().warnings)
