"""A circuit, drawn: information flows from the tokens to the logits along edges as wide as their score."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from mi_jax.report.charts.layout import Layout, layout
from mi_jax.report.charts.svg import chart, element, title
from mi_jax.report.text import Real, is_number, number

_PILL = (42.0, 17.0)  # width and height of a node with its name inside
_DOT = (10.0, 12.0)  # the same with its name above it
_PORT = {"q": -5.0, "k": 0.0, "v": 5.0}
_FEW_EDGES = 26  # up to so many, each edge is labelled with the input it enters


def circuit_graph(graph: Mapping[str, Any], *, label: str, top: int = 50) -> Markup:
    """The `top` strongest edges and only their nodes, drawn left to right for wide and upwards for narrow pages."""
    graph = strongest(graph, top)
    if not graph["edges"]:
        return Markup("")
    places = layout(graph["nodes"], graph["edges"], reach=2)
    return Markup("").join(
        [
            _draw(graph, places, label, upwards=False, across=940.0, class_="chart graph wide"),
            _draw(graph, places, label, upwards=True, across=350.0, class_="chart graph tall"),
        ]
    )


def compare_graphs(true: Mapping[str, Any], found: Mapping[str, Any], *, name: str) -> tuple[Markup, Markup]:
    """The true and the found circuit on one layout; in the found one, each edge carries its status.

    An edge that is absent from `true` is a false positive (×); one that only `true` has is missed (dotted, ○).
    Where an edge already has a `status`, that one is kept.
    """
    truth = {_key(e): e for e in true.get("edges", []) if e.get("status") != "false_positive"}
    have = {_key(e): e for e in found.get("edges", [])}
    judged = [
        {**e, "status": e.get("status") or ("true_positive" if key in truth else "false_positive")}
        for key, e in have.items()
    ]
    judged += [{**e, "status": "missed"} for key, e in truth.items() if key not in have]
    nodes = list({n["name"]: n for g in (true, found) for n in g.get("nodes", [])}.values())
    nodes = _complete(nodes, [*truth.values(), *judged])
    touched = {end for e in judged for end in (e["from"], e["to"])}
    nodes = [n for n in nodes if n["name"] in touched]
    places = layout(nodes, judged, reach=1)
    left = {"nodes": nodes, "edges": list(truth.values())}
    right = {"nodes": nodes, "edges": judged}
    return (
        _draw(left, places, f"{name}: the true circuit", upwards=True, across=290.0, class_="chart graph"),
        _draw(right, places, f"{name}: the found circuit", upwards=True, across=290.0, class_="chart graph"),
    )


def strongest(graph: Mapping[str, Any], top: int) -> dict[str, list]:
    """The `top` edges of largest absolute score, and the nodes that they touch."""
    edges = sorted(graph.get("edges", []), key=lambda e: -abs(e["score"]) if is_number(e.get("score")) else 0.0)[:top]
    touched = {end for e in edges for end in (e["from"], e["to"])}
    nodes = _complete([n for n in graph.get("nodes", []) if n["name"] in touched], edges)
    return {"nodes": nodes, "edges": edges}


def _key(edge: Mapping[str, Any]) -> tuple[str, str, str]:
    return edge["from"], edge["to"], edge.get("input") or ""


def _complete(nodes: list, edges: Sequence[Mapping[str, Any]]) -> list:
    """Raises if an edge ends at a node that is not listed: its layer would be a guess."""
    known = {n["name"] for n in nodes}
    missing = sorted({end for e in edges for end in (e["from"], e["to"])} - known)
    if missing:
        raise ValueError(f"edges end at nodes {missing} that are not among the graph's nodes {sorted(known)}")
    return nodes


def _draw(graph, places: Layout, label: str, *, upwards: bool, across: Real, class_: str) -> Markup:
    columns, slots = len(places.columns), places.slots
    width, height = _PILL if upwards else _DOT
    if upwards:
        deep = 30.0 if columns > 8 else 46.0
        broad = max((across - 40) / slots, width + 6)
        size = (40 + broad * slots, 24 + deep * columns)
        at = {
            n: (36 + broad * (p.slot + 0.5), size[1] - 12 - deep * (p.column + 0.5)) for n, p in places.places.items()
        }
        ticks = [(0.0, size[1] - 12 - deep * (c + 0.5) + 3.5) for c in range(columns)]
    else:
        deep = max((across - 40) / max(columns - 1, 1), 21.0)
        broad = 36.0
        size = (40 + deep * (columns - 1), broad * slots + 96)
        at = {n: (20 + deep * p.column, 40 + broad * (p.slot + 0.5)) for n, p in places.places.items()}
        ticks = [(20 + deep * c, size[1] - 20) for c in range(columns)]

    parts = []
    for i, ((x, y), name) in enumerate(zip(ticks, places.columns, strict=True)):
        if i == 0 or name != places.columns[i - 1]:
            parts.append(element("text", name, x=x, y=y, class_="tick" if upwards else "tick mid"))
    scores = [abs(e["score"]) for e in graph["edges"] if is_number(e.get("score"))]
    peak = max(scores, default=0.0) or 1.0
    few = len(graph["edges"]) <= _FEW_EDGES
    for edge in sorted(graph["edges"], key=lambda e: abs(e["score"]) if is_number(e.get("score")) else 0.0):
        parts.append(_edge(edge, at[edge["from"]], at[edge["to"]], peak, (width, height), upwards=upwards, few=few))
    for node in graph["nodes"]:
        parts.append(_node(node, at[node["name"]], (width, height), inside=upwards))
    parts.append(element("text", "layer", x=0 if upwards else 10, y=10 if upwards else size[1] - 4, class_="name"))
    return chart(*size, label, *parts, class_=class_)


def _node(node: Mapping[str, Any], at: tuple[float, float], size: tuple[float, float], *, inside: bool) -> Markup:
    """A shape with its name inside, or above it where columns are too close for a shape as wide as its name."""
    (x, y), (width, height) = at, size
    name, kind = str(node["name"]), str(node.get("kind", "head"))
    radius = {"mlp": 1, "head": 5}.get(kind, 8)
    shown = name if len(name) <= 7 else name[:6] + "…"
    return element(
        "g",
        title(f"{name} ({kind}, layer {node.get('layer')})"),
        element("rect", x=x - width / 2, y=y - height / 2, width=width, height=height, rx=radius),
        element(
            "text", shown, x=x, y=y + 3.3 if inside else y - height / 2 - 3.5, class_="mid" if inside else "mid halo"
        ),
        class_=f"node {kind}" if inside else f"node {kind} dotted",
        data_node=name,
    )


def _edge(edge: Mapping[str, Any], start, end, peak: Real, size, *, upwards: bool, few: bool) -> Markup:
    width, height = size
    score = edge["score"] if is_number(edge.get("score")) else 0.0
    share = min(abs(score) / peak, 1.0)
    port = _PORT.get(str(edge.get("input") or ""), 0.0)
    if upwards:
        x1, y1, x2, y2 = start[0], start[1] - height / 2, end[0] + 1.9 * port, end[1] + height / 2
    else:
        x1, y1, x2, y2 = start[0] + width / 2, start[1], end[0] - width / 2, end[1] + 0.8 * port
    # An edge that skips columns near its own slot would run behind the nodes between, so it bows out: edges that raise
    # the answer to one side, edges that lower it to the other.
    along, aside = (abs(y2 - y1), abs(x2 - x1)) if upwards else (abs(x2 - x1), abs(y2 - y1))
    near = 60.0 if upwards else 44.0
    bow = min(24.0 + 0.1 * along, 64.0) * (1 if score < 0 else -1) if along > 64 and aside < near else 0.0
    reach = max(along * 0.45, 10.0)
    if upwards:
        c1, c2 = (x1 + bow, y1 - reach), (x2 + bow, y2 + reach)
    else:
        c1, c2 = (x1 + reach, y1 + bow), (x2 - reach, y2 + bow)
    path = f"M{x1:.1f} {y1:.1f}C{c1[0]:.1f} {c1[1]:.1f} {c2[0]:.1f} {c2[1]:.1f} {x2:.1f} {y2:.1f}"
    status = str(edge.get("status") or "")
    words = f"{edge['from']} → {edge['to']}"
    words += f" ({edge['input']})" if edge.get("input") else ""
    words += f": score {number(edge.get('score'))}" + (f", {status.replace('_', ' ')}" if status else "")
    kind = " ".join(["edge", "neg" if score < 0 else "pos", *([status] if status else [])])
    parts = [
        title(words),
        element("path", d=path, class_="reachable"),
        element("path", d=path, class_="line", stroke_width=0.9 + 4.1 * share, stroke_opacity=0.35 + 0.6 * share),
    ]
    mark = {"false_positive": "×", "missed": "○"}.get(status)
    if mark:
        mx = (x1 + 3 * c1[0] + 3 * c2[0] + x2) / 8
        my = (y1 + 3 * c1[1] + 3 * c2[1] + y2) / 8
        parts.append(element("text", mark, x=mx, y=my + 4.5, class_="status mid"))
    if few and edge.get("input") in _PORT:
        lx, ly = (x2, y2 + 10) if upwards else (x2 - 8, y2 + 3)
        parts.append(element("text", edge["input"], x=lx, y=ly, class_="port mid"))
    return element("g", *parts, class_=kind, data_ends=f"{edge['from']} {edge['to']}")
