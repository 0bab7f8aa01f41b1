"""The organism's induction circuit by path patching: the previous-token head writes what the induction head seeks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mi_jax as mi
from experiments.estimates import mean
from mi_jax.data.task import Task
from mi_jax.models import Decoder
from mi_jax.run import Progress
from mi_jax.validation import load_organism

PREVIOUS_TOKEN_HEAD, INDUCTION_HEAD = (0, 0), (1, 0)


def composition(config: Any, progress: Progress) -> dict[str, Any]:
    """The share of the effect that goes from each head of layer 0 to each input of each head of layer 1."""
    organism = load_organism()
    model, n_heads = organism.model, organism.model.config.n_heads
    task = organism.tasks(config.pairs, key=jax.random.key(config.seed))["induction"]
    clean, corrupt = (
        _differences(model(tokens, task.mask, output_pos=task.position), task) for tokens in (task.clean, task.corrupt)
    )
    gap = (clean - corrupt).mean()

    shares: dict[tuple[int, str, int], np.ndarray] = {}
    inputs = [(name, head) for name in ("q", "k", "v") for head in range(n_heads)]
    for number, (name, head) in enumerate(inputs):
        progress(number / len(inputs), f"paths into {name} of head {head}")
        logits = mi.jit(_paths)(model, task, jnp.asarray(head, jnp.int32), name=name)
        for sender in range(n_heads):
            shares[sender, name, head] = (clean - _differences(logits[sender], task)) / gap

    path = (PREVIOUS_TOKEN_HEAD[1], "k", INDUCTION_HEAD[1])
    null = np.array([share.mean() for key, share in shares.items() if key != path])
    results = {"organism.gap": float(gap), "organism.pairs": config.pairs, "organism.paths": len(shares)}
    results |= mean("organism.path_effect", shares[path])
    results["organism.path_effect_null"] = float(np.abs(null).mean())
    results["organism.path_effect_null_largest"] = float(np.abs(null).max())
    results["organism.other_sender_effect"] = float(
        max(abs(shares[sender, "k", INDUCTION_HEAD[1]].mean()) for sender in range(n_heads) if sender != path[0])
    )
    results["organism.query_effect"] = float(shares[path[0], "q", path[2]].mean())
    return results | {"organism.value_effect": float(shares[path[0], "v", path[2]].mean())}


def _differences(logits, task: Task) -> np.ndarray:
    return np.asarray(task.logit_difference(logits), np.float64)


def _paths(model: Decoder, task: Task, head, *, name: str):
    """Clean runs in which one input of a head gets what each head of layer 0 writes on the corrupt prompt."""
    sender = mi.node("attn.z", layer=PREVIOUS_TOKEN_HEAD[0], head=mi.each)
    receiver = mi.node(f"attn.{name}", layer=INDUCTION_HEAD[0], head=head)
    patched = mi.path_patch(model, sender, receiver, direction="noising")
    return patched(task.clean, task.corrupt, mask=task.mask, output_pos=task.position)
