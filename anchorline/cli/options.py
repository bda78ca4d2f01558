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
from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.video.options import CpuPrecision, DetectOptions, Provider, option_fields

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


def spelled_out(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of its parameter ``options``, a dataclass.

    The fields are those annotated with an ``Option`` that has a help, also of dataclasses inside it.
    """
    signature = inspect.signature(command, eval_str=True)
    kind = signature.parameters["options"].annotation

    @functools.wraps(command)
    def run(**values: Any) -> None:
        options = _gather(kind, values)
        command(options=options, **values)

    parameters: list[inspect.Parameter] = []
    for each in signature.parameters.values():
        parameters += _parameters(kind) if each.name == "options" else [each]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def _parameters(kind: type) -> Iterator[inspect.Parameter]:
    for name, (hint, about) in option_fields(kind).items():
        default = getattr(kind, name, None)
        if is_dataclass(hint):
            yield from _parameters(hint)  # type: ignore[arg-type]
        if about is None or not about.help:
            continue
        if about.parse:
            hint, default = list[str] | None, None
        elif Path in get_args(hint):
            hint = Path | None  # text as well in Python
        elif bool in get_args(hint):
            hint = bool  # or options of its own in Python
        flag = about.flag or "--" + name.replace("_", "-")
        low = about.low if about.high is None else None  # our own message names both bounds
        asked = typer.Option(flag, help=about.help, min=low, metavar=about.metavar)
        yield inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, asked]
        )


def _gather(kind: type, values: dict[str, Any]) -> Any:
    """An object of the dataclass, by the values of its fields, which are taken out of ``values``."""
    given = {}
    for name, (hint, about) in option_fields(kind).items():
        if is_dataclass(hint):
            given[name] = _gather(hint, values)  # type: ignore[arg-type]
        elif name in values and about is not None:
            value = values.pop(name)
            given[name] = about.parse(value or ()) if about.parse else value
    return kind(**given)


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
