"""Histograms."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from mi_jax.report.charts.svg import WIDTH, Scale, axes, chart, element, title
from mi_jax.report.text import Real, is_number, number

_MOST_BINS = 40


def histogram(
    edges: Sequence[Real], counts: Sequence[Real | None], *, label: str, x_label: str, y_label: str
) -> Markup:
    """Bars between consecutive edges.

    Raises:
      ValueError: there is not one edge more than there are counts, or an edge is not finite.
    """
    if len(edges) != len(counts) + 1:
        raise ValueError(f"a histogram of {len(counts)} counts needs {len(counts) + 1} edges, got {len(edges)}")
    if not all(is_number(edge) for edge in edges):
        raise ValueError(f"the edges of a histogram must be finite numbers, got {edges}")
    if not counts:
        return Markup("")
    height = 230.0
    x = Scale(float(edges[0]), float(edges[-1]), 40, WIDTH - 8)
    y = Scale(0.0, float(max([c for c in counts if is_number(c)], default=1)) or 1.0, height - 38, 30)
    parts = [axes(x, y, x_label, y_label)]
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if not is_number(count):
            continue
        text = title(f"{number(low)} to {number(high)}: {number(count)}")
        width = max(x(high) - x(low) - 1, 0.5)
        parts.append(
            element("rect", text, x=x(low) + 0.5, y=y(count), width=width, height=y.start - y(count), class_="bar")
        )
    return chart(WIDTH, height, label, *parts)


def count_integers(values: Sequence[Any]) -> tuple[list[Real], list[int]]:
    """Edges and counts of bins centred on whole numbers, a bin for each until there are more than 40."""
    whole = [round(v) for v in values if is_number(v)]
    if not whole:
        return [], []
    # zero is always there: it parts early from late, and a single value does not fill the axis
    first, last = min(*whole, 0), max(*whole, 0)
    width = math.ceil((last - first + 1) / _MOST_BINS)
    bins = math.ceil((last - first + 1) / width)
    tally = Counter((v - first) // width for v in whole)
    return [first - 0.5 + i * width for i in range(bins + 1)], [tally[i] for i in range(bins)]
