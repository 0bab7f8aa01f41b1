"""How fast a forward, decoding and loading are: beside `transformers`, in the same run, and beside the machine's limit.

    python -m experiments.bench.forward --workdir=runs/bench_forward

SmolLM2-135M in float32, 8 prompts of real text. `forward` is one call on 128 tokens of each, with the logits of all
positions. `decode` continues their first 16 tokens by 64, greedily, with a cache; reading the 16 is part of the time
and counts no tokens. `transformers` (torch on the CPU, as many threads) gets the same weights, written in its own
format, and the same prompts; the two run one after the other, never at the same time. Both must find the same logits
and the same tokens. The limit of `forward` is operations / the measured rate of matmuls; that of `decode` is, for every
step, the larger of this and the bytes of the weights and the cache / the measured rate of reads.

`load` is measured in processes of its own, on the directory and on the GGUF file, both in the system's cache of files:
`seconds` until the weights are there in float32; `first_logits_seconds`, from the start of loading until one prompt's
logits are there, with and without the persistent cache of compiled programs; `peak_rss_over_weights`, by how much the
resident memory grew at its largest, over the bytes of the weights in float32. The libraries' own memory, and what the
backend takes when it starts, are not in it.

The first run installs torch and transformers (a few minutes, kept in the user's cache folder); `--config.peers=false`
leaves them out. On 2 CPU cores the rest takes about 3 minutes. On an AMD server CPU, `transformers` took 2.2 times as
long for a forward and 1.6 to 2.6 times for decoding. Nothing else may run meanwhile: the figures count only
where `run.other_load` is small and `limit.holds` is true.
"""

import dataclasses
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Int
from rich.console import Console

import mi_jax as mi
from experiments.bench import limit
from experiments.bench.harness import Measurement, keep_to_cores, limited, run_measurements
from experiments.bench.peer import PEERS, PeerError, interpreter, run_script
from experiments.bench.timing import Disturbance, seconds
from mi_jax.data import contexts, python_topics, tokenizer_from_gguf
from mi_jax.models import Decoder, DecoderConfig, init_decoder, open_gguf, smollm2_path
from mi_jax.models.checkpoints.huggingface import load
from mi_jax.models.checkpoints.saving import save
from mi_jax.models.generate import generate
from mi_jax.run import Progress, Workdir, enable_compilation_cache
from mi_jax.run.launch import launch

BARS = {
    "forward.vs_transformers": "≥ 1",
    "decode.vs_transformers": "≥ 1.5",
    "forward.difference_transformers": "≤ 0.001",
    "decode.same_tokens": "= 1",
    "load.peak_rss_over_weights": "≤ 1.3",
    "load.gguf_peak_rss_over_weights": "≤ 1.3",
    "run.other_load": "≤ 0.05",
}
SCRIPT = PEERS / "transformers_forward.py"
LOADER = Path(__file__).with_name("load.py")
SMOKE = DecoderConfig(
    name="smoke", n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, d_head=4, d_mlp=24, d_vocab=31, n_ctx=32
)
BATCH, N_POS, N_PROMPT, N_NEW = 8, 128, 16, 64
CALLS = 3


@dataclasses.dataclass(frozen=True)
class ForwardBenchConfig:
    """Settings of the benchmark.

    Attributes:
      smoke: a tiny random model; its figures mean nothing.
      peers: time `transformers` too.
      peer_python: an interpreter that has it; empty means an environment made for it.
      threads: CPU cores for this program and for the peer.
      rounds: how often everything is timed; the medians are reported.
    """

    smoke: bool = False
    peers: bool = True
    peer_python: str = ""
    threads: int = 2
    rounds: int = 3
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model, its file if it has one, and what it is timed on."""

    model: Decoder
    file: str
    whole: Int[np.ndarray, "batch pos"]
    start: Int[np.ndarray, "batch start_pos"]
    n_new: int


def subject(config: ForwardBenchConfig) -> Subject:
    """SmolLM2 with prompts from Python's documentation; for `smoke`, random weights and tokens.

    Raises:
      CheckpointError: the weights are not installed.
    """
    if config.smoke:
        tokens = np.random.default_rng(config.seed).integers(0, SMOKE.d_vocab, (2, 8), np.int32)
        return Subject(init_decoder(SMOKE, key=jax.random.key(config.seed)), "", tokens, tokens[:, :3], 4)
    file = smollm2_path()
    tokenizer = tokenizer_from_gguf(open_gguf(file))
    text = contexts(python_topics(), tokenizer, length=N_POS, held_out_fraction=0.5, seed=config.seed)
    whole = text.train[:BATCH]
    return Subject(load(file, dtype=jnp.float32), file, whole, whole[:, :N_PROMPT], N_NEW)


class Bench:
    """The measurements, and what they time."""

    def __init__(self, config: ForwardBenchConfig, console: Console):
        self.config, self.console = config, console
        self.subject = subject(config)

    def measurements(self) -> list[tuple[str, float, Measurement]]:
        return [("speed", 200 if self.config.peers else 60, self.speed), ("load", 90, self.load)]

    def speed(self, progress: Progress) -> dict[str, Any]:
        made, forward = self.subject, mi.jit(self.subject.model)
        tokens = {"forward": jnp.asarray(made.whole), "decode": jnp.asarray(made.start)}
        calls = {
            "forward": lambda: forward(tokens["forward"]),
            "decode": lambda: generate(made.model, tokens["decode"], max_new_tokens=made.n_new).tokens,
        }
        ours: dict[str, list[float]] = {name: [] for name in calls}
        runs: list[dict[str, Any]] = []
        matmul, read, disturbance = 0.0, 0.0, Disturbance()
        shapes = limit.matmul_shapes(made.model.config, (made.whole.size,))
        with tempfile.TemporaryDirectory() as folder:
            progress(0.0, "the peer's environment")
            python = self._peer()
            if python:
                save(made.model, f"{folder}/model")
                # safetensors writes a view's memory, whatever its strides
                prompts = {"forward": made.whole, "decode": np.ascontiguousarray(made.start)}
                safetensors.numpy.save_file(prompts, f"{folder}/prompts.safetensors")
            progress(0.02, "compiling")
            logits, new = np.asarray(calls["forward"]()), np.asarray(calls["decode"]())
            for turn in range(self.config.rounds):
                for name, call in calls.items():
                    progress((turn + 0.1) / self.config.rounds, f"round {turn + 1}: {name}")
                    with disturbance:
                        ours[name] += [seconds(call) for _ in range(CALLS)]
                matmul = max(matmul, limit.matmul_rate(shapes))
                read = max(read, limit.read_rate(2**16 if self.config.smoke else 2**29))
                if python:
                    progress((turn + 0.4) / self.config.rounds, f"round {turn + 1}: transformers")
                    try:
                        with disturbance:
                            runs.append(self._run_peer(python, Path(folder), with_logits=not runs))
                    except PeerError as error:
                        self._without_peer(error)
                        python, runs = None, []
            theirs = self._beside_peer(runs, ours, logits, new, Path(folder)) if runs else {}
        disturbed = {} if disturbance.share is None else {"run.other_load": disturbance.share}
        return self._own(ours) | theirs | self._limits(ours, matmul, read) | disturbed

    def load(self, progress: Progress) -> dict[str, Any]:
        results: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            save(self.subject.model, f"{folder}/model")
            sources = {"load.": f"{folder}/model"}
            if self.subject.file:
                sources["load.gguf_"] = self.subject.file
            for i, (prefix, path) in enumerate(sources.items()):
                cached, fresh = [], []
                for turn in range(1 + self.config.rounds):
                    progress((i + turn / (1 + self.config.rounds)) / len(sources), f"loading {path}")
                    # the first of these fills the cache
                    cached.append(_load(path, f"--cache={folder}/cache"))
                    if turn:
                        fresh.append(_load(path))
                results |= _load_figures(prefix, cached[1:], fresh)
        return results

    def _own(self, ours: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        counted = {"forward": self.subject.whole.size, "decode": len(self.subject.start) * self.subject.n_new}
        results: dict[str, Any] = {}
        for name, taken in ours.items():
            results |= {
                f"{name}.tokens": counted[name],
                f"{name}.seconds": statistics.median(taken),
                f"{name}.seconds_low": min(taken),
                f"{name}.seconds_high": max(taken),
                f"{name}.tokens_per_second": counted[name] / statistics.median(taken),
            }
        return results

    def _beside_peer(
        self,
        runs: Sequence[Mapping[str, Any]],
        ours: Mapping[str, Sequence[float]],
        logits: np.ndarray,
        new: np.ndarray,
        folder: Path,
    ) -> dict[str, Any]:
        counted = {"forward": self.subject.whole.size, "decode": len(self.subject.start) * self.subject.n_new}
        results: dict[str, Any] = {}
        for name in ours:
            each = [second for run in runs for second in run["seconds"][name]]
            results |= {
                f"{name}.transformers_seconds": statistics.median(each),
                f"{name}.transformers_seconds_low": min(each),
                f"{name}.transformers_seconds_high": max(each),
                f"{name}.transformers_tokens_per_second": counted[name] / statistics.median(each),
                f"{name}.vs_transformers": statistics.median(each) / statistics.median(ours[name]),
            }
        theirs = safetensors.numpy.load_file(folder / "logits.safetensors")["logits"]
        results |= {
            "forward.largest_logit": np.abs(logits).max(),
            "forward.difference_transformers": np.abs(logits - theirs).max(),
            "decode.same_tokens": (new == np.asarray(runs[0]["tokens"])).mean(),
            "load.transformers_seconds": statistics.median(run["seconds"]["load"][0] for run in runs),
        }
        return results | {f"peer.{package}": version for package, version in runs[0]["versions"].items()}

    def _limits(self, ours: Mapping[str, Sequence[float]], matmul: float, read: float) -> dict[str, Any]:
        made, shape, start = self.subject, self.subject.model.config, self.subject.start.shape
        fewest = {
            "forward": limit.whole_forward_flops(shape, *made.whole.shape) / matmul,
            "decode": limit.decode_seconds(shape, start[0], start[1], made.n_new, matmul_rate=matmul, read_rate=read),
        }
        results: dict[str, Any] = {
            "limit.matmul_gflops": matmul / 1e9,
            "limit.read_gb_per_second": read / 1e9,
            "limit.holds": True,
        }
        for name, needed in fewest.items():
            results |= limited(name, needed, ours[name], self.console, holds=results["limit.holds"])
        return results

    def _peer(self) -> Path | None:
        """The peer's interpreter; if it cannot be had it is left out, after a line that says why."""
        try:
            return interpreter(SCRIPT, self.config.peer_python) if self.config.peers else None
        except PeerError as error:
            self._without_peer(error)
            return None

    def _run_peer(self, python: Path, folder: Path, *, with_logits: bool) -> dict[str, Any]:
        options = [f"--prompts={folder}/prompts.safetensors", f"--new-tokens={self.subject.n_new}"]
        options += [f"--repeats={CALLS}", f"--threads={self.config.threads}"]
        if with_logits:
            options.append(f"--logits={folder}/logits.safetensors")
        return run_script(python, SCRIPT, f"{folder}/model", *options)

    def _without_peer(self, error: PeerError) -> None:
        self.console.print(f"without transformers: {error}", markup=False, soft_wrap=True)


def _load(path: str, *options: str) -> dict[str, Any]:
    """One measurement by `load.py`, in a process that imports from where this one does."""
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(folder for folder in sys.path if folder)}
    return run_script(Path(sys.executable), LOADER, path, *options, environ=environ)


def _load_figures(
    prefix: str, cached: Sequence[Mapping[str, Any]], fresh: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    def median(runs: Sequence[Mapping[str, Any]], name: str) -> float:
        return statistics.median(run[name] for run in runs)

    results: dict[str, Any] = {
        f"{prefix}seconds": median(cached, "load_seconds"),
        f"{prefix}first_logits_seconds": median(cached, "first_logits_seconds"),
        f"{prefix}first_logits_seconds_without_cache": median(fresh, "first_logits_seconds"),
    }
    if fresh[0]["rss_bytes"] is not None:
        largest = max(run["rss_bytes"] for run in (*cached, *fresh))
        results[f"{prefix}peak_rss_over_weights"] = largest / fresh[0]["weight_bytes"]
    return results


def run_bench(config: ForwardBenchConfig, workdir: str, *, console: Console | None = None) -> dict[str, Any]:
    """Runs what the workdir does not have yet, prints the table, and returns the results.

    Raises:
      WorkdirError: the workdir holds another experiment or another config.
      CheckpointError: the weights are not installed.
    """
    console = console or Console(highlight=False)
    folder = Workdir.open(workdir, config, experiment="bench.forward")
    measurements = Bench(config, console).measurements()
    return run_measurements(folder, measurements, bars=None if config.smoke else BARS, console=console)


def main(config: ForwardBenchConfig, workdir: str) -> None:
    """Runs the benchmark on so many cores."""
    keep_to_cores(config.threads)
    enable_compilation_cache()
    run_bench(config, workdir)


if __name__ == "__main__":
    launch(main, ForwardBenchConfig(), workdir="runs/bench_forward")
