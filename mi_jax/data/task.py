"""A behaviour as data: clean and counterfactual prompts, and what counts as doing the task."""

import warnings
from collections.abc import Iterator
from typing import Any, Literal

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.core.errors import InputError
from mi_jax.core.precision import widened
from mi_jax.core.vocabulary import at_tokens, check_tokens

Measure = Literal["logit-difference", "probability-difference"]


class TaskWarning(UserWarning):
    """A task with which something can be computed that means little."""


class Task(eqx.Module):
    """Pairs of prompts and a metric, which compares the answers with the distractors at one position of each prompt.

    `measure="logit-difference"`: `Σ_i w_i · logit(answer_i) − Σ_j u_j · logit(distractor_j)`; without weights the mean
    of each set. `"probability-difference"`: the same with probabilities; without weights the sum of each set. Both are
    taken in float32 or better, whatever the dtype of the logits.

    Attributes:
      clean, corrupt: prompts of the same lengths, right-padded, `[batch pos]`.
      mask: True at real tokens.
      answer, distractor: tokens that the clean prompt asks for, and those it is told from: one a prompt, `[batch]`, or
        a set, `[batch choice]`.
      position: where the answer is predicted.
      answer_weight, distractor_weight: weights of a set, zero where it is padded.
      roles: named positions of every prompt, such as those of IOI's names.
      templates: which wording a prompt has, for how stable a result is over paraphrases.
      difficulty: how hard the task is, and for whom.
      dropped: how many prompts were drawn and not used, and why.

    Raises:
      InputError: shapes that do not fit, no pair at all, padding that is not on the right, a position in the padding.
    """

    name: str = eqx.field(static=True)
    clean: Int[Array, "batch pos"]
    corrupt: Int[Array, "batch pos"]
    mask: Bool[Array, "batch pos"]
    answer: Int[Array, "batch *choices"]
    distractor: Int[Array, "batch *others"]
    position: Int[Array, " batch"]
    answer_weight: Float[Array, "batch choice"] | None = None
    distractor_weight: Float[Array, "batch other"] | None = None
    roles: dict[str, Int[Array, " batch"]] | None = None
    templates: Int[Array, " batch"] | None = None
    measure: Measure = eqx.field(static=True, default="logit-difference")
    difficulty: str = eqx.field(static=True, default="")
    dropped: str = eqx.field(static=True, default="")

    def __check_init__(self):
        if self.clean.shape != self.corrupt.shape or self.clean.shape != self.mask.shape:
            raise InputError(
                f"task {self.name!r}: clean prompts {self.clean.shape}, counterfactual prompts {self.corrupt.shape} "
                f"and mask {self.mask.shape} have to be of one shape; each pair needs the same number of tokens"
            )
        if not len(self):
            raise InputError(f"task {self.name!r} has no prompts; {self.dropped or 'give at least one pair'}")
        if self.measure not in ("logit-difference", "probability-difference"):
            raise InputError(
                f"task {self.name!r}: no measure {self.measure!r}; there are 'logit-difference' and "
                "'probability-difference'"
            )
        for kind in ("answer", "distractor"):
            tokens, weight = getattr(self, kind), getattr(self, f"{kind}_weight")
            if tokens.ndim not in (1, 2) or tokens.shape[0] != len(self) or 0 in tokens.shape:
                raise InputError(
                    f"task {self.name!r}: {kind} has shape {tokens.shape}; it is one token a prompt, ({len(self)},), "
                    f"or a set of them, ({len(self)}, choices)"
                )
            if weight is not None and weight.shape != tokens.shape:
                raise InputError(
                    f"task {self.name!r}: {kind} has shape {tokens.shape} and its weights have {weight.shape}"
                )
            if _readable(tokens) and (weight is None or _readable(weight)):
                counted = np.asarray(tokens)[... if weight is None else np.asarray(weight) != 0]
                check_tokens(f"task {self.name!r}: {kind}", counted)
        if all(_readable(x) for x in (self.mask, self.position)):
            self._check_padding(np.asarray(self.mask), np.asarray(self.position))

    def _check_padding(self, mask: np.ndarray, position: np.ndarray) -> None:
        if not (mask[:, 0].all() and (np.diff(mask.astype(np.int8), axis=1) <= 0).all()):
            raise InputError(f"task {self.name!r}: prompts are padded on the right, and none is empty")
        outside = np.flatnonzero((position < 0) | (position >= mask.sum(1)))
        if outside.size:
            i = int(outside[0])
            raise InputError(
                f"task {self.name!r}: prompt {i} has {int(mask[i].sum())} tokens and position {int(position[i])}; "
                "positions count from 0 and lie on a real token"
            )

    def __len__(self) -> int:
        return self.clean.shape[0]

    def __iter__(self) -> Iterator["Task"]:
        """Pair after pair, each a task of its own."""
        return (self[i] for i in range(len(self)))

    def __getitem__(self, rows: int | slice | np.ndarray | Array) -> "Task":
        """The pairs of a number, a slice, an index array or a boolean mask.

        Raises:
          InputError: there are none, or a number is out of range.
        """
        if not isinstance(rows, slice):
            rows = self._checked(rows)
        taken = jax.tree.map(lambda x: x[rows], self)
        if not len(taken):
            raise InputError(f"task {self.name!r} has {len(self)} pairs, and none is left")
        return taken

    def _checked(self, rows: Any) -> Any:
        """An index array in range: JAX takes another row where there is none."""
        if isinstance(rows, jax.core.Tracer):
            return rows
        n, found = len(self), np.asarray(rows).reshape(-1)
        if found.dtype == bool:
            outside = len(found) != n
        else:
            found = found.astype(np.int64)
            outside = found.size and not -n <= found.min() <= found.max() < n
        if outside:
            raise InputError(
                f"task {self.name!r} has {n} pairs (0–{n - 1}); a mask has one value for each, got "
                f"{'a mask of ' + str(len(found)) if found.dtype == bool else found.tolist()}"
            )
        return found

    @property
    def chance(self) -> float:
        """How often the best answer would beat every distractor if all tokens were scored at random."""
        sizes = []
        for tokens, weight in ((self.answer, self.answer_weight), (self.distractor, self.distractor_weight)):
            counted = np.ones(tokens.shape) if weight is None else np.asarray(weight) != 0
            sizes.append(counted.reshape(len(self), -1).sum(1))
        return float((sizes[0] / (sizes[0] + sizes[1])).mean())

    def logit_difference(self, logits: Float[Array, "batch 1 d_vocab"]) -> Float[Array, " batch"]:
        """Logits of the answers minus those of the distractors, from logits at `position` only."""
        return self._difference(widened(logits[:, 0]), mean=True)

    def probability_difference(self, logits: Float[Array, "batch 1 d_vocab"]) -> Float[Array, " batch"]:
        """Probability of the answers minus that of the distractors, from logits at `position` only."""
        return self._difference(jax.nn.softmax(widened(logits[:, 0])), mean=False)

    def metric(self, logits: Float[Array, "batch 1 d_vocab"]) -> Float[Array, " batch"]:
        """What circuits are scored by, of every pair: larger where the model does the task.

        Args:
          logits: at `position` only (`output_pos=task.position`).
        """
        if self.measure == "probability-difference":
            return self.probability_difference(logits)
        return self.logit_difference(logits)

    def answer_probability(self, logits: Float[Array, "batch 1 d_vocab"]) -> Float[Array, " batch"]:
        """Probability of the answer, or of all answers, among all tokens."""
        return self._weighed(jax.nn.softmax(widened(logits[:, 0])), self.answer, self.answer_weight, mean=False)

    def correct(self, logits: Float[Array, "batch 1 d_vocab"]) -> Bool[Array, " batch"]:
        """True where the model does the task.

        The best answer is above every distractor; for a probability difference, the answers together are likelier than
        the distractors together.
        """
        if self.measure == "probability-difference":
            return self.probability_difference(logits) > 0
        best = [
            _options(logits[:, 0], tokens, weight, empty=-jnp.inf).max(1)
            for tokens, weight in ((self.answer, self.answer_weight), (self.distractor, self.distractor_weight))
        ]
        return best[0] > best[1]

    def _difference(self, values: Float[Array, "batch d_vocab"], *, mean: bool) -> Float[Array, " batch"]:
        answer = self._weighed(values, self.answer, self.answer_weight, mean=mean)
        return answer - self._weighed(values, self.distractor, self.distractor_weight, mean=mean)

    def _weighed(self, values: Array, tokens: Array, weight: Array | None, *, mean: bool) -> Float[Array, " batch"]:
        picked = _pick(values, tokens, weight)
        if weight is not None:
            return (picked * weight.reshape(picked.shape).astype(picked.dtype)).sum(1)
        return picked.mean(1) if mean else picked.sum(1)


def _readable(x: Any) -> bool:
    """Whether this process has all of an array's numbers."""
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def _pick(values: Array, tokens: Array, weight: Array | None) -> Float[Array, "batch choice"]:
    """Values of tokens, NaN for those that do not exist unless they pad a set."""
    tokens = tokens if weight is None else jnp.where(weight != 0, tokens, 0)
    return at_tokens(values, tokens.reshape(tokens.shape[0], -1))


def _options(values: Array, tokens: Array, weight: Array | None, *, empty: Any) -> Float[Array, "batch choice"]:
    """Values of a set, `empty` where it is padded."""
    picked = _pick(values, tokens, weight)
    if weight is None:
        return picked
    return jnp.where(weight.reshape(picked.shape) != 0, picked, jnp.asarray(empty, picked.dtype))


def warn_unless_done(name: str, clean: float, corrupt: float) -> None:
    """Says so where a model does not do a task: its metric, mean over pairs, is no larger on the clean prompts."""
    if not clean > corrupt:
        message = (
            f"the model does not do task {name!r}: its metric is {clean:.4g} on the clean prompts and {corrupt:.4g} on "
            "the counterfactual ones (or with everything ablated), so what is found explains little. See whether the "
            "prompts are what the model was trained with: its own tokenizer, and the first token that this one adds"
        )
        warnings.warn(message, TaskWarning, stacklevel=3)
