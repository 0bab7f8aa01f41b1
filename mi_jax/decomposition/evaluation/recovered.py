"""How much of what an ablation costs a spliced-in dictionary saves."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mi_jax.decomposition.evaluation.batches import widened
from mi_jax.decomposition.evaluation.estimates import Estimate, bootstrap_ratio


def cross_entropy_recovered(
    ce_clean: Float[Array | np.ndarray, " sequence"],
    ce_spliced: Float[Array | np.ndarray, " sequence"],
    ce_ablated: Float[Array | np.ndarray, " sequence"],
    *,
    key: Array,
) -> Estimate:
    """Share of what an ablation costs that the spliced-in dictionary saves, (H_abl − H_sae) / (H_abl − H_clean).

    The arguments are cross-entropies per sequence (mean over its tokens, or their sum); 1 is a splice without loss,
    0 one that is no better than the ablation. The interval is from resampled sequences. Zero ablation is the base in
    SAEBench; mean ablation costs less, so it asks more.

    Raises:
      ValueError: the ablation costs nothing over all, so that the ratio has no meaning.
    """
    ce_clean, ce_spliced, ce_ablated = (np.asarray(a, np.float64) for a in (ce_clean, ce_spliced, ce_ablated))
    cost = ce_ablated - ce_clean
    if not float(cost.sum()) > 0:
        raise ValueError(
            f"the ablation must raise the cross-entropy; it changed it by {float(cost.mean()):.3g} on average"
        )
    return bootstrap_ratio(ce_ablated - ce_spliced, cost, key=key)


def kl_recovered(
    kl_spliced: Float[Array | np.ndarray, " sequence"],
    kl_ablated: Float[Array | np.ndarray, " sequence"],
    *,
    key: Array,
) -> Estimate:
    """1 − Σ KL(clean ‖ spliced) / Σ KL(clean ‖ ablated), with the interval of resampled sequences.

    Unlike the cross-entropy, which errors can lower by luck, the divergence counts every change of the predictions.

    Raises:
      ValueError: the ablation changes nothing.
    """
    kl_spliced, kl_ablated = (np.asarray(a, np.float64) for a in (kl_spliced, kl_ablated))
    if not float(kl_ablated.sum()) > 0:
        raise ValueError("the ablation changes no prediction, so that there is nothing to recover")
    return bootstrap_ratio(kl_ablated - kl_spliced, kl_ablated, key=key)


def kl_divergence(
    logits: Float[Array, "*batch d_vocab"], other: Float[Array, "*batch d_vocab"]
) -> Float[Array, "*batch"]:
    """KL(p ‖ q) = Σ p (log p − log q) in nats, p from `logits` and q from `other`."""
    log_p, log_q = (jax.nn.log_softmax(widened(a)) for a in (logits, other))
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
