"""Runs of an experiment as programs of their own: an instruction set is chosen before XLA starts."""

import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

from experiments.stability.config import INSTRUCTION_SETS, StabilityConfig

# exit codes of a run that went to its end: all bars met, and some missed
_FINISHED = (0, 3)
_LINES_OF_A_FAILURE = 12


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
      part: what is compared with what: "validation" and "whole" for the pipeline, "whole" for others.
      seed: None where the experiment has none.
      flags: beside the workdir.
    """

    part: str
    instruction_set: str
    seed: int | None
    flags: tuple[str, ...]

    @property
    def place(self) -> str:
        return self.instruction_set if self.seed is None else f"{self.instruction_set}, seed {self.seed}"

    @property
    def name(self) -> str:
        return "_".join([self.part, self.instruction_set] + ([] if self.seed is None else [f"seed{self.seed}"]))


@dataclasses.dataclass(frozen=True)
class Done:
    """What a run gave: its figures, or why there are none."""

    run: Run
    results: dict
    seconds: float
    code: int
    error: str = ""

    @property
    def finished(self) -> bool:
        return self.code in _FINISHED


def planned(config: StabilityConfig, sets: tuple[str, ...]) -> list[Run]:
    """The runs, those of one instruction set one after the other."""
    more = tuple(shlex.split(config.flags))
    seeds = range(config.first_seed, config.first_seed + config.seeds) if config.seeds else [None]

    def run(part: str, name: str, seed: int | None, *flags: str) -> Run:
        seeded = () if seed is None else (f"--config.seed={seed}",)
        return Run(part, name, seed, (*seeded, *flags, *more))

    if config.experiment != "pipeline":
        return [run("whole", name, seed) for name in sets for seed in seeds]
    # only the organism that is trained differs from run to run
    only = ("--config.stages=validation", "--config.organisms=1")
    runs = [run("validation", name, seed, *only) for name in sets for seed in seeds]
    return runs + [run("whole", name, seeds[0]) for name in sets if config.whole]


def missing_sets(names: tuple[str, ...]) -> tuple[str, ...]:
    """The instruction sets that this machine does not have; where it does not say what it has, none is missing."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return names
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ()
    has = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), None)
    return () if has is None else tuple(name for name in names if INSTRUCTION_SETS[name] not in has)


def execute(run: Run, experiment: str, root: Path) -> Done:
    """Runs it in a folder of its own, or reads what an earlier call left there."""
    folder = root / "runs" / run.name
    outcome, results = folder / "outcome.json", folder / "results.json"
    if not outcome.exists():
        folder.mkdir(parents=True, exist_ok=True)
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa={run.instruction_set}".strip()
        command = [sys.executable, "-m", f"experiments.{experiment}", f"--workdir={folder}", *run.flags]
        start, log = time.monotonic(), root / "logs" / f"{run.name}.txt"
        log.parent.mkdir(exist_ok=True)
        with log.open("w") as file:
            environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
            ).returncode
        seconds = time.monotonic() - start
        if code not in _FINISHED or not results.exists():
            text = log.read_text().strip().splitlines()[-_LINES_OF_A_FAILURE:]
            return Done(run, {}, seconds, code or 1, "\n".join(text))
        outcome.write_text(json.dumps({"code": code, "seconds": seconds}))
    held = json.loads(outcome.read_text())
    return Done(run, json.loads(results.read_text()), held["seconds"], held["code"])
