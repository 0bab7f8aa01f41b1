"""Stages run in order, resume, and account for time and memory across runs."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from rich.console import Console

from mi_jax.run import Stage, Workdir, peak_rss_gb, run_stages


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0


@pytest.fixture
def workdir(tmp_path):
    return Workdir.open(tmp_path / "run", Config())


def console():
    return Console(file=io.StringIO(), force_terminal=False)


def stages_that(calls, **functions):
    def called(name, function):
        def run(progress):
            calls.append(name)
            return function(progress)

        return run

    return [Stage(name, f"the {name}", called(name, f), 1.0) for name, f in functions.items()]


def test_stages_run_in_order_and_only_once(workdir):
    calls = []
    stages = stages_that(calls, model=lambda p: {"loss": 1.5}, circuit=lambda p: p(0.5, "half"))
    assert run_stages(workdir, stages, console=console()) == {"model": {"loss": 1.5}, "circuit": {}}
    assert run_stages(workdir, stages, console=console()) == {"model": {"loss": 1.5}, "circuit": {}}
    assert calls == ["model", "circuit"]


def test_an_interrupt_says_in_one_line_what_is_kept_and_exits_with_130(workdir):
    def interrupted(progress):
        raise KeyboardInterrupt

    calls, out = [], console()
    stages = stages_that(calls, model=lambda p: {}, circuit=interrupted, report=lambda p: {})
    with pytest.raises(SystemExit) as stop:
        run_stages(workdir, stages, console=out)
    assert stop.value.code == 130
    assert out.file.getvalue().splitlines()[-1] == (
        f"Stopped. {workdir.path} keeps 1 of 3 stages (model); run the same command again to go on from there."
    )
    run_stages(workdir, stages_that(calls, model=lambda p: {}, circuit=lambda p: {}, report=lambda p: {}), console=out)
    assert calls == ["model", "circuit", "circuit", "report"]


def test_an_error_keeps_its_kind_and_says_which_stage(workdir):
    def failing(progress):
        raise ZeroDivisionError("no")

    with pytest.raises(ZeroDivisionError) as error:
        run_stages(workdir, stages_that([], model=lambda p: {}, circuit=failing), console=console())
    assert "In stage 'circuit'" in error.value.__notes__[0]
    assert workdir.stage_done("model")
    assert not workdir.stage_done("circuit")


def test_seconds_add_up_over_the_runs_and_memory_is_their_maximum(workdir):
    def fails_late(progress):
        time.sleep(0.2)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        run_stages(workdir, stages_that([], model=fails_late), console=console())
    held = (workdir.path / "costs.json").read_text()
    (workdir.path / "costs.json").write_text(held.replace('"peak_rss_gb": ', '"peak_rss_gb": 9000'))
    run_stages(workdir, stages_that([], model=lambda p: time.sleep(0.1), b=lambda p: {}), console=console())
    results = workdir.results
    assert 0.3 <= results["run.stage_seconds.model"] < 2.0
    assert results["run.seconds"] == pytest.approx(
        results["run.stage_seconds.model"] + results["run.stage_seconds.b"], abs=2e-3
    )
    assert results["run.peak_rss_gb"] > 9000


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the resident size from /proc")
def test_peak_memory_grows_with_what_is_allocated_and_stays_when_it_is_freed():
    with open("/proc/self/status") as file:
        resident = next(int(line.split()[1]) * 1024 / 1e9 for line in file if line.startswith("VmRSS:"))
    before = peak_rss_gb()
    block = np.ones(int((before - resident + 0.064) * 1e9), np.uint8)
    grown = peak_rss_gb() - before
    del block
    assert 0.06 < grown < 0.1
    # The kernel counts pages in batches, so the figure can fall by a few.
    assert peak_rss_gb() - before >= grown - 0.001


def test_two_stages_of_one_name_are_refused(workdir):
    stage = Stage("model", "raw model", lambda p: {}, 1.0)
    with pytest.raises(ValueError, match=r"unique, got \['model', 'model'\]"):
        run_stages(workdir, [stage, stage])


PROGRAM = """
import os, signal
from mi_jax.run import Stage, Workdir, run_stages

def run(folder, kill):
    workdir = Workdir.open(folder, {"seed": 0}, experiment="x")

    def stage(name, value):
        def work(progress):
            workdir.add_results({f"{name}.value": value})
            if name == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            return {"value": value}
        return Stage(name, name, work, 1.0)

    run_stages(workdir, [stage("a", 1), stage("b", 2), stage("c", 3)])
    return {name: value for name, value in workdir.results.items() if not name.startswith("run.")}
"""


def test_a_run_killed_outright_resumes_to_the_same_results(tmp_path, capsys):
    killed = subprocess.run(
        [sys.executable, "-c", f"{PROGRAM}\nrun({str(tmp_path / 'killed')!r}, 'b')"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    program = {}
    exec(PROGRAM, program)
    resumed = program["run"](tmp_path / "killed", None)
    assert "1/3 a done by an earlier run" in capsys.readouterr().out
    assert resumed == program["run"](tmp_path / "straight", None) == {"a.value": 1, "b.value": 2, "c.value": 3}
