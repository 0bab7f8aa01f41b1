"""A task: clean and counterfactual prompts that align token by token, and the metric that tells them apart."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Task(eqx.Module):
    """Pairs of prompts. The metric is the logit of the answer minus that of the distractor, at one position each.

    Attributes:
      clean, corrupt: prompts of the same lengths, right-padded, `[batch pos]`.
      mask: True at real tokens.
      answer, distractor: tokens that the clean and the corrupt prompt ask for.
      position: where the answer is predicted.
    """

    name: str = eqx.field(static=True)
    clean: Int[Array, "batch pos"]
    corrupt: Int[Array, "batch pos"]
    mask: Bool[Array, "batch pos"]
    answer: Int[Array, " batch"]
    distractor: Int[Array, " batch"]
    position: Int[Array, " batch"]

    def __len__(self) -> int:
        return self.clean.shape[0]

    def __getitem__(self, rows: slice) -> "Task":
        arrays = {f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self) if f.name != "name"}
        return Task(self.name, **arrays)

    def logit_difference(self, logits: Float[Array, "batch 1 d_vocab"]) -> Float[Array, " batch"]:
        """The metric of every pair, from logits at `position` only (`output_pos=task.position`)."""
        at = logits[:, 0]
        pick = jnp.take_along_axis(at, jnp.stack([self.answer, self.distractor], 1), axis=1)
        return pick[:, 0] - pick[:, 1]

    def metric(self, logits: Float[Array, "batch 1 d_vocab"]) -> Float[Array, " batch"]:
        """What circuits are scored by, of every pair: larger where the model does the task."""
        return self.logit_difference(logits)

    def answer_probability(self, logits: Float[Array, "batch 1 d_vocab"]) -> Float[Array, " batch"]:
        """Probability of the answer among all tokens."""
        return jnp.take_along_axis(jax.nn.softmax(logits[:, 0]), self.answer[:, None], axis=1)[:, 0]
