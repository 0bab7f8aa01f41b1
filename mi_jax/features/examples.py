"""Contexts from the whole range of a latent's activations, and the tokens that it promotes and suppresses."""

import dataclasses

import numpy as np
from jaxtyping import Float

from mi_jax.core.errors import InputError
from mi_jax.decomposition.dictionary import Dictionary
from mi_jax.features.codes import Codes
from mi_jax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Example:
    """A window of text around one activation; `focus` is its index in the window."""

    tokens: tuple[int, ...]
    activations: tuple[float, ...]
    focus: int


@dataclasses.dataclass(frozen=True)
class Decile:
    """Examples whose activation lies in one tenth of the positive activations; 10 holds the strongest."""

    decile: int
    low: float
    high: float
    examples: tuple[Example, ...]


def deciles(
    activations: Float[np.ndarray, "context pos"], codes: Codes, *, per_decile: int, window: int, seed: int
) -> list[Decile]:
    """Random examples from every decile of the positive activations, the weakest as well as the strongest.

    Args:
      activations: of one latent, from `codes`.
      window: tokens shown on either side.
    """
    places = np.argwhere(activations > 0)
    strength = activations[places[:, 0], places[:, 1]]
    order = np.argsort(strength, kind="stable")
    rng = np.random.default_rng(seed)
    out = []
    for d, part in enumerate(np.array_split(order, 10), 1):
        if not len(part):
            continue
        chosen = rng.choice(part, min(per_decile, len(part)), replace=False)
        examples = tuple(_example(activations, codes, int(c), int(p), window) for c, p in places[chosen])
        out.append(Decile(d, float(strength[part[0]]), float(strength[part[-1]]), examples))
    return out


def _example(activations: np.ndarray, codes: Codes, context: int, pos: int, window: int) -> Example:
    start, stop = max(0, pos - window), min(codes.tokens.shape[1], pos + window + 1)
    return Example(
        tuple(codes.tokens[context, start:stop].tolist()),
        tuple(np.round(activations[context, start:stop], 3).tolist()),
        int(pos - start),
    )


def token_effects(model: Decoder, sae: Dictionary, latent: int, *, n: int) -> tuple[list, list]:
    """The n tokens whose logits a latent's direction raises most, and the n it lowers most, as (token, effect).

    The direct effect: the decoder row through the final norm's weight and the unembedding, relative to the mean over
    the vocabulary, for a stream of unit root mean square. What later layers make of it is not in it.

    Raises:
      InputError: a model whose stream does not go through one norm to the logits of tokens, a dictionary of another
        width, or a latent that it does not have.
    """
    _check_direct(model, sae, latent)
    direction = sae.w_dec[latent]
    norm = model.final_norm
    if norm is not None and norm.weight is not None:
        direction = direction * (norm.weight + norm.offset)
    logits = np.asarray(model.unembedding @ direction)
    logits = logits - logits.mean()
    order = np.argsort(logits)
    return (
        [(int(i), float(logits[i])) for i in order[::-1][:n]],
        [(int(i), float(logits[i])) for i in order[:n]],
    )


def _check_direct(model: Decoder, sae: Dictionary, latent: int) -> None:
    config = model.config
    if config.head == "none":
        raise InputError(f"{config.name} is an encoder without an unembedding: a latent has no effect on tokens there")
    if config.patches is not None:
        raise InputError(
            f"{config.name} reads images: its outputs are classes, not tokens; look at what a latent does to them with "
            "mi.add('resid_post', direction, layer=…)"
        )
    if config.norms == "post":
        raise InputError(
            f"{config.name} normalises the stream itself after every addition, so a latent's direction reaches the "
            "logits through all norms after its layer: measure its effect with mi.add('resid_post', direction, layer=…)"
        )
    d_sae, d_model = sae.w_dec.shape
    if d_model != config.d_model:
        raise InputError(
            f"the dictionary writes to {d_model} dimensions; the stream of {config.name} has {config.d_model}"
        )
    if not 0 <= latent < d_sae:
        raise InputError(f"the dictionary has {d_sae} latents (0–{d_sae - 1}); got {latent}")
