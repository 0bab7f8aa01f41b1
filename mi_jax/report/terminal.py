"""The final table of a run, for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from mi_jax.report.figures import figures
from mi_jax.report.text import interval, number


def terminal_table(results: Mapping[str, Any], bars: Mapping[str, str] | None = None) -> Table:
    """All figures of a run, each beside its null, its interval and the bar it must meet, as far as there are any.

    Args:
      results: flat, dotted names to numbers, strings or booleans; `_null`, `_ci_low` and `_ci_high` are siblings.
      bars: key to bar, for example `{"model.ioi_accuracy": "≥ 0.95"}`. A bar of the form relation and number (or
        `null`) is checked and marked ✓ or ✗; a bar in other words is shown as it is.

    Example:
      >>> from rich.console import Console
      >>> Console().print(terminal_table({"monitor.auroc": 0.99, "monitor.auroc_null": 0.5}))  # doctest: +SKIP
    """
    rows = figures(results, bars)
    with_null = any(row.null is not None for row in rows)
    with_interval = any(interval(row.low, row.high) for row in rows)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("figure", no_wrap=True)
    for column, there in (("value", True), ("null", with_null), ("95% interval", with_interval)):
        if there:
            table.add_column(column, justify="right", no_wrap=True)
    if bars:
        table.add_column("bar", no_wrap=True)
    group = None
    for row in rows:
        if row.group != group:
            group = row.group
            table.add_row(Text(group, style="bold"), end_section=False)
        cells = [Text(f"  {row.name}"), Text(number(row.value), style="bold")]
        if with_null:
            cells.append(Text("" if row.null is None else number(row.null), style="dim"))
        if with_interval:
            cells.append(Text(interval(row.low, row.high), style="dim"))
        if bars:
            mark = "  " if row.met is None else "✓ " if row.met else "✗ "
            style = "" if row.met is None else "green" if row.met else "red"
            cells.append(Text(mark + row.bar if row.bar else "", style=style))
        table.add_row(*cells)
    return table
