import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from jspec.cli import main
from jspec.profile_step import loop_table, phase_table
from jspec.profiling import (
    SCOPES,
    Phase,
    length,
    meaning,
    memory_of,
    module_name,
    name_phases,
    phase_of,
    phases_of_program,
    spans_by_phase,
    trace,
)
from tests.tiny_runs import SMALL


@pytest.mark.parametrize(("op_name", "name", "part"), [
    ("jit(rollout)/jit(_rollout)/decode/while/body/verify/attention/dot_general", "verify",
     "attention"),
    ("jit(rollout)/decode/while/body/accept/head/dot_general", "accept", "head"),
    ("jit(rollout)/decode/while/cond/not", "decode, between phases", ""),
    ("jit(update)/policy_loss/jvp(trunk)/while/body/mlp/dot", "policy_loss, forward", "mlp"),
    ("jit(update)/policy_loss/transpose(jvp(trunk))/while/body/mlp/dot", "policy_loss, backward",
     "mlp"),
    ("jit(update)/optimizer/mul", "optimizer", ""),
    ("jit(update)/draft_optimizer/mul", "draft_optimizer", ""),
    ("jit(update)/reduce_sum", "other operations", ""),
])
def test_phase_of_scopes(op_name, name, part):
    assert phase_of(op_name) == Phase(name, part)


@pytest.mark.parametrize(("op_name", "phase"), [
    ("jit(rollout)/decode/loop_32/while/body/verify/mlp/dot", Phase("verify", "mlp", 32)),
    ("jit(rollout)/decode/shard_map/loop_4/while/body/admit/while/body/add",
     Phase("admit", loop=4)),
    ("jit(rollout)/decode/loop_4/while/cond/not", Phase("decode, between phases", loop=4)),
    ("jit(rollout)/decode/loop_4/while/body/pause/while/body/while/body/copy",
     Phase("pause", loop=4)),
    ("jit(rollout)/decode/gather", Phase("decode, between phases")),
])
def test_phase_in_a_loop_of_the_chain(op_name, phase):
    assert phase_of(op_name) == phase


def test_loops_have_a_table_of_their_own():
    phases = {Phase("verify", "mlp", 32): 3.0, Phase("verify", "mlp", 4): 1.0,
              Phase("verify", "attention", 4): 0.5,
              Phase("admit", loop=4): 0.25, Phase("prefill"): 0.25}
    tables = phase_table(phases), loop_table(phases)
    rows = [row for table in tables
            for row in zip(*(column.cells for column in table.columns[:3]), strict=True)]
    assert (rows == [("prefill", "0.250", "5.0%"), ("verify", "4.500", "90.0%"),
                     ("  attention", "0.500", "10.0%"), ("  mlp", "4.000", "80.0%"),
                     ("admit", "0.250", "5.0%"), ("operations, all", "5.000", ""),
                    ("loop of 32 rows", "3.000", "60.0%"), ("loop of 4 rows", "1.750", "35.0%")])


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
    spans = spans_by_phase(tmp_path, {module_name(text): phases_of_program(text)})
    assert length(spans[Phase("verify")]) > 0.5 * sum(map(length, spans.values())) > 0
    assert_named(name_phases(tmp_path, spans), spans)


def assert_named(path, spans):
    """The Perfetto trace has a track for each phase, whose spans hold those of its operations and
    no other's."""
    events = [e for e in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
              if "name" in e]
    process = next(e["pid"] for e in events
                   if e["name"] == "process_name" and e["args"]["name"] == "phases")
    tracks = {e["tid"]: e["args"]["name"] for e in events
              if e["pid"] == process and e["name"] == "thread_name"}
    assert set(tracks.values()) == {phase.name for phase in spans}
    drawn = [e for e in events if e["pid"] == process and e["ph"] == "X"]
    assert all(e["name"] == tracks[e["tid"]] for e in drawn)
    for phase, found in spans.items():
        mine = [(e["ts"] * 1e3, (e["ts"] + e["dur"]) * 1e3) for e in drawn
                if e["name"] == phase.name]
        assert all(any(start - 1 <= a and b <= end + 1 for start, end in mine) for a, b in found)
    # what was recorded is still there
    assert any(e["pid"] != process and e["ph"] == "X" for e in events)


def test_spans_that_touch_are_one(tmp_path):
    recorded = {"traceEvents": [{"ph": "X", "pid": 7, "tid": 1, "ts": 0, "dur": 1, "name": "x"}]}
    (tmp_path / "perfetto_trace.json.gz").write_bytes(gzip.compress(json.dumps(recorded).encode()))
    spans = {Phase("accept"): [(3e6, 4e6)],
             Phase("verify"): [(1e6, 2e6), (2.01e6, 3e6), (5e6, 6e6)],
             Phase("verify", "mlp", 4): [(6e6, 7e6)]}
    drawn = [e for e in json.loads(gzip.decompress(name_phases(tmp_path,
                                                               spans).read_bytes()))["traceEvents"]
             if e["ph"] == "X" and e["pid"] == 8]
    assert [(e["name"], e["tid"], e["ts"], e["dur"]) for e in drawn] == [
        ("verify", 0, 1000, 2000), ("verify", 0, 5000, 2000), ("accept", 1, 3000, 1000),
        ("loop of 4 rows", 2, 6000, 1000)]


def test_every_phase_says_what_it_is():
    names = [phase_of(f"jit(f)/{name}/dot").name for name in SCOPES]
    assert all(meaning(name) for name in [*names, "policy_loss, backward", "rollout, rest"])
    assert meaning("decode, between phases") != meaning("rollout, rest") == meaning("update, rest")


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
    total = (sum(map(length, spans_by_phase(tmp_path, {module_name(text): phases_of_program(text)})
                     .values())) / 1e9)
    assert 0.5 * wall < total <= wall * 1.05


def test_containers_have_no_time_of_their_own():
    text = jax.jit(step).lower(jnp.ones((4, 4))).compile().as_text()
    assert not any(name.startswith("while") for name in phases_of_program(text))


PROGRAM = """HloModule jit_f, is_scheduled=true

%fused (param_0: f32[8]) -> f32[8] {
  %param_0 = f32[8]{0} parameter(0)
  ROOT %tanh.1 = f32[8]{0} tanh(%param_0), metadata={op_name="jit(f)/decode/while/body/verify/tanh"}
}

%body (param.1: (f32[8])) -> (f32[8]) {
  %param.1 = (f32[8]{0}) parameter(0)
  %gte = f32[8]{0} get-tuple-element(%param.1), index=0
  %fusion.1 = f32[8]{0} fusion(%gte), kind=kLoop, calls=%fused
  %copy.2 = f32[8]{0} copy(%fusion.1)
  %alone = f32[8]{0} broadcast(), dimensions={}
  ROOT %tuple.1 = (f32[8]{0}) tuple(%copy.2)
}

ENTRY %main.9 (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0), metadata={op_name="x"}
  %copy.1 = f32[8]{0} copy(%x)
  %tuple.2 = (f32[8]{0}) tuple(%copy.1)
  %while.1 = (f32[8]{0}) while(%tuple.2), condition=%cond, body=%body, \
metadata={op_name="jit(f)/decode/while"}
  %gte.1 = f32[8]{0} get-tuple-element(%while.1), index=0
  ROOT %add.1 = f32[8]{0} add(%gte.1, %gte.1), metadata={op_name="jit(f)/commit/mlp/add"}
}
"""


@pytest.mark.parametrize(("operation", "phase"), [
    ("fusion.1", Phase("verify")),  # what is fused into it
    ("copy.2", Phase("verify")),  # what it reads
    ("copy.1", Phase("decode, between phases")),  # what reads it
    ("alone", Phase("decode, between phases")),  # the loop that it is in
    ("add.1", Phase("commit", "mlp")),  # its own
])
def test_what_xla_made_itself_belongs_with_its_neighbours(operation, phase):
    assert phases_of_program(PROGRAM)[operation] == phase


def test_an_operation_without_a_scope_has_the_programs_phase():
    text = jax.jit(lambda x: x * 2).lower(jnp.ones(4)).compile().as_text()
    assert ({phase.name for phase in phases_of_program(text, default="reshard").values()}
            == {"reshard"})


def test_memory_counts_donated_arguments_once():
    x = jnp.ones((256, 256))
    compiled = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
    memory = memory_of(compiled)
    assert memory["arguments"] == memory["results"] == memory["donated"] == x.nbytes
    assert memory["peak"] == x.nbytes + memory["temporaries"]


def test_the_profile_is_of_the_step_that_training_takes(tmp_path, capsys):
    """With all of its updates, and with what the drafter remembers; what is no phase is timed in
    the one that it is part of."""
    overrides = [*(text for text in SMALL if "draft." not in text), "data.over_sampling=1.5",
                 "grpo.correction=tis"]
    assert (main(["profile", "configs/tiny.yaml", "--out", str(tmp_path), *overrides,
                  "draft.name=suffix", "grpo.updates_per_rollout=4", "profile.repeats=1"]) == 0)
    out, record = capsys.readouterr().out, json.loads((tmp_path / "profile.json").read_text())
    assert list(record["memory_bytes"]) == ["reshard", "rollout", "pick", "remember", "rescore",
                                            "update"]
    assert list(record["seconds"]) == ["reshard", "rollout", "remember", "update"]
    assert record["updates"] == 4 and "4 updates" in out
    assert ({"remember", "optimizer", "policy_loss, backward"}
            <= {phase["name"] for phase in record["phases"]})


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
    assert (names >= {"prefill", "admit", "propose", "verify", "accept", "commit", "observe",
                      "retire", "policy_loss, forward", "policy_loss, backward",
                      "draft_loss, backward", "optimizer", "draft_optimizer"})
    assert all(name in out for name in names)
    loops = {phase["loop"] for phase in record["phases"]}
    assert len(loops) > 1 and all(f"loop of {rows} rows" in out for rows in loops if rows)
    operations = sum(phase["seconds"] for phase in record["phases"])
    assert 0 < operations < 3 * sum(record["seconds"].values())
    assert 0 < record["draft_share_of_update"] < 0.5 and "of the update" in out
    memory = record["memory_bytes"]["update"]
    assert memory["donated"] > 0 and memory["peak"] >= memory["arguments"]
    assert "perfetto_trace.json.gz" in out and "Means over 4 steps" in out
