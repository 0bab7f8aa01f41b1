"""The settings of the suite: how often features fire, and which of them fire together.

All share the sizes, amplitudes between 0.9 and 1.1 and a little noise. How many features fire at a time is given in
units of a bound: of `one_step_sparsity`, up to which a tied encoder typically tells which features are there, or of
`wainwright_sparsity`, beyond which l1 with codes of either sign does not.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from mi_jax.decomposition.recovery import wainwright_sparsity
from mi_jax.validation.superposition import SuperpositionConfig

AMPLITUDE_SPREAD = 0.1
# per coordinate; of unit variance after the projection on a feature, this is 0.02
NOISE = 0.02


@dataclasses.dataclass(frozen=True)
class Setting:
    """One distribution of codes.

    Attributes:
      share: mean L0 in units of the bound.
      bound: which one.
      recoverable: whether dictionary learning is expected to work; the control is there to fail.
      fields: of `SuperpositionConfig`.
      without: architectures that are left out.
      roots: features without a parent, as a share of all; None for no trees.
    """

    share: float
    bound: Literal["one_step", "wainwright"] = "one_step"
    recoverable: bool = True
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    roots: float | None = None
    without: tuple[str, ...] = ()


SETTINGS: Mapping[str, Setting] = {
    "independent": Setting(0.5),
    "zipf": Setting(0.5, fields={"zipf_exponent": 1.0}),
    "at_bound": Setting(1.0),
    "hierarchy": Setting(1.0, fields={"zipf_exponent": 0.5, "branching": 3, "max_frequency": 0.25}, roots=0.25),
    "correlated": Setting(1.0, fields={"zipf_exponent": 0.5, "correlation": 0.6, "n_factors": 16}),
    # matching pursuit goes over the dictionary once per code, which so many codes make too slow
    "dense": Setting(4.0, bound="wainwright", recoverable=False, without=("matching_pursuit",)),
}
# the setting whose best MCC is the experiment's main figure
MAIN = "independent"


def superposition_config(name: str, n_features: int, d_model: int) -> SuperpositionConfig:
    """What a setting draws at these sizes."""
    setting = SETTINGS[name]
    plain = SuperpositionConfig(n_features, d_model, 0.5, 0.0, amplitude_spread=AMPLITUDE_SPREAD, noise=NOISE)
    bound = plain.one_step_sparsity if setting.bound == "one_step" else wainwright_sparsity(d_model, n_features)
    trees = {} if setting.roots is None else {"n_roots": max(1, round(setting.roots * n_features))}
    # bounds of toy sizes can be 0
    return dataclasses.replace(plain, mean_l0=setting.share * max(bound, 1), **setting.fields, **trees)
