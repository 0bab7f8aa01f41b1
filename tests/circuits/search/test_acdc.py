"""ACDC against a plain sequential loop, against a published implementation, and on edges that were planted."""

import dataclasses
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.graph.paths import reverse_topological, useful_readers
from mi_jax.circuits.runs.masked import masked_forward, source_outputs
from mi_jax.circuits.search.acdc import acdc
from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.models import Decoder, DecoderConfig, init_decoder
from tests.circuits.tiny_task import CONFIG, model, random_task, task
from tests.models.tiny_families import CAUSAL, FAMILIES, family

GRAPH = Graph.of(CONFIG)
FAMILIES_WITH_EDGES = [name for name in CAUSAL if FAMILIES[name].norms != "post"]
# written by auto_circuit 1.0.1 (`acdc_prune_scores`, KL, edges in the order of the paper's code) for a random model of
# TransformerLens that is like GPT-2: its weights, the prompts, the logits and the kept edges
GOLDEN = Path(__file__).parent / "auto_circuit.npz"


@eqx.filter_jit
def _distance(model: Decoder, task: Task, removed, squared: bool):
    patch = source_outputs(model, task.corrupt, task.mask)

    def run(edges):
        return masked_forward(model, task.clean, edges, patch, task.mask, output_pos=task.position)[:, 0]

    full, logits = run(jnp.zeros_like(removed)), run(removed)
    p, q = jax.nn.log_softmax(full), jax.nn.log_softmax(logits)
    return jnp.square(full - logits).mean() if squared else (jnp.exp(p) * (p - q)).sum(-1).mean()


def _sequential(
    model: Decoder, task: Task, threshold: float, *, absolute: bool, squared: bool = False, whole: bool = False
) -> tuple[np.ndarray, float]:
    """The rule, one run after the other: the circuit and its loss."""
    graph = Graph.of(model.config)

    def distance(removed):
        return _distance(model, task, removed, squared)

    removed, loss, tried = np.zeros(graph.edges.shape, np.float32), 0.0, set()

    def attempt(s, r):
        nonlocal loss
        before = removed[s, r].copy()
        removed[s, r] = graph.edges[s, r]
        new = float(distance(jnp.asarray(removed)))
        if (abs(new - loss) if absolute else new - loss) < threshold:
            loss = new
        else:
            removed[s, r] = before

    order = reverse_topological(graph)
    for s, r in order:
        layer = graph.readers[r].partition(".")[0]
        if whole and "<" in graph.readers[r] and layer not in tried:
            tried.add(layer)
            for reader in dict.fromkeys(order[:, 1]):
                if graph.readers[reader].startswith(f"{layer}."):
                    attempt(slice(None), reader)
        if not removed[s, r]:
            attempt(s, r)
    return graph.edges & (removed == 0), loss


@pytest.mark.parametrize(("threshold", "absolute"), [(1e-3, False), (3e-3, True), (1e-2, False), (5e-2, True)])
def test_decisions_are_those_of_the_sequential_rule(threshold, absolute):
    expected, _ = _sequential(model(), task(), threshold, absolute=absolute)
    found = acdc(model(), task(), threshold, absolute=absolute, window=4)
    assert 0 < expected.sum() < GRAPH.n_edges
    assert found.edges == GRAPH.names(expected)
    kept_by_score = np.abs(found.scores) if absolute else found.scores
    assert ((kept_by_score >= threshold) == found.mask).all()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if Graph.of(FAMILIES[name]).coupled else pytest.mark.slow)
        for name in FAMILIES_WITH_EDGES
    ],
)
def test_every_family_follows_the_sequential_rule(name):
    """Heads that a norm couples included: what one reads changes what the others write."""
    decoder = family(name)
    graph, seen = Graph.of(decoder.config), []
    for seed in range(3):
        some = random_task(seed)
        for threshold in (1e-3, 1e-2):
            mask, loss = _sequential(decoder, some, threshold, absolute=False)
            found = acdc(decoder, some, threshold)
            assert found.edges == graph.names(mask)
            assert found.loss == pytest.approx(loss, abs=1e-5)
            seen.append(int(mask.sum()))
    assert min(seen) > 0
    assert max(seen) < graph.n_edges


@pytest.mark.slow
def test_layers_between_the_first_and_the_last_keep_what_does_not_change():
    decoder = init_decoder(dataclasses.replace(CONFIG, n_layers=3, n_kv_heads=2), key=jax.random.key(2))
    decoder = jax.tree.map(lambda x: 1.5 * x, decoder)
    expected, _ = _sequential(decoder, task(), 3e-3, absolute=False)
    assert 10 < expected.sum() < Graph.of(decoder.config).n_edges - 10
    assert (acdc(decoder, task(), 3e-3).mask == expected).all()


def test_the_window_changes_no_decision_and_a_wide_one_takes_fewer_programs():
    narrow, wide = (acdc(model(), task(), 1e-2, objective="squared", window=w) for w in (1, 16))
    assert (narrow.mask == wide.mask).all()
    assert 0 < wide.mask.sum() < GRAPH.n_edges
    np.testing.assert_allclose(narrow.scores, wide.scores, atol=1e-5)
    assert wide.rounds < 0.75 * narrow.rounds
    assert narrow.runs <= wide.runs
    assert narrow.edges == GRAPH.names(_sequential(model(), task(), 1e-2, absolute=False, squared=True)[0])


def _golden() -> tuple[Decoder, Task, dict[str, np.ndarray]]:
    data = dict(np.load(GOLDEN))

    def weight(name: str) -> jax.Array:
        return jnp.asarray(data[f"p/{name}"])

    def layers(name: str, swap: bool = False) -> jax.Array:
        both = jnp.stack([weight(f"blocks.{layer}.{name}") for layer in range(2)])
        return jnp.swapaxes(both, 1, 2) if swap else both

    config = DecoderConfig(
        name="golden", n_layers=2, d_model=8, n_heads=2, n_kv_heads=2, d_head=4, d_mlp=6, d_vocab=13, n_ctx=4,
        positions="learned", norm="layer", activation="gelu", gated=False, tied=False,
    )  # fmt: skip
    made = init_decoder(config, key=jax.random.key(0))
    assert made.blocks.mlp is not None
    assert made.final_norm is not None
    projections = {letter: layers(f"attn.W_{letter.upper()}", swap=True) for letter in "qkv"}
    biases = {f"{letter}_bias": layers(f"attn.b_{letter.upper()}") for letter in "qkvo"}
    attn = dataclasses.replace(made.blocks.attn, o=layers("attn.W_O"), **projections, **biases)
    mlp = dataclasses.replace(
        made.blocks.mlp, up=layers("mlp.W_in"), down=layers("mlp.W_out"),
        up_bias=layers("mlp.b_in"), down_bias=layers("mlp.b_out"),
    )  # fmt: skip
    norms = {
        f"{ours}_norm": dataclasses.replace(
            getattr(made.blocks, f"{ours}_norm"), weight=layers(f"{theirs}.w"), bias=layers(f"{theirs}.b")
        )
        for ours, theirs in (("attn", "ln1"), ("mlp", "ln2"))
    }
    model = dataclasses.replace(
        made,
        embed=weight("embed.W_E"),
        pos_embed=weight("pos_embed.W_pos"),
        blocks=dataclasses.replace(made.blocks, attn=attn, mlp=mlp, **norms),
        final_norm=dataclasses.replace(made.final_norm, weight=weight("ln_final.w"), bias=weight("ln_final.b")),
        unembed=weight("unembed.W_U").T,
        unembed_bias=weight("unembed.b_U"),
    )
    clean, corrupt = (jnp.asarray(data[name], jnp.int32) for name in ("clean", "corrupt"))
    token = jnp.zeros(len(clean), jnp.int32)
    return model, Task("golden", clean, corrupt, jnp.ones(clean.shape, bool), token, token + 1, token + 3), data


def test_kept_edges_are_those_of_auto_circuit():
    model, task, data = _golden()
    np.testing.assert_allclose(model(task.clean)[:, -1], data["logits"], atol=1e-5)
    graph = Graph.of(model.config)
    order = [f"{graph.sources[s]}->{graph.readers[r]}" for s, r in reverse_topological(graph)]
    assert order == data["order"].tolist()
    found = acdc(model, task, float(data["tau"]))
    assert set(found.edges) == set(data["kept"].tolist())
    assert 5 < len(found.edges) < graph.n_edges - 5


def test_whole_readers_are_tried_first_where_that_is_asked_for():
    progress: list[tuple[int, int]] = []
    found = acdc(model(), task(), 1e-3, whole_readers=True, progress=lambda *n: progress.append(n))
    assert found.edges == GRAPH.names(_sequential(model(), task(), 1e-3, absolute=False, whole=True)[0])
    assert (found.mask != acdc(model(), task(), 1e-3).mask).any()
    assert progress[-1][1] == GRAPH.n_edges + sum("<" in name for name in GRAPH.readers)


def test_readers_count_as_useful_while_a_path_leads_to_the_logits():
    circuit = GRAPH.mask(["a1.h0->logits", "input->a1.h0<v>", "m0->a1.h0<q>", "a0.h1->a1.h1<q>"])
    useful = {
        name for name, on in zip(GRAPH.readers, useful_readers(GRAPH, circuit[:, :, None])[:, 0], strict=True) if on
    }
    assert useful == {"logits", "a1.h0<q>", "a1.h0<k>", "a1.h0<v>", "m0"}


def test_what_does_not_fit_is_named():
    with pytest.raises(InputError, match="above 0; got 0"):
        acdc(model(), task(), 0.0)
    with pytest.raises(InputError, match="at least 1; got 0"):
        acdc(model(), task(), 0.1, window=0)
