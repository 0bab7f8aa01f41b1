# /// script
# dependencies = ["torch", "einops", "numpy"]
# ///
"""Reads graphs with EAP-IG's own `graph.py` and prints what it found; writes them again with its own `to_json`.

TransformerLens and matplotlib, which that module imports for names of types and for drawing, are not needed here.
"""

import argparse
import importlib.util
import json
import sys
import types
from pathlib import Path


def graph_class(source: Path):
    package = types.ModuleType("eap")
    package.__path__ = [str(source)]  # type: ignore[attr-defined]
    stand_ins = {
        "eap": package,
        "transformer_lens": types.ModuleType("transformer_lens"),
        "eap.visualization": types.ModuleType("eap.visualization"),
    }
    for name in ("HookedTransformer", "HookedTransformerConfig"):
        setattr(stand_ins["transformer_lens"], name, type(name, (), {}))
    for name in ("get_color", "generate_random_color"):
        setattr(stand_ins["eap.visualization"], name, None)
    sys.modules |= stand_ins
    spec = importlib.util.spec_from_file_location("eap.graph", source / "graph.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["eap.graph"] = module
    spec.loader.exec_module(module)
    return module.Graph


parser = argparse.ArgumentParser()
parser.add_argument("--source", type=Path, help="folder that holds EAP-IG's graph.py")
parser.add_argument("--folder", type=Path, help="*.json is read, *.again is written")
arguments = parser.parse_args()
Graph = graph_class(arguments.source)
found = {}
for path in sorted(arguments.folder.glob("*.json")):
    graph = Graph.from_json(str(path))
    neurons = None if graph.neurons_in_graph is None else graph.neurons_in_graph.bool().tolist()
    found[path.stem] = {
        "edges": {name: [edge.score.item(), bool(edge.in_graph)] for name, edge in graph.edges.items()},
        "nodes": graph.nodes_in_graph.bool().tolist(),
        "node_scores": None if graph.nodes_scores is None else graph.nodes_scores.tolist(),
        "neurons": neurons,
    }
    if neurons is None:
        graph.to_json(str(path.with_suffix(".again")))
print(json.dumps(found))
