"""Edge dropout against runs of the model in which each reader's input is put together by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.circuits import Graph, source_outputs
from mi_jax.circuits.runs.sources import SourceTap
from mi_jax.models.block import block
from mi_jax.models.layout import Prompts
from mi_jax.validation import resampled_forward
from tests.circuits.tiny_task import model
from tests.models.tiny_families import FAMILIES, family

# as a share of the largest logit
TOLERANCE = 1e-5
TOKENS = jax.random.randint(jax.random.key(0), (3, 6), 0, 13)
# parallel blocks, norms of what is written before it is added, experts, and a plain one
NAMES = ("gpt2", "gptj", "gemma", "olmo2", "mixture")


class _Reading:
    """A tap that hands every reader the stream of its own and gathers what the sources of the layer write."""

    def __init__(self, graph, layer, params, added):
        self.sources, self._graph, self._added = SourceTap(graph, params), graph, added
        self._layer = layer

    def touches(self, name):
        return name in ("attn.q_in", "attn.k_in", "attn.v_in") or self.sources.touches(name)

    def __call__(self, name, x):
        if name in ("attn.q_in", "attn.k_in", "attn.v_in"):
            heads = range(x.shape[2])
            return jnp.stack([x[:, :, h] + self._added(f"a{self._layer}.h{h}<{name[5]}>", ()) for h in heads], 2)
        if name == "mlp.in":
            # the heads of this layer have written by now, unless the block is parallel
            written = () if self._graph.parallel else tuple(self.sources.written[0])
            return x + self._added(f"m{self._layer}", written)
        return self.sources(name, x)


def by_hand(decoder, edges):
    """Reader after reader: the stream, and for each edge the difference of its source from the example before."""
    graph = Graph.of(decoder.config)
    x, mask = decoder.embedded(TOKENS)
    written = [x]

    def added(reader, more):
        column = edges[:, graph.readers.index(reader)]
        return sum((column[i] * (jnp.roll(z, 1, 0) - z) for i, z in enumerate([*written, *more])), jnp.zeros_like(x))

    for number in range(graph.n_layers):
        params = jax.tree.map(lambda a, n=number: a[n], decoder.blocks)
        tap = _Reading(graph, number, params, added)
        x = block(decoder.layer(number, params), x, tap, decoder.config, Prompts(mask))
        written += [z for part in tap.sources.written for z in part]
    norm, x = decoder.final_norm, x + added("logits", ())
    x = x if norm is None else norm(x)
    logits = jnp.einsum("bpd,vd->bpv", x, decoder.unembedding)
    logits = logits if decoder.unembed_bias is None else logits + decoder.unembed_bias[None, None]
    cap = decoder.config.logit_softcap
    return cap * jnp.tanh(logits / cap) if cap else logits


@pytest.mark.parametrize(
    "name", [n if n in ("gemma", "mixture") else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_random_edges_are_patched_from_the_example_before(name):
    decoder, graph = family(name), Graph.of(FAMILIES[name])
    rng = np.random.default_rng(0)
    run = jax.jit(lambda e: resampled_forward(decoder, TOKENS, e))
    oracle = jax.jit(lambda e: by_hand(decoder, e))
    plain = mi.jit(decoder)(TOKENS)
    for share in (0.2, 0.8):
        edges = jnp.asarray(graph.edges & (rng.random(graph.edges.shape) < share), jnp.float32)
        expected = oracle(edges)
        assert np.abs(expected - plain).max() > 0.1
        _assert_close(run(edges), expected)
    _assert_close(run(jnp.zeros(graph.edges.shape)), plain)


def test_the_shares_that_the_oracle_gathers_are_those_of_the_sources():
    decoder = family("gemma")
    graph = Graph.of(decoder.config)
    edges = jnp.asarray(graph.mask(["a0.h1->logits"]), jnp.float32)
    z = source_outputs(decoder, TOKENS)[graph.sources.index("a0.h1")]
    edited = mi.intervene(decoder, mi.add("resid_post", jnp.roll(z, 1, 0) - z, layer=1))
    _assert_close(jax.jit(lambda e: by_hand(decoder, e))(edges), mi.jit(edited)(TOKENS))


def test_among_equal_examples_resampling_changes_nothing():
    decoder = model()
    edges = jnp.asarray(Graph.of(decoder.config).edges, jnp.float32)
    same = jnp.broadcast_to(TOKENS[:1], TOKENS.shape)
    got = jax.jit(resampled_forward)(decoder, same, edges)
    _assert_close(got, mi.jit(decoder)(same))


def _assert_close(got, expected):
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE * scale)
