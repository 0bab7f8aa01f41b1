"""The known induction heads of SmolLM2, ablated: together, one at a time, and beside heads that were chosen alike.

Induction heads are those that attend the most to the token after the first occurrence of the current one. The null
chooses heads by the same rule for another place: those that attend the most to the token two after it, to the token
just before, and so on. Some of these matter as well, as random heads of the same layers hardly do.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import mi_jax as mi
from experiments.estimates import mean
from mi_jax.core.errors import InputError
from mi_jax.data.tasks import repeated_tokens
from mi_jax.features import next_token_nll
from mi_jax.models import Decoder, DecoderConfig, load_gguf, open_gguf, smollm2_path
from mi_jax.run import Progress

# ids below are the special tokens of SmolLM2
_FIRST_ORDINARY_TOKEN = 17
INDUCTION_SHIFT = 1


def check_heads(heads: str, shape: DecoderConfig) -> list[tuple[int, int]]:
    """The heads named by "LAYER.HEAD,…".

    Raises:
      InputError: not of that form, or a head that the model does not have.
    """
    try:
        found = [(int(layer), int(head)) for layer, head in (name.split(".") for name in heads.split(","))]
    except ValueError:
        raise InputError(f"config.heads={heads!r}: give heads as LAYER.HEAD,LAYER.HEAD, such as 18.6,17.4") from None
    for layer, head in found:
        if not (0 <= layer < shape.n_layers and 0 <= head < shape.n_heads):
            raise InputError(
                f"config.heads: {shape.name} has layers 0–{shape.n_layers - 1} and heads 0–{shape.n_heads - 1}; "
                f"got {layer}.{head}"
            )
    return found


def ablation(config: Any, progress: Progress) -> dict[str, Any]:
    """What mean ablation of the heads costs where tokens repeat, where they do not, and for other heads."""
    model = load_gguf(open_gguf(config.gguf or smollm2_path()))
    known = check_heads(config.heads, model.config)
    d_vocab, half = model.config.d_vocab, config.half

    def sequences(n: int, half: int, repeat: bool):
        return repeated_tokens(n, half, d_vocab=d_vocab, seed=config.seed, first=_FIRST_ORDINARY_TOKEN, repeat=repeat)

    repeated, unrepeated = sequences(config.sequences, half, True), sequences(config.sequences, half, False)
    means = _means(model, repeated)
    without = mi.jit(_losses)
    results: dict[str, Any] = {"smollm2.heads": config.heads, "smollm2.sequences": config.sequences}

    clean = np.asarray(without(model, repeated, means, jnp.zeros((0, 2), jnp.int32)))
    ablated = np.asarray(without(model, repeated, means, jnp.asarray(known, jnp.int32)))
    # the first token of the second half cannot be known, so prediction counts from the next on
    results |= mean("smollm2.loss_repeated", clean[:, half:].mean(1))
    results |= mean("smollm2.loss_repeated_ablated", ablated[:, half:].mean(1))
    effect = (ablated - clean)[:, half:].mean(1)
    results |= mean("smollm2.ablation_effect", effect)

    # chosen on other sequences than those on which they are ablated
    others = repeated_tokens(
        config.sequences, half, d_vocab=d_vocab, seed=config.seed + 1, first=_FIRST_ORDINARY_TOKEN, repeat=True
    )
    attention = np.asarray(mi.jit(_attention_by_shift)(model, others))
    by_rule = _strongest(attention[INDUCTION_SHIFT], len(known))
    results["smollm2.heads_by_rule"] = ",".join(f"{layer}.{head}" for layer, head in by_rule)
    results["smollm2.heads_in_common"] = len(set(by_rule) & set(known))

    shifts = [shift for shift in range(len(attention)) if shift != INDUCTION_SHIFT]
    drawn = np.random.default_rng(config.seed).permutation(shifts)[: config.random_draws]
    nulls = []
    for draw, shift in enumerate(drawn):
        progress(0.1 + 0.4 * draw / len(drawn), f"heads of another shift, {draw + 1} of {len(drawn)}")
        chosen = jnp.asarray(_strongest(attention[shift], len(known), without=known), jnp.int32)
        nulls.append((np.asarray(without(model, repeated, means, chosen)) - clean)[:, half:].mean())
    results["smollm2.null_draws"] = len(nulls)
    results["smollm2.ablation_effect_null"] = float(np.mean(nulls))
    results["smollm2.ablation_effect_null_largest"] = float(np.max(nulls))
    results["smollm2.ablation_p_value"] = float((1 + np.sum(nulls >= effect.mean())) / (1 + len(nulls)))

    progress(0.5, "where nothing repeats")
    none = np.asarray(without(model, unrepeated, means, jnp.zeros((0, 2), jnp.int32)))
    other = np.asarray(without(model, unrepeated, means, jnp.asarray(known, jnp.int32)))
    results |= mean("smollm2.unrepeated_effect", (other - none)[:, half:].mean(1))

    progress(0.6, "all heads, one at a time")
    n, cut = config.sweep_sequences, config.sweep_half
    tokens = sequences(n, cut, True)

    def metric(logits):
        return next_token_nll(logits, tokens)[:, cut:].mean()

    def report(done: int, total: int) -> None:
        progress(0.6 + 0.4 * done / total, f"heads of {done} of {total} layers")

    edit = mi.ablate("attn.z", baseline=_means(model, tokens), layer=mi.each, head=mi.each)
    sweep = mi.jit(mi.sweep(model, edit, metric, progress=report))(tokens)
    single = np.asarray(sweep) - float(metric(mi.jit(model)(tokens)))
    for layer, head in known:
        results[f"smollm2.sweep_effect_{layer}_{head}"] = float(single[layer, head])
        results[f"smollm2.sweep_rank_{layer}_{head}"] = int((single > single[layer, head]).sum()) + 1
    others = [place for place in np.ndindex(*single.shape) if place not in known and place[0] in dict(known)]
    results["smollm2.sweep_effect_mean"] = float(np.mean([single[place] for place in known]))
    results["smollm2.sweep_effect_mean_null"] = float(np.mean([single[place] for place in others]))
    return results | {"smollm2.sweep_heads": single.size}


def _means(model: Decoder, tokens: Int[Array, "batch pos"]) -> Float[Array, "layer batch pos head d_head"]:
    """Every head's mean over sequences and positions, in the shape of the site."""
    z = mi.jit(mi.capture(model, "attn.z"))(tokens, output=False)[1]["attn.z"]
    return jnp.broadcast_to(z.mean((1, 2), keepdims=True), (z.shape[0], 1, 1, *z.shape[3:]))


def _losses(
    model: Decoder, tokens: Int[Array, "batch pos"], means: Float[Array, "layer one one head d_head"], heads: Array
) -> Float[Array, "batch pos_minus_1"]:
    """Loss of every next token with some heads, rows `(layer, head)`, at their means."""
    chosen = jnp.zeros((model.config.n_layers, 1, 1, model.config.n_heads, 1), bool)
    chosen = chosen.at[heads[:, 0], 0, 0, heads[:, 1], 0].set(True)
    scale = mi.scale("attn.z", jnp.where(chosen, 0.0, 1.0))
    shift = mi.add("attn.z", jnp.where(chosen, means, 0.0))
    return next_token_nll(mi.intervene(model, scale, shift)(tokens), tokens)


def _attention_by_shift(model: Decoder, tokens: Int[Array, "batch pos"]) -> Float[Array, "shift layer head"]:
    """How much every head attends, from the i-th repeated token, to the token `i + shift` of the first half, and on.

    Shift 0 is the token's first occurrence, 1 the one after it (which induction copies), `half − 1` the token just
    before, `half` itself. Means over sequences and repeated tokens.
    """
    half = tokens.shape[1] // 2
    pattern = mi.capture(model, "attn.pattern")(tokens, output=False)[1]["attn.pattern"][:, :, :, half:]
    from_first = jnp.arange(half, dtype=jnp.int32)
    shifts = jnp.arange(half + 1, dtype=jnp.int32)

    def of(shift: Int[Array, ""]) -> Float[Array, "layer head"]:
        return pattern[:, :, :, from_first, from_first + shift].mean((1, 3))

    return jax.lax.map(of, shifts)


def _strongest(
    attention: Float[np.ndarray, "layer head"], n: int, without: Sequence[tuple[int, int]] = ()
) -> list[tuple[int, int]]:
    """The n heads with the most attention, some left out."""
    order = (np.unravel_index(i, attention.shape) for i in np.argsort(-attention, axis=None, kind="stable"))
    places = ((int(layer), int(head)) for layer, head in order)
    return list(itertools.islice((place for place in places if place not in without), n))
