"""The benchmarks run, and count what they claim to count."""

import json

import jax
import numpy as np
import pytest

import jspec
from benchmarks import measure, rollout, synthetic
from benchmarks.shapes import SHAPES
from jspec.speculate.types import NOISE


@pytest.fixture(autouse=True)
def no_rule_stays():
    """A rule that a benchmark adds is not there for the tests of other files."""
    before = dict(NOISE)
    yield
    NOISE.clear()
    NOISE.update(before)


@pytest.mark.slow
def test_times_every_variant_and_writes_data(tmp_path, capsys):
    path = tmp_path / "result.json"
    rollout.main(["--shape", "tiny", "--batch", "2", "--prompt-tokens", "16", "--new-tokens", "8",
                  "--drafts", "ngram",
                  "--k", "2", "--acceptance", "1.0", "--rounds", "1", "--json", str(path)])
    result = json.loads(path.read_text())
    plain, free, ngram = result["rows"]
    assert (plain["draft"], free["draft"], ngram["draft"]) == ("none", "synthetic", "ngram")
    assert plain["cycles"] == 8 and plain["speedup"] == 1.0
    # every draft accepted: 8 tokens at three a cycle
    assert free["cycles"] == ngram["cycles"] == 3
    assert ngram["accepted_by_position"] == [1.0, 1.0]
    assert result["commit"] and result["machine"]["cores"] and result["copy_gb_per_s"] > 0
    assert "speed-up" in capsys.readouterr().out


def test_a_result_says_the_command_that_made_it(monkeypatch):
    monkeypatch.setattr("sys.argv", [str(measure.ROOT / "benchmarks" / "kernels.py"), "--tiny"])
    assert measure.command() == "python -m benchmarks.kernels --tiny"
    monkeypatch.setattr("sys.argv", ["jspec bench tail", "MODEL"])
    assert measure.command() == "jspec bench tail MODEL"


@pytest.mark.parametrize("acceptance", [(0.0,), (0.75, 0.25)])
def test_synthetic_acceptance_is_what_was_asked_for(acceptance):
    policy = jspec.init_policy(SHAPES["tiny"], jax.random.key(0))
    batch = jspec.PromptBatch.from_tokens([[1, 2, 3]], group_size=256, seed=1)
    out = jspec.rollout(policy, synthetic.free.init(policy), batch,
                        sampling=jspec.Sampling(max_new_tokens=12, stop_tokens=()),
                        speculation=jspec.Speculation(k=2, rule=synthetic.add_rule(acceptance)))
    drafted, accepted = np.asarray(out.stats.drafted), np.asarray(out.stats.accepted)
    rates = np.array([acceptance[0], acceptance[0] * acceptance[-1]])
    spread = np.sqrt(rates * (1 - rates) / drafted)
    assert np.all(np.abs(accepted / drafted - rates) <= 4 * spread)
    if acceptance == (0.0,):
        assert float(out.acceptance_length) == 1.0


def test_counts_the_bytes_a_step_reads():
    config = SHAPES["tiny"]
    policy = jspec.reshard(jspec.init_policy(config, jax.random.key(0)))
    d, f, kv = 64, 128, 32
    layer = 2 * d * d + 2 * d * kv + 3 * d * f + 2 * d
    assert measure.weight_bytes(policy) == 4 * (256 * d + d + 2 * layer)
    assert measure.kv_bytes(config, 4, 10) == 2 * 2 * kv * 4 * 10
