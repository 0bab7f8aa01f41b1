"""Kills a training at random moments and resumes it: are all losses the same, bit for bit?

    python -m experiments.kill_and_resume --workdir=runs/kill_and_resume

Trains three dictionaries (TopK, BatchTopK, JumpReLU) on the stream of a small model's activations without a stop; then,
20 times, the same in a process that is killed (SIGKILL) at a random moment between its first steps and its last, and is
started again. Compares the losses of every step and what comes out. As a control, a run with another seed must differ.
Prints how many are equal; 6 minutes on 2 CPU cores.
"""

import dataclasses
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from experiments.kill_and_resume.training import STEPS
from mi_jax.core.errors import InputError
from mi_jax.run import Workdir
from mi_jax.run.launch import launch


@dataclasses.dataclass(frozen=True)
class KillConfig:
    """Settings.

    Attributes:
      runs: how many trainings are killed.
      seed: draws the moments.
    """

    runs: int = 20
    seed: int = 0


def main(config: KillConfig, workdir: str) -> None:
    """Runs the comparison."""
    console = Console(highlight=False)
    folder = Workdir.open(workdir, config, experiment="kill_and_resume")
    root, draw = Path(str(folder.path)), random.Random(config.seed)
    whole, control = (_outcome(root / name, seed) for name, seed in (("whole", 0), ("control", 1)))
    equal = 0
    for i in range(config.runs):
        place = root / f"killed_{i}"
        reached = _killed(place, draw.randrange(1, STEPS), draw.uniform(0.0, 0.2))
        same = _same(_outcome(place, 0), whole)
        equal += same
        console.print(f"{i + 1} of {config.runs}: killed after step {reached}, {'equal' if same else 'DIFFERENT'}")
    differs = not _same(control, whole)
    folder.add_results({"resume.equal": equal, "resume.runs": config.runs, "resume.another_seed_differs": differs})
    console.print(f"{equal}/{config.runs} bit-equal; another seed differs: {differs}")
    if equal < config.runs or not differs:
        raise InputError(f"{config.runs - equal} of {config.runs} runs did not go on to the same numbers")


def _command(place: Path, seed: int) -> list[str]:
    return [sys.executable, "-m", "experiments.kill_and_resume.training", str(place), str(seed)]


def _outcome(place: Path, seed: int) -> dict[str, np.ndarray]:
    """Runs the training to its end, unless it is done; all that came out."""
    if not (place / "outcome.npz").exists():
        place.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(_command(place, seed), capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"the training in {place} failed: {done.stderr.strip()[-500:]}")
    with np.load(place / "outcome.npz", allow_pickle=False) as held:
        return dict(held)


def _killed(place: Path, step: int, delay: float) -> int:
    """Starts the training and kills it some time after this step; the last step that it told of."""
    place.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(_command(place, 0), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    reached = 0
    for line in process.stdout:
        reached = int(line)
        if reached >= step:
            break
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return reached


def _same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


if __name__ == "__main__":
    launch(main, KillConfig(), workdir="runs/kill_and_resume")
