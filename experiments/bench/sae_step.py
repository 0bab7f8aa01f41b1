"""How fast a training step of a sparse dictionary is: beside SAELens, in the same run, and beside the machine's limit.

    python -m experiments.bench.sae_step --workdir=runs/bench_sae_step

Random activations of width 768, 12,288 latents, 32 codes per token, 4,096 tokens per step, float32. `sae_step.seconds`
is a TopK step of a training as `fit` runs it, many in one program: gathering and scaling the batch, choosing, loss,
exact gradients, Adam, unit decoder rows, statistics. `call_seconds` is a call of `train_step` for one step, which asks
the system for new memory every time; `cold_seconds` is the first such call, tracing and compilation included. Both
warm figures stand beside SAELens: `vs_saelens` and `call_vs_saelens`. `limit.py` and `step_limit.py` say what the
limit is.

SAELens' own trainer (torch on the CPU, as many threads, no autocast, no compilation) starts from the same weights and
sees the same batches; the two run one after the other, never at the same time. `vs_saelens` is against its default
configuration. `vs_saelens_sparse` is against the one that is faster on a CPU: codes in sparse tensors
(`use_sparse_activations`), which there run only without `rescale_acts_by_decoder_norm`. Both trainers' auxiliary losses
are zero here, for no latent is dead; they would differ then (SAELens' coefficient is 1 on up to d_in / 2 latents per
token, ours 0.2 on 64). SAELens' step also clips gradients and leaves decoder norms alone. A training of ours with these
two and SAELens' decay rates, timed as `as_sae_lens_vs_topk`, must find the same loss at the first step
(`loss_difference`) and the same error at the second (`error_difference_after_step`), both relative.

`<architecture>_vs_topk` are medians of ratios of two steps, one right after the other; `dead_vs_topk` is a TopK step
in which every latent counts as dead, so that its auxiliary loss is computed. JumpReLU has 64 places per token and a
threshold that gives 32 codes per token at the start; `jumprelu_overflow` is the share of steps that did not fit and
were computed densely. `vmapped8_vs_8` is one program that trains 8 smaller dictionaries (512 wide, 4,096 latents,
1,024 tokens), as `fit_many` does, over 8 trainings of one each; `many.in_turn_vs_8` and `many.vmap_vs_8` are its
two ways.

`memory.<architecture>_temporary_mb` is what XLA says the compiled step needs beside its state, its gradients included;
`memory.dense_codes_mb` is one array of tokens × latents. `memory.dense_arrays_kept` counts the arrays of that size that
the forward passes of all these architectures keep for the backward pass.

The first run installs torch and SAELens (a few minutes, kept in the user's cache folder); `--config.peers=false` leaves
them out. On 2 CPU cores the rest takes about 6 minutes with the peer and 4 without. Nothing else may run meanwhile: the
figures count only where `run.other_load` is small and `limit.holds` is true.
"""

import dataclasses
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from experiments.bench import limit, step_limit
from experiments.bench.harness import Measurement, keep_to_cores, limited, run_measurements
from experiments.bench.peer import PEERS, PeerError, interpreter, run_script
from experiments.bench.sae_setting import (
    AS_SAE_LENS,
    BATCHES,
    EACH_OF_MANY,
    FULL,
    SMOKE,
    Training,
    Trainings,
    activations,
)
from experiments.bench.timing import Disturbance, cold_seconds, ratios, seconds
from mi_jax.run import Progress, Workdir
from mi_jax.run.launch import launch

BARS = {
    "sae_step.vs_saelens": "≥ 10",
    "sae_step.fraction_of_limit": "≥ 0.65",
    "sae_step.batchtopk_vs_topk": "≤ 1.5",
    "sae_step.jumprelu_vs_topk": "≤ 1.5",
    "sae_step.vmapped8_vs_8": "≤ 1",
    "sae_step.loss_difference": "≤ 0.0001",
    "sae_step.error_difference_after_step": "≤ 0.0001",
    "memory.dense_arrays_kept": "= 0",
    "run.other_load": "≤ 0.05",
}
SCRIPT = PEERS / "sae_lens_step.py"
# results, and the options of the peer's script
PEER_RUNS = {"sae_lens": (), "sae_lens_sparse": ("--sparse",)}
ARCHITECTURES = ("topk", "batchtopk", "jumprelu", "matryoshka", "hierarchical_topk")
WARM_STEPS = 4
WARM_CALLS = 2
PEER_STEPS = 2
MANY = 8


@dataclasses.dataclass(frozen=True)
class SaeStepBenchConfig:
    """Settings of the benchmark.

    Attributes:
      smoke: a tiny shape; its figures mean nothing.
      peers: time SAELens too.
      peer_python: an interpreter that has it; empty means an environment made for it.
      threads: CPU cores for this program and for the peer.
      rounds: how often everything is timed; the medians are reported.
      pairs: pairs of steps for every ratio of two of ours.
    """

    smoke: bool = False
    peers: bool = True
    peer_python: str = ""
    threads: int = 2
    rounds: int = 3
    pairs: int = 9
    seed: int = 0


class Bench:
    """The measurements, and what they time."""

    def __init__(self, config: SaeStepBenchConfig, console: Console):
        self.config, self.console = config, console
        self.shape = SMOKE if config.smoke else FULL
        self.key, key = jax.random.split(jax.random.key(config.seed))
        self.batches = activations(self.shape, BATCHES, key=key)

    def measurements(self) -> list[tuple[str, float, Measurement]]:
        return [
            ("step", 240 if self.config.peers else 60, self.step),
            ("architectures", 120, self.architectures),
            ("many", 60, self.many),
        ]

    def training(self, name: str, **options: Any) -> Training:
        return Training(name, self.shape, self.batches, key=self.key, **options)

    def step(self, progress: Progress) -> dict[str, Any]:
        shape, ours, cold = self.shape, self.training("topk"), []
        training, warm, calls = Trainings(1, shape, key=self.key), list[float](), list[float]()
        runs: dict[str, list[dict[str, Any]]] = {}
        matmul, write, disturbance = 0.0, 0.0, Disturbance()
        adam = optax_adam = float("inf")
        with tempfile.TemporaryDirectory() as folder:
            arrays = Path(folder) / "arrays.safetensors"
            progress(0.0, "the peer's environment")
            python = self._peer()
            if python:
                ours.save(arrays)
            for turn in range(self.config.rounds):
                progress((turn + 0.05) / self.config.rounds, f"round {turn + 1}: topk")
                with disturbance:
                    cold.append(cold_seconds(ours.step))
                    calls += [seconds(ours.step) for _ in range(WARM_STEPS)]
                    seconds(training.call)
                    warm += [seconds(training.call) / training.STEPS for _ in range(WARM_CALLS)]
                matmul = max(matmul, limit.matmul_rate([(shape.batch, shape.d_in, shape.d_sae)]))
                write = max(write, step_limit.write_rate(shape.d_in, shape.d_sae))
                adam = min(adam, step_limit.adam_seconds(shape.d_in, shape.d_sae))
                optax_adam = min(optax_adam, step_limit.optax_adam_seconds(shape.d_in, shape.d_sae))
                for i, (name, options) in enumerate(PEER_RUNS.items()):
                    if python is None:
                        break
                    progress((turn + 0.3 + 0.35 * i) / self.config.rounds, f"round {turn + 1}: {name}")
                    try:
                        with disturbance:
                            runs.setdefault(name, []).append(self._run_peer(python, arrays, options))
                    except PeerError as error:
                        self._without_peer(error)
                        python, runs = None, {}
        strict = step_limit.step_seconds(
            shape.d_in, shape.d_sae, shape.batch, matmul_rate=matmul, write_rate=write, adam=adam
        )
        fewest = step_limit.encoder_flops(shape.d_in, shape.d_sae, shape.batch) / matmul + optax_adam
        results = {
            "sae_step.seconds": statistics.median(warm),
            "sae_step.seconds_low": min(warm),
            "sae_step.seconds_high": max(warm),
            "sae_step.call_seconds": statistics.median(calls),
            "sae_step.call_seconds_low": min(calls),
            "sae_step.call_seconds_high": max(calls),
            "sae_step.cold_seconds": statistics.median(cold),
            "sae_step.compile_seconds": statistics.median(cold) - statistics.median(calls),
            "sae_step.tokens_per_second": shape.batch / statistics.median(warm),
            "limit.matmul_gflops": matmul / 1e9,
            "limit.write_gb_per_second": write / 1e9,
            "limit.adam_seconds": adam,
            "limit.optax_adam_seconds": optax_adam,
            "sae_step.fraction_of_traffic_limit": strict / statistics.median(warm),
        }
        results |= limited("sae_step", fewest, warm, self.console, holds=True)
        if runs:
            results |= self._beside_peer(runs, statistics.median(warm), statistics.median(calls))
        return results | ({} if disturbance.share is None else {"run.other_load": disturbance.share})

    def _beside_peer(self, runs: Mapping[str, Sequence[Mapping[str, Any]]], ours: float, call: float) -> dict[str, Any]:
        results: dict[str, Any] = {}
        for name, each in runs.items():
            taken = [second for run in each for second in run["seconds"]]
            results |= {
                f"sae_step.{name}_seconds": statistics.median(taken),
                f"sae_step.{name}_seconds_low": min(taken),
                f"sae_step.{name}_seconds_high": max(taken),
                f"sae_step.{name.replace('sae_lens', 'vs_saelens')}": statistics.median(taken) / ours,
                f"sae_step.call_{name.replace('sae_lens', 'vs_saelens')}": statistics.median(taken) / call,
            }
        same, theirs = self.training("topk", train=AS_SAE_LENS), runs["sae_lens"][0]
        same.step()
        loss = float(same.metrics["loss"])
        same.step()
        error = float(same.metrics["reconstruction"])
        results |= {
            "sae_step.loss": loss,
            "sae_step.loss_difference": abs(loss / theirs["loss"][0] - 1),
            "sae_step.error_difference_after_step": abs(error / theirs["error"][1] - 1),
        }
        return results | {f"peer.{package}": version for package, version in theirs["versions"].items()}

    def architectures(self, progress: Progress) -> dict[str, Any]:
        topk = self.training("topk")
        variants: dict[str, dict[str, Any]] = {name: {"name": name} for name in ARCHITECTURES}
        variants |= {
            "dead": {"name": "topk", "all_dead": True},
            "as_sae_lens": {"name": "topk", "train": AS_SAE_LENS},
        }
        results: dict[str, Any] = {"memory.dense_codes_mb": self.shape.dense_bytes / 1e6}
        dense_arrays = 0
        for i, (variant, options) in enumerate(variants.items()):
            progress(i / len(variants), variant)
            made, overflow = self.training(**options), []
            if variant in ARCHITECTURES:
                if (needed := made.temporary_bytes()) is not None:
                    results[f"memory.{variant}_temporary_mb"] = needed / 1e6
                dense_arrays += made.dense_arrays_kept()
            if variant != "topk":
                disturbance = Disturbance()

                def step(made=made, overflow=overflow):
                    state = made.step()
                    overflow.append(made.metrics["overflow"])
                    return state

                with disturbance:
                    compared = ratios(step, topk.step, self.config.pairs)
                results |= {
                    f"sae_step.{variant}_vs_topk": statistics.median(compared),
                    f"sae_step.{variant}_vs_topk_low": min(compared),
                    f"sae_step.{variant}_vs_topk_high": max(compared),
                }
                if disturbance.share is not None:
                    results[f"run.{variant}_other_load"] = disturbance.share
            if variant == "jumprelu":
                results["sae_step.jumprelu_l0"] = float(made.metrics["l0"])
                results["sae_step.jumprelu_overflow"] = sum(float(share) for share in overflow) / len(overflow)
        return results | {"memory.dense_arrays_kept": dense_arrays}

    def many(self, progress: Progress) -> dict[str, Any]:
        shape = SMOKE if self.config.smoke else EACH_OF_MANY
        # as many dictionaries, for one alone would stay in the cache from call to call
        each = [Trainings(1, shape, key=self.key) for _ in range(MANY)]

        def one_after_the_other():
            return [training.call() for training in each]

        results: dict[str, Any] = {}
        for i, name in enumerate(("in_turn", "vmap")):
            progress(i / 2, name)
            program = Trainings(MANY, shape, key=self.key, together=name == "vmap")
            compared = ratios(program.call, one_after_the_other, self.config.pairs)
            results |= {
                f"many.{name}_vs_8": statistics.median(compared),
                f"many.{name}_vs_8_low": min(compared),
                f"many.{name}_vs_8_high": max(compared),
            }
        return results | {"sae_step.vmapped8_vs_8": results["many.in_turn_vs_8"]}

    def _peer(self) -> Path | None:
        """The peer's interpreter; if it cannot be had it is left out, after a line that says why."""
        try:
            return interpreter(SCRIPT, self.config.peer_python) if self.config.peers else None
        except PeerError as error:
            self._without_peer(error)
            return None

    def _run_peer(self, python: Path, arrays: Path, options: Sequence[str]) -> dict[str, Any]:
        given = [f"--arrays={arrays}", f"--k={self.shape.k}", f"--repeats={PEER_STEPS}"]
        device = "cpu" if jax.default_backend() == "cpu" else "cuda"
        return run_script(python, SCRIPT, *given, f"--threads={self.config.threads}", f"--device={device}", *options)

    def _without_peer(self, error: PeerError) -> None:
        self.console.print(f"without SAELens: {error}", markup=False, soft_wrap=True)


def run_bench(config: SaeStepBenchConfig, workdir: str, *, console: Console | None = None) -> dict[str, Any]:
    """Runs what the workdir does not have yet, prints the table, and returns the results.

    Raises:
      WorkdirError: the workdir holds another experiment or another config.
    """
    console = console or Console(highlight=False)
    folder = Workdir.open(workdir, config, experiment="bench.sae_step")
    measurements = Bench(config, console).measurements()
    return run_measurements(folder, measurements, bars=None if config.smoke else BARS, console=console)


def main(config: SaeStepBenchConfig, workdir: str) -> None:
    """Runs the benchmark on so many cores, compiling everything anew."""
    keep_to_cores(config.threads)
    # a first step must compile, also where an earlier run has left its program
    jax.config.update("jax_enable_compilation_cache", False)
    run_bench(config, workdir)


if __name__ == "__main__":
    launch(main, SaeStepBenchConfig(), workdir="runs/bench_sae_step")
