"""Attribution graphs in the JSON that circuit-tracer's and Neuronpedia's viewers read.

Node ids are `layer_latent_position` of features, `layer_-1_position` of errors, `E_token_position` of tokens and
`(layers + 1)_token_position` of logits. `feature` is one number for layer and latent of a feature (`paired`), from
which the viewer finds its examples, and −1 for errors.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mi_jax.circuits.features.graph import AttributionGraph, PrunedGraph


def graph_json(
    graph: "AttributionGraph",
    pruned: "PrunedGraph",
    node_threshold: float,
    words: Callable[[int], str],
    slug: str,
    scan: str | Sequence[str] | None,
) -> dict[str, Any]:
    """See `AttributionGraph.to_json`."""
    nodes = {int(i): _node(graph, int(i), float(pruned.cumulative[i]), words) for i in np.flatnonzero(pruned.nodes)}
    targets, sources = np.nonzero(pruned.edges)
    links = [
        {"source": nodes[s]["node_id"], "target": nodes[t]["node_id"], "weight": float(graph.adjacency[t, s])}
        for t, s in zip(targets.tolist(), sources.tolist(), strict=True)
    ]
    prompt = [words(int(token)) for token in graph.tokens]
    transcoders = [] if scan is None or isinstance(scan, str) else list(scan)
    return {
        "metadata": {
            "slug": slug,
            "scan": scan if isinstance(scan, str) else "custom" if transcoders else graph.name,
            "transcoder_list": transcoders,
            "prompt_tokens": prompt,
            "prompt": "".join(prompt),
            "node_threshold": node_threshold,
            "schema_version": 1,
        },
        "qParams": {
            "pinnedIds": [],
            "supernodes": [],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": list(nodes.values()),
        "links": links,
    }


def paired(layer: int, latent: int) -> int:
    """Cantor's pairing, `(l + f)(l + f + 1) / 2 + f`: one number for a layer and a latent."""
    return (layer + latent) * (layer + latent + 1) // 2 + latent


def _node(graph: "AttributionGraph", index: int, influence: float, words: Callable[[int], str]) -> dict[str, Any]:
    n_pos = len(graph.tokens)
    if index < graph.n_features:
        layer, pos, latent = graph.features[index].tolist()
        made = _fields(f"{layer}_{latent}_{pos}", f"{layer}_{latent}-0", paired(layer, latent), str(layer), pos)
        return made | {
            "feature_type": "cross layer transcoder",
            "influence": influence,
            "activation": float(graph.activations[index]),
        }
    if index < graph.error_nodes.stop:
        layer, pos = divmod(index - graph.n_features, n_pos)
        made = _fields(f"{layer}_-1_{pos}", f"{layer}_-1-{pos}", -1, str(layer), pos)
        return made | {"feature_type": "mlp reconstruction error", "influence": influence}
    if index < graph.token_nodes.stop:
        pos = index - graph.token_nodes.start
        token = int(graph.tokens[pos])
        made = _fields(f"E_{token}_{pos}", f"E_{token}-{pos}", pos, "E", pos)
        return made | {"feature_type": "embedding", "influence": influence}
    rank = index - graph.logit_nodes.start
    token, probability = int(graph.logit_tokens[rank]), float(graph.logit_probabilities[rank])
    layer, pos = str(graph.n_layers + 1), n_pos - 1
    made = _fields(f"{layer}_{token}_{pos}", f"L_{token}-{pos}", token, layer, pos)
    return made | {
        "feature_type": "logit",
        "token_prob": probability,
        "is_target_logit": rank == 0,
        "clerp": f'Output "{words(token)}" (p={probability:.3f})',
    }


def _fields(node_id: str, js_node_id: str, feature: int, layer: str, pos: int) -> dict[str, Any]:
    return {
        "node_id": node_id,
        "jsNodeId": js_node_id,
        "feature": feature,
        "layer": layer,
        "ctx_idx": pos,
        "feature_type": "",
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "clerp": "",
        "influence": None,
        "activation": None,
    }
