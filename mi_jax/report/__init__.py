"""A run as one self-contained HTML file, and as a table in the terminal."""

from mi_jax.report.page import write_report
from mi_jax.report.terminal import terminal_table

__all__ = ["terminal_table", "write_report"]
