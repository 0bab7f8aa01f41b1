"""Sparse dictionaries of activations: their training, their null baselines and their evaluation."""

from mi_jax.decomposition.baselines import PCA as PCA
from mi_jax.decomposition.baselines import fit_pca as fit_pca
from mi_jax.decomposition.baselines import fit_random_decoder as fit_random_decoder
from mi_jax.decomposition.evaluate import Dictionary as Dictionary
from mi_jax.decomposition.evaluate import Estimate as Estimate
from mi_jax.decomposition.evaluate import Evaluation as Evaluation
from mi_jax.decomposition.evaluate import cross_entropy_recovered as cross_entropy_recovered
from mi_jax.decomposition.evaluate import evaluate as evaluate
from mi_jax.decomposition.massive import massive as massive
from mi_jax.decomposition.sae import SAE as SAE
from mi_jax.decomposition.sae import SAEConfig as SAEConfig
from mi_jax.decomposition.sae import init as init
from mi_jax.decomposition.sae import logical_axes as logical_axes
from mi_jax.decomposition.sae import loss as loss
from mi_jax.decomposition.sparse import sparse_decode as sparse_decode
from mi_jax.decomposition.sparse import topk_encode as topk_encode
from mi_jax.decomposition.splice import Splice as Splice
from mi_jax.decomposition.train import TrainConfig as TrainConfig
from mi_jax.decomposition.train import TrainState as TrainState
from mi_jax.decomposition.train import fit as fit
from mi_jax.decomposition.train import train_step as train_step
