"""Shapes of dictionaries and what they are trained for, and the table of what combines."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mi_jax.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class DictionaryConfig:
    """Shape of a dictionary.

    Attributes:
      d_in: width of the activations that are read (of a crosscoder: all its sites together).
      d_sae: number of latents.
      activation: a name of `COMBINATIONS`.
      k: codes per token of the activations that count them.
      d_out: width that is predicted; None for what is read.
      skip: a linear path beside the codes.
      n_sites: sites of a crosscoder.
      transcoder: the output is another site than the input, so that b_dec is not taken off the input.
      bandwidth: of JumpReLU's straight-through gradients.
      threshold: JumpReLU's at the start, in units of activations with unit variance per dimension.
      n_experts: of Switch.
      max_active: places per token, on average, for sparse codes of ReLU, Gated and JumpReLU; None for dense ones.
    """

    d_in: int
    d_sae: int
    activation: str = "topk"
    k: int = 32
    d_out: int | None = None
    skip: bool = False
    n_sites: int = 1
    transcoder: bool = False
    bandwidth: float = 0.05
    threshold: float = 0.01
    n_experts: int = 16
    max_active: int | None = None

    def __post_init__(self):
        for name in ("d_in", "d_sae", "k", "n_sites", "n_experts"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.activation not in COMBINATIONS:
            raise InputError(f"there is no activation {self.activation!r}; there are {', '.join(COMBINATIONS)}")
        if self.activation in COUNTED and self.k > self.d_sae:
            raise InputError(f"k={self.k} must be at most d_sae={self.d_sae}")
        if self.activation == "switch" and (self.d_sae % self.n_experts or self.k > self.d_sae // self.n_experts):
            raise InputError(
                f"n_experts={self.n_experts} must divide d_sae={self.d_sae} into blocks of k={self.k} latents or more"
            )
        if self.n_sites > 1 and (self.d_in % self.n_sites or self.width_out % self.n_sites):
            raise InputError(f"n_sites={self.n_sites} must divide d_in={self.d_in} and d_out={self.width_out}")
        if not self.transcoder and (self.width_out != self.d_in or self.skip):
            raise InputError("only a transcoder predicts another width than it reads, or has a skip: transcoder=True")
        if self.activation == "matching_pursuit" and self.transcoder:
            raise InputError("matching pursuit reconstructs what it reads; it cannot be a transcoder")

    @property
    def width_out(self) -> int:
        return self.d_in if self.d_out is None else self.d_out


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a dictionary is trained for. Squared errors are summed over dimensions and averaged over tokens.

    Attributes:
      reconstruction: `squared_error`; `matryoshka`, the mean over prefixes of the dictionary; `hierarchical`, the mean
        over the t largest codes, t ≤ k.
      prefixes: numbers of latents of the Matryoshka prefixes, ending with d_sae.
      penalty: on codes; weighted by the norms of decoder rows. `l1`: Σ z; `lp`: Σ z^p; `tanh`: Σ tanh(c z);
        `l0`: Σ 1[h > θ]; `l0_target`: (L0 / target − 1)².
      sparsity: the penalty's coefficient λ.
      p: exponent of `lp` at the end; it falls linearly from 1 between `p_start` and the end.
      p_start: fraction of the steps after which p falls.
      c: steepness of `tanh`.
      target_l0: of `l0_target` and of the controller.
      auxiliary: `auxk`, dead latents model what is left over; `gate`, the loss of a gated dictionary;
        `preactivation`, Σ max(θ − h, 0) over dead latents; `load_balance` of Switch.
      aux_coefficient: weight of the auxiliary loss.
      aux_normalised: `auxk` divided by the variance of what is left over.
      aux_rescaled: what dead latents write in `auxk` is multiplied by the number that fits what is left over best. It
        is small beside the activations, and latents that are fitted to its size have codes too small to be chosen: they
        stay dead. False as in Gao et al.
      k_aux: dead latents per token in `auxk`; None for the dictionary's k, or 64 where it has none.
      aux_candidates: when more latents than this are dead, only this many take part in a step of `auxk` or
        `preactivation`; a training lets all have their turn.
    """

    reconstruction: str = "squared_error"
    prefixes: tuple[int, ...] = ()
    penalty: str = "none"
    sparsity: float = 1.0
    p: float = 0.5
    p_start: float = 0.2
    c: float = 4.0
    target_l0: float | None = None
    auxiliary: str = "none"
    aux_coefficient: float = 0.2
    aux_normalised: bool = False
    aux_rescaled: bool = True
    k_aux: int | None = None
    aux_candidates: int = 256

    def __post_init__(self):
        if self.k_aux is not None and self.k_aux > self.aux_candidates:
            raise InputError(f"k_aux={self.k_aux} must be at most aux_candidates={self.aux_candidates}")
        if self.penalty == "l0_target" and not (self.target_l0 or 0) > 0:
            raise InputError("the penalty l0_target needs a target_l0 over 0")
        if (self.reconstruction == "matryoshka") != bool(self.prefixes):
            raise InputError("matryoshka needs prefixes, the others have none")
        if list(self.prefixes) != sorted(set(self.prefixes)):
            raise InputError(f"prefixes must rise, got {self.prefixes}")


@dataclasses.dataclass(frozen=True)
class Combines:
    """What an activation can be trained with."""

    reconstructions: tuple[str, ...]
    penalties: tuple[str, ...]
    auxiliaries: tuple[str, ...]


COUNTED = ("topk", "abstopk", "batchtopk", "matching_pursuit", "switch")

_PREFIXED = ("squared_error", "matryoshka")
COMBINATIONS: Mapping[str, Combines] = {
    "relu": Combines(_PREFIXED, ("none", "l1", "lp", "tanh"), ("none", "auxk", "preactivation")),
    "gated": Combines(_PREFIXED, ("l1",), ("gate",)),
    "jumprelu": Combines(_PREFIXED, ("l0", "l0_target", "tanh", "l1"), ("none", "auxk", "preactivation")),
    "topk": Combines((*_PREFIXED, "hierarchical"), ("none", "l1"), ("none", "auxk")),
    "abstopk": Combines((*_PREFIXED, "hierarchical"), ("none",), ("none",)),
    "batchtopk": Combines(_PREFIXED, ("none", "l1"), ("none", "auxk")),
    "matching_pursuit": Combines((*_PREFIXED, "hierarchical"), ("none",), ("none",)),
    "switch": Combines(("squared_error",), ("none",), ("load_balance",)),
}

ARCHITECTURES: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "relu": ({"activation": "relu"}, {"penalty": "l1"}),
    "p_annealed": ({"activation": "relu"}, {"penalty": "lp"}),
    "gated": ({"activation": "gated"}, {"penalty": "l1", "auxiliary": "gate", "aux_coefficient": 1.0}),
    "jumprelu": ({"activation": "jumprelu"}, {"penalty": "l0", "auxiliary": "preactivation", "aux_coefficient": 3e-6}),
    "jumprelu_tanh": (
        {"activation": "jumprelu"},
        {"penalty": "tanh", "auxiliary": "preactivation", "aux_coefficient": 3e-6},
    ),
    "jumprelu_quadratic": (
        {"activation": "jumprelu"},
        {"penalty": "l0_target", "target_l0": 32.0, "auxiliary": "preactivation", "aux_coefficient": 3e-6},
    ),
    "topk": ({"activation": "topk"}, {"auxiliary": "auxk"}),
    "abstopk": ({"activation": "abstopk"}, {}),
    "batchtopk": ({"activation": "batchtopk"}, {"auxiliary": "auxk"}),
    "matching_pursuit": ({"activation": "matching_pursuit"}, {}),
    "matryoshka": ({"activation": "batchtopk"}, {"reconstruction": "matryoshka", "auxiliary": "auxk"}),
    "hierarchical_topk": ({"activation": "topk"}, {"reconstruction": "hierarchical", "auxiliary": "auxk"}),
    "switch": ({"activation": "switch"}, {"auxiliary": "load_balance", "aux_coefficient": 3.0}),
}


def architecture(
    name: str, d_in: int, d_sae: int, *, objective: Mapping[str, Any] | None = None, **fields: Any
) -> tuple[DictionaryConfig, Objective]:
    """The configuration that is known by a name, with the fields given changed.

    Args:
      name: a key of `ARCHITECTURES`.
      d_in: width of the activations.
      d_sae: number of latents.
      objective: fields of `Objective`.
      **fields: fields of `DictionaryConfig`.

    Raises:
      InputError: no such architecture, or fields that do not combine.
    """
    if name not in ARCHITECTURES:
        raise InputError(f"there is no architecture {name!r}; there are {', '.join(ARCHITECTURES)}")
    shape, preset = ARCHITECTURES[name]
    aims: dict[str, Any] = preset | dict(objective or {})
    if aims.get("reconstruction") == "matryoshka":
        aims = {"prefixes": default_prefixes(d_sae)} | aims
    config = DictionaryConfig(d_in, d_sae, **(shape | fields))
    chosen = Objective(**aims)
    check_combination(config, chosen)
    return config, chosen


def default_prefixes(d_sae: int, n: int = 5) -> tuple[int, ...]:
    """`n` prefixes, each twice as long as the one before, the last of d_sae latents."""
    return tuple(sorted({max(1, d_sae >> i) for i in range(n)}))


def check_combination(config: DictionaryConfig, objective: Objective) -> None:
    """Refuses what `COMBINATIONS` does not have.

    Raises:
      InputError: names the field, its value and the values that combine with the activation.
    """
    combines = COMBINATIONS[config.activation]
    for field, allowed in (
        ("reconstruction", combines.reconstructions),
        ("penalty", combines.penalties),
        ("auxiliary", combines.auxiliaries),
    ):
        if getattr(objective, field) not in allowed:
            raise InputError(
                f"{config.activation} does not combine with {field}={getattr(objective, field)!r}; "
                f"it does with {', '.join(allowed)}"
            )
    if objective.prefixes and objective.prefixes[-1] != config.d_sae:
        raise InputError(f"the last prefix must be d_sae={config.d_sae}, got {objective.prefixes}")
    if objective.auxiliary == "auxk" and objective.k_aux is not None and objective.k_aux > config.d_sae:
        raise InputError(f"k_aux={objective.k_aux} must be at most d_sae={config.d_sae}")
