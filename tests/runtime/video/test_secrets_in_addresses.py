"""What lets anybody in to a camera is shown nowhere: marked passwords and tokens through every output."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorline import cli
from anchorline.runtime.io.addresses import hidden_parts, shown_address, without_secrets
from anchorline.runtime.io.errors import AnchorlineError, DataError, SettingsError
from anchorline.runtime.io.native_log import without_secrets_on_stderr
from anchorline.runtime.video import intake
from anchorline.runtime.video.options import DetectOptions
from anchorline.runtime.video.pipeline import VideoPipeline
from anchorline.runtime.video.reader import AvReader, StreamReader, VideoReader
from anchorline.runtime.video.source import Source, parse_source, plan

SECRET = "hunter2ZQ"
SHOWN = [
    (f"rtsp://{SECRET}:{SECRET}@host:554/x/101", "rtsp://host:554/x/101"),
    (f"rtsp://user:a@{SECRET}@host/x", "rtsp://host/x"),
    (f"rtsp://{SECRET}@host/x", "rtsp://host/x"),
    (f"rtsp://user:[{SECRET}]@[fe80::1%eth0]:554/x", "rtsp://[fe80::1%eth0]:554/x"),
    (f"rtsp://user:a\\{SECRET}@host/x", "rtsp://host/x"),
    (f"http://host/x?token={SECRET}", "http://host/x?..."),
    (f"http://host?user=a&pwd={SECRET}", "http://host?..."),
    (f"http://host/x.mp4#{SECRET}", "http://host/x.mp4#..."),
    (f"srt://host:9000?passphrase={SECRET}&mode=caller", "srt://host:9000?..."),
    (f"rtsp://host/user=admin&password={SECRET}&channel=1", "rtsp://host/..."),
    (f"rtsp://host/user=admin_password={SECRET}_channel=1.sdp?real_stream", "rtsp://host/...?..."),
    (f"rtsp://host/user%3Dadmin%26password%3D{SECRET}/live", "rtsp://host/..."),
    (f"rtsp://host/password%253D{SECRET}", "rtsp://host/..."),
    (f"http://host/a;session={SECRET}/b", "http://host/..."),
    (f"http://host/hls/token/{SECRET}/live.m3u8", "http://host/hls/token/..."),
    (f"rtsp://host/user=admin&password=a/{SECRET}/live", "rtsp://host/..."),
    (f"http://host/admin:{SECRET}/live", "http://host/..."),
    (f"http://host/session/{SECRET}/x", "http://host/session/..."),
    (f"http://host/live/jwt/{SECRET}", "http://host/live/jwt/..."),
    (f"rtsp://host/admin/{SECRET}/ch1", "rtsp://host/admin/..."),
    (f"rtsp://host/pwd_{SECRET}_ch1", "rtsp://host/..."),
    ("rtsp://host:7447/s6z0PeEHrJ8vAGyA", "rtsp://host:7447/..."),
    ("rtmp://host/live2/abcd-efgh-ijkl-mnop", "rtmp://host/live2/..."),
    ("rtsp://host/3fa85f64-5717-4562-b3fc-2c963f66afa6/1", "rtsp://host/..."),
    (f"rtmp://host/app/x pubUser=a pubPasswd={SECRET}", "rtmp://host/app/..."),
    # Where a user or password holds / ? or #, nobody can tell where it ends.
    (f"rtsp://user:a/{SECRET}@host/x", "rtsp://..."),
    (f"rtsp://{SECRET}/b@host/x", "rtsp://..."),
    (f"rtsp://user:1/{SECRET}@host/x", "rtsp://..."),
    (f"rtsp://user:a?{SECRET}@host/x", "rtsp://..."),
    (f"rtsp://{SECRET}#b@host/x", "rtsp://..."),
    (f"rtsp://user=admin&password={SECRET}/x", "rtsp://..."),
    (f"rtsp://host:{SECRET}/x", "rtsp://..."),
    # Mistakes and pipelines.
    (f"1cam=rtsp://user:{SECRET}@host/x", "1cam=rtsp://host/x"),
    (f"cam 1=http://host/x?{SECRET}", "cam 1=http://host/x?..."),
    (f"rtsp:/user:{SECRET}@host/x", "..."),
    (f"rtsp:\\\\user:{SECRET}@host\\x", "..."),
    (f"user:{SECRET}@host/x", "..."),
    (f"{SECRET}@host/x", "..."),
    (f"host/x?token={SECRET}", "..."),
    (f"host/password={SECRET}", "..."),
    (f"async:http://user:{SECRET}@host/x", "..."),
    (f"rtspsrc location=rtsp://host/x user-id=a user-pw={SECRET} ! decodebin", "rtspsrc location=rtsp://host/..."),
    (f"rtspsrc user-pw={SECRET} location=rtsp://host/x ! decodebin", "..."),
]  # fmt: skip
PLAIN = [
    "rtsp://host/Streaming/Channels/102", "rtsp://host:554/h264Preview_01_main", "udp://239.0.0.1:1234",
    "http://host:80/recording20240101120000.mp4", "file:///srv/a b/clip.mp4", "rtsp://[::1]:554/live",
    "clip.mp4", "runs/lr=0.1/a.mp4", "a@2x.png", "rec 12:30:00.mp4", "C:\\films\\clip.mp4", "tür 1.mp4", "",
]  # fmt: skip


@pytest.mark.parametrize(("address", "shown"), SHOWN)
def test_what_may_be_shown(address, shown):
    assert shown_address(address) == shown
    if "://" in address:
        line = f'[hls @ 0x1] cannot open "{address}": 404'
        assert SECRET not in without_secrets(line, [address])
        if " " not in address:
            assert SECRET not in without_secrets(line)
            assert without_secrets(line).endswith('": 404')
            assert without_secrets(without_secrets(line)) == without_secrets(line)


@pytest.mark.parametrize("address", PLAIN)
def test_what_says_no_more_than_where(address):
    assert shown_address(address) == address
    assert without_secrets(f"'{address}': no such file") == f"'{address}': no such file"


@pytest.mark.parametrize(
    "text",
    [
        "http://host/x?... and http://... and http://host/...",
        "voc:/data/x@train: holds nothing; expected yolo:DIR@split",
        "expected NAME=SCHEME://HOST:PORT/PATH, or http://host:8080/.",
        "see (http://host/a, rtsp://host/b).",
    ],
)
def test_other_texts_stay_as_they_are(text):
    assert without_secrets(text) == text


ANYTHING = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
MARKED = st.tuples(ANYTHING, ANYTHING).map(SECRET.join)


@settings(max_examples=30, deadline=None)
@given(MARKED, MARKED, ANYTHING)
def test_no_character_gives_a_password_away(user, password, path):
    """Nor in the errors of a source that cannot be."""
    for address in (
        f"rtsp://{user}:{password}@host/x",
        f"rtsp://u:{quote(password, safe='')}@host:554/{quote(path)}",
        f"http://host/x?{user}={password}",
        f"http://host/user={user}&password={password}",
    ):
        assert SECRET not in shown_address(address)
        assert SECRET not in without_secrets(f"{address}: 404", [address])
        for text in (address, f"cam={address}", f"1cam={address}", address.replace("//", "/", 1)):
            assert SECRET not in _all_that_is_told_of(text)


def _all_that_is_told_of(text):
    try:
        (source,) = plan([text])
    except AnchorlineError as error:
        return str(error)
    return source.name + source.describe() + repr(source)


@pytest.mark.parametrize("address", [address for address, _ in SHOWN if address.startswith("rtsp://user:")])
def test_hidden_parts_in_all_spellings(address):
    parts = hidden_parts(address)
    for spelled in (address, address[7:], SECRET, f"tcp://{SECRET}", quote(SECRET), quote(address)):
        for part in parts:
            spelled = spelled.replace(part, "")
        assert SECRET not in spelled


def test_a_password_with_a_slash_is_told_of():
    with pytest.raises(SettingsError, match=r"^door \(rtsp://\.\.\.\): no address; .*%2F for /") as caught:
        parse_source(f"door=rtsp://user:a/{SECRET}@host/x")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("address", [f"rtsp://u:{SECRET}@host/x", f"http://host/{'x' * 99}?{SECRET}"])
def test_a_mistake_in_python_quotes_no_secret(stub, address):
    for sources in (address, Source(address), [address.encode()]):
        with pytest.raises(SettingsError, match="//host/") as caught:
            VideoPipeline(stub(), sources)
        assert SECRET not in str(caught.value)


def test_sources_of_which_nothing_differs_but_the_secret():
    sources = [f"rtsp://user:{SECRET}{number}@host/x" for number in range(3)]
    sources += [f"http://host/x?token={SECRET}{number}" for number in range(2)]
    planned = plan([*sources, f"rtsp://{SECRET}/x@host/y"], "out")
    assert [each.name for each in planned] == ["host", "host-2", "host-3", "host-4", "host-5", "stream"]
    assert len({each.describe() for each in planned}) == len({each.target for each in planned}) == 6
    assert SECRET not in repr(planned) + str([each.target for each in planned])
    for place, text in ((1, "user:a@host/x"), (2, "host/x?token=b")):
        with pytest.raises(
            DataError, match=rf"^source {place} \(\.\.\.\): neither a file or folder .* nor an address"
        ):
            plan([sources[0]] * (place - 1) + [text])


@pytest.mark.parametrize(
    "words",
    [
        [f"rtsp://u:{SECRET}@host/x"],
        [f"rtsp://u:my {SECRET}@host/x"],
        ["detect", f"1cam=rtsp://u:{SECRET}@host/x", "--model", "m.onnx"],
        ["detect", f"rtspsrc location=rtsp://host/x user-pw={SECRET} ! decodebin", "--model", "m.onnx"],
        ["detect", f"cam=rtsp://u:a/{SECRET}@host/x", "--model", "m.onnx"],
        ["detect", f"rtsp://u:{SECRET}@host/x", "--model", "m.onnx", "--ray", "local"],
        ["detect", f"rtsp://u:{SECRET}@host/x", "--model", f"http://u:{SECRET}@host/m.onnx"],
        ["detect", f"rtsp://u:{SECRET}@host/x", "--model", f"http://u:my {SECRET}@host/m.onnx"],
        ["detect", "0", "--model", "m.onnx", "--stride", f"rtsp://u:{SECRET}@host/x"],
        ["detect", "0", "--model", "m.onnx", "--serve", f"http://u:my {SECRET}@host/x"],
        ["evaluate", "m.onnx", f"rtsp://u:{SECRET}@host/x"],
        ["evaluate", f"http://host/m.onnx?token={SECRET}", "--data", "synthetic:2"],
        ["bench", "m.onnx", "--images", f"http://host/clip.mp4?token={SECRET}"],
    ],
)
def test_mistakes_on_the_command_line(words, capfd, tmp_path, monkeypatch, model_path):
    monkeypatch.chdir(tmp_path)
    words = [str(model_path) if word == "m.onnx" and "--stride" not in words else word for word in words]
    assert cli.main(words) == 2
    out, error = capfd.readouterr()
    assert SECRET not in out + error
    assert error.startswith("anchorline: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("kind", [VideoReader, AvReader])
def test_a_reader_without_a_name(kind):
    for where in (f"http://u:{SECRET}@127.0.0.1:1/x.mp4", f"http://127.0.0.1:1/x.mp4?token={SECRET}"):
        with pytest.raises(DataError) as caught:
            kind(where)
        assert SECRET not in str(caught.value)


class Refusing(BaseHTTPRequestHandler):
    """A playlist whose segments are not there, pages that want a password, a way to somewhere else."""

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        kind = self.path.partition("?")[0]
        body = b""
        if kind == "/live.m3u8":
            body = (
                f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\na.ts?sig={SECRET}\n#EXT-X-ENDLIST\n".encode()
            )
        elif kind == "/odd.m3u8":
            body = (
                f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\na.txt?sig={SECRET}\n#EXT-X-ENDLIST\n".encode()
            )
        self.send_response(200 if body else {"/401": 401, "/moved": 302}.get(kind, 404))
        if kind == "/moved":
            self.send_header("Location", f"http://u:{SECRET}@127.0.0.1:{self.server.server_port}/live.m3u8")
        if kind == "/401":
            self.send_header("WWW-Authenticate", 'Basic realm="x"')
        if body:
            self.send_header("Content-Type", "application/vnd.apple.mpegurl")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def refusing():
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"u:{SECRET}@127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("decoder", ["opencv", "pyav"])
def test_cameras_that_refuse(stub, refusing, decoder, tmp_path, capfd, caplog, monkeypatch):
    """What FFmpeg says of them on stderr included."""
    monkeypatch.setattr(intake, "FIRST_PAUSE", 0.05)
    paths = ("live.m3u8", "odd.m3u8", "401", "moved", "404", f"user=a&password={SECRET}")
    sources = [f"http://{refusing}/{path}?token={SECRET}" for path in paths]
    options = DetectOptions(decoder=decoder, patience=0.1, stall=5.0, jsonl=tmp_path / "a.jsonl")
    pipeline = VideoPipeline(stub(), sources, options)
    with caplog.at_level(logging.DEBUG), pytest.raises(DataError) as caught:
        pipeline.run()
    told = json.dumps(pipeline.summary().to_json())
    shown = "".join(capfd.readouterr())
    for text in (str(caught.value), told, shown, caplog.text, repr(pipeline.sources), repr(options)):
        assert SECRET not in text
    assert "127.0.0.1-6 (http://127.0.0.1" in told
    if decoder == "opencv":
        assert "[hls @ 0x" in shown
        assert "'http://127.0.0.1:" in shown


def test_stderr_is_handed_on(capfd):
    """All that others print there, at once, and none of the secrets, in whatever pieces it comes."""
    before = os.fstat(2)
    with without_secrets_on_stderr(f"rtsp://user:{SECRET}@host/x"):
        with without_secrets_on_stderr(f"rtsp://u:{SECRET}2@host/x"):
            os.write(2, b"half a line, ")
            _wait_for(capfd, "half a line, ")
            for piece in ("[rtsp @ 0x1] ", "rtsp://user:hun", f"ter2ZQ@host/x?{SECRET}: 401\n"):
                os.write(2, piece.encode())
            print("user of Python, http://other/?page=2, ", end="", file=sys.__stderr__, flush=True)
            os.write(2, f"rtsp://user:{SECRET}@host/x\r".encode())
        os.write(2, f"[tcp @ 0x2] cannot resolve {SECRET}2, {SECRET}\n\xff".encode("latin-1"))
    os.write(2, b"after\n")
    after, shown = os.fstat(2), capfd.readouterr().err
    assert (before.st_dev, before.st_ino) == (after.st_dev, after.st_ino)
    assert shown == (
        "[rtsp @ 0x1] rtsp://host/x?...: 401\nuser of Python, http://other/?page=2, rtsp://host/x\r"
        "[tcp @ 0x2] cannot resolve ..., ...\n\ufffdafter\n"
    )


def _wait_for(capfd, text, found=""):
    end = time.monotonic() + 60.0
    while text not in found:
        assert time.monotonic() < end
        found += capfd.readouterr().err
    return found


def test_the_last_lines_of_a_process_are_shown_although_a_camera_hangs():
    program = (
        "import sys, threading\n"
        "from anchorline.runtime.io.native_log import without_secrets_on_stderr\n"
        "def hang():\n"
        f"    with without_secrets_on_stderr('rtsp://u:{SECRET}@host/x'):\n"
        "        begun.set(); threading.Event().wait()\n"
        "begun = threading.Event()\n"
        "threading.Thread(target=hang, daemon=True).start()\n"
        "begun.wait(); sys.exit('the last line')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "the last line\n")


def test_files_are_read_on_while_a_camera_s_stderr_is_watched(
    stub, refusing, video_frames, write_raw_video, tmp_path
):
    """Whose damage is told of on stderr as well."""
    video = write_raw_video(tmp_path / "a.mp4", video_frames)
    content = bytearray(video.read_bytes())
    place = content.index(b"mdat") + len(content) // 3
    content[place : place + 60] = bytes(60)
    video.write_bytes(content)

    def warnings():
        with VideoReader(video) as reader:
            list(reader)
            return reader.warnings

    alone = warnings()
    assert alone
    with without_secrets_on_stderr(f"http://{refusing}/401"):
        assert warnings() == alone


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_every_output_of_a_run(camera, refusing, model_path, tmp_path, until, capfd, caplog, monkeypatch):
    """Two cameras that differ in their passwords alone, and one that refuses, watched in a browser."""
    pytest.importorskip("uvicorn")
    monkeypatch.setattr(intake, "FIRST_PAUSE", 0.05)
    sources = [f"http://u:{SECRET}{n}@127.0.0.1:{camera.port}/live?token={SECRET}" for n in (1, 2)]
    sources += [f"door=http://{refusing}/live.m3u8?token={SECRET}"]
    out = tmp_path / "out"
    options = ["--serve", "0", "--jsonl", out / "a.jsonl", "--json", out / "a.json", "--save", out]
    shown, served = "", ""
    is_running = threading.Event()
    is_running.set()

    def look() -> None:
        nonlocal shown, served
        shown = _wait_for(capfd, "http://127.0.0.1:")
        url = re.search(r"http://127\.0\.0\.1:\d+/", shown).group()

        def status():
            with urlopen(url + "status") as answer:
                return json.load(answer)["sources"]

        until(lambda: sum(each["frames"] >= 3 for each in status()) == 2)
        camera.mode = "die"
        until(lambda: any(each["reconnects"] for each in status()))
        for path in ("", "status", "metrics"):
            with urlopen(url + path) as answer:
                served += answer.read().decode()

    def look_and_end() -> None:
        try:
            look()
        finally:
            if is_running.is_set():
                os.kill(os.getpid(), signal.SIGINT)

    looking = threading.Thread(target=look_and_end)
    looking.start()
    try:
        code = cli.main(["detect", *map(str, [*sources, "--model", model_path, *options])])
    finally:
        is_running.clear()
        looking.join()
    shown += "".join(capfd.readouterr())
    assert code == 130
    assert SECRET not in shown + served + caplog.text
    assert 'source="127.0.0.1-2"' in served
    assert "127.0.0.1: broke off" in shown or "127.0.0.1-2: broke off" in shown
    assert "[hls @ 0x" in shown
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {"a.json", "a.jsonl", "127.0.0.1.mp4", "127.0.0.1-2.mp4"} <= set(written)
    assert SECRET not in " ".join(written)
    for content in written.values():
        assert SECRET.encode() not in content
    summary = json.loads(written["a.json"])
    assert set(summary["sources"]) == {"127.0.0.1", "127.0.0.1-2", "door"}
    named = {json.loads(line)["source"] for line in written["a.jsonl"].splitlines()}
    assert named == {"127.0.0.1", "127.0.0.1-2"}


def test_a_path_may_be_a_source_of_a_name():
    assert repr(Source(Path("a.mp4"))) == "Source('a.mp4', live=False, policy='wait', stride=1)"
    assert repr(Source(3, stride=2)) == "Source(3, live=True, policy='latest', stride=2)"
    assert repr(Source(iter(()), name="mine")).startswith("Source('mine', ")
    assert repr(Source([])).startswith("Source('list', ")
    assert StreamReader.close is not AvReader.close
