"""A circuit as nodes and edges for drawing (`mi_jax.report`)."""

import typing
from typing import Any

import numpy as np

if typing.TYPE_CHECKING:
    from mi_jax.circuits.graph.graph import Graph


def circuit_json(graph: "Graph", mask: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """Nodes and edges of a circuit, for drawing: `{"nodes": [...], "edges": [...]}`.

    Scores are positive where an edge supports the metric, as `edge_scores` are. A key or value that a group of
    heads shares is drawn into every head of the group that the circuit has, what a mixture reads into every expert.
    """
    found = np.argwhere(mask & graph.edges)
    present = {graph.sources[s] for s, _ in found}
    edges = []
    for s, r in found:
        reader, _, letter = graph.readers[r].rstrip(">").partition("<")
        kind = letter or ("logits" if reader == "logits" else "mlp")
        for target in _drawn_into(graph, reader, letter, present):
            edges.append({"from": graph.sources[s], "to": target, "input": kind, "score": float(scores[s, r])})
    names = dict.fromkeys(["input", *(e["from"] for e in edges), *(e["to"] for e in edges), "logits"])
    return {"nodes": [_node(graph, name) for name in names], "edges": edges}


def _drawn_into(graph: "Graph", reader: str, letter: str, present: set[str]) -> list[str]:
    """The sources that a reader is part of, those of the circuit if there are any."""
    if letter in ("k", "v"):
        layer, _, shared = reader[1:].partition(".h")
        group = graph.n_heads // graph.n_kv_heads
        parts = [f"a{layer}.h{int(shared) * group + i}" for i in range(group)]
    elif reader[0] == "m" and graph.n_experts:
        parts = [f"{reader}.e{i}" for i in range(graph.n_experts)]
    else:
        return [reader]
    return [part for part in parts if part in present] or parts[:1]


def _node(graph: "Graph", name: str) -> dict[str, Any]:
    if name in ("input", "logits"):
        return {"name": name, "layer": -1 if name == "input" else graph.n_layers, "kind": name}
    kind = "head" if name[0] == "a" else "expert" if ".e" in name else "mlp"
    return {"name": name, "layer": int(name[1:].partition(".")[0]), "kind": kind}
