"""A run as one self-contained HTML file, in a notebook, and as a table in the terminal."""

from mi_jax.report.notebook import preview as preview
from mi_jax.report.page import write_report as write_report
from mi_jax.report.terminal import terminal_table as terminal_table
