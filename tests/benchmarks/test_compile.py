"""What `benchmarks/compile.py` reads in compiled programs is there to be found, and it finds it."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import compiled_text, measure
from jspec.hlo import instructions
from tests.compiling import as_users_compile

COLLECTIVE = """
%body (param: f32[8]) -> f32[8] {{
  %param = f32[8]{{0:T(128)}} parameter(0)
  %sum = f32[8]{{0:T(128)S(1)}} {}, \
metadata={{op_name="jit(f)/decode/loop_16/while/body/verify/add"}}
  ROOT %out = f32[8]{{0:T(128)}} add(%sum, %param)
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0:T(128)}} parameter(0)
  ROOT %while = f32[8]{{0:T(128)}} while(%x), condition=%cond, body=%body
}}
"""


@pytest.mark.parametrize(("collective", "joined"), [
    ("all-reduce(%param), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add", []),
    ("all-reduce(%param), channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add",
     [(0, 4)]),
    ("all-reduce-start(%param), replica_groups={}, to_apply=%add", [tuple(range(8))]),
    ("all-gather(%param), replica_groups=[2,4]<=[8], dimensions={0}", []),
    ("all-gather(%param), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", [(0, 4)]),
    ("collective-permute(%param), source_target_pairs={{0,1},{1,0}}", []),
    ("collective-permute-start(%param), source_target_pairs={{0,1},{3,4}}", [(3, 4)]),
])
def test_which_devices_a_collective_joins(collective, joined):
    """Of eight devices the first four are one shard of the batch."""
    found = instructions(COLLECTIVE.format(collective))
    groups = compiled_text.groups(found["sum"], 8)
    assert [group for group in groups if len({device // 4 for device in group}) > 1][:1] == joined
    crossing = compiled_text.crossing(compiled_text.in_loops(found), [0, 0, 0, 0, 1, 1, 1, 1])
    assert [line.split(":")[0] for line in crossing] == ["sum"] * len(joined)


def test_groups_that_are_not_understood_are_no_pass():
    found = instructions(COLLECTIVE.format("all-reduce(%param), replica_groups=@mesh<x=8>"))
    with pytest.raises(ValueError, match="groups cannot be read"):
        compiled_text.crossing(found, [0] * 8)


POOL, BLOCK = (6, 2, 16, 8), (2, 16, 8)


def write(pool, i):
    return pool.at[jnp.stack([i, i + 3])].set(1.0, mode="drop")


@pytest.mark.parametrize(("body", "copies"), [
    (write, False),
    (lambda pool, i: jnp.where(i < 4, write(pool, i), pool), True),
    (lambda pool, i: write(pool.astype(jnp.bfloat16), i).astype(jnp.float32), True),
    (lambda pool, i: write(pool, i) * (pool[0, 0, 0, 0] + 1), True),
], ids=["in place", "where", "converted", "scaled"])
def test_a_pool_that_a_loop_copies_is_seen(body, copies):
    def decode(pool):
        with jax.named_scope("loop_16"):
            return jax.lax.fori_loop(0, pool[0, 0, 0, 0].astype(jnp.int32),
                                     lambda i, pool: body(pool, i), pool)

    lowered = jax.jit(decode, donate_argnums=0).lower(jnp.zeros(POOL))
    found = compiled_text.read(lowered.compile(as_users_compile()).as_text(), BLOCK, [0])
    assert found["pools"] == [POOL] and found["loops"] == [16] and bool(found["copied"]) == copies


TRANSFERS = """
%body (param: bf16[648,2,128,128]) -> bf16[648,2,128,128] {
  %param = bf16[648,2,128,128]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %a = ((bf16[648,2,128,128]{3,2,1,0}), bf16[1,2,128,128]{3,2,1,0:S(1)}, s32[]{:S(2)}) \
slice-start(%param)
  %b = (bf16[648,2,128,128]{3,2,1,0:S(1)}, bf16[648,2,128,128]{3,2,1,0}, u32[]{:S(2)}) \
copy-start(%param)
  %c = bf16[648,2,128,128]{3,2,1,0:S(1)} copy-done(%b)
  %d = (bf16[648,2,128,128]{3,2,1,0}) custom-call(%c), custom_call_target="f", \
output_to_operand_aliasing={{0}: (0, {})}
  ROOT %e = bf16[648,2,128,128]{3,2,1,0} custom-call(%c), custom_call_target="ConcatBitcast"
}

ENTRY %main (x: bf16[648,2,128,128]) -> bf16[648,2,128,128] {
  %x = bf16[648,2,128,128]{3,2,1,0} parameter(0)
  ROOT %w = bf16[648,2,128,128]{3,2,1,0} while(%x), body=%body, \
metadata={op_name="jit(f)/decode/loop_16/while"}
}
"""


def test_a_pool_that_a_tpu_moves_into_its_vector_memory_is_seen():
    """As the compiler did with one of 42 MB; a transfer of one block, and a kernel that writes in
    place, are none."""
    found = compiled_text.read(TRANSFERS, (2, 128, 128), [0])
    assert [line.split(":")[0] for line in found["copied"]] == ["b", "e"]


PAUSING = """
%body (param: bf16[374,2,128,128]) -> bf16[374,2,128,128] {{
  %param = bf16[374,2,128,128]{{3,2,1,0:T(8,128)(2,1)S(5)}} parameter(0)
  ROOT %start = {} {}(%param), metadata={{op_name="jit(f)/decode/loop_16/while/body/pause/while"}}
}}

ENTRY %main (x: bf16[374,2,128,128]) -> bf16[374,2,128,128] {{
  %x = bf16[374,2,128,128]{{3,2,1,0:S(5)}} parameter(0)
  ROOT %w = bf16[374,2,128,128]{{3,2,1,0:S(5)}} while(%x), body=%body
}}
"""
HOST, DEVICE = ("bf16[374,2,128,128]{3,2,1,0:T(8,128)(2,1)S(5)}",
                "bf16[1,2,128,128]{3,2,1,0:T(8,128)(2,1)}")


@pytest.mark.parametrize(("made", "opcode", "shape"), [
    (f"(({HOST}, s32[]), {DEVICE}, u32[])", "dynamic-slice-start", (1, 2, 128, 128)),
    (f"(({HOST}, {DEVICE}, s32[]), {HOST}, u32[])", "dynamic-update-slice-start", (1, 2, 128, 128)),
    (f"({HOST}, {HOST.replace('S(5)', '')}, u32[])", "copy-start", (374, 2, 128, 128)),
])
def test_what_is_moved_to_host_memory_is_seen(made, opcode, shape):
    found = compiled_text.read(PAUSING.format(made, opcode), (2, 128, 128), [0])
    assert found["moved"] == [shape] and bool(found["copied"]) == (shape[0] > 1)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"),
                    reason="needs the TPU's compiler: pip install -e '.[aot]'")
@pytest.mark.parametrize(("shape", "options"),
                         [("qwen3-8b", []), ("qwen3-8b", ["--pausing"]), ("llama-3.2-1b", [])])
def test_decode_loops_for_eight_tpus(shape, options, tmp_path):
    """Heads of 128 and of 64, pools of a real size, two layers: exit code 0 is no collective across
    the batch, no copy of a pool, and no more than a block moved to host memory at a time."""
    path = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.compile", "--what", "rollout", "--chip", "v5e",
               "--drafts", "mtp", "--shape", shape, "--layers", "2", "--json", str(path), *options]
    done = subprocess.run(command, cwd=measure.ROOT, env=dict(os.environ), capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    row, = json.loads(path.read_text())["rows"]
    assert row["crossing"] == row["copied"] == [] and row["loops"] == [64, 16]
    assert bool(row["moved"]) == bool(options) and row["pools"][0][0] > 256
