"""End-to-end training: a dictionary inside a model, trained for the model's predictions.

Each step runs the model to the site, the dictionary there, and the rest of the model twice: on its own activation and
on the reconstruction. Only the latter has a backward pass, and the model's weights get no gradient.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.core.errors import InputError
from mi_jax.decomposition.config import DictionaryConfig, check_combination
from mi_jax.decomposition.dictionary import Dictionary, fold_scale
from mi_jax.decomposition.massive import massive_limit, norms
from mi_jax.decomposition.objective import in_turn, without_dead
from mi_jax.decomposition.training.config import Knobs, TrainConfig
from mi_jax.decomposition.training.continuation import Continuation
from mi_jax.decomposition.training.end_to_end_loss import Clean, EndToEnd, EndToEndLosses, end_to_end_loss
from mi_jax.decomposition.training.fit import History, Report, finished, history_of, last_pass, run_steps, start_from
from mi_jax.decomposition.training.gradients import gradients
from mi_jax.decomposition.training.resample import resample
from mi_jax.decomposition.training.source import filled, normalisation
from mi_jax.decomposition.training.state import TrainState, checked_knobs, counts_codes, init_state, with_places
from mi_jax.decomposition.training.step import METRICS, bounded, descended, scheduled, with_k
from mi_jax.decomposition.training.threshold import Read

END_TO_END_METRICS = (*METRICS, "kl", "downstream")
# batches of contexts over which the scale of activations and the norm of massive ones are estimated
SAMPLE_BATCHES = 8


class InModel(eqx.Module):
    """Contexts, and the model that they go through.

    Attributes:
      rest: the model, and where its activation is replaced.
      tokens, mask: right-padded contexts, and their real tokens.
      order: the epoch's permutation.
      scale_x, scale_y: factors to unit variance per dimension.
      limit: tokens whose activation has a larger norm stay as they are.
      read_site: what the dictionary reads.
      batch_size: contexts per step.
      skip_positions: first positions that stay as they are.
    """

    rest: Continuation
    tokens: Int[Array, "n pos"]
    mask: Bool[Array, "n pos"]
    order: Int[Array, " n"]
    scale_x: Float[Array, ""]
    scale_y: Float[Array, ""]
    limit: Float[Array, ""]
    read_site: str = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    skip_positions: int = eqx.field(static=True)

    def activations(self, step: Int[Array, ""]) -> tuple[Array, Array, Array, Array, Array]:
        """Tokens, mask, what is read, what is replaced, and where it may be, of the batch of a step."""
        start = step % (self.tokens.shape[0] // self.batch_size) * self.batch_size
        rows = jax.lax.dynamic_slice_in_dim(self.order, start, self.batch_size)
        tokens, mask = self.tokens[rows], self.mask[rows]
        acts = self.rest.capture(tokens, mask, (self.read_site, self.rest.site))
        read, value = (acts[self._name(site)] for site in (self.read_site, self.rest.site))
        late = jnp.arange(tokens.shape[1]) >= self.skip_positions
        used = mask & late[None, :] & (norms(read) <= self.limit)
        return tokens, mask, read, value, used

    def clean(self, step: Int[Array, ""]) -> Clean:
        """The model's own run on the batch of a step."""
        tokens, mask, read, value, used = self.activations(step)
        logits, later = self.rest(value, tokens, mask)
        (x, valid), (y, _) = self._rows(read, used, self.scale_x), self._rows(value, used, self.scale_y)
        return Clean(tokens, mask, value, used, x, y, valid, logits, later)

    @eqx.filter_jit
    def read(self, step: Int[Array, ""]) -> Read:
        """What the dictionary reads in the batch of a step, normalised, without the model's run after it."""
        _, _, read, _, used = self.activations(step)
        return self._rows(read, used, self.scale_x)

    def _rows(self, a: Array, used: Array, scale: Array) -> tuple[Array, Array]:
        """A row per token after the first positions, and which of them are replaced."""
        flat = used[:, self.skip_positions :].reshape(-1)
        rows = a[:, self.skip_positions :].reshape(flat.shape[0], -1)
        return filled(rows.astype(scale.dtype) * scale, flat), flat

    def _name(self, site: str) -> str:
        return self.rest.model.site_table.resolve(site)[0].name


def end_to_end_step(
    state: TrainState[Dictionary],
    knobs: Knobs,
    source: InModel,
    objective: EndToEnd,
    train: TrainConfig,
    frozen_decoder: bool = False,
) -> tuple[TrainState[Dictionary], dict[str, Array]]:
    """The state after one step on the source's contexts, and the scalars that `END_TO_END_METRICS` names."""
    clean = source.clean(state.step)
    dead = in_turn(state.since_fired >= train.dead_after, objective.codes.aux_candidates, state.step)
    coefficients = scheduled(state, knobs, objective.codes, train)

    def loss_of(dictionary, places, few):
        aims = objective if few is not None else dataclasses.replace(objective, codes=without_dead(objective.codes))
        return end_to_end_loss(dictionary, clean, source.rest, source.scale_y, dead, aims, coefficients, places, few)

    dictionary = with_k(state, knobs, train)
    total, parts, grads, fits = gradients(
        loss_of,
        dictionary,
        dictionary.choose(clean.x, clean.valid),
        bounded=bounded(dictionary),
        frozen_decoder=frozen_decoder,
        dead=(dead, objective.codes),
    )
    assert isinstance(parts, EndToEndLosses)
    sparsity = coefficients.sparsity
    state, metrics = descended(
        state, knobs, dictionary, grads, total, parts, clean.y, sparsity, fits, train, frozen_decoder, clean.valid
    )
    if train.resample_every and not frozen_decoder:
        state = resample(state, clean.x, clean.y, objective.codes, train, clean.valid)
    return state, metrics | {"kl": parts.kl, "downstream": parts.downstream}


def fit_end_to_end(
    model: Any,
    tokens: Int[Array | np.ndarray, "n pos"],
    config: DictionaryConfig,
    objective: EndToEnd,
    train: TrainConfig,
    *,
    site: str,
    layer: int | None = None,
    read_site: str | None = None,
    mask: Bool[Array | np.ndarray, "n pos"] | None = None,
    skip_positions: int = 1,
    key: Array,
    start: Dictionary | None = None,
    knobs: Knobs | None = None,
    progress: Report | None = None,
    frozen_decoder: bool = False,
    state: TrainState | None = None,
) -> tuple[Dictionary, History]:
    """Trains a dictionary for what the model predicts when its reconstruction is spliced in.

    The first positions, padding, and tokens with a norm over `train.massive_ratio` times the median stay as they are.

    Args:
      model: any model with sites whose leaves are arrays; a decoder with its dictionary on the residual stream runs the
        layers before it only once.
      tokens: contexts; `train.batch_size` of them make a step.
      config: the dictionary's shape.
      objective: the loss.
      train: the schedule.
      site, layer: the activation that is replaced.
      read_site: what a transcoder reads, in the same layer; None for `site`.
      mask: False at padding.
      skip_positions: first positions of every context that stay as they are.
      key: draws the start and the order of the contexts.
      start: a dictionary to go on from, such as one that was trained for reconstruction, in the units of the
        activations; None for a random one.
      knobs, progress, frozen_decoder: as in `fit`.
      state: where to go on from, as `progress` had it, with the same other arguments.

    Returns:
      The dictionary in the units of the activations, and for every compiled call the step it ended at and its mean
      metrics.

    Raises:
      InputError: tokens, widths or a start that do not fit, or a dictionary that is not of one site.
      SiteError: the model has no such site or layer.

    Example:
      `fit_end_to_end(model, tokens, config, EndToEnd(objective, local=0.1), TrainConfig(batch_size=8),
      site="resid_post", layer=8, key=jax.random.key(0), start=sae)`
    """
    check_combination(config, objective.codes)
    own = checked_knobs(knobs, config, objective.codes, train)
    read_site = site if read_site is None else read_site
    tokens = jnp.asarray(tokens)
    mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask)
    later: tuple[int, ...] = ()
    if objective.downstream:
        n_layers = model.site_table.size("layer")
        later = (
            tuple(range((-1 if layer is None else layer) + 1, n_layers))
            if objective.layers is None
            else objective.layers
        )
        if not later:
            raise InputError(f"layer {layer} is the last: no later stream to compare; set downstream=0")
    rest = Continuation(model, site, layer, later)
    _check(tokens, mask, config, train, transcoder=read_site != site, skip_positions=skip_positions)
    one, none = jnp.ones(()), jnp.asarray(jnp.inf)
    source = InModel(
        rest, tokens, mask, jnp.arange(len(tokens)), one, one, none, read_site, train.batch_size, skip_positions
    )
    x, y, limit = _sample(source, config, train)
    scale_x, scale_y = normalisation(x)[1], normalisation(y)[1]
    source = eqx.tree_at(lambda s: (s.scale_x, s.scale_y, s.limit), source, (scale_x, scale_y, limit))
    k_init, k_order = jax.random.split(key)
    if state is not None:
        current: TrainState = jax.tree.map(jnp.copy, state)
    elif start is None:
        options = {"key": k_init, "knobs": knobs, "frozen_decoder": frozen_decoder}
        current = start_from(x * scale_x, y * scale_y, config, objective.codes, train, **options)
    else:
        begin = _normalised(start, config, train, scale_x, scale_y)
        if counts_codes(begin) and (knobs is not None or train.k_start is not None):
            begin = with_places(begin, max(config.k, train.k_start or 0))
        current = init_state(begin, config, objective.codes, train, frozen_decoder=frozen_decoder)
    current, history = run_steps(
        current,
        source,
        k_order,
        own,
        objective,
        train,
        frozen_decoder,
        progress,
        one_step=end_to_end_step,
        names=END_TO_END_METRICS,
    )
    batches = last_pass(source, k_order, train, InModel.read)
    return finished(current, own, scale_x, scale_y if config.transcoder else None, batches), history_of(history)


def _sample(source: InModel, config: DictionaryConfig, train: TrainConfig) -> tuple[Array, Array, Array]:
    """What is read and what is replaced at usable tokens of the first batches, and the norm of massive tokens."""
    found = []
    for step in range(min(SAMPLE_BATCHES, source.tokens.shape[0] // source.batch_size)):
        _, _, read, value, used = eqx.filter_jit(InModel.activations)(source, jnp.int32(step))
        used = np.asarray(used)
        found.append(tuple(np.asarray(a, np.float32)[used] for a in (read, value)))
    x, y = (np.concatenate(parts) for parts in zip(*found, strict=True))
    for name, array, width in (("what is read", x, config.d_in), ("what is replaced", y, config.width_out)):
        if array.ndim != 2 or array.shape[1] != width:
            raise InputError(f"{name} has {array.shape[1:]} numbers per token, the config says {width}")
        if not np.isfinite(array).all():
            raise InputError(f"{name} is not finite (NaN or infinity) at some tokens")
    sizes = norms(jnp.asarray(x))
    limit = jnp.float32(jnp.inf) if train.massive_ratio is None else massive_limit(sizes, train.massive_ratio)
    kept = np.asarray(sizes <= limit)
    return jnp.asarray(x[kept]), jnp.asarray(y[kept]), limit


def _normalised(
    start: Dictionary, config: DictionaryConfig, train: TrainConfig, scale_x: Array, scale_y: Array
) -> Dictionary:
    """A dictionary in the units of the activations, in those of training."""
    found = (start.d_in, start.d_sae, start.d_out, start.centred)
    wanted = (config.d_in, config.d_sae, config.width_out, not config.transcoder)
    if found != wanted:
        raise InputError(f"start has (d_in, d_sae, d_out, centred) = {found}, the config says {wanted}")
    if start.token_norm is not None:
        raise InputError("start normalises every token; dictionaries are trained without a token norm")
    begin = fold_scale(start, 1 / scale_x, 1 / scale_y if config.transcoder else None)
    if train.decoder == "unit" and not jnp.allclose(jnp.linalg.norm(begin.w_dec, axis=1), 1, atol=1e-3):
        raise InputError("the rows of start's decoder have not norm 1; train with decoder='free'")
    return begin


def _check(
    tokens: Array, mask: Array, config: DictionaryConfig, train: TrainConfig, *, transcoder: bool, skip_positions: int
):
    if mask.shape != tokens.shape:
        raise InputError(f"the mask has shape {mask.shape}, the tokens {tokens.shape}; both are [context pos]")
    if len(tokens) < train.batch_size:
        raise InputError(f"{len(tokens)} contexts do not fill one batch of batch_size={train.batch_size} contexts")
    if not 0 <= skip_positions < tokens.shape[1]:
        raise InputError(f"skip_positions={skip_positions} leaves none of {tokens.shape[1]} positions")
    if not bool(mask[:, skip_positions:].any()):
        raise InputError("the mask leaves no token whose activation could be replaced")
    if config.n_sites > 1:
        raise InputError("a crosscoder has several sites; end to end, a dictionary replaces the activation of one")
    if config.transcoder != transcoder:
        raise InputError("a transcoder needs a read_site other than its site, an autoencoder has one site")
