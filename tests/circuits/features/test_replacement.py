"""Attribution graphs against a model frozen by hand in NumPy, and interventions against whole runs."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.circuits.features import attribution_graph, replacement_model, set_features
from mi_jax.core.errors import InputError
from mi_jax.decomposition import CrossLayerConfig, DictionaryConfig, init, init_cross_layer
from tests.circuits.features.dictionaries import D_SAE, LAYERS, D, cross_layer, noisy, skips, trained
from tests.circuits.features.frozen_numpy import FrozenRun
from tests.models.tiny import prompts, tiny
from tests.models.tiny_families import family

N_POS, TOLERANCE = 4, 1e-5
TOKENS = prompts(1, 1, N_POS)[0]
MODELS = {"skips": skips, "cross_layer": cross_layer}


@functools.cache
def graph_of(name):
    return attribution_graph(MODELS[name](), TOKENS, max_logits=4, logit_mass=1.0)


def close(a, b):
    """To the tolerance, of the largest number."""
    assert np.abs(np.asarray(a) - np.asarray(b)).max() < TOLERANCE * max(1.0, np.abs(np.asarray(b)).max())


@pytest.mark.parametrize("name", MODELS)
def test_effects_are_those_of_one_source_at_a_time_in_a_model_frozen_by_hand(name):
    r, graph = MODELS[name](), graph_of(name)
    frozen = FrozenRun(r, TOKENS)
    rows = np.asarray(r.model.unembedding, np.float64)
    directions = rows[graph.logit_tokens] - rows.mean(0)

    def values(reads, final):
        of_features = [np.asarray(r.encoder(i), np.float64)[j] @ reads[i, p] for i, p, j in graph.features.tolist()]
        between = np.zeros((LAYERS + 1) * N_POS)
        return np.r_[of_features, between, directions @ final[-1]]

    embed, silent = frozen.acts["embed"][0], np.zeros((LAYERS, N_POS, D))
    reads, _ = frozen(embed, frozen.acts["mlp_out"][:, 0] if r.skips is None else silent)
    # with skips, what is read upstream depends on what was read before: written are only the outputs without them
    if r.skips is not None:
        true = frozen.acts["mlp.in"][:, 0]
        reads, _ = frozen(embed, frozen.acts["mlp_out"][:, 0] - np.einsum("lpd,lde->lpe", true, frozen.skips))
    codes = [np.asarray(r.encode(i, jnp.asarray(reads[i], jnp.float32)), np.float64) for i in range(LAYERS)]
    constants = np.asarray(r.constants(jnp.asarray(reads, jnp.float32)), np.float64)
    errors = frozen.acts["mlp_out"][:, 0] - np.asarray(r.written([jnp.asarray(c, jnp.float32) for c in codes]))
    errors = errors - constants

    columns = []
    for (layer, pos, latent), activation in zip(graph.features.tolist(), graph.activations, strict=True):
        assert activation == pytest.approx(codes[layer][pos, latent], rel=1e-4)
        source = silent.copy()
        for target in r.targets(layer):
            source[target, pos] = activation * np.asarray(r.decoder(layer, target)[latent])
        columns.append(values(*frozen(0 * embed, source, biases=False)))
    for layer, pos in np.ndindex(LAYERS, N_POS):
        source = silent.copy()
        source[layer, pos] = errors[layer, pos]
        columns.append(values(*frozen(0 * embed, source, biases=False)))
    for pos in range(N_POS):
        source = 0 * embed
        source[pos] = embed[pos]
        columns.append(values(*frozen(source, silent, biases=False)))
    close(graph.adjacency[:, : graph.logit_nodes.start], np.stack(columns, 1))
    assert not graph.adjacency[:, graph.logit_nodes].any()

    # all biases: of the model, of the decoders (without skips, which are paths) and of the encoders
    b_dec = constants if r.skips is None else constants - np.einsum("lpd,lde->lpe", reads, frozen.skips)
    alone = values(*frozen(0 * embed, b_dec))
    alone[: graph.n_features] += [np.asarray(r.encoder_bias(i))[j] for i, _, j in graph.features.tolist()]
    close(graph.bias, alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_effects_and_biases_add_up_to_what_a_target_is(name):
    graph, r = graph_of(name), MODELS[name]()
    assert graph.n_features == graph.n_active > 10
    close(graph.remainder, np.zeros_like(graph.remainder))
    logits = np.asarray(mi.jit(r.model)(TOKENS[None]))[0, -1]
    close(graph.values[graph.logit_nodes], (logits - logits.mean())[graph.logit_tokens])
    assert np.all(np.diff(graph.logit_probabilities) <= 0)
    close(graph.logit_probabilities, np.asarray(jax.nn.softmax(logits))[graph.logit_tokens])


def test_a_capped_graph_is_the_part_of_the_whole_with_the_most_influence():
    whole = graph_of("skips")
    part = attribution_graph(skips(), TOKENS, max_logits=4, logit_mass=1.0, max_features=8, batch_size=1)
    assert (part.n_features, part.n_active) == (8, whole.n_active)
    at = [whole.features.tolist().index(row) for row in part.features.tolist()]
    nodes = np.r_[at, np.arange(whole.n_features, len(whole.adjacency))]
    close(part.adjacency, whole.adjacency[np.ix_(nodes, nodes)])
    # the logits' rows alone choose the first: the largest of them is in
    direct = np.abs(whole.adjacency[whole.logit_nodes, : whole.n_features])
    assert (
        int(
            (whole.logit_probabilities @ (direct / np.abs(whole.adjacency[whole.logit_nodes]).sum(1)[:, None])).argmax()
        )
        in at
    )
    assert np.abs(part.remainder).max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_the_direct_effect_of_an_intervention_is_a_column_of_the_graph(name):
    r, graph = MODELS[name](), graph_of(name)
    source = int(np.abs(graph.adjacency[graph.logit_nodes.start, : graph.n_features]).argmax())
    half = [0.5 * float(graph.activations[source])]
    run = set_features(r, TOKENS, graph.features[[source]], half, freeze="attention and norms", direct=True)
    change = np.asarray((run.logits - run.clean_logits)[-1])
    close(change[graph.logit_tokens] - change.mean(), -0.5 * graph.adjacency[graph.logit_nodes, source])
    h = np.array([run.pre_activations[i][p, j] for i, p, j in graph.features.tolist()])
    close(h - graph.values[: graph.n_features], -0.5 * graph.adjacency[: graph.n_features, source])
    # as they are, features change nothing
    same = set_features(
        r, TOKENS, graph.features[[source]], graph.activations[[source]], freeze="attention and norms", direct=True
    )
    close(same.logits, same.clean_logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["neox", "gptj", "gemma", "olmo2", "mixture"])
def test_effects_are_exact_in_every_family(name):
    model = family(name)
    n, width = model.config.n_layers, model.config.d_model
    key = jax.random.key(3)
    transcoder = noisy(init_cross_layer(CrossLayerConfig(width, D_SAE, n, k=4), key=key), key)
    r = replacement_model(model, transcoder, normalized=name != "olmo2")
    graph = attribution_graph(r, TOKENS)
    close(graph.remainder, np.zeros_like(graph.remainder))
    source = int(np.flatnonzero(graph.features[:, 0] == 0)[0])
    double = [2 * float(graph.activations[source])]
    run = set_features(r, TOKENS, graph.features[[source]], double, freeze="attention and norms", direct=True)
    h = np.array([run.pre_activations[i][p, j] for i, p, j in graph.features])
    effects = graph.adjacency[: graph.n_features, source]
    close(h - graph.values[: graph.n_features], effects)
    assert np.abs(effects).max() > 1e-2


@pytest.mark.parametrize("freeze", [pytest.param("nothing", marks=pytest.mark.slow), "attention"])
def test_features_after_an_intervention_respond(freeze):
    r, graph = skips(), graph_of("skips")
    feature = next(row for row in graph.features.tolist() if row[0] == 0)
    run = set_features(r, TOKENS, [tuple(feature)], [3.0], freeze=freeze)
    _, clean = mi.jit(mi.capture(r.model, "mlp.in", "mlp_out", "attn.pattern"))(TOKENS[None])
    held = [mi.patch("attn.pattern", clean)] if freeze == "attention" else []
    outs = clean["mlp_out"]
    for layer in range(LAYERS):
        model = mi.intervene(r.model, *held, mi.patch("mlp_out", outs))
        read = mi.jit(mi.capture(model, mi.at("mlp.in", layers=layer)))(TOKENS[None])[1]["mlp.in"][0]
        one = r.transcoders[layer]
        codes = one.encode(read)
        codes = codes.at[feature[1], feature[2]].set(3.0) if layer == 0 else codes
        close(run.codes[layer], codes)
        error = clean["mlp_out"][layer, 0] - one(clean["mlp.in"][layer, 0])
        outs = outs.at[layer].set((one.decode(codes) + read @ one.w_skip + error)[None])
    want = mi.jit(mi.intervene(r.model, *held, mi.patch("mlp_out", outs)))(TOKENS[None])[0]
    close(run.logits, want)
    assert np.abs(np.asarray(run.logits - run.clean_logits)).max() > 0.1


def test_a_trained_transcoder_leaves_less_to_errors_than_one_with_its_decoders_shuffled():
    r = trained()
    order = jax.random.permutation(jax.random.key(0), r.d_sae(0))
    w_dec = tuple(w[order] for w in r.transcoders.w_dec)
    shuffled = eqx.tree_at(lambda t: t.transcoders.w_dec, r, w_dec)
    graphs = [attribution_graph(one, TOKENS) for one in (r, shuffled)]
    for graph in graphs:
        close(graph.remainder, np.zeros_like(graph.remainder))
    assert graphs[0].replacement_score > 0.8
    assert 1 - graphs[0].replacement_score < 0.5 * (1 - graphs[1].replacement_score)
    assert graphs[0].completeness_score > graphs[1].completeness_score


def test_faults_are_named():
    r, config = skips(), DictionaryConfig(D, D_SAE, k=3, transcoder=True)
    one = init(config, key=jax.random.key(0))
    with pytest.raises(InputError, match="has 3 layers, the transcoders have 2"):
        replacement_model(tiny(), [one, one])
    with pytest.raises(InputError, match=r"d_model=8; the transcoders read and write widths \[\(6, 6\)\]"):
        replacement_model(tiny(), init_cross_layer(CrossLayerConfig(6, 8, 3, k=2), key=jax.random.key(0)))
    with pytest.raises(InputError, match=r"read one of mlp\.in, resid_mid, resid_pre; got 'resid_post'"):
        replacement_model(tiny(), [one] * 3, reads="resid_post")
    with pytest.raises(InputError, match="needs MLPs"):
        replacement_model(tiny("attention-only"), [one] * 3)
    switch = init(DictionaryConfig(D, D_SAE, "switch", k=2, n_experts=2, transcoder=True), key=jax.random.key(0))
    with pytest.raises(InputError, match="with Switch are not linear"):
        replacement_model(tiny(), [switch] * 3)
    with pytest.raises(InputError, match="layer 1 has latents 0–15 and the prompt positions 0–3; got latent 16"):
        set_features(r, TOKENS, [(1, 0, 16)], [1.0])
    with pytest.raises(InputError, match="layers 0–2; got a feature of layer 3"):
        set_features(r, TOKENS, [(3, 0, 1)], [1.0])
    with pytest.raises(InputError, match="1 features and 2 values"):
        set_features(r, TOKENS, [(1, 0, 1)], [1.0, 2.0])
    with pytest.raises(InputError, match="of one prompt"):
        attribution_graph(r, prompts(1, 1, 13)[0])
    with pytest.raises(InputError, match="max_features must be at least 1"):
        attribution_graph(r, TOKENS, max_features=0)
    dead = jax.tree.map(lambda t: t, r.transcoders)
    dead = [type(t)(t.w_enc, t.b_enc - 1e3, t.w_dec, t.b_dec, t.activation, t.w_skip, None, False) for t in dead]
    with pytest.raises(InputError, match="no feature of any layer is active"):
        attribution_graph(replacement_model(tiny(), dead), TOKENS)
