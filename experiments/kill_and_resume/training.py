"""The training that is killed: dictionaries of a small random decoder's activations, straight from its forward pass.

    python -m experiments.kill_and_resume.training FOLDER SEED

Every checkpoint prints a line. At the end `FOLDER/outcome.npz` holds the losses of every step and the dictionaries.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import mi_jax as mi
from mi_jax.data import ActivationStream
from mi_jax.decomposition import Checkpoints, TrainConfig, Training, architecture, fit_stream
from mi_jax.models import DecoderConfig, init_decoder
from mi_jax.run import enable_compilation_cache

STEPS, BATCH, EVERY = 240, 64, 12


def main(folder: str, seed: int) -> None:
    """Trains to the end, from the newest checkpoint in the folder."""
    enable_compilation_cache()
    config = DecoderConfig(n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, d_head=8, d_mlp=64, d_vocab=200, n_ctx=32)
    model = init_decoder(config, key=jax.random.key(7))
    tokens = np.random.default_rng(0).integers(0, config.d_vocab, (400, 32)).astype(np.int32)
    train = TrainConfig(steps=STEPS, batch_size=BATCH, steps_per_call=4, learning_rate=3e-3, dead_after=20 * BATCH)
    trainings = {}
    for name in ("topk", "batchtopk", "jumprelu"):
        shape, objective = architecture(name, config.d_model, 256, k=8)
        trainings[name] = Training(shape, objective, train, reads=("resid_post",), seed=seed)
    site = mi.at("resid_post", layers=1)
    stream = ActivationStream(
        model, tokens, site, batch_size=BATCH, buffer_size=1024, key=jax.random.key(seed), contexts_per_chunk=8
    )

    def tell(step: int, metrics: dict[str, float]) -> None:
        print(step, flush=True)

    checkpoints = Checkpoints(Path(folder) / "checkpoints")
    dictionaries, curves = fit_stream(
        stream, trainings, checkpoints=checkpoints, checkpoint_every=EVERY, progress=tell, say=lambda _: None
    )
    arrays: dict[str, Any] = {
        f"{name}.{metric}": curve for name, held in curves.items() for metric, curve in held.items()
    }
    for name, dictionary in dictionaries.items():
        arrays |= {f"{name}{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(dictionary))}
    np.savez(Path(folder) / "outcome.npz", **arrays)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
