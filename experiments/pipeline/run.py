"""The six stages in order, in a workdir that resumes, and the report at the end."""

import functools
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console

from experiments.header import report_header
from experiments.pipeline.application import application
from experiments.pipeline.circuit import circuit
from experiments.pipeline.config import PipelineConfig
from experiments.pipeline.decomposition import decomposition
from experiments.pipeline.features import features
from experiments.pipeline.raw_model import raw_model
from experiments.pipeline.subject import Outcome, Subject, load_subject
from experiments.pipeline.validation import validation
from mi_jax.core.errors import InputError
from mi_jax.data import read_documents
from mi_jax.models import open_gguf, read_config, smollm2_path
from mi_jax.report import terminal_table, write_report
from mi_jax.report.figures import figures as figures_of
from mi_jax.run import Progress, Stage, Workdir, run_stages

STAGES = ("raw_model", "decomposition", "features", "circuit", "validation", "application")
# exit code of a run that misses a bar; 1 and 2 are those of a user's mistake
MISSED = 3
# what a run must reach; checked in the table at the end
BARS = {
    "model.parity_max_abs": "≤ 0.001",
    "model.ioi_accuracy": "≥ 0.95",
    "decomposition.tokens": "≥ 100000",
    "decomposition.l0": "≤ 33",
    "decomposition.fvu": "≤ 0.13",
    "decomposition.ce_recovered": "≥ 0.97",
    "decomposition.dead_fraction": "≤ 0.05",
    "features.detection_score": "> null",
    "circuit.cmd": "< null",
    "organism.induction_accuracy": "≥ 0.9",
    "organism.trigger_rate": "≥ 0.95",
    "organism.false_rate": "≤ 0.005",
    "organism.edge_f1_worst": "≥ 0.8",
    "organism.edge_f1_mean": "≥ 0.9",
    "monitor.auroc": "≥ 0.98",
    "monitor.tpr_at_1pct_fpr": "≥ 0.9",
    "monitor.lead_tokens_median": "≥ 1",
    "monitor.causal_effect": "> null",
    "run.seconds": "≤ 300",
    "run.peak_rss_gb": "≤ 6",
}
LIMITS = (
    "One model of 135 million parameters, dequantised from 4 bits; nothing here is shown for another.",
    "The dictionary saw about 100,000 tokens of one kind of text, Python's own help. Other text is not tested.",
    "Explanations are rules over one token and the token before it; what depends on more is not explained.",
    "The circuit is of one template of one task, against one counterfactual. Other prompts may run elsewhere.",
    "Organisms were planted in their initial weights and trained to keep their mechanisms; the rule that decides on a "
    "circuit's size was chosen on others. Their mechanisms are few and strong, unlike those of a language model.",
    "The monitor watches for one planted trigger that its training data shows, without an adversary.",
)


class Run:
    """A run's stages as functions of their progress; the model is loaded when the first stage needs it."""

    def __init__(self, workdir: Workdir, config: PipelineConfig):
        self.workdir, self.config = workdir, config

    @functools.cached_property
    def subject(self) -> Subject:
        return load_subject(self.config.gguf)

    def stages(self) -> list[Stage]:
        config, load = self.config, self.workdir.load_arrays
        makers: list[tuple[str, str, float, Callable[[Progress], Outcome]]] = [
            ("raw_model", "raw model", 20, lambda p: raw_model(self.subject, config, p)),
            ("decomposition", "decomposition", 220, lambda p: decomposition(self.subject, config, p)),
            ("features", "features", 10, lambda p: features(self.subject, load("decomposition"), config, p)),
            ("circuit", "circuit", 50, lambda p: circuit(self.subject, config, p)),
            ("validation", "validation", 70, lambda p: validation(config, p)),
            ("application", "application", 20, lambda p: application(load("validation"), config, p)),
        ]
        chosen = stage_names(config)
        return [Stage(name, title, self._kept(name, make), s) for name, title, s, make in makers if name in chosen]

    def _kept(self, name: str, make: Callable[[Progress], Outcome]) -> Callable[[Progress], dict]:
        def function(progress: Progress) -> dict:
            outcome = make(progress)
            if outcome.arrays:
                self.workdir.save_arrays(name, outcome.arrays)
            self.workdir.add_results(outcome.results)
            return dict(outcome.figures)

        return function


def stage_names(config: PipelineConfig) -> tuple[str, ...]:
    """The stages that a config asks for, in their order.

    Raises:
      InputError: a stage that does not exist.
    """
    asked = [name.strip() for name in config.stages.split(",") if name.strip()]
    if unknown := [name for name in asked if name not in STAGES]:
        raise InputError(f"config.stages={config.stages!r}: no stage {unknown[0]!r}; there are {', '.join(STAGES)}")
    return tuple(name for name in STAGES if not asked or name in asked)


def check_inputs(config: PipelineConfig) -> None:
    """Finds what cannot work before anything is written.

    Raises:
      CheckpointError, TextError: the model's file or the text cannot be used.
      InputError: a layer that the model lacks, or contexts longer than it takes.
    """
    if config.organisms < 1:
        raise InputError(f"config.organisms={config.organisms}: at least the one that is trained")
    if set(stage_names(config)) <= {"validation", "application"}:
        return  # these need no language model
    shape = read_config(open_gguf(config.gguf or smollm2_path()))
    if config.text:
        read_documents(config.text)
    if not 0 <= config.layer < shape.n_layers - 1:
        raise InputError(
            f"config.layer={config.layer}: {shape.name} has layers 0–{shape.n_layers - 1}, and the dictionary needs "
            "one after its own"
        )
    if not 2 <= config.context <= shape.n_ctx:
        raise InputError(f"config.context={config.context}: {shape.name} takes 2 to {shape.n_ctx} tokens")


def run_pipeline(config: PipelineConfig, workdir: str, *, console: Console | None = None) -> dict[str, Any]:
    """Runs what the workdir does not have yet, writes report.html, prints the table; returns the results.

    Raises:
      SystemExit: with code 3, after the report is written, where a figure misses its bar; `run.bars_failed` counts
        them. Of a part of the stages only those bars count that it has figures for.
      WorkdirError: the workdir holds another experiment or another config.
      CheckpointError, TextError: see `load_subject` and `capture_streams`.
    """
    config = config.resolved()
    check_inputs(config)
    console = console or Console(highlight=False)
    folder = Workdir.open(workdir, config, experiment="pipeline")
    figures = run_stages(folder, Run(folder, config).stages(), console=console)
    results = folder.results
    seconds = {name: results[f"run.stage_seconds.{name}"] for name in figures}
    header = report_header(
        "From a raw network to a monitored one",
        folder,
        model=results.get("model.name", ""),
        stages=[{"name": n, "title": n.replace("_", " "), "seconds": s} for n, s in seconds.items()],
    )
    report = folder.path / "report.html"
    bars = {} if config.smoke else BARS
    if config.stages:
        # the cost is that of the whole run
        bars = {key: bar for key, bar in bars.items() if key in results and not key.startswith("run.")}
    missed = [row.key for row in figures_of(results, bars) if row.met is False]
    if bars:
        folder.add_results({"run.bars_failed": len(missed)})
    write_report({"run": header, **figures, "limits": list(LIMITS)}, folder.results, report, bars=bars)
    # the figures with a bar; the report has all of them
    headline = {key: value for key, value in results.items() if key.split("_null")[0].split("_ci_")[0] in bars}
    console.print(terminal_table(headline if bars else results, bars))
    console.print(f"{report}\n{folder.path / 'results.json'}", soft_wrap=True, markup=False)
    sys.stdout.flush()
    if missed:
        print(f"error: {len(missed)} of {len(bars)} bars missed: {', '.join(missed)}", file=sys.stderr)
        raise SystemExit(MISSED)
    return folder.results
