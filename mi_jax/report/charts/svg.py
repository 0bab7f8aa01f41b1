"""What every chart is made of: escaped elements, scales and axes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from mi_jax.report.text import Real, is_number, number, power_of_ten

WIDTH = 360  # about the content width of a phone, so that a chart is drawn there at its own size


def element(tag: str, *children: Any, **attributes: Any) -> Markup:
    """One escaped SVG or HTML element; `class_` is `class`, other underscores are hyphens, None is left out.

    Example:
      >>> element("text", "a < b", x=1.50, class_="tick")
      Markup('<text x="1.5" class="tick">a &lt; b</text>')
    """
    written = Markup("").join(
        Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), _attribute(value))
        for name, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(tag), written, Markup("").join(escape(c) for c in children))


def _attribute(value: Any) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def title(text: str) -> Markup:
    """What a mark says when it is pointed at."""
    return element("title", text)


def chart(width: Real, height: Real, label: str, *children: Any, class_: str = "chart") -> Markup:
    """The outer SVG of a chart, with `label` for readers that cannot see it."""
    box = f"0 0 {_attribute(float(width))} {_attribute(float(height))}"
    return element("svg", title(label), *children, viewBox=box, role="img", aria_label=label, class_=class_)


def text_width(text: str, size: Real = 11.0) -> Real:
    """An upper estimate of the width of a sans-serif text; SVG made without a browser cannot measure it."""
    return 0.58 * size * len(text)


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic map from data in [low, high] to pixels in [start, end]."""

    low: Real
    high: Real
    start: Real
    end: Real
    log: bool = False

    def __call__(self, value: Real) -> Real:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        value = math.log10(max(value, self.low)) if self.log else value
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, count: int = 4) -> list[Real]:
        """Round values inside the scale, about `count` of them."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            step = max(1, round((last - first) / count))
            return [10.0**power for power in range(first, last + 1, step)]
        span = self.high - self.low
        if span <= 0:
            return [self.low]
        power = 10.0 ** math.floor(math.log10(span / count))
        step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(span / s - count))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(i * step, 10) for i in range(first, last + 1)]


def tick_text(value: Real) -> str:
    """A tick label: short, without trailing zeros; powers of ten as such.

    Example:
      >>> tick_text(0.5), tick_text(-2.0), tick_text(1e4), tick_text(2e-5)
      ('0.5', '−2', '10⁴', '2×10⁻⁵')
    """
    if value != 0 and (abs(value) >= 10000 or abs(value) < 0.001):
        mantissa, exponent = f"{value:.0e}".split("e")
        power = power_of_ten(int(exponent))
        return power if mantissa == "1" else f"{mantissa}×{power}".replace("-", "−")
    return f"{value:.6g}".replace("-", "−")


def extent(values: Iterable[Any], include: Sequence[Any] = (), pad: Real = 0.0) -> tuple[float, float]:
    """The range of the finite values and of `include`; (0, 1) where there are none, and never empty."""
    finite = [float(v) for v in (*values, *include) if is_number(v)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    if low == high:
        room = abs(low) / 2 or 0.5
        return low - room, high + room
    return low - pad * (high - low), high + pad * (high - low)


def axes(x: Scale, y: Scale, x_label: str, y_label: str, *, lift: Real = 10) -> Markup:
    """Horizontal grid lines, tick labels on both axes, and the axes' names; that of y is `lift` above the top."""
    parts = []
    for value in y.ticks():
        parts.append(element("line", x1=x.start, x2=x.end, y1=y(value), y2=y(value), class_="grid"))
        parts.append(element("text", tick_text(value), x=x.start - 6, y=y(value) + 3.5, class_="tick end"))
    for value in x.ticks(5):
        parts.append(element("line", x1=x(value), x2=x(value), y1=y.start, y2=y.start + 4, class_="axis"))
        parts.append(element("text", tick_text(value), x=x(value), y=y.start + 16, class_="tick mid"))
    parts.append(element("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="axis"))
    parts.append(element("text", x_label, x=(x.start + x.end) / 2, y=y.start + 32, class_="name mid"))
    parts.append(element("text", y_label, x=0, y=y.end - lift, class_="name"))
    return Markup("").join(parts)


def with_interval(value: Any, low: Any = None, high: Any = None, null: Any = None) -> str:
    """`0.97 [0.95, 0.98], null 0.50` for titles."""
    text = number(value)
    if is_number(low) and is_number(high):
        text += f" [{number(low)}, {number(high)}]"
    return text if not is_number(null) else f"{text}, null {number(null)}"
