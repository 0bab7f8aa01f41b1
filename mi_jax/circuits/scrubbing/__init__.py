"""Causal scrubbing: hypotheses as graphs of functions of the prompt, tested by resampling what they leave open."""

from mi_jax.circuits.scrubbing.hypothesis import Hypothesis as Hypothesis
from mi_jax.circuits.scrubbing.hypothesis import Interpretation as Interpretation
from mi_jax.circuits.scrubbing.hypothesis import Read as Read
from mi_jax.circuits.scrubbing.scrub import Scrubbing as Scrubbing
from mi_jax.circuits.scrubbing.scrub import causal_scrub as causal_scrub
