"""Scores and circuit as arrays in a safetensors file: the keys of EAP-IG's `.pt` files, and nothing pickled.

Readers are those of our graph, shared keys and experts included, so that nothing is lost. The metadata have `cfg`,
`src_nodes` and `dst_nodes` as JSON.
"""

import dataclasses
import json
import os

import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mi_jax.circuits.formats.edge_file import Dangling, EdgeFile, check_model
from mi_jax.circuits.graph import Graph
from mi_jax.core.errors import InputError
from mi_jax.models.config import DecoderConfig
from mi_jax.run.files import write_bytes

_FORMAT = "mi_jax edges 1"
_OPTIONAL = {"nodes_scores": "node_scores", "neurons_in_graph": "neurons", "neurons_scores": "neuron_scores"}


def write_tensors(path: str | os.PathLike, file: EdgeFile, *, dangling: Dangling = "keep") -> None:
    """Writes scores and circuit; `dangling="prune"` leaves edges that lead nowhere out of the circuit."""
    file = file.without_dangling(dangling)
    arrays = {"edges_scores": file.scores, "edges_in_graph": file.circuit, "nodes_in_graph": file.nodes}
    arrays |= {key: getattr(file, field) for key, field in _OPTIONAL.items() if getattr(file, field) is not None}
    described = {
        "cfg": dataclasses.asdict(file.graph) | {"d_model": file.d_model},
        "src_nodes": file.graph.sources,
        "dst_nodes": file.graph.readers,
    }
    metadata = {"format": _FORMAT} | {key: json.dumps(value) for key, value in described.items()}
    contiguous = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
    write_bytes(epath.Path(path), save(contiguous, metadata))


def read_tensors(
    path: str | os.PathLike, config: DecoderConfig | None = None, *, dangling: Dangling = "keep"
) -> EdgeFile:
    """Reads a file of `write_tensors`.

    Raises:
      InputError: not such a file, or one for another model than `config`.
    """
    name = os.fspath(path)
    try:
        data = epath.Path(path).read_bytes()
        arrays = load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        if metadata.get("format") != _FORMAT:
            raise InputError(f"{name} holds no edges: its format is {metadata.get('format')!r}, not {_FORMAT!r}")
        cfg = json.loads(metadata["cfg"])
        d_model = cfg.pop("d_model")
        graph = Graph(**cfg)
        scores, circuit = arrays["edges_scores"], arrays["edges_in_graph"]
    except InputError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{name} is no file of edges that can be read ({error!r})") from error
    if config is not None:
        check_model(name, cfg | {"d_model": d_model, "parallel_attn_mlp": cfg["parallel"]}, config)
    extra = {field: arrays[key] for key, field in _OPTIONAL.items() if key in arrays}
    return EdgeFile(graph, scores, circuit, d_model, **extra).without_dangling(dangling)
