"""What several verbs share: their options, and how values are read and things are told."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from anchorline.console import say
from anchorline.runtime.io.errors import SettingsError, shown
from anchorline.runtime.video.options import CpuPrecision, DetectOptions, Option, Provider, option_fields

if TYPE_CHECKING:
    from anchorline.data.dataset import Dataset

_help = {name: about.help for name, (_, about) in option_fields(DetectOptions).items() if about}
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as JSON.")]
DataOption = Annotated[
    list[str],
    typer.Option(
        metavar="SPEC",
        help="voc:DIR@split, coco:IMAGES,ANN.json, yolo:DIR@split, voc:DIR and yolo:DIR without splits, or "
        "synthetic:N; may be repeated.",
    ),
]
ImagesOption = Annotated[
    list[str] | None,
    typer.Option(metavar="SOURCE", help="Images, folders or a video, without labels; may be repeated."),
]
PicturesOption = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER|FILE.png", help="Draw what was found into this folder, or one picture."),
]
ProviderOption = Annotated[Provider, typer.Option(help=_help["provider"])]
CpuPrecisionOption = Annotated[CpuPrecision, typer.Option(help=_help["cpu_precision"])]
MeasureOption = Annotated[bool | None, typer.Option("--measure/--no-measure", help=_help["measure"])]

TokenOption = Annotated[
    str | None,
    typer.Option(
        envvar="ANCHORLINE_SERVE_TOKEN",
        help="What viewers and callers have to show; better set in the environment, which others cannot see.",
    ),
]
NameOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="A name by which browsers may reach it, beside IP addresses and this machine's own name; "
        "may be repeated.",
    ),
]


def spelled_out(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of its parameter ``options``, a dataclass.

    The fields are those annotated with an ``Option`` that has a help, also of dataclasses inside it. One that
    may be left out (``Slices``) is made where its own option is given; it may be a parameter as well.
    """
    signature = inspect.signature(command, eval_str=True)
    own = {name: _stated(each.annotation) for name, each in signature.parameters.items()}

    @functools.wraps(command)
    def run(**values: Any) -> None:
        for name, (hint, about) in own.items():
            if name == "options":
                values[name] = _gather(hint, values)
            elif about is not None:
                values[name] = _gather_optional(hint, about, values.pop(name), values)
        command(**values)

    parameters: list[inspect.Parameter] = []
    for name, each in signature.parameters.items():
        hint, about = own[name]
        if name == "options":
            parameters += _parameters(hint)
        else:
            parameters += [each] if about is None else _optional_parameters(name, hint, about)
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def _stated(annotation: Any) -> tuple[Any, Option | None]:
    """The plain type, and the ``Option`` that it is annotated with."""
    inside = getattr(annotation, "__metadata__", ())
    return getattr(annotation, "__origin__", annotation), next(
        (each for each in inside if isinstance(each, Option)), None
    )


def _parameters(kind: type) -> Iterator[inspect.Parameter]:
    for name, (hint, about) in option_fields(kind).items():
        default = getattr(kind, name, None)
        if is_dataclass(hint):
            yield from _parameters(hint)  # type: ignore[arg-type]
        if about is None or not about.help:
            continue
        if _optional_kind(hint) is not None:
            yield from _optional_parameters(name, hint, about)
            continue
        if about.parse:
            hint, default = list[str] | None, None
        elif Path in get_args(hint):
            hint = Path | None  # text as well in Python
        elif bool in get_args(hint):
            hint = bool  # or options of its own in Python
        yield _parameter(name, hint, about, default)


def _parameter(name: str, hint: Any, about: Option, default: Any) -> inspect.Parameter:
    flag = about.flag or "--" + name.replace("_", "-")
    low = about.low if about.high is None else None  # our own message names both bounds
    asked = typer.Option(flag, help=about.help, min=low, metavar=about.metavar)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, asked]
    )


def _optional_kind(hint: Any) -> Any:
    """The dataclass of ``hint`` where it may be None instead; else None."""
    kinds = [each for each in get_args(hint) if is_dataclass(each)]
    return kinds[0] if len(get_args(hint)) == 2 and kinds and type(None) in get_args(hint) else None


def _optional_parameters(name: str, hint: Any, about: Option) -> Iterator[inspect.Parameter]:
    yield _parameter(name, str | None, about, None)
    yield from _parameters(_optional_kind(hint))


def _gather(kind: type, values: dict[str, Any]) -> Any:
    """An object of the dataclass, by the values of its fields, which are taken out of ``values``."""
    given = {}
    for name, (hint, about) in option_fields(kind).items():
        if is_dataclass(hint):
            given[name] = _gather(hint, values)  # type: ignore[arg-type]
        elif name in values and about is not None:
            value = values.pop(name)
            if _optional_kind(hint) is not None:
                given[name] = _gather_optional(hint, about, value, values)
            else:
                given[name] = about.parse(value or ()) if about.parse else value
    return kind(**given)


def _gather_optional(hint: Any, about: Option, text: str | None, values: dict[str, Any]) -> Any:
    """The dataclass as ``text`` and its other options say, or None; ``SettingsError`` for these alone."""
    kind = _optional_kind(hint)
    asked = [name for name, (_, field) in option_fields(kind).items() if field and field.help]
    given = {name: values.pop(name) for name in asked}
    if text is not None:
        assert about.parse is not None
        return kind(**about.parse(text), **given)
    for name, value in given.items():
        if value != getattr(kind, name):
            raise SettingsError(
                f"{name.replace('_', '-')} is {shown(value)}, which needs {about.flag} {about.metavar}; add "
                "it, or leave this out"
            )
    return None


def size(text: str | None, option: str, form: str) -> tuple[int, int] | None:
    """The two numbers of ``480x640``, in the order in which they stand; None for no text."""
    if text is None:
        return None
    first, _, second = text.lower().partition("x")
    if not first.isdecimal() or not second.isdecimal():
        raise SettingsError(f"{option} is {text!r}; expected {form} in pixels, such as 480x640")
    return int(first), int(second)


def picture_file(pictures: Path | None, name: str) -> Path | None:
    """Where a verb's one picture goes: the file ``pictures``, or ``name`` in that folder."""
    return pictures if pictures is None or pictures.suffix else pictures / name


# Former spellings of options by verb: they go on working, with a word on the new one.
_RENAMED = {
    "bench": {"--plot": "--pictures", "--source": "--images"},
    "build": {"--target": "--for"},
    "detect": {"--report": "--pictures"},
    "evaluate": {"--plots": "--pictures"},
    "export": {"--for": "--frame"},
    "import": {"--classes": "--classes-file"},
    "quantize": {"--calibrate": "--data"},
    "verify": {"--worst": "--pictures"},
}


def respelled(arguments: Sequence[str]) -> list[str]:
    """``arguments`` (the verb first) in today's spelling; each former one is told on stderr."""
    verb, *rest = arguments or [""]
    found = [*arguments[:1]]
    for place, argument in enumerate(rest):
        option, equals, value = argument.partition("=")
        new = _RENAMED.get(verb, {}).get(option)
        value = value if equals else "".join(rest[place + 1 : place + 2])
        if new == "--classes-file" and not Path(value).is_file():
            new = None  # names, as they are given today
        if new == "--data" and not value.startswith(("voc:", "coco:", "yolo:", "synthetic:")):
            new = "--images"
        if new is not None:
            say(f"anchorline: {verb} {option} is now spelled {new}", to_stderr=True)
        found.append(argument if new is None else new + argument.removeprefix(option))
    return found


def tell_dropped(dataset: Dataset | None) -> None:
    """Say on stderr what of the data was left out or read in another way, and what has no labels."""
    if dataset is None:
        return
    from anchorline.data.dataset import list_counts

    told = [
        f"{len(dataset)} images; left out: {list_counts(dataset.dropped)}" if dataset.dropped else None,
        list_counts(dataset.remarks),
        dataset.only_ignored,
        f"{dataset.unlabelled} of {len(dataset)} images have no label file; they count as images without "
        "objects"
        if dataset.unlabelled
        else None,
    ]
    for line in filter(None, told):
        say(f"{dataset.spec}: {line}", to_stderr=True)
