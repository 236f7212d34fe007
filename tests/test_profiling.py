import json

import jax
import jax.numpy as jnp
import pytest

from jspec.cli import main
from jspec.profiling import Phase, memory_of, module_name, phase_of, phases_of_program, seconds_by_phase, trace


@pytest.mark.parametrize(("op_name", "name", "part"), [
    ("jit(rollout)/jit(_rollout)/decode/while/body/verify/attention/dot_general", "verify", "attention"),
    ("jit(rollout)/decode/while/body/accept/head/dot_general", "accept", "head"),
    ("jit(rollout)/decode/while/cond/not", "decode, between phases", ""),
    ("jit(update)/policy_loss/jvp(trunk)/while/body/mlp/dot", "policy_loss, forward", "mlp"),
    ("jit(update)/policy_loss/transpose(jvp(trunk))/while/body/mlp/dot", "policy_loss, backward", "mlp"),
    ("jit(update)/optimizer/mul", "optimizer", ""),
    ("jit(update)/draft_optimizer/mul", "draft_optimizer", ""),
    ("jit(update)/reduce_sum", "other operations", ""),
])
def test_phase_of_scopes(op_name, name, part):
    assert phase_of(op_name) == Phase(name, part)


def step(x):
    def body(_, x):
        with jax.named_scope("verify"):
            x = jnp.tanh(x @ x)
        with jax.named_scope("commit"):
            return x + 1

    return jax.lax.fori_loop(0, 4, body, x)


def test_a_trace_is_split_by_phase(tmp_path):
    x = jnp.full((700, 700), 1e-3)
    compiled = jax.jit(step).lower(x).compile()
    jax.block_until_ready(compiled(x))
    with trace(tmp_path):
        jax.block_until_ready(compiled(x))
    text = compiled.as_text()
    assert module_name(text) == "jit_step"
    seconds = seconds_by_phase(tmp_path, {module_name(text): phases_of_program(text)})
    assert seconds[Phase("verify")] > 0.5 * sum(seconds.values()) > 0
    assert list(tmp_path.rglob("perfetto_trace.json.gz")) and list(tmp_path.rglob("*.xplane.pb"))


def test_time_on_several_threads_counts_once(tmp_path):
    """Phases cannot take longer than the wall clock, however many threads share the work."""
    import time

    x = jnp.full((1500, 1500), 1e-3)
    compiled = jax.jit(step).lower(x).compile()
    with trace(tmp_path):
        start = time.perf_counter()
        jax.block_until_ready(compiled(x))
        wall = time.perf_counter() - start
    text = compiled.as_text()
    total = sum(seconds_by_phase(tmp_path, {module_name(text): phases_of_program(text)}).values())
    assert 0.5 * wall < total <= wall * 1.05


def test_containers_have_no_time_of_their_own():
    text = jax.jit(step).lower(jnp.ones((4, 4))).compile().as_text()
    assert not any(name.startswith("while") for name in phases_of_program(text))


def test_an_operation_without_a_scope_has_the_programs_phase():
    text = jax.jit(lambda x: x * 2).lower(jnp.ones(4)).compile().as_text()
    assert {phase.name for phase in phases_of_program(text, default="reshard").values()} == {"reshard"}


def test_memory_counts_donated_arguments_once():
    x = jnp.ones((256, 256))
    compiled = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
    memory = memory_of(compiled)
    assert memory["arguments"] == memory["results"] == memory["donated"] == x.nbytes
    assert memory["peak"] == x.nbytes + memory["temporaries"]


@pytest.mark.slow
def test_profile_of_a_step(tmp_path, capsys):
    """`jspec profile` end to end: what it prints and writes adds up."""
    code = main(["profile", "configs/tiny.yaml", "--out", str(tmp_path), "data.prompts_per_step=2",
                 "draft.every_n_steps=4"])
    out = capsys.readouterr().out
    assert code == 0
    record = json.loads((tmp_path / "profile.json").read_text())
    assert set(record["seconds"]) == set(record["memory_bytes"]) == {"reshard", "rollout", "update"}
    names = {phase["name"] for phase in record["phases"]}
    assert names >= {"prefill", "propose", "verify", "accept", "commit", "observe", "policy_loss, forward",
                     "policy_loss, backward", "draft_loss, backward", "optimizer", "draft_optimizer"}
    assert all(name in out for name in names)
    operations = sum(phase["seconds"] for phase in record["phases"])
    assert 0 < operations < 3 * sum(record["seconds"].values())
    assert 0 < record["draft_share_of_update"] < 0.5 and "of the update" in out
    memory = record["memory_bytes"]["update"]
    assert memory["donated"] > 0 and memory["peak"] >= memory["arguments"]
    assert "perfetto_trace.json.gz" in out and "Means over 4 steps" in out
