"""The planted start, checkpoints, and the truth of the shipped organism."""

import jax
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.data.organism_data import OrganismData, trigger_batch
from mi_jax.models import DecoderConfig
from mi_jax.validation import (
    OrganismConfig,
    load_organism,
    organism_arrays,
    organism_from_arrays,
    planted_decoder,
    train_organism,
    verify,
)

TINY = OrganismConfig(data=OrganismData(length=16, periods=(4, 8)), steps=4, batch_size=4)


@pytest.fixture(scope="module")
def organism():
    return load_organism()


def test_positional_heads_look_where_they_should_before_any_training():
    config = OrganismConfig()
    data = config.data
    model = planted_decoder(config.decoder, data.delay, (data.first, data.second), key=jax.random.key(3))
    tokens = trigger_batch(data, 4, key=jax.random.key(4)).tokens
    pattern = np.asarray(mi.jit(mi.capture(model, "attn.pattern"))(tokens)[1]["attn.pattern"])
    for layer, head, offset in ((0, 0, 1), (0, 1, 1), (1, 1, data.delay - 1)):
        along = np.diagonal(pattern[layer, :, head], -offset, axis1=1, axis2=2)
        assert along.mean() > 0.5, (layer, head)


def test_no_ordinary_token_looks_like_one_of_the_trigger():
    config = OrganismConfig()
    data = config.data
    model = planted_decoder(config.decoder, data.delay, (data.first, data.second), key=jax.random.key(3))
    tokens = np.asarray(model.embed)[:, 1:]
    np.testing.assert_allclose(np.linalg.norm(tokens, axis=1), 1.0, rtol=1e-5)
    likeness = tokens @ tokens[[data.first, data.second]].T
    likeness[[data.first, data.second], [0, 1]] -= 1.0
    np.testing.assert_allclose(likeness, 0, atol=1e-5)


def test_a_design_that_does_not_fit_is_refused():
    config = DecoderConfig(n_layers=3, d_model=64, n_heads=4, n_kv_heads=4, d_head=16, d_mlp=64, d_vocab=64, n_ctx=32)
    with pytest.raises(ValueError, match="laid out for two layers"):
        planted_decoder(config, 4, (61, 62), key=jax.random.key(0))


def test_training_is_deterministic_and_a_checkpoint_holds_all_of_it():
    first, second = (train_organism(TINY, key=jax.random.key(7)) for _ in range(2))
    again = organism_from_arrays(organism_arrays(first))
    assert again.config == TINY
    for other in (second, again):
        np.testing.assert_array_equal(other.losses, first.losses)
        for a, b in zip(jax.tree.leaves(first.model), jax.tree.leaves(other.model), strict=True):
            np.testing.assert_array_equal(a, b)


def test_an_incomplete_checkpoint_is_named():
    arrays = organism_arrays(train_organism(TINY, key=jax.random.key(7)))
    with pytest.raises(ValueError, match=r"'organism\.config' is missing"):
        organism_from_arrays({})
    del arrays["organism.model.embed"]
    with pytest.raises(ValueError, match=r"organism\.model\.embed"):
        organism_from_arrays(arrays)


@pytest.mark.parametrize("mechanism", ["induction", "trigger"])
def test_exactly_the_designed_edges_matter(organism, mechanism):
    task = organism.tasks(16, key=jax.random.key(11))[mechanism]
    truth = verify(organism.model, task, organism.designed(mechanism))
    assert truth.as_designed, (truth.idle, truth.stray)
    assert truth.weakest_designed > 5 * truth.strongest_other
    assert truth.faithfulness == pytest.approx(1.0, abs=0.1)
