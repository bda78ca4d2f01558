"""What a contract may hold: files that are damaged or hostile are refused in one line."""

from __future__ import annotations

import pytest

from anchorline.runtime.contract import LONGEST_NAME, MOST_NAMES, check_names
from anchorline.runtime.io.errors import ArtefactError, DataError, printable

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
