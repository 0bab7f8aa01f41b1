"""Circuits: the computational graph, edge scores, search and faithfulness."""

from mi_jax.circuits.discover import Circuit as Circuit
from mi_jax.circuits.discover import discover as discover
from mi_jax.circuits.faithfulness import FRACTIONS as FRACTIONS
from mi_jax.circuits.faithfulness import Curve as Curve
from mi_jax.circuits.faithfulness import curve as curve
from mi_jax.circuits.faithfulness import faithfulness as faithfulness
from mi_jax.circuits.faithfulness import random_curves as random_curves
from mi_jax.circuits.faithfulness import random_edges as random_edges
from mi_jax.circuits.faithfulness import top_edges as top_edges
from mi_jax.circuits.graph import Graph as Graph
from mi_jax.circuits.masked import masked_forward as masked_forward
from mi_jax.circuits.masked import source_outputs as source_outputs
from mi_jax.circuits.scores import edge_scores as edge_scores
