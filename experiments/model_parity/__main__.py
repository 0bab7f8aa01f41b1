"""Compares every model family with `transformers`, on checkpoints that `transformers` makes in the same run.

    python -m experiments.model_parity --workdir=runs/model_parity

It makes a tiny random model of every family (`--config.families=gpt2,llama` for some of them, `--config.seed=1` for
others), loads the checkpoint here and compares over prompts of different lengths padded on the right; then saves the
model and lets `transformers` load that. torch and transformers get an environment of their own, which the first run
installs (a few minutes, kept in the user's cache folder). The rest takes 4 to 6 minutes and 3.4 GB on 2 CPU cores. The
same command again resumes after the last finished family. It writes `report.html` and `results.json`, for every family
NAME:

- `family.NAME.logits_max_abs`, `hidden_max_abs`: the largest difference of logits, and of the stream before and after
  every layer, from the reference in float32. About 5e-6, which is also what the reference in float32 differs from
  itself in float64 (`reference_float64_max_abs`). `_null` is the same with one other setting, named by `null_setting`,
  such as no windows or no rotary scaling: 7e-4 (another form of GELU) to 14.
- `router_max_abs`: of a mixture's router.
- `greedy_agreement`: the share of 8 tokens after each prompt that are the reference's; `_null` compares with those
  after another prompt.
- `bfloat16_vs_reference`: the root mean square error of the logits in bfloat16 over that of the reference in bfloat16,
  both from the reference in float32: 0.8 to 1.3, with a bound of 1.5. `families.bfloat16_vs_reference_mean` is the
  geometric mean over all families: 0.99 is to be expected, and 1.17 if the norms took their means in bfloat16.
- `identities`: `mi.check_sites` holds; `identities_checked` says how many equations.
- `roundtrip`: the saved model has the same parameters, bit for bit, and `transformers` loads it without missing or
  unexpected tensors (BERT's pooling layer apart) to the same logits, `roundtrip_logits_max_abs` being 0; `_null` is
  what it would find in a model whose layers were written in the opposite order.

`gguf.smollm2.oracle_max_abs` compares SmolLM2-135M from its GGUF file with the equations in numpy.
"""

import sys

from experiments.model_parity.run import ParityConfig, run_parity
from mi_jax.run import enable_compilation_cache
from mi_jax.run.launch import launch


def main(config: ParityConfig, workdir: str) -> None:
    """Runs the experiment."""
    enable_compilation_cache()
    run_parity(config, workdir)
    sys.stdout.flush()


if __name__ == "__main__":
    launch(main, ParityConfig(), workdir="runs/model_parity")
