"""Joins this process to the others of a SLURM, Open MPI, Kubernetes or TPU-pod job, through `jax.distributed`."""

import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

# jax takes a process for part of a SLURM job only if all of these are set, which `srun` does and `sbatch` does not.
_SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_GPU_VISIBILITY = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def maybe_initialize() -> bool:
    """Joins the job's other processes, if there are any; call it before anything that touches a device.

    Does nothing in a notebook, in a single process, and when called again. Under SLURM it also tells jax which of the
    node's GPUs are this task's: left alone, jax gives each task one GPU, so that one task on a node of 8 uses one.
    Each process prints `process i/n, local k/m devices`.

    Returns:
      Whether this process is one of several.

    Raises:
      ValueError: the tasks of a node cannot share its GPUs evenly.
    """
    if not jax.distributed.is_initialized():
        arguments = initialize_arguments(os.environ)
        if arguments is None:
            return False
        jax.distributed.initialize(**arguments)
        print(
            f"process {jax.process_index()}/{jax.process_count()}, "
            f"local {jax.local_device_count()}/{jax.device_count()} devices",
            flush=True,
        )
    return jax.process_count() > 1


def initialize_arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` should be called with in this environment; None if it should not be."""
    if _in_notebook():
        return None
    if all(name in environment for name in _SLURM_STEP):
        return _slurm_arguments(environment) if int(environment["SLURM_NTASKS"]) > 1 else None
    if int(environment.get("SLURM_NTASKS", "1")) > 1:
        print(
            f"This SLURM job has {environment['SLURM_NTASKS']} tasks, but srun did not start this process, so it runs "
            "alone. Start it with `srun python -m ...`.",
            flush=True,
        )
        return None
    if "OMPI_MCA_orte_hnp_uri" in environment:
        return {} if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1 else None
    if _on_tpu_pod(environment):
        return {}
    # An indexed job is the only kind of Kubernetes job that jax can join.
    return {} if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment else None


def _slurm_arguments(environment: Mapping[str, str]) -> dict[str, Any]:
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        return {}
    gpus = _visible_gpus(environment)
    if gpus == 0:
        return {}
    on_node = int(environment.get("SLURM_GPUS_ON_NODE", gpus))
    per_task = environment.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2]
    if gpus < on_node or per_task == str(gpus):
        # SLURM has bound GPUs to tasks, so that this task sees only its own.
        return {"local_device_ids": list(range(gpus))}
    tasks, task = _tasks_on_this_node(environment), int(environment["SLURM_LOCALID"])
    if gpus % tasks:
        raise ValueError(
            f"{tasks} tasks on this node cannot share its {gpus} GPUs evenly. Ask for one task per GPU, or one per "
            "node, or say which GPUs are this task's with JAX_LOCAL_DEVICE_IDS"
        )
    share = gpus // tasks
    return {"local_device_ids": list(range(task * share, (task + 1) * share))}


def _visible_gpus(environment: Mapping[str, str]) -> int:
    for name in _GPU_VISIBILITY:
        if name in environment:
            return len([gpu for gpu in environment[name].split(",") if gpu.strip() not in ("", "-1")])
    if "SLURM_GPUS_ON_NODE" in environment:
        return int(environment["SLURM_GPUS_ON_NODE"])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _tasks_on_this_node(environment: Mapping[str, str]) -> int:
    """From SLURM's run-length form, such as `8(x2),4`: two nodes with 8 tasks, then one with 4."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE"))
    if text is None:
        nodes = int(environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES", "1")))
        return max(int(environment["SLURM_NTASKS"]) // nodes, 1)
    counts: list[int] = []
    for run in text.split(","):
        tasks, _, repeats = run.rstrip(")").partition("(x")
        counts += [int(tasks)] * int(repeats or 1)
    return counts[min(int(environment.get("SLURM_NODEID", "0")), len(counts) - 1)]


def _on_tpu_pod(environment: Mapping[str, str]) -> bool:
    platforms = environment.get("JAX_PLATFORMS", "")
    if importlib.util.find_spec("libtpu") is None or (platforms and "tpu" not in platforms.split(",")):
        return False
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    if hosts is not None:
        return len(hosts.split(",")) > 1 or int(environment.get("MEGASCALE_NUM_SLICES", "1")) > 1
    # On a TPU VM jax asks the metadata server for the other hosts; on a machine without TPU chips it sets this.
    return "TPU_SKIP_MDS_QUERY" not in environment


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")
