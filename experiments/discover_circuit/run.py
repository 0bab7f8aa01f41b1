"""All methods in turn, in a workdir that resumes; then the report."""

import functools
import sys
from typing import Any

import jax
import numpy as np
from rich.console import Console

import mi_jax as mi
from experiments.discover_circuit.config import DiscoverCircuitConfig
from experiments.discover_circuit.method import Comparison, prefix_of, run_method, stage_name
from experiments.header import report_header
from mi_jax.circuits import METHODS, Graph, faithfulness
from mi_jax.circuits.metrics import evaluate_circuit
from mi_jax.circuits.metrics.report import SMALL, faithfulness_at
from mi_jax.data import load_tokenizer, tasks
from mi_jax.models import smollm2_path
from mi_jax.report import terminal_table, write_report
from mi_jax.run import Progress, Stage, Workdir, run_stages

FIGURES = ("cmd", *map(faithfulness_at, SMALL), "cpr", "stability_jaccard")
LIMITS = (
    "A circuit is found for one kind of prompt and one kind of counterfactual; other prompts may run elsewhere.",
    "Intervals are over the held-out prompts. Jaccard is of circuits from two halves of the search prompts.",
    "CMD says little about small circuits: those of under 1 % of the edges are 1 % of its axis. Read f at these sizes.",
    "CPR has no upper bound: a circuit that overshoots the model scores higher. Read it beside CMD.",
    "The network's true circuit is not known; faithfulness is not the same as truth.",
)


def run_discovery(config: DiscoverCircuitConfig, workdir: str, *, console: Console | None = None) -> dict[str, Any]:
    """Runs what the workdir does not have yet, writes report.html and prints the table; returns the results.

    Raises:
      InputError: the model, the task or the settings cannot be used.
      WorkdirError: the workdir holds another experiment or another config.
    """
    config = config.resolved()
    console = console or Console(highlight=False)
    # what cannot work is found before anything is written
    compared = load_comparison(config)
    faithfulness(compared.model, compared.held_out, [], ablation=config.ablation)
    folder = Workdir.open(workdir, config, experiment="discover_circuit")
    stages = [
        Stage(stage_name(name), name, functools.partial(run_method, compared, name, folder), 150)
        for name in config.names
    ]
    if config.tests:
        stages.append(Stage("tests", "tests", functools.partial(run_tests, compared, folder), 300))
    folder.add_results(
        {
            "discover_circuit.task": config.task,
            "discover_circuit.graph_edges": compared.graph.n_edges,
            "discover_circuit.pairs": len(compared.search),
            "discover_circuit.pairs_held_out": len(compared.held_out),
        }
    )
    drawn = run_stages(folder, stages, console=console)
    results = folder.results
    report = folder.path / "report.html"
    sections = {
        "run": report_header(f"The circuit of {config.task}", folder, model=compared.model.config.name),
        "circuit": _figures(compared, folder, [drawn[stage_name(name)] for name in config.names]),
        "limits": list(LIMITS),
    }
    bars = None if config.smoke else {f"{prefix_of(name)}.cmd": "< null" for name in config.names}
    if bars is not None:
        bars = {key: bar for key, bar in bars.items() if key in results}
    write_report(sections, results, report, bars=bars)
    wanted = {f"{prefix_of(name)}.{figure}" for name in config.names for figure in FIGURES}
    table = {key: value for key, value in results.items() if key.split("_null")[0].split("_ci_")[0] in wanted}
    console.print(terminal_table(table, bars))
    console.print(f"{report}\n{folder.path / 'results.json'}", soft_wrap=True, markup=False)
    sys.stdout.flush()
    return results


def load_comparison(config: DiscoverCircuitConfig) -> Comparison:
    """The model and the pairs of prompts, the first to search with and the others to measure on."""
    source = config.model or smollm2_path()
    model = mi.load(source)
    Graph.of(model.config)
    task = tasks.make(config.task, load_tokenizer(source), config.pairs + config.held_out, seed=config.seed)
    return Comparison(config, model, task[: config.pairs], task[config.pairs :])


def best_method(results: dict[str, Any], names: tuple[str, ...]) -> str:
    """The method with the smallest CMD; the first one where none has any."""
    having = [name for name in names if f"{prefix_of(name)}.cmd" in results]
    return min(having, key=lambda name: results[f"{prefix_of(name)}.cmd"]) if having else names[0]


def run_tests(compared: Comparison, folder: Workdir, progress: Progress) -> dict[str, Any]:
    """Every other metric of the best method's circuit, on the held-out pairs."""
    name = best_method(folder.results, compared.config.names)
    progress(0.0, f"tests of {name}")
    mask = folder.load_arrays(stage_name(name))["mask"]
    found = evaluate_circuit(
        compared.model,
        compared.held_out,
        np.asarray(mask, bool),
        key=jax.random.key(compared.config.seed),
        ablation=compared.config.ablation,
    )
    folder.add_results({f"tests.{key}": value for key, value in found.to_json().items()})
    return {"method": name}


def _figures(compared: Comparison, folder: Workdir, drawn: list[dict[str, Any]]) -> dict[str, Any]:
    """What the report draws: the methods side by side, and the best one's circuit."""
    results, graph = folder.results, compared.graph
    name = best_method(results, compared.config.names)
    arrays = folder.load_arrays(stage_name(name))
    mask = np.asarray(arrays["mask"], bool)
    scores = np.asarray(arrays.get("scores", mask), np.float64)
    heads = (np.abs(scores) * graph.edges).sum(1)
    order = [i for i in np.argsort(-heads) if graph.sources[i].startswith("a")][:12]
    prefix = prefix_of(name)
    section: dict[str, Any] = {
        "task": compared.config.task,
        "method": METHODS[name].does if name in METHODS else name,
        "name": name,
        "cmd": results.get(f"{prefix}.cmd"),
        "cmd_null": results.get(f"{prefix}.cmd_null"),
        "graph": graph.to_json(mask, scores),
        "heads": [{"name": graph.sources[i], "score": float(heads[i])} for i in order] if "scores" in arrays else [],
        "methods": [_row(results, each["name"]) for each in drawn],
        "curves": [each for each in drawn if "values" in each],
    }
    return section


def _row(results: dict[str, Any], name: str) -> dict[str, Any]:
    """A method's figures: value, interval and null of each."""
    row: dict[str, Any] = {"name": name, "edges": results.get(f"{prefix_of(name)}.edges")}
    for figure in (*FIGURES, "faithfulness"):
        key = f"{prefix_of(name)}.{figure}"
        if key in results:
            ends = {"low": "_ci_low", "high": "_ci_high", "null": "_null"}
            values = {end: results.get(key + suffix) for end, suffix in ends.items()}
            row[figure] = {"name": name, "value": results[key], **values}
    return row
