"""The launchers, with a stand-in for uv that makes an environment whose Python tells what it was
run with."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = ROOT / "launch" / "tpu_or_gpu.sh"

UV = """#!/usr/bin/env bash
[ "$1" = --version ] && exit 0
echo "$*" >> "$LOG"
if [ "$1" = venv ]; then
  mkdir -p "$JSPEC_VENV/bin"
  cp "$TELLTALE" "$JSPEC_VENV/bin/python"
else
  sleep 0.2
  [ -z "$FAIL" ]
fi
"""

TELLTALE = f"""#!/usr/bin/env bash
[ "$1" = -c ] && exec {sys.executable} "$@"
echo "ran $$ in $PWD: $*; $JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID"
"""


@pytest.fixture
def machine(tmp_path):
    """Environment variables of a machine whose uv is the stand-in, which logs its calls in the file
    LOG."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("uv", UV), ("telltale", TELLTALE)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    clean = {key: value for key, value in os.environ.items()
             if not key.startswith(("JAX_", "JSPEC_", "KUBERNETES_"))}
    return clean | {"PATH": f"{tools}:{os.environ['PATH']}", "LOG": str(tmp_path / "log"),
                    "TELLTALE": str(tools / "telltale"), "PYTHON": sys.executable,
                    "JSPEC_VENV": str(tmp_path / "venv"), "JSPEC_ACCELERATOR": "cpu"}


def launch(machine, *arguments, cwd=ROOT):
    command = ["bash", LAUNCHER, *arguments]
    return subprocess.run(command, env=machine, cwd=cwd, timeout=60, capture_output=True, text=True)


@pytest.mark.parametrize("script", ["common.sh", "tpu_or_gpu.sh", "test.sh"])
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", ROOT / "launch" / script], check=True)


def test_without_arguments_the_quickstart_is_trained(machine):
    done = launch(machine, cwd="/")
    assert done.returncode == 0, done.stderr
    assert f"in {ROOT}: -m jspec train configs/quickstart.yaml;" in done.stdout


def test_config_and_overrides_are_passed_on(machine, tmp_path):
    (tmp_path / "mine.yaml").write_text("steps: 1\n")
    done = launch(machine, "steps=2", "mine.yaml", "data.system_prompt=be brief", cwd=tmp_path)
    assert (f"-m jspec train {tmp_path}/mine.yaml steps=2 data.system_prompt=be brief;"
            in done.stdout)


def test_the_workflow_pins_the_oldest_jax_named(machine, tmp_path):
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert steps[-1] == {"run": "bash launch/test.sh"}
    script = next(step["run"] for step in steps if step.get("name") == "pin the oldest JAX")
    said = tmp_path / "said"
    subprocess.run(["bash", "-e", "-c", script], cwd=ROOT, check=True, capture_output=True,
                   env=machine | {"RUNNER_TEMP": str(tmp_path), "GITHUB_ENV": str(said)})
    name, _, pins = said.read_text().strip().partition("=")
    oldest = re.search(r'"jax>=([\d.]+),', (ROOT / "pyproject.toml").read_text())[1]
    assert name == "UV_CONSTRAINT" and Path(pins).read_text() == f"jax=={oldest}\n"


def test_other_pins_are_another_installation(machine, tmp_path):
    pins = tmp_path / "pins.txt"
    for text in ("jax==0.10\n", "jax==0.11\n", "jax==0.11\n"):
        pins.write_text(text)
        assert launch(machine | {"UV_CONSTRAINT": str(pins)}).returncode == 0
    calls = Path(machine["LOG"]).read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["venv", "pip", "pip"]


def test_a_second_run_installs_nothing(machine):
    launch(machine)
    calls = Path(machine["LOG"]).read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["venv", "pip"]
    assert calls[1].endswith(f"--editable {ROOT}[cpu]")
    assert launch(machine).returncode == 0
    assert Path(machine["LOG"]).read_text().splitlines() == calls


def test_a_failed_installation_is_tried_again(machine):
    failed = launch(machine | {"FAIL": "1"})
    assert (failed.returncode == 2 and "the installation failed" in failed.stderr
            and "ran" not in failed.stdout)
    assert launch(machine).returncode == 0


@pytest.mark.parametrize("place", ["file/venv", "locked"])
def test_a_place_that_cannot_be_written_to_is_one_line(machine, tmp_path, place):
    (tmp_path / "file").touch()  # not a folder
    (tmp_path / "locked.lock").mkdir()  # not a file
    done = launch(machine | {"JSPEC_VENV": str(tmp_path / place)})
    assert done.returncode == 2 and done.stdout == ""
    culprit = tmp_path / ("file" if place == "file/venv" else "locked.lock")
    assert re.fullmatch(rf"jspec: error: {culprit} cannot be written to \(\d+ MB free in "
                        rf"{tmp_path}\); make room, or "
                        r"name another place: JSPEC_VENV=/path bash launch/\.\.\.\n", done.stderr)


def test_a_disk_that_is_full_in_the_end_is_said(machine, tmp_path):
    (tmp_path / "venv").mkdir()
    # writing fails, as on a full disk
    (tmp_path / "venv" / ".jspec-cpu").symlink_to(tmp_path / "nowhere" / "stamp")
    done = launch(machine)
    assert done.returncode == 2 and "ran" not in done.stdout
    assert (f"jspec: error: {tmp_path}/venv/.jspec-cpu cannot be written to ("
            in done.stderr.splitlines()[-1])


def test_what_is_installed_need_not_be_written_to(machine, tmp_path):
    launch(machine)
    (tmp_path / "venv.lock").unlink()
    (tmp_path / "venv.lock").mkdir()  # as in an installation that belongs to somebody else
    assert launch(machine).returncode == 0


def test_launches_at_the_same_time_install_once(machine):
    running = [subprocess.Popen(["bash", LAUNCHER], env=machine, stdout=subprocess.PIPE, text=True)
               for _ in range(3)]
    assert all("ran" in process.communicate(timeout=60)[0] for process in running)
    assert len(Path(machine["LOG"]).read_text().splitlines()) == 2


def test_the_program_takes_the_launchers_place_so_that_signals_reach_it(machine):
    launch(machine)
    process = subprocess.Popen(["bash", LAUNCHER], env=machine, stdout=subprocess.PIPE, text=True)
    assert f"ran {process.pid} " in process.communicate(timeout=60)[0]


def test_processes_by_hand(machine):
    done = launch(machine, "--processes", "4", "--coordinator", "10.0.0.1:1234", "--id", "3")
    assert done.stdout.strip().endswith("; 10.0.0.1:1234 4 3")


def test_local_processes(machine):
    assert ("-m jspec.local 2 train configs/quickstart.yaml;" in launch(machine, "--local",
                                                                        "2").stdout)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--fast"], "unknown option '--fast'; see --help"),
    (["--local"], "--local needs a value; see --help"),
    (["--local", "two"], "--local must be a whole number, not 'two'"),
    (["--local", "0"], "--local needs at least 1 process"),
    (["--processes", "2"], "--processes, --coordinator and --id go together"),
    (["a.yaml", "b.yaml"], "two configs: 'a.yaml' and 'b.yaml'"),
])
def test_bad_arguments(machine, arguments, message):
    done = launch(machine, *arguments)
    assert (done.returncode, done.stderr) == (2, f"jspec: error: {message}\n")


def test_no_python_is_said(machine):
    done = launch(machine | {"PYTHON": "/bin/false"})
    assert done.returncode == 2
    assert "Python 3.11 or newer is needed and none of these is one: /bin/false" in done.stderr


def test_an_unknown_accelerator_is_said(machine):
    done = launch(machine | {"JSPEC_ACCELERATOR": "abacus"})
    assert (done.returncode, done.stderr) == (
        2, "jspec: error: JSPEC_ACCELERATOR must be cpu, cuda, cuda12 or tpu, not 'abacus'\n")


@pytest.mark.parametrize(("driver", "accelerator"),
                         [("580.65.06", "cuda"), ("575.51.03", "cuda12")])
def test_the_gpu_driver_decides_which_cuda(machine, tmp_path, driver, accelerator):
    smi = tmp_path / "tools" / "nvidia-smi"
    smi.write_text(f'#!/bin/sh\n[ "$1" = -L ] && echo "GPU 0: H200" || echo {driver}\n')
    smi.chmod(0o755)
    found = find_accelerator(machine | {"JSPEC_ACCELERATOR": ""})
    assert found == accelerator


def test_a_tpu_is_found_by_its_environment(machine):
    if os.path.exists("/dev/nvidia0"):
        pytest.skip("this machine has a GPU, which is looked for first")
    assert (find_accelerator(machine | {"JSPEC_ACCELERATOR": "", "TPU_WORKER_HOSTNAMES": "a,b"})
            == "tpu")
    assert find_accelerator(machine | {"JSPEC_ACCELERATOR": "", "JAX_PLATFORMS": "cpu"}) == "cpu"


def find_accelerator(environment):
    command = f"source {ROOT}/launch/common.sh; find_accelerator"
    return subprocess.check_output(["bash", "-c", command], env=environment, text=True).strip()


def test_pip_brings_uv_where_there_is_none(machine, tmp_path):
    """With neither uv nor an importable pip the launcher says so; this machine's own uv is hidden
    from the path."""
    fake = tmp_path / "tools" / "python3"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    (tmp_path / "tools" / "uv").write_text("#!/bin/sh\nexit 1\n")
    log = tmp_path / "pip"
    python = tmp_path / "tools" / "python-with-pip"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\necho "$@" > {log}; exit 1\n')
    python.chmod(0o755)
    command = f"source {ROOT}/launch/common.sh; root={tmp_path}; find_uv {python}"
    done = subprocess.run(["bash", "-c", command], env=machine, capture_output=True, text=True)
    assert done.returncode == 2 and "pip could not install uv" in done.stderr
    assert log.read_text().strip().endswith(f"--target {tmp_path}/.venv.tools uv")
