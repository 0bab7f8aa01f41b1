"""One method: its scores on the search pairs, its circuits on the held-out ones, and how stable they are."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from experiments.discover_circuit.config import DiscoverCircuitConfig
from mi_jax.circuits import METHODS, Graph, discover, edge_scores, top_edges
from mi_jax.circuits.formats import EdgeFile, write_eap_ig
from mi_jax.circuits.metrics import (
    Stability,
    bootstrap_stability,
    circuit_metrics,
    evaluate_curves,
    per_prompt_scores,
    split_stability,
)
from mi_jax.data import Task
from mi_jax.models import Decoder
from mi_jax.run import Progress, Workdir


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What all methods share.

    Attributes:
      search: the pairs that circuits are found with.
      held_out: the pairs that they are measured on.
    """

    config: DiscoverCircuitConfig
    model: Decoder
    search: Task
    held_out: Task

    @functools.cached_property
    def graph(self) -> Graph:
        return Graph.of(self.model.config)

    @property
    def n_edges(self) -> int:
        """Edges of the circuits that are compared and written, before dangling ones are deleted."""
        return max(1, round(self.config.circuit_fraction * self.graph.n_edges))


def run_method(compared: Comparison, name: str, folder: Workdir, progress: Progress) -> dict[str, Any]:
    """Adds the figures of one method to the results; returns what the report draws."""
    config, graph = compared.config, compared.graph
    keys = jax.random.split(jax.random.key(config.seed), 4)
    prefix = prefix_of(name)
    progress(0.0, "scoring")
    results: dict[str, Any] = {}
    rule = METHODS[name].rule if name in METHODS else "top"
    if name in METHODS:
        each = per_prompt_scores(_score(config, name), compared.model, compared.search)
        scores, mask = each.mean(0), None
        for key, found in (
            ("stability_jaccard", split_stability(each, graph, compared.n_edges, key=keys[1], rule=rule)),
            ("stability_bootstrap_jaccard", bootstrap_stability(each, graph, compared.n_edges, key=keys[0], rule=rule)),
        ):
            results |= _stability(f"{prefix}.{key}", found)
    else:
        scores, mask = _searched(compared, name, keys[2])
    progress(0.5, "circuits of every size, beside random ones")
    drawn: dict[str, Any] = {"name": name}
    if scores is not None:
        curves = evaluate_curves(
            compared.model,
            compared.held_out,
            scores,
            key=keys[3],
            rule=rule,
            null_curves=config.null_curves,
            ablation=config.ablation,
            seed=config.seed,
        )
        results |= curves.flat(f"{prefix}.")
        drawn |= {
            "fractions": curves.absolute.fractions,
            "edges": curves.absolute.edges,
            "values": curves.absolute.values,
        }
        if mask is None:
            mask = top_edges(scores, graph, compared.n_edges, rule=rule)
    assert mask is not None
    mask = graph.prune(mask)
    one = circuit_metrics(
        compared.model, compared.held_out, mask, key=keys[3], null_circuits=3, ablation=config.ablation
    )
    results |= one.sufficiency.flat(f"{prefix}.faithfulness") | one.kl.flat(f"{prefix}.kl")
    results[f"{prefix}.edges"] = int(mask.sum())
    folder.save_arrays(stage_name(name), {"mask": mask} | ({} if scores is None else {"scores": scores}))
    path = folder.path / "circuits" / f"{file_name(name)}.json"
    path.parent.mkdir(exist_ok=True)
    width = compared.model.config.d_model
    write_eap_ig(path, EdgeFile(graph, np.zeros(mask.shape) if scores is None else scores, mask, d_model=width))
    folder.add_results(results)
    return drawn


def file_name(method: str) -> str:
    """A method's name without what no file and no figure can be called."""
    return method.replace("+", "-").replace("*", "-star")


def prefix_of(method: str) -> str:
    """What the names of a method's figures begin with."""
    return f"discover_circuit.{file_name(method)}"


def stage_name(method: str) -> str:
    """The name of a method's stage, and of its arrays."""
    return f"method_{file_name(method)}"


def _score(config: DiscoverCircuitConfig, name: str):
    return functools.partial(
        edge_scores, method=name, steps=config.steps, ablation=config.ablation, batch_size=config.batch_size
    )


def _searched(compared: Comparison, name: str, key) -> tuple[np.ndarray | None, np.ndarray]:
    config = compared.config
    options: dict[str, Any] = {"threshold": config.acdc_threshold} if name == "acdc" else {"n_edges": compared.n_edges}
    found = discover(compared.model, compared.search, method=name, ablation=config.ablation, key=key, **options)
    # ACDC's numbers are effects at the moment of a decision, which order nothing
    return (None if name == "acdc" else found.scores), found.mask


def _stability(name: str, found: Stability) -> dict[str, float]:
    estimate = found.jaccard
    return {
        name: estimate.value,
        f"{name}_ci_low": estimate.ci_low,
        f"{name}_ci_high": estimate.ci_high,
        f"{name}_null": found.null.mean,
    }
