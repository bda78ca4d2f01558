"""The errors a user can cause. Each message is one line: the value, the expectation, the remedy.

The command line prints the message and exits with code 2; scripts catch ``AnchorlineError``. Every
class also derives from the built-in exception a caller would expect.
"""

from __future__ import annotations

from collections.abc import Collection


class AnchorlineError(Exception):
    """Base of every error that a user can mend."""


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


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise ``SettingsError`` unless the setting is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SettingsError(f"{name} is {value!r}; expected a whole number of at least {least}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise ``SettingsError`` unless the setting is one of ``choices``."""
    if value not in choices:
        raise SettingsError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def reason_of(error: BaseException, longest: int = 120) -> str:
    """What a foreign ``error`` says first, for a line of ours; the name of its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:longest] if lines else type(error).__name__


def one_line(error: BaseException | str) -> str:
    """An error's text without line ends, for the reason inside a message."""
    return " ".join(str(error).split())
