# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformer-lens==4.3.0", "safetensors>=0.5", "numpy>=2.0"]
# ///
"""Scores of all edges with TransformerLens' own attribution patching, timed.

    python edge_scores_transformer_lens.py --method=eap [--arrays FILE.safetensors] [--repeats 1] [--threads 2]

It has no integrated gradients. Its gradient is that of the corrupt run, one prompt at a time, and a score is positive
where the clean value raises the metric. Its edges have positions; their scores are added up outside the time. The model
is that of transformers, frozen but for its embedding, from which the backward pass needs to start: TransformerLens' own
random models have no hooks at single heads. One JSON object is printed.
"""
# pyright: reportMissingImports=false, reportPrivateImportUsage=false

import os
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

# nothing is downloaded
os.environ |= {"HF_HUB_OFFLINE": "1"}

import edge_scores_peer
import numpy as np
import torch
from edge_scores_peer import difference
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformer_lens import TransformerBridge
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch
from transformer_lens_sweep import Arrays, shape_of
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

Edges = Mapping[tuple[Any, Any], float]
END = "<|endoftext|>"


def gpt2(arrays: Arrays) -> GPT2LMHeadModel:
    """The model of transformers with these weights, and biases of zero."""
    shape = shape_of(arrays)
    sizes = {"n_layer": shape["n_layers"], "n_head": shape["n_heads"], "n_inner": shape["d_mlp"]}
    sizes |= {"n_embd": shape["d_model"], "n_positions": shape["n_ctx"], "vocab_size": shape["d_vocab"]}
    tokens = {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **tokens, layer_norm_epsilon=shape["eps"])).eval()
    weights = {
        "transformer.wte.weight": arrays["embed"],
        "transformer.wpe.weight": arrays["pos_embed"],
        "transformer.ln_f.weight": arrays["final_norm.weight"],
        "transformer.ln_f.bias": arrays["final_norm.bias"],
        "lm_head.weight": arrays["unembed"],
    }
    width = shape["d_model"]
    for i in range(shape["n_layers"]):
        layer = f"transformer.h.{i}"
        for theirs, ours in (("ln_1", "attn_norm"), ("ln_2", "mlp_norm")):
            weights |= {f"{layer}.{theirs}.{w}": arrays[f"blocks.{ours}.{w}"][i] for w in ("weight", "bias")}
        qkv = [arrays[f"blocks.attn.{w}"][i].reshape(width, -1) for w in "qkv"]
        weights[f"{layer}.attn.c_attn.weight"] = np.concatenate(qkv, 1)
        weights[f"{layer}.attn.c_proj.weight"] = arrays["blocks.attn.o"][i].reshape(-1, width)
        weights[f"{layer}.mlp.c_fc.weight"] = arrays["blocks.mlp.up"][i]
        weights[f"{layer}.mlp.c_proj.weight"] = arrays["blocks.mlp.down"][i]
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(weights.pop(name))))
        else:
            parameter.zero_()
        parameter.requires_grad_(name == "transformer.wte.weight")
    if weights:
        raise SystemExit(f"the model lacks the parameters {', '.join(weights)}")
    return model


def model_and_prompts(arrays: Arrays, clean: torch.Tensor, corrupt: torch.Tensor) -> tuple[Any, ...]:
    """TransformerLens around the model, and the prompts."""
    # one is looked for where none is given; no text is read
    words = Tokenizer(WordLevel({END: 0}, unk_token=END))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token=END)
    model = TransformerBridge.boot_transformers("gpt2", hf_model=gpt2(arrays), tokenizer=tokenizer, device="cpu")
    return model.eval(), clean, corrupt


def score(made: tuple[Any, ...], method: str, steps: int) -> Edges:
    """TransformerLens' own function."""
    if method != "eap":
        raise SystemExit("TransformerLens 4.3 has no integrated gradients for edges; there is --method=eap")
    config = EdgeAttributionConfig(granularity="edge")
    return attribution_patch(*made, lambda logits: difference(logits).sum(), config).edge_scores


def named(made: tuple[Any, ...], found: Edges) -> dict[str, float]:
    """Sums over positions."""
    out: dict[str, float] = defaultdict(float)
    for (source, reader), value in found.items():
        out[f"{_node(source)}->{_node(reader)}"] += value
    return out


def _node(node: Any) -> str:
    if node.kind in ("embed", "logits"):
        return "input" if node.kind == "embed" else "logits"
    if node.kind in ("mlp_in", "mlp_out"):
        return f"m{node.layer}"
    letter = "" if node.kind == "attn_head_out" else f"<{node.kind[0]}>"
    return f"a{node.layer}.h{node.head}{letter}"


if __name__ == "__main__":
    edge_scores_peer.main(model_and_prompts, score, named, packages=("transformer-lens",))
