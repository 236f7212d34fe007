"""One program over many processes: joins them before JAX touches a device, and says who is who.

Where the processes come from:

- by hand, and `jspec.local`: JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID;
- SLURM (srun), Open MPI, Cloud TPU pods and indexed Kubernetes jobs: JAX detects them by itself. On Kubernetes it asks
  the cluster's API, which needs the package `kubernetes` (extra k8s) and a service account that may read its pods.
"""

import glob
import importlib.util
import os
import re
from collections.abc import Mapping

import jax
import numpy as np

from jspec.errors import InputError


def initialize(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes, where the environment says that there are any. Call it before any JAX computation.

    Raises InputError if the addresses given by hand are incomplete or make no sense.
    """
    by_hand = _by_hand(environment)
    if by_hand is not None:
        address, count, index = by_hand
        devices = _numbers(environment.get("JAX_LOCAL_DEVICE_IDS", ""))
        jax.distributed.initialize(address, count, index, local_device_ids=devices or None,
                                   cluster_detection_method="deactivate")
    elif _scheduler(environment) is not None:
        jax.distributed.initialize(local_device_ids=_all_devices_of_the_node(environment))


def is_main() -> bool:
    """Whether this process is the one that prints, logs and writes what is written once."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether any process raised its flag. All processes must call it: they agree on when to stop, for example."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def _by_hand(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        return None
    texts = {
        "number of processes (--processes, JAX_NUM_PROCESSES)": environment.get("JAX_NUM_PROCESSES"),
        "id of this process (--id, JAX_PROCESS_ID)":
            environment.get("JAX_PROCESS_ID", environment.get("JOB_COMPLETION_INDEX")),
    }
    if not re.fullmatch(r".+:\d+", address):
        raise InputError(f"the coordinator must be HOST:PORT (--coordinator, JAX_COORDINATOR_ADDRESS), not '{address}'")
    for what, text in texts.items():
        if text is None:
            raise InputError(f"a coordinator is given, {address}, but not the {what}")
        if not re.fullmatch(r"\d+", text):
            raise InputError(f"the {what} must be a whole number, not '{text}'")
    count, index = (int(text) for text in texts.values())
    if index >= count:
        raise InputError(f"process id {index} is not below the number of processes, {count}: ids count from 0")
    return address, count, index


def _scheduler(environment: Mapping[str, str]) -> str | None:
    """What started several processes, or None if this is the only one."""
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        return "slurm"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "open mpi"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "kubernetes"
    # JAX sets TPU_SKIP_MDS_QUERY on import where it sees no TPU; on a Cloud TPU it finds the other hosts by itself.
    if "TPU_SKIP_MDS_QUERY" not in environment and importlib.util.find_spec("libtpu"):
        return "tpu"
    return None


def _all_devices_of_the_node(environment: Mapping[str, str]) -> list[int] | None:
    # Under SLURM, JAX gives a process the one GPU that has its local index; alone on its node it should have all.
    alone = re.fullmatch(r"1(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if not alone:
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    count = len(visible.split(",")) if visible else len(glob.glob("/dev/nvidia[0-9]*"))
    return list(range(count)) or None


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
