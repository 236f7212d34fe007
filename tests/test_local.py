import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jspec import local
from jspec.local import run

TELL = ("import os, json; print(json.dumps({k: v for k, v in os.environ.items() if "
        "k.startswith('JAX_')}))")


def python(code):
    return [sys.executable, "-c", code]


def test_processes_know_each_other_and_output_is_told_apart(capfd):
    assert run(2, python(TELL)) == 0
    out, err = capfd.readouterr()
    first, second = json.loads(out), json.loads(err.removeprefix("[1] "))
    assert (first["JAX_PROCESS_ID"], second["JAX_PROCESS_ID"]) == ("0", "1")
    assert first["JAX_NUM_PROCESSES"] == second["JAX_NUM_PROCESSES"] == "2"
    assert first["JAX_COORDINATOR_ADDRESS"] == second["JAX_COORDINATOR_ADDRESS"]


def test_when_one_fails_it_is_named_and_the_others_are_stopped(capfd):
    start = time.monotonic()
    code = ("import os, sys, time; sys.exit(3) if os.environ['JAX_PROCESS_ID'] == '1' else "
            "time.sleep(60)")
    assert run(3, python(code)) == 3
    assert time.monotonic() - start < 10
    assert (capfd.readouterr().err
            == "jspec: process 1 of 3 ended with exit code 3; the others are stopped\n")


def test_a_killed_process_is_told_as_a_shell_would(capfd):
    code = ("import os, signal, time\n"
            "os.kill(os.getpid(), signal.SIGKILL) if os.environ['JAX_PROCESS_ID'] == '1' else "
            "time.sleep(60)")
    assert run(2, python(code)) == 128 + signal.SIGKILL
    assert (capfd.readouterr().err == ("jspec: process 1 of 2 was ended by SIGKILL (out of memory? "
                                       "the kernel's log says); the others are stopped\n"))


def test_of_those_that_end_together_the_killed_one_is_named(capsys):
    assert local._first_failure([1, -11, None], asked=[]) == -11
    assert (capsys.readouterr().err
            == "jspec: process 1 of 3 was ended by SIGSEGV; the others are stopped\n")


def test_mistakes_and_ends_that_were_asked_for_are_not_named(capsys):
    assert local._first_failure([2, 2], asked=[]) == 2
    assert local._first_failure([None, 143], asked=[signal.SIGTERM]) == 143
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("arguments", [[], ["two"], ["0"], ["-1"]])
def test_a_count_that_is_none(capsys, arguments):
    assert local.main(arguments) == 2
    assert "jspec: error: usage: python -m jspec.local N" in capsys.readouterr().err


def test_signals_reach_every_process(tmp_path):
    child = (
        "import os, pathlib, signal, sys, time\n"
        f"here = pathlib.Path({str(tmp_path)!r}, os.environ['JAX_PROCESS_ID'])\n"
        "signal.signal(signal.SIGTERM, lambda *_: (here.write_text('stopped'), sys.exit(0)))\n"
        "here.write_text('ready'); time.sleep(60)\n"
    )
    parent = ("import sys; from jspec.local import run; sys.exit(run(2, [sys.executable, '-c', "
              f"{child!r}]))")
    process = subprocess.Popen(python(parent))
    files = [tmp_path / "0", tmp_path / "1"]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    assert [file.read_text() for file in files] == ["stopped", "stopped"]


@pytest.mark.skipif(not shutil.which("setpriv"), reason="the machine has no setpriv")
def test_when_the_launcher_is_killed_nothing_stays_behind(tmp_path):
    child = (
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path)!r}, "
        "os.environ['JAX_PROCESS_ID']).write_text(str(os.getpid())); time.sleep(60)\n"
    )
    parent = ("import sys; from jspec.local import run; sys.exit(run(2, [sys.executable, '-c', "
              f"{child!r}]))")
    process = subprocess.Popen(python(parent))
    files = [tmp_path / "0", tmp_path / "1"]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    process.kill()
    process.wait()
    wait_for(lambda: not any(alive(int(file.read_text())) for file in files))


def alive(pid):
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
