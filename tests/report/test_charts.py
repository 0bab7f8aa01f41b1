"""Drawings against the data they were drawn from."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mi_jax.report import charts
from mi_jax.report.charts.layout import layout
from mi_jax.report.charts.svg import Scale, tick_text
from mi_jax.report.text import number


def drawn(markup):
    """The drawings as one tree; raises where the markup is not well-formed XML."""
    return ElementTree.fromstring(f"<all>{markup}</all>")


def by_class(tree, name):
    return [e for e in tree.iter() if name in e.get("class", "").split()]


def titles(elements):
    return [e.find("title").text for e in elements]


def test_heatmap_has_a_titled_cell_for_each_value():
    values = [[0.1, -0.8, 0.0], [0.4, 0.8, float("nan")]]
    tree = drawn(charts.heatmap(values, layers=[3, 4], positions=["<bos>", " a", "\n"], label="l", quantity="effect"))
    cells = by_class(tree, "cell")
    assert titles(cells) == [
        f"layer {layer}, position {p}: {number(v)}"
        for layer, row in zip((3, 4), values, strict=True)
        for p, v in zip(("<bos>", "·a", "⏎"), row, strict=True)
    ]
    assert [c.get("class") for c in cells] == [
        "cell pos",
        "cell neg",
        "cell pos",
        "cell pos",
        "cell pos",
        "cell absent",
    ]
    opacity = [float(c.get("fill-opacity")) for c in cells[:5]]
    assert opacity[1] == opacity[4] == 1.0
    assert opacity[2] == min(opacity)
    assert float(cells[3].get("y")) < float(cells[0].get("y")), "later layers stand higher"
    assert len(by_class(tree, "peak")) == 1


def test_heatmap_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match="2 layers by 2 positions got 1 rows of"):
        charts.heatmap([[1.0, 2.0]], layers=[0, 1], positions=["a", "b"], label="l", quantity="q")


def test_line_chart_places_points_by_value():
    s = charts.Series("loss", [0, 5, 10], [4.0, 2.0, 0.0])
    tree = drawn(charts.line_chart([s], label="l", x_label="step", y_label="y"))
    points = by_class(tree, "hit")
    assert titles(points)[1] == "loss: 2.00 at step 5"
    x, y = ([float(p.get(axis)) for p in points] for axis in ("cx", "cy"))
    assert x[1] == pytest.approx((x[0] + x[2]) / 2)
    assert y[1] == pytest.approx((y[0] + y[2]) / 2)
    assert x[0] < x[2]
    assert y[0] < y[2]


def test_line_is_interrupted_where_a_value_is_missing():
    s = charts.Series("loss", [0, 1, 2, 3, 4], [1.0, 2.0, None, 3.0, 4.0])
    path = by_class(drawn(charts.line_chart([s], label="l", x_label="x", y_label="y")), "s0")[0].get("d")
    assert path.count("M") == 2
    assert path.count("L") == 2


def test_series_of_unequal_lengths_is_an_error():
    with pytest.raises(ValueError, match="series 'loss' has 2 x values and 1 y values"):
        charts.line_chart([charts.Series("loss", [0, 1], [1.0])], label="l", x_label="x", y_label="y")


def test_histogram_bars_are_as_high_as_counts():
    tree = drawn(charts.histogram([0, 1, 2, 3], [1, 4, 2], label="l", x_label="x", y_label="y"))
    heights = [float(b.get("height")) for b in by_class(tree, "bar")]
    assert heights[1] == pytest.approx(4 * heights[0], rel=0.01) == pytest.approx(2 * heights[2], rel=0.01)


@given(st.lists(st.integers(-300, 300), min_size=1, max_size=60))
def test_integer_counts_lose_none(values):
    edges, counts = charts.count_integers(values)
    assert len(edges) == len(counts) + 1 <= 41
    assert sum(counts) == len(values)
    assert counts[0] == sum(edges[0] < v < edges[1] for v in values)
    assert edges[0] < min(values)
    assert max(values) < edges[-1]


def test_interval_chart_shows_value_interval_and_null():
    rows = [{"name": "probe", "value": 0.9, "low": 0.8, "high": 1.0, "null": 0.5}, {"name": "other", "value": None}]
    tree = drawn(charts.interval_chart(rows, label="l"))
    assert "".join(by_class(tree, "value")[0].itertext()) == "0.900 [0.800, 1.00] · null 0.500"
    (bar,), (point,) = by_class(tree, "ci"), by_class(tree, "point")
    left = float(bar.get("x"))
    assert float(point.get("cx")) == pytest.approx(left + float(bar.get("width")) / 2, abs=0.02)
    assert len(by_class(tree, "nullmark")) == 1


def test_effect_strip_counts_and_marks_mistakes():
    edges = [
        {"edge": f"e{i}", "effect": i / 4, "in_truth": truth, "found": found}
        for i, (truth, found) in enumerate([(True, True), (True, False), (False, False), (False, True)])
    ]
    tree = drawn(charts.effect_strip(edges, label="l"))
    assert len(by_class(tree, "dot")) == 4
    assert titles(by_class(tree, "wrong")) == ["e1: effect 0.250, not found", "e3: effect 0.750, found"]
    assert "in the true circuit: 2 edges, 1 found" in "".join(tree.itertext())


def test_bars_of_negative_scores_stand_left_of_zero():
    rows = [{"name": "a1.h2", "score": 0.5}, {"name": "a3.h0", "score": -0.25}]
    up, down = (e for e in drawn(charts.signed_bars(rows, label="l")).iter("rect"))
    assert float(down.get("x")) + float(down.get("width")) == pytest.approx(float(up.get("x")), abs=0.02)
    assert float(up.get("width")) == pytest.approx(2 * float(down.get("width")), abs=0.03)


def test_strip_marks_events_and_scores_above_the_threshold():
    stream = {"tokens": [" a", "<b>", "\n"], "scores": [0.0, 0.6, 1.0], "trigger": 0, "alarm": 1, "forbidden": 2}
    tree = drawn(charts.token_strip(stream, 0.5))
    cells = by_class(tree, "tk")
    assert [c.get("class") for c in cells] == ["tk trigger", "tk over alarm", "tk over forbidden"]
    assert [c.text for c in cells] == ["·a", "<b>", "⏎"]
    assert [c.get("style") for c in cells] == ["--s:0.000", "--s:0.600", "--s:1.000"]
    assert cells[1].get("data-tip") == "1: <b> · score 0.600 · alarm"


NODES = [
    {"name": "input", "layer": -1, "kind": "input"},
    {"name": "a0.h1", "layer": 0, "kind": "head"},
    {"name": "m0", "layer": 0, "kind": "mlp"},
    {"name": "a1.h0", "layer": 1, "kind": "head"},
    {"name": "logits", "layer": 2, "kind": "logits"},
]


def edge(start, end, kind, score):
    return {"from": start, "to": end, "input": kind, "score": score}


TRUE = [edge("input", "a0.h1", "v", 1.0), edge("a0.h1", "a1.h0", "k", 0.8), edge("a1.h0", "logits", "logits", 0.9)]
FOUND = [*TRUE[:2], edge("m0", "a1.h0", "q", -0.2)]


def test_circuit_draws_the_strongest_edges_and_only_their_nodes():
    edges = [*TRUE, edge("m0", "a1.h0", "q", -0.05)]
    tree = drawn(charts.circuit_graph({"nodes": NODES, "edges": edges}, label="l", top=3))
    wide, tall = tree
    for drawing in (wide, tall):
        assert {n.get("data-node") for n in by_class(drawing, "node")} == {"input", "a0.h1", "a1.h0", "logits"}
        assert titles(by_class(drawing, "edge"))[-1] == "input → a0.h1 (v): score 1.00"
        widths = [float(line.get("stroke-width")) for line in by_class(drawing, "line")]
        assert widths == sorted(widths)
        assert len(widths) == 3


def test_comparison_marks_each_edge_once():
    true, found = charts.compare_graphs({"nodes": NODES, "edges": TRUE}, {"nodes": NODES, "edges": FOUND}, name="n")
    assert len(by_class(drawn(true), "edge")) == 3
    tree = drawn(found)
    assert len(by_class(tree, "true_positive")) == 2
    assert titles(by_class(tree, "false_positive")) == ["m0 → a1.h0 (q): score −0.200, false positive"]
    assert titles(by_class(tree, "missed")) == ["a1.h0 → logits (logits): score 0.900, missed"]
    assert [e.text for e in by_class(tree, "status")] == ["×", "○"]
    at = [
        {n.get("data-node"): n.find("rect").get("x") for n in by_class(drawn(side), "node")} for side in (true, found)
    ]
    assert at[0] == at[1], "both sides share one layout"


def test_edge_to_an_unlisted_node_is_an_error():
    with pytest.raises(ValueError, match=r"nodes \['a9.h9'\] that are not among"):
        charts.circuit_graph({"nodes": NODES, "edges": [edge("input", "a9.h9", "q", 1.0)]}, label="l")


@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 3), st.randoms())
def test_layout_never_puts_two_nodes_in_one_place(layers, heads, reach, rng):
    nodes = [NODES[0], {**NODES[-1], "layer": layers}]
    nodes += [{"name": f"a{i}.h{h}", "layer": i, "kind": "head"} for i in range(layers) for h in range(heads)]
    edges = [edge("input", rng.choice(nodes[1:])["name"], "q", 1.0) for _ in range(8)]
    places = layout(nodes, edges, reach=reach).places
    inner = [p for name, p in places.items() if name not in ("input", "logits")]
    for a in inner:
        clash = [b for b in inner if b is not a and b.slot == a.slot and abs(b.column - a.column) < reach]
        assert not clash
    assert places["input"].column == 0
    assert places["logits"].column == max(p.column for p in places.values())


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_round_and_inside_the_scale(low, span):
    scale = Scale(low, low + span, 0, 100)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 11
    assert all(low - 1e-6 * span <= t <= low + span + 1e-6 * span for t in ticks)
    assert all(
        re.fullmatch(r"−?[\d.]+(×10[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+)?|10[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+|0|−?[\d.]+e[+−]\d+", tick_text(t)) for t in ticks
    )
