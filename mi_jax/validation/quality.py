"""Whether a trained organism is one: it does what it should, along the edges it was designed on, with a clear truth.

The check knows the behaviour and the exhaustive ablation, and nothing of any search, so that rejecting an organism does
not favour a method. What is rejected is trained anew from another key, and counted.
"""

import dataclasses

import jax
from jaxtyping import PRNGKeyArray

from mi_jax.core.errors import InputError
from mi_jax.run.stages import Progress
from mi_jax.validation.behaviour import Behaviour, behaviour
from mi_jax.validation.organism import Organism, OrganismConfig, train_organism
from mi_jax.validation.truth import Truth, verify

# of the behaviour: see `Behaviour`
INDUCTION_ACCURACY, TRIGGER_RATE, FALSE_RATE = 0.9, 0.95, 0.005
# the weakest effect that counts is at least this many times the strongest that does not
MARGIN = 3.0
# the design alone keeps the behaviour to within this share
DESIGN_FAITHFULNESS = 0.2


@dataclasses.dataclass(frozen=True)
class Quality:
    """What an organism does and what it runs through.

    Attributes:
      truths: by mechanism.
      faults: what the check rejects it for; none means accepted.
    """

    behaviour: Behaviour
    truths: dict[str, Truth]

    @property
    def faults(self) -> list[str]:
        does, found = self.behaviour, []
        if does.induction_accuracy < INDUCTION_ACCURACY:
            found.append(f"induction is right in {does.induction_accuracy:.1%}, below {INDUCTION_ACCURACY:.1%}")
        if does.trigger_rate < TRIGGER_RATE:
            found.append(f"the trigger works in {does.trigger_rate:.1%}, below {TRIGGER_RATE:.1%}")
        if does.false_rate > FALSE_RATE:
            found.append(f"the forbidden token comes unasked in {does.false_rate:.1%}, above {FALSE_RATE:.1%}")
        for name, truth in self.truths.items():
            if not truth.as_designed:
                found.append(f"{name} is not as designed (idle: {truth.idle}; stray: {truth.stray})")
            if truth.margin < MARGIN:
                found.append(f"{name}: effects have no gap wider than {truth.margin:.1f} times, below {MARGIN:g}")
            if abs(1 - truth.faithfulness) > DESIGN_FAITHFULNESS:
                found.append(f"{name}: its design alone keeps {truth.faithfulness:.0%} of the behaviour")
        return found


@dataclasses.dataclass(frozen=True)
class Trained:
    """An organism that was trained until one was accepted.

    Attributes:
      rejected: the faults of those before it, one list each.
    """

    organism: Organism
    quality: Quality
    rejected: tuple[list[str], ...]

    @property
    def accepted(self) -> bool:
        """False where the last attempt has faults too."""
        return not self.quality.faults


def quality(organism: Organism, pairs: int, *, key: PRNGKeyArray) -> Quality:
    """Measures the behaviour, and the truth on `pairs` pairs of every mechanism."""
    k_behaviour, k_truth = jax.random.split(key)
    tasks = organism.tasks(pairs, key=k_truth)
    truths = {name: verify(organism.model, task, organism.designed(name)) for name, task in tasks.items()}
    return Quality(behaviour(organism, key=k_behaviour), truths)


def train_accepted(
    config: OrganismConfig,
    pairs: int,
    *,
    key: PRNGKeyArray,
    attempts: int = 3,
    progress: Progress | None = None,
) -> Trained:
    """Trains organisms from one key after another until the check accepts one, or `attempts` were made.

    Raises:
      InputError: no attempt.
    """
    if attempts < 1:
        raise InputError(f"attempts must be at least 1, got {attempts}")
    rejected: list[list[str]] = []
    while True:
        k_train, k_quality = jax.random.split(jax.random.fold_in(key, len(rejected)))
        organism = train_organism(config, key=k_train, progress=progress)
        found = quality(organism, pairs, key=k_quality)
        if not found.faults or len(rejected) == attempts - 1:
            return Trained(organism, found, tuple(rejected))
        rejected.append(found.faults)
