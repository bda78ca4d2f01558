"""The protocol's bodies against Triton's own client, and against bytes that nobody meant."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import DataError, SettingsError
from anchorline.serving.inference_protocol import InferRequest, read_request, write_answer

triton = pytest.importorskip("tritonclient.http", reason="the extra dev brings Triton's client")
OUTPUTS = ("boxes", "scores", "labels", "names")
NAMES = ("cat", "größer", "a\u200bb")

sides = st.integers(1, 9)
wanted = st.none() | st.lists(
    st.tuples(st.sampled_from(OUTPUTS), st.booleans()), min_size=1, max_size=4, unique_by=lambda each: each[0]
)


def written_by_client(tensor, outputs=None, **options):
    asked = outputs and [triton.InferRequestedOutput(name, binary_data=binary) for name, binary in outputs]
    return triton.InferenceServerClient.generate_request_body([tensor], outputs=asked, **options)


@given(sides, sides, st.integers(0, 2**32 - 1), st.booleans(), wanted)
def test_what_the_client_writes_is_read(height, width, seed, binary, outputs):
    frame = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    tensor = triton.InferInput("image", [height, width, 3], "UINT8").set_data_from_numpy(frame, binary)
    found = read_request(*written_by_client(tensor, outputs, request_id="a", timeout=1_500_000))
    assert isinstance(found.frame, np.ndarray)
    assert np.array_equal(found.frame, frame)
    assert (found.id, found.timeout) == ("a", 1.5)
    assert list(found.outputs) == (outputs or [(name, True) for name in OUTPUTS])


@given(st.binary(max_size=50), st.binary(max_size=5))
def test_encoded_bytes_are_read_whole_or_refused(content, more):
    tensor = triton.InferInput("encoded", [1], "BYTES").set_data_from_numpy(np.array([content], object))
    body, length = written_by_client(tensor)
    assert read_request(body, length).frame == content
    if more:
        with pytest.raises(DataError):
            read_request(body + more, length)


@given(st.integers(0, 5), st.integers(0, 2**32 - 1), wanted)
def test_what_is_written_the_client_reads(count, seed, outputs):
    random = np.random.default_rng(seed)
    corners = random.random((count, 2, 2), np.float32).cumsum(axis=1) * 500
    found = Detections(
        corners.reshape(-1, 4),
        random.random(count, np.float32),
        random.integers(0, 3, count),
        class_names=NAMES,
    )
    asked = read_request(*written_by_client(an_image(), outputs))
    body, length = write_answer(found, "m", asked)
    answer = triton.InferenceServerClient.parse_response_body(body, header_length=length)
    for name, binary in asked.outputs:
        read = answer.as_numpy(name)
        if name == "names":
            assert [each.decode() if binary else each for each in read.tolist()] == found.names
        else:
            assert read.shape == getattr(found, name).shape
            assert np.array_equal(read, getattr(found, name))


def an_image():
    frame = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    return triton.InferInput("image", [2, 3, 3], "UINT8").set_data_from_numpy(frame)


@given(st.data())
def test_a_body_that_was_changed_is_read_or_refused(data):
    """And nothing else: no other error reaches the server."""
    body, length = written_by_client(an_image(), [("boxes", True)], parameters={"min_score": 0.5})
    changed = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(changed) - 1))
        changed[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    check_read_or_refused(bytes(changed), data.draw(st.sampled_from([None, length, 0, len(changed), 10**9])))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
FIELDS = ("name", "shape", "datatype", "data", "parameters")


@given(st.data())
def test_any_json_is_read_or_refused(data):
    tensor = {"name": "image", "shape": [1, 1, 3], "datatype": "UINT8", "data": [1, 2, 3]}
    request: dict[str, object] = {"inputs": [tensor]}
    for name in data.draw(st.lists(st.sampled_from(FIELDS), max_size=2)):
        tensor[name] = data.draw(json_values)
    for name in data.draw(st.lists(st.sampled_from(("id", "parameters", "outputs", "inputs")), max_size=1)):
        request[name] = data.draw(json_values)
    check_read_or_refused(json.dumps(request).encode(), None)


def check_read_or_refused(body, length):
    try:
        found = read_request(body, length)
    except (DataError, SettingsError) as error:
        found = str(error)
    assert isinstance(found, InferRequest) or ("\n" not in found and len(found) < 1000)
