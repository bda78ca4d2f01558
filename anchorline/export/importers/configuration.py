"""A library's own configuration of a model: read as plain values, never run; checked; made our settings.

Detectron2 writes YAML (``config.yaml``), MMDetection the text of a Python file. Both become nested
dictionaries of texts, numbers, booleans and lists.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorline.runtime.io.errors import ArtefactError, reason_of
from anchorline.runtime.io.files import input_errors

LONGEST = 300_000  # bytes; a configuration has 10 000
_DEEPEST = 50
_MOST_VALUES = 100_000
REMEDY = "if it is not this model's, give the one that is with --config"


class Unfit(ValueError):
    """A value that is not what its place takes; says what that is."""


class Unknown:
    """What stands for a value that cannot be known without running something; shown as ``text``."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


EXPRESSION, CHANGED = Unknown("an expression"), Unknown("changed by a later statement")


Fields = Mapping[str, tuple[str, Callable[[Any], Any]]]
"""Our settings: the paths where each may stand, with spaces between, the newest first; how it is read."""


@dataclass(frozen=True)
class Configuration:
    """Nested plain ``values``, and ``name``: the file or the place that they were read from."""

    values: Mapping[str, Any]
    name: str

    def get(self, path: str) -> Any:
        """What stands at ``path``, names with dots between; ``None`` where nothing does."""
        found: Any = self.values
        for name in path.split("."):
            if not isinstance(found, Unknown):
                found = found.get(name) if isinstance(found, dict) else None
        return found

    def refuse(self, path: str, value: object, expected: str) -> ArtefactError:
        """The error that ``path`` has a ``value`` for which there is no form here."""
        return ArtefactError(f"{self.name}: {path} is {_shown(value)}; can be imported {expected}; {REMEDY}")

    def check(self, allowed: Mapping[str, Sequence[object]]) -> None:
        """Raise ``ArtefactError`` for the first of these paths that has another value than is ``allowed``."""
        for path, choices in allowed.items():
            found = self.get(path)
            # Types may stand with their module.
            plain = found.rpartition(".")[2] if isinstance(found, str) and found not in choices else found
            if found is not None and plain not in choices:
                raise self.refuse(
                    path, found, f"with {' or '.join(map(_shown, choices))}" if choices else "without it"
                )

    def agree(self, path: str, held: int | None, what: str, said: int | None = None) -> None:
        """Raise ``ArtefactError`` where the checkpoint has ``held`` and ``path`` says another number."""
        said = self.get(path) if said is None else said
        if held is not None and said is not None and said != held:
            raise ArtefactError(
                f"{self.name}: {path} gives {_shown(said)} {what}, and the checkpoint has {held}; {REMEDY}"
            )

    def settings(self, fields: Fields) -> dict[str, Any]:
        """Those of ``fields`` that stand here; raises ``ArtefactError`` for what cannot be read."""
        settings = {}
        for name, (paths, read) in fields.items():
            path = next((path for path in paths.split() if self.get(path) is not None), None)
            if path is not None:
                try:
                    settings[name] = read(self.get(path))
                except Unfit as error:
                    raise self.refuse(path, self.get(path), f"with {error}") from None
        return settings


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def text_of(path: Path) -> str:
    """The text in ``path``; raises ``ArtefactError`` where it is none, or too long for a configuration."""
    with input_errors(path, "give the configuration that its library wrote"):
        if path.stat().st_size > LONGEST:
            raise ArtefactError(f"{path}: has more than {LONGEST} bytes, as no configuration has; {REMEDY}")
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise ArtefactError(f"{path}: is no text in UTF-8, as a configuration is; {REMEDY}") from None


def from_yaml(text: str, name: str) -> dict[str, Any]:
    """The mapping in a YAML ``text``; objects of Python in it are not built, and stand as ``EXPRESSION``."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def built(loader: Any, tag: str, node: Any) -> Any:
        return loader.construct_sequence(node, deep=True) if tag == "tuple" else EXPRESSION

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", built)
    try:
        found = plain(yaml.load(text, Loader=Loader))  # a safe loader, with tuples
    except Exception as error:  # of odd tags PyYAML raises nearly anything
        raise ArtefactError(f"{name}: cannot be read as YAML ({reason_of(error)}); {REMEDY}") from None
    return found if isinstance(found, dict) else {}


def from_python(text: str) -> dict[str, Any]:
    """The top-level assignments of ``text``, taken apart as a syntax tree; empty where it is no Python.

    Literals, ``dict(...)`` and names that were assigned before are values, all else is ``EXPRESSION``,
    and what other statements may change ``CHANGED``: ``model.update(...)``, ``model["neck"] = ...``, ``del``.
    """
    values: dict[str, Any] = {}
    if len(text) > LONGEST:
        return values
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of literals that are odd
            statements = ast.parse(text).body
        for statement in statements:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    values[name] = _value(value, values)
                case ast.Expr(value=ast.Constant()) | ast.Import() | ast.ImportFrom():
                    pass
                case _:
                    names = (node.id for node in ast.walk(statement) if isinstance(node, ast.Name))
                    values.update(dict.fromkeys(names, CHANGED))
        return plain(values)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # of hostile texts too
        return {}


def _value(node: ast.expr, known: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return known.get(name, EXPRESSION)
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item, known) for item in items]
        case ast.Dict(keys=keys, values=values):
            pairs = zip(keys, values, strict=True)
            return _merged([(key and _value(key, known), _value(each, known)) for key, each in pairs])
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
            return _merged([(keyword.arg, _value(keyword.value, known)) for keyword in keywords])
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = _value(operand, known)
            return -value if isinstance(value, int | float) else EXPRESSION
    return EXPRESSION


def _merged(items: list[tuple[Any, Any]]) -> Any:
    """A dictionary of ``items``; those without a key are dictionaries to unpack."""
    found: dict[str, Any] = {}
    for key, value in items:
        if isinstance(key, str):
            found[key] = value
        elif key is None:
            if not isinstance(value, dict):
                return EXPRESSION
            found.update(value)
    return found


def plain(value: Any) -> Any:
    """``value`` with its mappings as dictionaries, its tuples as lists, and ``EXPRESSION`` for objects.

    Raises ``ValueError`` for more than a configuration holds: values may stand for each other many times.
    """
    left = _MOST_VALUES

    def copied(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > _DEEPEST:
            raise ValueError("more values than a configuration has")
        if isinstance(value, Mapping):
            return {str(key): copied(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [copied(item, depth + 1) for item in value]
        return value if value is None or isinstance(value, str | int | float | Unknown) else EXPRESSION

    return copied(value, 0)


# How values are read.


def number(value: Any) -> float:
    """A number above or below 0, not a boolean and finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise Unfit("a finite number")
    return float(value)


def whole(value: Any) -> int:
    """A whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise Unfit("a whole number")
    return value


def numbers(value: Any) -> tuple[float, ...]:
    """A list of numbers, not empty."""
    if not isinstance(value, list) or not value:
        raise Unfit("a list of numbers")
    return tuple(map(number, value))


def flag(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise Unfit("true or false")
    return value


def choice(**choices: Any) -> Callable[[Any], Any]:
    """A reader that gives what stands for one of these names."""

    def read(value: Any) -> Any:
        if not isinstance(value, str) or value not in choices:
            raise Unfit(" or ".join(choices))
        return choices[value]

    return read
