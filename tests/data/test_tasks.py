"""Clean and counterfactual prompts differ where they should and nowhere else."""

import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.data import Task
from mi_jax.data.tasks import indirect_object_identification, repeated_tokens, subject_verb_agreement


def test_ioi_pairs_differ_in_the_second_subject_only(tokenizer):
    task = indirect_object_identification(tokenizer, 20, seed=3)
    for i in range(len(task)):
        real = np.asarray(task.mask[i])
        clean, corrupt = np.asarray(task.clean[i])[real], np.asarray(task.corrupt[i])[real]
        changed = np.flatnonzero(clean != corrupt)
        assert len(changed) == 1
        assert clean[changed[0]] == task.distractor[i]
        assert corrupt[changed[0]] == task.answer[i]
        # the subject is named twice in the clean prompt, the answer once
        assert (clean == int(task.distractor[i])).sum() == 2
        assert (clean == int(task.answer[i])).sum() == 1
        assert task.position[i] == real.sum() - 1


def test_ioi_names_the_answer_first_in_half_of_the_prompts_of_every_template(tokenizer):
    task = indirect_object_identification(tokenizer, 20, seed=0)
    clean = np.asarray(task.clean)
    first = [
        list(row).index(a) < list(row).index(s) for row, a, s in zip(clean, task.answer, task.distractor, strict=True)
    ]
    assert first[0::2] == [False] * 10
    assert first[1::2] == [True] * 10


def test_the_third_name_is_neither_of_the_two(tokenizer):
    task = indirect_object_identification(tokenizer, 10, seed=1, counterfactual="third")
    changed = np.asarray(task.clean) != np.asarray(task.corrupt)
    third = np.asarray(task.corrupt)[changed]
    assert len(third) == 10
    assert (third != np.asarray(task.answer)).all()
    assert (third != np.asarray(task.distractor)).all()


def test_a_template_without_its_fields_is_named(tokenizer):
    with pytest.raises(ValueError, match="lacks place, thing"):
        indirect_object_identification(tokenizer, 2, seed=0, templates=["{a} {b} {s}"])


def test_agreement_is_balanced_over_numbers_and_verbs(tokenizer):
    for task in subject_verb_agreement(tokenizer):
        pairs = list(zip(task.answer.tolist(), task.distractor.tolist(), strict=True))
        assert len(pairs) >= 24
        assert all(pairs.count(pair) == pairs.count(pair[::-1]) for pair in pairs)
        # the subject is the one word that differs
        assert ((task.clean != task.corrupt).sum(1) == 1).all()


def test_the_attractor_has_the_other_number(tokenizer):
    text = tokenizer.decode(np.asarray(subject_verb_agreement(tokenizer).attractor.clean[0]).tolist())
    assert text == "The author near the workers"


def test_repeats_repeat_and_the_control_does_not():
    tokens = repeated_tokens(4, 10, d_vocab=1000, seed=0, first=5)
    np.testing.assert_array_equal(tokens[:, :10], tokens[:, 10:])
    assert tokens.min() >= 5
    control = repeated_tokens(4, 10, d_vocab=1000, seed=0, first=5, repeat=False)
    np.testing.assert_array_equal(control[:, :10], tokens[:, :10])
    assert (control[:, :10] == control[:, 10:]).mean() < 0.1


def test_the_metric_is_the_logit_difference_at_the_answer():
    rows = jnp.zeros((2, 3), jnp.int32)
    one = jnp.array([1, 2], jnp.int32)
    task = Task("t", rows, rows, jnp.ones((2, 3), bool), answer=one, distractor=one - 1, position=one)
    logits = jnp.array([[[1.0, 5.0, 2.0]], [[0.0, 3.0, 10.0]]])
    np.testing.assert_allclose(task.logit_difference(logits), [4.0, 7.0])
    np.testing.assert_allclose(task.answer_probability(logits)[0], np.exp(5) / np.exp([1, 5, 2]).sum(), rtol=1e-6)
    assert len(task[:1]) == 1
    assert task[1:].answer.tolist() == [2]
