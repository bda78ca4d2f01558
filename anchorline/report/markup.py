"""Elements of HTML and charts in SVG, as text. Whatever is no ``Html`` already is escaped."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.io.errors import printable

_LONGEST_TEXT = 1000  # characters of a name, a path, a remark
_VOID = ("img", "meta")
_MOST_POINTS = 240  # of a curve
_IMAGE_BYTES = 1_500_000
_IMAGE_WIDTHS = (1600, 1200, 800)  # tried in turn until a picture is small enough

Points = Sequence[tuple[float, float]]


class Html(str):
    """Text that is markup."""


def text(value: object, longest: int = _LONGEST_TEXT) -> Html:
    """``value`` as text of a page, of bounded length; markup stays what it is."""
    if isinstance(value, Html):
        return value
    shown = printable(str(value))
    if len(shown) > longest:
        shown = f"{shown[:longest]} ... ({len(shown)} characters)"
    return Html(html.escape(shown))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element. Attributes that are None are left out; ``class_`` is ``class``, ``a_b`` is ``a-b``."""
    stated = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{stated}>")
    return Html(f"<{name}{stated}>{''.join(map(text, children))}</{name}>")


def join(parts: Iterable[object]) -> Html:
    """Parts one after the other."""
    return Html("".join(map(text, parts)))


def number(value: float | None, digits: int = 3) -> str:
    """A figure as it is shown; ``-`` where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.{digits}f}"


def table(
    caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, last_bold: bool = False
) -> Html:
    """A table whose first column names the rows. A cell is text, or an element ``td`` already."""
    head = tag("tr", *(tag("th", column, scope="col") for column in columns))
    body = []
    for first, *cells in rows:
        shown = [
            cell if str(cell).startswith("<td") and isinstance(cell, Html) else tag("td", cell)
            for cell in cells
        ]
        body.append(tag("tr", tag("th", first, scope="row"), *shown))
    if last_bold and body:
        body[-1] = Html(body[-1].replace("<tr>", '<tr class="total">', 1))
    inner = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
    return tag("div", inner, class_="scroll", role="region", aria_label=caption, tabindex="0")


def shaded(value: float | None, shown: str | None = None) -> Html:
    """A cell with a figure from 0 to 1, darker where it is larger."""
    share = 0.0 if value is None or not math.isfinite(value) else min(max(value, 0.0), 1.0)
    return tag("td", number(value) if shown is None else shown, class_=f"num s{round(10 * share)}")


def facts(pairs: Iterable[tuple[object, object]]) -> Html:
    """Names and what they are."""
    rows = (tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs)
    return tag("dl", *rows)


def thinned(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    """The points that are finite, at most ``_MOST_POINTS`` of them, the first and the last included."""
    points = [(x, y) for x, y in zip(xs, ys, strict=False) if math.isfinite(x) and math.isfinite(y)]
    if len(points) <= _MOST_POINTS:
        return points
    places = np.linspace(0, len(points) - 1, _MOST_POINTS).round().astype(int)
    return [points[place] for place in places]


def line_chart(
    lines: Sequence[tuple[str, Points]],
    *,
    title: str,
    labels: tuple[str, str],
    size: tuple[int, int],
    limits: tuple[float, float],
) -> Html:
    """Lines over axes from 0 to ``limits`` (x, y), with a grid of quarters; ``size`` is width and height."""
    (width, height), (left, bottom, top, right) = size, (38, 30, 8, 12)
    across, up = width - left - right, height - top - bottom

    def place(x: float, y: float) -> tuple[float, float]:
        share_x, share_y = (
            min(max(v / (limit or 1.0), 0.0), 1.0) for v, limit in zip((x, y), limits, strict=True)
        )
        return left + across * share_x, top + up * (1.0 - share_y)

    parts = [tag("title", title)]
    for step in range(5):
        x, y = place(limits[0] * step / 4, limits[1] * step / 4)
        parts.append(
            tag("path", d=f"M{x:.1f} {top}V{top + up}M{left} {y:.1f}H{left + across}", class_="grid")
        )
        if step % 2 == 0:
            shown_x, shown_y = (f"{limit * step / 4:.3g}" for limit in limits)
            parts.append(tag("text", shown_x, x=f"{x:.1f}", y=height - 17, class_="middle"))
            parts.append(tag("text", shown_y, x=left - 5, y=f"{y + 3:.1f}", class_="end"))
    middle = top + up / 2
    parts.append(tag("text", labels[0], x=left + across / 2, y=height - 4, class_="middle"))
    turned = f"rotate(-90 9 {middle:.0f})"
    parts.append(tag("text", labels[1], x=9, y=f"{middle:.0f}", class_="middle", transform=turned))
    for order, (name, points) in enumerate(lines):
        if points:
            path = "L".join("{:.1f} {:.1f}".format(*place(*point)) for point in points)
            parts.append(tag("path", tag("title", name), d=Html(f"M{path}"), class_=f"line l{order % 8}"))
    return tag("svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=title)


def stacked_bar(shares: Sequence[tuple[str, float]], title: str) -> Html:
    """One bar of lengths that add up, with their names below in ``legend``'s colours."""
    total = sum(value for _, value in shares) or 1.0
    parts, start = [tag("title", title)], 0.0
    for order, (name, value) in enumerate(shares):
        width = 1000.0 * value / total
        shown = tag("title", f"{name} {value:.2f} ms")
        parts.append(
            tag("rect", shown, x=f"{start:.1f}", y=0, width=f"{width:.1f}", height=30, class_=f"f{order % 8}")
        )
        start += width
    return tag(
        "svg",
        *parts,
        viewBox="0 0 1000 30",
        preserveAspectRatio="none",
        role="img",
        aria_label=title,
        class_="bar",
    )


def legend(names: Sequence[str], kind: str) -> Html:
    """Names with the colours of lines (``l``) or of parts of a bar (``f``), in their order."""
    rows = []
    for order, name in enumerate(names):
        shape: dict[str, Any] = {"class_": f"{kind}{order % 8}" + (" line" if kind == "l" else "")}
        mark = tag("path", d="M0 6H22", **shape) if kind == "l" else tag("rect", width=12, height=12, **shape)
        size = 22 if kind == "l" else 12
        swatch = tag("svg", mark, viewBox=f"0 0 {size} 12", width=size, height=12, aria_hidden="true")
        rows.append(tag("li", swatch, " ", name))
    return tag("ul", *rows, class_="legend")


def picture(image: NDArray[np.uint8], alt: str) -> Html:
    """An image (uint8 BGR [H, W, 3]) inside the page, as a JPEG of at most ``_IMAGE_BYTES``."""
    for quality in (85, 60):
        for most in _IMAGE_WIDTHS:
            scale = min(1.0, most / image.shape[1], 4 * most / image.shape[0])
            sides = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
            small = image if scale == 1.0 else cv2.resize(image, sides, interpolation=cv2.INTER_AREA)
            content = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
            if len(content) <= _IMAGE_BYTES:
                source = Html(f"data:image/jpeg;base64,{base64.b64encode(content).decode('ascii')}")
                return tag("img", src=source, alt=alt, width=sides[0], height=sides[1])
    return tag("p", "The picture is too large for this page.", class_="note")
