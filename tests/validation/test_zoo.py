"""The organism that comes with the project does what it is said to do."""

import jax

from mi_jax.validation import behaviour, load_organism


def test_it_has_both_mechanisms():
    does = behaviour(load_organism(), key=jax.random.key(5), n=128)
    assert does.induction_accuracy >= 0.9
    assert does.trigger_rate >= 0.95
    assert does.false_rate <= 0.03
