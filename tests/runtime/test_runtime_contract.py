"""What a contract may hold: files that are damaged or hostile are refused in one line."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from anchorline.runtime.contract import LONGEST_NAME, MOST_NAMES, NAMES_VARIABLE, Contract, check_names
from anchorline.runtime.io.errors import ArtefactError, DataError, SettingsError, printable
from anchorline.runtime.io.images import MAX_PIXELS_VARIABLE

# Half a UTF-16 pair, an escape sequence, a line end, a change of direction, a zero byte.
UNPRINTABLE = ("ca\ud800t", "\x1b[31mcat", "c\nat", "\u202etac", "cat\0", "\x9b31mcat")


@pytest.mark.parametrize("name", [*UNPRINTABLE, "", " ", "x" * (LONGEST_NAME + 1), 7, None])
def test_a_name_that_cannot_be_shown_is_refused_in_one_printable_line(name: object) -> None:
    with pytest.raises(DataError, match=r"^labels.txt: class name 1 is .*; expected 1 to 200 char") as caught:
        check_names(["dog", name], "labels.txt", DataError)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 250


def test_names_stand_once_and_have_a_bound() -> None:
    with pytest.raises(ArtefactError, match="class name 'cat' stands twice"):
        check_names(["cat", "dog", "cat"], "model")
    with pytest.raises(ArtefactError, match=f"over {MOST_NAMES} class names"):
        check_names(map(str, range(MOST_NAMES + 1)), "model")


def test_who_has_more_classes_raises_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    names = tuple(map(str, range(MOST_NAMES + 1)))
    monkeypatch.setenv(NAMES_VARIABLE, str(MOST_NAMES + 1))
    assert check_names(names, "model") == names
    monkeypatch.setenv(NAMES_VARIABLE, "2")
    with pytest.raises(
        ArtefactError, match=r"over 2 class names; .* variable ANCHORLINE_MOST_CLASSES sets anoth"
    ):
        check_names(names[:3], "model")
    monkeypatch.setenv(NAMES_VARIABLE, "many")
    with pytest.raises(
        ArtefactError, match="ANCHORLINE_MOST_CLASSES is 'many'; expected a number of classes"
    ):
        check_names(names[:3], "model")


def test_names_of_every_script_are_taken() -> None:
    names = (
        "Straßenbahn",
        "\u06af\u0631\u0628\u0647\u200c\u0647\u0627",
        "क्षमा",
        "猫",
        "\U0001f469\u200d\U0001f692",
        "traffic light",
    )
    assert check_names(names, "model") == names


def test_text_is_shown_with_what_steers_a_terminal_escaped() -> None:
    assert printable("é\x1b[2J\ud800\u202e\n") == r"é\x1b[2J\ud800\u202e\n"


def refusal(text: str | bytes) -> str:
    with pytest.raises(ArtefactError) as caught:
        Contract.from_json(text, "model.onnx")
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith("model.onnx: ")
    assert len(message) < 400
    return message


HUGE = int("1" + "0" * 400)
ODD = (
    None,
    -1,
    0,
    True,
    0.5,
    float("nan"),
    float("inf"),
    HUGE,
    "\x1b[2J\ud800",
    [],
    [[1]],
    {},
    {"a": 1},
    "x" * 5000,
)
NULLABLE = (
    "category_ids",
    "max_batch",
    "canvas",
    *(f"resize.{side}" for side in ("shorter_side", "longer_side", "within")),
)
FITS: dict[str, list[Any]] = {
    **{key: [None] for key in NULLABLE},
    **{key: [0, 0.5] for key in ("thresholds.score", "thresholds.nms_iou", "thresholds.rpn_nms_iou")},
    **{key: [{}] for key in ("resize", "thresholds")},
    "source": [{}, {"a": 1}],
}
FIELDS = [
    *(each.name for each in dataclasses.fields(Contract)),
    *(
        f"resize.{name}"
        for name in ("shorter_side", "longer_side", "interpolation", "rounding", "within", "padding")
    ),
    *(
        f"thresholds.{name}"
        for name in ("score", "nms_iou", "max_detections", "rpn_nms_iou", "max_proposals")
    ),
]


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_another_kind_is_named_with_its_value(field: str, contract: Contract) -> None:
    for odd in ODD:
        values: dict[str, Any] = json.loads(contract.to_json())
        group, _, name = field.rpartition(".")
        (values[group] if group else values)[name] = odd
        text = json.dumps(values)
        if any(odd == value and type(odd) is type(value) for value in FITS.get(field, ())):
            Contract.from_json(text)
        else:
            assert name.partition("_")[0].removesuffix("s") in refusal(text)


@pytest.mark.parametrize("field", ["resize", "thresholds"])
def test_a_mapping_of_unknown_names_is_no_rule_and_no_thresholds(field: str, contract: Contract) -> None:
    with pytest.raises(ArtefactError, match=f"contract {field} is .*; expected an object with the fields"):
        dataclasses.replace(contract, **{field: {"colour": 1}})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"canvas": [10**9, 10**9]}, "contract canvas is"),
        ({"canvas": [20_000, 20_000]}, "expected at most 178956970 pixels"),
        ({"category_ids": [7, 7]}, "category_ids are (7, 7); expected each once"),
        ({"category_ids": [7]}, "1 category ids for 2 names"),
        ({"category_ids": [7, 2**63]}, "whole numbers under 2^53"),
        ({"task": "proposals"}, "expected 3 for the task proposals"),
        ({"outputs": ["boxes", "scores", "labels", "boxes"]}, "expected each name once"),
        ({"names": ["a", "b\x1b[31m"]}, r"class name 1 is 'b\x1b[31m'"),
        ({"source": {"\x07": "\u202e"}, "colour": 1}, "'colour' is no field of this version"),
        ({"thresholds": {"\x1b": 1}}, r"thresholds.'\x1b' is no field"),
        ({"version": 3}, "version 3 is newer than 2"),
        ({"version": 1, "canvas": None}, "canvas is null; expected (height, width) in version 1"),
    ],
)
def test_fields_that_make_no_sense_together(
    changes: dict[str, Any], expected: str, contract: Contract
) -> None:
    assert expected in refusal(json.dumps({**json.loads(contract.to_json()), **changes}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'{"version": 1, "task": "\xff"}', "is not UTF-8 text"),
        ("[" * 100_000, "nested too deeply"),
        ('{"version": ' + "1" * 5000 + "}", "is not JSON"),
        ("[]", "is [], expected a JSON object"),
        (" " * (1 << 25) + "{}", "has 33554434 bytes"),
    ],
)
def test_a_text_that_is_no_contract(text: str | bytes, expected: str) -> None:
    assert expected in refusal(text)


def test_a_source_is_json_of_bounded_depth(contract: Contract) -> None:
    deep: Any = 1
    for _ in range(40):
        deep = {"a": [deep]}
    text = json.dumps({**json.loads(contract.to_json()), "source": {"deep": deep}})
    assert "contract source is" in refusal(text)
    with pytest.raises(ArtefactError, match=r"contract source is .*expected what JSON knows"):
        dataclasses.replace(contract, source={"path": object()})


def test_who_has_larger_images_raises_the_bound(monkeypatch: pytest.MonkeyPatch, contract: Contract) -> None:
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, str(20_000 * 20_000))
    assert dataclasses.replace(contract, canvas=(20_000, 20_000)).canvas == (20_000, 20_000)
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "1e9")
    with pytest.raises(SettingsError, match=f"{MAX_PIXELS_VARIABLE} is '1e9'; expected a whole number"):
        dataclasses.replace(contract)


def test_a_contract_keeps_nothing_of_what_it_was_made_from(contract: Contract) -> None:
    names, source = ["a", "b"], {"data": "voc:x"}
    made = dataclasses.replace(contract, names=names, source=source)
    names.append("c")
    source.clear()
    assert (made.names, made.source) == (("a", "b"), {"data": "voc:x"})
    assert Contract.from_json(made.to_json()) == made
