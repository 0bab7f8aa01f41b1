"""Training cross-layer transcoders on the activations of all layers, held in memory.

The step, its schedules and its loop are those of every dictionary; the loss and the batches are of all layers.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, PyTree

from mi_jax.core import sharding
from mi_jax.core.errors import InputError
from mi_jax.core.precision import widened
from mi_jax.decomposition.config import Objective
from mi_jax.decomposition.cross_layer import CrossLayerTranscoder
from mi_jax.decomposition.cross_layer_config import CrossLayerConfig, check_cross_layer, init_cross_layer
from mi_jax.decomposition.cross_layer_loss import bounded, choose, cross_layer_loss, decode, encode, largest_codes
from mi_jax.decomposition.massive import massive
from mi_jax.decomposition.objective import in_turn
from mi_jax.decomposition.training.config import Knobs, TrainConfig
from mi_jax.decomposition.training.fit import History, Report, history_of, last_pass, run_steps
from mi_jax.decomposition.training.gradients import gradients
from mi_jax.decomposition.training.source import normalisation
from mi_jax.decomposition.training.state import TrainState, checked_knobs, init_state
from mi_jax.decomposition.training.step import descended, scheduled
from mi_jax.decomposition.training.threshold import settled


class LayersInMemory(eqx.Module):
    """One epoch over the activations of all layers.

    Attributes:
      x, y: what is read and what is predicted, a row per token.
      order: the epoch's permutation.
      scale_x, scale_y: factors of each layer to unit variance per dimension.
      batch_size: tokens per step.
      mesh: shards batches.
    """

    x: Float[Array, "n layer d_in"]
    y: Float[Array, "n layer d_out"]
    order: Int[Array, " n"]
    scale_x: Float[Array, " layer"]
    scale_y: Float[Array, " layer"]
    batch_size: int = eqx.field(static=True)
    mesh: Mesh | None = eqx.field(static=True, default=None)

    def batch(
        self, step: Int[Array, ""]
    ) -> tuple[Float[Array, "token layer d_in"], Float[Array, "token layer d_out"], None]:
        start = step % (self.x.shape[0] // self.batch_size) * self.batch_size
        rows = jax.lax.dynamic_slice_in_dim(self.order, start, self.batch_size)
        return self._placed(self.x[rows], self.scale_x), self._placed(self.y[rows], self.scale_y), None

    def _placed(self, x: Array, scale: Array) -> Array:
        x = widened(x) * scale[None, :, None]
        return x if self.mesh is None else jax.lax.with_sharding_constraint(x, _batches(x, self.mesh))


def cross_layer_step(
    state: TrainState[CrossLayerTranscoder],
    knobs: Knobs,
    source: LayersInMemory,
    objective: Objective,
    train: TrainConfig,
    frozen_decoder: bool = False,
) -> tuple[TrainState[CrossLayerTranscoder], dict[str, Array]]:
    """The state after one step on the source's batch, and the scalars that `METRICS` names.

    `l0` counts codes per token and layer; `fvu` is over all layers together.
    """
    x, y, _ = source.batch(state.step)
    dead = in_turn(state.since_fired >= train.dead_after, objective.aux_candidates, state.step)
    coefficients = scheduled(state, knobs, objective, train)

    def loss_of(transcoder, chosen, _):
        return cross_layer_loss(transcoder, x, y, dead, objective, coefficients, chosen)

    transcoder = state.dictionary
    total, parts, grads, fits = gradients(
        loss_of, transcoder, choose(transcoder, x), bounded=bounded(transcoder), frozen_decoder=frozen_decoder
    )
    sparsity = coefficients.sparsity
    return descended(state, knobs, transcoder, grads, total, parts, y, sparsity, fits, train, frozen_decoder)


def fit_cross_layer(
    inputs: Float[Array, "n layer d_in"],
    targets: Float[Array, "n layer d_out"],
    config: CrossLayerConfig,
    objective: Objective,
    train: TrainConfig,
    *,
    key: Array,
    knobs: Knobs | None = None,
    progress: Report | None = None,
    frozen_decoder: bool = False,
    state: TrainState | None = None,
    mesh: Mesh | None = None,
) -> tuple[CrossLayerTranscoder, History]:
    """Trains a cross-layer transcoder.

    Args:
      inputs: what each layer reads (such as the stream before its MLP), one row per token, in any order; each layer is
        scaled to unit variance inside, the result is in the units of the activations.
      targets: what each layer writes (such as its MLP's output), row by row.
      config: the shape.
      objective: the loss; `penalty="tanh"` with `auxiliary="preactivation"` is that of the source for ReLU and
        JumpReLU, `auxiliary="auxk"` revives dead latents of topk and batchtopk.
      train: the schedule. With `decoder="unit"` a latent's decoders to all targets together keep norm 1.
      key: draws the start and the order of the tokens.
      knobs: the run's own numbers but k, which is the configuration's; those of the configurations if not given.
      progress: as in `fit`.
      frozen_decoder: leave the decoders as they were drawn, for a null.
      state: where to go on from, as `progress` had it, with the same other arguments.
      mesh: shards latents and activations by the table of `mi_jax.core.sharding`.

    Returns:
      The transcoder, and for every compiled call the step it ended at and its mean metrics.

    Raises:
      InputError: activations that do not fit the configurations, that are not finite, or that hold massive ones; a
        schedule of k, or resampling, which cross-layer transcoders do not have.

    Example:
      `fit_cross_layer(x, y, CrossLayerConfig(d_in=768, d_sae=4096, n_layers=12, k=16), Objective(auxiliary="auxk"),
      TrainConfig(steps=2000), key=jax.random.key(0))`
    """
    check_cross_layer(config, objective)
    own = _knobs(knobs, config, objective, train)
    _check(inputs, targets, config, train)
    if mesh is not None:
        inputs, targets = (jax.device_put(a, _batches(a, mesh)) for a in (inputs, targets))
    (_, scale_x), (_, scale_y) = (jax.vmap(normalisation, in_axes=1)(a) for a in (inputs, targets))
    order = jnp.arange(inputs.shape[0])
    source = LayersInMemory(inputs, targets, order, scale_x, scale_y, train.batch_size, mesh)
    k_init, k_order = jax.random.split(key)
    if state is None:
        x, y, _ = source.batch(jnp.int32(0))
        fresh = _match_size(init_cross_layer(config, key=k_init, mean=y.mean(0)), x, y)
        current = init_state(fresh, config.layer, objective, train, frozen_decoder=frozen_decoder)
        if mesh is not None:
            current = sharding.shard(current, cross_layer_axes(current, config.n_layers, config.d_sae), mesh)
    else:
        current = jax.tree.map(jnp.copy, state)
    current, history = run_steps(
        current, source, k_order, own, objective, train, frozen_decoder, progress, one_step=cross_layer_step
    )
    transcoder = settled(current.dictionary, last_pass(source, k_order, train), largest_codes)
    return fold_layer_scales(transcoder, scale_x, scale_y), history_of(history)


def fold_layer_scales(
    transcoder: CrossLayerTranscoder, scale_in: Float[Array, " layer"], scale_out: Float[Array, " layer"]
) -> CrossLayerTranscoder:
    """The transcoder of x → y that does what this one does from x · scale_in to y · scale_out, layer by layer.

    Codes come out in the units of x. Tied decoders stay tied: the ratios of scales go to `scale`.
    """
    n = transcoder.n_layers
    ratios = [scale_in[i] / scale_out[i:] for i in range(n)]
    w_dec, scale, w_skip = transcoder.w_dec, transcoder.scale, transcoder.w_skip
    if transcoder.tying == "none":
        w_dec = tuple(w * r[None, :, None] for w, r in zip(w_dec, ratios, strict=True))
    else:
        before = scale or tuple(jnp.ones((transcoder.d_sae, n - i), w_dec[0].dtype) for i in range(n))
        scale = tuple(s * r[None, :] for s, r in zip(before, ratios, strict=True))
    if w_skip is not None:
        w_skip = w_skip * (scale_in / scale_out)[:, None, None]
    scaled = eqx.filter_vmap(lambda activation, factor: activation.scaled(factor), in_axes=(eqx.if_array(0), 0))
    return CrossLayerTranscoder(
        w_enc=transcoder.w_enc,
        b_enc=transcoder.b_enc / scale_in[:, None],
        w_dec=w_dec,
        b_dec=transcoder.b_dec / scale_out[:, None],
        activation=scaled(transcoder.activation, 1 / scale_in),
        w_skip=w_skip,
        scale=scale,
        tying=transcoder.tying,
    )


def cross_layer_axes(tree: PyTree, n_layers: int, d_sae: int) -> PyTree:
    """The names of every array's axes, for `mi_jax.core.sharding.shard`: of a transcoder, or of its training state."""

    def names(leaf):
        if not eqx.is_array(leaf):
            return leaf
        if leaf.shape[:2] == (n_layers, d_sae):
            return ("layer", "d_sae", *(("d_model",) if leaf.ndim == 3 else ()))
        if leaf.ndim > 1 and leaf.shape[0] == d_sae:
            return ("d_sae", None, *(("d_model",) if leaf.ndim == 3 else ()))
        return (None,) * leaf.ndim

    return jax.tree.map(names, tree)


@eqx.filter_jit
def _match_size(transcoder: CrossLayerTranscoder, x: Array, y: Array) -> CrossLayerTranscoder:
    """Scales the encoders so that the first reconstructions of `y` have the size that fits best."""
    centred = y - transcoder.b_dec[None]
    # places that run out in a first guess of the size change nothing that lasts
    guess = decode(transcoder, encode(transcoder, x, choose(transcoder, x)))
    along = (centred * guess).sum() / jnp.maximum((guess * guess).sum(), 1e-30)
    size = jnp.sqrt((centred * centred).sum() / jnp.maximum((guess * guess).sum(), 1e-30))
    factor = jnp.where(along > 0.05 * size, along, 0.1 * size)
    return eqx.tree_at(lambda t: t.w_enc, transcoder, transcoder.w_enc * factor)


def _batches(x: Array, mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, sharding.spec(("batch", "layer", "d_model"), x.shape, mesh))


def _knobs(knobs: Knobs | None, config: CrossLayerConfig, objective: Objective, train: TrainConfig) -> Knobs:
    if knobs is not None and int(knobs.k) != config.k:
        raise InputError(f"knobs.k={int(knobs.k)}, but a cross-layer transcoder has the configuration's k={config.k}")
    return checked_knobs(knobs, config.layer, objective, train)


def _check(inputs: Array, targets: Array, config: CrossLayerConfig, train: TrainConfig) -> None:
    n = inputs.shape[0]
    for name, array, width in (("inputs", inputs, config.d_in), ("targets", targets, config.width_out)):
        if array.shape != (n, config.n_layers, width):
            raise InputError(
                f"{name} must have shape [n={n}, layer={config.n_layers}, width={width}], got {array.shape}"
            )
        if wrong := int((~jnp.isfinite(array).all((1, 2))).sum()):
            raise InputError(f"{wrong} of {n} rows of {name} are not finite (NaN or infinity)")
    if n < train.batch_size:
        raise InputError(f"{n} rows do not fill one batch of batch_size={train.batch_size}")
    if train.k_start is not None or train.resample_every:
        raise InputError("a cross-layer transcoder has no k_start and no resampling; leave both out of TrainConfig")
    if train.massive_ratio is None:
        return
    count = int(jax.vmap(massive, in_axes=(1, None))(inputs, train.massive_ratio).any(0).sum())
    if count:
        raise InputError(
            f"{count} of {n} rows have, in some layer, an input with a norm over {train.massive_ratio:g} times the "
            "layer's median; leave them out of inputs and targets, or set massive_ratio=None"
        )
