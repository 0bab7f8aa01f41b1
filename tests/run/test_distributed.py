"""What a process is told to join in faked job environments, and two real processes that join each other."""

import os
import socket
import subprocess
import sys
import types

import jax
import pytest

from mi_jax.run import distributed, maybe_initialize
from mi_jax.run.distributed import initialize_arguments

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}


def slurm(local_id: int = 0, **more: object) -> dict[str, str]:
    return STEP | {"SLURM_LOCALID": str(local_id)} | {name: str(value) for name, value in more.items()}


@pytest.fixture(autouse=True)
def no_tpu_library(monkeypatch):
    find_spec = distributed.importlib.util.find_spec
    monkeypatch.setattr(
        distributed.importlib.util, "find_spec", lambda name: None if name == "libtpu" else find_spec(name)
    )


@pytest.mark.parametrize(
    ("environment", "arguments"),
    [
        pytest.param({}, None, id="a single process"),
        pytest.param(slurm(SLURM_NTASKS=1), None, id="one SLURM task"),
        pytest.param(slurm(CUDA_VISIBLE_DEVICES=""), {}, id="SLURM without GPUs"),
        pytest.param(
            slurm(SLURM_STEP_TASKS_PER_NODE="1(x2)", SLURM_GPUS_ON_NODE=8, CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7"),
            {"local_device_ids": [0, 1, 2, 3, 4, 5, 6, 7]},
            id="one task per node of 8 GPUs gets all 8",
        ),
        pytest.param(
            slurm(1, SLURM_NTASKS=4, SLURM_STEP_TASKS_PER_NODE="2(x2)", SLURM_GPUS_ON_NODE=8),
            {"local_device_ids": [4, 5, 6, 7]},
            id="the second of two tasks gets the second half",
        ),
        pytest.param(
            slurm(3, SLURM_NTASKS=8, SLURM_STEP_TASKS_PER_NODE="4(x2)", SLURM_GPUS_ON_NODE=4),
            {"local_device_ids": [3]},
            id="one task per GPU",
        ),
        pytest.param(
            slurm(SLURM_NTASKS=9, SLURM_STEP_TASKS_PER_NODE="4(x2),1", SLURM_NODEID=2, SLURM_GPUS_ON_NODE=4),
            {"local_device_ids": [0, 1, 2, 3]},
            id="a node with fewer tasks than the others",
        ),
        pytest.param(
            slurm(2, SLURM_NTASKS=8, SLURM_STEP_TASKS_PER_NODE="4(x2)", SLURM_GPUS_ON_NODE=4, CUDA_VISIBLE_DEVICES="2"),
            {"local_device_ids": [0]},
            id="GPUs bound to tasks are numbered from 0 in each",
        ),
        pytest.param(
            slurm(2, SLURM_NTASKS=8, SLURM_GPUS_PER_TASK="a100:2", SLURM_GPUS_ON_NODE=2, CUDA_VISIBLE_DEVICES="4,5"),
            {"local_device_ids": [0, 1]},
            id="GPUs bound by --gpus-per-task",
        ),
        pytest.param(slurm(JAX_LOCAL_DEVICE_IDS="1", SLURM_GPUS_ON_NODE=4), {}, id="the user has said which devices"),
        pytest.param({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2"}, {}, id="Open MPI"),
        pytest.param({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, None, id="Open MPI with one process"),
        pytest.param({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, {}, id="an indexed GKE job"),
        pytest.param({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None, id="any other Kubernetes pod"),
    ],
)
def test_arguments(environment, arguments):
    assert initialize_arguments(environment) == arguments


@pytest.mark.parametrize(
    ("environment", "arguments"),
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, {}),
        ({}, {}),
        ({"TPU_SKIP_MDS_QUERY": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_tpu_pods(monkeypatch, environment, arguments):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: object())
    assert initialize_arguments(environment) == arguments


def test_tasks_that_cannot_share_the_gpus_are_told_so():
    environment = slurm(SLURM_NTASKS=3, SLURM_STEP_TASKS_PER_NODE="3", SLURM_GPUS_ON_NODE=8)
    with pytest.raises(ValueError, match="3 tasks on this node cannot share its 8 GPUs evenly"):
        initialize_arguments(environment)


def test_a_script_that_srun_did_not_start_says_so_and_runs_alone(capsys):
    environment = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert initialize_arguments(environment) is None
    assert "srun did not start this process, so it runs alone" in capsys.readouterr().out


def test_a_notebook_is_never_part_of_a_job(monkeypatch):
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert initialize_arguments(slurm()) is None


def test_a_single_process_is_left_alone(monkeypatch):
    monkeypatch.setattr(distributed, "initialize_arguments", lambda environment: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: pytest.fail("called"))
    assert maybe_initialize() is False


def test_two_processes_join_and_a_second_call_does_nothing():
    program = (
        "from mi_jax.run import maybe_initialize\n"
        "joined = [maybe_initialize(), maybe_initialize()]\n"
        "import jax\n"
        "print(joined, jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count())\n"
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def start(process: int) -> subprocess.Popen:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(process),
            "SLURM_LOCALID": str(process),
            "CUDA_VISIBLE_DEVICES": "",
            "JAX_COORDINATOR_PORT": str(port),
            "JAX_PLATFORMS": "cpu",
        }
        return subprocess.Popen(
            [sys.executable, "-c", program],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    processes = [start(0), start(1)]
    try:
        outputs = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for i, (out, err) in enumerate(outputs):
        assert out.splitlines() == [f"process {i}/2, local 2/4 devices", f"[True, True] {i} 2 2 4"], err
