"""The paths of an inference server: what each answers, and what it refuses, in one line of JSON."""

from __future__ import annotations

import base64
import http.client
import json
import re
import socket
import struct

import numpy as np
import pytest

from anchorline.runtime.io.errors import SettingsError
from anchorline.serving.inference_server import InferenceServer, parse_models
from anchorline.serving.serve_options import ServeOptions

TOKEN = "correct-horse-7"
INFER = "/v2/models/model/infer"
HEADER = "Inference-Header-Content-Length"
PICTURE = np.full((2, 3, 3), 51, np.uint8)
IMAGE = {"name": "image", "datatype": "UINT8", "shape": [2, 3, 3], "data": PICTURE.ravel().tolist()}
ENCODED = {"name": "encoded", "datatype": "BYTES", "shape": [1]}
SCORES = {"name": "scores"}


@pytest.fixture
def server(serving, scripted):
    with serving(scripted()) as running:
        yield running


def infer(ask, server, request, tail=b"", length=None):
    """Code, the JSON of the answer, and what stands behind it."""
    written = request if isinstance(request, bytes) else json.dumps(request).encode()
    headers = {} if length is None and not tail else {HEADER: str(len(written) if length is None else length)}
    code, found, body = ask(server, INFER, written + tail, headers=headers)
    end = int(found.get(HEADER.lower(), len(body)))
    return code, json.loads(body[:end]), body[end:]


def check_refused(code, answer, expected):
    assert code == expected
    assert list(answer) == ["error"]
    assert answer["error"].isprintable()
    assert 0 < len(answer["error"]) < 2000
    assert "Traceback" not in answer["error"]


@pytest.mark.parametrize(
    "data", [PICTURE.ravel().tolist(), PICTURE.tolist()], ids=["in one row", "as deep as the shape"]
)
def test_pixels_in_json(ask, server, data):
    request = {
        "id": "a",
        "inputs": [{**IMAGE, "data": data}],
        "outputs": [{"name": "scores"}, {"name": "names"}],
    }
    code, answer, tail = infer(ask, server, request)
    assert (code, tail) == (200, b"")
    assert answer == {
        "id": "a",
        "model_name": "model",
        "model_version": "1",
        "outputs": [
            {
                "name": "scores",
                "datatype": "FP32",
                "shape": [2],
                "data": [float(np.float32(0.2)), float(np.float32(0.3))],
            },
            {"name": "names", "datatype": "BYTES", "shape": [2], "data": ["cat", "dog"]},
        ],
    }


def test_bytes_behind_the_json(ask, server):
    tensor = {
        "name": "image",
        "datatype": "UINT8",
        "shape": [2, 3, 3],
        "parameters": {"binary_data_size": 18},
    }
    outputs = [
        {"name": "labels", "parameters": {"binary_data": True}},
        {"name": "names", "parameters": {"binary_data": True}},
    ]
    code, answer, tail = infer(ask, server, {"inputs": [tensor], "outputs": outputs}, PICTURE.tobytes())
    assert code == 200
    assert [each["parameters"]["binary_data_size"] for each in answer["outputs"]] == [16, 14]
    assert struct.unpack("<2q", tail[:16]) == (0, 1)
    assert tail[16:] == b"\x03\0\0\0cat\x03\0\0\0dog"


def test_a_picture_in_json_is_base64(ask, server, png):
    tensor = {
        "name": "encoded",
        "datatype": "BYTES",
        "shape": [1],
        "data": [base64.b64encode(png(51)).decode()],
    }
    code, answer, _ = infer(ask, server, {"inputs": [tensor], "outputs": [{"name": "scores"}]})
    assert code == 200
    assert answer["outputs"][0]["data"][0] == np.float32(0.2)


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        ({"min_score": 0.25}, ["dog"]),
        ({"min_score": "0.25 "}, ["dog"]),
        ({"classes": "cat"}, ["cat"]),
        ({"max_detections": 1}, ["dog"]),
        ({"region": "0,0,0.3,0.3"}, ["dog"]),
        ({"priority": 3, "sequence_id": 4, "timeout": 0, "binary_data_output": False}, ["cat", "dog"]),
    ],
)
def test_parameters(ask, server, parameters, names):
    code, answer, _ = infer(
        ask, server, {"inputs": [IMAGE], "parameters": parameters, "outputs": [{"name": "names"}]}
    )
    assert code == 200
    assert answer["outputs"][0]["data"] == names


BROKEN = {
    "no JSON": b"{",
    "another encoding": b'{"inputs": "\xff"}',
    "deep": b'{"inputs": ' + b"[" * 100_000,
    "no object": [],
    "no inputs": {"inputs": []},
    "inputs that are none": {"inputs": 3},
    "two inputs": {"inputs": [IMAGE, IMAGE]},
    "another input": {"inputs": [{**IMAGE, "name": "images"}]},
    "another type": {"inputs": [{**IMAGE, "datatype": "FP32"}]},
    "a batch": {"inputs": [{**IMAGE, "shape": [1, 2, 3, 3]}]},
    "grey": {"inputs": [{**IMAGE, "shape": [6, 3, 1]}]},
    "no pixels": {"inputs": [{**IMAGE, "shape": [0, 3, 3], "data": []}]},
    "a negative side": {"inputs": [{**IMAGE, "shape": [-2, -3, 3]}]},
    "too few numbers": {"inputs": [{**IMAGE, "data": [1, 2, 3]}]},
    "another shape": {"inputs": [{**IMAGE, "data": [[[1, 2, 3]] * 2] * 3}]},
    "a level beyond": {"inputs": [{**IMAGE, "data": [256] * 18}]},
    "a fraction": {"inputs": [{**IMAGE, "data": [0.5] * 18}]},
    "ragged": {"inputs": [{**IMAGE, "data": [[[1, 2, 3]], [[1, 2]]]}]},
    "no data": {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [2, 3, 3]}]},
    "a number as data": {"inputs": [{**IMAGE, "data": 3}]},
    "shared memory": {"inputs": [{**IMAGE, "parameters": {"shared_memory_region": "a"}}]},
    "bytes that are not there": {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [2, 3, 3],
                                             "parameters": {"binary_data_size": 18}}]},
    "a size that is none": {"inputs": [{**IMAGE, "parameters": {"binary_data_size": -1}}]},
    "a huge size": {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [2, 3, 3],
                                "parameters": {"binary_data_size": 10**30}}]},
    "no base64": {"inputs": [{**ENCODED, "data": ["$"]}]},
    "base64 of no picture": {"inputs": [{**ENCODED, "data": ["aaaa"]}]},
    "two pictures": {"inputs": [{**ENCODED, "shape": [2], "data": ["aaaa", "aaaa"]}]},
    "another output": {"inputs": [IMAGE], "outputs": [{"name": "masks"}]},
    "an output twice": {"inputs": [IMAGE], "outputs": [{"name": "boxes"}, {"name": "boxes"}]},
    "a classification": {"inputs": [IMAGE], "outputs": [{**SCORES, "parameters": {"classification": 2}}]},
    "a flag that is none": {"inputs": [IMAGE], "outputs": [{**SCORES, "parameters": {"binary_data": "yes"}}]},
    "a parameter that is not known": {"inputs": [IMAGE], "parameters": {"minscore": 0.5}},
    "no score": {"inputs": [IMAGE], "parameters": {"min_score": 2}},
    "a list as parameter": {"inputs": [IMAGE], "parameters": {"classes": ["cat"]}},
    "no class of the model": {"inputs": [IMAGE], "parameters": {"classes": "cow"}},
    "no number of detections": {"inputs": [IMAGE], "parameters": {"max_detections": 0}},
    "a million sides": {"inputs": [{**IMAGE, "shape": [2**31] * 10**6}]},
    "a million sides of a picture": {"inputs": [{**ENCODED, "shape": [2**31] * 10**6, "data": ["aaaa"]}]},
    "many inputs": {"inputs": [{**IMAGE, "data": []}] * 10**4},
    "many outputs": {"inputs": [IMAGE], "outputs": [SCORES] * 10**4},
    "a long parameter": {"inputs": [IMAGE], "parameters": {"region": "0,0," * 10**5 + "1,1"}},
    "a long number of detections": {"inputs": [IMAGE], "parameters": {"max_detections": 10**40}},
    "no timeout": {"inputs": [IMAGE], "parameters": {"timeout": -1}},
    "no id": {"inputs": [IMAGE], "id": 3},
}  # fmt: skip


@pytest.mark.parametrize("request_", BROKEN.values(), ids=BROKEN)
def test_what_is_no_request_of_the_protocol(ask, server, request_):
    code, answer, _ = infer(ask, server, request_)
    check_refused(code, answer, 400)
    assert infer(ask, server, {"inputs": [IMAGE]})[0] == 200


@pytest.mark.parametrize("length", ["-1", "x", "1e3", "99999", "٣", "10"])
def test_a_header_length_that_is_none(ask, server, length):
    headers = {HEADER: length.encode("utf-8").decode("latin-1")}
    code, _, body = ask(server, INFER, json.dumps({"inputs": [IMAGE]}).encode(), headers=headers)
    check_refused(code, json.loads(body), 400)


@pytest.mark.parametrize(
    ("path", "body", "headers", "code"),
    [
        ("/detect", b"", {}, 400),
        ("/detect", b"GIF89a", {}, 400),
        ("/detect", b"\xff\xd8\xff", {}, 400),
        ("/detect", b"\x89PNG\r\n\x1a\n" + b"\0" * 100, {}, 400),
        ("/detect?min_score=x", b"picture", {}, 400),
        ("/detect?minscore=0.5", b"picture", {}, 400),
        ("/detect?classes=cow", b"picture", {}, 400),
        ("/detect?region=1", b"picture", {}, 400),
        ("/detect?max_detections=1.5", b"picture", {}, 400),
        ("/detect?timeout=soon", b"picture", {}, 400),
        ("/detect?timeout=nan", b"picture", {}, 400),
        ("/detect?timeout=0", b"picture", {}, 400),
        ("/detect?source=" + "a" * 2000, b"picture", {}, 400),
        ("/detect?model=other", b"picture", {}, 404),
        ("/detect/other", b"picture", {}, 404),
        ("/detect/model/1", b"picture", {}, 404),
        ("/v2/models/other/infer", b"{}", {}, 404),
        ("/v2/models/model/versions/2/infer", b"{}", {}, 404),
        ("/v2/models/model/versions/%FF/infer", b"{}", {}, 404),
        ("/detect", b"picture", {"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ("/detect", b"picture", {"Content-Encoding": "gzip"}, 415),
        ("/detect", b"picture", {"Origin": "http://elsewhere.example"}, 403),
        ("/detect", b"picture", {"Sec-Fetch-Site": "cross-site"}, 403),
        ("/detect", b"picture", {"Host": "elsewhere.example"}, 421),
        ("/detect", None, {}, 405),
        ("/v2/models/model", b"{}", {}, 405),
        ("/nothing", None, {}, 404),
        ("/v2/models/other", None, {}, 404),
        ("/v2/models/other/ready", None, {}, 404),
        ("/v2/models/model/versions/2/ready", None, {}, 404),
        ("/v2/models/model/config", None, {}, 404),
    ],
)  # fmt: skip
def test_what_is_refused(ask, server, png, path, body, headers, code):
    body = png(51) if body == b"picture" else body
    found, _, answer = ask(server, path, body, headers=headers)
    check_refused(found, json.loads(answer), code)


def test_a_body_that_is_too_large_is_413_whether_its_length_is_stated_or_not(ask, serving, scripted):
    with serving(scripted(), max_body=1, memory=1) as server:
        code, _, answer = ask(server, "/detect", b"a" * (1 << 21))
        check_refused(code, json.loads(answer), 413)
        code, _, answer = ask(server, "/detect", (b"a" * 65536 for _ in range(32)))
        check_refused(code, json.loads(answer), 413)
        assert ask(server, "/v2/health/ready")[0] == 200


def test_a_body_that_does_not_come_is_408(serving, scripted):
    with (
        serving(scripted(), body_seconds=0.2) as server,
        socket.create_connection(("127.0.0.1", server.address.port)) as slow,
    ):
        slow.sendall(b"POST /detect HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc")
        answer = http.client.HTTPResponse(slow, method="POST")
        answer.begin()
        check_refused(answer.status, json.loads(answer.read()), 408)


def test_what_all_requests_hold_is_bounded(serving, scripted, ask, png, until):
    """One that is larger than all of the room passes alone: its decoded frame has 3 MB."""
    with serving(scripted(), max_body=1, memory=1) as server:
        assert ask(server, "/detect", png(51, 1000, 1000))[0] == 200
        with socket.create_connection(("127.0.0.1", server.address.port)) as slow:
            slow.sendall(b"POST /detect HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500000\r\n\r\nabc")
            pages = server._server.config.app._app
            until(lambda: pages._room.held)
            code, headers, answer = ask(server, "/detect", png(51, 1000, 1000))
            check_refused(code, json.loads(answer), 503)
            assert headers["retry-after"] == "1"
            assert ask(server, "/detect", png(51))[0] == 200
        until(lambda: not pages._room.held)


def test_a_picture_of_more_pixels_than_are_read_is_refused_before_it_is_decoded(
    ask, server, png, monkeypatch
):
    monkeypatch.setenv("ANCHORLINE_MAX_PIXELS", "1000")
    code, _, answer = ask(server, "/detect", png(51, 40, 40))
    check_refused(code, json.loads(answer), 400)
    assert "more than the 1000 pixels" in json.loads(answer)["error"]
    assert infer(ask, server, {"inputs": [{**IMAGE, "shape": [40, 40, 3], "data": [0] * 4800}]})[0] == 400


def test_a_token_is_asked_for_by_everything_but_the_probes(serving, scripted, ask, png):
    with serving(scripted(), token=TOKEN) as server:
        for path, body in (
            ("/detect", png(1)),
            (INFER, b"{}"),
            ("/metrics", None),
            ("/docs", None),
            ("/v2", None),
        ):
            code, headers, answer = ask(server, path, body)
            check_refused(code, json.loads(answer), 401)
            assert headers["www-authenticate"] == "Bearer"
            assert TOKEN not in str(headers) + answer.decode()
        for path in ("/v2/health/live", "/v2/health/ready", "/healthz"):
            assert ask(server, path)[0] == 200
        assert ask(server, "/detect", png(1), headers={"Authorization": f"Bearer {TOKEN}"})[0] == 200


def test_several_models(serving, scripted, ask, png):
    with serving({"street": scripted(), "night": scripted()}) as server:
        code, _, answer = ask(server, "/detect", png(51))
        check_refused(code, json.loads(answer), 400)
        assert "street, night" in json.loads(answer)["error"]
        for path in ("/detect/night", "/detect?model=night"):
            assert ask(server, path, png(51))[0] == 200
        figures = {name: model.answers.counts["detect", 200] for name, model in server.models.items()}
        assert figures == {"street": 0, "night": 2}
        found = json.loads(ask(server, "/v2/repository/index", b"")[2])
        assert [(each["name"], each["state"]) for each in found] == [("street", "READY"), ("night", "READY")]


def test_the_metrics_count_what_happened(ask, server, png):
    for _ in range(3):
        ask(server, "/detect", png(51))
    ask(server, "/detect", b"nonsense")
    code, headers, body = ask(server, "/metrics")
    assert (code, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    from prometheus_client.parser import text_string_to_metric_families

    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }
    model = ("model", "model")
    assert samples["anchorline_requests_total", ("code", "200"), model, ("path", "detect")] == 3
    assert samples["anchorline_requests_total", ("code", "400"), model, ("path", "detect")] == 1
    assert samples["anchorline_batch_frames_sum", model] == 3
    assert samples["anchorline_request_seconds_count", model] == 3
    assert samples["anchorline_queue_seconds_count", model] == 3
    assert samples["anchorline_requests_in_hand", model] == 0
    assert samples["anchorline_held_bytes",] == 0
    assert samples["anchorline_stage_seconds_count", model, ("stage", "network")] == 3


def test_the_description_names_every_path_and_no_other(ask, server):
    described = json.loads(ask(server, "/openapi.json")[2])
    pages = server._server.config.app._app
    served = {route.path: route.methods - {"HEAD"} for route in pages._router.routes}
    assert {path: {each.upper() for each in methods} for path, methods in described["paths"].items()} == {
        path: methods for path, methods in served.items() if path not in ("/", "/v2/")
    }
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(described)):
        place = described
        for part in reference.split("/"):
            place = place[part]
    code, headers, page = ask(server, "/docs")
    assert code == 200
    assert all(path.encode() in page for path in described["paths"])
    assert page == ask(server, "/")[2]
    assert not re.findall(rb'(?:src|href)="(?:https?:)?//', page)  # nothing of another server
    assert "default-src 'none'" in headers["content-security-policy"]


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (["a/street.onnx", "night=b/other.onnx"], {"street": "a/street.onnx", "night": "b/other.onnx"}),
        (["model.int8.onnx"], {"model.int8": "model.int8.onnx"}),
        (["a/b=c.onnx"], {"b=c": "a/b=c.onnx"}),
    ],
)
def test_names_of_models(texts, found):
    assert parse_models(texts) == found


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: parse_models(["a/m.onnx", "b/m.onnx"]), "two models are called 'm'"),
        (lambda: InferenceServer({}), "no model to serve"),
        (lambda: InferenceServer({"a b": "x.onnx"}), "the model's name is 'a b'"),
        (lambda: InferenceServer({"a": "x.onnx"}, token="short"), "expected at least 8"),
        (lambda: ServeOptions(max_body=10, memory=5), "max_body is 10 MiB"),
        (lambda: ServeOptions(batch=0), "batch is 0"),
        (lambda: ServeOptions(deadline=float("nan")), "deadline is nan"),
    ],
)
def test_mistakes_of_who_starts_it(make, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        make()
