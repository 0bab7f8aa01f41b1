"""Files of edge scores and circuits, ours and others'.

`.json` is EAP-IG's graph, which MIB takes too; `.safetensors` has the same arrays on our own graph, without loss.
"""

from mi_jax.circuits.formats.eap_ig import read_eap_ig as read_eap_ig
from mi_jax.circuits.formats.eap_ig import write_eap_ig as write_eap_ig
from mi_jax.circuits.formats.edge_file import EdgeFile as EdgeFile
from mi_jax.circuits.formats.tensors import read_tensors as read_tensors
from mi_jax.circuits.formats.tensors import write_tensors as write_tensors
