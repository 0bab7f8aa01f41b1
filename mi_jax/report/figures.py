"""The flat `results` of a run as rows: each figure with its null, its interval and the bar it must meet."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mi_jax.report.text import is_number

_SUFFIXES = ("_null", "_ci_low", "_ci_high")
_BAR = re.compile(r"^\s*(≥|>=|≤|<=|>|<|==|=)\s*(null|[-−+]?[\d.]+(?:e[-+]?\d+)?)\s*(%?)\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Figure:
    """One figure of `results.json` beside what it is judged against.

    Attributes:
      key: dotted name, `model.ioi_accuracy`.
      value, null, low, high: the figure, its null control and its confidence interval; None where absent.
      bar: what it must meet, as written (`≥ 0.95`), or None.
      met: whether it meets the bar; None where there is no bar, or the bar is words.
    """

    key: str
    value: Any
    null: Any = None
    low: Any = None
    high: Any = None
    bar: str | None = None
    met: bool | None = None

    @property
    def group(self) -> str:
        return self.key.partition(".")[0] if "." in self.key else "run"

    @property
    def name(self) -> str:
        return self.key.partition(".")[2] or self.key


def figures(results: Mapping[str, Any], bars: Mapping[str, str] | None = None) -> list[Figure]:
    """All figures in the order of their groups' first appearance; a bar without a figure is a row without a value."""
    bars = bars or {}
    rows = []
    for key in [*results, *(key for key in bars if key not in results)]:
        if any(key.endswith(suffix) and key[: -len(suffix)] in results for suffix in _SUFFIXES):
            continue
        null, low, high = (results.get(key + suffix) for suffix in _SUFFIXES)
        value, bar = results.get(key), bars.get(key)
        rows.append(Figure(key, value, null, low, high, bar, meets(value, bar, null) if bar else None))
    order = list(dict.fromkeys(row.group for row in rows))
    return sorted(rows, key=lambda row: order.index(row.group))


def meets(value: Any, bar: str, null: Any = None) -> bool | None:
    """Whether a value meets a bar such as `≥ 0.95`, `< 20%` or `> null`; None where the bar is not of that form.

    A value that is missing or not finite meets no bar.
    """
    match = _BAR.match(bar)
    if match is None:
        return None
    relation, target, percent = match.groups()
    if target.lower() == "null":
        target = null
    else:
        target = float(target.replace("−", "-")) / (100 if percent else 1)
    if isinstance(value, bool):
        value = int(value)
    if not is_number(value) or not is_number(target):
        return False
    return {
        "≥": value >= target,
        ">=": value >= target,
        "≤": value <= target,
        "<=": value <= target,
        ">": value > target,
        "<": value < target,
    }.get(relation, value == target)
