"""Heat maps: layer by position."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from mi_jax.report.charts.svg import WIDTH, chart, element, text_width, title
from mi_jax.report.text import is_number, number, visible


def heatmap(
    values: Sequence[Sequence[Any]], *, layers: Sequence[Any], positions: Sequence[Any], label: str, quantity: str
) -> Markup:
    """A cell for each layer (last at the top) and position; strength by opacity, negative cells also carry a bar.

    The strongest cell is outlined. Colours share one scale that is symmetric about zero.

    Raises:
      ValueError: `values` is not `len(layers)` rows of `len(positions)`.
    """
    if len(values) != len(layers) or any(len(row) != len(positions) for row in values):
        shape = f"{len(values)} rows of {sorted({len(row) for row in values})}"
        raise ValueError(f"heat map of {len(layers)} layers by {len(positions)} positions got {shape} values")
    if not layers or not positions:
        return Markup("")
    names = [visible(p) for p in positions]
    key, key_height = _key(values, quantity)
    left, top = 30.0, key_height + 18.0
    cell_w = min((WIDTH - left - 4) / len(names), 34.0)
    cell_h = max(min(17.0, 380 / len(layers)), 7.0)
    bottom = top + cell_h * len(layers)
    room = min(max(len(name) for name in names), 12) * 5.2 + 16
    peak = max((abs(v) for row in values for v in row if is_number(v)), default=0.0)
    scale = peak or 1.0

    parts, strongest = [key], Markup("")
    step = max(1, round(len(layers) / 10))
    for i, (layer, row) in enumerate(zip(layers, values, strict=True)):
        y = bottom - (i + 1) * cell_h
        if i % step == 0:
            parts.append(element("text", layer, x=left - 6, y=y + cell_h / 2 + 3.5, class_="tick end"))
        for j, value in enumerate(row):
            x = left + j * cell_w
            box = {"x": x + 0.5, "y": y + 0.5, "width": cell_w - 1, "height": cell_h - 1}
            text = title(f"layer {layer}, position {names[j]}: {number(value)}")
            if not is_number(value):
                parts.append(element("rect", text, **box, class_="cell absent"))
                continue
            share = abs(value) / scale
            sign = "neg" if value < 0 else "pos"
            parts.append(element("rect", text, **box, class_=f"cell {sign}", fill_opacity=0.05 + 0.95 * share))
            if value < 0 and share > 0.08:
                middle = y + cell_h / 2
                parts.append(
                    element("line", x1=x + cell_w * 0.3, x2=x + cell_w * 0.7, y1=middle, y2=middle, class_="minus")
                )
            if share == 1.0 and not strongest:
                strongest = element("rect", **box, class_="peak")
    for j, name in enumerate(names):
        x = left + (j + 0.5) * cell_w + 3
        short = name if len(name) <= 12 else name[:11] + "…"
        where = f"rotate(-58 {x:.1f} {bottom + 12:.1f})"
        parts.append(element("text", short, x=x, y=bottom + 12, transform=where, class_="token end"))
    parts.append(strongest)
    parts.append(element("text", "layer", x=0, y=top - 6, class_="name"))
    return chart(WIDTH, bottom + room, label, *parts)


def _key(values: Sequence[Sequence[Any]], quantity: str) -> tuple[Markup, float]:
    """Swatches from the most negative to the most positive with their values, and the height that they take."""
    finite = [v for row in values for v in row if is_number(v)]
    scale = max((abs(v) for v in finite), default=0.0) or 1.0
    shares = (-1.0, -0.5, 0.0, 0.5, 1.0) if min(finite, default=0.0) < 0 else (0.0, 0.25, 0.5, 0.75, 1.0)
    low, high = number(shares[0] * scale), number(scale)
    width = 22.0
    right = WIDTH - 6 - text_width(high, 10.5)
    left = right - width * len(shares)
    end_of_low = left - 4
    room = end_of_low - text_width(low, 10.5) - 8
    y = 0.0 if text_width(quantity, 10.5) <= room else 16.0
    parts = [element("text", quantity, x=0, y=11, class_="name")]
    for i, share in enumerate(shares):
        x = left + i * width
        sign = "neg" if share < 0 else "pos"
        opacity = 0.05 + 0.95 * abs(share)
        box = {"x": x, "y": y + 3, "width": width - 1, "height": 9}
        parts.append(element("rect", **box, class_=f"swatch {sign}", fill_opacity=opacity))
        if share < 0:
            parts.append(element("line", x1=x + 7, x2=x + width - 8, y1=y + 7.5, y2=y + 7.5, class_="minus"))
    parts.append(element("text", low, x=end_of_low, y=y + 11, class_="tick end"))
    parts.append(element("text", high, x=right + 3, y=y + 11, class_="tick"))
    return Markup("").join(parts), y + 16.0
