# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformer-lens==3.9.0", "safetensors>=0.5", "numpy>=2.0"]
# ///
"""Activations and patching sweeps of tiny random TransformerLens models, as arrays to compare with.

    python make_golden.py transformer_lens.npz [--seed 0]

Two architectures that between them have every site: learned positions, LayerNorm with biases, a plain MLP; and rotary
positions, RMSNorm, grouped heads, a gated MLP. Weights are random, norms included. TransformerLens 3.9.0 is the last
release in which a model built from a configuration shows all of these activations.
"""

import argparse
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig, patching

SHAPE = {"n_layers": 2, "d_model": 8, "n_heads": 4, "d_head": 6, "d_mlp": 10, "d_vocab": 13, "n_ctx": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_kv_heads": 4, "positions": "learned", "norm": "layer", "activation": "gelu", "gated": False},
    "llama": {"n_kv_heads": 2, "positions": "rotary", "norm": "rms", "activation": "silu", "gated": True},
}
BATCH, N_POS = 2, 5
TOKENS = (5, 7)
_LAYERED = re.compile(r"blocks\.(\d+)\.(.+)")


def random_weights(family: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Inputs of a map before its outputs; per-layer arrays with a leading layer axis; norms near 1."""
    n, d, f, heads, h = (SHAPE[name] for name in ("n_layers", "d_model", "d_mlp", "n_heads", "d_head"))
    shapes = {
        "embed": (SHAPE["d_vocab"], d),
        "unembed": (SHAPE["d_vocab"], d),
        "blocks.attn.q": (n, d, heads, h),
        "blocks.attn.k": (n, d, family["n_kv_heads"], h),
        "blocks.attn.v": (n, d, family["n_kv_heads"], h),
        "blocks.attn.o": (n, heads, h, d),
        "blocks.mlp.up": (n, d, f),
        "blocks.mlp.down": (n, f, d),
    }
    if family["positions"] == "learned":
        shapes["pos_embed"] = (SHAPE["n_ctx"], d)
    if family["gated"]:
        shapes["blocks.mlp.gate"] = (n, d, f)
    weights = {name: 0.5 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    for name, shape in (("blocks.attn_norm", (n, d)), ("blocks.mlp_norm", (n, d)), ("final_norm", (d,))):
        weights[f"{name}.weight"] = 1 + 0.3 * rng.standard_normal(shape, np.float32)
        if family["norm"] == "layer":
            weights[f"{name}.bias"] = 0.3 * rng.standard_normal(shape, np.float32)
    return weights


def hooked_transformer(family: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> Any:
    """A HookedTransformer with these weights, biases of zero, and every optional hook switched on."""
    config = HookedTransformerConfig(
        **SHAPE,
        n_key_value_heads=None if family["n_kv_heads"] == SHAPE["n_heads"] else family["n_kv_heads"],
        act_fn={"gelu": "gelu_new", "silu": "silu"}[family["activation"]],
        gated_mlp=family["gated"],
        normalization_type={"layer": "LN", "rms": "RMS"}[family["norm"]],
        positional_embedding_type={"learned": "standard", "rotary": "rotary"}[family["positions"]],
        rotary_dim=SHAPE["d_head"] if family["positions"] == "rotary" else None,
        eps=1e-5,
        seed=0,
        use_attn_result=True,
        use_split_qkv_input=True,
        use_hook_mlp_in=True,
    )
    model = HookedTransformer(config).eval()
    underscore = "_" if family["n_kv_heads"] != SHAPE["n_heads"] else ""
    new = {
        "embed.W_E": weights["embed"],
        "unembed.W_U": weights["unembed"].T,
        "ln_final.w": weights["final_norm.weight"],
    }
    if "pos_embed" in weights:
        new["pos_embed.W_pos"] = weights["pos_embed"]
    if "final_norm.bias" in weights:
        new["ln_final.b"] = weights["final_norm.bias"]
    for i in range(SHAPE["n_layers"]):
        layer = {name.removeprefix("blocks."): w[i] for name, w in weights.items() if name.startswith("blocks.")}
        for theirs, ours in (("ln1", "attn_norm"), ("ln2", "mlp_norm")):
            new[f"blocks.{i}.{theirs}.w"] = layer[f"{ours}.weight"]
            if f"{ours}.bias" in layer:
                new[f"blocks.{i}.{theirs}.b"] = layer[f"{ours}.bias"]
        new[f"blocks.{i}.attn.W_Q"] = layer["attn.q"].transpose(1, 0, 2)
        new[f"blocks.{i}.attn.{underscore}W_K"] = layer["attn.k"].transpose(1, 0, 2)
        new[f"blocks.{i}.attn.{underscore}W_V"] = layer["attn.v"].transpose(1, 0, 2)
        new[f"blocks.{i}.attn.W_O"] = layer["attn.o"]
        # in a gated MLP both programs call the map that is multiplied in W_in, or up
        new[f"blocks.{i}.mlp.W_in"] = layer["mlp.up"]
        new[f"blocks.{i}.mlp.W_out"] = layer["mlp.down"]
        if family["gated"]:
            new[f"blocks.{i}.mlp.W_gate"] = layer["mlp.gate"]
    for name, parameter in model.named_parameters():
        if name in new:
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(new.pop(name))))
        elif "b_" in name.rpartition(".")[2]:
            parameter.zero_()
        else:
            raise SystemExit(f"the model has a parameter {name!r} for which there is no array")
    if new:
        raise SystemExit(f"the model lacks the parameters {', '.join(new)}")
    return model


def arrays_of(family: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Weights, prompts, activations of the clean run by their TransformerLens names, and the two sweeps."""
    weights = random_weights(family, rng)
    model = hooked_transformer(family, weights)
    clean = rng.integers(0, SHAPE["d_vocab"], (BATCH, N_POS))
    corrupt = (clean + rng.integers(1, SHAPE["d_vocab"], (BATCH, N_POS))) % SHAPE["d_vocab"]
    logits, cache = model.run_with_cache(torch.from_numpy(clean))
    layered: dict[str, list[np.ndarray]] = {}
    for name, value in cache.items():
        if match := _LAYERED.fullmatch(name):
            layered.setdefault(match[2], []).append(value.numpy())

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return (logits[:, -1, TOKENS[0]] - logits[:, -1, TOKENS[1]]).mean()

    return {
        "config": np.array(json.dumps(SHAPE | dict(family) | {"tied": False})),
        "clean": clean.astype(np.int32),
        "corrupt": corrupt.astype(np.int32),
        "logits": logits.numpy(),
        "sweep.resid_pre": patching.get_act_patch_resid_pre(model, torch.from_numpy(corrupt), cache, metric).numpy(),
        "sweep.attn.z": patching.get_act_patch_attn_head_out_all_pos(
            model, torch.from_numpy(corrupt), cache, metric
        ).numpy(),
        **{f"weight.{name}": weight for name, weight in weights.items()},
        **{f"activation.{name}": np.stack(values) for name, values in layered.items()},
    }


def main() -> None:
    """Writes the file that the command line names, and prints how many arrays it holds."""
    parser = argparse.ArgumentParser(description="Writes activations and sweeps of tiny TransformerLens models.")
    parser.add_argument("path")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    rng = np.random.default_rng(arguments.seed)
    made = {f"{name}/{key}": a for name, family in FAMILIES.items() for key, a in arrays_of(family, rng).items()}
    np.savez_compressed(arguments.path, **made)
    print(json.dumps({"arrays": len(made)}))


if __name__ == "__main__":
    main()
