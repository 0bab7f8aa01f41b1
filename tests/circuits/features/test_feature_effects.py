"""Effects of single features and errors against whole runs with patched activations, and dense gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.circuits.features import feature_effects
from tests.circuits.features.spliced_cases import PLACES, TOLERANCE, acts, close, metric, nodes_of, spliced
from tests.circuits.tiny_task import task


def test_exact_effects_are_those_of_whole_runs():
    effects = feature_effects(spliced(PLACES[:2]), task(), method="exact", batch_size=8)
    for place in PLACES[:2]:
        one = spliced().dictionaries[place]
        z, e, z_other, e_other = nodes_of(place)
        full = metric(*place, acts()[0][place])
        assert effects.metric == pytest.approx(float(full), abs=TOLERANCE)
        for pos, latent in np.argwhere(np.abs(effects.features[place]) > 0)[::7].tolist():
            ablated = one.decode(z.at[:, pos, latent].set(z_other[:, pos, latent])) + e
            close(effects.features[place][pos, latent], full - metric(*place, ablated))
        ablated = one.decode(z) + e.at[:, 2].set(e_other[:, 2])
        close(effects.errors[place][2], full - metric(*place, ablated))
        assert np.abs(effects.features[place]).max() > 0.05


def test_attribution_is_the_gradient_of_codes_and_errors():
    effects = feature_effects(spliced(), task())
    for place in PLACES:
        z, e, z_other, e_other = nodes_of(place)
        one = spliced().dictionaries[place]
        of_z, of_e = jax.grad(lambda z, e, one=one, place=place: metric(*place, one.decode(z) + e), (0, 1))(z, e)
        close(effects.features[place], (of_z * (z - z_other)).sum(0))
        close(effects.errors[place], (of_e * (e - e_other)).sum((0, 2)))
    summed = effects.over_positions()
    close(summed.features[place], effects.features[place].sum(0)[None])
    close(summed.errors[place], effects.errors[place].sum()[None])


def test_integrated_gradients_add_up_to_the_effect_of_a_whole_place():
    place = PLACES[0]
    gaps = {}
    _, _, z_other, e_other = nodes_of(place)
    whole = metric(*place, acts()[0][place]) - metric(*place, spliced().dictionaries[place].decode(z_other) + e_other)
    for method, steps in (("attribution", 1), ("ig", 10), ("ig", 40)):
        effects = feature_effects(spliced(PLACES[:1]), task(), method=method, steps=steps)
        gaps[steps] = abs(float(effects.features[place].sum() + effects.errors[place].sum() - whole))
    assert gaps[40] < 5e-3 * abs(float(whole))
    assert gaps[40] < gaps[10] < gaps[1]


@pytest.mark.parametrize("ablation", ["zero", "mean", "mean-positional"])
def test_ablated_values(ablation):
    place = PLACES[0]
    effects = feature_effects(spliced(PLACES[:1]), task(), ablation=ablation)
    one, mask = spliced().dictionaries[place], np.asarray(task().mask)
    z, e, _, _ = (np.asarray(a) for a in nodes_of(place))
    corrupt = np.asarray(one.encode(acts()[1][place]))
    value = {
        "zero": np.zeros_like(corrupt),
        "mean": np.broadcast_to(corrupt[mask].mean(0), corrupt.shape),
        "mean-positional": np.stack([corrupt[mask[:, p], p].mean(0) for p in range(4)])[None] + np.zeros_like(corrupt),
    }[ablation]
    gradient = jax.grad(lambda z: metric(*place, one.decode(z) + e))(jnp.asarray(z))
    close(effects.features[place], np.where(mask[:, :, None], gradient * (z - value), 0).sum(0))
