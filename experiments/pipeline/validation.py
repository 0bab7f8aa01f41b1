"""Stage 5: the method of stage 4, blind, on a network whose mechanisms are known."""

import jax
import numpy as np

from experiments.pipeline.config import PipelineConfig
from experiments.pipeline.subject import Outcome
from mi_jax.circuits import Circuit, discover
from mi_jax.run import Progress
from mi_jax.validation import (
    Agreement,
    Organism,
    OrganismConfig,
    Truth,
    agreement,
    behaviour,
    layer_matched_null,
    organism_arrays,
    random_null,
    train_organism,
    verify,
)

PAIRS = 64
RANDOM_CIRCUITS = 1000
SHOWN_EFFECTS = 16


def validation(config: PipelineConfig, progress: Progress) -> Outcome:
    """Trains the organism, establishes its truth by exhaustive ablation, and searches without it."""
    k_train, k_behaviour, k_truth, k_search = jax.random.split(jax.random.key(config.seed + 200), 4)

    def training(fraction: float, note: str = "") -> None:
        progress(0.6 * fraction, f"training the organism, {note}")

    organism = train_organism(OrganismConfig(steps=config.organism_steps), key=k_train, progress=training)
    does = behaviour(organism, key=k_behaviour)
    results = {
        "organism.induction_accuracy": does.induction_accuracy,
        "organism.trigger_rate": does.trigger_rate,
        "organism.false_rate": does.false_rate,
        "organism.steps": config.organism_steps,
    }
    # the pairs that the truth is measured on and those of the search are different draws
    pairs = 8 if config.smoke else PAIRS
    truth_tasks, search_tasks = organism.tasks(pairs, key=k_truth), organism.tasks(pairs, key=k_search)
    truths, found, agreements = {}, {}, {}
    for i, name in enumerate(truth_tasks):
        progress(0.6 + 0.2 * i, f"every edge of {name} on its own")
        truths[name] = verify(organism.model, truth_tasks[name], organism.designed(name))
        progress(0.7 + 0.2 * i, f"searching for {name}, blind")
        found[name] = discover(organism.model, search_tasks[name], method="eap-ig", steps=config.ig_steps)
        agreements[name] = agreement(found[name].mask, truths[name].mask)
        results |= _results(name, truths[name], found[name], agreements[name])

    pooled = sum(agreements.values(), Agreement(0, 0, 0))
    masks, true = [c.mask for c in found.values()], [t.mask for t in truths.values()]
    null = random_null(organism.graph, masks, true, seeds=range(RANDOM_CIRCUITS))
    matched = layer_matched_null(organism.graph, masks, true, seeds=range(RANDOM_CIRCUITS))
    results |= {
        "organism.edges": organism.graph.n_edges,
        "organism.edge_precision": pooled.precision,
        "organism.edge_recall": pooled.recall,
        "organism.edge_f1": pooled.f1,
        "organism.edge_f1_null": null.mean,
        "organism.edge_f1_null_high": null.high,
        "organism.edge_f1_null_layer_matched": matched.mean,
        "organism.as_designed": all(truth.as_designed for truth in truths.values()),
    }
    figures = {
        "organism": _description(organism, truths),
        "mechanisms": [_mechanism(name, truths[name], found[name], agreements[name], null.mean) for name in truths],
    }
    return Outcome(results, figures, organism_arrays(organism))


def _results(name: str, truth: Truth, found: Circuit, agreed: Agreement) -> dict:
    return {
        f"organism.edge_f1_{name}": agreed.f1,
        f"organism.edge_precision_{name}": agreed.precision,
        f"organism.edge_recall_{name}": agreed.recall,
        f"organism.true_edges_{name}": agreed.true,
        f"organism.found_edges_{name}": agreed.found,
        f"organism.weakest_designed_{name}": truth.weakest_designed,
        f"organism.strongest_other_{name}": truth.strongest_other,
        f"organism.design_faithfulness_{name}": truth.faithfulness,
    }


def _description(organism: Organism, truths: dict[str, Truth]) -> str:
    margins = ", ".join(
        f"{name}: the weakest designed edge {t.weakest_designed:.2f}, the strongest other {t.strongest_other:.2f}"
        for name, t in truths.items()
    )
    deviations = "; ".join(
        f"{name} deviates from its design (idle: {', '.join(t.idle) or 'none'}; stray: {', '.join(t.stray) or 'none'})"
        for name, t in truths.items()
        if not t.as_designed
    )
    return (
        f"A decoder of two layers and {organism.graph.n_edges} edges, trained in this run with every edge outside the "
        "design resampled at random. Every edge was then corrupted on its own; an edge is true when that takes "
        f"at least {next(iter(truths.values())).threshold:.0%} of the metric ({margins}). "
        + (f"{deviations}." if deviations else "Exactly the designed edges matter.")
    )


def _mechanism(name: str, truth: Truth, found: Circuit, agreed: Agreement, null: float) -> dict:
    graph, either = truth.graph, truth.mask | found.mask
    assert found.scores is not None
    strongest = np.argsort(-np.abs(np.where(graph.edges, truth.effects, 0)).ravel())[:SHOWN_EFFECTS]
    shown = np.zeros(truth.effects.size, bool)
    shown[strongest] = True
    places = np.argwhere((shown.reshape(truth.effects.shape) & graph.edges) | either)
    effects = [
        {
            "edge": f"{graph.sources[s]}->{graph.readers[r]}",
            # the chart shows what removing the edge changes
            "effect": -float(truth.effects[s, r]),
            "in_truth": bool(truth.mask[s, r]),
            "found": bool(found.mask[s, r]),
        }
        for s, r in places
    ]
    return {
        "name": name,
        "true": graph.to_json(truth.mask, truth.effects),
        "found": graph.to_json(found.mask, found.scores),
        "precision": agreed.precision,
        "recall": agreed.recall,
        "f1": agreed.f1,
        "f1_null": null,
        "edge_effects": sorted(effects, key=lambda e: -abs(e["effect"])),
    }
