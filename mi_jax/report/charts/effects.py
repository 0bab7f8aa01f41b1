"""All edges of an organism by their effect, those of the true circuit apart from the others."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from mi_jax.report.charts.svg import WIDTH, Scale, chart, element, extent, tick_text, title
from mi_jax.report.text import Real, is_number, number

_STEP = 7.0
_MOST_STACKED = 9


def effect_strip(edges: Sequence[Mapping[str, Any]], *, label: str, width: Real = WIDTH) -> Markup:
    """A dot for each edge; filled where it was found, hollow where it was not; true edges above, others below."""
    drawn = [e for e in edges if is_number(e.get("effect"))]
    if not drawn:
        return Markup("")
    x = Scale(*extent([e["effect"] for e in drawn], include=(0.0,), pad=0.02), 8, width - 8)
    parts, top = [], 0.0
    for in_truth, name in ((True, "in the true circuit"), (False, "not in it")):
        row = [e for e in drawn if bool(e.get("in_truth")) is in_truth]
        found = sum(bool(e.get("found")) for e in row)
        dots, tall = _stacked(row, x)
        base = top + 22 + tall
        parts.append(element("text", f"{name}: {len(row)} edges, {found} found", x=0, y=top + 12, class_="label"))
        parts.append(element("line", x1=x.start, x2=x.end, y1=base, y2=base, class_="track"))
        for edge, at, lift in dots:
            text = (
                f"{edge.get('edge')}: effect {number(edge['effect'])}, {'found' if edge.get('found') else 'not found'}"
            )
            wrong = bool(edge.get("found")) is not in_truth
            kind = f"dot {'found' if edge.get('found') else 'unfound'}{' wrong' if wrong else ''}"
            parts.append(element("circle", title(text), cx=at, cy=base - 4 - lift, r=3.2, class_=kind))
        top = base + 8
    for tick in x.ticks(5):
        parts.append(element("text", tick_text(tick), x=x(tick), y=top + 9, class_="tick mid"))
    parts.append(element("text", "effect of removing the edge", x=width / 2, y=top + 26, class_="name mid"))
    return chart(width, top + 32, label, *parts)


def _stacked(edges: Sequence[Mapping[str, Any]], x: Scale) -> tuple[list, Real]:
    """Dots that would overlap, one above the other up to a limit."""
    placed: list[tuple[Mapping[str, Any], float, float]] = []
    for edge in sorted(edges, key=lambda e: e["effect"]):
        at, level = x(edge["effect"]), 0
        taken = {lift for _, other, lift in placed if abs(other - at) < _STEP}
        while level * _STEP in taken and level < _MOST_STACKED:
            level += 1
        placed.append((edge, at, level * _STEP))
    return placed, max((lift for *_, lift in placed), default=0.0)
