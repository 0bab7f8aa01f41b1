"""Edge scores against derivatives of the masked forward, finite differences, and definitions written out."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.circuits.ablation.values import ablation_values
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.runs.exact import exact_edges
from mi_jax.circuits.runs.masked import masked_forward
from mi_jax.circuits.scores import edge_scores
from mi_jax.core.edits import Patch
from mi_jax.core.errors import InputError
from mi_jax.core.index import Index
from mi_jax.data.task import Task
from tests.circuits.tiny_task import model, task
from tests.models.tiny_families import FAMILIES, noisy

TASK = task()
GRAPH = Graph.of(model().config)
SWAPPED = eqx.tree_at(lambda t: (t.clean, t.corrupt), TASK, (TASK.corrupt, TASK.clean))


@eqx.filter_jit
def loss(decoder, weights, pairs: Task = TASK, ablation: str = "resample"):
    """Minus the metric: its derivative at no weights is what scores are, its rise what an ablation takes away."""
    patch = ablation_values(decoder, pairs, ablation)
    logits = masked_forward(decoder, pairs.clean, weights, patch, pairs.mask, output_pos=pairs.position)
    return -pairs.metric(logits).mean()


@functools.cache
def derivative(attention_only=False, ablation="resample", n_pos=0):
    decoder = model(attention_only)
    shape = Graph.of(decoder.config).edges.shape + ((n_pos,) if n_pos else ())
    return eqx.filter_jit(jax.grad(lambda w: loss(decoder, w, ablation=ablation)))(jnp.zeros(shape))


@pytest.mark.parametrize(("attention_only", "ablation"), [(False, "resample"), (True, "resample"), (False, "zero")])
def test_eap_is_the_derivative_of_the_masked_forward_at_no_edges(attention_only, ablation):
    decoder = model(attention_only)
    edges = Graph.of(decoder.config).edges
    scores = edge_scores(decoder, TASK, method="eap", ablation=ablation)
    np.testing.assert_allclose(scores, np.where(edges, derivative(attention_only, ablation), 0), atol=1e-5, rtol=1e-4)
    assert np.abs(scores).max() > 0.05
    assert (scores[~edges] == 0).all()


def test_eap_of_positions_is_the_derivative_for_an_edge_at_one_position():
    scores = edge_scores(model(), TASK, method="eap", positions=True)
    exists = GRAPH.edges[:, :, None]
    np.testing.assert_allclose(scores, np.where(exists, derivative(n_pos=4), 0), atol=1e-5, rtol=1e-4)


def test_eap_is_the_finite_difference():
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), model())
        scores = edge_scores(wide, TASK, method="eap")
        direction = np.where(GRAPH.edges, np.random.default_rng(0).normal(size=scores.shape), 0)
        step = 1e-5 * jnp.asarray(direction)
        finite = (loss(wide, step) - loss(wide, -step)) / 2e-5
        np.testing.assert_allclose((scores * direction).sum(), finite, rtol=1e-7)
        assert scores.dtype == np.float64


def test_exact_scores_have_the_sign_of_the_others():
    exact = edge_scores(model(), TASK, method="exact")
    np.testing.assert_array_equal(exact, exact_edges(model(), TASK))
    token_edges = edge_scores(model(), TASK, method="exact", positions=True)
    np.testing.assert_array_equal(token_edges, exact_edges(model(), TASK, positions=True, batch_size=16))
    one = jnp.zeros(GRAPH.edges.shape).at[GRAPH.index("input->a0.h0<v>")].set(1.0)
    rise = loss(model(), one) - loss(model(), jnp.zeros_like(one))
    np.testing.assert_allclose(exact[GRAPH.index("input->a0.h0<v>")], rise, atol=1e-5)


def test_eap_ig_with_one_step_has_its_gradient_on_the_corrupt_embedding():
    """With the corrupt prompt in the clean one's place, EAP takes its gradient there, with the opposite difference."""
    one_step = edge_scores(model(), TASK, method="eap-ig", steps=1)
    at_corrupt = -edge_scores(model(), SWAPPED, method="eap")
    np.testing.assert_allclose(one_step, at_corrupt, atol=1e-5, rtol=1e-4)
    both = (at_corrupt + edge_scores(model(), TASK, method="eap")) / 2
    np.testing.assert_allclose(edge_scores(model(), TASK, method="clean-corrupted"), both, atol=1e-5, rtol=1e-4)


def test_eap_ig_of_the_input_integrates_to_the_whole_effect():
    """Along the straight line of embeddings every path starts at the input: its edges' scores add up to the effect."""
    scores = edge_scores(model(), TASK, method="eap-ig-inputs", steps=400)
    edges = jnp.asarray(GRAPH.edges, jnp.float32)
    whole = loss(model(), edges) - loss(model(), jnp.zeros_like(edges))
    np.testing.assert_allclose(scores[0].sum(), whole, rtol=0.02)


def test_ig_of_activations_is_the_mean_derivative_with_the_source_alone_between_its_values():
    """A source is at α where all edges from it have the weight 1 − α; the scores are the derivatives there."""
    steps = 3
    rows = jnp.eye(GRAPH.n_sources)[:, :, None] * jnp.asarray(GRAPH.edges, jnp.float32)[None]
    away = 1 - (jnp.arange(steps, dtype=jnp.float32) + 0.5) / steps
    gradient = jax.grad(lambda w: loss(model(), w))
    points = (away[None, :, None, None] * rows[:, None]).reshape(-1, *GRAPH.edges.shape)
    found = eqx.filter_jit(lambda p: jax.lax.map(gradient, p))(points)
    mean = found.reshape(GRAPH.n_sources, steps, *GRAPH.edges.shape).mean(1)
    expected = np.where(GRAPH.edges, np.asarray(mean)[np.arange(GRAPH.n_sources), np.arange(GRAPH.n_sources)], 0)
    scores = edge_scores(model(), TASK, method="ig-activations", steps=steps)
    np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=1e-4)


def test_ig_of_activations_adds_up_to_what_ablating_the_source_takes_away():
    scores = edge_scores(model(), TASK, method="ig-activations", steps=100)
    none = jnp.zeros(GRAPH.edges.shape)
    for source in range(GRAPH.n_sources):
        row = none.at[source].set(jnp.asarray(GRAPH.edges[source], jnp.float32))
        np.testing.assert_allclose(scores[source].sum(), loss(model(), row) - loss(model(), none), atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("chosen", "adds_up"), [(4, True), (1, False)])
def test_in_a_mixture_ig_of_activations_misses_the_jumps_of_the_router(chosen, adds_up):
    """With every expert chosen nothing jumps; with one of four something does."""
    mixture = noisy(dataclasses.replace(FAMILIES["mixture"], n_active_experts=chosen))
    graph = Graph.of(mixture.config)
    scores = edge_scores(mixture, TASK, method="ig-activations", steps=100)
    none = jnp.zeros(graph.edges.shape)
    rows = [none.at[s].set(jnp.asarray(graph.edges[s], jnp.float32)) for s in range(graph.n_sources)]
    effects = np.array([loss(mixture, row) - loss(mixture, none) for row in rows])
    gap = np.abs(scores.sum(1) - effects).max()
    assert (gap < 0.01 * np.abs(effects).max()) == adds_up


def test_the_gradient_path_is_followed():
    """The path written out for embeddings; at each point the scores of a task that starts there."""
    steps = 3
    decoder = model()
    embed = {name: jnp.take(decoder.embed, getattr(TASK, name), axis=0) for name in ("clean", "corrupt")}

    def metric(x):
        taps = {"embed": (Patch("embed", Index(), x),)}
        return TASK.metric(decoder(TASK.clean, TASK.mask, taps=taps, output_pos=TASK.position)).mean()

    slope = jax.jit(jax.grad(metric))
    x, end = embed["clean"], slope(embed["corrupt"])
    whole = embed["corrupt"] - x
    total = jnp.zeros(())
    for _ in range(steps):
        total = total - (whole * slope(x)).sum()
        d = end - slope(x)
        d = d * jnp.sign((d * (embed["corrupt"] - x)).sum((1, 2), keepdims=True))
        lengths = [jnp.sqrt(jnp.square(v).sum((1, 2), keepdims=True)) for v in (whole, d)]
        x = x + lengths[0] / steps * d / lengths[1]
    # all the gradient at the embedding comes through the readers of the input
    scores = edge_scores(decoder, TASK, method="eap-gp", steps=steps)
    np.testing.assert_allclose(scores[0].sum(), total / steps, rtol=1e-3)
    straight = edge_scores(decoder, TASK, method="eap-gp", steps=1)
    np.testing.assert_allclose(straight, edge_scores(decoder, TASK, method="eap"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["eap-ig-activations", "relp", "atp*", "ifr"])
def test_chunks_of_prompts_and_positions_change_nothing(method):
    options = {"method": method, "steps": 2}
    rows = [edge_scores(model(), TASK[i : i + 1], **options) for i in (0, 1)]
    chunked = edge_scores(model(), TASK[np.array([0, 1, 0])], batch_size=2, positions=method != "atp*", **options)
    if method != "atp*":
        chunked = chunked.sum(-1)
    np.testing.assert_allclose(chunked, (2 * rows[0] + rows[1]) / 3, atol=1e-5)


def test_shares_of_information_flow_add_up_to_one():
    scores = edge_scores(model(), TASK, method="ifr")
    np.testing.assert_allclose(scores.sum(0), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "acdc"}, "no method 'acdc' for edge scores; there are eap, eap-ig,"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"ablation": "median"}, "ablation is one of"),
    ],
)
def test_bad_input_is_named(options, match):
    with pytest.raises(InputError, match=match):
        edge_scores(model(), TASK, **options)
