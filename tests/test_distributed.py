import sys

import jax
import pytest

from jspec import distributed
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
    distributed.initialize({"TPU_SKIP_MDS_QUERY": "1", "KUBERNETES_SERVICE_HOST": "10.0.0.1", "SLURM_NTASKS": "4"})
    assert joined == []


def test_by_hand(joined):
    distributed.initialize(BY_HAND | {"JAX_LOCAL_DEVICE_IDS": "1"})
    assert joined == [(("host:1", 2, 0), {"local_device_ids": [1], "cluster_detection_method": "deactivate"})]


def test_an_indexed_kubernetes_job_gives_the_id(joined):
    distributed.initialize({"JAX_COORDINATOR_ADDRESS": "job-0.jobs:1234", "JAX_NUM_PROCESSES": "3",
                            "JOB_COMPLETION_INDEX": "2"})
    assert joined[0][0] == ("job-0.jobs:1234", 3, 2)


@pytest.mark.parametrize("environment", [
    {"SLURM_STEP_NODELIST": "a,b", "SLURM_NTASKS": "2"},
    {"OMPI_COMM_WORLD_SIZE": "2"},
    {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
])
def test_schedulers_are_left_to_jax(joined, environment):
    distributed.initialize(environment)
    assert joined == [((), {"local_device_ids": None})]


def test_alone_on_a_slurm_node_a_process_has_all_its_gpus(joined):
    slurm = {"SLURM_STEP_NODELIST": "a,b", "SLURM_NTASKS": "2", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    distributed.initialize(slurm | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"})
    distributed.initialize(slurm | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)"})
    assert [call[1]["local_device_ids"] for call in joined] == [[0, 1, 2, 3], None]


@pytest.mark.parametrize(("change", "message"), [
    ({"JAX_COORDINATOR_ADDRESS": "host"}, "the coordinator must be HOST:PORT (--coordinator, JAX_COORDINATOR_ADDRESS), "
                                          "not 'host'"),
    ({"JAX_NUM_PROCESSES": "two"}, "the number of processes (--processes, JAX_NUM_PROCESSES) must be a whole number, "
                                   "not 'two'"),
    ({"JAX_PROCESS_ID": "2"}, "process id 2 is not below the number of processes, 2: ids count from 0"),
])
def test_bad_addresses(joined, change, message):
    with pytest.raises(InputError) as caught:
        distributed.initialize(BY_HAND | change)
    assert str(caught.value) == message


def test_an_id_that_is_missing(joined):
    with pytest.raises(InputError, match="a coordinator is given, host:1, but not the id of this process"):
        distributed.initialize({"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2"})


def test_two_real_processes_agree(capfd):
    code = (
        "from jspec import distributed\n"
        "distributed.initialize()\n"
        "import jax\n"
        "mine = jax.process_index() == 1\n"
        "print(distributed.is_main(), distributed.any_process(mine), distributed.any_process(False), flush=True)\n"
    )
    assert run(2, [sys.executable, "-c", code]) == 0
    out, err = capfd.readouterr()
    assert out.splitlines()[-1] == "True True False"
    assert "[1] False True False" in err
