"""Truth from exhaustive ablation, what it says of a wrong design, and the blind search on the shipped organism."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.circuits import masked_forward, plateau_circuit, source_outputs
from mi_jax.data.organism_data import OrganismData, trigger_batch
from mi_jax.validation import (
    DESIGN,
    OrganismConfig,
    Truth,
    agreement,
    behaviour,
    load_organism,
    planted_decoder,
    random_null,
    verify,
)

PAIRS = 16


@pytest.fixture(scope="module")
def organism():
    return load_organism()


@pytest.fixture(scope="module")
def tasks(organism):
    return organism.tasks(PAIRS, key=jax.random.key(21))


def test_effects_are_shares_of_the_gap_between_the_prompts(organism, tasks):
    model, task = organism.model, tasks["trigger"]
    truth = verify(model, task, organism.designed("trigger"))

    def metric(logits):
        return float(task.logit_difference(logits).mean())

    clean, corrupt = (metric(mi.jit(model)(t, output_pos=task.position)) for t in (task.clean, task.corrupt))
    s, r = truth.graph.index("a0.h1->m0")
    one = jnp.zeros(truth.graph.edges.shape).at[s, r].set(1.0)
    patch = source_outputs(model, task.corrupt)
    edited = metric(jax.jit(masked_forward)(model, task.clean, one, patch, output_pos=task.position))
    assert truth.effects[s, r] == pytest.approx((clean - edited) / (clean - corrupt), abs=1e-4)


@pytest.mark.parametrize("measure", ["logit-difference", "probability-difference"])
def test_effects_are_measured_by_the_metric_of_the_task(organism, tasks, measure):
    task = dataclasses.replace(tasks["trigger"], measure=measure)
    truth = verify(organism.model, task, organism.designed("trigger"))
    everything = truth.graph.mask(["a1.h1->logits"])
    # all of the mechanism goes through its last edge, whatever it is measured by
    np.testing.assert_allclose(truth.effects[everything], 1.0, atol=0.1)
    assert truth.as_designed, (truth.idle, truth.stray)


def test_the_threshold_stands_in_the_widest_gap_and_the_margin_says_how_wide(organism):
    graph, designed = organism.graph, organism.designed("induction")
    effects = np.zeros(graph.edges.shape)
    effects[designed] = [1.0, 0.5, 0.45, -0.42, 0.4]
    effects[graph.index("m1->logits")] = 0.1
    truth = Truth("made up", graph, designed, effects, faithfulness=1.0)
    assert truth.threshold == pytest.approx(0.2)
    assert truth.margin == pytest.approx(4.0)
    assert truth.as_designed
    assert truth.undecided == []
    # the same shares of another behaviour give the same truth: it does not hang on five hundredths
    assert dataclasses.replace(truth, effects=0.8 * effects).mask.sum() == truth.mask.sum()
    # effects below what is told apart make no gap among themselves
    noise = effects.copy()
    noise[graph.index("m0->logits")] = 1e-9
    assert dataclasses.replace(truth, effects=noise).threshold == pytest.approx(0.2)
    assert dataclasses.replace(truth, fixed_threshold=0.05).stray == ["m1->logits"]


def test_an_edge_next_to_the_threshold_is_too_close_to_call(organism):
    graph, designed = organism.graph, organism.designed("induction")
    effects = np.where(designed, 0.4, 0.0)
    for edge, effect in (("m1->logits", 0.25), ("m0->logits", 0.16), ("a0.h2->logits", 0.1)):
        effects[graph.index(edge)] = effect
    truth = Truth("made up", graph, designed, effects, faithfulness=1.0)
    assert truth.margin < 2.25
    assert truth.undecided


def test_deviations_from_the_design_are_named(organism):
    graph = organism.graph
    designed = organism.designed("induction")
    effects = np.where(designed, 0.5, 0.0)
    truth = Truth("made up", graph, designed, effects, faithfulness=1.0)
    assert truth.as_designed
    assert (truth.weakest_designed, truth.strongest_other) == (0.5, 0.0)

    effects = effects.copy()
    effects[graph.index("input->a0.h0<v>")] = -0.02
    effects[graph.index("m1->logits")] = 0.3
    truth = dataclasses.replace(truth, effects=effects)
    assert not truth.as_designed
    assert truth.idle == ["input->a0.h0<v>"]
    assert truth.stray == ["m1->logits"]
    assert (truth.weakest_designed, truth.strongest_other) == (0.02, 0.3)


def test_the_search_finds_both_mechanisms_without_being_told(organism, tasks):
    found = {name: plateau_circuit(organism.model, task)[0].mask for name, task in tasks.items()}
    true = {name: organism.designed(name) for name in tasks}
    for name in tasks:
        assert agreement(found[name], true[name]).f1 >= 0.8, organism.graph.names(found[name])
    # the other mechanism's truth is no match: the search does not return one circuit for everything
    assert agreement(found["induction"], true["trigger"]).f1 <= 0.2
    null = random_null(organism.graph, list(found.values()), list(true.values()), seeds=range(50))
    assert null.high < 0.5


def test_the_mechanisms_share_no_edge():
    assert not set(DESIGN["induction"]) & set(DESIGN["trigger"])


def _always(model, token):
    """The model with nothing left but one likeliest token."""
    blank = jax.tree.map(jnp.zeros_like, model)
    return eqx.tree_at(
        lambda m: (m.embed, m.final_norm.weight, m.unembed),
        blank,
        (blank.embed + 1, blank.final_norm.weight + 1, blank.unembed.at[token].set(1.0)),
    )


def test_behaviour_is_counted_as_defined(organism):
    data = organism.data
    for token, rate in ((data.forbidden, 1.0), (data.first, 0.0)):
        parrot = dataclasses.replace(organism, model=_always(organism.model, token))
        does = behaviour(parrot, key=jax.random.key(22), n=16)
        assert (does.trigger_rate, does.false_rate, does.induction_accuracy) == (rate, rate, 0.0)
        assert set(does.false_rate_by_kind.values()) == {rate}


def test_planted_units_open_at_the_trigger_more_than_anywhere_else():
    config, data = OrganismConfig(), OrganismData()
    model = planted_decoder(config.decoder, data.delay, (data.first, data.second), key=jax.random.key(23))
    batch = trigger_batch(data, 128, key=jax.random.key(24))
    _, acts = mi.jit(mi.capture(model, mi.at("mlp.pre", layers=0)))(batch.tokens, output=False)
    pre = np.asarray(acts["mlp.pre"][..., 0])
    fires = np.asarray(batch.kind) == 0
    at_trigger = pre[fires, np.asarray(batch.fired)[fires]]
    elsewhere = pre.copy()
    elsewhere[fires, np.asarray(batch.fired)[fires]] = -np.inf
    assert at_trigger.min() > 0
    assert at_trigger.min() > np.quantile(elsewhere, 0.999)
