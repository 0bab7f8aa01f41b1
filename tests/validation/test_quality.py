"""The check of an organism: what it rejects, that it knows no search, and that what it rejects is counted."""

import dataclasses
import inspect
from pathlib import Path

import jax
import numpy as np
import pytest

from mi_jax.validation import DESIGN, Behaviour, Quality, Truth, load_organism, train_accepted
from mi_jax.validation import quality as check

GOOD = Behaviour(1.0, 1.0, 0.0, {}, 8)


def truth(graph, designed, *, stray: float = 0.0, kept: float = 1.0) -> Truth:
    effects = np.where(designed, 0.5, 0.0)
    effects[graph.index("m1->logits")] = stray
    return Truth("made up", graph, designed, effects, kept)


@pytest.fixture(scope="module")
def organism():
    return load_organism()


def test_a_clean_organism_has_no_faults_and_each_fault_is_named(organism):
    graph, designed = organism.graph, organism.designed("trigger")
    clean = {"trigger": truth(graph, designed)}
    assert Quality(GOOD, clean).faults == []
    for change, word in (
        ({"induction_accuracy": 0.8}, "induction"),
        ({"trigger_rate": 0.9}, "the trigger works"),
        ({"false_rate": 0.1}, "unasked"),
    ):
        (fault,) = Quality(dataclasses.replace(GOOD, **change), clean).faults
        assert word in fault
    (stray,) = Quality(GOOD, {"trigger": truth(graph, designed, stray=0.45)}).faults
    assert "m1->logits" in stray
    # one effect after the other, none much smaller than the one before
    smeared = truth(graph, designed, stray=0.2)
    smeared.effects[graph.index("m0->logits")] = 0.09
    (narrow,) = Quality(GOOD, {"trigger": smeared}).faults
    assert "no gap" in narrow
    (weak,) = Quality(GOOD, {"trigger": truth(graph, designed, kept=0.7)}).faults
    assert "70%" in weak


def test_the_check_knows_no_search(organism):
    source = Path(inspect.getfile(Quality)).read_text()
    assert not any(word in source for word in ("discover", "plateau", "eap", "select_edges"))


def test_attempts_are_made_until_one_is_accepted(monkeypatch, organism):
    keys, module = [], inspect.getmodule(Quality)
    good = Quality(GOOD, {n: truth(organism.graph, organism.designed(n)) for n in DESIGN})
    bad = dataclasses.replace(good, behaviour=dataclasses.replace(GOOD, false_rate=0.5))
    outcomes = []
    monkeypatch.setattr(module, "train_organism", lambda config, *, key, progress: keys.append(key) or organism)
    monkeypatch.setattr(module, "quality", lambda organism, pairs, *, key: outcomes.pop(0))

    outcomes[:] = [bad, good]
    made = train_accepted(organism.config, 4, key=jax.random.key(0))
    assert made.accepted
    assert made.rejected == (bad.faults,)
    first, second = (np.asarray(jax.random.key_data(k)) for k in keys)
    assert not np.array_equal(first, second)

    outcomes[:] = [bad, bad]
    made = train_accepted(organism.config, 4, key=jax.random.key(0), attempts=2)
    assert not made.accepted
    assert made.quality is bad
    assert made.rejected == (bad.faults,)


def test_it_measures_the_behaviour_and_the_truth(organism):
    found = check(organism, 8, key=jax.random.key(1))
    assert set(found.truths) == set(DESIGN)
    assert found.faults == []
