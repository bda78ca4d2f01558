"""Reading ``.caffemodel`` files whose bytes are put together here, without the protobuf library."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anchorline.export.importers.caffemodel import read_caffemodel
from anchorline.runtime.io.errors import ArtefactError

VARINT, DOUBLE, LENGTHS, FLOAT = 0, 1, 2, 5


def varint(value: int) -> bytes:
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes(digits) + bytes([value])


def field(number: int, content: bytes | int) -> bytes:
    if isinstance(content, int):
        return varint(number << 3 | VARINT) + varint(content)
    return varint(number << 3 | LENGTHS) + varint(len(content)) + content


def blob(values: list[float], *shape: int, form: str = "f", extra: bytes = b"") -> bytes:
    data = struct.pack(f"<{len(values)}{form}", *values)
    return field(7, field(1, b"".join(map(varint, shape)))) + field({"f": 5, "d": 8}[form], data) + extra


def layer(name: str, *blobs: bytes, extra: bytes = b"") -> bytes:
    return field(100, field(1, name.encode()) + extra + b"".join(field(7, each) for each in blobs))


CONV = layer("conv1", blob([1, 2, 3, 4, 5, 6], 3, 2, 1, 1), blob([0.5, -1, 7], 3))


@pytest.fixture
def read(tmp_path: Path):
    def read(content: bytes) -> dict[str, torch.Tensor]:
        path = tmp_path / "net.caffemodel"
        path.write_bytes(content)
        return read_caffemodel(path)

    return read


def assert_one_line(message: str) -> None:
    assert message.isprintable()
    assert len(message) < 400


@pytest.fixture
def refusal(read):
    def refusal(content: bytes) -> str:
        with pytest.raises(ArtefactError) as caught:
            read(content)
        message = str(caught.value)
        assert_one_line(message)
        assert "net.caffemodel" in message
        return message

    return refusal


def test_weights_and_biases_by_layer(read) -> None:
    """With what caffe writes around them: names, types, bottoms, layers without weights, parameters."""
    relu = layer("relu1", extra=field(2, b"ReLU") + field(3, b"conv1") + field(4, b"conv1"))
    conv = layer(
        "rpn_conv/3x3",
        blob([9, 8], 1, 2),
        extra=field(2, b"Convolution") + field(106, field(1, 512) + field(3, 1)) + field(10, 0),
    )
    found = read(field(1, b"VGG_ILSVRC_16_layers") + CONV + relu + conv + field(6, field(1, 1)))
    assert list(found) == ["conv1.weight", "conv1.bias", "rpn_conv/3x3.weight"]
    assert found["conv1.weight"].tolist() == [[[[1]], [[2]]], [[[3]], [[4]]], [[[5]], [[6]]]]
    assert found["conv1.bias"].tolist() == [0.5, -1, 7]
    assert found["rpn_conv/3x3.weight"].tolist() == [[9, 8]]
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    found["conv1.bias"].zero_()  # it is memory of its own


def test_the_old_form_of_layers_and_shapes(read) -> None:
    """V1LayerParameter: name 4, type 5, blobs 6; BlobProto with num, channels, height and width."""
    sides = [field(number, side) for number, side in ((1, 1), (2, 1), (3, 2), (4, 3))]
    old = b"".join(sides) + field(5, struct.pack("<6f", *range(6)))
    content = field(2, field(2, b"data") + field(4, b"fc6") + field(5, 14) + field(6, old))
    found = read(content)
    assert found["fc6.weight"].tolist() == [[[[0, 1, 2], [3, 4, 5]]]]


def test_double_precision_gradients_and_a_third_blob(read) -> None:
    gradients = field(6, struct.pack("<2f", 9, 9))
    content = layer("bn", blob([0.1, 3], 2, form="d"), blob([1, 2], 2, extra=gradients), blob([4], 1))
    found = read(content)
    assert {name: values.tolist() for name, values in found.items()} == {
        "bn.weight": [np.float32(0.1), 3],
        "bn.bias": [1, 2],
        "bn.2": [4],
    }


def test_packed_numbers_in_two_parts_are_one_tensor(read) -> None:
    """What protobuf allows of any packed field."""
    parts = (
        field(7, field(1, varint(3))) + field(5, struct.pack("<2f", 1, 2)) + field(5, struct.pack("<f", 3))
    )
    assert read(layer("fc", parts))["fc.weight"].tolist() == [1, 2, 3]


def test_what_the_protobuf_library_packs_itself(read) -> None:
    """The numbers declared as in caffe.proto: ``repeated float data = 5 [packed = true]``."""
    file = descriptor_pb2.FileDescriptorProto(name="packed.proto", package="packed")
    numbers = file.message_type.add(name="BlobProto").field.add(name="data", number=5, label=3, type=2)
    numbers.options.packed = True
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    message = message_factory.GetMessageClass(pool.FindMessageTypeByName("packed.BlobProto"))()
    message.data.extend([1.5, -2, 1e-30])
    content = field(7, field(1, varint(3))) + message.SerializeToString()
    assert read(layer("fc", content))["fc.weight"].tolist() == [1.5, -2, np.float32(1e-30)]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 99))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(tmp_path: Path, shape: list[int], seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    path = tmp_path / "any.caffemodel"
    path.write_bytes(layer("x", blob(values.ravel().tolist(), *shape)))
    np.testing.assert_array_equal(read_caffemodel(path)["x.weight"].numpy(), values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONV[:-1], "a field of .* bytes, of which .* are there"),
        (CONV[:40], "a field of .* bytes, of which .* are there"),
        (CONV + b"\xff" * 3, "a number at byte .* that does not end"),
        (CONV + b"\xff" * 30, "a number at byte .* that does not end"),
        (b"\x80\x02}q\x00.", r"not a readable \.caffemodel"),  # a pickle
        (b"PK\x03\x04" + bytes(60), "net.caffemodel"),  # what torch.save writes
        (b"\x00" * 50, "begins no field that caffe writes"),
        (
            field(3, b"") + bytes([100 << 3 & 127 | 3 | 128, 6]),
            "begins no field that caffe writes",
        ),  # a group
        (b'name: "VGG"\nlayer {\n}', "a prototxt, which describes a net; give the .caffemodel"),
        (b"\x89HDF\r\n\x1a\n", "HDF5.*snapshot_format: BINARYPROTO"),
        (field(1, b"empty"), "holds no weights; expected a .caffemodel of 2014 or later"),
        (field(2, field(1, field(1, b"conv1") + field(50, blob([1], 1)))), "holds no weights"),  # V0
        (CONV + CONV, "'conv1.weight' twice"),
        (layer("", blob([1], 1)), "a layer with weights is called ''"),
        (layer("a\nb", blob([1], 1)), r"is called 'a\\nb'"),
        (layer("x" * 201, blob([1], 1)), "is called 'x{40}'; expected 1 to 200 letters"),
        (layer("x", blob([1, 2], 3)), r"'x.weight' has the shape \[3\] and 8 bytes of float32"),
        (layer("x", blob([1, 2], 2**40, 2**40)), "the file is damaged or hostile"),
        (layer("x", blob([1, 2], 2, 2**64 - 1)), r"the shape \[2, -1\]"),
        (layer("x", blob([1, 2], 0, 2)), "damaged or hostile"),
        (layer("x", blob([], 0)), "damaged or hostile"),
        (layer("x", field(5, bytes(8))), r"the shape \[0, 0, 0, 0\] and 8 bytes"),
        (layer("x", blob([1], *[1] * 101)), "a shape of"),
        (layer("x", field(7, field(1, varint(2))) + bytes([5 << 3 | FLOAT]) + bytes(4)), "and 0 bytes"),
        (layer("x", field(7, field(1, varint(1))) + field(5, bytes(5))), "and 5 bytes of float32"),
        (field(100, b"") * 100_001, "more than 100000 fields"),
        (field(100, field(1, b"x") + field(7, b"") * 100_001), "more than 100000 fields"),
        (layer("x", field(5, b"") * 100_001), "more than 100000 fields"),
    ],
    ids=range(28),
)
def test_what_is_no_caffemodel_or_claims_what_it_does_not_hold(content: bytes, message: str, refusal) -> None:
    assert re.search(message, refusal(content))


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_anywhere_is_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(CONV + layer("fc", blob([1, 2], 2)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.caffemodel"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        found = read_caffemodel(path)
    except ArtefactError as error:
        found = {}
        assert_one_line(str(error))
    assert sum(tensor.numel() for tensor in found.values()) <= 11


def test_a_file_beyond_protobufs_limit(tmp_path: Path) -> None:
    """Sparse: it takes no room on the disk, and is not read."""
    path = tmp_path / "large.caffemodel"
    with path.open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(ArtefactError, match=r"has 2\.15 GB; expected a \.caffemodel of at most 2 GiB"):
        read_caffemodel(path)
