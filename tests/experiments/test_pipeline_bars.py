"""A run that misses a bar writes its report and says so in its exit code; stages can be chosen."""

import io
import json

import pytest
from rich.console import Console

from experiments.pipeline import run
from experiments.pipeline.config import PipelineConfig
from experiments.pipeline.run import MISSED, check_inputs, run_pipeline, stage_names
from experiments.pipeline.subject import Outcome
from mi_jax.core.errors import InputError

ONLY = PipelineConfig(stages="validation")


def pipeline(tmp_path, monkeypatch, f1: float, config: PipelineConfig = ONLY) -> dict:
    figures = {"organism.edge_f1_worst": f1, "organism.edge_f1_worst_null": 0.1, "organism.edge_f1_mean": 1.0}
    monkeypatch.setattr(run, "validation", lambda config, progress: Outcome(figures, {"organism": "made up"}))
    return run_pipeline(config, str(tmp_path / "run"), console=Console(file=io.StringIO()))


def test_a_missed_bar_is_an_exit_code_after_the_report(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        pipeline(tmp_path, monkeypatch, 0.7)
    assert stopped.value.code == MISSED
    assert "organism.edge_f1_worst" in capsys.readouterr().err
    assert "made up" in (tmp_path / "run" / "report.html").read_text()
    assert json.loads((tmp_path / "run" / "results.json").read_text())["run.bars_failed"] == 1


def test_all_bars_met_is_no_exit(tmp_path, monkeypatch):
    assert pipeline(tmp_path, monkeypatch, 0.9)["run.bars_failed"] == 0


def test_a_smoke_run_has_no_bars(tmp_path, monkeypatch):
    results = pipeline(tmp_path, monkeypatch, 0.1, PipelineConfig(stages="validation", smoke=True))
    assert "run.bars_failed" not in results


def test_stages_are_chosen_by_name():
    assert stage_names(PipelineConfig()) == run.STAGES
    assert stage_names(PipelineConfig(stages="application, validation")) == ("validation", "application")
    with pytest.raises(InputError, match="no stage 'validate'"):
        stage_names(PipelineConfig(stages="validate"))
    # no language model is opened for what needs none
    check_inputs(PipelineConfig(stages="validation", gguf="none.gguf"))
    with pytest.raises(InputError, match="at least the one"):
        check_inputs(PipelineConfig(organisms=0))


def test_every_bar_has_a_figure_of_its_own_name_once():
    assert len(run.BARS) == len(set(run.BARS))
    assert {"organism.edge_f1_worst", "organism.edge_f1_mean"} <= set(run.BARS)
