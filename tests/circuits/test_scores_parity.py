"""Edge scores against the EAP-IG package's own, on a random GPT-2-like model, and the table of how close they are.

`tests/circuits/golden_edges/make.py` wrote the scores, in float64. `MI_JAX_WRITE_PARITY=1 pytest
tests/circuits/test_scores_parity.py -n 0` writes the table anew.
"""

import functools
import os
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.circuits import scores as package
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.scores import METHODS, edge_scores
from mi_jax.data.task import Task
from mi_jax.models import Decoder, DecoderConfig, init_decoder

GOLDEN = dict(np.load(Path(__file__).parent / "golden_edges" / "eap_ig.npz"))
TABLE = Path(package.__file__).parent / "PARITY.md"
TOLERANCE = 1e-4
NAMES = {
    "eap": "`EAP`",
    "eap-ig-inputs": "`EAP-IG-inputs`",
    "eap-ig-activations": "`EAP-IG-activations`",
    "clean-corrupted": "`clean-corrupted`",
    "exact": "`exact`",
    "ifr": "`information-flow-routes`, with a table of positions that is zero",
}
MEASURED: dict[str, float] = {}


def weight(name):
    return jnp.asarray(GOLDEN[f"weights/{name}"])


def stacked(name, *axes):
    """One weight of all layers, its axes permuted."""
    layers = [GOLDEN[f"weights/blocks.{layer}.{name}"] for layer in range(2)]
    return jnp.asarray(np.stack([np.transpose(w, axes) if axes else w for w in layers]))


@functools.cache
def model(positions: bool = True) -> Decoder:
    """The package's model, from TransformerLens' layout of weights."""
    config = DecoderConfig(
        name="golden",
        n_layers=2,
        d_model=32,
        n_heads=4,
        n_kv_heads=4,
        d_head=8,
        d_mlp=48,
        d_vocab=29,
        n_ctx=8,
        positions="learned",
        norm="layer",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        unembed_bias=True,
        activation="gelu",
        gated=False,
        tied=False,
    )
    table = weight("pos_embed.W_pos")

    def parts(m):
        b = m.blocks
        return [
            *(m.embed, m.pos_embed, m.final_norm.weight, m.final_norm.bias, m.unembed, m.unembed_bias),
            *(b.attn_norm.weight, b.attn_norm.bias, b.mlp_norm.weight, b.mlp_norm.bias),
            *(b.attn.q, b.attn.k, b.attn.v, b.attn.o),
            *(b.attn.q_bias, b.attn.k_bias, b.attn.v_bias, b.attn.o_bias),
            *(b.mlp.up, b.mlp.up_bias, b.mlp.down, b.mlp.down_bias),
        ]

    values = [weight("embed.W_E"), table if positions else jnp.zeros_like(table)]
    values += [weight("ln_final.w"), weight("ln_final.b"), weight("unembed.W_U").T, weight("unembed.b_U")]
    values += [stacked(name) for name in ("ln1.w", "ln1.b", "ln2.w", "ln2.b")]
    values += [stacked(f"attn.W_{letter}", 1, 0, 2) for letter in "QKV"] + [stacked("attn.W_O")]
    values += [stacked(f"attn.b_{letter}") for letter in "QKVO"]
    values += [stacked(f"mlp.{name}") for name in ("W_in", "b_in", "W_out", "b_out")]
    made = init_decoder(config, key=jax.random.key(0))
    for old, new in zip(parts(made), values, strict=True):
        assert old.shape == new.shape
    return eqx.tree_at(parts, made, values)


def task() -> Task:
    lengths, labels = jnp.asarray(GOLDEN["lengths"], jnp.int32), jnp.asarray(GOLDEN["labels"], jnp.int32)
    clean, corrupt = (jnp.asarray(GOLDEN[name], jnp.int32) for name in ("clean", "corrupt"))
    mask = jnp.arange(clean.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
    return Task("golden", clean, corrupt, mask, labels[:, 0], labels[:, 1], lengths - 1)


@pytest.mark.parametrize("method", NAMES)
def test_scores_are_those_of_the_eap_ig_package(method):
    decoder = model(positions=method != "ifr")
    graph = Graph.of(decoder.config)
    expected = np.zeros(graph.edges.shape)
    for name, score in zip(GOLDEN["edges"], GOLDEN[f"scores/{method}"], strict=True):
        expected[graph.index(str(name))] = score
    assert len(GOLDEN["edges"]) == graph.n_edges
    found = edge_scores(decoder, task(), method=method, steps=int(GOLDEN["steps"]))
    MEASURED[method] = float(np.abs(found - expected).max() / np.abs(expected).max())
    assert MEASURED[method] < TOLERANCE


def table():
    """What was measured, as PARITY.md has it."""
    lines = [
        "# Edge scores and the EAP-IG package",
        "",
        "Written by `tests/circuits/test_scores_parity.py`, which compares the scores of all 110 edges of a random",
        "GPT-2-like model (2 layers, 4 heads, biases, learned positions; 3 pairs, one of them padded; 5 steps) with",
        "those that `attribute` of https://github.com/hannamw/EAP-IG gave in float64. Ours are in float32.",
        "`MI_JAX_WRITE_PARITY=1 pytest tests/circuits/test_scores_parity.py -n 0` writes it anew.",
        "",
        "The error is the largest difference relative to the largest score. Signs agree where the package's metric is",
        "a loss: a score is positive where the edge supports the behaviour.",
        "",
        "| `edge_scores(method=…)` | what it is | EAP-IG package | error |",
        "|---|---|---|---|",
    ]
    for name, method in METHODS.items():
        if name in MEASURED:
            error = "≤ 1e-5" if MEASURED[name] <= 1e-5 else f"≤ {TOLERANCE:.0e}"
            lines.append(f"| `{name}` | {method.does} | {NAMES[name]} | {error} |")
        elif name != "eap-ig":
            lines.append(f"| `{name}` | {method.does} | none | |")
    lines += [
        "",
        "`eap-ig` is `eap-ig-inputs`. The package's input is the token embedding without positions, which differs from",
        "ours in information-flow routes alone.",
    ]
    return "\n".join(lines) + "\n"


def test_the_table_of_parity_is_what_was_measured():
    if len(MEASURED) < len(NAMES):
        pytest.skip("needs all methods to have been tested in this process")
    if os.environ.get("MI_JAX_WRITE_PARITY"):
        TABLE.write_text(table(), encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8") == table()
