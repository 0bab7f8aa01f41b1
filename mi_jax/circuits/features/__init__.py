"""Attribution graphs and circuits of features: dictionaries in place of what a model computes."""

from mi_jax.circuits.features.attribution import attribution_graph as attribution_graph
from mi_jax.circuits.features.edges import feature_edges as feature_edges
from mi_jax.circuits.features.effects import FeatureEffects as FeatureEffects
from mi_jax.circuits.features.effects import feature_effects as feature_effects
from mi_jax.circuits.features.faithfulness import FeatureFaithfulness as FeatureFaithfulness
from mi_jax.circuits.features.faithfulness import feature_faithfulness as feature_faithfulness
from mi_jax.circuits.features.faithfulness import random_nodes as random_nodes
from mi_jax.circuits.features.graph import AttributionGraph as AttributionGraph
from mi_jax.circuits.features.graph import PrunedGraph as PrunedGraph
from mi_jax.circuits.features.intervention import FeatureRun as FeatureRun
from mi_jax.circuits.features.intervention import set_features as set_features
from mi_jax.circuits.features.replacement import ReplacementModel as ReplacementModel
from mi_jax.circuits.features.replacement import replacement_model as replacement_model
from mi_jax.circuits.features.sparse_feature_circuits import FeatureCircuit as FeatureCircuit
from mi_jax.circuits.features.sparse_feature_circuits import sparse_feature_circuit as sparse_feature_circuit
from mi_jax.circuits.features.spliced import SplicedModel as SplicedModel
from mi_jax.circuits.features.spliced import splice_dictionaries as splice_dictionaries
