"""Kernels are timed only where they are right, and compiled only where compilers are."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import kernel_cases, kernels, measure
from pallas_kernels.rejection_sampling import shapes
from tests.pallas_kernels.interpreters import PLAIN


def test_times_what_it_has_checked(tmp_path, capsys):
    path = tmp_path / "kernels.json"
    kernels.main(["--tiny", "--rounds", "1", "--shape", "bfloat16", "--json", str(path)])
    result = json.loads(path.read_text())
    assert [(r["kernel"], r["rule"]) for r in result["rows"]] == [
        *(("rejection_sampling", rule) for rule in kernel_cases.CASES), ("verify_attention", None)]
    assert all(r["of_floor"] > 0 and set(r["seconds"]) >= {"kernel", "xla"} for r in result["rows"])
    assert ("hash" in result["rows"][2]["seconds"] and result["kernels"]
            == "tpu kernels, interpreted")
    assert result["rows"][0]["bytes"] == 2 * 2 * 1024 * 2
    assert "of floor" in capsys.readouterr().out


def test_a_cpu_times_tiny_shapes_only(capsys):
    with pytest.raises(SystemExit):
        kernels.main([])
    assert "add --tiny" in capsys.readouterr().err


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    shape = shapes.Shape("tiny", 1024, 16, 2)
    true = kernels.judge

    def judge(implementation, args):
        if implementation == PLAIN:  # one more than the temperature that was asked for
            args = {**args, "temperature": args["temperature"] + 1}
        return true(implementation, args)

    monkeypatch.setattr(kernels, "judge", judge)
    case = kernel_cases.judging(shape, "rejection", jax.random.key(0))
    with pytest.raises(SystemExit, match="toy is wrong on this device and was not timed"):
        kernels.check_verdicts("toy", PLAIN, case)
    coupled = kernel_cases.judging(shape, "coupled", jax.random.key(0))
    coupled["temperature"] = jnp.zeros(16)
    monkeypatch.setattr(kernels, "judge",
                        lambda i, a: true(i, {**a, "temperature": a["temperature"] + (i == PLAIN)}))
    with pytest.raises(SystemExit, match="of a flat distribution are others"):
        kernels.check_noise("toy", PLAIN, coupled)


@pytest.mark.slow
def test_compiling_without_compilers(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(measure.ROOT)}
    code = ("import runpy, sys; from jax.experimental import topologies\n"
            "def missing(**_): raise RuntimeError('no plugin\\nat all')\n"
            "topologies.get_topology_desc = missing\n"
            "sys.argv = ['compile', '--chip', 'v5e']; runpy.run_module('benchmarks.compile', "
            "run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert (done.stderr.strip().splitlines()[-1] == (
        "no compiler for v5e: no plugin; pip install -e '.[aot]', and let one process use libtpu "
        "at a time"))
