# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "sae-lens==6.54.12", "safetensors>=0.5", "numpy>=2.0"]
# ///
"""Training steps of a TopK sparse autoencoder with SAELens' own trainer, timed.

    python sae_lens_step.py [--arrays FILE.safetensors] [--k 32] [--sparse] [--repeats 3] [--threads 2] [--device cpu]

`--arrays` holds `batches` `[batches batch d_model]`, `w_enc` and `w_dec` `[d_sae d_model]`, `b_enc` and `b_dec`. If it
is not given they are random: 2 batches of 4,096, of width 768, and 12,288 latents. A step is `SAETrainer.step`:
forward, its default auxiliary loss, backward, clipping to norm 1, Adam; float32, no autocast, no compilation, no
logging. On a GPU (`--device=cuda`) matmuls may round to TF32, as JAX's do by default. `--sparse` keeps codes in sparse
tensors (`use_sparse_activations`), without `rescale_acts_by_decoder_norm`. Step t is on batch t modulo their number;
the first step is not timed. One JSON object is printed: the seconds of every later step, and of all steps the loss and
the squared error before the update.
"""
# pyright: reportMissingImports=false, reportPrivateImportUsage=false

import argparse
import json
import os
import sys
import time
from importlib.metadata import version

# nothing is sent or downloaded
os.environ |= {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}

import safetensors.torch
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

LEARNING_RATE = 3e-4


def random_arrays() -> dict[str, torch.Tensor]:
    """Activations, and a dictionary with rows of unit norm whose encoder is its decoder."""
    generator = torch.Generator().manual_seed(0)
    w_dec = torch.nn.functional.normalize(torch.randn(12288, 768, generator=generator))
    batches = torch.randn(2, 4096, 768, generator=generator)
    return {
        "batches": batches,
        "w_enc": w_dec,
        "w_dec": w_dec,
        "b_enc": torch.zeros(12288),
        "b_dec": torch.zeros(768),
    }


def dictionary(arrays: dict[str, torch.Tensor], k: int, *, sparse: bool) -> TopKTrainingSAE:
    """SAELens' TopK dictionary with these weights."""
    d_sae, d_in = arrays["w_dec"].shape
    # the backward pass of rescaled sparse codes does not exist on a CPU
    options = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False} if sparse else {}
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k, **options))
    weights = {
        "W_enc": arrays["w_enc"].T.contiguous(),
        "W_dec": arrays["w_dec"],
        "b_enc": arrays["b_enc"],
        "b_dec": arrays["b_dec"],
    }
    sae.load_state_dict(weights)
    return sae


def main() -> None:
    """Times what the module's docstring names."""
    parser = argparse.ArgumentParser(description="Times SAELens' training step.")
    parser.add_argument("--arrays", help="safetensors file with weights and activations")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arrays = safetensors.torch.load_file(arguments.arrays) if arguments.arrays else random_arrays()
    torch.backends.cuda.matmul.allow_tf32 = True
    batches, n_steps = arrays["batches"].to(arguments.device), 1 + arguments.repeats
    config = SAETrainerConfig(
        total_training_samples=n_steps * batches.shape[1],
        train_batch_size_samples=batches.shape[1],
        lr=LEARNING_RATE,
        lr_end=LEARNING_RATE,
        device=arguments.device,
        logger=LoggingConfig(log_to_wandb=False),
    )
    sae = dictionary(arrays, arguments.k, sparse=arguments.sparse).to(arguments.device)
    trainer = SAETrainer(config, sae, iter(()))
    taken, losses, errors = [], [], []
    for step in range(n_steps):
        batch = batches[step % len(batches)]
        start = time.perf_counter()
        output = trainer.step(batch)
        trainer.n_training_steps += 1
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
        losses.append(output.loss.item())
        errors.append((output.sae_out - output.sae_in).detach().pow(2).sum(-1).mean().item())
    versions = {"sae_lens": version("sae-lens"), "torch": version("torch")}
    json.dump({"versions": versions, "seconds": taken[1:], "loss": losses, "error": errors}, sys.stdout)


if __name__ == "__main__":
    main()
