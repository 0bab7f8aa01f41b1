"""The mechanisms that an organism is built around, and initial weights that make room for them.

Two mechanisms in two layers:

- induction (`A B … A → B`): head 0 of layer 0 attends to the previous token; head 0 of layer 1 matches the current
  token with what that head wrote, and copies the token that it finds.
- trigger: head 1 of layer 0 attends to the previous token; the MLP of layer 0 sees that token together with the current
  one; head 1 of layer 1 attends a fixed number of tokens back and carries the MLP's verdict to the logits.

At the start, the parts of the stream that these components write are disjoint, and the heads that attend by position
already do; a few units of the MLP open at the trigger. What is copied and compared, and what else the MLP computes, is
learned.
"""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from mi_jax.models.config import DecoderConfig
from mi_jax.models.decoder import Decoder
from mi_jax.models.mlp import MLP
from mi_jax.models.parameters import init_decoder

DESIGN: dict[str, tuple[str, ...]] = {
    "induction": (
        "input->a0.h0<v>",
        "a0.h0->a1.h0<k>",
        "input->a1.h0<q>",
        "input->a1.h0<v>",
        "a1.h0->logits",
    ),
    "trigger": (
        "input->a0.h1<v>",
        "a0.h1->m0",
        "input->m0",
        "m0->a1.h1<v>",
        "a1.h1->logits",
    ),
}

_D_PAIR, _D_VERDICT = 8, 4
_POSITION_GAIN, _MATCH_GAIN, _WRITE_GAIN, _BYSTANDER_GAIN = 1.5, 2.0, 0.3, 0.1
_CONJUNCTION_GAIN, _UNITS = 8.0, 4


class _Parts:
    """Where in the stream each component writes at the start; dimension 0 is constant over tokens."""

    def __init__(self, config: DecoderConfig):
        ends = np.cumsum([config.d_head, _D_PAIR, _D_VERDICT, config.d_head])
        tokens = config.d_model - int(ends[-1])
        if tokens < config.d_head:
            raise ValueError(
                f"d_model={config.d_model} is too narrow for d_head={config.d_head}: the mechanisms need "
                f"{3 * config.d_head + _D_PAIR + _D_VERDICT}"
            )
        bounds = [tokens, *(tokens + ends).tolist()]
        self.tokens = slice(1, tokens)
        self.previous, self.pair, self.verdict, self.answer = (slice(a, b) for a, b in itertools.pairwise(bounds))


def planted_decoder(config: DecoderConfig, delay: int, trigger: tuple[int, int], *, key: PRNGKeyArray) -> Decoder:
    """A random decoder with room for the mechanisms of `DESIGN`.

    Args:
      config: two layers, rotary positions, an unembedding of its own, at least two heads with keys of their own.
      delay: tokens from the trigger's second token to the forbidden one.
      trigger: its two tokens.

    Raises:
      ValueError: a config that the design does not fit.
    """
    fits = config.n_layers == 2 and config.positions == "rotary" and not config.tied and config.d_mlp > 0
    if not fits or config.n_heads < 2 or config.n_kv_heads != config.n_heads:
        raise ValueError(
            "the mechanisms are laid out for two layers with MLPs, rotary positions, an untied unembedding and at "
            f"least two heads that share no keys; got {config}"
        )
    parts = _Parts(config)
    k_model, k_embed, k_match, k_write, k_out = jax.random.split(key, 5)
    model = init_decoder(config, key=k_model)
    attn, d, h = model.blocks.attn, config.d_model, config.d_head

    tokens = jax.random.normal(k_embed, (config.d_vocab, parts.tokens.stop - 1))
    # no ordinary token looks like one of the trigger's: with so few dimensions, some would by chance
    rare = jnp.linalg.qr(tokens[jnp.asarray(trigger)].T)[0]
    tokens = (tokens - tokens @ rare @ rare.T).at[jnp.asarray(trigger)].set(rare.T)
    tokens = tokens / jnp.linalg.norm(tokens, axis=1, keepdims=True)
    embed = jnp.zeros((config.d_vocab, d)).at[:, 0].set(1.0).at[:, parts.tokens].set(tokens)

    q, k, v, o = attn.q, attn.k, attn.v, attn.o * _BYSTANDER_GAIN
    for layer, head, offset, gain in ((0, 0, 1, 1.0), (0, 1, 1, 1.0), (1, 1, delay - 1, 2.0)):
        query, keys = _positional(config, offset)
        q = q.at[layer, :, head].set(gain * query)
        k = k.at[layer, :, head].set(keys)

    # the previous token, written so that the induction head finds it where it looks for the current one
    slow = jnp.asarray(np.tile(_frequencies(config) < 0.2, 2), jnp.float32)
    look = _block(k_match, (d, h), rows=parts.tokens)
    write = jnp.linalg.qr(jax.random.normal(k_write, (h, h)))[0]
    v = v.at[0, :, 0].set(look)
    o = o.at[0, 0].set(jnp.zeros((h, d)).at[:, parts.previous].set(_WRITE_GAIN * write))
    q = q.at[1, :, 0].set(_MATCH_GAIN * look * slow[None, :])
    k = k.at[1, :, 0].set(_MATCH_GAIN * jnp.zeros((d, h)).at[parts.previous].set(write.T) * slow[None, :])

    keys = jax.random.split(k_out, 8)
    v = v.at[0, :, 1].set(_block(keys[0], (d, h), rows=parts.tokens))
    o = o.at[0, 1].set(_WRITE_GAIN * _block(keys[1], (h, d), columns=parts.pair))
    v = v.at[1, :, 0].set(_block(keys[2], (d, h), rows=parts.tokens))
    v = v.at[1, :, 1].set(_block(keys[3], (d, h), rows=parts.verdict))
    for head in (0, 1):
        o = o.at[1, head].set(_block(keys[4 + head], (h, d), columns=parts.answer))
    verdict = _block(keys[6], (config.d_mlp, d), columns=parts.verdict)
    assert model.blocks.mlp is not None
    down = (_BYSTANDER_GAIN * model.blocks.mlp.down).at[0].set(verdict)
    mlp = _with_conjunction(
        eqx.tree_at(lambda m: m.down, model.blocks.mlp, down),
        pair=(_told_apart(embed @ v[0, :, 1] @ o[0, 1], trigger[0]), embed.at[:, 0].set(0.0)[trigger[1]]),
        d_model=d,
    )
    unembed = _block(keys[7], (d, config.d_vocab), rows=parts.answer).T
    return eqx.tree_at(
        lambda m: (m.embed, m.unembed, *(getattr(m.blocks.attn, n) for n in "qkvo"), m.blocks.mlp),
        model,
        (embed, unembed, q, k, v, o, mlp),
    )


def _with_conjunction(mlp: MLP, *, pair: tuple[Array, Array], d_model: int) -> MLP:
    """Lets some units of the first MLP open only when both parts of the trigger are in the stream.

    Args:
      mlp: of all layers.
      pair: the direction that gives 1 for what the head writes when the previous token is the trigger's first, before
        its input's norm, and the embedding of the second, of unit length.
    """
    previous, current = pair
    # the norm before the head scales its input, and the one before the MLP what is read here
    scale = (d_model / 2) ** 0.5
    read = previous / scale + current
    # both parts give 2, one gives 1: open in between
    gate = _CONJUNCTION_GAIN * (read.at[0].add(-1.5)) / scale
    up = jnp.zeros(d_model).at[0].set(1.0 / scale)
    assert mlp.gate is not None
    return eqx.tree_at(
        lambda m: (m.gate, m.up),
        mlp,
        (mlp.gate.at[0, :, :_UNITS].set(gate[:, None]), mlp.up.at[0, :, :_UNITS].set(up[:, None])),
    )


def _told_apart(written: Float[Array, "d_vocab d_model"], token: int, ridge: float = 1e-2) -> Float[Array, " d_model"]:
    """The direction whose product is 1 with what is written for one token, and smallest for the others."""
    gram = written.T @ written
    one = written[token]
    direction = jnp.linalg.solve(gram + ridge * jnp.trace(gram) * jnp.eye(len(gram)), one)
    return direction / (direction @ one)


def _frequencies(config: DecoderConfig) -> np.ndarray:
    half = config.d_head // 2
    return config.rope_theta ** (-np.arange(half) / half)


def _positional(config: DecoderConfig, offset: int) -> tuple[Array, Array]:
    """Queries and keys that read the constant dimension: their score is largest `offset` tokens back.

    The score is `Σ_f cos(θ_f (Δ − offset))` over the fast frequencies; the slow ones tell positions apart too little.
    """
    frequency = _frequencies(config)
    fast = np.where(frequency > 0.05, _POSITION_GAIN, 0.0)
    query = np.concatenate([fast, np.zeros_like(fast)])
    key = np.concatenate([fast * np.cos(frequency * offset), fast * np.sin(frequency * offset)])
    empty = jnp.zeros((config.d_model, config.d_head))
    return empty.at[0].set(jnp.asarray(query, jnp.float32)), empty.at[0].set(jnp.asarray(key, jnp.float32))


def _block(
    key: PRNGKeyArray, shape: tuple[int, int], rows: slice = slice(None), columns: slice = slice(None)
) -> Float[Array, "m n"]:
    """Zeros but for a block of normal values with variance one over its number of rows."""
    at = jnp.zeros(shape).at[rows, columns]
    size = jnp.zeros(shape)[rows, columns].shape
    return at.set(jax.random.normal(key, size) * size[0] ** -0.5)
