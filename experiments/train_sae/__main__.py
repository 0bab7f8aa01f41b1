"""Trains a sparse dictionary of a model's activations, beside its null, and scores both on held-out text.

    python -m experiments.train_sae --workdir=runs/train_sae
    python -m experiments.train_sae --workdir=runs/b --config.architecture=batchtopk --config.layer=20 --config.k=64
    python -m experiments.train_sae --workdir=runs/c --config.model=DIRECTORY --config.text=corpus.txt

By default: SmolLM2-135M, the residual stream after layer 15, TopK with 4,096 latents and 32 codes, 500,000 tokens of
Python's documentation. 10 to 15 minutes and 4 GB on 2 CPU cores. One pass of the model, cut off after the layer, serves
the dictionary and its null, a dictionary whose random directions are never trained.

It writes `dictionary/` and `null/` (in the format of `--config.save_format`; SAELens by default), the loss of every
step in `checkpoints/curves.safetensors`, and `results.json` with `train_sae.fvu`, `.l0`, `.ce_recovered`,
`.kl_recovered`, `.dead_fraction`, each with `_null` and an interval. The same command resumes a run that was stopped or
killed, to the same numbers bit for bit: `python -m experiments.kill_and_resume` shows it.
"""

from experiments.train_sae.config import TrainSAEConfig
from experiments.train_sae.run import run_training
from mi_jax.run import enable_compilation_cache, maybe_initialize
from mi_jax.run.launch import launch


def main(config: TrainSAEConfig, workdir: str) -> None:
    """Runs the experiment."""
    maybe_initialize()
    enable_compilation_cache()
    run_training(config, workdir)


if __name__ == "__main__":
    launch(main, TrainSAEConfig(), workdir="runs/train_sae")
