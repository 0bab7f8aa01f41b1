"""Features: where a latent fires, what it does, and how well an explanation predicts it."""

from mi_jax.features.codes import Codes as Codes
from mi_jax.features.codes import encode_contexts as encode_contexts
from mi_jax.features.detection import Detection as Detection
from mi_jax.features.detection import TokenRule as TokenRule
from mi_jax.features.detection import auroc as auroc
from mi_jax.features.detection import detection as detection
from mi_jax.features.detection import fit_rule as fit_rule
from mi_jax.features.examples import deciles as deciles
from mi_jax.features.examples import token_effects as token_effects
from mi_jax.features.usefulness import next_token_nll as next_token_nll
from mi_jax.features.usefulness import removal_effects as removal_effects
