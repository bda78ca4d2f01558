"""The errors a user can cause. Each message is one line: the value, the expectation, the remedy.

The command line prints the message and exits with code 2; scripts catch ``AnchorlineError``. Every
class also derives from the built-in exception a caller would expect.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection
from typing import Any, NoReturn

# Control characters and escape sequences, line ends and changes of direction, what cannot be seen, and halves
# of UTF-16 pairs, which are no characters. What joins letters (U+200C, U+200D) is part of many scripts.
UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u180e\u200b\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_bounded = reprlib.Repr()
_bounded.maxstring = _bounded.maxlong = _bounded.maxother = 80
_bounded.maxlevel = 2  # a list of lists of lists may hold itself many times over


class AnchorlineError(Exception):
    """Base of every error that a user can mend."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its text, past the constructors that make one: a pool of processes hangs otherwise."""
        return _remade, (type(self), self.args, self.__dict__)


def _remade(kind: type[AnchorlineError], args: tuple[Any, ...], state: dict[str, Any]) -> AnchorlineError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class SettingsError(AnchorlineError, ValueError):
    """A setting, an option or an argument that cannot be used."""


class ArtefactError(AnchorlineError, ValueError):
    """A model file or contract that is missing, damaged, foreign or too new."""


class DataError(AnchorlineError, ValueError):
    """Images, annotations or videos that are missing or cannot be read."""


class FrameError(AnchorlineError, ValueError):
    """A frame handed to a detector that is not a BGR uint8 array of shape [H, W, 3]."""


class OutputError(AnchorlineError, OSError):
    """A result that could not be written: no space left, no permission, not a folder."""


class TrainingError(AnchorlineError, RuntimeError):
    """A training run that cannot go on, such as a loss that is not finite."""


class GpuError(AnchorlineError, RuntimeError):
    """A GPU, its driver or its memory that is not there, does not suffice or has failed."""


class ParityError(AnchorlineError, RuntimeError):
    """Two forms of one model that should agree and do not."""


class NotCopied:
    """Base of what holds threads, open files or a device: pickling or copying it is one clear error."""

    def __reduce__(self) -> NoReturn:
        raise SettingsError(
            f"a {type(self).__name__} cannot be pickled or copied, since it holds threads, open files or a "
            "device; make one where it is needed"
        )


def check_count(name: str, value: object, least: int = 1, most: int = 1_000_000) -> None:
    """Raise ``SettingsError`` unless the setting is a whole number from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SettingsError(f"{name} is {shown(value)}; expected a whole number of at least {least}")
    if value > most:
        raise SettingsError(f"{name} is {shown(value)}; expected a whole number of at most {most}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise ``SettingsError`` unless the setting is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise SettingsError(f"{name} is {shown(value)}; expected one of {', '.join(choices)}")


def printable(text: str) -> str:
    """``text`` as it may reach a terminal or a page: ``UNPRINTABLE`` characters as Python escapes them."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def shown(value: object) -> str:
    """The ``repr`` of a value from a file or a caller, cut to what a message has room for."""
    return printable(_bounded.repr(value))


def reason_of(error: BaseException, longest: int = 120) -> str:
    """What a foreign ``error`` says first, for a line of ours; the name of its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return printable(lines[0])[:longest] if lines else type(error).__name__


def one_line(error: BaseException | str) -> str:
    """An error's text without line ends, for the reason inside a message; it may quote what a file holds."""
    return printable(" ".join(str(error).split()))
