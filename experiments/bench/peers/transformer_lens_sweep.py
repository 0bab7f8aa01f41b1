# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformer-lens==4.3.0", "safetensors>=0.5", "numpy>=2.0"]
# ///
"""Activation patching with TransformerLens' own functions, timed: the residual stream and all heads.

    python transformer_lens_sweep.py [--arrays FILE.safetensors] [--repeats 3] [--threads 2]

`--arrays` holds the weights and the prompts; without it, a random model of GPT-2-small's shape is used. One JSON object
is printed: the seconds of every repeat and the values of both sweeps.
"""
# pyright: reportMissingImports=false

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from transformer_lens import patching

Arrays = Mapping[str, np.ndarray]

SWEEPS = {
    "resid_pre": patching.get_act_patch_resid_pre,
    "attn.z": patching.get_act_patch_attn_head_out_all_pos,
}


def random_arrays(layers: int = 12, d: int = 768, heads: int = 12, f: int = 3072, vocab: int = 50257) -> dict:
    """Weights and prompts of GPT-2-small's shape, in this package's layout: inputs of a map before its outputs."""
    rng = np.random.default_rng(0)
    d_head = d // heads

    def normal(*shape: int, fan_in: int) -> np.ndarray:
        return (rng.standard_normal(shape, np.float32) / math.sqrt(fan_in)).astype(np.float32)

    clean = rng.integers(0, vocab, (8, 16), np.int32)
    norms = {}
    for name, lead in (("blocks.attn_norm", (layers,)), ("blocks.mlp_norm", (layers,)), ("final_norm", ())):
        norms |= {f"{name}.weight": np.ones((*lead, d), np.float32), f"{name}.bias": np.zeros((*lead, d), np.float32)}
    return norms | {
        "clean": clean,
        "corrupt": (clean + 9) % vocab,
        "embed": normal(vocab, d, fan_in=d),
        "pos_embed": normal(1024, d, fan_in=d),
        "unembed": normal(vocab, d, fan_in=d),
        **{f"blocks.attn.{w}": normal(layers, d, heads, d_head, fan_in=d) for w in "qkv"},
        "blocks.attn.o": normal(layers, heads, d_head, d, fan_in=d),
        "blocks.mlp.up": normal(layers, d, f, fan_in=d),
        "blocks.mlp.down": normal(layers, f, d, fan_in=f),
    }


def shape_of(arrays: Arrays) -> dict[str, Any]:
    """The configuration that the arrays' shapes imply, in TransformerLens' words."""
    layers, d_model, heads, d_head = arrays["blocks.attn.q"].shape
    return {
        "n_layers": layers,
        "d_model": d_model,
        "n_heads": heads,
        "d_head": d_head,
        "d_mlp": arrays["blocks.mlp.up"].shape[2],
        "n_ctx": arrays["pos_embed"].shape[0],
        "d_vocab": arrays["embed"].shape[0],
        "act_fn": "gelu_new",
        "normalization_type": "LN",
        "eps": 1e-5,
        "seed": 0,
    }


def bridge(arrays: Arrays) -> Any:
    """TransformerLens' own random model with these weights, and biases of zero."""
    from transformer_lens import TransformerBridge, TransformerBridgeConfig

    model = TransformerBridge.boot_native(TransformerBridgeConfig(**shape_of(arrays))).eval()
    weights = {
        "tok_embed.weight": arrays["embed"],
        "pos.weight": arrays["pos_embed"],
        "head.weight": arrays["unembed"],
        "ln_out.weight": arrays["final_norm.weight"],
        "ln_out.bias": arrays["final_norm.bias"],
    }
    d_model = arrays["embed"].shape[1]
    for i in range(arrays["blocks.attn.q"].shape[0]):
        layer = f"layers.{i}"
        for theirs, ours in (("ln1", "attn_norm"), ("ln2", "mlp_norm")):
            weights |= {f"{layer}.{theirs}.{w}": arrays[f"blocks.{ours}.{w}"][i] for w in ("weight", "bias")}
        for w in "qkv":
            weights[f"{layer}.attn.{w}.weight"] = arrays[f"blocks.attn.{w}"][i].reshape(d_model, -1).T
        weights[f"{layer}.attn.o.weight"] = arrays["blocks.attn.o"][i].reshape(-1, d_model).T
        weights[f"{layer}.mlp.fc_in.weight"] = arrays["blocks.mlp.up"][i].T
        weights[f"{layer}.mlp.fc_out.weight"] = arrays["blocks.mlp.down"][i].T
    for name, parameter in model.original_model.named_parameters():
        name = name.replace("._original_component", "")
        if name in weights:
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(weights.pop(name))))
        elif name.endswith(".bias"):
            parameter.zero_()
        else:
            raise SystemExit(f"the model has a parameter {name!r} for which there is no array")
    if weights:
        raise SystemExit(f"the model lacks the parameters {', '.join(weights)}")
    return model


def main(build: Callable[[Arrays], Any]) -> None:
    """Times the sweeps on the model that `build` makes."""
    parser = argparse.ArgumentParser(description="Times activation patching with TransformerLens.")
    parser.add_argument("--arrays", help="safetensors file with the weights and the prompts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    arrays = safetensors.numpy.load_file(arguments.arrays) if arguments.arrays else random_arrays()
    model = build(arrays)
    clean, corrupt = (torch.from_numpy(arrays[name].astype(np.int64)) for name in ("clean", "corrupt"))
    _, cache = model.run_with_cache(clean)
    for _ in range(3):
        model(corrupt)

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return (logits[:, -1, 5] - logits[:, -1, 7]).mean()

    taken: dict[str, list[float]] = {name: [] for name in SWEEPS}
    values = {}
    for _ in range(arguments.repeats):
        for name, sweep in SWEEPS.items():
            start = time.perf_counter()
            result = sweep(model, corrupt, cache, metric)
            taken[name].append(time.perf_counter() - start)
            values[name] = result.tolist()
    versions = {"transformer_lens": version("transformer-lens"), "torch": version("torch")}
    json.dump({"versions": versions, "seconds": taken, "values": values}, sys.stdout)


if __name__ == "__main__":
    main(bridge)
