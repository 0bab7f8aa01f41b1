"""Which runs are made, what is made of them, and that a second call only makes those that are missing."""

import json
import subprocess
import types
from pathlib import Path

import pytest

from experiments.stability import __main__ as stability
from experiments.stability import runs as programs
from experiments.stability.config import StabilityConfig
from experiments.stability.movement import as_results, movements
from experiments.stability.runs import Done, Run, missing_sets, planned
from mi_jax.core.errors import InputError


def test_the_pipeline_is_validated_with_every_seed_and_run_once_per_instruction_set():
    config = StabilityConfig(seeds=2, first_seed=7, flags="--config.smoke=true")
    runs = planned(config, ("AVX", "AVX2"))
    assert [r.name for r in runs] == [
        "validation_AVX_seed7",
        "validation_AVX_seed8",
        "validation_AVX2_seed7",
        "validation_AVX2_seed8",
        "whole_AVX_seed7",
        "whole_AVX2_seed7",
    ]
    assert runs[0].flags == (
        "--config.seed=7",
        "--config.stages=validation",
        "--config.organisms=1",
        "--config.smoke=true",
    )
    assert runs[-1].flags == ("--config.seed=7", "--config.smoke=true")


def test_an_experiment_without_seeds_is_run_once_per_instruction_set():
    runs = planned(StabilityConfig(experiment="model_parity", seeds=0), ("AVX", "AVX2"))
    assert [(r.part, r.place, r.flags) for r in runs] == [("whole", "AVX", ()), ("whole", "AVX2", ())]


@pytest.mark.parametrize(
    "wrong", [{"experiment": "stability"}, {"experiment": "../x"}, {"instruction_sets": "AVX3"}, {"flags": "'"}]
)
def test_names_that_make_no_sense_are_refused(wrong):
    with pytest.raises(InputError):
        StabilityConfig(**wrong).check()


def test_what_the_machine_lacks_is_named(monkeypatch):
    monkeypatch.setattr(programs.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(Path, "read_text", lambda self: "model name : x\nflags\t: fpu sse4_2 avx avx2\n")
    assert missing_sets(("SSE4_2", "AVX2", "AVX512")) == ("AVX512",)
    monkeypatch.setattr(programs.platform, "machine", lambda: "arm64")
    assert missing_sets(("SSE4_2",)) == ("SSE4_2",)


def done(part: str, name: str, results: dict) -> Done:
    return Done(Run(part, name, 0, ()), results, 1.0, 0)


def test_movements_have_extremes_and_where_they_are():
    rows = [
        done("whole", "AVX", {"a.x": 1.0, "a.x_null": 0.2, "a.x_ci_low": 0.0, "a.name": "n", "a.alone_null": 5}),
        done("whole", "AVX2", {"a.x": 3.0, "a.x_null": 0.4, "a.x_ci_low": 0.0, "a.name": "n", "a.alone_null": 5}),
    ]
    x, alone = movements(rows)
    assert (x.key, x.low, x.mean, x.high, x.low_at, x.high_at, x.runs) == (
        "a.x",
        1.0,
        2.0,
        3.0,
        "AVX, seed 0",
        "AVX2, seed 0",
        2,
    )
    assert x.null == pytest.approx(0.3)
    # a null without its figure is a figure
    assert (alone.key, alone.moves) == ("a.alone_null", False)
    values = {"low": 5, "mean": 5, "high": 5, "runs": 2}
    assert as_results([alone]) == {f"stability.a.alone_null.{name}": value for name, value in values.items()}


def test_figures_of_many_runs_stand_for_those_of_few():
    many = [done("validation", "AVX", {"organism.x": 1.0})]
    few = [done("whole", "AVX", {"organism.x": 9.0, "model.y": 2.0})]
    assert [(m.key, m.high) for m in movements(many + few)] == [("organism.x", 1.0), ("model.y", 2.0)]


def test_runs_are_programs_and_are_not_repeated(tmp_path, monkeypatch, capsys):
    calls = []

    def program(command, *, env, stdout, stderr, check):
        folder = next(Path(a.removeprefix("--workdir=")) for a in command if a.startswith("--workdir="))
        calls.append((folder.name, env["XLA_FLAGS"].split()[-1]))
        if folder.name == "validation_AVX2_seed1" and len(calls) < 7:
            stdout.write("something broke\n")
            return types.SimpleNamespace(returncode=1)
        f1 = {"organism.edge_f1_worst": 0.9, "organism.edge_f1_mean": 0.96, "organism.edge_f1_worst_null": 0.1}
        missed = {"run.bars_failed": 1} if folder.name == "whole_AVX_seed0" else {"run.bars_failed": 0}
        (folder / "results.json").write_text(json.dumps(f1 | missed | {"run.peak_rss_gb": 1.0}))
        return types.SimpleNamespace(returncode=3 if missed["run.bars_failed"] else 0)

    monkeypatch.setattr(subprocess, "run", program)
    monkeypatch.setattr(stability, "missing_sets", lambda names: ("AVX512",))
    config = StabilityConfig(instruction_sets="AVX,AVX2,AVX512", seeds=2)
    # a run that failed and a bar that was missed: the page is written, and the exit code says so
    with pytest.raises(SystemExit) as stopped:
        stability.main(config, str(tmp_path))
    assert stopped.value.code == 3
    assert "something broke" in capsys.readouterr().out
    assert calls[0] == ("validation_AVX_seed0", "--xla_cpu_max_isa=AVX")
    assert len(calls) == 6
    with pytest.raises(SystemExit):
        stability.main(config, str(tmp_path))
    # only the one that failed was made again
    assert [name for name, _ in calls[6:]] == ["validation_AVX2_seed1"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["stability.organism.edge_f1_worst"] == 0.9
    assert results["stability.organism.edge_f1_mean"] == pytest.approx(0.96)
    assert results["stability.pipeline.bars_failed"] == 1
    assert results["stability.runs_failed"] == 0
    assert results["stability.missing_instruction_sets"] == "AVX512"
    page = (tmp_path / "report.html").read_text()
    assert "This machine does not have AVX512" in page
    assert "edge_f1_worst" in page
