"""The final table of a run, for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from mi_jax.report.figures import figures
from mi_jax.report.text import interval, number


def terminal_table(results: Mapping[str, Any], bars: Mapping[str, str] | None = None) -> Table:
    """All figures of a run, each beside its null, its interval and the bar it must meet.

    Args:
      results: flat, dotted names to numbers, strings or booleans; `_null`, `_ci_low` and `_ci_high` are siblings.
      bars: key to bar, for example `{"model.ioi_accuracy": "≥ 0.95"}`. A bar of the form relation and number (or
        `null`) is checked and marked ✓ or ✗; a bar in other words is shown as it is.

    Example:
      >>> from rich.console import Console
      >>> Console().print(terminal_table({"monitor.auroc": 0.99, "monitor.auroc_null": 0.5}))  # doctest: +SKIP
    """
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("figure", no_wrap=True)
    for column in ("value", "null", "95% interval"):
        table.add_column(column, justify="right", no_wrap=True)
    if bars:
        table.add_column("bar", no_wrap=True)
    group = None
    for row in figures(results, bars):
        if row.group != group:
            group = row.group
            table.add_row(Text(group, style="bold"), end_section=False)
        cells = [
            Text(f"  {row.name}"),
            Text(number(row.value), style="bold"),
            Text("" if row.null is None else number(row.null), style="dim"),
            Text(interval(row.low, row.high), style="dim"),
        ]
        if bars:
            mark = "  " if row.met is None else "✓ " if row.met else "✗ "
            style = "" if row.met is None else "green" if row.met else "red"
            cells.append(Text(mark + row.bar if row.bar else "", style=style))
        table.add_row(*cells)
    return table
