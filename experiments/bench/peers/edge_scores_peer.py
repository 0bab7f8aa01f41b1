"""What the scripts `edge_scores_*.py` share: their command line, their clock, and the names of edges.

Edges are named as the EAP-IG package names them: `input`, `a{layer}.h{head}`, `m{layer}` write; `a{layer}.h{head}<q>`,
`<k>` and `<v>`, `m{layer}` and `logits` read.
"""
# pyright: reportMissingImports=false, reportPrivateImportUsage=false

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from transformer_lens_sweep import Arrays, random_arrays

# the measure of memory is that of another benchmark, one folder up
sys.path.append(str(Path(__file__).parents[1]))
from load import peak, reset_peak

ANSWER, DISTRACTOR = 5, 7


def difference(logits: torch.Tensor) -> torch.Tensor:
    """The answer's logit minus the distractor's at the last position, of every prompt."""
    return logits[:, -1, ANSWER] - logits[:, -1, DISTRACTOR]


def command_line(description: str) -> argparse.ArgumentParser:
    """The options that all these scripts have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--arrays", help="safetensors file with the weights and the prompts")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    return parser


def given(arguments: argparse.Namespace) -> tuple[Arrays, torch.Tensor, torch.Tensor]:
    """Arrays, clean and corrupt prompts, with so many threads."""
    torch.set_num_threads(arguments.threads)
    arrays = safetensors.numpy.load_file(arguments.arrays) if arguments.arrays else random_arrays()
    clean, corrupt = (torch.from_numpy(arrays[name].astype(np.int64)) for name in ("clean", "corrupt"))
    return arrays, clean, corrupt


def report(packages: tuple[str, ...], **found: Any) -> None:
    """Prints one JSON object, with the versions of these packages and of torch."""
    versions = {package.replace("-", "_"): version(package) for package in (*packages, "torch")}
    json.dump({"versions": versions, **found}, sys.stdout)


def main(
    build: Callable[[Arrays, torch.Tensor, torch.Tensor], Any],
    score: Callable[[Any, str, int], Any],
    named: Callable[[Any, Any], Mapping[str, float]],
    *,
    packages: tuple[str, ...],
    parser: argparse.ArgumentParser | None = None,
) -> None:
    """Times `score` on what `build` makes, and prints seconds, the peak of memory and the scores that `named` reads.

    A first call, of the method that is one gradient, is neither timed nor measured. The peak is the largest resident
    memory of the process while it scored, the model included.

    Args:
      build: from arrays, clean and corrupt prompts to what is scored.
      score: from that, a method and a number of steps to what the peer returns.
      named: from both to scores by the names of edges.
      packages: whose versions are printed.
      parser: has options of the script's own.
    """
    parser = parser or command_line("Times edge scores.")
    parser.add_argument("--method", choices=("eap", "eap-ig"), default="eap-ig")
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    arrays, clean, corrupt = given(arguments)
    with torch.no_grad():
        made = build(arrays, clean, corrupt)
    del arrays
    score(made, "eap", arguments.steps)
    gc.collect()
    before, taken, found = reset_peak(), [], None
    for _ in range(arguments.repeats):
        # not in the time, and not kept beside the next
        found = None
        start = time.perf_counter()
        found = score(made, arguments.method, arguments.steps)
        taken.append(time.perf_counter() - start)
    largest = None if before is None else peak()
    report(packages, seconds=taken, peak_rss_bytes=largest, scores=dict(named(made, found)))
