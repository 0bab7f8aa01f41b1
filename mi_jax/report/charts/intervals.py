"""Figures as points with their interval and their null on one scale."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from mi_jax.report.charts.svg import WIDTH, Scale, chart, element, extent, text_width, tick_text, title, with_interval
from mi_jax.report.text import Real, interval, is_number, number

_ROW = 40.0
_LINE = 14.0
_TRACK = 15.0  # from the foot of a row up to its track


def interval_chart(
    rows: Sequence[Mapping[str, Any]], *, label: str, include: Sequence[Any] = (0.0,), axis: str = ""
) -> Markup:
    """One line of text and one track for each row of `name`, `value`, and optional `low`, `high`, `null`, `note`.

    The point is the value, the bar its interval, the hollow diamond its null.
    """
    drawn = [row for row in rows if is_number(row.get("value"))]
    if not drawn:
        return Markup("")
    keys = ("value", "low", "high", "null")
    low, high = extent([row.get(key) for row in drawn for key in keys], include=include)
    x = Scale(low, high, 8, WIDTH - 8)
    tops = [0.0]
    for row in drawn:
        tops.append(tops[-1] + _ROW + (_LINE if _crowded(row) else 0.0))
    base = tops[-1] + 2
    height = base + (34 if axis else 18)
    parts = []
    for tick in x.ticks(5):
        for bottom in tops[1:]:
            y = bottom - _TRACK
            kind = "axis" if tick == 0 else "grid"
            parts.append(element("line", x1=x(tick), x2=x(tick), y1=y - 7, y2=y + 7, class_=kind))
        parts.append(element("text", tick_text(tick), x=x(tick), y=base + 13, class_="tick mid"))
    for row, top, bottom in zip(drawn, tops[:-1], tops[1:], strict=True):
        parts.append(_row(row, top, bottom, x))
    if axis:
        parts.append(element("text", axis, x=WIDTH / 2, y=base + 30, class_="name mid"))
    return chart(WIDTH, height, label, *parts)


def gauge(value: Any, low: Any = None, high: Any = None, null: Any = None, include: Sequence[Any] = (0, 1)) -> Markup:
    """A single track without text, for a figure that is printed beside it."""
    if not is_number(value):
        return Markup("")
    x = Scale(*extent((value, low, high, null), include=include), 6, 154)
    label = with_interval(value, low, high, null)
    return chart(160, 14, label, _track(value, low, high, null, 7, x), class_="gauge")


def _figures(row: Mapping[str, Any]) -> str:
    text = f"{number(row['value'])} {interval(row.get('low'), row.get('high'))}".strip()
    return text if not is_number(row.get("null")) else f"{text} · null {number(row['null'])}"


def _crowded(row: Mapping[str, Any]) -> bool:
    """Whether name and figures need a line each."""
    return text_width(f"{row.get('name', '')}   {_figures(row)}") > WIDTH


def _row(row: Mapping[str, Any], top: Real, bottom: Real, x: Scale) -> Markup:
    value, low, high, null = (row.get(key) for key in ("value", "low", "high", "null"))
    name = str(row.get("name", ""))
    fits = int(WIDTH / text_width("n"))
    short = name if len(name) <= fits else name[: fits - 1] + "…"
    crowded = _crowded(row)
    return element(
        "g",
        title(f"{name}: {with_interval(value, low, high, null)}"),
        element("rect", x=0, y=top, width=WIDTH, height=bottom - top - 2, class_="hit"),
        element("text", short, x=0, y=top + 13, class_="label halo"),
        element("text", _figures(row), x=WIDTH, y=top + 13 + (_LINE if crowded else 0), class_="value end halo"),
        _track(value, low, high, null, bottom - _TRACK, x),
    )


def _track(value: Any, low: Any, high: Any, null: Any, y: Real, x: Scale) -> Markup:
    parts = [element("line", x1=x.start, x2=x.end, y1=y, y2=y, class_="track")]
    if is_number(low) and is_number(high):
        width = max(x(high) - x(low), 2)
        parts.append(element("rect", x=x(low), y=y - 3.5, width=width, height=7, rx=1.5, class_="ci"))
    if is_number(null):
        at = x(null)
        diamond = f"M{at:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z"
        parts.append(element("path", d=diamond, class_="nullmark"))
    parts.append(element("circle", cx=x(value), cy=y, r=4, class_="point"))
    return Markup("").join(parts)
