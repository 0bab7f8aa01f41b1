"""Sections of the report inside a notebook."""

import html
from collections.abc import Mapping
from typing import Any

from mi_jax.report.page import render


class Preview:
    """A page that a notebook shows in a frame of its own, so that neither's styles touch the other's."""

    def __init__(self, document: str, height: int):
        self.document, self.height = document, height

    def _repr_html_(self) -> str:
        source = html.escape(self.document, quote=True)
        return f'<iframe srcdoc="{source}" title="report" style="width:100%;height:{self.height}px;border:0"></iframe>'


def preview(data: Mapping[str, Any], *, height: int = 520) -> Preview:
    """Draws sections as `write_report` does; the last expression of a notebook cell shows it.

    Example: `preview({"circuit": {"task": "induction", "graph": graph.to_json(mask, scores)}})`
    """
    return Preview(render(data, {}), height)
