"""A preview holds the whole page, escaped, in a frame."""

import html
import re

from mi_jax.report import preview
from mi_jax.report.page import render

GRAPH = {
    "nodes": [{"name": "input", "layer": -1, "kind": "input"}, {"name": "logits", "layer": 2, "kind": "logits"}],
    "edges": [{"from": "input", "to": "logits", "input": "logits", "score": 1.0}],
}


def test_the_frame_holds_the_page():
    data = {"circuit": {"task": 'a "task" <here>', "graph": GRAPH}}
    shown = preview(data, height=300)._repr_html_()
    source = re.fullmatch(r'<iframe srcdoc="([^"]*)" title="report" style="[^"]*height:300px[^"]*"></iframe>', shown)
    assert source is not None
    assert html.unescape(source[1]) == render(data, {})
