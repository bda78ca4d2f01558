"""Fields of files held against the annotations of a dataclass, in messages of one line.

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
from typing import Annotated, Any, TypeVar, get_type_hints

import msgspec
from msgspec import Meta

from anchorline.runtime.io.errors import ArtefactError, shown

_Made = TypeVar("_Made")

LARGEST_TEXT = 1 << 25  # bytes of JSON that are read

NAME = "1 to 200 letters, digits or any of _ . : / + -"
Name = Annotated[str, Meta(pattern=r"\A[\w.:/+-]{1,200}\Z", description=NAME)]


def choice(*texts: str) -> Meta:
    """For an annotation: one of these texts."""
    return Meta(pattern=rf"\A({'|'.join(map(re.escape, texts))})\Z", description=f"one of {', '.join(texts)}")


def check_fields(instance: Any, title: str) -> None:
    """Let every field of a frozen dataclass have the type of its annotation, or raise ``ArtefactError``.

    ``title`` stands before the field's name in the message. Lists become tuples, whole numbers floats, and
    mappings dicts of their own, where the annotation says so; nothing else is converted.
    """
    for name, (hint, expected) in _schema(instance.__class__).items():
        value = getattr(instance, name)
        try:
            object.__setattr__(instance, name, msgspec.convert(value, hint))
        except (msgspec.ValidationError, ValueError, OverflowError, RecursionError):
            raise ArtefactError(f"{title}{name} is {shown(value)}; expected {expected}") from None


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


def _expected(hint: Any) -> str:
    stated = next((each.description for each in getattr(hint, "__metadata__", ()) if each.description), None)
    return stated or f"an object with the fields {', '.join(getattr(hint, '__dataclass_fields__', ()))}"
