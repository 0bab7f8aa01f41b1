"""Signed bars: one named row for each value, from zero to the left or to the right."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from mi_jax.report.charts.svg import WIDTH, Scale, chart, element, extent, text_width, title
from mi_jax.report.text import is_number, number

_ROW = 20.0


def signed_bars(rows: Sequence[Mapping[str, Any]], *, label: str) -> Markup:
    """A bar for each `name` and `score`; a negative one has a dashed outline and stands left of zero."""
    drawn = [row for row in rows if is_number(row.get("score"))]
    if not drawn:
        return Markup("")
    names = max(text_width(str(row.get("name", ""))[:14]) for row in drawn) + 8
    x = Scale(*extent([row["score"] for row in drawn], include=(0.0,)), names, WIDTH - 46)
    parts = []
    for i, row in enumerate(drawn):
        y, score = _ROW * i, row["score"]
        left, right = sorted((x(0.0), x(score)))
        parts.append(
            element(
                "g",
                title(f"{row.get('name')}: {number(score)}"),
                element("text", str(row.get("name", ""))[:14], x=0, y=y + 14, class_="label"),
                element(
                    "rect",
                    x=left,
                    y=y + 4,
                    width=max(right - left, 0.5),
                    height=12,
                    class_="bar negative" if score < 0 else "bar",
                ),
                element("text", number(score), x=WIDTH, y=y + 14, class_="value end"),
            )
        )
    parts.append(element("line", x1=x(0.0), x2=x(0.0), y1=0, y2=_ROW * len(drawn), class_="axis"))
    return chart(WIDTH, _ROW * len(drawn) + 2, label, *parts)
