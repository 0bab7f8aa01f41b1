# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformer-lens==3.9.0", "safetensors>=0.5", "numpy>=2.0"]
# ///
"""The same as `transformer_lens_sweep.py`, with the last release that has `HookedTransformer`.

    python hooked_transformer_sweep.py [--arrays FILE.safetensors] [--repeats 3] [--threads 2]

It takes the same arguments and prints the same object.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from typing import Any

import numpy as np
import torch
from transformer_lens_sweep import Arrays, main, shape_of


def hooked_transformer(arrays: Arrays) -> Any:
    """A HookedTransformer with these weights, and biases of zero."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    model = HookedTransformer(HookedTransformerConfig(**shape_of(arrays))).eval()
    weights = {
        "embed.W_E": arrays["embed"],
        "pos_embed.W_pos": arrays["pos_embed"],
        "unembed.W_U": arrays["unembed"].T,
        "ln_final.w": arrays["final_norm.weight"],
        "ln_final.b": arrays["final_norm.bias"],
    }
    for i in range(arrays["blocks.attn.q"].shape[0]):
        layer = f"blocks.{i}"
        for theirs, ours in (("ln1", "attn_norm"), ("ln2", "mlp_norm")):
            weights |= {f"{layer}.{theirs}.{w[0]}": arrays[f"blocks.{ours}.{w}"][i] for w in ("weight", "bias")}
        for w in "qkv":
            weights[f"{layer}.attn.W_{w.upper()}"] = arrays[f"blocks.attn.{w}"][i].transpose(1, 0, 2)
        weights[f"{layer}.attn.W_O"] = arrays["blocks.attn.o"][i]
        weights[f"{layer}.mlp.W_in"] = arrays["blocks.mlp.up"][i]
        weights[f"{layer}.mlp.W_out"] = arrays["blocks.mlp.down"][i]
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(weights.pop(name))))
        elif name.rpartition(".")[2].startswith("b_"):
            parameter.zero_()
        else:
            raise SystemExit(f"the model has a parameter {name!r} for which there is no array")
    if weights:
        raise SystemExit(f"the model lacks the parameters {', '.join(weights)}")
    return model


if __name__ == "__main__":
    main(hooked_transformer)
