"""The final table: a line per family, a column per figure that is asked for."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from mi_jax.report.figures import meets
from mi_jax.report.text import number

# figure, heading, and what it must reach
ASKED = (
    ("logits_max_abs", "logits", "≤ 0.0001"),
    ("hidden_max_abs", "streams", "≤ 0.0001"),
    ("greedy_agreement", "greedy", "= 1"),
    ("bfloat16_vs_reference", "bfloat16", "≤ 1.5"),
    ("identities", "sites", "= 1"),
    ("roundtrip", "saved", "= 1"),
)
ENCODERS = ("bert", "vit")


def bars_of(families: Sequence[str]) -> dict[str, str]:
    """What every family must reach, by the names of the results; an encoder generates nothing."""
    return {
        f"family.{name}.{figure}": bar
        for name in families
        for figure, _, bar in ASKED
        if not (figure == "greedy_agreement" and name in ENCODERS)
    }


def family_table(results: Mapping[str, Any], families: Sequence[str]) -> Table:
    """All families, in 80 columns; `null` is of the logits, for the same weights under one other setting."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    table.add_column("family", no_wrap=True)
    for figure, heading, bar in ASKED:
        words = "" if bar == "= 1" else f"\n{bar}"
        table.add_column(f"{heading}{words}", justify="right", no_wrap=True)
        if figure == "logits_max_abs":
            table.add_column("null", justify="right", no_wrap=True)
    bars = bars_of(families)
    for name in families:
        cells = []
        for figure, _, _ in ASKED:
            key = f"family.{name}.{figure}"
            cells.append(_cell(results.get(key), bars.get(key)))
            if figure == "logits_max_abs":
                cells.append(Text(number(results.get(f"{key}_null")), style="dim"))
        table.add_row(name, *cells)
    return table


def _cell(value: Any, bar: str | None) -> Text:
    if bar is None:
        return Text("")
    met = meets(value, bar)
    return Text(f"{number(value)}{'✓' if met else '✗'}", style="green" if met else "red")
