"""Stage 5: circuits found blind, on networks whose mechanisms are known."""

import dataclasses

import jax
import numpy as np

from experiments.pipeline.config import PipelineConfig
from experiments.pipeline.subject import Outcome
from mi_jax.circuits import Circuit, Plateau, plateau_circuit
from mi_jax.run import Progress
from mi_jax.validation import (
    ORGANISMS,
    Agreement,
    Organism,
    OrganismConfig,
    Quality,
    Trained,
    agreement,
    layer_matched_null,
    load_organism,
    organism_arrays,
    quality,
    random_null,
    train_accepted,
)

PAIRS = 64
RANDOM_CIRCUITS = 1000
ATTEMPTS = 3
SHOWN_EFFECTS = 16


@dataclasses.dataclass(frozen=True)
class Searched:
    """An organism, its truth, and what the search found without it."""

    organism: Organism
    quality: Quality
    found: dict[str, tuple[Circuit, Plateau]]

    @property
    def agreements(self) -> dict[str, Agreement]:
        return {n: agreement(c.mask, self.quality.truths[n].mask) for n, (c, _) in self.found.items()}

    @property
    def pooled(self) -> Agreement:
        return sum(self.agreements.values(), Agreement(0, 0, 0))

    def null(self, kind) -> np.ndarray:
        """F1 of random circuits of the sizes that were found."""
        masks, true = [c.mask for c, _ in self.found.values()], [t.mask for t in self.quality.truths.values()]
        return np.array([kind(self.organism.graph, masks, true, seeds=[s]).mean for s in range(RANDOM_CIRCUITS)])


def validation(config: PipelineConfig, progress: Progress) -> Outcome:
    """Trains an organism and loads others, establishes their truth by exhaustive ablation, and searches without it.

    What is searched is decided by `quality`, which knows the truth and not the search.
    """
    # the pairs that the truth is measured on and those of the search are different draws
    k_train, k_quality, k_search = jax.random.split(jax.random.key(config.seed + 300), 3)
    pairs, n_loaded = (8 if config.smoke else PAIRS), config.organisms - 1

    def training(fraction: float, note: str = "") -> None:
        progress(0.5 * fraction, f"training an organism, {note}")

    organism_config = OrganismConfig(steps=config.organism_steps)
    attempts = 1 if config.smoke else ATTEMPTS
    trained = train_accepted(organism_config, pairs, key=k_train, attempts=attempts, progress=training)
    organisms = [(trained.organism, trained.quality)]
    for i in range(n_loaded):
        progress(0.5 + 0.1 * i, "every edge of another organism on its own")
        loaded = load_organism(i % ORGANISMS)
        organisms.append((loaded, quality(loaded, pairs, key=jax.random.fold_in(k_quality, i))))
    searched = []
    for i, (organism, known) in enumerate(organisms):
        progress(0.7 + 0.3 * i / len(organisms), f"searching organism {i + 1} of {len(organisms)}, blind")
        tasks = organism.tasks(pairs, key=jax.random.fold_in(k_search, i))
        found = {n: plateau_circuit(organism.model, t, steps=config.ig_steps) for n, t in tasks.items()}
        searched.append(Searched(organism, known, found))

    f1 = np.array([s.pooled.f1 for s in searched])
    nulls = np.array([s.null(random_null) for s in searched])
    matched = np.array([s.null(layer_matched_null) for s in searched])
    worst = searched[int(f1.argmin())]
    does, total = trained.quality.behaviour, sum((s.pooled for s in searched), Agreement(0, 0, 0))
    results = {
        "organism.organisms": len(searched),
        "organism.trained": 1,
        "organism.rejected": len(trained.rejected),
        "organism.accepted": sum(not s.quality.faults for s in searched),
        "organism.induction_accuracy": does.induction_accuracy,
        "organism.trigger_rate": does.trigger_rate,
        "organism.false_rate": does.false_rate,
        "organism.steps": config.organism_steps,
        "organism.edges": trained.organism.graph.n_edges,
        "organism.edge_f1_worst": f1.min(),
        # of every draw the worst organism, as for the circuits
        "organism.edge_f1_worst_null": nulls.min(0).mean(),
        "organism.edge_f1_mean": f1.mean(),
        "organism.edge_f1_mean_null": nulls.mean(),
        "organism.edge_f1_mean_null_high": np.quantile(nulls.mean(0), 0.975),
        "organism.edge_f1_mean_null_layer_matched": matched.mean(),
        "organism.edge_f1_trained": f1[0],
        "organism.edge_precision": total.precision,
        "organism.edge_recall": total.recall,
        "organism.as_designed": all(t.as_designed for s in searched for t in s.quality.truths.values()),
        "organism.truth_margin": min(t.margin for s in searched for t in s.quality.truths.values()),
        "organism.undecided_edges": sum(len(t.undecided) for s in searched for t in s.quality.truths.values()),
        # the range of targets that give the same circuit, of the least certain search
        "organism.plateau_width": min(p.width for s in searched for _, p in s.found.values()),
    }
    for name in worst.found:
        results |= _results(name, worst)
    figures = {
        "organism": _description(worst, trained, len(searched)),
        "mechanisms": [_mechanism(name, worst, nulls[int(f1.argmin())].mean()) for name in worst.found],
    }
    return Outcome(results, figures, organism_arrays(trained.organism))


def _results(name: str, searched: Searched) -> dict:
    truth, agreed = searched.quality.truths[name], searched.agreements[name]
    return {
        f"organism.edge_f1_{name}": agreed.f1,
        f"organism.edge_precision_{name}": agreed.precision,
        f"organism.edge_recall_{name}": agreed.recall,
        f"organism.true_edges_{name}": agreed.true,
        f"organism.found_edges_{name}": agreed.found,
        f"organism.weakest_designed_{name}": truth.weakest_designed,
        f"organism.strongest_other_{name}": truth.strongest_other,
        f"organism.truth_margin_{name}": truth.margin,
        f"organism.design_faithfulness_{name}": truth.faithfulness,
    }


def _description(worst: Searched, trained: Trained, n: int) -> str:
    truths = worst.quality.truths
    margins = ", ".join(
        f"{name}: the weakest designed edge {t.weakest_designed:.2f}, the strongest other {t.strongest_other:.2f}"
        for name, t in truths.items()
    )
    faults = "; ".join(worst.quality.faults)
    undecided = ", ".join(edge for t in truths.values() for edge in t.undecided)
    return (
        f"The worst of {n} organisms, one of which was trained in this run ({len(trained.rejected)} were rejected "
        "before it, by their behaviour and their truth). A decoder of two layers and "
        f"{worst.organism.graph.n_edges} edges, trained with every edge outside the design resampled at random. Every "
        "edge was then corrupted on its own; an edge is true when its effect is above the widest gap among all effects "
        f"({margins}). "
        + (f"This organism should have been rejected: {faults}. " if faults else "")
        + (f"Too close to call: {undecided}." if undecided else "")
    )


def _mechanism(name: str, searched: Searched, null: float) -> dict:
    truth, agreed = searched.quality.truths[name], searched.agreements[name]
    found, _ = searched.found[name]
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
