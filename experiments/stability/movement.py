"""How a figure moves over runs: its least, mean and largest value, and where the extremes are."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from experiments.stability.runs import Done

_SIBLINGS = ("_null", "_ci_low", "_ci_high")


@dataclasses.dataclass(frozen=True)
class Movement:
    """One figure over the runs that have it.

    Attributes:
      low_at, high_at: the first run with the least and with the largest value.
      null: mean of the figure's null over the runs; None where it has none.
    """

    key: str
    low: float
    mean: float
    high: float
    low_at: str
    high_at: str
    runs: int
    null: float | None = None

    @property
    def moves(self) -> bool:
        return self.high > self.low


def movements(done: Sequence[Done]) -> list[Movement]:
    """Every number of the runs of each part, in the order of the results; strings and intervals are left out."""
    found = []
    keys = list(dict.fromkeys((d.run.part, key) for d in done for key in d.results))
    for part, key in keys:
        rows = [d for d in done if d.run.part == part and _is_number(d.results.get(key))]
        if not rows or any(key.endswith(s) and (part, key.removesuffix(s)) in keys for s in _SIBLINGS):
            continue
        # the parts of the pipeline overlap: what many runs have is not repeated from few
        if any(other != part and other_key == key and other == "validation" for other, other_key in keys):
            continue
        values = np.array([float(d.results[key]) for d in rows])
        nulls = [d.results[f"{key}_null"] for d in rows if _is_number(d.results.get(f"{key}_null"))]
        found.append(
            Movement(
                key,
                float(values.min()),
                float(values.mean()),
                float(values.max()),
                rows[int(values.argmin())].run.place,
                rows[int(values.argmax())].run.place,
                len(rows),
                float(np.mean(nulls)) if nulls else None,
            )
        )
    return found


def as_results(moves: Sequence[Movement]) -> dict[str, float | str | int]:
    """Flat figures, `stability.KEY.low` and so on."""
    results: dict[str, float | str | int] = {}
    for m in moves:
        results |= {f"stability.{m.key}.{name}": getattr(m, name) for name in ("low", "mean", "high", "runs")}
        if m.moves:
            results |= {f"stability.{m.key}.low_at": m.low_at, f"stability.{m.key}.high_at": m.high_at}
    return results


def _is_number(value) -> bool:
    return isinstance(value, int | float | bool)
