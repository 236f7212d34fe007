import os
import re
import signal
import subprocess
import sys
import types

import jax
import pytest

from jspec import distributed, local
from jspec.errors import InputError
from jspec.local import run

BY_HAND = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}


@pytest.fixture
def joined(monkeypatch):
    """Calls of jax.distributed.initialize, which is not carried out."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    return calls


def test_alone_nothing_is_joined(joined):
    distributed.initialize({"TPU_SKIP_MDS_QUERY": "1", "KUBERNETES_SERVICE_HOST": "10.0.0.1",
                            "SLURM_NTASKS": "4"})
    assert joined == []


def test_by_hand(joined):
    distributed.initialize(BY_HAND | {"JAX_LOCAL_DEVICE_IDS": "1"})
    assert joined[0][0] == ("host:1", 2, 0)
    assert (joined[0][1].items()
            >= {"local_device_ids": [1], "cluster_detection_method": "deactivate"}.items())


def test_an_indexed_kubernetes_job_gives_the_id(joined):
    distributed.initialize({"JAX_COORDINATOR_ADDRESS": "job-0.jobs:1234", "JAX_NUM_PROCESSES": "3",
                            "JOB_COMPLETION_INDEX": "2"})
    assert joined[0][0] == ("job-0.jobs:1234", 3, 2)


SLURM = {"SLURM_STEP_NODELIST": "a,b", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
         "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:1"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}


@pytest.fixture
def kubernetes(monkeypatch):
    """The package is installed."""
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name == "kubernetes")


@pytest.mark.parametrize("environment", [SLURM, OPEN_MPI, KUBERNETES])
def test_schedulers_are_left_to_jax(joined, kubernetes, environment):
    distributed.initialize(environment)
    assert [(args, kwargs["local_device_ids"]) for args, kwargs in joined] == [((), None)]


def test_alone_on_a_slurm_node_a_process_has_all_its_gpus(joined):
    slurm = SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    distributed.initialize(slurm | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"})
    distributed.initialize(slurm | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)"})
    assert [call[1]["local_device_ids"] for call in joined] == [[0, 1, 2, 3], None]


ALONE = {"TPU_SKIP_MDS_QUERY": "1"}


@pytest.mark.parametrize(("environment", "message"), [
    (ALONE | {"JAX_NUM_PROCESSES": "2"}, "the number of processes (--processes, JAX_NUM_PROCESSES) "
     "is given, 2, but not the coordinator (--coordinator, JAX_COORDINATOR_ADDRESS)"),
    (ALONE | {"JAX_PROCESS_ID": "0"}, "the id of this process (--id, JAX_PROCESS_ID) is given, 0, "
     "but not the coordinator (--coordinator, JAX_COORDINATOR_ADDRESS)"),
    (BY_HAND | {"JAX_LOCAL_DEVICE_IDS": "0,one"},
     "JAX_LOCAL_DEVICE_IDS must be a whole number, not 'one'"),
    (SLURM | {"SLURM_NTASKS": "two"}, "SLURM_NTASKS must be a whole number, not 'two'"),
    (SLURM | {"SLURM_PROCID": "-1"}, "SLURM_PROCID must be a whole number, not '-1'"),
    (SLURM | {"SLURM_PROCID": "2"},
     "SLURM_PROCID=2 and SLURM_LOCALID=0 must be below SLURM_NTASKS=2"),
    (SLURM | {"SLURM_JOB_ID": ""}, "SLURM started 2 processes (SLURM_NTASKS), but SLURM_JOB_ID is "
     "not set; start the processes by hand: --processes N --coordinator HOST:PORT --id I"),
    (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": ""},
     "OMPI_COMM_WORLD_SIZE must be a whole number, not ''"),
    (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": ""}, "but OMPI_MCA_orte_hnp_uri is not set"),
    (KUBERNETES | {"JOB_COMPLETION_INDEX": "last"},
     "JOB_COMPLETION_INDEX must be a whole number, not 'last'"),
])
def test_variables_that_are_incomplete_or_no_numbers(joined, kubernetes, environment, message):
    with pytest.raises(InputError, match=re.escape(message)):
        distributed.initialize(environment)
    assert joined == []


def test_kubernetes_without_its_package(joined, monkeypatch):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the package kubernetes, which is not installed"):
        distributed.initialize(KUBERNETES)


def test_what_jax_cannot_join_is_one_line(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("UNKNOWN: Failed to start\n  RPC server")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(InputError) as caught:
        distributed.initialize(BY_HAND)
    assert (str(caught.value) == ("the processes cannot meet (given by hand): UNKNOWN: Failed to "
                                  "start RPC server; give --coordinator another port"))
    with pytest.raises(InputError, match="cannot meet .SLURM, SLURM_JOB_ID=seven, "
                       "SLURM_STEP_NODELIST=.*by hand"):
        distributed.initialize(SLURM | {"SLURM_JOB_ID": "seven"})


def test_processes_that_do_not_come_are_given_up():
    first, second = waiting_process(0, seconds=1), waiting_process(1, seconds=1)
    for (process, address), answer in (
        (first, "process 0 answers, others are missing; start them, each with an id of its own"),
        (second, "nobody answers there (Connection refused); process 0 must run on that machine, "
         "and the others must reach the port")):
        assert process.wait(timeout=60) == 2
        assert (process.stderr.read()
                == f"jspec: error: all 2 processes have not met at {address} after 1 s: {answer}\n")


def test_a_signal_ends_the_waiting():
    process, address = waiting_process(1, seconds=1000)
    assert process.stderr.readline() == f"jspec: waiting for the other processes at {address} ...\n"
    process.terminate()
    assert process.wait(timeout=60) == -signal.SIGTERM


def waiting_process(index, seconds):
    """(process `index` of two, of which there is no other, its coordinator's address)."""
    address = f"127.0.0.1:{local._free_port()}"
    code = ("from jspec import distributed, progress\n"
            f"distributed.WAIT_S = {seconds}\n"
            f"progress.AFTER_S = {0 if seconds > 1 else 1000}\n"
            "distributed.initialize()\n")
    by_hand = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2",
               "JAX_PROCESS_ID": str(index)}
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | by_hand, text=True,
                               stderr=subprocess.PIPE)
    return process, address


def test_a_platform_that_is_not_there():
    code = ("from jspec.cli import main; raise SystemExit(main(['rollout', 'smollm3', '--prompt', "
            "'x']))")
    done = subprocess.run([sys.executable, "-c", code], env=os.environ
                          | {"JAX_PLATFORMS": "nonsense"}, text=True, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.startswith("jspec: error: JAX_PLATFORMS=nonsense is not here, or jspec was "
                                  "installed without it (Unable to initialize backend 'nonsense'")
    assert done.stderr.count("\n") == 1


def test_cuda_without_its_plugin_is_not_there_either(monkeypatch):
    def fail():
        raise AssertionError  # as JAX does

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setattr(distributed.jax, "config", types.SimpleNamespace(jax_platforms="cuda"))
    with pytest.raises(InputError, match="JAX_PLATFORMS=cuda is not here"):
        distributed.check_platform()


@pytest.mark.parametrize(("change", "message"), [
    ({"JAX_COORDINATOR_ADDRESS": "host"},
     "the coordinator must be HOST:PORT (--coordinator, JAX_COORDINATOR_ADDRESS), not 'host'"),
    ({"JAX_NUM_PROCESSES": "two"},
     "the number of processes (--processes, JAX_NUM_PROCESSES) must be a whole number, not 'two'"),
    ({"JAX_PROCESS_ID": "2"},
     "process id 2 is not below the number of processes, 2: ids count from 0"),
])
def test_bad_addresses(joined, change, message):
    with pytest.raises(InputError) as caught:
        distributed.initialize(BY_HAND | change)
    assert str(caught.value) == message


def test_an_id_that_is_missing(joined):
    with pytest.raises(InputError, match="is given, host:1, but not the id of this process"):
        distributed.initialize({"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2"})


def test_two_real_processes_agree(capfd):
    code = (
        "from jspec import distributed\n"
        "distributed.initialize()\n"
        "import jax\n"
        "mine = jax.process_index() == 1\n"
        "print(distributed.is_main(), distributed.any_process(mine), "
        "distributed.any_process(False), flush=True)\n"
    )
    assert run(2, [sys.executable, "-c", code]) == 0
    out, err = capfd.readouterr()
    assert out.splitlines()[-1] == "True True False"
    assert "[1] False True False" in err
