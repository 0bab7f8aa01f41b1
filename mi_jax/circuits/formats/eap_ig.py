"""EAP-IG's graph as JSON, which is also what the circuit track of MIB takes: `{cfg, nodes, edges}`.

The format knows one query, key and value for every head. Where heads share a key or value, each gets an equal part of
the score of the shared one, and on reading the parts are added up: an attribution is a sum over the heads that read.
Such a file says `n_kv_heads` in its `cfg`, which EAP-IG ignores. Its rule for nodes that lead nowhere is weaker than
`Graph.prune`: there a head that only its query reaches stays.

Coordinates ("neurons") of a head stand in the file as those of all heads of the layer, since that is what EAP-IG reads.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from etils import epath

from mi_jax.circuits.formats.edge_file import Dangling, EdgeFile, check_model
from mi_jax.circuits.graph import Graph
from mi_jax.core.errors import InputError
from mi_jax.models.config import DecoderConfig
from mi_jax.run.files import write_bytes

Shared = Literal["same", "any", "all"]


def write_eap_ig(path: str | os.PathLike, file: EdgeFile, *, dangling: Dangling = "keep") -> None:
    """Writes scores and circuit for EAP-IG and MIB.

    Args:
      dangling: "prune" leaves edges that lead nowhere out of the circuit; their scores stay.

    Raises:
      InputError: a mixture of experts, for which the format has no nodes.
    """
    graph = file.graph
    if graph.n_experts:
        raise InputError(f"{path}: EAP-IG's format has one node for an MLP and none for experts; write .safetensors")
    file = file.without_dangling(dangling)
    wide = dataclasses.replace(graph, n_kv_heads=graph.n_heads)
    native = _native_readers(graph, wide)
    parts = np.bincount(native)[native]
    scores = file.scores[:, native] / parts[None, :].astype(file.scores.dtype)
    circuit = file.circuit[:, native]
    config: dict[str, Any] = {"n_layers": graph.n_layers, "n_heads": graph.n_heads}
    config |= {"parallel_attn_mlp": graph.parallel, "d_model": file.d_model}
    if graph.n_kv_heads != graph.n_heads:
        config["n_kv_heads"] = graph.n_kv_heads
    places = {name: i for i, name in enumerate(graph.sources)}
    kept = file.nodes
    nodes = {name: _node(file, i, bool(kept[i])) for name, i in places.items()} | {"logits": {"in_graph": True}}
    edges = {}
    for source, reader in _edges(wide):
        s, r = places[source], wide.readers.index(reader)
        edges[f"{source}->{reader}"] = {"score": float(scores[s, r]), "in_graph": bool(circuit[s, r])}
    write_bytes(epath.Path(path), json.dumps({"cfg": config, "nodes": nodes, "edges": edges}).encode())


def read_eap_ig(
    path: str | os.PathLike,
    config: DecoderConfig | None = None,
    *,
    shared: Shared = "same",
    dangling: Dangling = "keep",
) -> EdgeFile:
    """Reads a file of EAP-IG, of MIB or of `write_eap_ig`. Edges that it does not mention have score 0.

    Args:
      config: of the model that it should be for. Without it, every head has its own key and value unless the file says
        otherwise.
      shared: an edge to a shared key or value is in the circuit if it is for "any" of the heads, or for "all"; "same"
        insists that they agree.
      dangling: "prune" drops edges of the circuit that lead nowhere.

    Raises:
      InputError: not such a file, one for another model, or heads that share a key and disagree.
    """
    name = os.fspath(path)
    cfg, nodes, edges = _sections(name)
    if config is not None:
        found = {
            key: cfg[key] for key in ("n_layers", "n_heads", "n_kv_heads", "d_model", "parallel_attn_mlp") if key in cfg
        }
        check_model(name, found | {"has_mlp": "m0" in nodes, "n_experts": 0}, config)
    n_kv_heads = cfg.get("n_kv_heads", cfg["n_heads"]) if config is None else config.n_kv_heads
    graph = Graph(cfg["n_layers"], cfg["n_heads"], n_kv_heads, "m0" in nodes, cfg["parallel_attn_mlp"])
    wide = dataclasses.replace(graph, n_kv_heads=graph.n_heads)
    scores, circuit = np.zeros(wide.edges.shape), np.zeros(wide.edges.shape, bool)
    try:
        for edge, info in edges.items():
            place = wide.index(edge)
            scores[place], circuit[place] = float(info["score"]), bool(info["in_graph"])
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{name}: edge {edge!r} has no score and in_graph ({error!r})") from error
    native = _native_readers(graph, wide)
    together = np.zeros((graph.n_sources, graph.n_readers))
    np.add.at(together.T, native, scores.T)
    return EdgeFile(
        graph,
        scores=together,
        circuit=_agreed(name, circuit, native, graph, shared),
        d_model=cfg["d_model"],
        **_of_nodes(name, nodes, graph, cfg["d_model"]),
    ).without_dangling(dangling)


def _edges(graph: Graph) -> Iterator[tuple[str, str]]:
    """All edges in the order of the format: by layer, source, head and letter."""
    stream = ["input"]
    for layer in range(graph.n_layers):
        heads = [f"a{layer}.h{h}" for h in range(graph.n_heads)]
        mlp = [f"m{layer}"] * graph.has_mlp
        for source in stream:
            yield from ((source, f"{head}<{letter}>") for head in heads for letter in "qkv")
            if graph.parallel:
                yield from ((source, reader) for reader in mlp)
        stream += heads
        if not graph.parallel:
            yield from ((source, reader) for source in stream for reader in mlp)
        stream += mlp
    yield from ((source, "logits") for source in stream)


def _native_readers(graph: Graph, wide: Graph) -> np.ndarray:
    """For every reader of the graph in which no heads share, the reader of ours that it is part of."""
    group = graph.n_heads // graph.n_kv_heads
    found = {name: i for i, name in enumerate(graph.readers)}
    rows = []
    for reader in wide.readers:
        node, _, letter = reader.rstrip(">").partition("<")
        if letter in ("k", "v"):
            layer, _, head = node.partition(".h")
            reader = f"{layer}.h{int(head) // group}<{letter}>"
        rows.append(found[reader])
    return np.array(rows)


def _agreed(name: str, circuit: np.ndarray, native: np.ndarray, graph: Graph, shared: Shared) -> np.ndarray:
    """The circuit on our readers, of which each stands for one or several of the file's."""
    if shared not in ("same", "any", "all"):
        raise InputError(f"shared={shared!r}; there are 'same', 'any' and 'all'")
    votes = np.zeros((graph.n_sources, graph.n_readers), int)
    np.add.at(votes.T, native, circuit.T.astype(int))
    parts = np.bincount(native)[None, :]
    split = (votes > 0) & (votes < parts)
    if shared == "same" and split.any():
        s, r = np.argwhere(split)[0]
        raise InputError(
            f"{name}: {graph.names(split)[0]!r} is an input that {parts[0, r]} heads share, and the file has it for "
            f"{votes[s, r]} of them ({int(split.sum())} edges are so); say shared='any' or shared='all'"
        )
    return votes == parts if shared == "all" else votes > 0


def _node(file: EdgeFile, i: int, in_graph: bool) -> dict[str, Any]:
    node: dict[str, Any] = {"in_graph": in_graph}
    if file.node_scores is not None:
        node["score"] = float(file.node_scores[i])
    name = file.graph.sources[i]
    first = i - int(name.partition(".h")[2] or 0)
    rows = slice(first, first + file.graph.n_heads) if name[0] == "a" else i
    for key, array in (("neurons", file.neurons), ("neurons_scores", file.neuron_scores)):
        if array is not None:
            node[key] = array[rows].tolist()
    return node


def _of_nodes(path: str, nodes: dict[str, Any], graph: Graph, d_model: int) -> dict[str, np.ndarray]:
    """Scores of nodes and coordinates, as far as the file has them."""
    unknown = sorted(set(nodes) - set(graph.sources) - {"logits"})
    if unknown:
        raise InputError(f"{path}: no node {unknown[0]!r} in a model of {graph.n_layers} layers, {graph.n_heads} heads")
    fields = (("node_scores", "score", ()), ("neuron_scores", "neurons_scores", (d_model,)))
    out = {}
    try:
        for field, key, shape in (*fields, ("neurons", "neurons", (d_model,))):
            rows = np.full((graph.n_sources, *shape), np.nan if field != "neurons" else 1.0)
            named = {node: info[key] for node, info in nodes.items() if key in info and node != "logits"}
            for node, value in named.items():
                array = np.asarray(value, float)
                own = array[int(node.partition(".h")[2] or 0)] if array.ndim > len(shape) else array
                if own.shape != shape:
                    raise ValueError(f"shape {own.shape}, not {shape}")
                rows[graph.sources.index(node)] = own
            if named:
                out[field] = rows if field != "neurons" else rows.astype(bool)
    except (TypeError, ValueError, IndexError) as error:
        raise InputError(f"{path}: node {node!r} has a {key} that is not one number a coordinate ({error})") from error
    return out


def _sections(path: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    try:
        content = json.loads(epath.Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error})") from error
    missing = [key for key in ("cfg", "nodes", "edges") if not isinstance(content, dict) or key not in content]
    if missing:
        raise InputError(f"{path} is no graph of EAP-IG: it has no {', '.join(missing)}")
    cfg, nodes, edges = (content[key] for key in ("cfg", "nodes", "edges"))
    kinds = {"n_layers": int, "n_heads": int, "d_model": int, "parallel_attn_mlp": bool}
    wrong = [key for key, kind in kinds.items() if not isinstance(cfg, dict) or not isinstance(cfg.get(key), kind)]
    if wrong or not isinstance(nodes, dict) or not isinstance(edges, dict):
        raise InputError(f"{path} is no graph of EAP-IG: its cfg has no usable {', '.join(wrong) or 'nodes and edges'}")
    return cfg, nodes, edges
