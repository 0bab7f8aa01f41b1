"""Path patching: the masked-edge forward as oracle, closed forms, plain patching at the two ends, linear sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.runs.masked import masked_forward, source_outputs
from mi_jax.core.errors import InputError
from mi_jax.core.index import index_axis
from mi_jax.core.nodes import node
from mi_jax.core.paths import path_patch
from tests.core.linear_model import N_LAYERS, inputs, linear_model, mean_metric
from tests.models.tiny import prompts, tiny
from tests.models.tiny_families import family

TOLERANCE = 2e-5
CLEAN, CORRUPT = prompts(3), prompts(4)
FINAL = node("resid_post", layer=2)
EDGES = {
    "a0.h1->a1.h2<q>": (node("attn.z", layer=0, head=1), node("attn.q", layer=1, head=2)),
    "a0.h3->a2.h1<k>": (node("attn.z", layer=0, head=3), node("attn.k_in", layer=2, head=1)),
    "a1.h0->a2.h0<v>": (node("attn.head_out", layer=1, head=0), node("attn.v", layer=2, head=0)),
    "a1.h2->m1": (node("attn.z", layer=1, head=2), node("mlp.in", layer=1)),
    "m0->a1.h1<q>": (node("mlp_out", layer=0), node("attn.q", layer=1, head=1)),
    "m0->logits": (node("mlp_out", layer=0), FINAL),
    "input->m2": (node("embed"), node("mlp.in", layer=2)),
}


def metric(logits):
    return (logits[:, -1, 3] - logits[:, -1, 5]).mean()


@pytest.fixture(scope="module")
def oracle():
    """Logits of the clean run with one edge at its corrupt value, all else following."""
    graph = Graph.of(tiny().config)
    other = source_outputs(tiny(), CORRUPT)
    run = jax.jit(lambda edges: masked_forward(tiny(), CLEAN, edges, other))
    return lambda edge: run(jnp.asarray(graph.mask([edge]), jnp.float32))


@pytest.mark.parametrize("edge", EDGES)
def test_a_direct_path_is_one_edge_of_the_graph(oracle, edge):
    sender, receiver = EDGES[edge]
    found = mi.jit(path_patch(tiny(), sender, receiver, direction="noising"))(CLEAN, CORRUPT)
    np.testing.assert_allclose(found, oracle(edge), atol=TOLERANCE)
    moved = found - mi.jit(tiny())(CLEAN)
    assert np.abs(moved).max() > 1e-3


def test_direct_effect_on_the_logits_in_closed_form():
    model = tiny("attention-only")
    head_sender = node("attn.z", layer=0, head=2)
    found = mi.jit(path_patch(model, head_sender, FINAL))(CLEAN, CORRUPT)
    runs = [mi.jit(mi.capture(model, "attn.z"))(x) for x in (CLEAN, CORRUPT)]
    change = np.asarray(runs[0][1]["attn.z"] - runs[1][1]["attn.z"], np.float64)[0, :, :, 2]
    direct = change @ np.asarray(model.blocks.attn.o, np.float64)[0, 2] @ np.asarray(model.embed, np.float64).T
    np.testing.assert_allclose(found - runs[1][0], direct, atol=TOLERANCE)


def test_through_everything_is_plain_patching():
    sender = node("attn.z", layer=0, head=1)
    found = mi.jit(path_patch(tiny(), sender, FINAL, through=("attn.z", "mlp_out")))(CLEAN, CORRUPT)
    acts = mi.jit(mi.capture(tiny(), "attn.z"))(CLEAN)[1]
    plain = mi.jit(mi.intervene(tiny(), sender.patch(acts)))(CORRUPT)
    np.testing.assert_allclose(found, plain, atol=TOLERANCE)


def test_through_chosen_components_against_holding_the_others_one_by_one():
    sender = node("attn.z", layer=0, head=1, pos=mi.per_example(jnp.array([1, 3])))
    through = (node("attn.z", layer=1, head=3), node("attn.z", layer=(1, 2), head=0), node("mlp_out", layer=1))
    found = mi.jit(path_patch(tiny(), sender, FINAL, through=through))(CLEAN, CORRUPT)
    base = mi.jit(mi.capture(tiny(), "attn.z", "mlp_out"))(CORRUPT)[1]
    acts = mi.jit(mi.capture(tiny(), "attn.z"))(CLEAN)[1]
    free = {(1, 3), (1, 0), (2, 0)}
    held = [
        mi.patch("attn.z", base, layer=layer, head=head)
        for layer in range(3)
        for head in range(4)
        if (layer, head) not in free
    ]
    held += [mi.patch("mlp_out", base, layer=layer) for layer in (0, 2)]
    edits = [*held, mi.patch("attn.z", acts, layer=0, head=1, pos=mi.per_example(jnp.array([1, 3])))]
    expected = mi.jit(mi.intervene(tiny(), *edits))(CORRUPT)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    direct = mi.jit(path_patch(tiny(), sender, FINAL))(CLEAN, CORRUPT)
    assert np.abs(found - direct).max() > 1e-2


def test_all_senders_in_one_program_are_the_single_senders():
    receivers = (node("attn.q", layer=2, head=1), node("attn.k", layer=2, head=0))
    swept = mi.jit(path_patch(tiny(), node("attn.z", layer=mi.each, head=mi.each), receivers, metric, batch_size=5))
    effects = swept(CLEAN, CORRUPT)
    assert effects["attn.z"].shape == (3, 4)
    assert (effects.method, effects.direction) == ("path patching", "denoising")
    assert dict(effects.axes) == {"attn.z": ("layer", "head")}
    np.testing.assert_allclose(effects["attn.z"][2], 0.0, atol=1e-6)  # the receivers read before layer 2 writes
    one = jax.jit(lambda i, h: path_patch(tiny(), node("attn.z", layer=i, head=h), receivers)(CLEAN, CORRUPT))
    for place in [(0, 0), (0, 3), (1, 1)]:
        expected = metric(one(*place)) - effects.baseline
        np.testing.assert_allclose(effects["attn.z"][place], expected, atol=TOLERANCE)
    np.testing.assert_allclose(effects.baseline, metric(mi.jit(tiny())(CORRUPT)), atol=TOLERANCE)
    np.testing.assert_allclose(effects.target, metric(mi.jit(tiny())(CLEAN)), atol=TOLERANCE)


def test_paths_add_up_where_everything_is_linear():
    """The whole effect is that of the direct path plus those of the paths that first enter each later component."""
    clean, corrupt, sender = inputs(1), inputs(2), node("attn_out", layer=0)
    ends = [node("mlp.in", layer=0), node("resid_post", layer=N_LAYERS - 1)]
    ends += [node(site, layer=i) for i in range(1, N_LAYERS) for site in ("attn.in", "mlp.in")]
    effects = [float(path_patch(linear_model(), sender, e, mean_metric)(clean, corrupt)["attn_out"]) for e in ends]
    acts = mi.capture(linear_model(), "attn_out")(clean)[1]
    whole = mean_metric(mi.intervene(linear_model(), sender.patch(acts))(corrupt)) - mean_metric(
        linear_model()(corrupt)
    )
    np.testing.assert_allclose(sum(effects), whole, atol=1e-4)
    assert np.abs(effects).min() > 1e-3
    some = path_patch(linear_model(), sender, ends[1], mean_metric, frozen=("attn_out",))(clean, corrupt)
    passed = path_patch(linear_model(), sender, ends[1], mean_metric, through="mlp_out")(clean, corrupt)
    np.testing.assert_allclose(some["attn_out"], passed["attn_out"], atol=TOLERANCE)
    assert abs(float(some["attn_out"]) - effects[1]) > 1e-3


def test_gradients_and_padding_go_through():
    sender, receiver = node("attn.z", layer=0, head=1), node("attn.q", layer=2, head=1)
    run = mi.jit(path_patch(tiny(), sender, receiver))
    position = jnp.array([4, 4], jnp.int32)
    pad = jnp.full((2, 2), 7, jnp.int32)
    mask = jnp.broadcast_to(jnp.arange(7) < 5, (2, 7))
    padded = run(jnp.concatenate([CLEAN, pad], 1), jnp.concatenate([CORRUPT, pad], 1), mask=mask, output_pos=position)
    np.testing.assert_allclose(padded[:, 0], run(CLEAN, CORRUPT)[:, 4], atol=TOLERANCE)
    effect = path_patch(linear_model(), "attn_out", node("mlp.in", layer=1), mean_metric)
    step = 1e-2

    def total(t):
        return effect(inputs(1) * (1 + t), inputs(2))["attn_out"]

    slope = (total(step) - total(-step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(total)(0.0), slope, rtol=1e-3)


def test_a_site_name_from_transformer_lens_and_a_captured_dictionary():
    acts = mi.jit(mi.capture(tiny(), "attn.z"))(CLEAN)[1]
    place = node("blocks.1.attn.hook_z", head=2).checked(tiny().site_table)
    assert (place.site, int(place.index.layer)) == ("attn.z", 1)
    a, b = mi.patch("attn.z", acts, layer=1, head=2), place.patch(acts)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


# model, sender, receiver, and what is free; over all layers and heads of both
PATHS = [
    ("tiny", "attn.z", "attn.q", ()),
    ("tiny", "mlp_out", "attn.v_in", ()),
    ("tiny", "attn.k", "attn.scores", ()),
    ("tiny", "attn.v", "attn.pattern", ("attn.z",)),
    ("tiny", "attn.q", "resid_post", (node("attn.z", layer=1, head=2),)),
    ("tiny", "mlp.post", "mlp.in", (node("mlp_out", layer=0),)),
    ("tiny", "resid_mid", "attn.k", ("mlp_out",)),
    # parallel blocks: the MLP does not read the heads of its layer
    ("neox", "attn.z", "mlp.in", ()),
    ("gptj", "attn_out", "mlp.pre", ()),
    ("gptj", "mlp_out", "attn.k", ()),
    # a mixture of experts
    ("mixture", "attn.z", "mlp.router", ()),
    ("mixture", "mlp.router", "mlp.gates", ()),
    ("mixture", "mlp.gates", "attn.q", (node("mlp_out", layer=0),)),
    ("mixture", "mlp.expert_out", "mlp.router", ("mlp_out",)),
    # norms of the stream itself
    ("bert", "resid_mid_normalized", "resid_post", ()),
    ("bert", "resid_post_normalized", "mlp.in", ()),
    ("bert", "attn.z", "resid_mid_normalized", ()),
]


@pytest.mark.parametrize(("name", "sender", "receiver", "through"), PATHS)
def test_a_path_is_refused_exactly_where_patching_it_changes_nothing(name, sender, receiver, through):
    model = tiny() if name == "tiny" else family(name)
    table = model.site_table
    places = []
    for site in (sender, receiver):
        axis = index_axis(table.resolve(site)[0], "head")
        heads = range(table.size(axis)) if axis else (None,)
        layers = range(table.size("layer"))
        places.append([{"layer": i} | ({} if h is None else {"head": h}) for i in layers for h in heads])
    grid = [(a, b) for a in places[0] for b in places[1]]
    refused = []
    for a, b in grid:
        try:
            path_patch(model, node(sender, **a), node(receiver, **b), through=through)
            refused.append(False)
        except mi.SiteError:
            refused.append(True)
    assert 0 < sum(refused) < len(refused)

    # traced places are not checked, as long as there are some with a path
    @jax.jit
    @jax.vmap
    def outputs(a, b):
        return path_patch(model, node(sender, **a), node(receiver, **b), through=through)(CLEAN, CORRUPT)

    stacked = jax.tree.map(lambda *x: jnp.asarray(x, jnp.int32), *grid)
    moved = np.abs(outputs(*stacked) - mi.jit(model)(CORRUPT)[None]).max((1, 2, 3))
    np.testing.assert_array_equal(moved < TOLERANCE, refused)


def test_in_parallel_blocks_no_path_leads_from_a_head_to_the_mlp_of_its_layer():
    model = family("neox")
    with pytest.raises(mi.SiteError, match=r"'attn.z' \(layer=1, head=2\) .* the blocks of neox-like are parallel"):
        path_patch(model, node("attn.z", layer=1, head=2), node("mlp.in", layer=1))
    # the blocks are not the reason here, nor in a model whose MLP reads the heads
    with pytest.raises(mi.SiteError, match=r"computed before it or beside it"):
        path_patch(model, node("attn.z", layer=1), node("mlp.in", layer=0))
    path_patch(family("llama"), node("attn.z", layer=1, head=2), node("mlp.in", layer=1))


def test_gates_lead_around_the_experts_only_in_a_mixture():
    model, end = family("mixture"), node("resid_post", layer=1)
    path_patch(model, node("mlp.in", layer=0), end, frozen=("mlp.post",))
    with pytest.raises(mi.SiteError, match=r"passes mlp.post, which is held"):
        path_patch(family("llama"), node("mlp.in", layer=0), end, frozen=("mlp.post",))


def test_a_sender_without_a_path_is_told_why_and_what_to_do():
    model, final = tiny(), node("resid_post", layer=2)
    with pytest.raises(
        mi.SiteError, match=r"no path leads from 'attn.z' \(layer=2\) to 'attn.q' \(layer=1\), .* earlier"
    ):
        path_patch(model, node("attn.z", layer=2), node("attn.q", layer=1))
    with pytest.raises(mi.SiteError, match=r"every path from 'mlp.post' \(layer=0\) .* passes mlp_out, .* through=…"):
        path_patch(model, node("mlp.post", layer=0), final)
    with pytest.raises(mi.SiteError, match=r"from 'attn.q' \(layer=mi.each, head=mi.each\) .* passes attn.z, which"):
        path_patch(model, node("attn.q", layer=mi.each, head=mi.each), final)
    with pytest.raises(mi.SiteError, match=r"passes attn.z"):  # another head is free, or another layer
        path_patch(model, node("attn.q", layer=0, head=1), final, through=node("attn.z", head=2))
    with pytest.raises(mi.SiteError, match=r"passes attn.z"):
        path_patch(
            model, node("attn.k", layer=0, head=1), final, through=(node("attn.z", head=1), node("attn.z", layer=1))
        )
    with pytest.raises(mi.SiteError, match=r"no path leads from 'logits' to 'final_norm'"):
        path_patch(model, "logits", "final_norm")
    # one receiver that is reached is enough, and so is one sender
    path_patch(model, node("attn.z", layer=1), (node("attn.q", layer=1), node("attn.q", layer=2)))
    path_patch(model, node("attn.z", layer=(1, 2)), node("attn.q", layer=2))
    path_patch(model, node("attn.k", layer=0, head=1), final, through=node("attn.z", layer=0, head=-1))
    path_patch(model, "embed", "logits")


def test_sites_of_another_name_are_not_judged():
    path_patch(linear_model(), node("attn.in", layer=2), node("mlp.in", layer=0), mean_metric)


def test_bad_input_is_named():
    model, sender = tiny(), node("attn.z", layer=0)
    with pytest.raises(mi.SiteError, match=r"receiver 'attn.head_out' is held at its base value"):
        path_patch(model, sender, "attn.head_out")
    with pytest.raises(mi.SiteError, match=r"receiver 'mlp_out' is held"):
        path_patch(model, sender, node("mlp_out", layer=1))
    with pytest.raises(mi.SiteError, match=r"through names components that are held \(attn.z, mlp_out\), not 'attn_"):
        path_patch(model, sender, "mlp.in", through="attn_out")
    with pytest.raises(mi.SiteError, match=r"site 'attn.z' of llama-like has 3 layers \(0–2\); got layer=3"):
        path_patch(model, node("attn.z", layer=3), "mlp.in")
    with pytest.raises(mi.SiteError, match=r"mi.each marks places of the sender, not of 'attn.q'"):
        path_patch(model, sender, node("attn.q", layer=mi.each))
    with pytest.raises(mi.SiteError, match=r"needs at least one receiver"):
        path_patch(model, sender, ())
    with pytest.raises(InputError, match=r"direction must be 'denoising' or 'noising'"):
        path_patch(model, sender, "mlp.in", direction="forwards")
    with pytest.raises(mi.SiteError, match=r"site 'attn.q' has 5 places on 'pos' \(0–4\); got pos=5"):
        mi.jit(path_patch(model, sender, node("attn.q", layer=1, pos=5)))(CLEAN, CORRUPT)
    with pytest.raises(mi.SiteError, match=r"name the sites to hold with frozen"):
        path_patch(model, sender, "mlp.in", frozen=())
    with pytest.raises(mi.SiteError, match=r"batch_size is the number of senders .* at least 1; got 0"):
        path_patch(model, sender, "mlp.in", batch_size=0)
