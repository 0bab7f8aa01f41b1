"""AtP*: two corrections of attribution patching (Kramár et al. 2024, arXiv 2403.00745, sections 3.1 and 3.2).

*QK fix.* Where attention is saturated the gradient through the softmax vanishes, and a query or key that decides
everything scores zero. So the pattern with the patched query or key is computed exactly, and only from the pattern on
is the metric linearised: `score = Σ (pattern' − pattern) · ∂m/∂pattern`.

*GradDrop.* Effects along different paths may cancel in the gradient at one input. So the score is averaged as an
absolute value over gradients in which one layer's contributions to the stream are constants:
`score = 1/(L−1) Σ_l |score with no gradient through layer l|`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mi_jax.core.edits import Edit
from mi_jax.core.errors import InputError
from mi_jax.core.index import Index
from mi_jax.core.precision import widened
from mi_jax.core.sites import LAYER, AttentionRule, SiteError, SiteTable

Scores = Float[Array, "*layer batch pos head"]
_BLOCK_OUTPUTS = ("attn_out", "mlp_out")
_PLAIN = AttentionRule()


class _GradientGate(Edit):
    """Leaves the value as it is; lets the gradient through in proportion to the operand."""

    def new(self, x, operand):
        x = widened(x)
        return operand * x + (1 - operand) * jax.lax.stop_gradient(x)


def query_effects(
    source_query: Float[Array, "*layer batch pos head d_head"],
    key: Float[Array, "*layer batch pos kv_head d_head"],
    scores: Float[Array, "*layer batch head query key"],
    gradient: Float[Array, "*layer batch head query key"],
    rule: AttentionRule = _PLAIN,
) -> Scores:
    """The QK fix of every query: `Σ_key (pattern' − pattern) · gradient`, where one query at a time is the source's.

    Args:
      key, scores: of the run that is patched; what its mask forbids is read from the scores.
      gradient: of the metric with respect to that run's pattern.
      rule: how the model's queries and keys make scores.
    """
    new, scores, gradient = _scores(source_query, key, scores, rule), widened(scores), widened(gradient)
    change = jax.nn.softmax(new, -1) - jax.nn.softmax(scores, -1)
    return jnp.moveaxis((change * gradient).sum(-1), -1, -2)


def key_effects(
    query: Float[Array, "*layer batch pos head d_head"],
    source_key: Float[Array, "*layer batch pos kv_head d_head"],
    scores: Float[Array, "*layer batch head query key"],
    gradient: Float[Array, "*layer batch head query key"],
    rule: AttentionRule = _PLAIN,
) -> Float[Array, "*layer batch pos kv_head"]:
    """The QK fix of every key, where one key at a time is the source's, summed over the queries that read it.

    With one key changed, a row of the pattern moves between that key and the others in their old proportions, so its
    effect is `(p' − p) · (gradient at the key − mean gradient over the others)`: quadratic in the prompt length for
    all keys together.
    """
    new, scores, gradient = _scores(query, source_key, scores, rule), widened(scores), widened(gradient)
    others, mean_gradient = _without_each_key(scores, gradient)
    moved = jax.nn.sigmoid(new - others) - jax.nn.sigmoid(scores - others)
    by_head = (moved * (gradient - mean_gradient)).sum(-2)
    n_kv_heads = source_key.shape[-2]
    grouped = by_head.reshape(*by_head.shape[:-2], n_kv_heads, -1, by_head.shape[-1])
    return jnp.moveaxis(grouped.sum(-2), -1, -2)


def _scores(query: Array, key: Array, masked_as: Array, rule: AttentionRule) -> Array:
    """Scores of other queries or keys, `widened`, with the masked ones as they were."""
    forbidden = max(float(jnp.finfo(masked_as.dtype).min) / 2, -1e8)
    query, key, masked_as = widened(query), widened(key), widened(masked_as)
    key = jnp.repeat(key, query.shape[-2] // key.shape[-2], axis=-2)
    scale = query.shape[-1] ** -0.5 if rule.scale is None else rule.scale
    new = jnp.einsum("...qhd,...phd->...hqp", query, key) * scale
    if rule.softcap:
        new = rule.softcap * jnp.tanh(new / rule.softcap)
    return jnp.where(masked_as < forbidden, masked_as, new)


def _without_each_key(scores: Array, gradient: Array) -> tuple[Array, Array]:
    """For every key, over the other keys of its row: the log of their summed exponentials, and their mean gradient.

    Subtracting one key from the row's totals would cancel just where attention is saturated, so sums from the left and
    from the right are joined instead, each kept relative to its own maximum.
    """

    def join(a, b):
        top = jnp.maximum(a[0], b[0])
        left, right = jnp.exp(a[0] - top), jnp.exp(b[0] - top)
        return top, a[1] * left + b[1] * right, a[2] * left + b[2] * right

    def shifted(x, fill, step):
        edge = jnp.full_like(x[..., :1], fill)
        return jnp.concatenate([edge, x[..., :-1]] if step > 0 else [x[..., 1:], edge], -1)

    one = (scores, jnp.ones_like(scores), gradient.astype(scores.dtype))
    fills = (float(jnp.finfo(scores.dtype).min), 0.0, 0.0)
    axis = scores.ndim - 1
    before = jax.lax.associative_scan(join, one, axis=axis)
    behind = jax.lax.associative_scan(join, one, axis=axis, reverse=True)
    top, total, weighted = join(
        tuple(shifted(x, fill, 1) for x, fill in zip(before, fills, strict=True)),
        tuple(shifted(x, fill, -1) for x, fill in zip(behind, fills, strict=True)),
    )
    none = total == 0  # a row of one key
    safe = jnp.where(none, 1.0, total)
    return jnp.where(none, top, top + jnp.log(safe)), weighted / safe


def grad_drop(score: Callable[[dict[str, tuple[Edit, ...]]], PyTree], table: SiteTable) -> PyTree:
    """The mean over layers of absolute scores, each computed with no gradient through that layer's contributions.

    Args:
      score: from the edits that stop the gradient to scores; it applies them after the point where it differentiates.

    Raises:
      SiteError: the model has neither `attn_out` nor `mlp_out`.
      InputError: it has one layer, so that dropping it leaves nothing.
    """
    names = [name for name in _BLOCK_OUTPUTS if name in table.names]
    if not names:
        raise SiteError(f"method 'atp*' drops gradients at {' and '.join(_BLOCK_OUTPUTS)}; {table.model} has neither")
    n_layers = table.size(LAYER)
    if n_layers < 2:
        raise InputError(f"method 'atp*' drops one layer at a time; {table.model} has {n_layers}: use 'atp+qk'")
    layers = jnp.arange(n_layers, dtype=jnp.int32)

    def without(layer):
        gates = {}
        for name in names:
            site, _ = table.resolve(name)
            gate = (layers != layer).astype(jnp.float32)
            gates[name] = (_GradientGate(name, Index(), gate.reshape(-1, *(1,) * (len(site.axes) - 1))),)
        return jax.tree.map(jnp.abs, score(gates))

    dropped = jax.lax.map(without, layers)
    return jax.tree.map(lambda x: x.sum(0) / (n_layers - 1), dropped)
