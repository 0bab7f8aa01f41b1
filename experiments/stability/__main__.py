"""Runs an experiment under several instruction sets and seeds, and says how every figure moves.

    python -m experiments.stability --config.experiment=pipeline --workdir=runs/stability
    python -m experiments.stability --config.experiment=discover_circuit --config.seeds=1 --workdir=runs/stability_b

`XLA_FLAGS=--xla_cpu_max_isa=…` changes the order of sums, as another machine would. Every run is a program of its own
in a folder of its own; the same command again goes on with those that are missing. An instruction set that the machine
does not have is left out and named.

Of the pipeline, the validation stage is run with every instruction set and seed, on an organism that is trained anew
each time, and the whole pipeline once per instruction set: 18 runs, 35 to 60 minutes on 2 CPU cores. It writes
`stability.organism.edge_f1_worst` (of all runs), `stability.organism.edge_f1_mean` and
`stability.pipeline.bars_failed`, and exits with 3 where one misses its bar. For every figure there are
`stability.KEY.low`, `.mean` and `.high`.
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.stability.config import StabilityConfig
from experiments.stability.movement import Movement, as_results, movements
from experiments.stability.page import write_page
from experiments.stability.runs import Done, execute, missing_sets, planned
from mi_jax.core.errors import InputError
from mi_jax.report import terminal_table
from mi_jax.report.figures import figures
from mi_jax.report.text import number
from mi_jax.run import Workdir
from mi_jax.run.launch import launch

BARS = {
    "stability.organism.edge_f1_worst": "≥ 0.8",
    "stability.organism.edge_f1_mean": "≥ 0.95",
    "stability.pipeline.bars_failed": "= 0",
    "stability.runs_failed": "= 0",
}


def main(config: StabilityConfig, workdir: str) -> None:
    """Runs what the workdir does not have yet, and writes the figures and the page."""
    config.check()
    missing = missing_sets(config.chosen_sets)
    sets = tuple(name for name in config.chosen_sets if name not in missing)
    if not sets:
        raise InputError(f"this machine has none of the instruction sets {config.instruction_sets}")
    folder = Workdir.open(workdir, config, experiment="stability")
    console, root = Console(highlight=False), Path(str(folder.path))
    if missing:
        console.print(f"This machine does not have {', '.join(missing)}; it is left out.")
    plan, done = planned(config, sets), []
    for i, run in enumerate(plan, 1):
        console.print(f"{i}/{len(plan)} {config.experiment}, {run.part}: {run.place}", end=" ")
        found = execute(run, config.experiment, root)
        console.print(f"· {found.seconds:.0f} s" if found.finished else f"· failed ({found.code})\n{found.error}")
        done.append(found)
        sys.stdout.flush()
    moves = movements(done)
    folder.add_results(as_results(moves) | summary(done) | {"stability.missing_instruction_sets": ", ".join(missing)})
    results = folder.results
    bars = {key: bar for key, bar in BARS.items() if key in results}
    write_page(folder, config, moves, done, bars)
    console.print(_table(moves))
    console.print(terminal_table({key: results[key] for key in bars}, bars))
    console.print(f"{folder.path / 'report.html'}\n{folder.path / 'results.json'}", soft_wrap=True, markup=False)
    sys.stdout.flush()
    if any(row.met is False for row in figures(results, bars)):
        raise SystemExit(3)


def summary(done: list[Done]) -> dict[str, float | int]:
    """What has a bar, and the cost of the runs."""
    results: dict[str, float | int] = {
        "stability.runs": len(done),
        "stability.runs_failed": sum(not d.finished for d in done),
        "run.seconds": round(sum(d.seconds for d in done), 1),
        "run.peak_rss_gb": max((d.results.get("run.peak_rss_gb", 0.0) for d in done), default=0.0),
    }
    organisms = [d.results for d in done if d.run.part == "validation" and d.finished]
    if organisms:
        results["stability.organism.edge_f1_worst"] = min(r["organism.edge_f1_worst"] for r in organisms)
        results["stability.organism.edge_f1_mean"] = sum(r["organism.edge_f1_mean"] for r in organisms) / len(organisms)
    whole = [d.results for d in done if d.run.part == "whole" and d.finished]
    if any("run.bars_failed" in r for r in whole):
        results["stability.pipeline.bars_failed"] = sum(r.get("run.bars_failed", 0) for r in whole)
    return results


def _table(moves: list[Movement]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("figure", "least", "mean", "largest", "least in", "largest in"):
        words = "in" in name.split() or name == "figure"
        table.add_column(name, justify="left" if words else "right", no_wrap=name == "figure")
    for m in moves:
        places = (m.low_at, m.high_at) if m.moves else ("", "")
        table.add_row(m.key, number(m.low), number(m.mean), number(m.high), *places)
    return table


if __name__ == "__main__":
    launch(main, StabilityConfig(), workdir="runs/stability")
