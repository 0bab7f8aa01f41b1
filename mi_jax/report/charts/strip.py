"""Token strips: a stream of tokens under the line of its score."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from mi_jax.report.charts.svg import element, extent
from mi_jax.report.text import Real, is_number, number, visible

_EVENTS = (("trigger", "▲", "trigger"), ("alarm", "●", "alarm"), ("forbidden", "■", "forbidden"))


def token_strip(stream: Mapping[str, Any], threshold: Any = None, *, limits: tuple[Real, Real] | None = None) -> Markup:
    """Each token stands under a column as high as its score; the dashed line is the threshold.

    The columns are part of the text, so the strip wraps like text on any width. Trigger, alarm and forbidden token
    carry a sign below them.

    Args:
      stream: `tokens`, `scores`, and the indices `alarm`, `trigger`, `forbidden`, each an int or None.
      threshold: the score above which the monitor raises an alarm.
      limits: the scores at the foot and at the top of the columns; those of this stream where absent.
    """
    tokens, scores = stream.get("tokens", []), stream.get("scores", [])
    low, high = limits or extent(scores, include=(0.0, threshold))
    share = _share(threshold, low, high) if is_number(threshold) else None
    cells = []
    for i, token in enumerate(tokens):
        score = scores[i] if i < len(scores) else None
        events = [(sign, word) for key, sign, word in _EVENTS if stream.get(key) == i]
        above = is_number(score) and is_number(threshold) and score >= threshold
        kind = " ".join(["tk", *(["over"] if above else []), *(word for _, word in events)])
        tip = f"{i}: {visible(token)} · score {number(score)}" + "".join(f" · {word}" for _, word in events)
        marks = [element("em", "".join(sign for sign, _ in events))] if events else []
        cells.append(
            element(
                "span",
                visible(token),
                *marks,
                class_=kind,
                style=f"--s:{_share(score, low, high):.3f}",
                data_tip=tip,
            )
        )
    style = None if share is None else f"--th:{share:.3f}"
    return element("div", *cells, class_="strip" if share is not None else "strip bare", style=style)


def _share(score: Any, low: Real, high: Real) -> Real:
    return min(max((score - low) / (high - low), 0.0), 1.0) if is_number(score) and high > low else 0.0
