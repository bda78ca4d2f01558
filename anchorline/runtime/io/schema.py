"""Fields of files, settings and options held against the annotations of a dataclass, in messages of one line.

msgspec checks them; an annotation ``Annotated[type, Meta(ge=..., description="...")]`` says what is expected,
to the reader of the class and to whoever gets the message.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from anchorline.runtime.io.errors import AnchorlineError, ArtefactError, shown

_Made = TypeVar("_Made")

LARGEST_TEXT = 1 << 25  # bytes of JSON that are read

NAME = "1 to 200 letters, digits or any of _ . : / + -"
Name = Annotated[str, Meta(pattern=r"\A[\w.:/+-]{1,200}\Z", description=NAME)]
Share = Annotated[float, Meta(ge=0, le=1, description="a number from 0 to 1")]
Count = Annotated[int, Meta(ge=1, le=1_000_000, description="a whole number from 1 to 1000000")]
AtLeastOne = Annotated[int, Meta(ge=1, description="a whole number of at least 1")]


def choice(*texts: str) -> Meta:
    """For an annotation: one of these texts."""
    return Meta(pattern=rf"\A({'|'.join(map(re.escape, texts))})\Z", description=f"one of {', '.join(texts)}")


def check_fields(instance: Any, title: str, error: type[AnchorlineError] = ArtefactError) -> None:
    """Let every field of a frozen dataclass have the type of its annotation, or raise ``error``.

    ``title`` stands before the field's name in the message. Lists become tuples, whole numbers and NumPy's
    float64 floats, and mappings dicts of their own, where the annotation says so; nothing else is converted.
    """
    for name, (hint, expected) in _schema(instance.__class__).items():
        value = getattr(instance, name)
        try:
            if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
                raise ValueError  # msgspec would make one, of the names that it knows
            object.__setattr__(instance, name, msgspec.convert(_plain(value), hint))
        except (msgspec.ValidationError, ValueError, OverflowError, RecursionError):
            raise error(f"{title}{name} is {shown(value)}; expected {expected}") from None


def build(kind: type[_Made], values: Mapping[str, Any], title: str) -> _Made:
    """The dataclass of these fields; ``ArtefactError`` for one that is missing or that it does not know."""
    fields = {each.name: each for each in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise ArtefactError(f"{title}{shown(name)} is no field of this version")
    for name, each in fields.items():
        if name not in values and (each.default, each.default_factory) == (MISSING, MISSING):
            raise ArtefactError(f"{title}{name} is missing")
    return kind(**values)


def read_object(text: str | bytes, what: str, remedy: str) -> dict[str, Any]:
    """The JSON object in ``text``; an ``ArtefactError`` that begins with ``what`` where there is none.

    Of what is no JSON but Python writes, NaN and infinities are read: free notes of older files hold them.
    """
    if len(text) > LARGEST_TEXT:
        raise ArtefactError(f"{what} has {len(text)} bytes; expected at most {LARGEST_TEXT}; {remedy}")
    try:
        found = json.loads(text)
    except UnicodeDecodeError:
        raise ArtefactError(f"{what} is not UTF-8 text; {remedy}") from None
    except RecursionError:
        raise ArtefactError(f"{what} is not JSON (nested too deeply); {remedy}") from None
    except ValueError as error:
        reason = str(error).partition(";")[0]
        raise ArtefactError(f"{what} is not JSON ({reason}); {remedy}") from None
    if not isinstance(found, dict):
        raise ArtefactError(f"{what} is {shown(found)}, expected a JSON object; {remedy}")
    return found


@functools.cache
def _schema(kind: Any) -> dict[str, tuple[Any, str]]:
    """The annotation of each field, and in words what it expects."""
    hints = get_type_hints(kind, include_extras=True)
    return {each.name: (hints[each.name], _expected(hints[each.name])) for each in dataclasses.fields(kind)}


def _plain(value: Any) -> Any:
    """``value`` without floats of derived classes, which msgspec does not know; in lists and tuples too."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return float(value) if isinstance(value, float) else value


def _expected(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        stated = (each.description for each in hint.__metadata__ if isinstance(each, Meta))
        return next(filter(None, stated), None) or _expected(hint.__origin__)
    inner = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return " or ".join("None" if each is NoneType else _expected(each) for each in inner)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if get_origin(hint) is tuple:
        length = "" if inner[-1] is Ellipsis else f" of {len(inner)}"
        return f"a list{length}, each {_expected(inner[0])}"
    if dataclasses.is_dataclass(hint):
        return f"an object with the fields {', '.join(each.name for each in dataclasses.fields(hint))}"
    return f"a value of type {getattr(hint, '__name__', hint)}"
