"""Dead latents drawn anew from tokens that the dictionary reconstructs badly, inside the compiled step.

Source: Bricken et al. 2023, "Towards Monosemanticity", appendix on neuron resampling.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from mi_jax.decomposition.config import Objective
from mi_jax.decomposition.dictionary import of_latents
from mi_jax.decomposition.initial import unit_rows
from mi_jax.decomposition.training.config import TrainConfig
from mi_jax.decomposition.training.state import TrainState

# norm of a new encoder row, of the mean norm of living ones
ENCODER_SHARE = 0.2


def resample(
    state: TrainState,
    x: Array,
    y: Array,
    objective: Objective,
    train: TrainConfig,
    valid: Bool[Array, " token"] | None = None,
) -> TrainState:
    """Every `resample_every` steps, gives each dead latent the direction of a token's remainder.

    The tokens are drawn from the valid ones of this batch with probability proportional to their squared error squared;
    the encoder row gets a fifth of the mean norm of living rows, its bias and the optimiser's moments of the latent
    become zero. The draw depends on the step and on nothing else.
    """
    due = (state.step % train.resample_every == 0) & (state.step <= int(train.resample_until * train.steps))
    dead = state.since_fired >= train.dead_after
    due = due & dead.any() if valid is None else due & dead.any() & valid.any()
    return jax.lax.cond(due, lambda s: _resampled(s, x, y, dead, valid), lambda s: s, state)


def _resampled(state: TrainState, x: Array, y: Array, dead: Array, valid: Array | None) -> TrainState:
    dictionary = state.dictionary
    rest = y - dictionary(x)
    weight = jnp.log((rest * rest).sum(1) ** 2 + 1e-30)
    if valid is not None:
        weight = jnp.where(valid, weight, -jnp.inf)
    key = jax.random.fold_in(jax.random.key(0), state.step)
    tokens = jax.random.categorical(key, weight, shape=(dictionary.d_sae,))
    directions = unit_rows(rest[tokens])
    read = directions if dictionary.d_in == dictionary.d_out else unit_rows(x[tokens] - dictionary.centre[None, :])
    norms = jnp.linalg.norm(dictionary.encoder, axis=1)
    alive = jnp.where(dead, 0.0, norms).sum() / jnp.maximum((~dead).sum(dtype=norms.dtype), 1.0)
    new = eqx.tree_at(
        lambda d: (d.w_dec, d.b_enc),
        dictionary,
        (jnp.where(dead[:, None], directions, dictionary.w_dec), jnp.where(dead, 0.0, dictionary.b_enc)),
    )
    if dictionary.w_enc is not None:
        rows = jnp.where(dead[:, None], ENCODER_SHARE * alive * read, dictionary.w_enc)
        new = eqx.tree_at(lambda d: d.w_enc, new, rows)
    return eqx.tree_at(
        lambda s: (s.dictionary, s.optimiser, s.since_fired),
        state,
        (new, _without_moments(state.optimiser, dead), jnp.where(dead, 0, state.since_fired)),
    )


def _without_moments(moments: PyTree, dead: Array) -> PyTree:
    """The optimiser's state with zeros for dead latents."""

    def cleared(path, leaf):
        if of_latents(path) and leaf.ndim:
            return jnp.where(dead.reshape(-1, *(1,) * (leaf.ndim - 1)), 0.0, leaf)
        return leaf

    return jax.tree_util.tree_map_with_path(cleared, moments)
