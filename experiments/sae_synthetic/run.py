"""The stages in order, in a workdir that resumes; the main figures; the ranking in the terminal and on a page."""

import functools
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from experiments.sae_synthetic.config import SyntheticConfig
from experiments.sae_synthetic.page import write_page
from experiments.sae_synthetic.settings import MAIN, SETTINGS
from experiments.sae_synthetic.suite import NULL_ARCHITECTURE, rates, setting
from experiments.sae_synthetic.tables import (
    NULLS,
    RANKED,
    TRANSFORMER,
    figure_name,
    mean_over_settings,
    ranking,
    terminal_ranking,
)
from experiments.sae_synthetic.transformer import transformer
from mi_jax.report import terminal_table
from mi_jax.report.text import number
from mi_jax.run import Progress, Stage, Workdir, run_stages

BARS = {
    "sae_synthetic.best_mcc": "≥ 0.9",
    "sae_synthetic.best_s_over_bound": "≤ 0.5",
    "sae_synthetic.failure_mcc": "≤ 0.5",
    "transformer.best_mcc": "> null",
    "transformer.linear_r2": "> null",
    "run.seconds": "≤ 720",
}


class Run:
    """A run's stages."""

    def __init__(self, workdir: Workdir, config: SyntheticConfig):
        self.workdir, self.config = workdir, config

    @functools.cached_property
    def rate_of(self) -> dict[str, float]:
        return {name: row["rate"] for name, row in self.workdir.load_stage("rates").items()}

    def stages(self) -> list[Stage]:
        config = self.config
        suite = [
            Stage(name, f"superposition: {name}", functools.partial(self._setting, name), 70)
            for name in config.chosen_settings
        ]
        network = [Stage(TRANSFORMER, "transformer", self._transformer, 130)] if config.transformer else []
        return [Stage("rates", "learning rates", functools.partial(rates, config), 90), *suite, *network]

    def _setting(self, name: str, progress: Progress) -> dict[str, Any]:
        results, per_seed = setting(name, self.config, self.rate_of, progress)
        self.workdir.add_results(results)
        return per_seed

    def _transformer(self, progress: Progress) -> dict[str, Any]:
        results, per_seed = transformer(self.config, self.rate_of, self.workdir, progress)
        self.workdir.add_results(results)
        return per_seed


def best_of(results: Mapping[str, Any], config: SyntheticConfig) -> dict[str, Any]:
    """The architecture with the highest mean MCC over the settings but the main one, and what it reaches there.

    So the main figure is not the largest of several that luck could have raised. Where only the main setting was run,
    that setting decides.
    """
    places, methods = config.chosen_settings, config.chosen_architectures
    found: dict[str, Any] = {}
    if MAIN in places:
        others = [p for p in places if SETTINGS[p].recoverable and p != MAIN]
        without = (MAIN,) if others else ()
        best = max(methods, key=lambda method: mean_over_settings(results, method, places, without=without))
        found |= {"sae_synthetic.best_architecture": best}
        found |= _taken(results, figure_name(best, MAIN, "mcc"), "sae_synthetic.best_mcc")
        found |= _taken(results, figure_name(best, MAIN, "f1"), "sae_synthetic.best_f1")
        found["sae_synthetic.best_mcc_best_baseline"] = max(results[figure_name(n, MAIN, "mcc")] for n in NULLS)
        bound = max(results[f"sae_synthetic.{MAIN}.one_step_bound"], 1)
        found["sae_synthetic.best_s_over_bound"] = round(results[f"sae_synthetic.{MAIN}.l0"] / bound, 2)
        for place in places:
            if not SETTINGS[place].recoverable:
                found |= _taken(results, figure_name(best, place, "mcc"), "sae_synthetic.failure_mcc")
                reached = [results.get(figure_name(method, place, "mcc"), 0.0) for method in methods]
                found["sae_synthetic.failure_mcc_highest"] = max(reached)
    if config.transformer:
        name = found.get("sae_synthetic.best_architecture", NULL_ARCHITECTURE)
        best = name if name in methods else methods[0]
        found |= {"transformer.best_architecture": best}
        found |= _taken(results, figure_name(best, TRANSFORMER, "mcc"), "transformer.best_mcc")
        found |= _taken(results, figure_name(best, TRANSFORMER, "f1"), "transformer.best_f1")
    return found


def _taken(results: Mapping[str, Any], name: str, as_name: str) -> dict[str, Any]:
    """A figure with its null and its interval, under another name."""
    suffixes = ("", "_null", "_ci_low", "_ci_high")
    return {f"{as_name}{suffix}": results[f"{name}{suffix}"] for suffix in suffixes if f"{name}{suffix}" in results}


def facts_of(results: Mapping[str, Any], places: tuple[str, ...]) -> dict[str, str]:
    """For the heads of the tables: how many features fire, and the bounds."""
    facts = {}
    for place in places:
        if place == TRANSFORMER:
            facts[place] = f"s = {number(results['transformer.l0'])}"
        else:
            s, *bounds = (results[f"sae_synthetic.{place}.{n}"] for n in ("l0", "one_step_bound", "wainwright_bound"))
            facts[place] = f"s = {number(s)}, s* = {bounds[0]}, Wainwright {bounds[1]}"
    return facts


def run_synthetic(config: SyntheticConfig, workdir: str, *, console: Console | None = None) -> dict[str, Any]:
    """Runs what the workdir does not have yet, writes report.html, prints the tables; returns the results.

    Raises:
      InputError: a config that cannot work; see `SyntheticConfig.check`.
      WorkdirError: the workdir holds another experiment or another config.
    """
    config = config.resolved()
    config.check()
    console = console or Console(highlight=False)
    folder = Workdir.open(workdir, config, experiment="sae_synthetic")
    run_stages(folder, Run(folder, config).stages(), console=console)
    folder.add_results(best_of(folder.results, config))
    results, bars = folder.results, {} if config.smoke else BARS
    places = (*config.chosen_settings, *((TRANSFORMER,) if config.transformer else ()))
    facts = facts_of(results, places)
    rankings = [ranking(results, config.chosen_architectures, places, figure) for figure in RANKED]
    write_page(folder, rankings, facts, bars)
    for found in rankings[:2]:
        console.print(terminal_ranking(found, {p: f.split(",")[0] for p, f in facts.items()}))
    shown = (*BARS, "sae_synthetic.best_architecture", "sae_synthetic.failure_mcc_highest")
    headline = {k: v for k, v in results.items() if k.split("_null")[0].split("_ci_")[0] in shown}
    console.print(terminal_table(headline, bars or None))
    console.print(f"{folder.path / 'report.html'}\n{folder.path / 'results.json'}", soft_wrap=True, markup=False)
    return results
