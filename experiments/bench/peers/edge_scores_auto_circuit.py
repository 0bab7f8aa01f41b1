# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "transformer-lens==2.18.0", "auto-circuit==1.0.1", "transformers<5", "pyarrow<22",
#   "safetensors>=0.5"
# ]
# ///
"""Scores of all edges with auto-circuit, timed: gradients with respect to the masks of its edges.

    python edge_scores_auto_circuit.py [--method eap-ig] [--steps 5] [--arrays FILE.safetensors] [--repeats 1]

`--method=eap` is the gradient with all masks at 0, which is edge attribution patching. `eap-ig` is what auto-circuit
calls integrated gradients: the sum of the gradients with all masks at 0, 1/steps, …, 1. It is an integral over masks,
not over inputs, and runs the model once more than there are steps. TransformerLens 2.18 is the last release that has
all that auto-circuit imports. Parameters are frozen. One JSON object is printed.
"""
# pyright: reportMissingImports=false, reportPrivateImportUsage=false

from collections.abc import Mapping
from typing import Any

import edge_scores_peer
import torch
from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.utils.graph_utils import patchable_model
from edge_scores_peer import ANSWER, DISTRACTOR
from hooked_transformer_sweep import hooked_transformer
from transformer_lens_sweep import Arrays


def patchable(arrays: Arrays, clean: torch.Tensor, corrupt: torch.Tensor) -> tuple[Any, PromptDataLoader]:
    """auto-circuit's model, and its loader of all pairs at once."""
    model = hooked_transformer(arrays)
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    model.requires_grad_(False)
    made = patchable_model(model, factorized=True, slice_output="last_seq", separate_qkv=True)
    answers, others = ([torch.tensor([token])] * len(clean) for token in (ANSWER, DISTRACTOR))
    prompts = PromptDataset(clean, corrupt, answers, others)
    loader = PromptDataLoader(prompts, seq_len=clean.shape[1], diverge_idx=0, batch_size=len(clean), shuffle=False)
    return made, loader


def edge_name(edge: Any) -> str:
    """The name of one of its edges, such as `A0.1->A2.3.Q`, as EAP-IG writes it."""
    return f"{_node(edge.src.name)}->{_node(edge.dest.name)}"


def _node(name: str) -> str:
    if name.startswith("Resid"):
        return "input" if name == "Resid Start" else "logits"
    if name.startswith("MLP"):
        return f"m{name.removeprefix('MLP ')}"
    layer, head, *letter = name[1:].split(".")
    return f"a{layer}.h{head}" + "".join(f"<{x.lower()}>" for x in letter)


def score(made: tuple[Any, PromptDataLoader], method: str, steps: int) -> Mapping[str, torch.Tensor]:
    """auto-circuit's own function; a mask's gradient is that of minus the metric."""
    where = {"mask_val": 0.0} if method == "eap" else {"integrated_grad_samples": steps}
    return mask_gradient_prune_scores(*made, None, grad_function="logit", answer_function="avg_diff", **where)


def named(made: tuple[Any, PromptDataLoader], found: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Scores by the names of edges."""
    return {edge_name(edge): edge.prune_score(found).item() for edge in made[0].edges}


if __name__ == "__main__":
    edge_scores_peer.main(patchable, score, named, packages=("auto-circuit", "transformer-lens"))
