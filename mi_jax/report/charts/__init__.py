"""Charts as functions from plain data to SVG text.

Colours come from the page's style sheet, so one SVG serves light and dark; every mark carries its value as a title.
"""

from mi_jax.report.charts.bars import signed_bars
from mi_jax.report.charts.effects import effect_strip
from mi_jax.report.charts.graph import circuit_graph, compare_graphs
from mi_jax.report.charts.heatmap import heatmap
from mi_jax.report.charts.histogram import count_integers, histogram
from mi_jax.report.charts.intervals import interval_chart
from mi_jax.report.charts.lines import Series, line_chart
from mi_jax.report.charts.strip import token_strip

__all__ = [
    "Series",
    "circuit_graph",
    "compare_graphs",
    "count_integers",
    "effect_strip",
    "heatmap",
    "histogram",
    "interval_chart",
    "line_chart",
    "signed_bars",
    "token_strip",
]
