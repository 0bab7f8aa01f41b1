# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformer-lens==4.3.0", "safetensors>=0.5", "numpy>=2.0"]
# ///
"""Scores of all edges with TransformerLens' own attribution patching, timed.

    python edge_scores_transformer_lens.py --method=eap [--arrays FILE.safetensors] [--repeats 1] [--threads 2]

It has no integrated gradients. Its gradient is that of the corrupt run, one prompt at a time, and a score is positive
where the clean value raises the metric. Its edges have positions; their scores are added up outside the time. Only the
table of positions has a gradient, which its backward pass needs to start from. One JSON object is printed.
"""
# pyright: reportMissingImports=false, reportPrivateImportUsage=false

import argparse
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import edge_scores_peer
import torch
from edge_scores_peer import difference
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch
from transformer_lens_sweep import Arrays, bridge

Edges = Mapping[tuple[Any, Any], float]


def model_and_prompts(arrays: Arrays, clean: torch.Tensor, corrupt: torch.Tensor) -> tuple[Any, ...]:
    """The model, frozen but for its positions, and the prompts."""
    model = bridge(arrays)
    for name, parameter in model.original_model.named_parameters():
        parameter.requires_grad_(name.startswith("pos."))
    return model, clean, corrupt


def score(made: tuple[Any, ...], arguments: argparse.Namespace) -> Edges:
    if arguments.method != "eap":
        raise SystemExit("TransformerLens 4.3 has no integrated gradients for edges; there is --method=eap")
    config = EdgeAttributionConfig(granularity="edge")
    return attribution_patch(*made, lambda logits: difference(logits).sum(), config).edge_scores


def named(made: tuple[Any, ...], found: Edges) -> dict[str, float]:
    """Sums over positions."""
    out: dict[str, float] = defaultdict(float)
    for (source, reader), value in found.items():
        out[f"{_node(source)}->{_node(reader)}"] += value
    return out


def _node(node: Any) -> str:
    if node.kind in ("embed", "logits"):
        return "input" if node.kind == "embed" else "logits"
    if node.kind in ("mlp_in", "mlp_out"):
        return f"m{node.layer}"
    letter = "" if node.kind == "attn_head_out" else f"<{node.kind[0]}>"
    return f"a{node.layer}.h{node.head}{letter}"


if __name__ == "__main__":
    edge_scores_peer.main(model_and_prompts, score, named, packages=("transformer-lens",))
