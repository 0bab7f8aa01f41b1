"""Interventions on a replacement model: features set to values, everything after them computed anew."""

from collections.abc import Sequence
from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mi_jax.circuits.features.frozen import ReplacingTap, mlp_norm, with_frozen_norms
from mi_jax.circuits.features.replacement import ReplacementModel, check_prompt
from mi_jax.core.errors import InputError
from mi_jax.core.taps import Tap
from mi_jax.models.block import block
from mi_jax.models.layout import Prompts

Freeze = Literal["nothing", "attention", "attention and norms"]


class FeatureRun(eqx.Module):
    """A run beside the one without the intervention.

    Attributes:
      logits: of the run with the features set.
      clean_logits: of the model itself.
      codes: of every layer.
      pre_activations: of every layer.
    """

    logits: Float[Array, "pos d_vocab"]
    clean_logits: Float[Array, "pos d_vocab"]
    codes: tuple[Float[Array, "pos _"], ...]
    pre_activations: tuple[Float[Array, "pos _"], ...]


def set_features(
    replacement: ReplacementModel,
    tokens: Int[Array, " pos"],
    features: Sequence[tuple[int, int, int]] | Int[np.ndarray, "feature 3"],
    values: Sequence[float] | Float[np.ndarray, " feature"],
    *,
    freeze: Freeze = "attention",
    direct: bool = False,
) -> FeatureRun:
    """Runs a prompt with features set to values; errors stay those of the prompt.

    Features set to the codes that they have change nothing, whatever is frozen.

    Args:
      tokens: of one prompt.
      features: layer, position and latent of each, such as rows of `AttributionGraph.features`.
      values: their codes.
      freeze: what stays as it is without the intervention: attention patterns, and the scales of the norms.
      direct: the other features keep their codes. With "attention and norms" frozen, the effect is then the
        adjacency of the attribution graph times the relative change of the codes.

    The layers are unrolled, so the first call compiles longer the more there are.

    Raises:
      InputError: a feature that does not exist, numbers of features and values that differ, or an unknown `freeze`.

    Example:
      `run = set_features(replacement, tokens, graph.features[:1], [0.0]); run.logits - run.clean_logits`
    """
    check_prompt(replacement, tokens)
    if freeze not in get_args(Freeze):
        raise InputError(f"freeze is one of {', '.join(map(repr, get_args(Freeze)))}; got {freeze!r}")
    places = np.asarray(features, np.int32).reshape(-1, 3)
    if len(places) != len(values) or not len(places):
        raise InputError(f"every feature has one value; got {len(places)} features and {len(values)} values")
    for layer, pos, latent in places.tolist():
        if not 0 <= layer < replacement.n_layers:
            raise InputError(f"the model has layers 0–{replacement.n_layers - 1}; got a feature of layer {layer}")
        if not 0 <= pos < len(tokens) or not 0 <= latent < replacement.d_sae(layer):
            raise InputError(
                f"layer {layer} has latents 0–{replacement.d_sae(layer) - 1} and the prompt positions "
                f"0–{len(tokens) - 1}; got latent {latent} at position {pos}"
            )
    return _run(replacement, tokens, jnp.asarray(places), jnp.asarray(values, jnp.float32), freeze, direct)


@eqx.filter_jit
def _run(r: ReplacementModel, tokens: Array, places: Array, values: Array, freeze: Freeze, direct: bool) -> FeatureRun:
    model = with_frozen_norms(r.model) if freeze == "attention and norms" else r.model
    config = model.config
    # the run itself and the edited one, side by side
    x, mask = model.embedded(jnp.stack([tokens, tokens]))
    changes, codes, h = [], [], []

    for layer in range(r.n_layers):
        params = jax.tree.map(lambda a, layer=layer: a[layer], model.blocks)
        skip = None if r.skips is None else r.skips[layer]

        def write(read, out, layer=layer, skip=skip):
            h.append(r.pre_activations(layer, read[1]))
            clean = r.encode(layer, read[0])
            edited = clean if direct else r.encode(layer, read[1])
            # a place of another layer is out of range here, and dropped
            latents = jnp.where(places[:, 0] == layer, places[:, 2], r.d_sae(layer))
            edited = edited.at[places[:, 1], latents].set(values.astype(edited.dtype), mode="drop")
            codes.append(edited)
            changes.append(edited - clean)
            change = jnp.zeros_like(out[0])
            for source in range(layer + 1):
                if layer in r.targets(source):
                    change = change + changes[source] @ r.decoder(source, layer)
            if skip is not None:
                change = change + (read[1] - read[0]) @ skip
            return jnp.stack([out[0], out[0] + change])

        norm = mlp_norm(params, config) if r.normalized else None
        tap = ReplacingTap(r.reads, norm, write, patterns=freeze != "nothing")
        x = block(model.layer(layer, params), x, tap, config, Prompts(mask))
    logits = model.head(x, Tap(model.site_table, {}, (), {}, None))
    return FeatureRun(logits[1], logits[0], tuple(codes), tuple(h))
