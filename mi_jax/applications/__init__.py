"""Applications: monitoring, control, prediction."""

from mi_jax.applications.audit import Audit as Audit
from mi_jax.applications.audit import Dose as Dose
from mi_jax.applications.audit import SetScore as SetScore
from mi_jax.applications.audit import audit as audit
from mi_jax.applications.calibration import conformal_threshold as conformal_threshold
from mi_jax.applications.evaluation import auroc_interval as auroc_interval
from mi_jax.applications.evaluation import lead as lead
from mi_jax.applications.evaluation import rate as rate
from mi_jax.applications.evaluation import roc as roc
from mi_jax.applications.evaluation import sequence_scores as sequence_scores
from mi_jax.applications.monitor import Monitor as Monitor
from mi_jax.applications.probe import Probe as Probe
from mi_jax.applications.probe import fit_probe as fit_probe
