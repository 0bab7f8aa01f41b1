"""The ranking of architectures: one table, in the terminal and on the page, and one chart per setting."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from experiments.sae_synthetic.settings import SETTINGS
from mi_jax.report.text import number

NULLS = ("random_decoder", "pca", "ica", "nmf")
TRANSFORMER = "transformer"
# what is ranked: the page has all, the terminal the first two
RANKED = ("mcc", "f1", "fvu", "l0", "consistency", "amortisation_gap")


@dataclasses.dataclass(frozen=True)
class Cell:
    """A figure with its interval and its null; None where it was not measured."""

    value: float
    low: float | None
    high: float | None
    null: float | None


@dataclasses.dataclass(frozen=True)
class Ranking:
    """One figure of all architectures in all places, the best architecture first.

    Attributes:
      places: settings, and the transformer.
      rows: architecture or null, and its cells.
    """

    figure: str
    places: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]


def figure_name(method: str, place: str, figure: str) -> str:
    """A figure's name in the results."""
    return f"transformer.{method}.{figure}" if place == TRANSFORMER else f"sae_synthetic.{method}.{place}.{figure}"


def ranking(results: Mapping[str, Any], methods: Sequence[str], places: Sequence[str], figure: str = "mcc") -> Ranking:
    """The figure of every architecture everywhere; by mean MCC over the settings that are not there to fail."""

    def cell(method: str, place: str) -> Cell | None:
        name = figure_name(method, place, figure)
        if name not in results:
            return None
        low, high, null = (results.get(f"{name}_{suffix}") for suffix in ("ci_low", "ci_high", "null"))
        return Cell(results[name], low, high, null)

    order = sorted(methods, key=lambda method: -mean_over_settings(results, method, places))
    rows = tuple((m, tuple(cell(m, place) for place in places)) for m in (*order, *NULLS))
    return Ranking(figure, tuple(places), rows)


def mean_over_settings(
    results: Mapping[str, Any], method: str, places: Sequence[str], without: Sequence[str] = ()
) -> float:
    """Mean MCC over the settings of the suite in which recovery is expected, but for some."""
    chosen = [p for p in places if p in SETTINGS and SETTINGS[p].recoverable and p not in without]
    values = [results[figure_name(method, place, "mcc")] for place in chosen]
    return float(np.mean(values)) if values else 0.0


def chance(found: Ranking) -> list[float | None]:
    """The null of the first architecture in every place."""
    return [next((cell.null for _, cells in found.rows if (cell := cells[i])), None) for i in range(len(found.places))]


def terminal_ranking(found: Ranking, facts: Mapping[str, str]) -> Table:
    """The ranking in 80 columns, the best architecture of every place in bold; intervals are on the page."""
    table = Table(title=found.figure.upper(), box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for place in found.places:
        table.add_column(f"{place}\n{facts.get(place, '')}", justify="right", no_wrap=True)
    best = [
        max((cell.value for name, cells in found.rows if name not in NULLS and (cell := cells[i])), default=None)
        for i in range(len(found.places))
    ]
    for name, cells in found.rows:
        drawn = [
            Text("") if cell is None else Text(number(cell.value), style="bold" if cell.value == best[i] else "")
            for i, cell in enumerate(cells)
        ]
        table.add_row(Text(name, style="dim" if name in NULLS else ""), *drawn)
    nulls = (Text("" if null is None else number(null), style="dim") for null in chance(found))
    table.add_row(Text("chance", style="dim"), *nulls)
    return table
