"""How much memory EAP-IG takes: one measurement, in a process of its own.

    python circuits_memory.py gpt2-small|smoke|smollm2 [--steps 5] [--seed 0]

`gpt2-small` and `smoke` are the random models and the pairs that the benchmark times; `smollm2` is SmolLM2-135M in
float32 on 16 prompts of indirect object identification. One JSON object is printed: `peak_rss_bytes` is the largest
resident memory of the process from the moment the model is there, which includes the model, the libraries and
compilation; None where the system does not say (it does on Linux).
"""

import argparse
import json
import sys

import jax
import jax.numpy as jnp

from experiments.bench.circuits_setting import SHAPES, task_of
from experiments.bench.load import peak, reset_peak
from experiments.bench.setting import setting
from experiments.bench.timing import seconds
from mi_jax.circuits.scores import edge_scores
from mi_jax.data import tokenizer_from_gguf
from mi_jax.data.task import Task
from mi_jax.data.tasks import make
from mi_jax.models import Decoder, load_gguf, open_gguf, smollm2_path

PROMPTS = 16


def subject(name: str, seed: int) -> tuple[Decoder, Task]:
    """The model and the pairs of a name."""
    if name == "smollm2":
        file = open_gguf(smollm2_path())
        return load_gguf(file, dtype=jnp.float32), make("ioi", tokenizer_from_gguf(file), PROMPTS, seed=seed)
    made = setting(*SHAPES[name], key=jax.random.key(seed))
    return made.model, task_of(made)


def main() -> None:
    """Measures what the module's docstring names."""
    parser = argparse.ArgumentParser(description="Measures the memory of EAP-IG.")
    parser.add_argument("subject", choices=("gpt2-small", "smoke", "smollm2"))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # compiling is part of it, wherever an earlier run may have left its program
    jax.config.update("jax_enable_compilation_cache", False)
    model, task = jax.block_until_ready(subject(arguments.subject, arguments.seed))
    before = reset_peak()
    cold, warm = (seconds(lambda: edge_scores(model, task, method="eap-ig", steps=arguments.steps)) for _ in range(2))
    largest = None if before is None else peak()
    json.dump({"peak_rss_bytes": largest, "cold_seconds": cold, "seconds": warm}, sys.stdout)


if __name__ == "__main__":
    main()
