# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "safetensors>=0.5", "numpy>=2.0"]
# ///
"""A forward over whole prompts, greedy decoding with a cache, and loading, with `transformers`, timed.

    python transformers_forward.py MODEL [--prompts FILE.safetensors] [--logits FILE.safetensors] [--new-tokens 64]

MODEL is a directory in Hugging Face's format. `--prompts` holds the tokens `forward` and `decode`, both `[batch pos]`;
without it they are drawn at random, 8 × 128 and 8 × 16. The logits of all positions of `forward` are written to
`--logits`. One JSON object is printed: the seconds of every repeat and the tokens that were decoded.
"""
# pyright: reportMissingImports=false

import argparse
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds of a call, and what it returned."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def main() -> None:
    """Times what the module's docstring names."""
    parser = argparse.ArgumentParser(description="Times transformers' forward and greedy decoding.")
    parser.add_argument("model", help="directory in Hugging Face's format")
    parser.add_argument("--prompts", help="safetensors file with the tokens")
    parser.add_argument("--logits", help="where to write the logits of the whole prompts")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=torch.float32, use_safetensors=True, local_files_only=True
        ).eval()

    loading, model = timed(load)
    # every prompt is continued to the full length
    model.generation_config.eos_token_id = None
    if arguments.prompts:
        prompts = safetensors.torch.load_file(arguments.prompts)
    else:
        rng, d_vocab = np.random.default_rng(0), model.config.vocab_size
        shapes = {"forward": (8, 128), "decode": (8, 16)}
        prompts = {name: torch.from_numpy(rng.integers(0, d_vocab, shape)) for name, shape in shapes.items()}
    whole, start = prompts["forward"].long(), prompts["decode"].long()

    def forward() -> torch.Tensor:
        return model(whole, use_cache=False).logits

    def decode() -> torch.Tensor:
        return model.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=arguments.new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )

    logits, tokens = forward(), decode()
    taken: dict[str, list[float]] = {"forward": [], "decode": [], "load": [loading]}
    for _ in range(arguments.repeats):
        for name, call in (("forward", forward), ("decode", decode)):
            taken[name].append(timed(call)[0])
    if arguments.logits:
        safetensors.torch.save_file({"logits": logits}, arguments.logits)
    versions = {"transformers": version("transformers"), "torch": version("torch")}
    new = tokens[:, start.shape[1] :].tolist()
    json.dump({"versions": versions, "seconds": taken, "tokens": new}, sys.stdout)


if __name__ == "__main__":
    main()
