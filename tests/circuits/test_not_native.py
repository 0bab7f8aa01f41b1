"""Circuits are of a native decoder; anything else that runs is refused by name at every entry point."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import mi_jax as mi
from mi_jax import circuits
from mi_jax.core.errors import InputError
from mi_jax.models.adapters import adapt_equinox
from tests.circuits.tiny_task import model, task

KEY = jax.random.key(0)


class Plain(eqx.Module):
    """A model of somebody else."""

    table: jax.Array

    def __call__(self, tokens):
        return self.table[tokens]


def other_models():
    edited = mi.intervene(model(), mi.scale("attn.z", 0.5, layer=0))
    return {
        "Intervened": edited,
        "Captured": mi.capture(model(), "resid_post"),
        "Intervened twice": mi.intervene(mi.capture(edited, "resid_post"), mi.scale("mlp_out", 2.0)),
        "EquinoxModel": adapt_equinox(Plain(jnp.ones((13, 13))), jnp.zeros((1, 3), jnp.int32)),
    }


def edges():
    return circuits.Graph.of(model().config).edges


ENTRY_POINTS = {
    "discover": lambda m, t: circuits.discover(m, t, n_edges=3),
    "edge_scores": lambda m, t: circuits.edge_scores(m, t),
    "node_scores": lambda m, t: circuits.node_scores(m, t),
    "neuron_scores": lambda m, t: circuits.neuron_scores(m, t),
    "exact_edges": lambda m, t: circuits.exact_edges(m, t),
    "faithfulness": lambda m, t: circuits.faithfulness(m, t, [edges()]),
    "curve": lambda m, t: circuits.curve(m, t, edges().astype(np.float32)),
    "random_curves": lambda m, t: circuits.random_curves(m, t),
    "evaluate_circuit": lambda m, t: circuits.evaluate_circuit(m, t, edges(), key=KEY),
    "acdc": lambda m, t: circuits.acdc(m, t, 0.01),
    "learn_mask": lambda m, t: circuits.learn_mask(m, t, key=KEY),
    "ablation_values": lambda m, t: circuits.ablation_values(m, t, "mean"),
    "optimal_ablation": lambda m, t: circuits.optimal_ablation(m, t),
    "source_outputs": lambda m, t: circuits.source_outputs(m, t.clean),
    "masked_forward": lambda m, t: circuits.masked_forward(m, t.clean, edges(), jnp.zeros((7, 2, 4, 8)), t.mask),
}


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_what_is_no_native_decoder_is_refused_by_name(entry, monkeypatch):
    # as for a user: only tests check the types of arguments
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for name, other in other_models().items():
        with pytest.raises(InputError, match=rf"{name.split()[0]} has no '\w+': this needs a native decoder"):
            ENTRY_POINTS[entry](other, task())


def test_private_names_are_missing_as_in_any_object():
    for other in other_models().values():
        assert not hasattr(other, "__jax_array__")
        assert not hasattr(other, "config")
        assert getattr(other, "blocks", None) is None
        assert other.site_table is not None
