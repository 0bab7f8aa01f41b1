"""EAP-IG's own code reads what we write, and we read what it writes, byte for byte.

Set EAP_IG_SOURCE to the folder with EAP-IG's graph.py, and PEER_PYTHON to a Python with torch and einops, if there is
one; otherwise they are installed the first time.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from experiments.bench.peer import interpreter, run_script
from mi_jax.circuits.formats import read_eap_ig, write_eap_ig
from mi_jax.circuits.graph import Graph
from tests.circuits.formats.test_formats import edge_file, of_nodes, same

SCRIPT = Path(__file__).with_name("eap_ig_reader.py")
GRAPHS = {
    "plain": Graph(2, 3, 3, True),
    "parallel": Graph(2, 2, 2, True, True),
    "grouped": Graph(2, 4, 2, True),
}


@pytest.mark.reference
@pytest.mark.skipif("EAP_IG_SOURCE" not in os.environ, reason="EAP_IG_SOURCE names no folder with EAP-IG's graph.py")
def test_eap_ig_reads_what_we_write_and_writes_it_alike(tmp_path):
    files = {}
    for name, graph in GRAPHS.items():
        files[name] = edge_file(graph)
        files[f"{name} nodes"] = edge_file(graph, 1, **of_nodes(graph))
    for name, file in files.items():
        write_eap_ig(tmp_path / f"{name}.json", file)
    python = interpreter(SCRIPT, os.environ.get("PEER_PYTHON", ""))
    found = run_script(python, SCRIPT, f"--source={os.environ['EAP_IG_SOURCE']}", f"--folder={tmp_path}")
    assert found.keys() == files.keys()
    for name, file in files.items():
        theirs = found[name]
        wide = dataclasses.replace(file.graph, n_kv_heads=file.graph.n_heads)
        assert len(theirs["edges"]) == wide.n_edges
        group = file.graph.n_heads // file.graph.n_kv_heads
        for edge, (score, in_graph) in theirs["edges"].items():
            s, r = file.graph.index(native(edge, group))
            parts = group if edge[-2] in "kv" else 1
            assert score == pytest.approx(file.scores[s, r] / parts, rel=1e-6)
            assert in_graph == file.circuit[s, r]
        assert theirs["nodes"] == file.nodes.tolist()
        if file.neurons is None:
            assert theirs["neurons"] is None
            same(read_eap_ig(tmp_path / f"{name}.again"), file, 1e-6)
            if group == 1:
                assert (tmp_path / f"{name}.again").read_bytes() == (tmp_path / f"{name}.json").read_bytes()
        else:
            np.testing.assert_array_equal(theirs["neurons"], file.neurons)
            np.testing.assert_allclose(theirs["node_scores"], file.node_scores, rtol=1e-6)


def native(edge: str, group: int) -> str:
    """The edge of ours that theirs is part of."""
    if edge[-2] not in "kv":
        return edge
    node, _, letter = edge.partition("<")
    before, _, head = node.rpartition(".h")
    return f"{before}.h{int(head) // group}<{letter}"
