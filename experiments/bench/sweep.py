"""How fast a patching sweep is: beside TransformerLens, in the same run, and beside the machine's limit.

    python -m experiments.bench.sweep --workdir=runs/bench_sweep

GPT-2-small's shape with random weights, 8 prompts of 16 tokens, float32: the residual stream patched over
layer × position (192 cells) and all 144 heads at all positions. The peers run one after the other with ours, never at
the same time, on the same weights and prompts; the largest difference between the results is among the figures.
`transformer_lens` is its newest release, `hooked_transformer` the last one that has `HookedTransformer`. The first run
installs both (a few minutes, kept in the user's cache folder); `--config.peers=false` leaves them out. On 2 CPU cores
the rest takes about 15 minutes with the peers and 2 without. On two cores of an AMD server CPU, TransformerLens 4.3.0
takes 14 times as long for the residual stream (41.3 s beside 3.0 s), 8 times for the heads (30.8 s beside 3.8 s), and
11 times for both. About a factor of 5 is the fewer operations of the resumed sweep; the rest is the rate at which they
run, which differs between CPUs.

Nothing else may run meanwhile: `run.other_load` is the largest share of the processors that other programs took from a
measurement, and the figures count only where it is small and `limit.holds` is true. A ratio far above the ratio of the
operations (about 5 for the residual stream, 3 to 4 for the heads) then still wants an explanation.
"""

import dataclasses
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import mi_jax as mi
from experiments.bench import limit
from experiments.bench.harness import Measurement, keep_to_cores, limited, run_measurements
from experiments.bench.peer import PEERS, PeerError, interpreter, run_script
from experiments.bench.setting import BATCH, GPT2_SMALL, N_POS, SMOKE, TOKENS, Setting, metric, setting
from experiments.bench.timing import Disturbance, cold_seconds, median_ratio, seconds
from mi_jax.core.attribution import attribute
from mi_jax.run import Progress, Workdir
from mi_jax.run.launch import launch

BARS = {
    "both.warm_vs_transformer_lens": "≥ 10",
    "both.cold_vs_transformer_lens": "≥ 5",
    "sweep.warm_vs_transformer_lens": "≥ 10",
    "sweep.cold_vs_transformer_lens": "≥ 5",
    "sweep.fraction_of_limit": "≥ 0.6",
    "sweep.difference_loop": "≤ 0.0001",
    "sweep.difference_transformer_lens": "≤ 0.0001",
    "run.other_load": "≤ 0.05",
    "capture.overhead": "≤ 0.03",
    "attribution.forward_ratio": "≤ 4",
}
# results, and the site that is patched with the axes of the sweep
SWEEPS = {"sweep": ("resid_pre", ("layer", "pos")), "heads": ("attn.z", ("layer", "head"))}
SCRIPTS = {"transformer_lens": "transformer_lens_sweep.py", "hooked_transformer": "hooked_transformer_sweep.py"}
LOOP_CELLS = 6
WARM_CALLS = 3


@dataclasses.dataclass(frozen=True)
class SweepBenchConfig:
    """Settings of the benchmark.

    Attributes:
      smoke: a tiny model; its figures mean nothing.
      peers: time the other programs too.
      peer_python: an interpreter that has TransformerLens 4; empty means an environment made for it.
      hooked_python: an interpreter that has TransformerLens 3.
      threads: CPU cores for this program and for the peers.
      rounds: how often everything is timed; the medians are reported.
      pairs: pairs of calls for the two ratios to a forward.
    """

    smoke: bool = False
    peers: bool = True
    peer_python: str = ""
    hooked_python: str = ""
    threads: int = 2
    rounds: int = 3
    pairs: int = 25
    seed: int = 0


class Bench:
    """The measurements, and what they time."""

    def __init__(self, config: SweepBenchConfig, console: Console):
        self.config, self.console = config, console
        shape, batch, n_pos = (SMOKE, 2, 6) if config.smoke else (GPT2_SMALL, BATCH, N_POS)
        self.setting = setting(shape, batch, n_pos, key=jax.random.key(config.seed))

    def measurements(self) -> list[tuple[str, float, Measurement]]:
        return [
            ("sweeps", 800 if self.config.peers else 180, self.sweeps),
            ("capture", 30, self.capture),
            ("attribution", 40, self.attribution),
        ]

    def sweeps(self, progress: Progress) -> dict[str, Any]:
        made, calls, values = self.setting, {}, {}
        for name, (site, axes) in SWEEPS.items():
            edit = mi.patch(site, made.activations, **dict.fromkeys(axes, mi.each))
            calls[name] = mi.jit(mi.sweep(made.model, edit, metric))
        ours: dict[str, list[float]] = {f"{name}.{kind}": [] for name in SWEEPS for kind in ("cold", "warm")}
        theirs: dict[str, list[Any]] = {}
        shapes, rate, disturbance = limit.matmul_shapes(made.model.config), 0.0, Disturbance()
        with tempfile.TemporaryDirectory() as folder:
            arrays = Path(folder) / "arrays.safetensors"
            progress(0.0, "the peers' environments")
            peers = self._peers()
            if peers:
                made.save(arrays)
            for turn in range(self.config.rounds):
                for name, call in calls.items():
                    progress((turn + 0.05) / self.config.rounds, f"round {turn + 1}: {name}")

                    def run(call=call):
                        return call(made.corrupt, output_pos=made.last)

                    with disturbance:
                        ours[f"{name}.cold"].append(cold_seconds(run))
                        ours[f"{name}.warm"] += [seconds(run) for _ in range(WARM_CALLS)]
                    # between the sweeps: the rate of another moment may be that of another machine
                    rate = max(rate, limit.matmul_rate(shapes))
                    values[name] = np.asarray(run())
                for peer, python in list(peers.items()):
                    progress((turn + 0.3) / self.config.rounds, f"round {turn + 1}: {peer}")
                    options = (f"--arrays={arrays}", "--repeats=1", f"--threads={self.config.threads}")
                    try:
                        with disturbance:
                            theirs.setdefault(peer, []).append(run_script(python, PEERS / SCRIPTS[peer], *options))
                    except PeerError as error:
                        self._without(peer, error)
                        del peers[peer], theirs[peer]
        disturbed = {} if disturbance.share is None else {"run.other_load": disturbance.share}
        return self._limits(rate, ours) | self._sweep_results(ours, theirs, values) | disturbed

    def _limits(self, rate: float, ours: Mapping[str, list[float]]) -> dict[str, Any]:
        """The limits, and whether they hold: no call may be faster than what it is said to need."""
        config, (batch, n_pos) = self.setting.model.config, self.setting.clean.shape
        needed = {"sweep": limit.residual_sweep_flops, "heads": limit.head_sweep_flops}
        results: dict[str, Any] = {"limit.matmul_gflops": rate / 1e9, "limit.holds": True}
        for name, flops in needed.items():
            fewest, taken = flops(config, batch, n_pos, logits=len(TOKENS)) / rate, ours[f"{name}.warm"]
            results |= limited(name, fewest, taken, self.console, holds=results["limit.holds"])
        return results

    def _peers(self) -> dict[str, Path]:
        """The interpreters of the peers; those that cannot be had are left out, after a line that says why."""
        given = {"transformer_lens": self.config.peer_python, "hooked_transformer": self.config.hooked_python}
        found = {}
        for peer, script in SCRIPTS.items() if self.config.peers else ():
            try:
                found[peer] = interpreter(PEERS / script, given[peer])
            except PeerError as error:
                self._without(peer, error)
        return found

    def _without(self, peer: str, error: PeerError) -> None:
        self.console.print(f"without {peer}: {error}", markup=False, soft_wrap=True)

    def _sweep_results(self, ours: Mapping, theirs: Mapping, values: Mapping[str, np.ndarray]) -> dict[str, Any]:
        results: dict[str, Any] = {}
        for name, (site, axes) in SWEEPS.items():
            warm, cold = (statistics.median(ours[f"{name}.{kind}"]) for kind in ("warm", "cold"))
            results |= {
                f"{name}.cells": values[name].size,
                f"{name}.warm_seconds": warm,
                f"{name}.cold_seconds": cold,
                f"{name}.compile_seconds": cold - warm,
                f"{name}.warm_seconds_low": min(ours[f"{name}.warm"]),
                f"{name}.warm_seconds_high": max(ours[f"{name}.warm"]),
                f"{name}.largest_value": np.abs(values[name]).max(),
                f"{name}.difference_loop": self._difference_from_loop(site, axes, values[name]),
            }
            for peer, runs in theirs.items():
                each = [second for run in runs for second in run["seconds"][site]]
                taken = statistics.median(each)
                results |= {
                    f"{name}.{peer}_seconds": taken,
                    f"{name}.{peer}_seconds_low": min(each),
                    f"{name}.{peer}_seconds_high": max(each),
                    f"{name}.warm_vs_{peer}": taken / warm,
                    f"{name}.cold_vs_{peer}": taken / cold,
                    f"{name}.difference_{peer}": np.abs(np.array(runs[0]["values"][site]) - values[name]).max(),
                }
        for peer, runs in theirs.items():
            for kind in ("warm", "cold"):
                taken, needed = (sum(results[f"{n}.{what}_seconds"] for n in SWEEPS) for what in (peer, kind))
                results[f"both.{kind}_vs_{peer}"] = taken / needed
            results |= {f"peer.{peer}.{package}": version for package, version in runs[0]["versions"].items()}
        return results

    def _difference_from_loop(self, site: str, axes: tuple[str, ...], values: np.ndarray) -> float:
        """The largest difference between the sweep and single interventions, on cells drawn at random."""
        made, rng = self.setting, np.random.default_rng(self.config.seed)
        largest = 0.0
        for flat in rng.choice(values.size, min(LOOP_CELLS, values.size), replace=False):
            cell = tuple(int(i) for i in np.unravel_index(flat, values.shape))
            edit = mi.patch(site, made.activations, **dict(zip(axes, cell, strict=True)))
            alone = metric(mi.jit(mi.intervene(made.model, edit))(made.corrupt))
            largest = max(largest, abs(float(alone) - float(values[cell])))
        return largest

    def capture(self, progress: Progress) -> dict[str, Any]:
        made = self.setting
        plain, captured = mi.jit(made.model), mi.jit(mi.capture(made.model, "resid_post"))
        ratio = median_ratio(lambda: captured(made.corrupt), lambda: plain(made.corrupt), self.config.pairs)
        return {"capture.overhead": ratio - 1, "capture.empty_taps_equal_program": empty_taps_are_free(made)}

    def attribution(self, progress: Progress) -> dict[str, float]:
        made = self.setting
        plain = mi.jit(made.model)
        attributed = mi.jit(attribute(made.model, metric, ("attn.z", "mlp_out")))
        ratio = median_ratio(
            lambda: attributed(made.clean, made.corrupt, output_pos=made.last),
            lambda: plain(made.corrupt, output_pos=made.last),
            self.config.pairs,
        )
        return {"attribution.forward_ratio": ratio}


def empty_taps_are_free(made: Setting) -> bool:
    """Whether a forward with empty taps is lowered to the same text as one without taps."""

    def lowered(**options) -> str:
        def forward(model, tokens):
            return model(tokens, **options)

        return jax.jit(forward).lower(made.model, made.corrupt).as_text()

    return lowered(taps={}) == lowered()


def run_bench(config: SweepBenchConfig, workdir: str, *, console: Console | None = None) -> dict[str, Any]:
    """Runs what the workdir does not have yet, prints the table, and returns the results.

    Raises:
      WorkdirError: the workdir holds another experiment or another config.
    """
    console = console or Console(highlight=False)
    folder = Workdir.open(workdir, config, experiment="bench.sweep")
    measurements = Bench(config, console).measurements()
    return run_measurements(folder, measurements, bars=None if config.smoke else BARS, console=console)


def main(config: SweepBenchConfig, workdir: str) -> None:
    """Runs the benchmark on so many cores, compiling everything anew."""
    keep_to_cores(config.threads)
    # a first call must compile, also where an earlier run has left its programs
    jax.config.update("jax_enable_compilation_cache", False)
    run_bench(config, workdir)


if __name__ == "__main__":
    launch(main, SweepBenchConfig(), workdir="runs/bench_sweep")
