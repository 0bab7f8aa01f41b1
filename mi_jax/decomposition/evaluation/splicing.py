"""What a model loses when a dictionary's reconstruction takes the place of its activations.

Every comparison is between four runs that differ in the same tokens of one layer only: clean, spliced (the
reconstruction), and ablated to zero or to a mean.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.core.edits import patch, transform
from mi_jax.core.errors import InputError
from mi_jax.core.sites import at
from mi_jax.core.transforms import SiteModel, capture, intervene
from mi_jax.decomposition.evaluation.batches import row_slices, widened
from mi_jax.decomposition.evaluation.estimates import Estimate, bootstrap_ratio
from mi_jax.decomposition.evaluation.reconstructor import Reconstructor
from mi_jax.decomposition.evaluation.recovered import cross_entropy_recovered, kl_divergence, kl_recovered


class Selected(eqx.Module):
    """A function at the tokens where `where` is True; the others stay as they are."""

    fn: Callable[[Array], Array]
    where: Bool[Array, "batch pos"]

    def __call__(self, x: Float[Array, "batch pos d_model"]) -> Float[Array, "batch pos d_model"]:
        # a dictionary computes in float32, whatever the model does
        return jnp.where(self.where[..., None], self.fn(widened(x)).astype(x.dtype), x)


class Constant(eqx.Module):
    """A value for every token: what an ablation puts in place of an activation."""

    value: Float[Array, " d_model"]

    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        return jnp.broadcast_to(self.value.astype(x.dtype), x.shape)


@dataclasses.dataclass(frozen=True)
class SplicedEvaluation:
    """What a splice costs, in nats per predicted token; a share is None where its ablation costs nothing.

    Intervals are from resampled sequences. Only predictions at or after the first replaced token of a sequence count:
    the others are the same in every run.

    Attributes:
      ce_clean, ce_spliced, ce_zero_ablated, ce_mean_ablated: cross-entropy of the next token.
      ce_increase: spliced − clean.
      ce_recovered_zero, ce_recovered_mean: (H_abl − H_sae) / (H_abl − H_clean).
      kl_spliced, kl_zero_ablated, kl_mean_ablated: KL(clean ‖ run).
      kl_recovered_zero, kl_recovered_mean: 1 − KL(clean ‖ spliced) / KL(clean ‖ ablated).
      n_predictions: predictions that count.
      n_replaced: tokens that are replaced.
    """

    ce_clean: Estimate
    ce_spliced: Estimate
    ce_zero_ablated: Estimate
    ce_mean_ablated: Estimate
    ce_increase: Estimate
    ce_recovered_zero: Estimate | None
    ce_recovered_mean: Estimate | None
    kl_spliced: Estimate
    kl_zero_ablated: Estimate
    kl_mean_ablated: Estimate
    kl_recovered_zero: Estimate | None
    kl_recovered_mean: Estimate | None
    n_predictions: int
    n_replaced: int


@dataclasses.dataclass(frozen=True)
class TaskEffect:
    """A metric of the user, mean over prompts, in the four runs.

    Attributes:
      recovered_zero, recovered_mean: (spliced − ablated) / (clean − ablated), of the sums over prompts. None where the
        ablation leaves the sum as it is.
    """

    clean: Estimate
    spliced: Estimate
    zero_ablated: Estimate
    mean_ablated: Estimate
    recovered_zero: Estimate | None
    recovered_mean: Estimate | None


def replaced_tokens(mask: Bool[Array | np.ndarray, "batch pos"]) -> Bool[np.ndarray, "batch pos"]:
    """Real tokens after position 0, whose activations are of another kind (an attention sink) in most models."""
    return np.asarray(mask) & (np.arange(mask.shape[1]) > 0)[None, :]


def _runs(model, dictionary, mean, tokens, mask, where, layer, site, read_site, options) -> tuple[Array, ...]:
    """Outputs clean, spliced, ablated to zero, and ablated to the mean."""
    dictionary = widened(dictionary)

    def replaced(fn):
        return intervene(model, transform(site, Selected(fn, where), layer=layer))(tokens, mask, **options)

    if read_site == site:
        clean, spliced = model(tokens, mask, **options), replaced(dictionary)
    else:
        wanted = [at(name, layers=layer) for name in (read_site, site)]
        clean, acts = capture(model, *wanted)(tokens, mask, **options)
        y = dictionary(widened(acts[read_site])).astype(acts[site].dtype)
        y = jnp.where(where[..., None], y, acts[site])
        spliced = intervene(model, patch(site, y, layer=layer))(tokens, mask, **options)
    return clean, spliced, replaced(Constant(jnp.zeros_like(mean))), replaced(Constant(mean))


@eqx.filter_jit
def _losses(model, dictionary, mean, tokens, mask, where, layer, site, read_site):
    """Per run and sequence: Σ next-token loss and Σ KL(clean ‖ run); per sequence, how many predictions count."""
    runs = _runs(model, dictionary, mean, tokens, mask, where, layer, site, read_site, {})
    counts = (jnp.cumsum(where, 1) > 0)[:, :-1] & mask[:, :-1] & mask[:, 1:]

    def nll(logits):
        log_p = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]

    losses = [jnp.where(counts, nll(run), 0).sum(1) for run in runs]
    clean = runs[0][:, :-1].astype(jnp.float32)
    divergences = [
        jnp.where(counts, kl_divergence(clean, run[:, :-1].astype(jnp.float32)), 0).sum(1) for run in runs[1:]
    ]
    return jnp.stack(losses), jnp.stack(divergences), counts.sum(1)


def evaluate_spliced(
    model: SiteModel,
    dictionary: Reconstructor,
    tokens: Int[Array | np.ndarray, "batch pos"],
    mask: Bool[Array | np.ndarray, "mask_batch mask_pos"] | None = None,
    *,
    site: str,
    layer: int | None,
    mean: Float[Array, " d_model"],
    key: Array,
    read_site: str | None = None,
    where: Bool[Array | np.ndarray, "where_batch where_pos"] | None = None,
    batch_size: int = 8,
) -> SplicedEvaluation:
    """Cross-entropy and KL recovered when a dictionary is spliced into a language model.

    Args:
      model: gives logits `[batch pos d_vocab]`.
      dictionary: its reconstruction replaces the site. Score its null in the same way.
      tokens: right-padded.
      mask: True at real tokens; None means all are.
      site, layer: what is replaced; layer None for a site without layers.
      mean: of the site on training data, for mean ablation.
      key: draws the bootstrap.
      read_site: what the dictionary reads, in the same layer; None means `site`. For transcoders.
      where: tokens to replace; None means `replaced_tokens(mask)`: position 0 stays as it is.
      batch_size: sequences at a time.

    Raises:
      InputError: fewer than two sequences, shapes that differ, or no prediction that could change.
      SiteError: the model has no such site or layer.

    Example:
      `evaluate_spliced(model, sae, tokens, site="resid_post", layer=8, mean=mean, key=jax.random.key(0))`
    """
    tokens, mask, where = _checked(tokens, mask, where)
    parts = []
    for rows, n in row_slices(len(tokens), batch_size):
        t, m, w = (jnp.asarray(a[rows]) for a in (tokens, mask, where))
        out = _losses(model, dictionary, mean, t, m, w, layer, site, read_site or site)
        parts.append([np.asarray(a, np.float64)[..., :n] for a in out])
    losses, divergences, counts = (np.concatenate(a, -1) for a in zip(*parts, strict=True))
    if not counts.sum():
        raise InputError("no replaced token is followed by a token to predict; give longer prompts or another where")
    keys = jax.random.split(key, 12)
    clean, spliced, zero, mean_ablated = losses
    kl, kl_zero, kl_mean = divergences

    def per_token(total, i):
        return bootstrap_ratio(total, counts, key=keys[i])

    return SplicedEvaluation(
        ce_clean=per_token(clean, 0),
        ce_spliced=per_token(spliced, 1),
        ce_zero_ablated=per_token(zero, 2),
        ce_mean_ablated=per_token(mean_ablated, 3),
        ce_increase=per_token(spliced - clean, 4),
        ce_recovered_zero=_if_costly(zero - clean, cross_entropy_recovered, clean, spliced, zero, key=keys[5]),
        ce_recovered_mean=_if_costly(
            mean_ablated - clean, cross_entropy_recovered, clean, spliced, mean_ablated, key=keys[6]
        ),
        kl_spliced=per_token(kl, 7),
        kl_zero_ablated=per_token(kl_zero, 8),
        kl_mean_ablated=per_token(kl_mean, 9),
        kl_recovered_zero=_if_costly(kl_zero, kl_recovered, kl, kl_zero, key=keys[10]),
        kl_recovered_mean=_if_costly(kl_mean, kl_recovered, kl, kl_mean, key=keys[11]),
        n_predictions=int(counts.sum()),
        n_replaced=int(where.sum()),
    )


def task_effect(
    model: SiteModel,
    dictionary: Reconstructor,
    metric: Callable[[Any], Array],
    tokens: Int[Array | np.ndarray, "batch pos"],
    mask: Bool[Array | np.ndarray, "mask_batch mask_pos"] | None = None,
    *,
    site: str,
    layer: int | None,
    mean: Float[Array, " d_model"],
    key: Array,
    read_site: str | None = None,
    where: Bool[Array | np.ndarray, "where_batch where_pos"] | None = None,
    **options,
) -> TaskEffect:
    """A metric of the user under the splice, against the clean run and both ablations.

    Args:
      metric: of the model's output, one number per prompt, `[batch]`.
      options: of the model's call, such as `output_pos=task.position`.
      model, dictionary, tokens, mask, site, layer, mean, key, read_site, where: as in `evaluate_spliced`; all prompts
        run at once.

    Raises:
      InputError: fewer than two prompts, shapes that differ, or a metric that is not one number per prompt.
      SiteError: the model has no such site or layer.
    """
    tokens, mask, where = _checked(tokens, mask, where)
    t, m, w = map(jnp.asarray, (tokens, mask, where))
    runs = _metrics(model, dictionary, mean, t, m, w, layer, site, read_site or site, metric, options)
    if runs[0].shape != (len(tokens),):
        raise InputError(f"the metric gives shape {runs[0].shape}, expected one number per prompt, ({len(tokens)},)")
    clean, spliced, zero, mean_ablated = (np.asarray(run, np.float64) for run in runs)
    keys, ones = jax.random.split(key, 6), np.ones(len(tokens))

    def recovered(ablated, i):
        cost = clean - ablated
        return None if abs(cost.sum()) < 1e-9 else bootstrap_ratio(spliced - ablated, cost, key=keys[i])

    return TaskEffect(
        *(bootstrap_ratio(run, ones, key=keys[i]) for i, run in enumerate((clean, spliced, zero, mean_ablated))),
        recovered_zero=recovered(zero, 4),
        recovered_mean=recovered(mean_ablated, 5),
    )


@eqx.filter_jit
def _metrics(model, dictionary, mean, tokens, mask, where, layer, site, read_site, metric, options):
    runs = _runs(model, dictionary, mean, tokens, mask, where, layer, site, read_site, options)
    return tuple(metric(widened(run)) for run in runs)


def _checked(tokens, mask, where) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens = np.asarray(tokens)
    mask = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask)
    where = replaced_tokens(mask) if where is None else np.asarray(where)
    if mask.shape != tokens.shape or where.shape != tokens.shape:
        raise InputError(f"tokens, mask and where have one shape; got {tokens.shape}, {mask.shape} and {where.shape}")
    if len(tokens) < 2:
        raise InputError(f"an interval needs two or more prompts, got {len(tokens)}")
    return tokens, mask, where & mask


def _if_costly(cost: np.ndarray, share: Callable[..., Estimate], *args, key: Array) -> Estimate | None:
    return share(*args, key=key) if cost.sum() > 0 else None
