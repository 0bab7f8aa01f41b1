# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "transformer-lens==2.18.0", "auto-circuit==1.0.1", "transformers<5", "pyarrow<22",
#   "safetensors>=0.5"
# ]
# ///
"""ACDC at one threshold with auto-circuit, timed.

    python acdc_reference.py --threshold 0.01 [--order NAMES.json] [--arrays FILE.safetensors] [--threads 2]

auto-circuit visits the edges into one layer in the order of a Python set, another one in every process, and what is
kept depends on it. NAMES.json lists all edges in an order that goes back through the layers; with it, both programs
visit the same edges one after the other. One JSON object is printed: seconds, and the names of the edges that are kept.
"""
# pyright: reportMissingImports=false, reportPrivateImportUsage=false

import json
import math
import time
from pathlib import Path

import torch
from auto_circuit.prune_algos.ACDC import acdc_prune_scores
from edge_scores_auto_circuit import edge_name, patchable
from edge_scores_peer import command_line, given, report


def main() -> None:
    """Times what the module's docstring names."""
    parser = command_line("Times ACDC as auto-circuit has it.")
    parser.add_argument("--threshold", type=float, required=True)
    parser.add_argument("--order", help="JSON file with the names of all edges")
    arguments = parser.parse_args()
    arrays, clean, corrupt = given(arguments)
    with torch.no_grad():
        model, loader = patchable(arrays, clean, corrupt)
    edges = {edge_name(edge): edge for edge in model.edges}
    if arguments.order:
        # its sort by layer leaves edges of one layer as they are
        model.edges = [edges[name] for name in json.loads(Path(arguments.order).read_text())]
    taken, kept = [], []
    for _ in range(arguments.repeats):
        start = time.perf_counter()
        # the thresholds it tries are bases times powers of ten
        found = acdc_prune_scores(model, loader, None, tao_exps=[0], tao_bases=[arguments.threshold])
        taken.append(time.perf_counter() - start)
        # an edge that was never removed has an infinite score
        kept = [name for name, edge in edges.items() if math.isinf(edge.prune_score(found).item())]
    report(("auto-circuit", "transformer-lens"), seconds=taken, kept=kept)


if __name__ == "__main__":
    main()
