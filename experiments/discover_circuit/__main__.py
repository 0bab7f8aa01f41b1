"""Finds the circuit of a task in a model by several methods, and compares them on prompts that none has seen.

    python -m experiments.discover_circuit --workdir=runs/discover_circuit
    python -m experiments.discover_circuit --workdir=runs/b --config.task=greater-than --config.methods=eap,eap-ig
    python -m experiments.discover_circuit --workdir=runs/c --config.model=DIRECTORY --config.ablation=mean-positional

By default: SmolLM2-135M, indirect object identification, 16 pairs of prompts to search with and 16 held out, six
methods, 70,651 edges. At most 15 minutes and 2 GB on 2 CPU cores. `--config.methods` takes any of `mi.circuits.METHODS`
(edge scores) and `SEARCHES` (ACDC, learned masks), separated by commas.

For every method `results.json` has, on the held-out pairs, `discover_circuit.METHOD.cmd` and `.cpr` as MIB defines
them, each with its interval over prompts and two nulls: random circuits of the same size (`_null`) and of the same
size in every pair of layers (`_null_layers`). CMD is nearly all about large circuits, so what the small ones keep
stands beside it: `.faithfulness_at_0_1_percent`, `0_5` and `1`. `.stability_jaccard` is how alike two circuits of equal
size are that the method finds on the two halves of the search pairs, with random circuits as its null;
`.stability_bootstrap_jaccard` is that of resampled pairs, which overlap. `report.html` draws the circuit of the
method with the smallest CMD; `circuits/METHOD.json` holds every circuit in EAP-IG's format, which MIB takes.
`--config.tests` adds every other metric and the hypothesis tests for that circuit, some minutes more.
"""

from experiments.discover_circuit.config import DiscoverCircuitConfig
from experiments.discover_circuit.run import run_discovery
from mi_jax.run import enable_compilation_cache, maybe_initialize
from mi_jax.run.launch import launch


def main(config: DiscoverCircuitConfig, workdir: str) -> None:
    """Runs the experiment."""
    maybe_initialize()
    enable_compilation_cache()
    run_discovery(config, workdir)


if __name__ == "__main__":
    launch(main, DiscoverCircuitConfig(), workdir="runs/discover_circuit")
