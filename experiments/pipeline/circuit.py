"""Stage 4: the IOI circuit of the language model, and where along the text the answer is carried."""

import numpy as np

import mi_jax as mi
from experiments.pipeline.config import PipelineConfig
from experiments.pipeline.subject import Outcome, Subject
from mi_jax.circuits import Graph, curve, edge_scores, random_curves, top_edges
from mi_jax.data import Task
from mi_jax.data.tasks import indirect_object_identification
from mi_jax.data.tasks.ioi import TEMPLATES
from mi_jax.run import Progress

KEPT_EDGES = 200
SWEEP_PROMPTS = 4


def circuit(subject: Subject, config: PipelineConfig, progress: Progress) -> Outcome:
    """Scores all edges with EAP-IG, and measures faithfulness on pairs that the scores have not seen."""
    n = config.circuit_prompts
    task = indirect_object_identification(subject.tokenizer, n + n // 2, seed=config.seed + 1, templates=TEMPLATES[:1])
    discovery, held_out = task[:n], task[n:]
    graph = Graph.of(subject.model.config)

    progress(0.02, f"scoring {graph.n_edges:,} edges")
    scores = edge_scores(subject.model, discovery, method="eap-ig", steps=config.ig_steps)
    progress(0.3, "faithfulness")
    found = curve(subject.model, held_out, scores)
    progress(0.45, "random circuits")
    random = random_curves(subject.model, held_out, seeds=range(config.random_circuits))
    progress(0.75, "layer × position sweep")
    sweep = _sweep(subject, held_out[:SWEEP_PROMPTS])

    cmds = np.array([c.cmd for c in random])
    values = np.array([c.values for c in random])
    results = {
        "circuit.edges": graph.n_edges,
        "circuit.cmd": found.cmd,
        "circuit.cmd_null": float(cmds.mean()),
        "circuit.cmd_null_worst": float(cmds.min()),
        "circuit.pairs_scored": len(discovery),
        "circuit.pairs_held_out": len(held_out),
    } | {f"circuit.faithfulness_{f:g}": v for f, v in zip(found.fractions, found.values, strict=True)}
    results |= {
        f"circuit.faithfulness_{f:g}_null": float(v) for f, v in zip(found.fractions, values.mean(0), strict=True)
    }
    heads = np.abs(scores).sum(1)
    order = [i for i in np.argsort(-heads) if graph.sources[i].startswith("a")][:12]
    figures = {
        "task": "indirect object identification",
        "method": f"edge attribution patching with integrated gradients, {config.ig_steps} steps",
        "sweep": sweep,
        "faithfulness": {
            "fractions": found.fractions,
            "edges": found.edges,
            "circuit": found.values,
            "random_mean": values.mean(0).tolist(),
            "random_low": values.min(0).tolist(),
            "random_high": values.max(0).tolist(),
        },
        "cmd": found.cmd,
        "cmd_null": float(cmds.mean()),
        "heads": [{"name": graph.sources[i], "score": float(heads[i])} for i in order],
        "graph": graph.to_json(graph.prune(top_edges(scores, graph, KEPT_EDGES)), scores),
    }
    return Outcome(results, figures)


def _sweep(subject: Subject, task: Task) -> dict:
    """Patches the clean stream into the corrupt run at every layer and position: 1 restores the clean answer."""
    _, acts = mi.jit(mi.capture(subject.model, "resid_pre"))(task.clean, output=False)
    edit = mi.patch("resid_pre", acts, layer=mi.each, pos=mi.each)
    effect = mi.jit(mi.sweep(subject.model, edit, task.logit_difference))(task.corrupt, output_pos=task.position)
    clean, corrupt = (
        float(task.logit_difference(mi.jit(subject.model)(t, output_pos=task.position)).mean())
        for t in (task.clean, task.corrupt)
    )
    restored = (np.asarray(effect).mean(-1) - corrupt) / (clean - corrupt)
    roles = subject.tokenizer.strings(np.asarray(task.clean[0]).tolist())
    return {
        "site": "resid_pre",
        "layers": list(range(len(restored))),
        "positions": roles,
        "values": restored.round(4).tolist(),
        "quantity": "share of the clean logit difference that is restored",
    }
