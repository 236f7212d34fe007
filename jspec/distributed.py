"""One program over many processes: joins them before JAX touches a device, and says who is who.

Where the processes come from:

- by hand, and `jspec.local`: JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and
  JAX_PROCESS_ID;
- SLURM (srun), Open MPI, Cloud TPU pods and indexed Kubernetes jobs: JAX detects them by itself. On
  Kubernetes it asks the cluster's API, which needs the package `kubernetes` (extra k8s) and a
  service account that may read its pods.
"""

import glob
import importlib.util
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import jax
import numpy as np

from jspec.errors import InputError, shortened
from jspec.progress import say, telling

WAIT_S = 300.0
"""How long the processes wait for each other: the slowest one may still be installing."""

BY_HAND = "start the processes by hand: --processes N --coordinator HOST:PORT --id I"

T = TypeVar("T")


def initialize(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes, where the environment says that there are any and it has not yet
    been done. Call it before any JAX computation.

    Ends this process with one line and exit code 2 if the others have not come after WAIT_S, and at
    once by SIGINT or SIGTERM. Raises InputError if what the environment says of the processes is
    incomplete or makes no sense.
    """
    if jax.distributed.is_initialized():
        return
    by_hand, scheduler = _by_hand(environment), _scheduler(environment)
    if by_hand is None and scheduler is None:
        return
    devices = _device_ids(environment)
    try:
        if by_hand is not None:
            address, count, index = by_hand
            with _waiting_for_others(address, count):
                jax.distributed.initialize(address, count, index, local_device_ids=devices,
                                           cluster_detection_method="deactivate",
                                           initialization_timeout=_LONGER_S)
        else:
            with _waiting_for_others(f"the coordinator that {scheduler} names", None):
                jax.distributed.initialize(local_device_ids=devices or _all_devices_of_the_node(
                    environment), initialization_timeout=_LONGER_S)
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        # of a port in use, of the cluster's API, ...
        how, remedy = ("given by hand", "give --coordinator another port") if by_hand else (
            _told_by(scheduler, environment), BY_HAND)
        raise InputError(f"the processes cannot meet ({how}): {_one_line(error)}; "
                         f"{remedy}") from error


def check_platform() -> None:
    """Raises InputError if the platform that JAX_PLATFORMS names is not there."""
    if not jax.config.jax_platforms:
        return
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        # CUDA without its plugin trips over an assertion
        raise InputError(f"JAX_PLATFORMS={jax.config.jax_platforms} is not here, or jspec was "
                         f"installed without it ({_one_line(error)}); unset the variable, and JAX "
                         "takes what there is") from error


def is_main() -> bool:
    """Whether this process is the one that prints, logs and writes what is written once."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether any process raised its flag. All processes must call it: they agree on when to stop,
    for example."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def on_main(act: Callable[[], T]) -> T | None:
    """What `act` gives on the main process, None on the others. All processes must call it: where
    it raises InputError all of them do."""
    made, refusal = None, None
    if is_main():
        try:
            made = act()
        except InputError as error:
            refusal = error
    if any_process(refusal is not None):
        raise refusal or InputError("refused; process 0 says why")
    return made


def from_main(act: Callable[[], str]) -> str:
    """The text that `act` gives on the main process, on all of them. All processes must call it."""
    if jax.process_count() == 1:
        return act()
    from jax.experimental.multihost_utils import broadcast_one_to_all

    text = np.frombuffer(act().encode() if is_main() else b"", np.uint8)
    size = int(broadcast_one_to_all(np.int32(len(text))))
    return bytes(np.asarray(broadcast_one_to_all(np.resize(text, size)))).decode()


def fetch(tree: Any) -> Any:
    """Arrays as NumPy's, whole on every process. All processes must call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental.multihost_utils import process_allgather

    return jax.tree.map(lambda x: process_allgather(x, tiled=True), tree)


# --- waiting ---

_LONGER_S = 2 * int(WAIT_S)  # JAX's own patience ends with a stack trace


@contextmanager
def _waiting_for_others(address: str, count: int | None) -> Iterator[None]:
    """While JAX joins the processes, in C++, where no handler of Python's is heard and the end is
    an abort."""
    def give_up() -> None:
        whom = "the other processes" if count is None else f"all {count} processes"
        say(f"error: {whom} have not met at {address} after {WAIT_S:.0f} s: {_answer(address)}")
        sys.stderr.flush()
        os._exit(2)

    timer = threading.Timer(WAIT_S, give_up)
    timer.daemon = True
    with ExitStack() as stack:
        stack.enter_context(telling(f"waiting for the other processes at {address}"))
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.signal(number, signal.SIG_DFL))
        stack.callback(timer.cancel)
        timer.start()
        yield


def _answer(address: str) -> str:
    """Whether anybody answers there, and what to look at."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return "look at what the first process says"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return (f"nobody answers there ({error.strerror or error}); process 0 must run on that "
                "machine, and the others must reach the port")
    return "process 0 answers, others are missing; start them, each with an id of its own"


# --- what the environment says ---


def _by_hand(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """(coordinator's address, number of processes, index of this one), or None if nobody gave
    them."""
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    index = (environment.get("JAX_PROCESS_ID")
             or (environment.get("JOB_COMPLETION_INDEX") if address else None))
    given = {"coordinator (--coordinator, JAX_COORDINATOR_ADDRESS)": address,
             "number of processes (--processes, JAX_NUM_PROCESSES)": environment.get(
                 "JAX_NUM_PROCESSES"), "id of this process (--id, JAX_PROCESS_ID)": index}
    there, missing = [name for name in given
                      if given[name]], [name for name in given if not given[name]]
    if not there:
        return None
    if missing:
        raise InputError(f"the {there[0]} is given, {given[there[0]]}, but not the {missing[0]}")
    if (not re.fullmatch(r".+:[0-9]{1,5}", address) or not 0 < int(address.rpartition(":")[2])
        < 2**16):
        raise InputError("the coordinator must be HOST:PORT (--coordinator, "
                         f"JAX_COORDINATOR_ADDRESS), not '{address}'")
    count, index = (_number(f"the {name}", given[name]) for name in there[1:])
    if index >= count:
        raise InputError(f"process id {index} is not below the number of processes, {count}: ids "
                         "count from 0")
    return address, count, index


SCHEDULERS = {
    "SLURM": ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID",
              "SLURM_STEP_NODELIST"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK",
                 "OMPI_MCA_orte_hnp_uri"),
}
"""The variables that JAX needs of each: number of processes, index, index on the node, and where
the others are."""


def _scheduler(environment: Mapping[str, str]) -> str | None:
    """What started several processes, or None if this is the only one.

    Raises InputError for variables that are incomplete or no numbers.
    """
    if "SLURM_STEP_NODELIST" in environment and _several("SLURM", environment):
        return "SLURM"
    if "OMPI_COMM_WORLD_SIZE" in environment and _several("Open MPI", environment):
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        _number("JOB_COMPLETION_INDEX", environment["JOB_COMPLETION_INDEX"])
        if not importlib.util.find_spec("kubernetes"):
            raise InputError("in an indexed Kubernetes job JAX needs the package kubernetes, "
                             f"which is not installed: pip install -e '.[k8s]', or {BY_HAND}")
        return "Kubernetes"
    # JAX sets TPU_SKIP_MDS_QUERY on import where it sees no TPU; on a Cloud TPU it finds the other
    # hosts by itself.
    if "TPU_SKIP_MDS_QUERY" not in environment and importlib.util.find_spec("libtpu"):
        return "Cloud TPU"
    return None


def _several(scheduler: str, environment: Mapping[str, str]) -> bool:
    size, rank, local, *where = SCHEDULERS[scheduler]
    if _number(size, environment.get(size, "1")) < 2:
        return False
    for name in (rank, local, *where):
        if not environment.get(name):
            raise InputError(f"{scheduler} started {environment[size]} processes ({size}), but "
                             f"{name} is not set; {BY_HAND}")
    if (max(_number(rank, environment[rank]), _number(local, environment[local]))
        >= int(environment[size])):
        raise InputError(f"{rank}={environment[rank]} and {local}={environment[local]} must be "
                         f"below {size}={environment[size]}; {BY_HAND}")
    return True


def _told_by(scheduler: str, environment: Mapping[str, str]) -> str:
    """The scheduler, with what it says of where the processes are: JAX does not name what it cannot
    read of that."""
    _, _, _, *where = SCHEDULERS.get(scheduler, (None, None, None))
    return ", ".join([scheduler, *(f"{name}={shortened(environment[name])}" for name in where)])


def _number(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise InputError(f"{name} must be a whole number, not '{text}'")
    return int(text)


def _all_devices_of_the_node(environment: Mapping[str, str]) -> list[int] | None:
    # Under SLURM, JAX gives a process the one GPU that has its local index; alone on its node it
    # should have all.
    alone = re.fullmatch(r"1(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if not alone:
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    count = len(visible.split(",")) if visible else len(glob.glob("/dev/nvidia[0-9]*"))
    return list(range(count)) or None


def _device_ids(environment: Mapping[str, str]) -> list[int] | None:
    """The devices of this process alone, or None for all."""
    texts = [text for text in environment.get("JAX_LOCAL_DEVICE_IDS", "").split(",") if text]
    return [_number("JAX_LOCAL_DEVICE_IDS", text) for text in texts] or None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
