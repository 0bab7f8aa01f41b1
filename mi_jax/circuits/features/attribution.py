"""The attribution graph of a prompt: one backward pass through the frozen model per target, many at a time."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.features.frozen import Additions, Streams
from mi_jax.circuits.features.graph import AttributionGraph, influence_of, normalised
from mi_jax.circuits.features.replacement import ReplacementModel, check_prompt, no_additions, streams
from mi_jax.core.errors import InputError

# chosen anew, by influence, after this many batches of features
_BATCHES_PER_CHOICE = 4


Numbers = Array | np.ndarray


class Run(eqx.Module):
    """A prompt's run.

    Attributes:
      logits: at the last position.
      codes, pre_activations: of every layer.
      errors: what the reconstructions miss of the MLP outputs.
      final: the last position of the stream that is unembedded.
      from_sources: the part of the streams that comes from the embedding, the codes and the errors, not from biases.
    """

    logits: Float[Numbers, " d_vocab"]
    codes: tuple[Float[Numbers, "pos _"], ...]
    pre_activations: tuple[Float[Numbers, "pos _"], ...]
    errors: Float[Array, "layer pos d_model"]
    final: Float[Numbers, " d_model"]
    from_sources: Streams


class Targets(eqx.Module):
    """Nodes as linear functions of the streams: a vector at a position of what a layer reads.

    Layer n_layers is the stream that is unembedded.
    """

    layer: Int[Numbers, " target"]
    pos: Int[Numbers, " target"]
    vector: Float[Numbers, "target d_model"]


class Features(eqx.Module):
    """Active features, padded; empty places have the activation 0."""

    layer: Int[Array, " feature"]
    pos: Int[Array, " feature"]
    latent: Int[Array, " feature"]
    activation: Float[Array, " feature"]


def attribution_graph(
    replacement: ReplacementModel,
    tokens: Int[Array, " pos"],
    *,
    max_features: int = 4096,
    max_logits: int = 10,
    logit_mass: float = 0.95,
    batch_size: int = 16,
) -> AttributionGraph:
    """Direct effects of tokens, features and errors on features and on the logits at the last position.

    The effect of a source on a target is exact in the model with its attention patterns and norm scales held: it is
    what the source writes, carried along by the stream, attention and skips but by no other feature, times the
    target's encoder row or unembedding row (minus the mean of all rows). Cost: one backward pass per target; memory:
    `batch_size` gradients of the stream of all layers, and a row of the decoder per active feature.

    Args:
      tokens: of one prompt.
      max_features: where more are active, those with the largest influence on the logits through the features
        already in the graph.
      max_logits: at most this many of the likeliest tokens are nodes.
      logit_mass: the fewest of them whose probabilities add up to this.
      batch_size: targets per backward pass.

    Raises:
      InputError: no feature is active, several prompts, or numbers out of range.
    """
    check_prompt(replacement, tokens)
    _check_numbers(replacement, max_features, max_logits, logit_mass, batch_size)
    run = _run(replacement, tokens)
    features = _active(run)
    n_layers, n_pos, n_active = replacement.n_layers, tokens.shape[0], int((np.asarray(features.activation) != 0).sum())
    encoders = jax.tree.map(np.asarray, _encoder_rows(replacement, features))
    logits, chosen, probabilities = _logit_targets(replacement, run, n_pos, max_logits, logit_mass)

    capacity, n_between = len(encoders.layer), (n_layers + 1) * n_pos
    real = np.r_[np.arange(n_active), np.arange(capacity, capacity + n_between)]
    size = min(_BATCHES_PER_CHOICE * batch_size, capacity)

    def rows(targets: Targets) -> np.ndarray:
        found = [
            _rows(replacement, tokens, run.errors, features, _padded(targets, i, size), batch_size)
            for i in range(0, len(targets.layer), size)
        ]
        return np.concatenate([np.asarray(block) for block in found])[: len(targets.layer), real]

    n_sources = n_active + n_between
    adjacency = np.zeros((n_sources + len(chosen),) * 2, np.float32)
    adjacency[n_sources:, :n_sources] = rows(logits)
    weights = np.r_[np.zeros(n_sources), probabilities]
    in_graph = np.zeros(n_active, bool)
    while (left := min(max_features, n_active) - in_graph.sum()) > 0:
        if max_features >= n_active:
            new = np.arange(n_active)
        else:
            influence = influence_of(normalised(adjacency), weights)[:n_active]
            new = np.argsort(np.where(in_graph, np.inf, -influence), kind="stable")[: min(size, left)]
        adjacency[new, :n_sources] = rows(_at(encoders, new))
        in_graph[new] = True

    order = np.flatnonzero(in_graph)
    kept = np.r_[order, np.arange(n_active, len(adjacency))]
    listed = _at(encoders, order)
    places = np.stack([np.asarray(a)[order] for a in (features.layer, features.pos, features.latent)], 1)
    h = np.array([run.pre_activations[layer][pos, latent] for layer, pos, latent in places], np.float32)
    of_logits, rest = _logit_values(replacement, run, logits, chosen)
    between = np.zeros(n_between, np.float32)
    return AttributionGraph(
        tokens=np.asarray(tokens),
        features=places,
        activations=np.asarray(features.activation)[order],
        logit_tokens=chosen,
        logit_probabilities=probabilities,
        adjacency=adjacency[np.ix_(kept, kept)],
        values=np.r_[h, between, of_logits],
        bias=np.r_[h - (run.from_sources.reads[listed.layer, listed.pos] * listed.vector).sum(1), between, rest],
        n_layers=n_layers,
        n_active=n_active,
        name=replacement.model.config.name,
    )


def _run(r: ReplacementModel, tokens: Array) -> Run:
    """The run, its arrays on the host but for the errors."""
    run = _compiled_run(r, tokens)
    return eqx.tree_at(
        lambda a: (a.logits, a.codes, a.pre_activations, a.final, a.from_sources),
        run,
        replace_fn=lambda tree: jax.tree.map(np.asarray, tree),
    )


@eqx.filter_jit
def _compiled_run(r: ReplacementModel, tokens: Array) -> Run:
    zeros = no_additions(r, tokens.shape[0])
    (out, plain), linear = jax.linearize(lambda added: streams(r, tokens, added), zeros)
    codes = tuple(r.encode(layer, out.reads[layer]) for layer in range(r.n_layers))
    h = tuple(r.pre_activations(layer, out.reads[layer]) for layer in range(r.n_layers))
    written = r.written(codes)
    errors = plain.mlp_out - written - r.constants(out.reads)
    from_sources, _ = linear(Additions(plain.embed, errors + written))
    logits = r.model(tokens[None], output_pos=jnp.array([tokens.shape[0] - 1], jnp.int32))
    return Run(logits[0, 0], codes, h, errors, out.final[-1], from_sources)


def _active(run: Run) -> Features:
    """The active features in order of layer, position and latent, padded to a size that few prompts differ in."""
    parts = []
    for layer, codes in enumerate(run.codes):
        pos, latent = np.nonzero(codes)
        parts.append((np.full(len(pos), layer), pos, latent, np.asarray(codes)[pos, latent]))
    layer, pos, latent, activation = (np.concatenate(column) for column in zip(*parts, strict=True))
    if not len(layer):
        raise InputError(
            "no feature of any layer is active on this prompt, so there is nothing between its tokens and its logits; "
            "are the dictionaries those of this model and site (`reads`, `normalized`)?"
        )
    padding = (0, (1 << max(4, (len(layer) - 1).bit_length())) - len(layer))
    layer, pos, latent = (jnp.asarray(np.pad(a, padding), jnp.int32) for a in (layer, pos, latent))
    return Features(layer, pos, latent, jnp.asarray(np.pad(activation, padding)))


def _logit_targets(
    r: ReplacementModel, run: Run, n_pos: int, most: int, mass: float
) -> tuple[Targets, np.ndarray, np.ndarray]:
    """The likeliest tokens as targets, their numbers and their probabilities."""
    logits = np.asarray(run.logits, np.float64)
    probabilities = np.exp(logits - logits.max())
    probabilities = probabilities / probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")[:most]
    n = int(np.searchsorted(np.cumsum(probabilities[order]), mass)) + 1
    chosen = order[:n].astype(np.int32)
    rows = r.model.unembedding
    directions = np.asarray(rows[chosen] - rows.mean(0)[None, :])
    layer, pos = (np.full(len(chosen), value, np.int32) for value in (r.n_layers, n_pos - 1))
    return Targets(layer, pos, directions), chosen, probabilities[chosen]


def _logit_values(
    r: ReplacementModel, run: Run, logits: Targets, chosen: np.ndarray
) -> tuple[Float[np.ndarray, " logit"], Float[np.ndarray, " logit"]]:
    """The logits (before a soft cap) minus their mean, and what no source adds to them."""
    bias = np.zeros(r.model.config.d_vocab, np.float32)
    if r.model.unembed_bias is not None:
        bias = np.asarray(r.model.unembed_bias)
    offset = bias[chosen] - bias.mean()
    return logits.vector @ run.final + offset, logits.vector @ (run.final - run.from_sources.final[-1]) + offset


@eqx.filter_jit
def _encoder_rows(r: ReplacementModel, f: Features) -> Targets:
    vectors = jnp.zeros((f.layer.shape[0], r.model.config.d_model), f.activation.dtype)
    for layer in range(r.n_layers):
        vectors = _where(f.layer == layer, r.encoder(layer).at[f.latent].get(mode="clip"), vectors)
    return Targets(f.layer, f.pos, vectors)


def _at(targets: Targets, places: np.ndarray) -> Targets:
    return jax.tree.map(lambda a: a[places], targets)


def _padded(targets: Targets, start: int, size: int) -> Targets:
    """A block of `size` targets; those beyond the end are zero."""
    block = jax.tree.map(lambda a: a[start : start + size], targets)
    missing = size - len(block.layer)
    return jax.tree.map(lambda a: np.pad(a, ((0, missing), *((0, 0),) * (a.ndim - 1))), block)


@eqx.filter_jit
def _rows(
    r: ReplacementModel, tokens: Array, errors: Array, features: Features, targets: Targets, batch_size: int
) -> Float[Array, "target source"]:
    """What every source adds to every target; sources in the order of the graph."""
    zeros = no_additions(r, tokens.shape[0])
    out, pullback, plain = jax.vjp(lambda added: streams(r, tokens, added), zeros, has_aux=True)
    written = _written(r, features)

    def row(target):
        of_layer = jnp.arange(r.n_layers + 1) == target.layer
        at = of_layer[:, None] & (jnp.arange(tokens.shape[0]) == target.pos)[None, :]
        placed = at[:, :, None].astype(out.final.dtype) * target.vector[None, None, :].astype(out.final.dtype)
        (gradient,) = pullback(Streams(placed[:-1], placed[-1]))
        of_features = jnp.zeros_like(features.activation)
        for layer, vectors in written:
            at_source = gradient.mlp_out[layer, features.pos]
            of_features = of_features + (at_source * vectors).sum(-1)
        return jnp.concatenate(
            [
                of_features,
                (gradient.mlp_out * errors).sum(-1).reshape(-1),
                (gradient.embed * plain.embed).sum(-1),
            ]
        )

    return jax.lax.map(row, targets, batch_size=batch_size)


def _written(r: ReplacementModel, f: Features) -> list[tuple[Array, Float[Array, "feature d_model"]]]:
    """What every feature writes to the MLP output of a layer, for a few layers: its own, or each in turn."""
    empty = jnp.zeros((f.layer.shape[0], r.model.config.d_model), f.activation.dtype)

    def add(rows, source, target):
        found = r.decoder(source, target).at[f.latent].get(mode="clip") * f.activation[:, None]
        return _where(f.layer == source, found, rows)

    if all(list(r.targets(layer)) == [layer] for layer in range(r.n_layers)):
        own = functools.reduce(lambda rows, layer: add(rows, layer, layer), range(r.n_layers), empty)
        return [(f.layer, own)]
    out = []
    for target in range(r.n_layers):
        rows = functools.reduce(lambda rows, source, to=target: add(rows, source, to), range(target + 1), empty)
        out.append((jnp.full_like(f.layer, target), rows))
    return out


def _where(chosen: Bool[Array, " row"], new: Float[Array, "row width"], old: Float[Array, "row width"]) -> Array:
    return jnp.where(jnp.broadcast_to(chosen[:, None], old.shape), new, old)


def _check_numbers(r: ReplacementModel, max_features: int, max_logits: int, mass: float, batch_size: int) -> None:
    for name, value in (("max_features", max_features), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if not 1 <= max_logits <= r.model.config.d_vocab or not 0 < mass <= 1:
        raise InputError(
            f"max_logits is between 1 and d_vocab={r.model.config.d_vocab}, logit_mass in (0, 1]; "
            f"got {max_logits} and {mass}"
        )
