"""How pre-activations become sparse codes."""

from mi_jax.decomposition.activations.base import Activation as Activation
from mi_jax.decomposition.activations.base import Chosen as Chosen
from mi_jax.decomposition.activations.elementwise import Gated as Gated
from mi_jax.decomposition.activations.elementwise import JumpReLU as JumpReLU
from mi_jax.decomposition.activations.elementwise import ReLU as ReLU
from mi_jax.decomposition.activations.pursuit import MatchingPursuit as MatchingPursuit
from mi_jax.decomposition.activations.switch import Switch as Switch
from mi_jax.decomposition.activations.top import AbsTopK as AbsTopK
from mi_jax.decomposition.activations.top import BatchTopK as BatchTopK
from mi_jax.decomposition.activations.top import TopK as TopK
