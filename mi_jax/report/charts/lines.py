"""Line charts with bands."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from mi_jax.report.charts.svg import WIDTH, Scale, axes, chart, element, extent, text_width, title, with_interval
from mi_jax.report.text import Real, is_number, number

_TITLED_POINTS = 60


@dataclass(frozen=True)
class Series:
    """One line; `low` and `high` are the edges of its band. A null control is drawn dashed."""

    name: str
    x: Sequence[Real | None]
    y: Sequence[Real | None]
    low: Sequence[Real | None] = ()
    high: Sequence[Real | None] = ()
    null: bool = False


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str,
    y_label: str,
    y_include: Sequence[Real] = (),
    log_x: bool = False,
    mark: tuple[Real, str] | None = None,
    height: Real = 230,
) -> Markup:
    """Lines with optional bands; `mark` is a named vertical line. Points that are not finite interrupt a line.

    Raises:
      ValueError: the x and y of a series differ in length.
    """
    for s in series:
        if len(s.x) != len(s.y):
            raise ValueError(f"series '{s.name}' has {len(s.x)} x values and {len(s.y)} y values; they must be as many")
    xs = [v for s in series for v in s.x if is_number(v) and (v > 0 or not log_x)]
    ys = [v for s in series for values in (s.y, s.low, s.high) for v in values]
    x_low, x_high = extent(xs)
    y_low, y_high = extent(ys, include=y_include)
    keys, legend_rows = _legend(series)
    top = 30 + 16 * legend_rows + (14 if mark else 0)
    x = Scale(max(x_low, 1e-9) if log_x else x_low, x_high, 40, WIDTH - 8, log=log_x)
    y = Scale(y_low, y_high, height - 38, top)

    parts = [keys, axes(x, y, x_label, y_label, lift=24 if mark else 10)]
    if mark is not None:
        at = x(mark[0])
        parts.append(element("line", x1=at, x2=at, y1=y.start, y2=y.end, class_="mark"))
        half = text_width(mark[1], 10.5) / 2
        middle = min(max(at, x.start + half), x.end - half)
        parts.append(element("text", mark[1], x=middle, y=y.end - 5, class_="tick mid"))
    for index, s in enumerate(series):
        parts.append(_band(s, index, x, y))
    for index, s in enumerate(series):
        parts.append(element("path", d=_path(s.x, s.y, x, y), class_=_class(s, index)))
    for s in series:
        parts.append(_points(s, x, y, x_label))
    return chart(WIDTH, height, label, *parts)


def _class(s: Series, index: int) -> str:
    return "series null" if s.null else f"series s{min(index, 2)}"


def _path(xs: Sequence[Real | None], ys: Sequence[Real | None], x: Scale, y: Scale) -> str:
    words, pen_down = [], False
    for a, b in zip(xs, ys, strict=True):
        if not (is_number(a) and is_number(b)) or (x.log and a <= 0):
            pen_down = False
            continue
        words.append(f"{'L' if pen_down else 'M'}{x(a):.1f} {y(b):.1f}")
        pen_down = True
    return "".join(words) or "M0 0"


def _band(s: Series, index: int, x: Scale, y: Scale) -> Markup:
    if not s.low or len(s.low) != len(s.x) or len(s.high) != len(s.x):
        return Markup("")
    rows = [
        (a, b, c)
        for a, b, c in zip(s.x, s.low, s.high, strict=True)
        if is_number(a) and is_number(b) and is_number(c) and (a > 0 or not x.log)
    ]
    if not rows:
        return Markup("")
    there = [f"{x(a):.1f},{y(c):.1f}" for a, _, c in rows]
    back = [f"{x(a):.1f},{y(b):.1f}" for a, b, _ in reversed(rows)]
    return element("polygon", points=" ".join(there + back), class_=f"band {_class(s, index)}")


def _points(s: Series, x: Scale, y: Scale, x_label: str) -> Markup:
    stride = max(1, len(s.x) // _TITLED_POINTS)
    parts = []
    banded = len(s.low) == len(s.x) == len(s.high)
    for i in range(0, len(s.x), stride):
        a, b = s.x[i], s.y[i]
        if not is_number(a) or not is_number(b) or (x.log and a <= 0):
            continue
        text = with_interval(b, s.low[i], s.high[i]) if banded else number(b)
        text = title(f"{s.name}: {text} at {x_label} {number(a)}")
        parts.append(element("circle", text, cx=x(a), cy=y(b), r=5, class_="hit"))
    return Markup("").join(parts)


def _legend(series: Sequence[Series]) -> tuple[Markup, int]:
    if len(series) < 2:
        return Markup(""), 0
    parts, left, row = [], 0.0, 0
    for index, s in enumerate(series):
        width = 28 + text_width(s.name) + 14
        if left and left + width > WIDTH:
            left, row = 0.0, row + 1
        top = 8 + 16 * row
        parts.append(element("line", x1=left, x2=left + 22, y1=top, y2=top, class_=_class(s, index)))
        parts.append(element("text", s.name, x=left + 28, y=top + 4, class_="key"))
        left += width
    return Markup("").join(parts), row + 1
